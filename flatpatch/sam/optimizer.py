"""SAM around any torch optimizer, for training loops with a closure."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatpatch.errors import UserError
from flatpatch.kinds import Kind
from flatpatch.sam.pairs import LoraPair
from flatpatch.sam.perturbation import AscentStep, check_settings
from flatpatch.sam.radii import group_radii
from flatpatch.sam.steps import Combine, Gradients, StepPasses, check_radius, chosen_kind, kept, put_gradients

Loss = Any  # what a closure returns: a Tensor, a float, or nothing

_SCALER = (
    "a GradScaler cannot work on SAM itself: it would unscale gradients that SAM's two passes then replace, or unscale "
    "them twice. Write: loss = sam.gradients(closure), with scaler.scale(loss).backward() in the closure; to clip, "
    "scaler.unscale_(sam.base_optimizer) and the clipping; then scaler.step(sam.base_optimizer); scaler.update()."
)
_EARLIER = (
    "there were gradients before SAM's step, and they are dropped: only the closure's own count. To accumulate "
    "gradients, let the closure run all the micro-batches. Otherwise leave out the backward pass before "
    "sam.step(closure), which only costs time, or call sam.zero_grad() after a step that was not SAM's."
)


class SAM(Optimizer):
    """Descend with the gradient taken at ``w + epsilon`` instead of ``w``, or as another kind of SAM does.

    Wraps an optimizer instance and is one itself: parameter groups, learning-rate schedulers, checkpoints
    and ``zero_grad`` are those of the base optimizer, so a checkpoint holds no perturbation and resumes as
    if SAM were not there.

    The closure runs forward and backward, and returns the loss. It is called twice a step, both times with the
    same random numbers, so dropout masks agree. Earlier gradients are cleared before each call, whether the
    closure clears them or not. For gradient accumulation let the closure run all the micro-batches. Clip in
    between::

        loss = sam.gradients(closure)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sam.base_optimizer.step()

    Clipping the ascent gradient would change nothing (the norm cancels) and clipping it by value would turn
    it, so only the final gradient is there to clip. With a ``GradScaler`` let the closure call
    ``scaler.scale(loss).backward()``; the scale cancels in the perturbation::

        loss = sam.gradients(closure)
        scaler.unscale_(sam.base_optimizer)  # if the gradient is to be clipped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(sam.base_optimizer)  # leaves the step out where a gradient is not finite
        scaler.update()

    A learning-rate scheduler takes the optimizer whose ``step`` is called: ``sam``, or ``sam.base_optimizer`` in
    these two recipes.

    BatchNorm layers count both passes in their running statistics, unless SAM knows the model:
    ``SAM(optimizer, model=model)``.

    ``sam.progress``, from 0 to 1, tells the kinds that grow weaker with it how far the training is.

    A parameter group may have a ``rho`` of its own, as it may have an ``lr``. The perturbation of group k is
    then ``rho_k * g_k / norm(g)``, with one norm over all the perturbed weights (see ``group_radii``).

    Attributes:
        kind: How a step is made of passes, and what it remembers from step to step.
        climbing: Whether the closure is called for a gradient that is not, by itself, the one to descend along.
        last_step: What the latest step's first perturbation did; None if it had none.
        perturbed_loss: What the closure returned in the latest step's last pass, if at perturbed weights and not its
            only one.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> sam = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
        >>> def closure():
        ...     sam.zero_grad()
        ...     loss = weight.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> float(sam.step(closure))
        12.5
        >>> [round(entry, 4) for entry in weight.tolist()]  # w - lr * (w + rho * w / |w|)
        [2.67, 3.56]
    """

    def __new__(cls, *arguments: Any, **_: Any) -> SAM:
        """Refuse the call that other SAMs take: parameters, and the optimizer's class."""
        if len(arguments) > 1 and isinstance(arguments[1], type):
            made = f"torch.optim.{arguments[1].__name__}(parameters, lr=...)"
            raise UserError(f"SAM wraps an optimizer that is there already. Write: SAM({made}, rho=0.05)")
        return super().__new__(cls)

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        parameters: Iterable[Tensor] | None = None,
        sync: str = "local",
        model: nn.Module | None = None,
        random_seed: int | None = None,
        diagnostics: bool = True,
        kind: Kind | None = None,
        pairs: Iterable[LoraPair] | None = None,
        radius: str = "factors",
    ) -> None:
        """Wrap ``base_optimizer``.

        Args:
            base_optimizer: An instance; it does the descent and owns the parameter groups.
            rho: Radius in weight units (ASAM's is on another scale) of all groups without their own; may be
                changed between steps.
            adaptive: ASAM instead of SAM.
            eta: ASAM's addition to ``|w|``.
            parameters: What to perturb; by default all parameters of the base optimizer; those without a
                gradient do not move.
            sync: "local" or "global", see ``perturbed``. Plain DistributedDataParallel averages the ascent
                gradient anyway; give ``model`` to keep it local.
            model: If given, its BatchNorm statistics come from the unperturbed pass alone; and if it is a
                DistributedDataParallel, the ascent pass runs under its ``no_sync``.
            random_seed: Move along a random direction instead of the gradient's, another in each step: a control
                that costs as much and differs in the direction alone. The directions follow from this seed and
                from ``steps``, which is in no checkpoint: set it to go on with those that would have come.
            diagnostics: Whether to measure the effective perturbation.
            kind: Another kind of SAM, from :mod:`flatpatch.kinds`, instead of ``adaptive`` or ``random_seed``. What
                it remembers from step to step is not in the checkpoint: keep ``sam.kind.state()`` beside it.
            pairs: The model's LoRA factors, as :func:`flatpatch.sam.lora_pairs` finds them, where a radius or a kind
                goes by the weights that they change.
            radius: "factors": rho is the norm of the perturbation itself; "effective": that of the change that it
                makes to the weights that LoRA's factors add to, see :mod:`flatpatch.sam.effective`.

        Raises:
            ValueError: If a setting is out of range, a random direction is to be adaptive, a kind is given twice, or
                an effective radius has no pairs.
            TypeError: If ``base_optimizer`` is not an optimizer instance.
            UserError: If it is one that SAM cannot step, or a group has an option that only a whole step can have.
        """
        # Optimizer.__init__ is not called: it would make a second set of groups and state.
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer instance such as torch.optim.AdamW(...), got {base_optimizer!r}"
            )
        check_settings(rho, eta, sync)
        self.kind = chosen_kind(kind, adaptive=adaptive, eta=eta, random_seed=random_seed)
        _refuse_unsupported(base_optimizer)
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.sync = sync
        self.model = model
        self.steps = 0
        self.climbing = False
        self.progress = 0.0
        self.pairs = None if pairs is None else list(pairs)
        self.radius = radius
        check_radius(radius, self.pairs)
        self.diagnostics = diagnostics
        self.last_step: AscentStep | None = None
        self.perturbed_loss: Loss = None
        self._chosen = None if parameters is None else list(parameters)
        self._left: weakref.ref[Tensor] | None = None  # the first gradient of the latest step
        self._warned = False
        for each in self._radii(self._parameters()):
            check_settings(each, eta, sync)

    def gradients(self, closure: Callable[[], Loss]) -> Loss:
        """Leave the SAM gradient in ``.grad``, with the weights as they were.

        Args:
            closure: Runs forward and backward, returns the loss.

        Returns:
            What the closure returned for the unperturbed weights, detached.

        Raises:
            ValueError: If the closure left no gradient on any perturbed parameter.
        """
        parameters = self._parameters()
        self._warn_of_earlier_gradients(parameters)
        passes = _ClosurePasses(self, closure, parameters)
        try:
            self.kind.step(passes)
        finally:
            self.last_step, self.perturbed_loss = passes.report, passes.perturbed_loss
        self.steps += 1
        self._left = next((weakref.ref(p.grad) for p in parameters if p.grad is not None), None)
        return passes.loss

    def _one_pass(self, closure: Callable[[], Loss], parameters: list[Tensor]) -> Loss:
        """Call the closure, with no gradient left from before, and check that it leaves some."""
        _clear(self._trained(parameters))
        earlier = {id(p): (weakref.ref(p.grad), p.grad._version) for p in parameters if p.grad is not None}
        with torch.set_grad_enabled(True):
            loss = _detached(closure())
        for parameter in parameters:
            gradient = parameter.grad
            before, version = earlier.get(id(parameter), (lambda: None, 0))
            if gradient is not None and not (gradient is before() and gradient._version == version):
                return loss
        raise ValueError(
            f"the closure left no gradient on any of the {len(parameters)} perturbed parameters: "
            "it must run forward and backward, and return the loss"
        )

    def _warn_of_earlier_gradients(self, parameters: list[Tensor]) -> None:
        first = next((p.grad for p in parameters if p.grad is not None), None)
        if first is None or self._warned or (self._left is not None and self._left() is first):
            return
        self._warned = True
        warnings.warn(_EARLIER, stacklevel=3)

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss:
        """Take one SAM step.

        Args:
            closure: Runs forward and backward, returns the loss.

        Returns:
            What the closure returned for the unperturbed weights, detached.

        Raises:
            ValueError: If no closure is given, or it left no gradient on any perturbed parameter.
        """
        if closure is None:
            raise ValueError("SAM needs a closure to evaluate the loss twice: sam.step(closure)")
        loss = self.gradients(closure)
        self.base_optimizer.step()
        return loss

    def _parameters(self) -> list[Tensor]:
        if self._chosen is not None:
            return self._chosen
        return [p for group in self.base_optimizer.param_groups for p in group["params"]]

    def _trained(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the base optimizer's parameters, and those of these that are not among them."""
        own = [p for group in self.base_optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in [*own, *parameters]}.values())

    def _radii(self, parameters: list[Tensor]) -> list[float]:
        return group_radii(self.base_optimizer, parameters, self.rho)

    # Everything below is the base optimizer's. Properties rather than shared references, because loading a
    # checkpoint replaces the base optimizer's groups and state by new objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups."""
        # A GradScaler keeps its books by optimizer: what it unscales here, it unscales again on the base optimizer.
        if sys._getframe(1).f_code is GradScaler._unscale_grads_.__code__:
            raise UserError(_SCALER)
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's checkpoint."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer.

        Args:
            param_group: As the base optimizer takes it, with a ``rho`` of its own or without.

        Raises:
            ValueError: If its ``rho`` is out of range.
        """
        if "rho" not in self.defaults:
            check_settings(param_group.get("rho", 0.0), 0.0, self.sync)
        self.base_optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base optimizer's parameters."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        """Find whatever else an optimizer has (its hooks) on the base optimizer."""
        if name == "base_optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        own = "".join(f", {name}={value}" for name, value in vars(self.kind).items() if not name.startswith("_"))
        kind = f"{self.kind.title}(rho={self.rho}{own})"
        return f"{kind} around {self.base_optimizer!r}"


class _ClosurePasses(StepPasses):
    """The passes of a step by calls of a closure."""

    def __init__(self, sam: SAM, closure: Callable[[], Loss], parameters: list[Tensor]) -> None:
        super().__init__(
            parameters,
            sam._trained(parameters),
            radii=sam._radii(parameters),
            place=(sam.steps,),
            optimizer=sam.base_optimizer,
            sync=sam.sync,
            model=sam.model,
            diagnostics=sam.diagnostics,
            pairs=sam.pairs,
            radius=sam.radius,
            progress=sam.progress,
        )
        self._sam, self._closure = sam, closure

    def _climb(self, weights: list[Tensor], *, keep: bool, combined: bool) -> tuple[Loss, Gradients]:
        self._sam.climbing = True
        try:
            with nullcontext() if combined else _without_reduction(self._model):
                loss = self._sam._one_pass(self._closure, self._chosen)
        finally:
            self._sam.climbing = False
        gradients = [weight.grad for weight in weights]
        return loss, kept(gradients) if keep else gradients

    def _descend(self, combine: Combine | None) -> Loss:
        loss = self._sam._one_pass(self._closure, self._chosen)
        if combine is not None:
            put_gradients(self._trained, combine(kept(weight.grad for weight in self._trained)))
        return loss


def _refuse_unsupported(base_optimizer: Optimizer) -> None:
    name = type(base_optimizer).__name__
    # Of the class: a scheduler puts a function in the place of the instance's own.
    _, *arguments = inspect.signature(type(base_optimizer).step).parameters.values()
    needed = any(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments)
    if needed or isinstance(base_optimizer, SAM):
        raise UserError(
            f"SAM cannot be wrapped around {name}: its step needs a closure and evaluates the loss itself, while SAM "
            "hands over one finished gradient. Use an optimizer whose step() works without one, such as SGD or AdamW."
        )
    if any(group.get("differentiable") for group in base_optimizer.param_groups):
        raise UserError(
            f"SAM cannot be wrapped around {name}(differentiable=True): it restores the weights from a copy, through "
            "which nothing is differentiated. Use differentiable=False."
        )


def _clear(parameters: Iterable[Tensor]) -> None:
    """Set gradients to zero, not to None: a closure that keeps zeros keeps them, as with the base optimizer alone."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with torch.no_grad():
        if dense := [gradient for gradient in gradients if not gradient.is_sparse]:
            torch._foreach_zero_(dense)
        for gradient in gradients:
            if gradient.is_sparse:
                gradient.zero_()


def _detached(loss: Loss) -> Loss:
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


@contextmanager
def _without_reduction(model: nn.Module | None) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield

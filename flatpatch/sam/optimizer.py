"""SAM around any torch optimizer, for training loops with a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatpatch.sam.passes import RandomState, batch_norm_statistics_kept
from flatpatch.sam.perturbation import AscentStep, check_settings, perturbed

Loss = Any  # what a closure returns: a Tensor, or a float


class SAM(Optimizer):
    """Descend with the gradient taken at ``w + epsilon`` instead of ``w``.

    Wraps an optimizer instance and is one itself: parameter groups, learning-rate schedulers, checkpoints
    and ``zero_grad`` are those of the base optimizer, so a checkpoint holds no perturbation and resumes as
    if SAM were not there.

    The closure clears the gradients, runs forward and backward, and returns the loss. It is called twice a
    step, both times with the same random numbers, so dropout masks agree. For gradient accumulation let the
    closure run all the micro-batches. Clip in between::

        loss = sam.gradients(closure)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sam.base_optimizer.step()

    Clipping the ascent gradient would change nothing (the norm cancels) and clipping it by value would turn
    it, so only the final gradient is there to clip. With a ``GradScaler`` let the closure call
    ``scaler.scale(loss).backward()``; the scale cancels in the perturbation. Then ``scaler.unscale_`` and
    ``scaler.step`` take ``sam.base_optimizer``.

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
        diagnostics: bool = True,
    ) -> None:
        """Wrap ``base_optimizer``.

        Args:
            base_optimizer: An instance; it does the descent and owns the parameter groups.
            rho: Radius in weight units (ASAM's is on another scale); may be changed between steps.
            adaptive: ASAM instead of SAM.
            eta: ASAM's addition to ``|w|``.
            parameters: What to perturb; by default all parameters of the base optimizer; those without a
                gradient do not move.
            sync: "local" or "global", see ``perturbed``. Plain DistributedDataParallel averages the ascent
                gradient anyway; give ``model`` to keep it local.
            model: If given, its BatchNorm statistics come from the unperturbed pass alone; and if it is a
                DistributedDataParallel, the ascent pass runs under its ``no_sync``.
            diagnostics: Whether to measure the effective perturbation.

        Raises:
            ValueError: If a setting is out of range.
            TypeError: If ``base_optimizer`` is not an optimizer instance.
        """
        # Optimizer.__init__ is not called: it would make a second set of groups and state.
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be an optimizer instance such as torch.optim.AdamW(...), got {base_optimizer!r}"
            )
        check_settings(rho, eta, sync)
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.adaptive = adaptive
        self.eta = eta
        self.sync = sync
        self.model = model
        self.diagnostics = diagnostics
        self.last_step: AscentStep | None = None
        self.perturbed_loss: Loss = None
        self._chosen = None if parameters is None else list(parameters)

    def gradients(self, closure: Callable[[], Loss]) -> Loss:
        """Leave the SAM gradient in ``.grad``, with the weights as they were.

        Args:
            closure: Clears the gradients, runs forward and backward, returns the loss.

        Returns:
            The unperturbed loss, detached.

        Raises:
            ValueError: If the closure left no gradient on any perturbed parameter.
        """
        parameters = self._parameters()
        random_state = RandomState()
        with _without_reduction(self.model), torch.set_grad_enabled(True):
            loss = _detached(closure())
        gradients = [parameter.grad for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"the closure left no gradient on any of the {len(parameters)} perturbed parameters: "
                "it must clear the gradients, run forward and backward, and return the loss"
            )
        random_state.restore()
        ascent = perturbed(
            parameters,
            gradients,
            rho=self.rho,
            adaptive=self.adaptive,
            eta=self.eta,
            sync=self.sync,
            diagnostics=self.diagnostics,
        )
        del gradients
        with ascent as self.last_step, batch_norm_statistics_kept(self.model), torch.set_grad_enabled(True):
            self.perturbed_loss = _detached(closure())
        return loss

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss:
        """Take one SAM step.

        Args:
            closure: Clears the gradients, runs forward and backward, returns the loss.

        Returns:
            The unperturbed loss, detached.

        Raises:
            ValueError: If no closure is given.
        """
        if closure is None:
            raise ValueError("SAM needs a closure to evaluate the loss twice: sam.step(closure)")
        loss = self.gradients(closure)
        self.base_optimizer.step()
        return loss

    def _parameters(self) -> list[Tensor]:
        if self._chosen is not None:
            return self._chosen
        return [p for group in self.param_groups for p in group["params"]]

    # Everything below is the base optimizer's. Properties rather than shared references, because loading a
    # checkpoint replaces the base optimizer's groups and state by new objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups."""
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
        """Add a group to the base optimizer."""
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
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        kind = f"ASAM(rho={self.rho}, eta={self.eta})" if self.adaptive else f"SAM(rho={self.rho})"
        return f"{kind} around {self.base_optimizer!r}"


def _detached(loss: Loss) -> Loss:
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


@contextmanager
def _without_reduction(model: nn.Module | None) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield

"""SAM for a Hugging Face Trainer (4.28), its own ``training_step`` unchanged, with or without DeepSpeed.

The step calls the trainer's ``training_step`` twice. In the first pass the backward call is intercepted and
replaced by ``torch.autograd.grad`` over the perturbed parameters. That runs no AccumulateGrad node, so no
``.grad`` is written, no hook of DistributedDataParallel or ZeRO fires, nothing is reduced, and DeepSpeed
counts no micro-step. The second pass is the trainer's own step, at the perturbed weights, which are put back
before it returns: whatever saves, evaluates or updates the weights afterwards sees the unperturbed ones.

With gradient accumulation every micro-batch has its own perturbation. Two traces of the first pass remain:
whatever ``training_step`` logs itself appears twice, and DeepSpeed's own monitor shows the perturbed loss.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from flatpatch.errors import UserError
from flatpatch.kinds import Kind
from flatpatch.sam.pairs import LoraPair, trained_lora_pairs
from flatpatch.sam.perturbation import AscentStep, check_settings
from flatpatch.sam.radii import group_radii
from flatpatch.sam.scope import SCOPES, is_adapter, select_parameters
from flatpatch.sam.steps import RADII, Combine, Gradients, StepPasses, chosen_kind, first_examples, kept

ASCENT_LOSSES = ("total", "task")

_NO_GRADIENT = (
    "the ascent pass found no gradient for any of the {count} perturbed tensors: the loss that training_step "
    "differentiates does not depend on them. Choose a scope that it depends on."
)
_REENTRANT = (
    "SAM cannot follow reentrant gradient checkpointing: torch.autograd.grad does not see the weights inside it. "
    "Train without gradient_checkpointing, or checkpoint with use_reentrant=False."
)
_TWICE = (
    "training_step makes more than one backward call, and this kind of SAM combines the gradients of whole passes. Use "
    "sam=sam."
)


class SAMTrainingStep:
    """A sharpness-aware ``training_step``: ``trainer.training_step = SAMTrainingStep(trainer)``.

    Attributes:
        last_step: What the latest ascent step did, with ``grad_norm`` that of the loss as ``training_step``
            returns it (divided by the gradient accumulation steps, any loss scale removed).
        perturbed_loss: What the latest step's last pass returned, if at perturbed weights and not its only one.
        fallbacks: How many ascent gradients were not finite and gave a plain step; a tensor on the device.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        scope: str = "lora",
        sync: str = "local",
        ascent_loss: str = "total",
        ascent_batch: float = 1.0,
        random_seed: int | None = None,
        kind: Kind | None = None,
        radius: str = "factors",
    ) -> None:
        """Wrap ``trainer.training_step``, without assigning it.

        Args:
            trainer: Has ``training_step(model, inputs)``, ``compute_loss``, ``model`` and ``args``.
            rho: Radius in weight units; 0 trains bit for bit as without SAM. Without DeepSpeed, a group of the
                trainer's optimizer may have its own, see ``group_radii``.
            adaptive: ASAM instead of SAM.
            eta: ASAM's addition to ``|w|``.
            scope: Which trainable weights to perturb: "lora", "A", "B", "head" or "all".
            sync: "local": each process perturbs along its own gradient; "global": along the average.
            ascent_loss: "total": ascend the loss that ``training_step`` descends; "task": only what
                ``compute_loss`` returns, without the penalties added inside ``training_step``.
            ascent_batch: Ascend the loss of this share of each micro-batch, its first examples, which is also the one
                that is returned and logged. Of a kind whose ascent's gradient does more than that: of all of it.
            random_seed: Move along a random direction instead, another for each micro-batch: a control. The
                directions follow from this seed, the trainer's step and the place in it, so that a training that
                was resumed has those that it would have had.
            kind: Another kind of SAM, from :mod:`flatpatch.kinds`, instead of ``adaptive`` or ``random_seed``.
            radius: As for :class:`flatpatch.sam.SAM`; the pairs are found in ``trainer.model``.

        Raises:
            ValueError: If a setting is out of range, a random direction is to be adaptive, or a kind is given twice.
        """
        check_settings(rho, eta, sync)
        self.kind = chosen_kind(kind, adaptive=adaptive, eta=eta, random_seed=random_seed)
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        if not 0 < ascent_batch <= 1:
            raise ValueError(f"ascent_batch must be over 0 and at most 1, got {ascent_batch!r}")
        if ascent_loss not in ASCENT_LOSSES:
            raise ValueError(f"ascent_loss must be one of {', '.join(ASCENT_LOSSES)}, got {ascent_loss!r}")
        if radius not in RADII:
            raise ValueError(f"radius must be one of {', '.join(RADII)}, got {radius!r}")
        self.trainer = trainer
        self.radius = radius
        self.rho = rho
        self.scope = scope
        self.sync = sync
        self.ascent_loss = ascent_loss if self.kind.climbs else "total"
        self.ascent_batch = ascent_batch if self.kind.climbs else 1.0
        self.last_step: AscentStep | None = None
        self.perturbed_loss: Tensor | None = None
        self.fallbacks: Tensor | None = None
        self._plain_step = trainer.training_step
        self._place = (-1, 0)  # the latest step, and how many of its micro-batches came before
        self._prepared: tuple[nn.Module, list[Tensor]] | None = None
        self.pairs: list[LoraPair] | None = None

    def parameters(self) -> list[Tensor]:
        """Return the weights that are perturbed, after checking that this trainer can be served.

        Returns:
            Trainable parameters of ``trainer.model``, in its order.

        Raises:
            UserError: If the scope is empty, or the trainer shards or scales in a way SAM cannot follow.
        """
        if self._prepared is None or self._prepared[0] is not self.trainer.model:
            _refuse_unsupported(self.trainer)
            chosen = select_parameters(self.trainer.model.named_parameters(), self.scope)
            if self.radius == "effective" or self.kind.of_pairs:
                self.pairs = trained_lora_pairs(self.trainer.model)
            self._prepared = (self.trainer.model, [parameter for _, parameter in chosen])
        return self._prepared[1]

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Take one step's two passes, leaving the SAM gradient where ``training_step`` leaves its own.

        Args:
            model: As the trainer's loop passes it.
            inputs: One micro-batch.

        Returns:
            The unperturbed loss, scaled as ``training_step`` returns it.
        """
        parameters = self.parameters()
        passes = _TrainerPasses(self, parameters, model, inputs)
        self.kind.step(passes)
        self.perturbed_loss = passes.perturbed_loss
        self._keep(passes)
        loss: Tensor = passes.loss
        return loss

    def _next_place(self) -> tuple[int, int]:
        """Return the place of the micro-batch that comes: its step, and its number within the step."""
        step = getattr(getattr(self.trainer, "state", None), "global_step", 0)
        self._place = (step, self._place[1] + 1 if step == self._place[0] else 0)
        return self._place

    def _radii(self, parameters: list[Tensor]) -> list[float]:
        optimizer = getattr(self.trainer, "optimizer", None)
        if optimizer is None:
            return [self.rho] * len(parameters)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside DeepSpeed's
        radii = group_radii(optimizer, parameters, self.rho)
        if getattr(self.trainer, "deepspeed", None) is not None and any("rho" in g for g in optimizer.param_groups):
            raise UserError(
                "SAM cannot follow a parameter group's own rho under DeepSpeed, whose groups hold flattened copies of "
                "the weights. Take rho out of the groups, or train without DeepSpeed."
            )
        return radii

    def _keep(self, passes: _TrainerPasses) -> None:
        report = passes.report
        if report is None:
            self.last_step = None
            return
        self.last_step = dataclasses.replace(report, grad_norm=report.grad_norm / passes.scale)
        if self.fallbacks is None:
            self.fallbacks = torch.zeros((), dtype=torch.int64, device=report.finite.device)
        self.fallbacks += ~report.finite.to(self.fallbacks.device)


class _TrainerPasses(StepPasses):
    """The passes of a step by calls of a trainer's ``training_step``.

    Attributes:
        scale: By how much the gradient of the first perturbation was scaled.
    """

    def __init__(self, step: SAMTrainingStep, parameters: list[Tensor], model: nn.Module, inputs: Mapping[str, Any]):
        trainer = step.trainer
        optimizer = getattr(trainer, "optimizer", None)
        super().__init__(
            parameters,
            [parameter for parameter in trainer.model.parameters() if parameter.requires_grad],
            radii=step._radii(parameters),
            place=step._next_place(),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            sync=step.sync,
            model=trainer.model,
            pairs=step.pairs,
            radius=step.radius,
            progress=_progress(trainer),
        )
        self.begins = self.place[-1] == 0
        self.scale: Tensor | float = 1.0
        self._trainer, self._training_step = trainer, step._plain_step
        self._task_only = step.ascent_loss == "task"
        self._share = step.ascent_batch
        self._called_with = (model, inputs)

    def momentum(self) -> Gradients:
        """Return the optimizer's momentum, which DeepSpeed holds in parts, by other tensors than the weights."""
        if getattr(self._trainer, "deepspeed", None) is not None:
            raise UserError(
                "sam=msam cannot find the momentum of each weight under DeepSpeed, whose optimizer holds flattened "
                "copies. Train with launcher=python, or choose another kind of SAM."
            )
        return super().momentum()

    def _loss_scale(self) -> Tensor | float:
        return _loss_scale(self._trainer, self.loss.device)

    def _climb(self, weights: list[Tensor], *, keep: bool, combined: bool) -> tuple[Tensor, Gradients]:
        model, inputs = self._called_with
        ascent = _AscentPass(self._trainer, weights, task_only=self._task_only)
        # DistributedDataParallel's reducer must learn nothing of this pass, so it gets the bare module.
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        with ascent.intercepted():
            loss = self._training_step(bare, first_examples(inputs, self._share))
        gradients = ascent.take_gradients()
        if keep:
            return loss, kept(gradients, ascent.scale)
        self.scale = ascent.scale
        return loss, gradients

    def _descend(self, combine: Combine | None) -> Tensor:
        model, inputs = self._called_with
        if combine is None:
            return self._training_step(model, inputs)  # type: ignore[no-any-return]
        descent = _CombinedPass(self._trainer, self._trained, combine)
        with descent.intercepted():
            return self._training_step(model, inputs)  # type: ignore[no-any-return]


def _progress(trainer: Any) -> float:
    """Return how far the training is, from 0 to 1."""
    state = getattr(trainer, "state", None)
    total: int = getattr(state, "max_steps", 0)
    return getattr(state, "global_step", 0) / total if total > 0 else 0.0


def _loss_scale(trainer: Any, device: torch.device) -> Tensor | float:
    """Return by what the loss is multiplied so that its gradient can be held in 16 bits."""
    if getattr(trainer, "deepspeed", None) is not None:
        return getattr(trainer.deepspeed.optimizer, "loss_scale", 1.0)
    if getattr(trainer, "do_grad_scaling", False):
        scale: Tensor = trainer.scaler.scale(torch.ones((), device=device))
        return scale
    return 1.0


class _AscentPass:
    """Lets a backward call differentiate into a list instead of into ``.grad``."""

    def __init__(self, trainer: Any, parameters: list[Tensor], *, task_only: bool) -> None:
        self.scale: Tensor | float = 1.0
        self._trainer = trainer
        self._engine: Any = getattr(trainer, "deepspeed", None)
        self._parameters = parameters
        self._task_only = task_only
        self._task_loss: Tensor | None = None
        self._gradients: list[Tensor | None] | None = None
        self._plain_backward: Any = None

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Stand in for the backward call inside the block."""
        self._plain_backward = torch.Tensor.backward if self._engine is None else self._engine.backward
        with ExitStack() as stack:
            if self._engine is not None:
                stack.enter_context(_replaced(self._engine, "backward", self._engine_backward))
            else:
                stack.enter_context(_replaced(torch.Tensor, "backward", self._for_this_thread()))
            # Its weights would silently count as unused, and the step follow the penalties alone.
            stack.enter_context(_replaced(CheckpointFunction, "apply", _refuse_reentrant))
            if self._task_only:
                kept = self._kept_loss(self._trainer.compute_loss)
                stack.enter_context(_replaced(self._trainer, "compute_loss", kept))
            try:
                yield
            finally:
                self._task_loss = None

    def take_gradients(self) -> list[Tensor | None]:
        """Hand over the gradients, keeping no reference, so that their memory is free in the second pass."""
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            raise RuntimeError("training_step made no backward call, so SAM has no loss to ascend")
        if all(gradient is None for gradient in gradients):
            raise UserError(_NO_GRADIENT.format(count=len(gradients)))
        return gradients

    def _for_this_thread(self) -> Callable[..., None]:
        original: Callable[..., None] = torch.Tensor.backward
        thread = threading.get_ident()

        def backward(
            loss: Tensor,
            gradient: Tensor | None = None,
            retain_graph: bool | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            if threading.get_ident() == thread:
                self._tensor_backward(loss, gradient, retain_graph)
            else:
                original(loss, gradient, retain_graph, *args, **kwargs)

        return backward

    def _kept_loss(self, compute_loss: Any) -> Any:
        def compute_and_keep(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self._task_loss = loss.mean()
            return result

        return compute_and_keep

    def _tensor_backward(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool | None) -> None:
        self.scale = _loss_scale(self._trainer, loss.device)
        if self._task_only:
            loss = self._task() / self._trainer.args.gradient_accumulation_steps * self.scale
        self._differentiate(loss, gradient, retain_graph)

    def _engine_backward(
        self,
        loss: Tensor,
        allreduce_gradients: bool = True,
        release_loss: bool = False,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> Tensor:
        """What ``DeepSpeedEngine.backward`` (0.15.4) returns, with its scales but none of its effects."""
        engine = self._engine
        accumulation = engine.gradient_accumulation_steps()
        if accumulation > 1 and (scale_wrt_gas if engine.scale_wrt_gas is None else engine.scale_wrt_gas):
            loss = loss.float() / accumulation
        self.scale = _loss_scale(self._trainer, loss.device)
        ascended = self._task() / accumulation if self._task_only else loss
        self._differentiate(ascended.float() * self.scale, None, retain_graph)
        return loss

    def _task(self) -> Tensor:
        if self._task_loss is None:
            raise RuntimeError("ascent_loss=task needs training_step to call compute_loss, and it did not")
        return self._task_loss

    def _differentiate(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool | None) -> None:
        if not loss.requires_grad:
            raise UserError(_NO_GRADIENT.format(count=len(self._parameters)))
        new = torch.autograd.grad(loss, self._parameters, gradient, retain_graph, allow_unused=True)
        if self._gradients is None:
            self._gradients = list(new)
        else:
            pairs = zip(self._gradients, new, strict=True)
            self._gradients = [b if a is None else a if b is None else a + b for a, b in pairs]


class _CombinedPass(_AscentPass):
    """Lets a backward call leave, in the place of the loss's gradient, what a kind of SAM makes of it.

    The trainer's own backward call then differentiates what has that gradient, so that whatever listens to it (the
    reducer of DistributedDataParallel, ZeRO's buckets, the accumulation over micro-batches) finds what it expects.
    """

    def __init__(self, trainer: Any, parameters: list[Tensor], combine: Combine) -> None:
        super().__init__(trainer, parameters, task_only=False)
        self._combine: Combine | None = combine

    def _tensor_backward(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool | None) -> None:
        super()._tensor_backward(loss, gradient, retain_graph)
        self._plain_backward(self._combined(loss))

    def _engine_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        super()._engine_backward(loss, *args, **kwargs)
        found: Tensor = self._plain_backward(self._combined(loss), *args, **kwargs)
        return found

    def _combined(self, loss: Tensor) -> Tensor:
        """Return the loss's value as something whose gradient is the combined one, whatever it is scaled by."""
        if self._combine is None:
            raise UserError(_TWICE)
        combined, self._combine = self._combine(kept(self.take_gradients(), self.scale)), None
        pairs = [(p, g) for p, g in zip(self._parameters, combined, strict=True) if g is not None]
        gradients = [(g * self.scale).to(p.dtype) for p, g in pairs]
        found: Tensor = _Combined.apply(loss.detach(), gradients, *(p for p, _ in pairs))  # type: ignore[no-untyped-call]
        return found


class _Combined(torch.autograd.Function):
    """A loss that has given gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return (None, None, *ctx.gradients)


def _refuse_reentrant(*_: Any) -> None:
    raise UserError(_REENTRANT)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object or class; afterwards it is as before, down to whether it existed."""
    existed = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if existed:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _refuse_unsupported(trainer: Any) -> None:
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None and engine.zero_optimization_stage() >= 3:
        raise UserError(
            "SAM cannot perturb weights that ZeRO-3 has partitioned over the processes. Use a stage 2 "
            "configuration (configs/ds_configs/stage2.config upstream)."
        )
    for name, what in (("use_apex", "apex"), ("fsdp", "FSDP"), ("sharded_ddp", "sharded DDP")):
        if getattr(trainer, name, None):
            raise UserError(f"SAM does not work with {what}. Use plain torch, DDP or DeepSpeed ZeRO 0-2.")


def keep_adapters_fp32(model: nn.Module) -> None:
    """Let ``model.half()`` and ``model.bfloat16()`` leave trainable and LoRA weights in their present type.

    DeepSpeed's engine casts the whole model with one of these; in 16 bits a small perturbation is partly
    lost to rounding. Call it before the engine is built. The first cast removes the exception again.
    Frozen LoRA weights are kept too, because upstream's layers feed all factors of a layer the same input.
    Gradients are still reduced in the engine's ``communication_data_type``, by default its own 16 bits.

    Args:
        model: The module that will be handed to the engine.
    """
    casts = ("half", "bfloat16")

    def cast_the_rest(name: str) -> nn.Module:
        for cast in casts:
            delattr(model, cast)
        kept = [(p, p.data) for n, p in model.named_parameters() if p.requires_grad or is_adapter(n)]
        getattr(model, name)()
        for parameter, data in kept:
            parameter.data = data
        return model

    for cast in casts:
        setattr(model, cast, lambda name=cast: cast_the_rest(name))

"""The implementations that are audited, each called as its own README, docstring or example calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from benchmarks.audit.rows import NotOfferedError, Order, Passes, Row, Source, Stepper


def nothing() -> None:
    """Do nothing before the descent."""


class TwoSteps(Stepper):
    """``first_step`` and ``second_step`` around a second pass that the user writes; the closure form beside it."""

    @override
    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        passes()
        self.optimizer.first_step(zero_grad=True)
        passes()
        (before_descent or nothing)()
        self.optimizer.second_step(zero_grad=True)

    @override
    def call(self, passes: Passes) -> Any:
        passes()
        returned = self.optimizer.step(passes)
        self.optimizer.zero_grad()
        return returned


class Closure(Stepper):
    """One ``step(closure)``; the closure clears the gradients, as torch's own optimizers want it."""

    def closure(self, passes: Passes, before_descent: Callable[[], None] | None) -> Callable[..., Any]:
        """Return what ``step`` is given."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = passes()
            (before_descent or nothing)()
            return loss

        return closure

    @override
    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        self.optimizer.step(self.closure(passes, before_descent))

    @override
    def call(self, passes: Passes) -> Any:
        return self.optimizer.step(self.closure(passes, None))


class ClosureOfPair(Closure):
    """A closure that returns the model's output and the loss, and so does the step.

    It turns gradients on, as the closures do that these implementations make themselves.
    """

    @override
    def closure(self, passes: Passes, before_descent: Callable[[], None] | None) -> Callable[..., Any]:
        plain = torch.enable_grad()(super().closure(passes, before_descent))
        return lambda: (None, plain().detach())

    @override
    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        self.optimizer.step(closure=self.closure(passes, before_descent))

    @override
    def call(self, passes: Passes) -> Any:
        return self.optimizer.step(closure=self.closure(passes, None))[1]


class Constant:
    """A schedule of the radius that stays where it is."""

    def __init__(self, rho: float) -> None:
        """Keep the radius."""
        self.rho = rho

    def step(self) -> float:
        """Return the radius of the next step."""
        return self.rho


# Ours.


class Ours(Closure):
    """``sam.gradients(closure)``, then whatever is to happen to the gradient, then the base optimizer."""

    @override
    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        self.optimizer.gradients(self.closure(passes, None))
        (before_descent or nothing)()
        self.optimizer.base_optimizer.step()


def flatpatch(module: ModuleType, order: Order) -> Stepper:
    return Ours(module.SAM(order.make_base(), rho=order.rho, adaptive=order.adaptive, model=order.model))


# Those that make the base optimizer from its class.


def from_class(module: ModuleType, order: Order) -> Stepper:
    """davda54/sam, and pytorch_optimizer, which has the same face."""
    optimizer = module.SAM(order.make_groups(), order.base, rho=order.rho, adaptive=order.adaptive, **order.options)
    return TwoSteps(optimizer, scheduled=optimizer.base_optimizer)


def unified_sam(module: ModuleType, order: Order) -> Stepper:
    if order.adaptive:
        raise NotOfferedError("no ASAM")
    optimizer = module.unifiedSAM(order.make_groups(), order.base, rho=order.rho, lambd=1.0, **order.options)
    return TwoSteps(optimizer, scheduled=optimizer.base_optimizer)


def moskomule(module: ModuleType, order: Order) -> Stepper:
    if order.base.__name__ != "SGD":
        raise NotOfferedError("SGD alone")
    if len(order.groups) > 1:
        raise NotOfferedError("one parameter group alone")
    if order.adaptive:
        raise NotOfferedError("no ASAM")
    return Closure(module.SAMSGD(order.make_groups(), rho=order.rho, **order.options))


# Those that wrap an instance.


def sam_pytorch(module: ModuleType, order: Order) -> Stepper:
    if order.adaptive:
        raise NotOfferedError("no ASAM")
    base = order.make_base()
    return Closure(module.SAM(order.parameters, base, rho=order.rho), scheduled=base)


class AscentDescent(Stepper):
    """``ascent_step`` and ``descent_step`` around a second pass; checkpoints are those of the user's own optimizer."""

    @override
    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        passes()
        self.optimizer.ascent_step()
        passes()
        (before_descent or nothing)()
        self.optimizer.descent_step()

    @override
    def state_dict(self) -> Any:
        return self.optimizer.optimizer.state_dict()

    @override
    def load_state_dict(self, state: Any) -> None:
        self.optimizer.optimizer.load_state_dict(state)


def samsung(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    kind = module.ASAM if order.adaptive else module.SAM
    return AscentDescent(kind(base, order.model, rho=order.rho, eta=0.01), scheduled=base)


def sam_on(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    kind = module.ASAM_ON if order.adaptive else module.SAM_ON
    return AscentDescent(kind(base, order.model, rho=order.rho, eta=0.01), scheduled=base)


def gsam(module: ModuleType, order: Order) -> Stepper:
    """GSAM without its term of the surrogate gap: SAM."""
    base = order.make_base()
    optimizer = module.GSAM(order.parameters, base, order.model, 0.0, Constant(order.rho), adaptive=order.adaptive)
    return ClosureOfPair(optimizer, scheduled=base)


def c_flat(module: ModuleType, order: Order) -> Stepper:
    """C-Flat without its term of the gradient's norm: SAM, by four passes."""
    base = order.make_base()
    optimizer = module.C_Flat(
        order.parameters, base, order.model, cflat=True, rho=order.rho, lamb=0.0, adaptive=order.adaptive
    )
    return ClosureOfPair(optimizer, scheduled=base)


def infty(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    optimizer = module.SAM(order.parameters, base, order.model, {"rho": order.rho}, adaptive=order.adaptive)
    return ClosureOfPair(optimizer, scheduled=base)


class Composer(Closure):
    """Composer's trainer hands its optimizer a closure that can leave gradients unreduced."""

    def __init__(self, optimizer: Any, model: Any) -> None:
        """Keep the model, whose reduction the closure turns off."""
        super().__init__(optimizer)
        self.model = model

    @override
    def closure(self, passes: Passes, before_descent: Callable[[], None] | None) -> Callable[..., Any]:
        plain = super().closure(passes, before_descent)

        def closure(*, ddp_sync: bool = True, loss_dict: Any = None) -> Tensor:
            unreduced = not ddp_sync and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if unreduced else contextlib.nullcontext():
                return plain()

        return closure


def composer(module: ModuleType, order: Order) -> Stepper:
    if order.adaptive:
        raise NotOfferedError("no ASAM")
    return Composer(module.SAMOptimizer(order.make_base(), rho=order.rho), order.model)


def temperon(module: ModuleType, order: Order) -> Stepper:
    if order.adaptive:
        raise NotOfferedError("no ASAM")
    base = order.make_base()
    optimizer = module.Temperon(base, total_steps=1000, tail_frac=1.0, rho=order.rho)
    return Closure(optimizer, scheduled=base)


RECIPE = "its README tells how to hold them in the second pass"
OWN_LOSS = "the user runs the first pass and holds its loss"
PERTURB_EPS = "the addition is an argument, perturb_eps"

ROWS = (
    Row("flatpatch", Source("flatpatch.sam"), flatpatch, "MIT", eta=0.01),
    Row(
        "pytorch_optimizer",
        Source("pytorch_optimizer", package="pytorch_optimizer", pin="4.1.0"),
        from_class,
        "Apache-2.0",
        by_design={
            "loss": OWN_LOSS,
            "tiny": PERTURB_EPS,
            "BatchNorm": "disable_running_stats and enable_running_stats are there for it",
        },
        eta=0.0,
    ),
    Row(
        "davda54/sam",
        Source("sam", repository="davda54/sam", pin="3c3afdb"),
        from_class,
        "MIT",
        by_design={"loss": OWN_LOSS, "BatchNorm": RECIPE},
        eta=0.0,
    ),
    Row(
        "unifiedsam",
        Source("unifiedsam.unifiedsam", package="unifiedsam", pin="1.0.0"),
        unified_sam,
        "MIT",
        by_design={"loss": OWN_LOSS},
        note="with lambd=1, which is SAM",
    ),
    Row(
        "moskomule/sam.pytorch",
        Source("sam", repository="moskomule/sam.pytorch", pin="766a038"),
        moskomule,
        "MIT",
    ),
    Row(
        "sam-pytorch",
        Source("sam", package="sam-pytorch", pin="0.0.1"),
        sam_pytorch,
        "MIT",
    ),
    Row(
        "SamsungLabs/ASAM",
        Source("asam", repository="SamsungLabs/ASAM", pin="f156a68"),
        samsung,
        "Apache-2.0",
        eta=0.01,
        note="ASAM scales the parameters with `weight` in their names alone",
    ),
    Row(
        "mueller-mp/SAM-ON",
        Source("sam_on", repository="mueller-mp/SAM-ON", pin="8b8869a"),
        sam_on,
        "none",
        eta=0.01,
        note="as SAM over all layers; ASAM as above",
    ),
    Row(
        "juntang-zhuang/GSAM",
        Source("gsam", repository="juntang-zhuang/GSAM", pin="a770275"),
        gsam,
        "MIT",
        by_design={"tiny": PERTURB_EPS},
        eta=0.0,
        note="with alpha 0, which is SAM, and a closure of one's own, where its README has set_closure",
    ),
    Row(
        "WanNaa/C-Flat",
        Source("optims.c_flat", repository="WanNaa/C-Flat", pin="8e626a3"),
        c_flat,
        "none",
        by_design={"tiny": PERTURB_EPS},
        eta=0.0,
        note="with lamb 0, which is SAM in four passes",
    ),
    Row(
        "infty",
        Source("infty.optim", package="infty", pin="0.1.2"),
        infty,
        "MIT",
        by_design={"tiny": PERTURB_EPS},
        eta=0.0,
    ),
    Row(
        "composer",
        Source(
            "composer.algorithms.sam.sam",
            package="mosaicml",
            pin="0.32.1",
            beside=(
                "coolname==2.2.0",
                "importlib-metadata==8.9.0",
                "lightning-utilities==0.15.3",
                "torchmetrics==1.7.4",
            ),
            whole=("mosaicml-cli==0.7.5",),
        ),
        composer,
        "Apache-2.0",
        by_design={"tiny": "the addition is an argument, epsilon"},
        note="its SAMOptimizer, called as its trainer calls it; it asks for torch below 2.7.1",
    ),
    Row(
        "temperon",
        Source("temperon", package="temperon", pin="0.1.1"),
        temperon,
        "MIT",
        by_design={"tiny": "the addition is an argument, eps"},
        note="with tail_frac 1",
    ),
)

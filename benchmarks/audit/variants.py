"""SAM's relatives against their papers' equations, over six steps of SGD on the quadratic.

Each twin is written from the paper and is given the gradient in closed form. Where an implementation starts at another
step than its paper, the twin starts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor
from typing_extensions import override

from benchmarks.audit.checks import CLOSE, Finding, Quadratic, raised, relative, short
from benchmarks.audit.implementations import ClosureOfPair, Constant, TwoSteps
from benchmarks.audit.rows import Order, Source, Stepper

Gradient = Callable[[Tensor], Tensor]
Twin = Callable[[Gradient], Iterator[Callable[[Tensor], Tensor]]]  # for each step, how weights become a direction
STEPS, RATE, RHO = 6, 0.05, 0.1
OPTIONS = {"lr": RATE}


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def gsam(gradient: Gradient) -> Iterator[Callable[[Tensor], Tensor]]:
    """Zhuang et al. 2022, arXiv:2203.08065, Algorithm 1, with alpha 0.3."""

    def direction(w: Tensor) -> Tensor:
        plain = gradient(w)
        perturbed = gradient(w + RHO * unit(plain))
        across = plain - (plain @ unit(perturbed)) * unit(perturbed)
        return perturbed - 0.3 * across

    while True:
        yield direction


def c_flat(gradient: Gradient) -> Iterator[Callable[[Tensor], Tensor]]:
    """Bian et al. 2024, arXiv:2404.00986, with one radius, rho, in every place, and lambda 0.2."""

    def direction(w: Tensor) -> Tensor:
        plain = gradient(w)
        perturbed = gradient(w + RHO * unit(plain))
        steeper = w + RHO * unit(perturbed - plain)  # ascent of the gradient's norm
        there = gradient(steeper)
        return perturbed + 0.2 * (gradient(steeper + RHO * unit(there)) - there)

    while True:
        yield direction


def f_sam(gradient: Gradient) -> Iterator[Callable[[Tensor], Tensor]]:
    """Li et al. 2024, arXiv:2403.12350, Sec. 4, sigma 1 and lambda 0.9; the mean begins with the first gradient."""
    mean: Tensor | None = None

    def direction(w: Tensor) -> Tensor:
        nonlocal mean
        plain = gradient(w)
        ascent = plain if mean is None else plain - mean
        mean = plain if mean is None else 0.9 * mean + 0.1 * plain
        return gradient(w + RHO * unit(ascent))

    while True:
        yield direction


def look_sam(first: int) -> Twin:
    """Liu et al. 2022, arXiv:2203.02714, Algorithm 1, with k 2 and alpha 0.7; SAM first in step ``first``."""

    def steps(gradient: Gradient) -> Iterator[Callable[[Tensor], Tensor]]:
        across: Tensor | None = None

        def sharp(w: Tensor) -> Tensor:
            nonlocal across
            plain = gradient(w)
            perturbed = gradient(w + RHO * unit(plain))
            across = perturbed - (perturbed @ unit(plain)) * unit(plain)
            return perturbed

        def reused(w: Tensor) -> Tensor:
            plain = gradient(w)
            return plain if across is None else plain + 0.7 * plain.norm() * unit(across)

        for step in range(STEPS):
            yield sharp if step % 2 == first else reused

    return steps


def w_sam(gradient: Gradient) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yue et al. 2023, arXiv:2305.15817, Eq. 5, with gamma 0.8: its weight is gamma / (1 - gamma) = 4."""

    def direction(w: Tensor) -> Tensor:
        plain = gradient(w)
        return plain + 4 * (gradient(w + RHO * unit(plain)) - plain)

    while True:
        yield direction


@dataclass(frozen=True)
class Variant:
    """One method of one implementation.

    Attributes:
        method: What the paper calls it.
        name: What the matrix calls the implementation.
        source: Where it is found.
        make: Makes a stepper.
        twin: What it is held to.
        passes: How many the paper takes in six steps.
        cause: Why it is known to fail, which is shown where it does.
    """

    method: str
    name: str
    source: Source
    make: Callable[[ModuleType, Order], Stepper]
    twin: Twin
    passes: int
    cause: str = ""


class WeightedTwoSteps(TwoSteps):
    """WSAM's step takes the closure alone."""

    @override
    def step(self, passes: Callable[[], Tensor], before_descent: Any = None) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return passes()

        self.optimizer.step(closure)


def theirs(name: str, kind: type[Stepper] = TwoSteps, **more: Any) -> Callable[[ModuleType, Order], Stepper]:
    """Make one that takes the base optimizer's class."""

    def make(module: ModuleType, order: Order) -> Stepper:
        return kind(getattr(module, name)(order.make_groups(), order.base, rho=order.rho, **more, **order.options))

    return make


def _w_sam(module: ModuleType, order: Order) -> Stepper:
    optimizer = module.WSAM(order.model, order.make_groups(), order.base, rho=order.rho, gamma=0.8, **order.options)
    return WeightedTwoSteps(optimizer)


def _gsam(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    return ClosureOfPair(module.GSAM(order.parameters, base, order.model, 0.3, Constant(order.rho)))


def _gsam_of_package(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    return ClosureOfPair(module.GSAM(order.parameters, base, order.model, Constant(order.rho), alpha=0.3))


def _c_flat(module: ModuleType, order: Order) -> Stepper:
    base = order.make_base()
    return ClosureOfPair(module.C_Flat(order.parameters, base, order.model, cflat=True, rho=order.rho, lamb=0.2))


def infty(name: str, **more: Any) -> Callable[[ModuleType, Order], Stepper]:
    """Make one of infty's, which take their numbers in a mapping."""

    def make(module: ModuleType, order: Order) -> Stepper:
        base = order.make_base()
        return ClosureOfPair(getattr(module, name)(order.parameters, base, order.model, {"rho": order.rho, **more}))

    return make


PACKAGE = Source("pytorch_optimizer", package="pytorch_optimizer", pin="4.1.0")
INFTY = Source("infty.optim", package="infty", pin="0.1.2")
VARIANTS = (
    Variant("GSAM", "juntang-zhuang/GSAM", Source("gsam", "", "juntang-zhuang/GSAM", "a770275"), _gsam, gsam, 12),
    Variant("GSAM", "pytorch_optimizer", PACKAGE, _gsam_of_package, gsam, 12),
    Variant("GSAM", "infty", INFTY, infty("GSAM", alpha=0.3), gsam, 12),
    Variant("C-Flat", "WanNaa/C-Flat", Source("optims.c_flat", "", "WanNaa/C-Flat", "8e626a3"), _c_flat, c_flat, 24),
    Variant(
        "C-Flat",
        "infty",
        INFTY,
        infty("C_Flat", lamb=0.2),
        c_flat,
        24,
        "the ascent of the gradient's norm has radius 1, not rho, which a quadratic shows little of",
    ),
    Variant("F-SAM", "nblt/F-SAM", Source("utils", "", "nblt/F-SAM", "2e2f989"), theirs("FriendlySAM"), f_sam, 12),
    Variant("F-SAM", "pytorch_optimizer", PACKAGE, theirs("FriendlySAM"), f_sam, 12),
    Variant(
        "LookSAM",
        "pytorch_optimizer",
        PACKAGE,
        theirs("LookSAM", k=2, alpha=0.7),
        look_sam(0),
        9,
        "projection and norms are taken tensor by tensor",
    ),
    Variant(
        "LookSAM",
        "infty",
        INFTY,
        infty("LookSAM", k=2, alpha=0.7),
        look_sam(1),
        9,
        "the steps between take the plain gradient: the reused part is looked for under a name that is never stored",
    ),
    Variant("WSAM", "pytorch_optimizer", PACKAGE, _w_sam, w_sam, 12),
)


def audit(variant: Variant, module: ModuleType) -> Finding:
    """Take six steps beside the twin."""
    problem = Quadratic()
    start = weights = problem.flat().detach().clone()
    for direction, _ in zip(variant.twin(problem.gradient), range(STEPS), strict=False):
        weights = weights - RATE * direction(weights)
    calls = 0

    def passes() -> Tensor:
        nonlocal calls
        calls += 1
        return problem.passes()

    try:
        stepper = variant.make(module, problem.order(options=OPTIONS, rho=RHO))
        for _ in range(STEPS):
            stepper.step(passes)
    except Exception as error:
        return raised(error)
    error = relative(problem.flat().detach(), weights, start)
    cost = "" if calls == variant.passes else f"{calls} passes where the paper takes {variant.passes}"
    if error <= 10 * CLOSE:
        return Finding("pass", "", cost)
    return Finding(
        "fail", short(error), "; ".join(["of the way of six steps away", *filter(None, [variant.cause, cost])])
    )

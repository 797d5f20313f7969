r"""Products with the Hessian from differences of the gradient, with an estimate of their error.

For a unit vector u, :math:`D_h = (g(w + h u) - g(w - h u)) / 2 h` misses :math:`H u` by rounding, which grows as
:math:`1 / h`, and by the loss's fourth derivative, as :math:`h^2`; at a kink (ReLU, max-pooling) by the gradient's
jump over 2 h, as soon as the step crosses it. Where the three balance depends on the loss and on u, by a factor of 30
from one vector to another in one small network. So the step is grown from where rounding rules, for as long as two
steps' results come closer to each other, and their difference is the estimate of the error.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from flatpatch.flatness.problem import Problem, graph_nodes

_LEVELS = 11  # of steps: level i is |w| eps^((11 - i) / 12), so the highest is |w|
_BEGINNING, _LOWER = 2, 6  # the first level tried, and how many below one are
_FAR = 0.1  # results that differ by this share have nothing in common
_SWALLOWED = 0.5  # share of a step that rounding may make of it

# What autograd calls the operations whose derivative jumps.
_KINKS = (
    *("Relu", "Relu6", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold", "Hardtanh", "Hardswish"),
    *("Hardsigmoid", "Hardshrink", "Softshrink", "Abs", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum"),
    *("Max", "Amax", "Min", "Amin", "Fmax", "Fmin", "Median", "Sort", "Topk", "MultiMarginLoss"),
    *("MultilabelMarginLoss", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D"),
    "AdaptiveMaxPool3D",
)


class Differences:
    """Products of one problem's Hessian, each independent of those before.

    Args:
        problem: The loss; its weights are moved during a product and put back bit for bit.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._precision = max(torch.finfo(variable.dtype).eps for variable in problem.variables)
        self._norm = float(problem.flatten(problem.variables, torch.float64).norm()) or 1.0
        self._saved: list[Tensor] = []
        self._level: int | None = None  # where a product's search begins, once that is known
        self._scale = 0.0  # |H u| for a vector that H has made long

    def products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply with each row (p, n); products and their estimated errors are float64, (p, n) each.

        Call it inside ``problem.active()``.
        """
        products = torch.zeros_like(rows, dtype=torch.float64)
        errors = torch.zeros_like(products)
        variables = self._problem.variables
        self._saved = [variable.detach().clone() for variable in variables]
        try:
            if self._level is None:
                self._look_at_loss()
                self._level = self._calibrate()
            for row, product, error in zip(rows.double(), products, errors, strict=True):
                if norm := float(row.norm()):
                    found, off, _ = self._search(row / norm, self._level)
                    product.add_(found, alpha=norm)
                    error.add_(off, alpha=norm)
        finally:
            for variable, start in zip(variables, self._saved, strict=True):
                variable.data.copy_(start)
            self._saved = []
        return products, errors

    def _calibrate(self) -> int:
        """Find the level to begin at along a random vector multiplied once, as eigenvectors ask for small steps."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(self._problem.size, generator=generator, dtype=torch.float64).to(self._problem.device)
        self._scale = 0.0
        product, _, level = self._search(u / u.norm(), _BEGINNING)
        self._scale = float(product.norm())
        if self._scale > 0:
            product, _, level = self._search(product / self._scale, _BEGINNING)
            self._scale = float(product.norm())
        return level

    def _search(self, u: Tensor, level: int) -> tuple[Tensor, Tensor, int]:
        """Return H u for a unit vector, its estimated error as a vector, and the step's level."""
        found: dict[int, Tensor] = {}
        changes: dict[int, float] = {}

        def at(level: int) -> Tensor:
            if level not in found:
                difference, is_seen = self._difference(u, level)
                found[level] = difference if is_seen else torch.full_like(u, math.nan)
                for other in [key for key in found if abs(key - level) > 2]:
                    del found[other]
            return found[level]

        def change(level: int) -> float:
            if level not in changes:
                value = float((at(level) - at(level - 1)).norm())
                changes[level] = math.inf if math.isnan(value) else value
            return changes[level]

        def is_near(level: int) -> bool:
            return change(level) <= _FAR * max(float(at(level).norm()), _FAR * self._scale)

        # Downwards first: beyond kinks larger steps may agree as well, on something else.
        downwards = itertools.takewhile(lambda below: change(below) < math.inf, range(level, level - _LOWER, -1))
        levels = itertools.chain(downwards, range(level + 1, _LEVELS + 1))
        best = next((tried for tried in levels if is_near(tried)), None)
        if best is None:  # no two steps agree: the error may be as large as what they differ by, or all there is
            finite = {key: value for key, value in changes.items() if value < math.inf}
            best = min(finite, default=_LEVELS + 1)
            product = at(best - 1) if finite else self._difference(u, _LEVELS)[0]
            length = max(finite.values(), default=float(product.norm()))
            return product, torch.full_like(u, length / math.sqrt(len(u))), min(best, _LEVELS)
        for way in (1, -1):
            start = best
            while change(best) > self._precision**0.5 * max(float(at(best).norm()), self._scale):
                if best + way > _LEVELS or change(best + way) >= change(best):
                    break
                best += way
            if best != start:
                break
        return at(best), at(best) - at(best - 1), best

    def _difference(self, u: Tensor, level: int) -> tuple[Tensor, bool]:
        """Return D_h, and whether rounding left enough of the step, and of what it makes of the gradient, to see it."""
        step: float = self._norm * self._precision ** ((_LEVELS - level) / 12)
        there, ahead = self._gradient_at(step * u)
        back, behind = self._gradient_at(-step * u)
        # A step may be so small that the number format of the weights or of the activations swallows it, or a part of
        # it; then all differences agree on what is left, such as zero.
        is_step_left = float(((there - back) / (2 * step) - u).norm()) <= _SWALLOWED
        is_change_left = _FAR * float((ahead - behind).norm()) >= self._precision * float(ahead.norm())
        return (ahead - behind) / (2 * step), is_step_left and is_change_left

    def _gradient_at(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, rounded as they are, and the gradient there."""
        problem = self._problem
        for variable, start, piece in zip(problem.variables, self._saved, problem.unflatten(displacement), strict=True):
            variable.data.copy_(start + piece)
        return problem.flatten(problem.variables, torch.float64), problem.loss_and_gradient()[1]

    def _look_at_loss(self) -> None:
        """Find the coarsest number format that the loss is computed in, and warn of kinks."""
        nodes = loss_nodes(self._problem)
        formats = {meta.dtype for node in nodes for meta in getattr(node, "_input_metadata", ())}
        # A model with float64 weights may compute parts in float32, as T5 does its norms.
        coarsest = max((torch.finfo(dtype).eps for dtype in formats if dtype.is_floating_point), default=0.0)
        self._precision = max(self._precision, coarsest)
        if names := kinks(nodes):
            warnings.warn(
                f"the loss has kinks ({', '.join(names)}), where no Hessian is defined. Autograd leaves them out; "
                "differences count those that the step crosses. Small steps avoid most, at a price in rounding: see "
                "the errors.",
                stacklevel=2,
            )


def loss_nodes(problem: Problem) -> set[Node]:
    """Return autograd's nodes behind the first batch's loss. Call it inside ``problem.active()``."""
    with torch.set_grad_enabled(True):
        return graph_nodes([problem.batch_loss(0)])


def kinks(nodes: Iterable[Node]) -> list[str]:
    """Return autograd's names of the operations whose derivative jumps. An operation of one's own is not known."""
    names = {node.name().rstrip("0123456789").removesuffix("Backward") for node in nodes}
    return sorted(names & {*_KINKS})

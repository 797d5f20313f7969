"""A problem's loss as a function of one flat vector of weights, with the weights put back afterwards.

What a model has learned may also lie in its buffers: the running statistics of batch normalisation belong to the
weights that they were collected with. A :class:`Point` holds both. Between points the buffers are means as the weights
are, with the same shares; statistics are never collected anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flatpatch.errors import UserError
from flatpatch.flatness.problem import Problem


@dataclass(frozen=True)
class Point:
    """Weights, and the buffers that belong to them.

    Attributes:
        weights: (n,).
        buffers: By name, of those that are not as they are in the problem's model.
    """

    weights: Tensor
    buffers: Mapping[str, Tensor]


class Objective(Protocol):
    """A loss as a function of one flat vector of weights."""

    @property
    def origin(self) -> Tensor:  # (n,)
        """The weights as they are, in their own number format."""

    def loss(self, x: Tensor) -> float:
        """Return the loss at the weights x, (n,)."""

    def loss_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient, (n,), at the weights x, (n,)."""


class _Moving:
    """The objective that ``moving`` yields."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        dtype = reduce(torch.promote_types, (variable.dtype for variable in problem.variables))
        self.origin = problem.flatten(problem.variables, dtype)
        self._kept: dict[str, Tensor] = {}

    def loss(self, x: Tensor | Point) -> float:
        self._place(x)
        return self._problem.loss()

    def loss_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        self._place(x)
        return self._problem.loss_and_gradient()

    def _place(self, x: Tensor | Point) -> None:
        with torch.no_grad():
            for variable, piece in zip(self._problem.variables, self._problem.unflatten(weights_of(x)), strict=True):
                variable.copy_(piece)
            self._place_buffers(x.buffers if isinstance(x, Point) else {})

    def _place_buffers(self, values: Mapping[str, Tensor]) -> None:
        if not (values or self._kept):
            return
        own = dict(self._problem.model.named_buffers())
        for name in values:
            if name not in self._kept:
                self._kept[name] = own[name].detach().clone()
        for name, kept in self._kept.items():
            own[name].copy_(values.get(name, kept))

    def restore_buffers(self) -> None:
        with torch.no_grad():
            self._place_buffers({})


@contextmanager
def moving(problem: Problem | Objective) -> Iterator[Objective]:
    """Yield a problem's loss as a function of a flat vector; leaving the block restores the model, bit for bit.

    Args:
        problem: The problem; something that is a function of a flat vector already is yielded as it is.

    Yields:
        The objective. Its points are rounded once, to each variable's number format.
    """
    if not isinstance(problem, Problem):
        yield problem
        return
    saved = [variable.detach().clone() for variable in problem.variables]
    objective = _Moving(problem)
    try:
        with problem.active():
            yield objective
    finally:
        objective.restore_buffers()
        with torch.no_grad():
            for variable, value in zip(problem.variables, saved, strict=True):
                variable.copy_(value)


def weights_of(where: Tensor | Point) -> Tensor:
    """Return a point's weights, (n,)."""
    return where.weights if isinstance(where, Point) else where


def tensors_of(where: Tensor | Point) -> list[Tensor]:
    """Return all that makes a point what it is."""
    return (
        [where.weights, *(where.buffers[name] for name in sorted(where.buffers))]
        if isinstance(where, Point)
        else [where]
    )


def loss_at(objective: Objective, where: Tensor | Point) -> float:
    """Return the loss at a point, with its buffers.

    Raises:
        ValueError: If it has some and the objective is not a problem's.
    """
    if isinstance(where, Point) and where.buffers:
        if not isinstance(objective, _Moving):
            raise ValueError("only the loss of a Problem has buffers")
        return objective.loss(where)
    return objective.loss(weights_of(where))


def as_point(problem: Problem | Objective, where: Tensor | Point, name: str) -> Point:
    """Take a vector as a point of a problem's model.

    Raises:
        UserError: If the model has running statistics and the vector is of other weights, whose statistics are not
            known then; or a point has buffers that the model has not.
    """
    if isinstance(where, Point):
        if isinstance(problem, Problem):
            own = {key: buffer.shape for key, buffer in problem.model.named_buffers()}
            for key, value in where.buffers.items():
                if own.get(key) != value.shape:
                    raise UserError(
                        f"{name} has a buffer {key} of shape {tuple(value.shape)}, and the model has "
                        f"{tuple(own[key]) if key in own else 'none'}. It belongs to another model."
                    )
        return where
    if isinstance(problem, Problem) and (statistics := norm_buffers(problem.model, "running_mean", "running_var")):
        here = problem.flatten(problem.variables, torch.float64)
        if where.shape == here.shape and not torch.equal(where.detach().to(here), here):
            raise UserError(
                f"{name} is a vector of other weights than the model's, and the model has running statistics "
                f"({statistics[0]} and {len(statistics) - 1} more), which belong to the weights they were collected "
                "with. Read it by model_point or checkpoint_point, which know them; or pass Point(vector, {}) to use "
                "the model's own."
            )
    return Point(where, {})


def norm_buffers(model: nn.Module, *kinds: str) -> list[str]:
    """Return the names of a model's buffers of some kinds that belong to batch normalisation and its kin."""
    return [
        f"{name}.{kind}" if name else kind
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for kind in kinds
        if getattr(module, kind, None) is not None
    ]


def mixed_buffers(
    problem: Problem | Objective, points: Sequence[Point]
) -> Callable[[Sequence[float]], dict[str, Tensor]]:
    """Return the function from each point's share to the buffers' mean.

    Beyond the points a buffer stays within the range of what the points have: a variance must not become negative.

    Args:
        problem: Whose model has what a point does not name.
        points: At least one.
    """
    own = dict(problem.model.named_buffers()) if isinstance(problem, Problem) else {}
    names = sorted({name for point in points for name in point.buffers})
    stacks = {
        name: torch.stack([p.buffers.get(name, own[name]).detach().to(own[name].device, torch.float64) for p in points])
        for name in names
    }

    def mix(shares: Sequence[float]) -> dict[str, Tensor]:
        mixed = {}
        for name, stack in stacks.items():
            mean = torch.tensordot(torch.tensor(shares, dtype=stack.dtype, device=stack.device), stack, dims=1)
            mixed[name] = mean.clamp(stack.amin(dim=0), stack.amax(dim=0))
        return mixed

    return mix


def plain(value: Any) -> Any:
    """Return a value for a JSON file, which has no number for infinity and NaN: they become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

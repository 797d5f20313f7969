"""A problem's loss as a function of one flat vector of weights, with the weights put back afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from flatpatch.flatness.problem import Problem


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

    def loss(self, x: Tensor) -> float:
        self._place(x)
        return self._problem.loss()

    def loss_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        self._place(x)
        return self._problem.loss_and_gradient()

    def _place(self, x: Tensor) -> None:
        with torch.no_grad():
            for variable, piece in zip(self._problem.variables, self._problem.unflatten(x), strict=True):
                variable.copy_(piece)


@contextmanager
def moving(problem: Problem | Objective) -> Iterator[Objective]:
    """Yield a problem's loss as a function of a flat vector; leaving the block restores the weights, bit for bit.

    Args:
        problem: The problem; something that is a function of a flat vector already is yielded as it is.

    Yields:
        The objective. Its points are rounded once, to each variable's number format.
    """
    if not isinstance(problem, Problem):
        yield problem
        return
    saved = [variable.detach().clone() for variable in problem.variables]
    try:
        with problem.active():
            yield _Moving(problem)
    finally:
        with torch.no_grad():
            for variable, value in zip(problem.variables, saved, strict=True):
                variable.copy_(value)


def plain(value: Any) -> Any:
    """Return a value for a JSON file, which has no number for infinity and NaN: they become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

r"""DualGPM: the subspace in which earlier tasks' inputs lie, kept as a basis of itself or of its complement.

From Liang & Li, "Adaptive plasticity improvement for continual learning" (CVPR 2023) and "InfLoRA" (CVPR 2024,
arXiv:2404.00228). For the d x d input covariance R of a layer and a threshold, directions are added until the
protected part of R holds that share of its energy :math:`\|R\|_F^2`. A basis of more than d/2 directions is replaced
by one of its complement, which then shrinks instead.

Where the papers are silent, as in InfLoRA's code:
- "inputs" enter through R, whose singular values are already squares of theirs;
- the first task's basis stops one direction short: the most directions with *less* than the share, but one at least.
Different from it: if the first task alone needs d/2 directions or more, the code marks the basis itself as a
complement and, above d/2, stops with an assertion; here it is treated as after any other task.

:func:`input_covariances` sees a model's inputs, and :func:`design` makes InfLoRA's A of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Subspace:
    """The directions in which a layer's inputs are protected."""

    basis: Matrix
    """``(d, m)`` with orthonormal columns, m at most d/2."""
    of_complement: bool = False
    """False: the basis spans what is protected ("remove"); True: what is still free ("retain")."""

    @property
    def dimension(self) -> int:
        """Number of protected directions."""
        d, m = self.basis.shape
        return d - m if self.of_complement else m

    @property
    def projection(self) -> Matrix:
        """The ``(d, d)`` projection onto the span of the basis."""
        return self.basis @ self.basis.T


def threshold(lamb: float, lame: float, task: int, tasks: int) -> float:
    """Return the share of energy protected after a task, from ``lamb`` towards ``lame``; tasks count from 0."""
    return (lame - lamb) * task / tasks + lamb


def protect(known: Subspace | None, covariance: Matrix, share: float) -> Subspace:
    """Add the directions in which a task's inputs lie.

    Args:
        known: What is protected already; None after the first task.
        covariance: The task's input covariance at a layer, ``(d, d)``. Its dtype is kept.
        share: Of its energy that is to be protected, in (0, 1].

    Returns:
        The larger subspace, or the same if it holds the share already. A covariance of zeros adds nothing.
    """
    total = np.sum(covariance**2)
    if known is None:
        U, energy = _directions(covariance, total)
        count = int(np.sum(np.cumsum(energy) < share))
        return _as_the_smaller(U[:, : max(count, 1)])
    inside = known.projection @ covariance
    if not known.of_complement:
        U, energy = _directions(covariance - inside, total)
        protected = 1 - np.sum(energy)
        count = int(np.sum(protected + _sums_before(energy) < share))
        return _as_the_smaller(np.hstack([known.basis, U[:, :count]])) if count else known
    U, energy = _directions(inside, total)
    free = np.sum(energy) - _sums_before(energy)
    count = int(np.sum(free >= 1 - share))
    if not count:
        return known
    added = U[:, :count]
    left, _, _ = np.linalg.svd(known.basis - added @ (added.T @ known.basis))
    return Subspace(left[:, : known.basis.shape[1] - count], of_complement=True)


def _directions(matrix: Matrix, total: Any) -> tuple[Matrix, Matrix]:
    """Return a matrix's left singular vectors, those of rounding errors left out, and their shares of the energy."""
    U, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    real = sigma > len(matrix) * np.finfo(matrix.dtype).eps * np.sqrt(total)
    return U[:, real], sigma[real] ** 2 / total if real.any() else sigma[real]


def _sums_before(values: Matrix) -> Matrix:
    return np.cumsum(values) - values


def _as_the_smaller(basis: Matrix) -> Subspace:
    d, m = basis.shape
    if m <= d / 2:
        return Subspace(basis)
    U, _, _ = np.linalg.svd(basis)
    return Subspace(U[:, m:], of_complement=True)


def design(covariance: Tensor, known: Subspace | None, rank: int) -> Tensor:
    """Return the A of a new task.

    Args:
        covariance: Of the task's inputs to the layer, ``(d, d)``.
        known: What is protected there; None before the first task.
        rank: Rows of A.

    Returns:
        ``(rank, d)``, with orthogonal rows of length 1/sqrt(3): the root mean square length of LoRA's usual random
        rows, whose entries are uniform within 1/sqrt(d) of zero.
    """
    allowed = covariance
    if known is not None:
        inside = torch.from_numpy(known.projection) @ covariance
        allowed = inside if known.of_complement else covariance - inside
    U, _, _ = torch.linalg.svd(allowed)
    rows: Tensor = U[:, :rank].T
    return rows / math.sqrt(3)


@torch.no_grad()
def input_covariances(
    layers: Sequence[nn.Module], show_all: Callable[[], None], *, tokens: slice = slice(None)
) -> list[Tensor]:
    """Return for each layer the mean of x x^T over its inputs x of all examples: ``(d, d)``, on the CPU.

    Args:
        layers: Modules whose first input is ``(n, tokens, d)``.
        show_all: Lets the model see all examples.
        tokens: Which of an example's; all by default.
    """
    means: list[Any] = [0.0] * len(layers)
    counts = [0] * len(layers)

    def record(index: int, x: Tensor) -> None:
        seen, new = counts[index], x.shape[0] * x.shape[1]
        counts[index] += new
        means[index] = (means[index] * seen + (x.mT @ x).sum(0).cpu()) / (seen + new)

    def watch(index: int, layer: nn.Module) -> Any:
        return layer.register_forward_pre_hook(lambda _, inputs: record(index, inputs[0][:, tokens]))

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(watch(index, layer).remove)
        show_all()
    return means

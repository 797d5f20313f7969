r"""The geometry of a task's update: how curved the loss is along it, how many directions it has, and which.

For the change u of all weights over a task's training, :math:`\hat u = u / |u|`:

- the curvature along it, :math:`\hat u' H \hat u` (the directional sharpness of Pan and Li 2023, arXiv:2306.00204), and
  the rise of the loss a distance rho further along it, :math:`L(w + \rho \hat u) - L(w)`.

For the change U of one matrix, with singular values :math:`\sigma_1 \ge \sigma_2 \ge \dots`:

- the entropy rank :math:`\exp(-\sum p_i \ln p_i)`, :math:`p_i = \sigma_i / \sum \sigma` (Roy and Vetterli 2007, eq. 3);
- the stable rank :math:`\sum \sigma_i^2 / \sigma_1^2`;
- the principal angles between its column space, or row space, and another's (Bjorck and Golub 1973): their cosines are
  the singular values of P'Q for orthonormal bases P and Q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatpatch.flatness.points import moving
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.taylor import taylor_terms

# Singular values below this share of the largest are rounding of float32 weights, not directions of an update.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class AlongUpdate:
    """What is measured along an update; values per unit of length refer to its direction.

    Attributes:
        length: L2 norm of the update, in weight units.
        slope: Derivative of the loss along it, per weight unit.
        curvature: Second derivative along it, per squared weight unit.
        sharpness: Rise of the loss a distance rho further along it.
    """

    length: float
    slope: float
    curvature: float
    sharpness: float


def along_update(problem: Problem, update: Tensor, *, rho: float) -> AlongUpdate:
    """Measure the loss along an update, at the variables' present values.

    Args:
        problem: The loss, with the variables where the update has led.
        update: u, ``(n,)``.
        rho: How far further the rise is taken, in weight units.

    Raises:
        ValueError: If the update is zero or of another shape.
    """
    u = update.to(problem.device, torch.float64)
    length = float(u.norm())
    if not 0 < length < math.inf:
        raise ValueError(f"the update has length {length:g}: it has no direction")
    slope, curvature = taylor_terms(problem, u / length)
    with moving(problem) as objective:
        rise = objective.loss(objective.origin.double() + rho / length * u) - objective.loss(objective.origin)
    return AlongUpdate(length, slope, 2 * curvature, rise)


@dataclass(frozen=True)
class Decomposition:
    """A matrix (m, n) by its singular values, k = min(m, n) of them, in float64.

    Attributes:
        left: Left singular vectors, ``(m, k)``.
        sigma: Singular values, the largest first, ``(k,)``.
        right: Right singular vectors, ``(n, k)``.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor


def decompose(U: Tensor) -> Decomposition:
    """Return a matrix's singular value decomposition, which takes time of the order of m n min(m, n)."""
    left, sigma, right = torch.linalg.svd(U.double(), full_matrices=False)
    return Decomposition(left, sigma, right.T)


def entropy_rank(sigma: Tensor) -> float:
    """Return the exponential of the entropy of a matrix's singular values: between 1 and its rank; 0 of zeros."""
    if not float(sigma.sum()) > 0:
        return 0.0
    p = sigma / sigma.sum()
    return math.exp(float(torch.special.entr(p).sum()))


def stable_rank(sigma: Tensor) -> float:
    """Return the squared Frobenius norm over the squared spectral norm by a matrix's singular values; 0 of zeros."""
    return float((sigma / sigma[0]).square().sum()) if float(sigma[0]) > 0 else 0.0


def spaces(U: Decomposition) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of a matrix's column and row space.

    Returns:
        ``(m, r)`` and ``(n, r)`` in float64, r the number of singular values that are not negligible.
    """
    kept = U.sigma > NEGLIGIBLE * U.sigma[0]
    return U.left[:, kept], U.right[:, kept]


def principal_cosines(P: Tensor, Q: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two spaces, the largest first.

    Args:
        P: An orthonormal basis, ``(n, p)``.
        Q: Another, ``(n, q)``.

    Returns:
        ``(min(p, q),)``, each within 0 and 1.
    """
    cosines: Tensor = torch.linalg.svdvals(P.double().T @ Q.double()).clamp(max=1.0)
    return cosines

r"""The dominant eigenvalue and SAM's one step of a loss whose weights move, at the cost of a few passes each time.

Power iteration (von Mises and Pollaczek-Geiringer 1929) with one product at each point: with the unit vector :math:`v`
that the point before left,

.. math:: \theta = v'Hv, \qquad r = \lVert Hv - \theta v \rVert, \qquad v \leftarrow Hv / \lVert Hv \rVert .

Some eigenvalue of :math:`H` lies within :math:`r` of :math:`\theta` (Parlett 1998, theorem 4.5.1); where the weights
move slowly it is the one of largest magnitude. The gradient :math:`g` that the product needs also gives the point that
SAM would climb to (Foret et al. 2021, arXiv:2010.01412, equation 2): the gap is
:math:`L(w + \rho\,g / \lVert g \rVert) - L(w)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatpatch.flatness.problem import Problem
from flatpatch.flatness.taylor import loss_gradient_product


@dataclass(frozen=True)
class Followed:
    """What is known at one point.

    Attributes:
        loss: L(w).
        gradient_norm: L2 norm of the gradient.
        gap: Rise of the loss at SAM's one step; may be negative. 0 where the gradient is zero.
        eigenvalue: The estimate v'Hv; signed.
        residual: Norm of Hv - (v'Hv) v, in the eigenvalue's units.
        direction: The unit vector (n,) for the next point, float64.
    """

    loss: float
    gradient_norm: float
    gap: float
    eigenvalue: float
    residual: float
    direction: Tensor


def follow(problem: Problem, rho: float, direction: Tensor | None = None) -> Followed:
    """Measure at the variables' present values, by a gradient and one product of each batch and one more loss.

    Args:
        problem: The loss.
        rho: Radius of SAM's ball, in weight units.
        direction: The vector (n,) that the point before left; None to begin, with one more gradient: along it, as it
            lies mostly in the directions of large curvature (Gur-Ari et al. 2018, arXiv:1812.04754).

    Returns:
        The values; they need not be finite.

    Raises:
        ValueError: If ``direction`` has another shape or is zero.
        RuntimeError: If the model has no second derivative.
    """
    if direction is None:
        _, direction = problem.loss_and_gradient()
        if not bool(direction.any()):
            direction = torch.ones_like(direction)
    if direction.shape != (problem.size,) or not bool(direction.any()):
        raise ValueError(f"direction must be no zero vector of shape ({problem.size},), got {tuple(direction.shape)}")
    v = (direction / direction.norm()).to(problem.device, problem.dtype).double()
    loss, gradient, product = loss_gradient_product(problem, v)
    eigenvalue = float(v @ product)
    length = product.norm()
    return Followed(
        loss=loss,
        gradient_norm=float(gradient.norm()),
        gap=_loss_beside(problem, gradient * (rho / gradient.norm())) - loss if bool(gradient.any()) else 0.0,
        eigenvalue=eigenvalue,
        residual=float((product - eigenvalue * v).norm()),
        direction=product / length if length > 0 else v,
    )


def _loss_beside(problem: Problem, step: Tensor) -> float:
    """Return the loss at the variables moved by a step (n,), by the same kernels as above; they are put back."""
    held = [variable.detach().clone() for variable in problem.variables]
    moved = problem.unflatten(problem.flatten(problem.variables, torch.float64) + step)
    with problem.active(), torch.no_grad():
        try:
            for variable, value in zip(problem.variables, moved, strict=True):
                variable.copy_(value)
            losses = [problem.batch_loss(k, twice_differentiable=True) for k in range(len(problem.batches))]
            return sum(weight * float(loss) for weight, loss in zip(problem.weights, losses, strict=True))
        finally:
            for variable, value in zip(problem.variables, held, strict=True):
                variable.copy_(value)

r"""What the gradient and the curvature at a point foretell of the change of a loss over a step.

For weights :math:`w`, a step :math:`d` and :math:`\varphi(s) = L(w + s\,d)` Taylor's theorem says

.. math:: L(w + d) - L(w) = g'd + \tfrac12\, d'Hd + R

with :math:`g'd = \varphi'(0)` and :math:`d'Hd = \varphi''(0)`. The remainder R is of third order in d where the loss is
smooth; where it has kinks (ReLU), their bend is in R too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatpatch.flatness.problem import Problem, differentiate


def taylor_terms(problem: Problem, step: Tensor) -> tuple[float, float]:
    """Compute the gradient term g'd and the curvature term d'Hd / 2 of a step, at the variables' present values.

    It takes one gradient and one Hessian product of each batch; sums are in float64.

    Args:
        problem: The loss, with the variables where the step begins.
        step: d, ``(n,)``, in weight units; rounded to each variable's number format in the product.

    Returns:
        Both terms, in units of the loss.

    Raises:
        ValueError: If ``step`` has another shape.
        RuntimeError: If the model has no second derivative.
    """
    if step.shape != (problem.size,):
        raise ValueError(f"step must have shape ({problem.size},), got {tuple(step.shape)}")
    d = step.to(problem.device, torch.float64)
    _, gradient, product = loss_gradient_product(problem, d)
    return float(gradient @ d), float(product @ d) / 2


def loss_gradient_product(problem: Problem, vector: Tensor) -> tuple[float, Tensor, Tensor]:
    """Compute loss, gradient and Hessian product at the variables' present values in one go, keeping no graph.

    Args:
        problem: The loss.
        vector: ``(n,)``, float64, on the problem's device.

    Returns:
        The loss, and g and H v, both ``(n,)`` in float64.

    Raises:
        RuntimeError: If the model has no second derivative.
    """
    pieces = problem.unflatten(vector)
    total, gradient, product = 0.0, torch.zeros_like(vector), torch.zeros_like(vector)
    with problem.active(), torch.set_grad_enabled(True):
        for index, weight in enumerate(problem.weights):
            loss = problem.batch_loss(index, twice_differentiable=True)
            gradients = differentiate(loss, problem.variables, create_graph=True)
            slope = torch.stack([(g * piece).sum() for g, piece in zip(gradients, pieces, strict=True)]).sum()
            curved = differentiate(slope, problem.variables)
            total += weight * float(loss.detach())
            gradient.add_(problem.flatten(gradients, torch.float64), alpha=weight)
            product.add_(problem.flatten(curved, torch.float64), alpha=weight)
    return total, gradient, product

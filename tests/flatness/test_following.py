"""One product at each of many points: closed forms first, then a dense Hessian that moves with the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatpatch.flatness import Problem, follow, supervised_loss

MSE = supervised_loss(nn.functional.mse_loss)


def quadratic(*sizes: int) -> tuple[Problem, Tensor, Tensor]:
    """Return |Xw - y|^2 / n of five weights in float64, its Hessian 2 X'X / n, and from w to its gradient X and y."""
    draw = torch.Generator().manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(12, 5, generator=draw, dtype=torch.float64))
    x = x * torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    y = torch.randn(12, 1, generator=draw, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 5, generator=draw, dtype=torch.float64))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    return Problem(model, batches, MSE), 2 * x.T @ x / 12, 2 * x.T @ y / 12


@pytest.mark.parametrize("sizes", [(12,), (7, 4, 1)])
def test_quadratic_has_its_known_eigenvalue_its_gap_and_its_residual_at_every_point(sizes: tuple[int, ...]) -> None:
    problem, hessian, slope = quadratic(*sizes)
    known, vectors = torch.linalg.eigh(hessian)
    (weight,) = problem.variables
    direction, rho, residuals = None, 0.3, []
    for _ in range(25):
        held = weight.detach().clone()
        gradient = hessian @ held[0] - slope[:, 0]
        v = gradient / gradient.norm() if direction is None else direction
        found = follow(problem, rho, direction)
        assert torch.equal(weight, held)
        rise = rho * gradient.norm() + rho**2 / 2 * (gradient @ hessian @ gradient) / gradient.norm() ** 2
        assert found.gap == pytest.approx(float(rise), rel=1e-9)
        assert found.loss == pytest.approx(problem.loss(), rel=1e-12)
        assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
        assert found.eigenvalue == pytest.approx(float(v @ hessian @ v), rel=1e-9)
        assert found.residual == pytest.approx(float((hessian @ v - found.eigenvalue * v).norm()), abs=1e-9)
        assert float((known - found.eigenvalue).abs().min()) <= found.residual + 1e-12
        direction = found.direction
        residuals.append(found.residual)
        with torch.no_grad():  # the curvature is the same anywhere
            weight -= 0.05 * gradient
    assert found.eigenvalue == pytest.approx(float(known[-1]), rel=1e-9)
    assert residuals[0] > 0.01 * float(known[-1]) and residuals[-1] < 1e-6 * float(known[-1])
    assert float((direction @ vectors[:, -1]).abs()) == pytest.approx(1.0, abs=1e-9)


def test_vector_keeps_up_with_a_hessian_that_moves_slowly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(10, 3).double(), torch.randn(10, 1).double()
    problem = Problem(model, [(x, y)], MSE)
    names = list(problem.scope.names)

    def loss(flat: Tensor) -> Tensor:
        pieces = dict(zip(names, problem.unflatten(flat), strict=True))
        return nn.functional.mse_loss(torch.func.functional_call(model, pieces, (x,)), y)

    first = problem.flatten(problem.variables)
    direction = None
    for step in range(40):
        found = follow(problem, 0.05, direction)
        if step >= 36:
            dense = torch.autograd.functional.hessian(loss, problem.flatten(problem.variables))
            known = torch.linalg.eigvalsh(dense)
            v = direction
            assert found.residual == pytest.approx(float((dense @ v - (v @ dense @ v) * v).norm()), rel=1e-6)
            assert found.residual < 0.02 * float(known[-1])
            assert found.eigenvalue == pytest.approx(float(known[-1]), rel=1e-3)
        direction = found.direction
        _, gradient = problem.loss_and_gradient()
        with torch.no_grad():
            for variable, piece in zip(problem.variables, problem.unflatten(gradient), strict=True):
                variable -= 0.01 * piece
    assert float((problem.flatten(problem.variables) - first).norm()) > 0.1


def test_at_a_minimum_the_gap_is_zero_and_the_product_still_begins() -> None:
    problem, hessian, slope = quadratic(12)
    (weight,) = problem.variables
    with torch.no_grad():
        weight.zero_()
    still = Problem(problem.model, [(problem.batches[0][0], torch.zeros(12, 1).double())], MSE)
    found = follow(still, 0.05)
    ones = torch.ones(5).double() / 5**0.5
    assert found.gap == found.gradient_norm == 0.0
    assert found.eigenvalue == pytest.approx(float(ones @ hessian @ ones), rel=1e-12)


@pytest.mark.parametrize("direction", [torch.ones(4), torch.zeros(5)])
def test_direction_that_is_none_is_refused(direction: Tensor) -> None:
    problem, _, _ = quadratic(12)
    with pytest.raises(ValueError, match=r"no zero vector of shape \(5,\)"):
        follow(problem, 0.05, direction.double())

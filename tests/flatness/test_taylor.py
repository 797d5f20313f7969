"""The gradient and curvature terms of a step: against closed forms and a dense Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatpatch.flatness import Problem, taylor_terms
from tests.flatness_cases import SPECTRA, quadratic_problem, symmetric


class Cubic(nn.Module):
    """The loss sum w^3."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w**3).sum() * torch.ones_like(x)


def test_terms_of_a_quadratic_are_its_whole_change() -> None:
    """L = w'Aw / 2: g'd = w'Ad, and d'Hd / 2 = d'Ad / 2."""
    for name in ("indefinite", "repeated"):
        problem, A = quadratic_problem(SPECTRA[name]), symmetric(SPECTRA[name])
        w = problem.flatten(problem.variables)
        d = torch.linspace(0.3, -0.7, problem.size, dtype=torch.float64)
        gradient, curvature = taylor_terms(problem, d)
        assert gradient == pytest.approx(float(w @ A @ d), rel=1e-12)
        assert curvature == pytest.approx(float(d @ A @ d) / 2, rel=1e-12)
        before = problem.loss()
        with torch.no_grad():
            problem.variables[0].add_(d)
        assert problem.loss() - before == pytest.approx(gradient + curvature, rel=1e-12)


def test_remainder_of_a_cubic_is_its_third_order() -> None:
    problem = Problem(Cubic(), [torch.zeros(2, dtype=torch.float64)], lambda m, x: m(x).mean(), terms=len)
    w, d = problem.flatten(problem.variables), torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    gradient, curvature = taylor_terms(problem, d)
    assert gradient == pytest.approx(float((3 * w**2 * d).sum()), rel=1e-12)
    assert curvature == pytest.approx(float((3 * w * d**2).sum()), rel=1e-12)
    before = problem.loss()
    with torch.no_grad():
        problem.variables[0].add_(d)
    assert problem.loss() - before - gradient - curvature == pytest.approx(float((d**3).sum()), rel=1e-12)


def test_terms_of_uneven_batches_are_those_of_the_dense_gradient_and_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randint(2, (10,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    problem = Problem(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    d = torch.randn(problem.size, dtype=torch.float64)

    def loss(vector: torch.Tensor) -> torch.Tensor:
        named = dict(zip(problem.scope.names, problem.unflatten(vector), strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    w = problem.flatten(problem.variables)
    H = torch.autograd.functional.hessian(loss, w)
    g = torch.autograd.functional.jacobian(loss, w)
    assert taylor_terms(problem, d) == pytest.approx((float(g @ d), float(d @ H @ d) / 2), rel=1e-10)


def test_step_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step must have shape \(12,\), got \(3,\)"):
        taylor_terms(quadratic_problem(SPECTRA["identity"]), torch.zeros(3))

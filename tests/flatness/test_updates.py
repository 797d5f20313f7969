"""The geometry of an update: closed forms and dense references."""

from __future__ import annotations

import math

import pytest
import torch

from flatpatch.flatness.updates import along_update, decompose, entropy_rank, principal_cosines, spaces, stable_rank
from tests.flatness_cases import SPECTRA, quadratic_problem, symmetric


def matrix(*sigma: float, rows: int = 7, columns: int = 5) -> torch.Tensor:
    """Return a matrix with these singular values and random singular vectors."""
    draw = torch.Generator().manual_seed(1)
    normal = [torch.randn(size, len(sigma), generator=draw, dtype=torch.float64) for size in (rows, columns)]
    left, right = (torch.linalg.qr(each).Q for each in normal)
    return left @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right.T


def test_loss_along_an_update_of_a_quadratic_is_its_parabola() -> None:
    """L = w'Aw / 2: slope w'Av, curvature v'Av, rise rho w'Av + rho^2 v'Av / 2 along v = u / |u|."""
    problem, A = quadratic_problem(SPECTRA["indefinite"]), symmetric(SPECTRA["indefinite"])
    w = problem.flatten(problem.variables).clone()
    u = torch.linspace(0.5, -0.2, problem.size, dtype=torch.float64)
    v = u / u.norm()
    found = along_update(problem, u, rho=0.3)
    slope, curvature = float(w @ A @ v), float(v @ A @ v)
    assert found.length == pytest.approx(float(u.norm()), rel=1e-12)
    assert (found.slope, found.curvature) == pytest.approx((slope, curvature), rel=1e-12)
    assert found.sharpness == pytest.approx(0.3 * slope + 0.045 * curvature, rel=1e-10)
    assert torch.equal(problem.flatten(problem.variables), w)


def test_update_without_a_direction_is_refused() -> None:
    problem = quadratic_problem(SPECTRA["identity"])
    with pytest.raises(ValueError, match="the update has length 0: it has no direction"):
        along_update(problem, torch.zeros(problem.size), rho=0.1)


def test_ranks_of_known_singular_values() -> None:
    """Of 3 and 1 the shares are 3/4 and 1/4; equal ones have the rank itself; one alone has rank one."""
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    sigma = decompose(matrix(3.0, 1.0)).sigma
    assert entropy_rank(sigma) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert stable_rank(sigma) == pytest.approx(10 / 9, rel=1e-12)
    for count in (1, 3):
        sigma = decompose(matrix(*[2.0] * count)).sigma
        assert entropy_rank(sigma) == pytest.approx(count, rel=1e-9)
        assert stable_rank(sigma) == pytest.approx(count, rel=1e-12)
    zeros = decompose(torch.zeros(3, 4)).sigma
    assert entropy_rank(zeros) == stable_rank(zeros) == 0.0


def test_spaces_are_those_of_the_directions_that_count() -> None:
    U = matrix(2.0, 1.0, 1e-5)
    left, right = spaces(decompose(U))
    assert left.shape == (7, 2) and right.shape == (5, 2)
    for basis in (left, right):
        assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(left @ left.T @ U @ right @ right.T, U, atol=2e-5)  # but for the third one
    assert spaces(decompose(torch.zeros(3, 2)))[0].shape == (3, 0)


def test_cosines_are_those_of_the_angles_that_spaces_were_turned_by() -> None:
    angle = 0.4
    P = torch.eye(4, dtype=torch.float64)[:, :2]
    Q = torch.tensor([[math.cos(angle), 0.0], [0.0, 0.0], [math.sin(angle), 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert principal_cosines(P, Q).tolist() == pytest.approx([math.cos(angle), 0.0], abs=1e-12)
    turned = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert principal_cosines(P, P @ turned).tolist() == pytest.approx([1.0, 1.0])  # one space, another basis
    assert principal_cosines(P, P[:, :1]).shape == (1,)

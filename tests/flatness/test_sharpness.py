"""Sharpness: closed forms first (linear and quadratic losses over box and ball), then invariances, then bad input."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from flatpatch.flatness.problem import Problem, supervised_loss
from flatpatch.flatness.sharpness import ball_sharpness, keskar_sharpness, m_sharpness
from tests.flatness_lora import make_model, make_problem


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Quadratic:
    """c + g'(x - x0) + (x - x0)' H (x - x0) / 2, times a scale."""

    def __init__(self, origin, H=None, g=None, c=0.0, scale=1.0, dtype=torch.float64):
        self.origin = torch.as_tensor(origin, dtype=dtype)
        n = len(self.origin)
        self.centre = self.origin.double()
        self.H = torch.zeros(n, n, dtype=torch.float64) if H is None else torch.as_tensor(H, dtype=torch.float64)
        self.g = torch.zeros(n, dtype=torch.float64) if g is None else torch.as_tensor(g, dtype=torch.float64)
        self.c, self.scale = c, scale
        self.points = []

    def loss(self, x):
        return self.loss_and_gradient(x)[0]

    def loss_and_gradient(self, x):
        assert x.dtype == self.origin.dtype
        self.points.append(x)
        d = x.double() - self.centre
        Hd = self.H @ d
        return float(self.scale * (self.c + self.g @ d + d @ Hd / 2)), self.scale * (self.g + Hd)


def symmetric(eigenvalues, seed=0):
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T, q


def highest_on_the_ball(H, g, rho):
    """max g'e + e'He/2 over |e| <= rho by the secular equation: (mu - H) e = g with mu >= l1 and |e| = rho."""
    values, vectors = torch.linalg.eigh(H)
    b = vectors.T @ g
    low, high = float(max(values[-1], 0.0)), float(max(values[-1], 0.0) + g.norm() / rho + 1.0)
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((b / (mu - values)).norm()) > rho else (low, mu)
    e = b / (high - values)
    return float(b @ e + (values * e * e).sum() / 2)


# Keskar et al.: the full space


def test_keskar_of_a_linear_loss_is_its_closed_form():
    x, g = torch.tensor([2.0, -0.5, 0.0]), torch.tensor([0.3, -0.2, 0.1])
    result = keskar_sharpness(Quadratic(x, g=g, c=0.25), epsilon=1e-3)
    expected = 100 * float((1e-3 * (x.abs() + 1) * g.abs()).sum()) / 1.25
    assert result.phi == pytest.approx(expected, rel=1e-9)
    assert result.phi_sign_step == pytest.approx(expected, rel=1e-9)
    assert result.phi_lower_bound == pytest.approx(expected, rel=1e-9)
    assert (result.loss, result.dimensions, result.manifold, result.column_norm) == (0.25, 3, "full space", 1.0)


def test_keskar_of_a_separable_quadratic_at_its_minimum_is_the_corner():
    x, h = torch.tensor([1.0, -3.0, 0.0, 0.2]), torch.tensor([4.0, 1.0, 0.5, 2.0])
    result = keskar_sharpness(Quadratic(x, torch.diag(h)), epsilon=1e-2, seed=1)
    corner = 100 * float((h * (1e-2 * (x.abs() + 1)) ** 2).sum() / 2)
    assert result.phi_lower_bound == pytest.approx(corner, rel=1e-9)
    # The gradient is zero there: neither the paper's search nor a sign step can move.
    assert result.phi == result.phi_sign_step == 0.0


def test_keskar_lower_bound_is_the_exact_maximum_of_a_small_convex_quadratic():
    H, _ = symmetric([3.0, 1.0, 0.5, 0.1])
    x, g = torch.tensor([0.4, -1.0, 2.0, 0.0], dtype=torch.float64), torch.randn(4, dtype=torch.float64) * 1e-3
    problem = Quadratic(x, H, g)
    half = 1e-2 * (x.abs() + 1)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4) * half
    exact = max(problem.loss(x + corner) for corner in corners)
    result = keskar_sharpness(problem, epsilon=1e-2, random_starts=8)
    assert result.rise == pytest.approx(exact, rel=1e-9)
    assert result.phi <= result.phi_lower_bound


@pytest.mark.parametrize("dimensions", [None, 7])
def test_keskar_is_ten_iterations_of_l_bfgs_b_on_the_papers_problem(dimensions):
    """Written out once more as in the paper, in y, with scipy and no other search."""
    n = 30
    H, _ = symmetric(np.linspace(-1.0, 2.0, n).tolist())
    x, g = torch.randn(n), torch.randn(n) * 1e-2
    problem = Quadratic(x, H, g, c=0.3)
    A = torch.eye(n)
    if dimensions:
        A = torch.randn(n, dimensions, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    half = (0.5 * ((torch.linalg.pinv(A) @ x).abs() + 1)).numpy()

    def negative(y):
        value, gradient = problem.loss_and_gradient(x + A @ torch.from_numpy(y))
        return -value, -(A.T @ gradient).numpy()

    outcome = minimize(
        negative,
        np.zeros(len(half)),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(-half, half, strict=True)),
        options={"maxiter": 10, "gtol": 0.0, "ftol": 0.0},
    )
    result = keskar_sharpness(problem, epsilon=0.5, dimensions=dimensions, seed=2)
    assert result.phi == pytest.approx(100 * (-outcome.fun - 0.3) / 1.3, rel=1e-6)
    assert result.paper_evaluations == outcome.nfev
    assert result.iterations == outcome.nit


def test_keskar_sign_step_and_ascent_find_what_ten_iterations_miss():
    """A converged model: tiny gradient, so the paper's search crawls while a corner lies one step away."""
    n = 200
    H, _ = symmetric(np.geomspace(1e-4, 1.0, n).tolist())
    g = torch.randn(n, dtype=torch.float64) * 1e-6
    result = keskar_sharpness(Quadratic(torch.randn(n), H, g), epsilon=5e-4)
    assert 0 < result.phi <= result.phi_lower_bound
    assert result.phi_lower_bound > 1.05 * result.phi
    assert result.paper_evaluations < result.evaluations
    assert result.iterations <= 10


def test_keskar_is_not_zero_for_a_tiny_loss():
    """scipy's default tolerances stop at iteration 0 there and would report a sharpness of exactly 0."""
    values = []
    for scale in (1.0, 1e-7):
        result = keskar_sharpness(Quadratic(torch.ones(6), torch.eye(6), torch.full((6,), 0.1), scale=scale))
        values.append((result.phi / scale, result.phi_lower_bound / scale))
        assert result.iterations >= 1
    assert values[1][0] > 0
    assert values[1][1] == pytest.approx(values[0][1], rel=1e-6)


def test_keskar_box_is_measured_from_the_origin_of_each_weight():
    """|x_i| + 1 per coordinate, not a common radius."""
    x = torch.tensor([9.0, 0.0])
    result = keskar_sharpness(Quadratic(x, g=torch.tensor([1.0, 0.0])), epsilon=1e-3)
    assert result.phi == pytest.approx(100 * 1e-3 * 10, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keskar_points_stay_in_the_box_after_rounding(dtype):
    x = torch.randn(500, dtype=torch.float64).mul(3).to(dtype)
    problem = Quadratic(x, torch.eye(500), torch.randn(500), dtype=dtype)
    result = keskar_sharpness(problem, epsilon=1e-3)
    half = 1e-3 * (x.double().abs() + 1)
    assert len(problem.points) > 3
    for point in problem.points:
        assert bool(((point.double() - x.double()).abs() <= half).all())
    assert 0 < result.rounding < (1e-3 if dtype == torch.float32 else 2.0)


def test_keskar_keeps_the_best_point_not_the_last():
    class Spike(Quadratic):
        """Rises to the first corner asked for and is low at all later points."""

        def loss_and_gradient(self, x):
            value, gradient = super().loss_and_gradient(x)
            return (5.0 if len(self.points) == 3 else value), gradient

    result = keskar_sharpness(Spike(torch.ones(3), g=torch.full((3,), 1e-3), c=0.0))
    assert result.phi == 500.0


# Keskar et al.: random manifolds


def test_keskar_on_a_manifold_is_the_closed_form_of_a_linear_loss():
    n, p = 40, 5
    x, g = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    result = keskar_sharpness(Quadratic(x, g=g), epsilon=1e-3, dimensions=p, seed=3)
    A = torch.randn(n, p, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    half = 1e-3 * ((torch.linalg.pinv(A) @ x).abs() + 1)
    expected = 100 * float((half * (A.T @ g).abs()).sum())
    assert result.phi == pytest.approx(expected, rel=1e-9)
    assert result.phi_lower_bound == pytest.approx(expected, rel=1e-9)
    assert result.manifold == "5 standard normal columns"
    assert result.column_norm == pytest.approx(float(A.norm(dim=0).mean()))


def test_keskar_on_a_manifold_is_repeatable_and_depends_on_the_seed():
    problem = Quadratic(torch.randn(30), g=torch.randn(30))
    first, again, other = (keskar_sharpness(problem, dimensions=4, seed=seed) for seed in (0, 0, 1))
    # Least squares by LAPACK repeats to rounding only.
    assert dataclasses.replace(again, rounding=first.rounding) == first
    assert other.phi != first.phi


def test_keskar_on_a_manifold_is_below_the_span_of_all_directions():
    """With as many random directions as weights the box is another one, but every point still lies on the manifold."""
    problem = Quadratic(torch.zeros(6), torch.eye(6), torch.randn(6))
    keskar_sharpness(problem, dimensions=2, seed=5)
    A = torch.randn(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = torch.stack(problem.points[1:], dim=1)
    residual = moved - A @ (torch.linalg.pinv(A) @ moved)
    assert float(residual.abs().max()) < 1e-12


# SAM's ball


def test_ball_of_a_linear_loss_is_rho_times_the_gradient_norm():
    g = torch.tensor([3.0, -4.0])
    result = ball_sharpness(Quadratic(torch.ones(2), g=g), 0.1)
    assert result.one_step == pytest.approx(0.5, rel=1e-12)
    assert result.ascent == pytest.approx(0.5, rel=1e-12)
    assert (result.grad_norm, result.eta) == (5.0, None)
    assert result.norm == pytest.approx(0.1, rel=1e-12)


def test_ball_one_step_is_the_rise_at_sams_perturbation():
    H, _ = symmetric([2.0, 0.3, -0.5])
    g = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
    e = 0.05 * g / g.norm()
    result = ball_sharpness(Quadratic(torch.randn(3), H, g), 0.05)
    assert result.one_step == pytest.approx(float(g @ e + e @ H @ e / 2), rel=1e-9)


def test_ball_at_a_minimum_is_half_rho_squared_times_the_top_eigenvalue():
    H, q = symmetric([5.0, 2.0, 1.0, 0.1])
    problem = Quadratic(torch.randn(4), H)
    result = ball_sharpness(problem, 0.1, ascent_steps=40)
    assert result.one_step == 0.0
    assert result.ascent == pytest.approx(0.5 * 0.01 * 5.0, rel=1e-9)
    with_vector = ball_sharpness(problem, 0.1, ascent_steps=0, directions=[q[:, 0]], random_starts=0)
    assert with_vector.ascent == pytest.approx(0.5 * 0.01 * 5.0, rel=1e-12)
    assert with_vector.best_start.startswith("direction 1")


def test_ball_starts_from_a_direction_both_ways():
    problem = Quadratic(torch.zeros(2), torch.diag(torch.tensor([5.0, 0.0])), [-0.001, 0.1])
    ways = [
        ball_sharpness(problem, 0.1, ascent_steps=0, random_starts=0, directions=[torch.tensor([s, 0.0])])
        for s in (1.0, -1.0)
    ]
    assert [way.best_start for way in ways] == ["direction 1 -", "direction 1 +"]
    assert [way.ascent for way in ways] == pytest.approx([0.5 * 0.01 * 5 + 0.0001] * 2)


def test_ball_at_a_saddle_rises_along_the_positive_side():
    """The dominant eigenvalue is negative: plain power iteration would go there, where the loss falls."""
    H, _ = symmetric([-9.0, 1.0, 0.5])
    result = ball_sharpness(Quadratic(torch.randn(3), H), 0.1, ascent_steps=200)
    assert result.ascent == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, 0.2], [3.0, 3.0, 0.0], [2.0, -0.5, -1.0]])
def test_ball_ascent_reaches_the_exact_maximum_of_a_quadratic(eigenvalues):
    H, _ = symmetric(eigenvalues)
    g = torch.randn(3, dtype=torch.float64) * 0.05
    result = ball_sharpness(Quadratic(torch.zeros(3), H, g), 0.2, ascent_steps=300, random_starts=4)
    exact = highest_on_the_ball(H, g, 0.2)
    assert result.ascent == pytest.approx(exact, rel=1e-5)
    assert result.ascent <= exact * (1 + 1e-9)


def test_ball_search_never_leaves_the_ball():
    H, _ = symmetric([4.0, 1.0, -2.0, 0.3])
    problem = Quadratic(torch.zeros(4), H, torch.randn(4) * 0.1)
    ball_sharpness(problem, 0.3, ascent_steps=30, random_starts=3)
    assert max(float(point.norm()) for point in problem.points) <= 0.3 * (1 + 1e-12)


def test_ball_one_step_may_fall_and_the_ascent_never_does():
    result = ball_sharpness(Quadratic(torch.zeros(2), torch.diag(torch.tensor([-8.0, -8.0])), [0.1, 0.0]), 0.5)
    assert result.one_step == pytest.approx(0.05 - 1.0)
    assert result.ascent >= 0.0


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_ball_step_has_norm_rho_whatever_the_gradients_scale(size):
    result = ball_sharpness(Quadratic(torch.zeros(3), g=torch.full((3,), size)), 0.1, ascent_steps=0)
    assert result.norm == pytest.approx(0.1, rel=1e-12)


# ASAM


def test_adaptive_ball_of_a_linear_loss_is_its_closed_form():
    x, g = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.1, 0.3, -0.2])
    result = ball_sharpness(Quadratic(x, g=g), 0.5, adaptive=True, eta=0.01)
    expected = 0.5 * float(((x.abs() + 0.01) * g).norm())
    assert result.one_step == pytest.approx(expected, rel=1e-6)
    assert result.ascent == pytest.approx(expected, rel=1e-6)
    assert result.eta == 0.01


class Factors:
    """A LoRA pair's loss (sum((B A - T)^2) / 2) as a function of [A, B]; another gauge of the same function."""

    def __init__(self, c=1.0):
        generator = torch.Generator().manual_seed(7)
        draw = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 4), (3, 2), (3, 4))]
        A, B, self.target = draw
        self.origin = torch.cat([(c * A).flatten(), (B / c).flatten()])

    def loss(self, x):
        return self.loss_and_gradient(x)[0]

    def loss_and_gradient(self, x):
        leaf = x.clone().requires_grad_()
        loss = (leaf[8:].view(3, 2) @ leaf[:8].view(2, 4) - self.target).square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), gradient


def test_adaptive_ball_without_eta_does_not_see_the_gauge_of_a_lora_pair():
    plain, rescaled = (ball_sharpness(Factors(c), 0.1, adaptive=True, eta=0.0, random_starts=2) for c in (1.0, 8.0))
    assert rescaled.one_step == pytest.approx(plain.one_step, rel=1e-9)
    assert rescaled.ascent == pytest.approx(plain.ascent, rel=1e-9)


def test_sam_and_keskar_do_see_the_gauge_of_a_lora_pair():
    assert ball_sharpness(Factors(8.0), 0.1).one_step != pytest.approx(ball_sharpness(Factors(), 0.1).one_step, rel=0.1)
    assert keskar_sharpness(Factors(8.0)).phi != pytest.approx(keskar_sharpness(Factors()).phi, rel=0.1)


def test_values_do_not_depend_on_the_order_of_the_weights():
    H, _ = symmetric([2.0, 1.0, 0.1, -0.2])
    x, g = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    problems = Quadratic(x, H, g), Quadratic(x[order], H[order][:, order], g[order])
    first, second = (ball_sharpness(problem, 0.1, random_starts=0) for problem in problems)
    assert second.ascent == pytest.approx(first.ascent, rel=1e-9)
    first, second = (keskar_sharpness(problem, random_starts=0) for problem in problems)
    assert second.phi_lower_bound == pytest.approx(first.phi_lower_bound, rel=1e-9)


# m-sharpness


def test_m_sharpness_is_the_weighted_mean_of_each_batchs_own_rise():
    batches = [Quadratic(torch.zeros(2), g=torch.tensor(g)) for g in ([3.0, 4.0], [0.0, -1.0])]
    result = m_sharpness(batches, 0.1, m=4, weights=[3, 1])
    assert result.one_step == pytest.approx((3 * 0.5 + 1 * 0.1) / 4, rel=1e-12)
    assert [batch.one_step for batch in result.batches] == pytest.approx([0.5, 0.1])
    assert result.m == 4


def test_m_sharpness_is_at_least_the_sharpness_of_the_whole():
    """Opposite gradients: the mean loss is flat, each batch's own is not."""
    batches = [Quadratic(torch.zeros(2), g=torch.tensor([s, 0.0])) for s in (1.0, -1.0)]
    assert m_sharpness(batches, 0.1, m=1).one_step == pytest.approx(0.1)
    assert ball_sharpness(Quadratic(torch.zeros(2)), 0.1).ascent == 0.0


def test_results_can_be_written_as_json():
    problem = Quadratic(torch.ones(2), torch.eye(2), [1.0, 0.0])
    keskar, ball, m = keskar_sharpness(problem), ball_sharpness(problem, 0.1), m_sharpness([problem], 0.1, m=1)
    for result in (keskar, ball):
        assert json.loads(json.dumps(result.as_dict(), allow_nan=False)) == dataclasses.asdict(result)
    assert json.loads(json.dumps(m.as_dict(), allow_nan=False))["batches"][0]["one_step"] == m.one_step
    infinite = dataclasses.replace(ball, one_step=math.inf)
    assert infinite.as_dict()["one_step"] is None


# Losses that are not finite, and bad arguments


class Cliff(Quadratic):
    """Infinite beyond a distance, with a NaN gradient, as an overflow gives."""

    def loss_and_gradient(self, x):
        value, gradient = super().loss_and_gradient(x)
        if float((x.double() - self.centre).norm()) > 0.05:
            return math.inf, gradient * math.nan
        return value, gradient


def test_points_of_infinite_loss_are_counted_and_never_the_maximum():
    result = ball_sharpness(Cliff(torch.zeros(2), torch.eye(2), [1.0, 0.0]), 0.2, random_starts=1)
    assert result.non_finite > 0
    assert math.isfinite(result.ascent)
    keskar = keskar_sharpness(Cliff(torch.zeros(2), torch.eye(2), [1.0, 0.0]), epsilon=0.2)
    assert keskar.non_finite > 0
    assert "not finite" in keskar.message
    assert math.isfinite(keskar.phi_lower_bound)


@pytest.mark.parametrize("measure", [keskar_sharpness, lambda problem: ball_sharpness(problem, 0.1)])
def test_a_loss_that_is_not_finite_at_the_weights_is_refused(measure):
    with pytest.raises(ValueError, match="the loss at the weights is nan"):
        measure(Quadratic(torch.zeros(2), c=math.nan))


@pytest.mark.parametrize("measure", [keskar_sharpness, lambda problem: ball_sharpness(problem, 0.1)])
def test_an_empty_vector_of_weights_is_refused(measure):
    with pytest.raises(ValueError, match="not empty"):
        measure(Quadratic(torch.zeros(0)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match="epsilon must be a positive number"):
        keskar_sharpness(Quadratic(torch.zeros(2)), epsilon=value)
    with pytest.raises(ValueError, match="rho must be a positive number"):
        ball_sharpness(Quadratic(torch.zeros(2)), value)


@pytest.mark.parametrize("dimensions", [0, 4])
def test_more_random_directions_than_weights_are_refused(dimensions):
    with pytest.raises(ValueError, match="dimensions must be 1 to 3"):
        keskar_sharpness(Quadratic(torch.zeros(3)), dimensions=dimensions)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"1 \+ loss, which must be positive"):
        keskar_sharpness(Quadratic(torch.zeros(2), c=-1.5))
    with pytest.raises(ValueError, match="eta must be finite and not negative"):
        ball_sharpness(Quadratic(torch.zeros(2)), 0.1, adaptive=True, eta=-1.0)
    with pytest.raises(ValueError, match="direction 1 has shape"):
        ball_sharpness(Quadratic(torch.zeros(2)), 0.1, directions=[torch.zeros(3)])
    with pytest.raises(ValueError, match="at least one batch"):
        m_sharpness([], 0.1, m=1)
    with pytest.raises(ValueError, match="weights must be 1 numbers"):
        m_sharpness([Quadratic(torch.zeros(2))], 0.1, m=1, weights=[1, 2])


# On a model


def classifier(dtype=torch.float32):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)
    batches = [(torch.randn(n, 3, dtype=dtype), torch.randint(2, (n,))) for n in (4, 4, 2)]
    return model, Problem(model, batches, supervised_loss(torch.nn.functional.cross_entropy))


def state(model):
    return [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize(
    "measure",
    [
        keskar_sharpness,
        lambda problem: keskar_sharpness(problem, dimensions=3),
        lambda problem: ball_sharpness(problem, 0.05),
        lambda problem: m_sharpness(problem, 0.05, m=4, ascent_steps=3),
    ],
)
def test_a_model_is_left_bit_for_bit_as_it_was(measure):
    model, problem = classifier()
    before = state(model)
    measure(problem)
    for (value, required, grad), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == required
        assert parameter.grad is grad is None
    assert model.training


def test_weights_are_restored_when_a_loss_raises():
    model, problem = classifier()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("out of memory")
        return supervised_loss(torch.nn.functional.cross_entropy)(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        ball_sharpness(Problem(model, problem.batches, failing, check=False), 0.5)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


def test_ball_on_a_model_is_sams_own_step():
    model, problem = classifier(torch.float64)
    inputs, targets = (torch.cat([batch[k] for batch in problem.batches]) for k in (0, 1))
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    result = ball_sharpness(problem, 0.05, ascent_steps=0, random_starts=0)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.add_(0.05 * gradient / norm)
        risen = torch.nn.functional.cross_entropy(model(inputs), targets)
    assert result.one_step == pytest.approx((risen - loss).item(), rel=1e-9)


def test_m_sharpness_of_a_problem_weights_batches_by_their_loss_terms():
    _, problem = classifier(torch.float64)
    result = m_sharpness(problem, 0.05, m=4)
    shares = np.array([4, 4, 2]) / 10
    each = [ball_sharpness(problem.subset([k]), 0.05, ascent_steps=0, random_starts=0).one_step for k in range(3)]
    assert result.one_step == pytest.approx(float(shares @ each), rel=1e-12)
    assert result.one_step > ball_sharpness(problem, 0.05, ascent_steps=0, random_starts=0).one_step


def test_bfloat16_weights_report_what_rounding_took():
    model, problem = classifier()
    model.to(torch.bfloat16)
    batches = [(inputs.bfloat16(), targets) for inputs, targets in problem.batches]
    problem = Problem(model, batches, supervised_loss(torch.nn.functional.cross_entropy), check=False)
    assert ball_sharpness(problem, 0.05).rounding > 1e-3


def test_progress_is_reported_by_every_search() -> None:
    problem = make_problem(make_model())
    calls: list[tuple[int, int, str]] = []

    def record(done: int, total: int, line: str) -> None:
        calls.append((done, total, line))

    found = keskar_sharpness(problem, ascent_steps=2, progress=record)
    assert len(calls) == found.evaluations - 1  # the first is before any search
    assert all(0 < done <= total for done, total, _ in calls)
    assert calls[-1][2] == f"rise {found.rise:.4g}"
    calls.clear()
    ball = ball_sharpness(problem, 0.05, ascent_steps=2, progress=record)
    assert len(calls) == ball.evaluations - 1
    assert calls[-1][2] == f"rise {ball.ascent:.4g}"
    calls.clear()
    m_sharpness(problem, 0.05, m=4, progress=record)
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]

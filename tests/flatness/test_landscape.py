"""Directions and landscapes: closed forms, exact coordinates, gauges of LoRA, restored weights, resumption."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness.directions import (
    Direction,
    filter_normalise_,
    given_direction,
    random_direction,
    unit_axes,
)
from flatpatch.flatness.landscape import (
    landscape,
    load_landscape,
    plane_landscape,
    plane_through,
    save_landscape,
)
from flatpatch.flatness.operator import HessianOperator
from flatpatch.flatness.problem import Problem, supervised_loss
from tests.flatness_lora import assert_same_state, make_model, make_problem, rescale, state_of


class Quadratic:
    """g'x + x' H x / 2 at the weights x."""

    def __init__(self, origin, H, g):
        self.origin, self.H, self.g = origin, H, g
        self.points = []

    def loss(self, x):
        self.points.append(x.clone())
        x = x.double()
        return float(self.g @ x + x @ self.H @ x / 2)


@pytest.fixture
def quadratic():
    H = torch.randn(5, 5, dtype=torch.float64)
    return Quadratic(torch.randn(5, dtype=torch.float64), H + H.T, torch.randn(5, dtype=torch.float64))


# Closed forms


def test_slice_of_a_quadratic_is_its_parabola(quadratic):
    d = torch.randn(5, dtype=torch.float64)
    axis = np.linspace(-2, 3, 11)
    result = landscape(quadratic, [Direction(d, "d", "as given")], [axis])
    x, H = quadratic.origin, quadratic.H
    slope, curvature = float((quadratic.g + H @ x) @ d), float(d @ H @ d)
    expected = float(quadratic.g @ x + x @ H @ x / 2) + axis * slope + axis**2 * curvature / 2
    np.testing.assert_allclose(result.losses, expected, rtol=1e-12, atol=1e-12)
    assert result.done.all()


def test_surface_of_a_quadratic_is_its_paraboloid(quadratic):
    quadratic.origin.zero_()
    u, v = torch.randn(2, 5, dtype=torch.float64)
    axes = np.linspace(-1, 1, 4), np.linspace(0, 2, 3)
    result = landscape(quadratic, [Direction(u, "u", "l2"), Direction(v, "v", "l2")], axes)
    for i, a in enumerate(axes[0]):
        for j, b in enumerate(axes[1]):
            x = a * u + b * v
            expected = float(quadratic.g @ x + x @ quadratic.H @ x / 2)
            assert result.losses[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert result.about["cosine"] == pytest.approx(float(u @ v / u.norm() / v.norm()))


def test_slice_along_an_eigenvector_curves_by_its_eigenvalue(quadratic):
    quadratic.g = -quadratic.H @ quadratic.origin
    values, vectors = torch.linalg.eigh(quadratic.H)
    for k in range(5):
        direction = given_direction(7 * vectors[:, k], f"eigenvector {k + 1}")
        losses = landscape(quadratic, [direction], [[-1.0, 0.0, 1.0]]).losses
        assert losses[0] + losses[2] - 2 * losses[1] == pytest.approx(float(values[k]), rel=1e-9)


def test_points_do_not_drift():
    """Each is built from the base: float32 weights of 1000 and steps of 0.1, which running sums would lose."""
    objective = Quadratic(torch.full((3,), 1000.0), torch.zeros(3, 3).double(), torch.ones(3).double())
    d = torch.ones(3, dtype=torch.float64)
    axis = np.linspace(0, 1000, 2001)
    landscape(objective, [Direction(d, "d", "l2")], [axis])
    for coordinate, point in zip(axis, objective.points[1:], strict=True):
        assert torch.equal(point, torch.full((3,), 1000.0, dtype=torch.float64) + coordinate * d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cell_at_zero_is_the_loss_of_the_weights_bit_for_bit(dtype):
    problem = make_problem(make_model(dtype=dtype))
    result = landscape(problem, [random_direction(problem)], [[-0.5, 0.0, 0.5]])
    assert result.losses[1] == problem.loss() == result.origin_loss


def test_a_cell_is_the_loss_of_a_model_with_those_weights():
    problem = make_problem(make_model())
    directions = [random_direction(problem, seed=seed) for seed in (0, 1)]
    result = landscape(problem, directions, [[0.3, 1.0], [-0.7]])
    moved = make_model()
    step = 0.3 * directions[0].vector - 0.7 * directions[1].vector
    with torch.no_grad():
        pieces = problem.unflatten(step)
        for parameter, piece in zip([p for p in moved.parameters() if p.requires_grad], pieces, strict=True):
            parameter.add_(piece)
    assert result.losses[0, 0] == pytest.approx(make_problem(moved).loss(), rel=1e-12)


# Filter normalisation


def test_filter_normalise_gives_each_row_its_weights_norm():
    weights, direction = torch.randn(4, 3), torch.randn(4, 3)
    drawn = direction.clone()
    assert filter_normalise_(direction, weights) == 0
    torch.testing.assert_close(direction.norm(dim=1), weights.norm(dim=1))
    torch.testing.assert_close(nn.functional.cosine_similarity(direction, drawn), torch.ones(4))


def test_filter_normalise_of_a_convolution_treats_an_output_channel_as_one_unit():
    weights, direction = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    filter_normalise_(direction, weights)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), weights.flatten(1).norm(dim=1))


def test_zero_rows_are_reported():
    weights, direction = torch.randn(4, 3), torch.randn(4, 3)
    weights[1] = weights[3] = 0
    assert filter_normalise_(direction, weights) == 2
    assert not direction[1].any()
    assert direction[0].any()


def test_a_tiny_row_gets_its_own_norm():
    """An epsilon in the denominator would shorten it."""
    weights, direction = torch.full((1, 3), 1e-12, dtype=torch.float64), torch.full((1, 3), 1e-12, dtype=torch.float64)
    filter_normalise_(direction, weights)
    assert float(direction.norm() / weights.norm()) == pytest.approx(1.0, rel=1e-12)


def test_lora_factors_are_normalised_by_rank_index():
    problem = make_problem(make_model())
    direction = random_direction(problem)
    for name, piece, weight in zip(
        problem.scope.names, problem.unflatten(direction.vector), problem.variables, strict=True
    ):
        dim = 1 if "lora_A" in name else 0
        torch.testing.assert_close(piece.norm(dim=dim), weight.detach().norm(dim=dim))
    assert direction.zero_units == {}


@pytest.mark.parametrize("normalisation", ["filter", "merged_rows"])
@pytest.mark.parametrize("scales", [[8.0, 8.0], [16.0, 0.25]])
def test_slice_is_the_same_in_every_gauge_of_the_factors(normalisation, scales):
    """A -> cA, B -> B/c, for all rank indices alike or for each its own."""
    losses = []
    for model in (make_model(), rescale(make_model(), scales)):
        problem = make_problem(model)
        direction = random_direction(problem, normalisation=normalisation, seed=4)
        losses.append(landscape(problem, [direction], [np.linspace(-1, 1, 7)]).losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    assert np.ptp(losses[0]) > 1e-3


@pytest.mark.parametrize("normalisation", ["layer", "l2"])
def test_slice_by_other_norms_depends_on_the_gauge(normalisation):
    losses = []
    for model in (make_model(), rescale(make_model(), [16.0, 0.25])):
        problem = make_problem(model)
        direction = random_direction(problem, normalisation=normalisation, seed=4)
        losses.append(landscape(problem, [direction], [[0.5]]).losses)
    assert abs(losses[0] - losses[1]) > 1e-6


def test_a_new_adapter_is_reported_to_have_no_filters_in_b():
    """Its slice is flat whatever the loss: B stays zero and A has no effect."""
    problem = make_problem(make_model(zero_b=True))
    direction = random_direction(problem)
    assert direction.zero_units == {name: 2 for name in problem.scope.names if "lora_B" in name}
    result = landscape(problem, [direction], [np.linspace(-1, 1, 5)])
    assert np.ptp(result.losses) == 0.0
    assert result.about["axes"][0]["zero_units"] == direction.zero_units


def test_merged_rows_move_a_new_adapter_by_the_rows_of_the_merged_matrix():
    model = make_model(zero_b=True)
    problem = make_problem(model)
    before = state_of(model)
    direction = random_direction(problem, normalisation="merged_rows")
    assert_same_state(model, before)
    assert direction.zero_units == {}
    pieces = dict(zip(problem.scope.names, problem.unflatten(direction.vector), strict=True))
    for key, layer in (("0", model[0]), ("3", model[3])):
        change = layer.scaling * pieces[f"{key}.lora_B.default.weight"] @ layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(change.norm(dim=1), layer.weight.norm(dim=1))
    assert np.ptp(landscape(problem, [direction], [np.linspace(-1, 1, 5)]).losses) > 1e-2


def test_merged_rows_of_a_trained_adapter_use_the_merged_matrix():
    model = make_model()
    problem = make_problem(model)
    pieces = dict(
        zip(
            problem.scope.names,
            problem.unflatten(random_direction(problem, normalisation="merged_rows").vector),
            strict=True,
        )
    )
    layer = model[3]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    change = layer.scaling * pieces["3.lora_B.default.weight"] @ A
    torch.testing.assert_close(change.norm(dim=1), (layer.weight + layer.scaling * B @ A).norm(dim=1))


def test_merged_scope_is_normalised_by_the_rows_of_the_merged_matrix():
    problem = make_problem(make_model(zero_b=True), "merged")
    direction = random_direction(problem)
    for piece, weight in zip(problem.unflatten(direction.vector), problem.variables, strict=True):
        torch.testing.assert_close(piece.norm(dim=1), weight.detach().norm(dim=1))
    assert np.ptp(landscape(problem, [direction], [[-1.0, 1.0]]).losses) > 1e-3


def test_layer_normalisation_gives_each_tensor_its_weights_norm():
    problem = make_problem(make_model())
    direction = random_direction(problem, normalisation="layer")
    for piece, weight in zip(problem.unflatten(direction.vector), problem.variables, strict=True):
        torch.testing.assert_close(piece.norm(), weight.detach().norm())


def test_l2_normalisation_has_norm_one_and_skips_nothing():
    problem = make_problem(make_model(), "model")
    direction = random_direction(problem, normalisation="l2")
    assert float(direction.vector.norm()) == pytest.approx(1.0, rel=1e-12)
    assert direction.skipped == ()
    assert bool((direction.vector != 0).all())


def test_biases_and_norms_are_skipped_and_named():
    problem = make_problem(make_model(), "model")
    direction = random_direction(problem)
    assert set(direction.skipped) == {"0.bias", "1.weight", "1.bias", "3.bias"}
    pieces = dict(zip(problem.scope.names, problem.unflatten(direction.vector), strict=True))
    assert not any(bool(pieces[name].any()) for name in direction.skipped)


class Conv1D(nn.Module):
    """As Hugging Face's: (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return x @ self.weight


def test_units_are_outputs_whichever_way_a_layer_keeps_its_matrix():
    model = nn.Sequential(nn.Linear(3, 5), Conv1D())
    model.table, model.up = nn.Embedding(7, 3), nn.ConvTranspose2d(2, 4, 3)
    batches = [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))]
    problem = Problem(model, batches, supervised_loss(nn.functional.cross_entropy), check=False)
    assert unit_axes(problem) == {
        "0.weight": 0,
        "0.bias": None,
        "1.weight": 1,
        "table.weight": 0,
        "up.weight": 1,
        "up.bias": None,
    }


def test_directions_repeat_by_seed():
    problem = make_problem(make_model())
    first, again, other = (random_direction(problem, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.vector, again.vector)
    assert not torch.equal(first.vector, other.vector)
    assert (first.seed, first.normalisation, first.label) == (3, "filter", "random direction, seed 3")


# The plane through three models


def test_plane_has_the_models_at_their_exact_coordinates():
    plane = plane_through(*torch.tensor([[1.0, 1.0, 0.0], [4.0, 5.0, 0.0], [1.0, 1.0, 2.0]]))
    np.testing.assert_allclose(plane.coordinates, [[0, 0], [5, 0], [0, 2]], atol=1e-15)
    np.testing.assert_allclose(plane.basis, [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], atol=1e-15)


def test_plane_of_float32_models_is_orthonormal_and_holds_them_in_float64():
    """float32 dot products leave coordinates off by 0.01 at this size."""
    points = [1 + 1e-3 * torch.randn(200_000) for _ in range(3)]
    plane = plane_through(*points)
    gram = plane.basis @ plane.basis.T
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    for point, (a, b) in zip(points, plane.coordinates, strict=True):
        reached = plane.origin + a * plane.basis[0] + b * plane.basis[1]
        assert float((reached - point.double()).abs().max()) < 1e-12


def test_plane_of_nearly_collinear_models_is_still_orthogonal():
    u, w = torch.randn(2, 1000, dtype=torch.float64)
    plane = plane_through(0 * u, u, 2 * u + 4e-6 * w)
    assert abs(float(plane.basis[0] @ plane.basis[1])) < 1e-14


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (torch.tensor([4.0, 4.0]), "lie on one line"),
        (torch.tensor([0.5, 0.5]), "lie on one line"),
        (torch.tensor([1.0, 1.0]), "lie on one line"),
        (torch.tensor([0.0, 0.0]), "two of them are the same point"),
        (torch.tensor([math.nan, 0.0]), "finite"),
        (torch.zeros(3), "one length"),
    ],
)
def test_three_models_without_a_plane_are_refused(third, message):
    with pytest.raises(ValueError, match=message):
        plane_through(torch.zeros(2), torch.ones(2), third)


def test_plane_landscape_evaluates_the_models_themselves():
    models = [make_model(seed=seed, dtype=torch.float32) for seed in range(3)]
    problems = [make_problem(model) for model in models]
    points = [problem.flatten(problem.variables) for problem in problems]
    result = plane_landscape(problems[0], dict(zip("abc", points, strict=True)), points=3, margin=0.5)
    assert result.mark_losses.tolist() == [problem.loss() for problem in problems]
    assert result.about["marks"] == ["a", "b", "c"]
    width = float((points[1].double() - points[0].double()).norm())
    np.testing.assert_allclose(result.marks[1], [width, 0], atol=1e-12)
    assert result.axes[0][0] < result.marks[:, 0].min() < result.marks[:, 0].max() < result.axes[0][-1]
    assert result.axes[1][0] == pytest.approx(-0.5 * result.marks[2, 1])


def test_plane_landscape_agrees_with_the_models_where_the_grid_meets_them():
    problems = [make_problem(make_model(seed=seed)) for seed in range(3)]
    points = {str(k): problem.flatten(problem.variables) for k, problem in enumerate(problems)}
    result = plane_landscape(problems[0], points, points=2, margin=0.0)
    assert result.losses[0, 0] == pytest.approx(result.mark_losses[0], rel=1e-12) or result.axes[0][0] < 0
    direct = landscape(
        problems[0],
        [Direction(vector, "", "l2") for vector in plane_through(*points.values()).basis],
        [[float(result.marks[2, 0])], [float(result.marks[2, 1])]],
    )
    assert direct.losses[0, 0] == pytest.approx(problems[2].loss(), rel=1e-12)


def test_plane_needs_three_models():
    with pytest.raises(ValueError, match="needs three models, got 2: a, b"):
        plane_landscape(make_problem(make_model()), {"a": torch.zeros(1), "b": torch.ones(1)})


# What is left behind


@pytest.mark.parametrize("scope", ["adapter", "merged", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_landscape_leaves_the_model_bit_for_bit_as_it_was(scope, dtype):
    model = make_model(dtype=dtype)
    model[3].eval()
    before = state_of(model)
    problem = make_problem(model, scope)
    landscape(problem, [random_direction(problem)], [np.linspace(-1, 1, 5)])
    assert_same_state(model, before)
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("scope", ["adapter", "merged"])
def test_an_operator_made_before_multiplies_alike_after_a_landscape(scope):
    problem = make_problem(make_model(), scope)
    operator, V = HessianOperator(problem), torch.randn(problem.size, 1, dtype=torch.float64)
    operator.matmat(V)
    before = operator.matmat(V)
    landscape(problem, [random_direction(problem)], [[0.0, 1.0]])
    assert torch.equal(operator.matmat(V), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_restored_and_cells_kept_when_a_point_raises(error, tmp_path):
    model = make_model()
    problem = make_problem(model)
    direction = random_direction(problem)
    before = state_of(model)

    def fail(done, total, line):
        if done == 3:
            raise error("stop")

    path = tmp_path / "slice.npz"
    with pytest.raises(error):
        landscape(problem, [direction], [np.linspace(-1, 1, 9)], path=path, progress=fail)
    assert_same_state(model, before)
    assert load_landscape(path).done.tolist() == [True] * 3 + [False] * 6


def test_infinite_and_nan_cells_are_kept():
    class Odd(Quadratic):
        def loss(self, x):
            return {0.0: 0.0, 1.0: math.inf, 2.0: math.nan, 3.0: -1.0}[float(x)]

    objective = Odd(torch.zeros(1).double(), None, None)
    result = landscape(objective, [Direction(torch.ones(1).double(), "d", "l2")], [[0.0, 1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(result.losses, [0.0, math.inf, math.nan, -1.0])
    assert result.done.all()


# Files and resumption


def grid_of(problem, path=None, **options):
    directions = [random_direction(problem, seed=seed) for seed in (0, 1)]
    return landscape(problem, directions, [np.linspace(-1, 1, 4), np.linspace(-1, 1, 3)], path=path, **options)


def test_file_round_trips(tmp_path):
    problem = make_problem(make_model())
    result = grid_of(problem, tmp_path / "new" / "grid.npz")
    read = load_landscape(tmp_path / "new" / "grid.npz")
    for name in ("losses", "done", "marks", "mark_losses"):
        np.testing.assert_array_equal(getattr(read, name), getattr(result, name))
    for mine, other in zip(read.axes, result.axes, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert read.about == result.about
    assert read.origin_loss == result.origin_loss
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.npz"]


def test_only_cells_that_are_not_done_are_evaluated_on_resumption(tmp_path):
    problem, path = make_problem(make_model()), tmp_path / "grid.npz"
    whole = grid_of(problem)

    def stop(done, total, line):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid_of(problem, path, progress=stop)
    steps = []
    resumed = grid_of(problem, path, progress=lambda done, total, line: steps.append((done, total)))
    assert steps == [(done, 12) for done in range(6, 13)]
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_a_loss_of_zero_is_not_taken_for_an_empty_cell(tmp_path):
    """loss-landscape marks empty cells by values <= 0 and evaluates these for ever; NaN would be no better."""

    class Counted(Quadratic):
        def loss(self, x):
            self.points.append(x)
            return [0.0, -1.0, math.nan][int(x) % 3]

    objective = Counted(torch.zeros(1).double(), None, None)
    arguments = [Direction(torch.ones(1).double(), "d", "l2")], [[0.0, 1.0, 2.0]]
    landscape(objective, *arguments, path=tmp_path / "x.npz")
    objective.points.clear()
    landscape(objective, *arguments, path=tmp_path / "x.npz")
    assert len(objective.points) == 1  # the loss at the weights, to tell whether the data are the same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: make_problem(make_model(seed=1)), "other (data or )?weights"),
        (lambda: make_problem(make_model(base_seed=1)), "other data or weights"),
        (lambda: make_problem(make_model(), "model"), "other weights, directions or grid"),
    ],
)
def test_a_file_of_another_landscape_is_refused_and_kept(change, message, tmp_path):
    path = tmp_path / "grid.npz"
    grid_of(make_problem(make_model()), path)
    content = path.read_bytes()
    with pytest.raises(UserError, match=message):
        grid_of(change(), path)
    assert path.read_bytes() == content


def test_a_file_of_other_data_is_refused(tmp_path):
    problem = make_problem(make_model())
    grid_of(problem, tmp_path / "grid.npz")
    with pytest.raises(UserError, match="other data or weights"):
        grid_of(problem.subset([0]), tmp_path / "grid.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04cut off"])
def test_a_broken_file_is_refused(content, tmp_path):
    path = tmp_path / "grid.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a landscape's file"):
        grid_of(make_problem(make_model()), path)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.npz"
    result = grid_of(make_problem(make_model()), path)
    content = path.read_bytes()

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        save_landscape(result, path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["grid.npz"]


KILLED = """
import sys, os, signal
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.flatness_lora import make_model, make_problem
from tests.flatness.test_landscape import grid_of
def kill(done, total, line):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
grid_of(make_problem(make_model()), Path({path!r}), save_seconds=0.0, progress=kill)
"""


def test_a_killed_landscape_goes_on_where_it_was(tmp_path):
    path = tmp_path / "grid.npz"
    here = Path(__file__).parents[1]
    code = KILLED.format(tests=str(here), path=str(path))
    killed = subprocess.run([sys.executable, "-c", code], cwd=here.parent, env={"PYTHONPATH": str(here.parent)})
    assert killed.returncode == -9
    assert load_landscape(path).done.sum() == 7
    problem = make_problem(make_model())
    np.testing.assert_array_equal(grid_of(problem, path).losses, grid_of(problem).losses)


# Bad arguments


def test_bad_arguments_are_refused(quadratic):
    d = Direction(torch.ones(5).double(), "d", "l2")
    for directions, axes, message in [
        ([], [], "one or two directions"),
        ([d, d, d], [[0.0]] * 3, "one or two directions"),
        ([d], [[0.0], [0.0]], "one or two directions"),
        ([d], [[]], "not empty"),
        ([d], [[0.0, math.nan]], "finite coordinates"),
        ([Direction(torch.ones(4).double(), "short", "l2")], [[0.0]], "short has shape"),
        ([Direction(torch.zeros(5).double(), "nothing", "l2")], [[0.0]], "nothing is zero or not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            landscape(quadratic, directions, axes)
    with pytest.raises(ValueError, match="must be a finite vector that is not zero"):
        given_direction(torch.zeros(3), "eigenvector 1")
    problem = make_problem(make_model(), "merged")
    with pytest.raises(ValueError, match="normalisation must be one of filter, layer, merged_rows, l2"):
        random_direction(problem, normalisation="filters")
    with pytest.raises(ValueError, match="is for scope adapter"):
        random_direction(problem, normalisation="merged_rows")


def test_a_grid_costs_little_more_than_its_forward_passes():
    """Generous here, where other processes disturb the clock; the benchmark holds the real bound."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    batches = [(torch.randn(2048, 256), torch.randint(10, (2048,)))]
    problem = Problem(model, batches, supervised_loss(nn.functional.cross_entropy))
    direction = random_direction(problem)
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        with problem.active():
            for _ in range(21):
                problem.loss()
        forward = time.perf_counter() - start
        start = time.perf_counter()
        landscape(problem, [direction], [np.linspace(-1, 1, 20)])
        ratios.append((time.perf_counter() - start) / forward)
    assert min(ratios) < 1.25

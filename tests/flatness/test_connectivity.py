"""Lines between models: closed forms, exact ends, the two lines between adapters, and models that do not fit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness import Point, Problem, landscape, plane_landscape, supervised_loss
from flatpatch.flatness.connectivity import checkpoint_point, find_barrier, linear_connectivity, model_point
from flatpatch.flatness.directions import given_direction
from flatpatch.flatness.landscape import Mark, load_landscape
from flatpatch.flatness.points import mixed_buffers
from tests.flatness_lora import assert_same_state, factors, make_model, make_problem, rescale, state_of


class Wave:
    """A loss of one weight: h sin^2(pi x) + s x."""

    def __init__(self, height, slope=0.0):
        self.origin = torch.zeros(1, dtype=torch.float64)
        self.height, self.slope = height, slope

    def loss(self, x):
        return self.height * math.sin(math.pi * float(x)) ** 2 + self.slope * float(x)


ZERO, ONE = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


# Closed forms


@pytest.mark.parametrize("slope", [0.0, 10.0])
def test_barrier_of_a_wave_is_its_height_above_the_line_between_the_ends(slope):
    result = linear_connectivity(Wave(3.0, slope), ZERO, ONE, points=25)
    assert result.barrier == pytest.approx(3.0, rel=1e-12)
    assert result.barrier_alpha == 0.5
    assert result.distance == 1.0
    if slope:
        # Above the mean of the ends the slope itself counts.
        assert result.barrier_above_mean > result.barrier + 1
    else:
        assert result.barrier_above_mean == pytest.approx(3.0, rel=1e-12)


def test_barrier_is_negative_where_the_line_lies_below_its_ends():
    """The maximum over all points, ends included, would hide it as 0."""
    alphas = np.linspace(0, 1, 5)
    barrier, alpha, above_mean = find_barrier(alphas, 4 * (alphas - 0.5) ** 2)
    assert (barrier, alpha, above_mean) == (-0.75, 0.25, -0.75)


def test_barrier_of_a_convex_loss_is_at_most_zero():
    problem = make_problem(make_model())
    first, second = torch.randn(2, problem.size, dtype=torch.float64)

    class Bowl(Wave):
        origin = torch.zeros(problem.size, dtype=torch.float64)

        def __init__(self):
            pass

        def loss(self, x):
            return float(x @ x)

    assert linear_connectivity(Bowl(), first, second).barrier <= 0


@pytest.mark.parametrize(("bad", "expected"), [(math.nan, math.nan), (math.inf, math.inf)])
def test_barrier_over_a_cell_that_is_not_finite_is_not_finite(bad, expected):
    losses = np.array([1.0, 2.0, bad, 2.0, 1.0])
    for value in (find_barrier(np.linspace(0, 1, 5), losses)[k] for k in (0, 2)):
        assert value == expected or (math.isnan(value) and math.isnan(expected))


# On models


def pair(scope="adapter", dtype=torch.float64):
    problems = [make_problem(make_model(seed=seed, dtype=dtype), scope) for seed in (1, 2)]
    return problems, [problem.flatten(problem.variables) for problem in problems]


@pytest.mark.parametrize("scope", ["adapter", "merged", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_the_models_losses_bit_for_bit(scope, dtype):
    problems, points = pair(scope, dtype)
    result = linear_connectivity(problems[0], *points, points=5)
    assert [result.losses[0], result.losses[-1]] == [problem.loss() for problem in problems]
    assert result.landscape.mark_losses.tolist() == [problem.loss() for problem in problems]


def test_midpoint_in_factor_space_has_cross_terms():
    (problem, other), points = pair()
    result = linear_connectivity(problem, *points, points=3)
    middle = make_model()
    with torch.no_grad():
        for (A, B), (A1, B1), (A2, B2) in zip(*map(factors, (middle, problem.model, other.model)), strict=True):
            A.copy_((A1 + A2) / 2)
            B.copy_((B1 + B2) / 2)
    assert result.losses[1] == pytest.approx(make_problem(middle).loss(), rel=1e-12)
    assert result.space == "factor space (A and B)"


def test_midpoint_in_merged_space_averages_the_products():
    (problem, other), points = pair("merged")
    result = linear_connectivity(problem, *points, points=3)
    middle = make_model(rank=4)
    with torch.no_grad():
        for (A, B), (A1, B1), (A2, B2) in zip(*map(factors, (middle, problem.model, other.model)), strict=True):
            A.copy_(torch.cat([A1, A2]))
            B.copy_(torch.cat([B1, B2], dim=1) / 2)
    assert result.losses[1] == pytest.approx(make_problem(middle).loss(), rel=1e-12)
    assert result.space == "merged space (W + s B A)"


def test_line_in_merged_space_does_not_depend_on_the_factors_gauge():
    lines = {}
    for scope in ("adapter", "merged"):
        lines[scope] = []
        for other in (make_model(seed=2), rescale(make_model(seed=2), [5.0, -0.5])):
            problem = make_problem(make_model(seed=1), scope)
            line = linear_connectivity(
                problem, problem.flatten(problem.variables), model_point(problem, make_problem(other, scope))
            )
            lines[scope].append(line.losses)
    np.testing.assert_allclose(*lines["merged"], rtol=1e-9)
    assert np.abs(lines["adapter"][0] - lines["adapter"][1]).max() > 1e-3


def test_reversed_line_is_the_line_reversed():
    (problem, _), points = pair()
    there, back = linear_connectivity(problem, *points), linear_connectivity(problem, *points[::-1])
    np.testing.assert_allclose(there.losses, back.losses[::-1], rtol=1e-12)
    assert there.barrier == pytest.approx(back.barrier, rel=1e-9)


@pytest.mark.parametrize("scope", ["adapter", "merged"])
def test_a_line_leaves_both_models_as_they_were(scope):
    (problem, other), points = pair(scope, torch.float32)
    before = state_of(problem.model), state_of(other.model)
    linear_connectivity(problem, *points)
    assert_same_state(problem.model, before[0])
    assert_same_state(other.model, before[1])


def test_file_says_what_was_interpolated(tmp_path):
    (problem, _), points = pair("merged")
    path = tmp_path / "line.npz"
    result = linear_connectivity(problem, *points, names=("task 1", "task 2"), path=path)
    read = load_landscape(path)
    assert read.about["kind"] == "connectivity"
    assert read.about["space"] == "merged space (W + s B A)"
    assert read.about["axes"][0]["label"] == "from task 1 to task 2"
    assert read.about["distance"] == result.distance
    np.testing.assert_array_equal(read.losses, result.losses)


def test_result_can_be_written_as_json_whatever_the_losses():
    result = linear_connectivity(Wave(math.inf), ZERO, ONE, points=3)
    written = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert written["losses"][1] is None
    assert written["barrier"] is None
    assert (written["space"], written["alphas"], written["distance"]) == ("weight space", [0, 0.5, 1], 1)


# Checkpoints as points


def adapter_state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}


@pytest.mark.parametrize("scope", ["adapter", "merged"])
def test_checkpoint_is_the_point_of_a_model_that_holds_it(scope):
    problem, other = (make_problem(make_model(seed=seed), scope) for seed in (1, 2))
    before = state_of(problem.model)
    point = checkpoint_point(problem, adapter_state(other.model))
    assert torch.equal(point, other.flatten(other.variables))
    assert torch.equal(point, model_point(problem, other))
    assert_same_state(problem.model, before)


def test_checkpoint_is_not_read_while_merged_layers_are_installed():
    """It would silently give the weights installed, whatever the checkpoint."""
    problem = make_problem(make_model(), "merged")
    with problem.active(), pytest.raises(ValueError, match="before the problem is active"):
        checkpoint_point(problem, adapter_state(make_model(seed=2)))


def test_checkpoint_with_the_same_base_is_accepted():
    problem, other = (make_problem(make_model(seed=seed)) for seed in (1, 2))
    everything = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    assert torch.equal(checkpoint_point(problem, everything), other.flatten(other.variables))


def test_checkpoint_that_does_not_fit_is_refused():
    problem = make_problem(make_model())
    good = adapter_state(problem.model)
    for state, message in [
        (adapter_state(make_model(rank=3)), "task 2 has rank 3 in 0.lora_A.default.weight, the model rank 2"),
        ({**good, "3.bias": torch.ones(3)}, "task 2 has another base: its 3.bias"),
        ({key: value for key, value in good.items() if "lora_B" not in key}, "task 2 lacks 2 of 4 tensors, such as"),
        ({}, "task 2 lacks 4 of 4"),
        ({**good, "9.weight": torch.ones(3)}, "has tensors the model has not, such as 9.weight"),
        ({**good, "0.lora_A.default.weight": torch.ones(2, 9)}, r"is \(2, 9\) in task 2 and \(2, 5\) in the model"),
        ({**good, "0.lora_A.default.weight": torch.full((2, 5), math.nan)}, "is not finite"),
    ]:
        with pytest.raises(UserError, match=message):
            checkpoint_point(problem, state, name="task 2")


def test_model_of_another_rank_is_refused_in_factor_space_and_taken_in_merged_space():
    problem, other = make_problem(make_model()), make_problem(make_model(rank=4))
    with pytest.raises(UserError, match="has rank 4 in 0.lora_A.default.weight, the model rank 2.*scope=merged"):
        model_point(problem, other)
    merged, other = problem.with_scope("merged"), other.with_scope("merged")
    point = model_point(merged, other)
    result = linear_connectivity(merged, merged.flatten(merged.variables), point, points=3)
    assert result.losses[-1] == other.loss()


@pytest.mark.parametrize("scope", ["adapter", "merged"])
def test_model_of_another_base_is_refused(scope):
    problem, other = make_problem(make_model(), scope), make_problem(make_model(base_seed=1), scope)
    with pytest.raises(UserError, match="has another base"):
        model_point(problem, other)


def test_model_over_another_scope_is_refused():
    with pytest.raises(UserError, match="scope merged, the first model 4 of scope adapter"):
        model_point(make_problem(make_model()), make_problem(make_model(), "merged"))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="points must be at least 3, got 2"):
        linear_connectivity(Wave(1.0), ZERO, ONE, points=2)
    with pytest.raises(ValueError, match="the models have shapes"):
        linear_connectivity(Wave(1.0), ZERO, torch.ones(2))


# Models with buffers


def normed(seed, dtype=torch.float64):
    """A network with running statistics, of data that differ from seed to seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)
    for _ in range(5 + seed):
        model(seed + (1 + seed) * torch.randn(20, 4, dtype=dtype))
    return model


def normed_problem(seed, dtype=torch.float64, scope="model"):
    generator = torch.Generator().manual_seed(9)
    batches = [(torch.randn(n, 4, generator=generator).to(dtype), torch.arange(n) % 3) for n in (7, 5)]
    return Problem(normed(seed, dtype), batches, supervised_loss(nn.functional.cross_entropy), scope=scope)


def own(problem):
    return problem.flatten(problem.variables, torch.float64)


def buffers_of(problem):
    return {name: buffer.clone() for name, buffer in problem.model.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["model", "state"])
def test_both_ends_of_a_line_have_their_own_losses_with_running_statistics(dtype, how):
    first, second = normed_problem(1, dtype), normed_problem(2, dtype)
    before = state_of(first.model), buffers_of(first)
    point = model_point(first, second) if how == "model" else checkpoint_point(first, second.model.state_dict())
    line = linear_connectivity(first, own(first), point, points=5)
    assert [line.losses[0], line.losses[-1]] == [first.loss(), second.loss()]
    assert line.landscape.mark_losses.tolist() == [first.loss(), second.loss()]
    assert line.moved_buffers == ("1.running_mean", "1.running_var", "3.running_mean", "3.running_var")
    assert line.landscape.about["moved_buffers"] == list(line.moved_buffers)
    assert line.space == "weight space, with the buffers that differ"
    assert json.loads(json.dumps(line.as_dict()))["moved_buffers"] == list(line.moved_buffers)
    back = linear_connectivity(first, point, own(first), points=5)
    np.testing.assert_allclose(back.losses, line.losses[::-1], rtol=1e-6)
    assert_same_state(first.model, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in first.model.named_buffers())


def test_midpoint_of_a_line_has_the_mean_of_the_statistics():
    first, second = normed_problem(1), normed_problem(2)
    line = linear_connectivity(first, own(first), model_point(first, second), points=3)
    middle = normed_problem(3)
    states = [problem.model.state_dict() for problem in (first, second)]
    middle.model.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    assert line.losses[1] == pytest.approx(middle.loss(), rel=1e-12)


def test_plane_through_models_with_running_statistics_holds_their_own_losses():
    problems = [normed_problem(seed) for seed in (1, 2, 3)]
    points = [own(problems[0]), *(model_point(problems[0], other) for other in problems[1:])]
    result = plane_landscape(problems[0], dict(zip("abc", points, strict=True)), points=7, margin=2.0)
    assert result.mark_losses.tolist() == [problem.loss() for problem in problems]
    # Far beyond the models a variance would be negative if it went on in a straight line.
    assert np.isfinite(result.losses).all()
    assert all(torch.equal(b, problems[0].model.state_dict()[name]) for name, b in problems[0].model.named_buffers())


def test_buffers_are_means_between_points_and_stay_in_their_range_beyond():
    first, *others = (normed_problem(seed) for seed in (1, 2, 3))
    points = [Point(own(first), {}), *(model_point(first, other) for other in others)]
    mix = mixed_buffers(first, points)
    name = "1.running_var"
    values = torch.stack([problem.model.state_dict()[name] for problem in (first, *others)])
    torch.testing.assert_close(mix((0.2, 0.3, 0.5))[name], 0.2 * values[0] + 0.3 * values[1] + 0.5 * values[2])
    assert torch.equal(mix((0.0, 0.0, 1.0))[name], values[2])
    beyond = mix((9.0, -4.0, -4.0))[name]
    assert (9 * values[0] - 4 * values[1] - 4 * values[2] < 0).any()
    assert (beyond >= values.amin(dim=0)).all() and (beyond <= values.amax(dim=0)).all()


def test_landscape_around_another_model_has_its_statistics_and_marks_have_their_own():
    first, second = normed_problem(1), normed_problem(2)
    point = model_point(first, second)
    direction = given_direction(torch.ones(first.size), "ones")
    marks = [Mark("here", (9.0,), own(first)), Mark("there", (0.0,), point)]
    result = landscape(first, [direction], [[0.0, 1.0]], origin=point, marks=marks)
    assert result.losses[0] == second.loss()
    assert result.mark_losses.tolist() == [first.loss(), second.loss()]
    around = landscape(second, [direction], [[0.0, 1.0]])
    np.testing.assert_allclose(result.losses, around.losses, rtol=1e-12)


def test_a_vector_whose_running_statistics_are_not_known_is_refused():
    first, second = normed_problem(1), normed_problem(2)
    vector, direction = own(second), given_direction(torch.ones(first.size), "ones")
    message = "other weights than the model's.*1.running_mean and 3 more.*model_point or checkpoint_point"
    with pytest.raises(UserError, match=f"second is a vector of {message}"):
        linear_connectivity(first, own(first), vector)
    with pytest.raises(UserError, match=message):
        plane_landscape(first, {"a": own(first), "b": vector, "c": 2 * vector})
    with pytest.raises(UserError, match=f"the origin is a vector of {message}"):
        landscape(first, [direction], [[0.0]], origin=vector)
    with pytest.raises(UserError, match=f"x is a vector of {message}"):
        landscape(first, [direction], [[0.0]], marks=[Mark("x", (0.0,), vector)])
    kept = linear_connectivity(first, own(first), Point(vector, {}), points=3)
    assert kept.moved_buffers == ()


@pytest.mark.parametrize(("name", "size", "has"), [("1.running_maen", 6, "none"), ("1.running_mean", 7, r"\(6,\)")])
def test_a_point_with_buffers_that_the_model_has_not_is_refused(name, size, has):
    first = normed_problem(1)
    point = Point(own(first), {name: torch.zeros(size, dtype=torch.float64)})
    with pytest.raises(UserError, match=rf"second has a buffer {name} of shape \({size},\), and the model has {has}"):
        linear_connectivity(first, own(first), point)


def test_a_file_of_other_statistics_is_refused(tmp_path):
    first, second = normed_problem(1), normed_problem(2)
    point = model_point(first, second)
    linear_connectivity(first, own(first), point, points=3, path=tmp_path / "line.npz")
    changed = Point(point.weights, {**point.buffers, "1.running_mean": point.buffers["1.running_mean"] + 1})
    with pytest.raises(UserError, match="another landscape|landscape of other"):
        linear_connectivity(first, own(first), changed, points=3, path=tmp_path / "line.npz")


def test_a_models_own_state_is_its_own_point():
    problem = normed_problem(1)
    point = checkpoint_point(problem, problem.model.state_dict())
    assert torch.equal(point, own(problem))
    counted = problem.model.state_dict()
    counted["1.num_batches_tracked"] = torch.tensor(77)  # of no influence
    assert torch.equal(checkpoint_point(problem, counted), own(problem))


class Table(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x):
        return self.layer(x)[:, self.order]


def test_a_buffer_that_differs_and_cannot_be_moved_is_refused_by_name():
    loss = supervised_loss(nn.functional.cross_entropy)
    batches = [(torch.randn(4, 4, dtype=torch.float64), torch.arange(4) % 3)]
    first, second = (Problem(Table(order), batches, loss) for order in ([0, 1, 2], [2, 1, 0]))
    with pytest.raises(UserError, match="the buffer order of the other model is not the model's.*it is of int64"):
        model_point(first, second)
    with pytest.raises(UserError, match="the buffer order of task 2 is not the model's"):
        checkpoint_point(first, second.model.state_dict(), name="task 2")
    second.model.order = torch.zeros(2, dtype=torch.long)
    with pytest.raises(UserError, match=r"the buffer order is \(2,\) in the other model and \(3,\) in the model"):
        model_point(first, second)
    one, other = normed_problem(1), normed_problem(2)
    other.model[1].running_var[0] = math.nan
    with pytest.raises(UserError, match="the buffer 1.running_var of the other model.*not finite"):
        model_point(one, other)


def tied(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    return model


def test_a_checkpoint_may_name_a_tied_tensor_by_any_of_its_names():
    batches = [(torch.randn(4, 4, dtype=torch.float64), torch.arange(4) % 3)]
    problem, other = (Problem(tied(seed), batches, supervised_loss(nn.functional.cross_entropy)) for seed in (1, 2))
    state = other.model.state_dict()
    assert list(state) == ["0.weight", "2.weight"]
    for names in (["0.weight"], ["2.weight"], ["0.weight", "2.weight"]):
        point = checkpoint_point(problem, {name: state[name] for name in names})
        assert torch.equal(point, own(other))
    with pytest.raises(UserError, match="has two values of 0.weight, the other as 2.weight"):
        checkpoint_point(problem, {"0.weight": state["0.weight"], "2.weight": state["0.weight"] + 1})


def test_a_checkpoint_of_a_compiled_or_parallel_model_is_read():
    problem, other = normed_problem(1), normed_problem(2)
    state = nn.DataParallel(torch.compile(other.model)).state_dict()
    assert list(state)[0] == "module._orig_mod.0.weight"
    point = checkpoint_point(problem, state)
    assert linear_connectivity(problem, own(problem), point, points=3).losses[-1] == other.loss()

"""Lines between models: closed forms, exact ends, the two lines between adapters, and models that do not fit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flatness_lora import assert_same_state, factors, make_model, make_problem, rescale, state_of

from flatpatch.errors import UserError
from flatpatch.flatness.connectivity import checkpoint_point, find_barrier, linear_connectivity, model_point
from flatpatch.flatness.landscape import load_landscape


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

"""Finite differences: how good they are, that they know it, and what they say about kinks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatpatch.flatness import (
    HessianOperator,
    Problem,
    batch_eigenvalues,
    hutch_plus_plus,
    hutchinson,
    lanczos,
    power_iteration,
    quadrature,
    supervised_loss,
    xtrace,
)
from flatpatch.flatness.differences import kinks, loss_nodes
from flatpatch.flatness.problem import graph_nodes
from tests.flatness_cases import TinyTransformer, dense_hessian, mlp, quadratic_problem, rows, token_batches, token_loss

CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def trained(activation: Callable[[], nn.Module], rate: float = 1e-2) -> Problem:
    """A float32 network 20-64-64-5 after 20 steps of Adam on its 64 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 5))
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Problem(model, [(x, y)], CROSS_ENTROPY)


def exact(problem: Problem) -> HessianOperator:
    """The same problem's Hessian by autograd in float64, without the kinks, as autograd takes it."""
    model = nn.Sequential(
        *(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in problem.model)
    )
    model.load_state_dict(problem.model.state_dict())
    batches = [(x.double(), y) for x, y in problem.batches]
    return HessianOperator(Problem(model.double(), batches, CROSS_ENTROPY))


def differences(problem: Problem) -> HessianOperator:
    return HessianOperator(problem, mode="finite-difference")


@pytest.mark.filterwarnings("ignore:the loss has kinks")
@pytest.mark.parametrize("search", [lanczos, power_iteration])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_top_eigenvalue_by_differences_is_autograds_and_its_residual_holds(
    activation: Any, search: Any, rate: float
) -> None:
    problem = trained(activation, rate)
    truth = exact(problem)
    expected = float(lanczos(truth, 1, tol=1e-6).values)
    found = search(differences(problem), 1, max_products=60)
    assert float(found.values) == pytest.approx(expected, rel=1e-3)
    x = found.vectors.double()
    residual = float((truth.matmat(x) - x * found.values).norm())
    assert residual <= float(found.residuals + found.errors)
    assert not bool(found.converged) or residual <= 1e-3 * expected


@pytest.mark.filterwarnings("ignore:the loss has kinks")
def test_nothing_is_converged_beyond_the_error_of_the_differences() -> None:
    found = lanczos(differences(trained(nn.ReLU)), 2, tol=1e-5, max_products=30)
    assert not found.converged.any()
    assert bool((found.errors > 1e-5 * found.values.abs()).all())
    assert found.as_dict()["errors"] == found.errors.tolist()


@pytest.mark.filterwarnings("ignore:the loss has kinks")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_estimated_error_is_at_least_the_true_one_and_of_its_size(activation: Any) -> None:
    problem = trained(activation)
    operator, truth = differences(problem), exact(problem)
    V = torch.randn(problem.size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    V[:, 0] = truth.matvec(V[:, 0])  # much more curved than the others
    error = (operator.matmat(V) - truth.matmat(V)).norm(dim=0)
    assert operator.errors is not None
    estimate = operator.errors.norm(dim=0)
    assert bool((error <= estimate).all())
    assert bool((estimate <= 20 * error).all())


def test_autograds_products_have_no_estimated_error() -> None:
    operator = HessianOperator(trained(nn.Tanh))
    found = lanczos(operator, 1)
    assert operator.errors is None
    assert not found.errors.any()
    assert bool(found.converged)


def test_products_by_differences_do_not_depend_on_those_before() -> None:
    """Or an interrupted search could not end like an undisturbed one."""
    problem = trained(nn.Tanh)
    V = torch.randn(problem.size, 2, dtype=torch.float64)
    used, fresh = differences(problem), differences(problem)
    used.matmat(V[:, :1])
    assert torch.equal(used.matmat(V)[:, 1], fresh.matvec(V[:, 1]))


def test_differences_in_float64_match_the_dense_hessian_to_eight_digits() -> None:
    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    operator = differences(problem)
    H = operator.matmat(torch.eye(problem.size, dtype=torch.float64))
    assert float((H - dense_hessian(problem)).norm() / H.norm()) < 1e-8
    assert operator.errors is not None
    assert float(operator.errors.norm() / H.norm()) < 1e-6


def test_steps_that_the_number_format_swallows_do_not_count_as_agreement() -> None:
    """Beside a weight of 1e4, float32 keeps no step below 1e-3; all smaller ones agree on zero."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4], [2e4]]))
    x = torch.ones(1, 1)
    problem = Problem(model, [(x, torch.zeros(1, 2))], lambda m, b: (m(b[0]) / 1e4).cosh().sum() * 1e8)
    product = differences(problem).matvec(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(product[0]) == pytest.approx(float(torch.tensor(1.0).cosh()), rel=1e-2)


def test_a_float64_model_that_computes_in_float32_gets_float32s_steps() -> None:
    """Smaller ones are lost in its rounding, so that they agree on zero."""
    model = mlp()
    problem = Problem(
        model, rows(4, 4, 2), lambda m, b: F.cross_entropy(m[3](torch.tanh(m[0](b[0]).float()).double()), b[1])
    )
    assert HessianOperator(problem).disagreement_with_differences() < 3e-3


def test_traces_and_densities_carry_the_error_of_the_products() -> None:
    problem = trained(nn.Tanh)
    operator = differences(problem)
    truth = exact(problem)
    for estimate in (hutchinson, hutch_plus_plus, xtrace):
        options: dict[str, Any] = {"num_probes": 3} if estimate is hutchinson else {"num_products": 9}
        found, right = estimate(operator, **options), estimate(truth, **options)
        # An estimate, no bound: on another processor, which rounds float32 otherwise, it fell short by a quarter.
        assert 0 < abs(found.value - right.value) <= 2 * found.error < 0.1 * abs(right.value)
        assert right.error == 0
        assert found.as_dict()["error"] == found.error
    nodes = quadrature(operator, num_probes=1, num_steps=6)
    assert 0 < abs(float(nodes.nodes.max() - quadrature(truth, num_probes=1, num_steps=6).nodes.max())) <= nodes.error
    assert nodes.as_dict()["error"] == nodes.error


def test_eigenvalues_of_batches_by_differences_tell_their_errors() -> None:
    (x, y), model = trained(nn.Tanh).batches[0], trained(nn.Tanh).model
    problem = Problem(model, [(x[:40], y[:40]), (x[40:], y[40:])], CROSS_ENTROPY)
    found = batch_eigenvalues(problem, mode="finite-difference", restarts=0, max_products=60)
    right = batch_eigenvalues(problem, restarts=0, max_products=60, tol=1e-5)
    assert bool(((found.values - right.values).abs() <= found.residuals + found.errors).all())
    assert bool((found.errors > 0).all()) and not right.errors.any()
    assert found.as_dict()["errors"] == found.errors.tolist()


def test_a_trace_does_not_stop_on_a_standard_error_below_that_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.flatness.trace.form_errors", lambda operator, V: [1.0] * V.shape[1])
    operator = HessianOperator(quadratic_problem([1.0] * 9))  # whose samples have no spread
    assert hutchinson(operator, num_probes=12, tol=0.1).products == 12
    assert hutchinson(operator, num_probes=12, tol=0.12).products == 8


def test_kinks_are_named_in_a_warning_and_smooth_losses_have_none() -> None:
    problem = trained(nn.ReLU)
    with problem.active():
        assert kinks(loss_nodes(problem)) == ["Relu"]
    weights = torch.randn(3, 4, requires_grad=True)
    for kinked in (torch.amin, torch.amax, torch.min, torch.median, lambda w: w.topk(1).values, lambda w: w.sort()[0]):
        assert kinks(graph_nodes([kinked(weights)])), kinked
    with pytest.warns(UserWarning, match=r"the loss has kinks \(Relu\).*differences count those"):
        differences(problem).matvec(torch.ones(problem.size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differences(trained(nn.Tanh)).matvec(torch.ones(problem.size))


@pytest.mark.parametrize(("activation", "dtype"), [(nn.Tanh, torch.float64), (nn.GELU, torch.float32)])
def test_steps_that_the_activations_swallow_do_not_count_as_agreement(activation: Any, dtype: torch.dtype) -> None:
    """With weights of 1e-3 the smallest steps are whole, and nothing beside numbers near one in the softmax."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(4, (32,))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    V = torch.randn(212, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    operator = differences(Problem(model.to(dtype), [(x.to(dtype), y)], CROSS_ENTROPY))
    found = operator.matmat(V)
    truth = HessianOperator(Problem(model.double(), [(x, y)], CROSS_ENTROPY)).matmat(V)
    error = (found - truth).norm(dim=0)
    assert operator.errors is not None
    assert bool((error <= operator.errors.norm(dim=0)).all())
    assert bool((error <= 1e-3 * truth.norm(dim=0)).all())


def test_a_gradient_that_does_not_change_has_products_of_zero_without_error() -> None:
    problem = Problem(nn.Linear(5, 1), [(torch.randn(9, 5), torch.zeros(9))], lambda m, b: m(b[0]).mean())
    operator = differences(problem)
    assert not operator.matvec(torch.ones(6, dtype=torch.float64)).any()
    assert operator.errors is not None and not operator.errors.any()


@pytest.mark.filterwarnings("ignore:the loss has kinks")
def test_an_error_that_nothing_bounds_is_reported_as_large() -> None:
    """A kink at the very weights: no step is short enough, and no two agree."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    problem = Problem(model, [(torch.ones(1, 1), torch.ones(1, 1))], lambda m, b: m(b[0]).abs().sum(), check=False)
    operator = differences(problem)
    product = operator.matvec(torch.ones(1, dtype=torch.float64))
    assert operator.errors is not None
    assert float(operator.errors.abs()) >= abs(float(product))
    assert not bool(lanczos(operator, 1, max_products=3).converged)


@pytest.mark.filterwarnings("ignore:the loss has kinks")
def test_autograd_and_differences_agree_on_a_small_float32_t5() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    tokens, labels = torch.randint(1, 64, (8, 12)), torch.randint(1, 64, (8, 6))
    operator = HessianOperator(Problem(model, [{"input_ids": tokens, "labels": labels}]))
    assert operator.disagreement_with_differences() < 0.02


def test_differences_of_a_tiny_network_match_its_dense_hessian_in_float32() -> None:
    problem = Problem(mlp().float(), [(x.float(), y) for x, y in rows(4, 4, 2)], CROSS_ENTROPY)
    dense = dense_hessian(Problem(mlp(), rows(4, 4, 2), CROSS_ENTROPY))
    error = differences(problem).matvec(torch.ones(problem.size)) - dense.sum(dim=1)
    assert float(error.norm() / dense.sum(dim=1).norm()) < 1e-3


def test_step_is_chosen_for_the_coarsest_format_that_the_loss_goes_through() -> None:
    """w1^2 / 2 in float64 and exp(w2) in float32: H = diag(1, exp(w2)), of which small steps would miss the second."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

        def forward(self) -> torch.Tensor:
            return self.w[0] ** 2 / 2 + self.w[1].float().exp().double()

    problem = Problem(Mixed(), [None], lambda model, _: model(), terms=lambda _: 1)
    product = HessianOperator(problem, mode="finite-difference").matmat(torch.ones(2, 1, dtype=torch.float64))
    assert product[:, 0].tolist() == pytest.approx([1.0, math.exp(0.5)], rel=1e-3)

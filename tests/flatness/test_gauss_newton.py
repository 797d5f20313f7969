"""Gauss-Newton and Fisher matrices beside closed forms and dense sums over single terms."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    Problem,
    supervised_loss,
)
from tests.flatness_cases import TinyTransformer, all_products, joined, mlp, rows, token_batches, token_loss
from tests.flatness_lora import assert_same_state, make_model, make_problem, state_of

CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def jacobian(problem: Problem, outputs: Tensor) -> Tensor:
    """Of each output, row by row: (outputs, n)."""
    found = [
        torch.cat([g.flatten() for g in torch.autograd.grad(each, problem.variables, retain_graph=True)])
        for each in outputs.flatten()
    ]
    return torch.stack(found)


# --- closed forms


def test_of_logistic_regression_all_but_the_empirical_are_the_hessian() -> None:
    """Outputs linear in the weights have no curvature of their own."""
    model, batches = nn.Linear(4, 3).double(), rows(5, 3, 1)
    problem = Problem(model, batches, CROSS_ENTROPY)
    expected = all_products(HessianOperator(problem))
    for operator in (GaussNewtonOperator(problem), FisherOperator(problem, memory_budget=0)):
        torch.testing.assert_close(all_products(operator), expected, rtol=1e-12, atol=1e-14)
    x, y = joined(batches)[0]
    p = torch.softmax(model(x), dim=1).detach()
    r = p - F.one_hot(y, 3)
    gradients = torch.cat([(r[:, :, None] * x[:, None, :]).flatten(1), r], dim=1)
    empirical = gradients.T @ gradients / len(x)
    torch.testing.assert_close(all_products(EmpiricalFisherOperator(problem)), empirical, rtol=1e-12, atol=1e-14)


def test_of_linear_regression_they_are_the_closed_forms() -> None:
    x, _ = joined(rows(5, 3))[0]
    y = torch.randn(8, 2, dtype=torch.float64)
    model = nn.Linear(4, 2, bias=False).double()
    problem = Problem(model, [(x[:5], y[:5]), (x[5:], y[5:])], supervised_loss(F.mse_loss))
    expected = torch.kron(torch.eye(2, dtype=torch.float64), 2 * x.T @ x / 16)
    for operator in (GaussNewtonOperator(problem), FisherOperator(problem)):
        torch.testing.assert_close(all_products(operator), expected, rtol=1e-12, atol=1e-14)
    residual = (model(x) - y).detach()  # of a row's mean squared error the gradient is 2 / 2 times it
    gradients = (residual[:, :, None] * x[:, None, :]).flatten(1)
    empirical = gradients.T @ gradients / 8
    torch.testing.assert_close(all_products(EmpiricalFisherOperator(problem)), empirical, rtol=1e-12, atol=1e-14)


def test_graphs_are_kept_within_the_memory_budget_and_products_are_the_same() -> None:
    problem = Problem(nn.Linear(4, 3).double(), rows(5, 3, 1), CROSS_ENTROPY)
    operator = GaussNewtonOperator(problem)
    expected, whole = all_products(operator), operator.kept_bytes
    for budget in (whole, whole - 1, 0):
        limited = GaussNewtonOperator(problem, memory_budget=budget)
        for _ in range(2):
            torch.testing.assert_close(all_products(limited), expected, rtol=0, atol=0)
        assert limited.kept_bytes == whole if budget == whole else limited.kept_bytes <= budget
        assert (limited.kept_bytes > 0) == (budget > 0)


# --- dense references


@pytest.mark.parametrize("scope", ["adapter", "tangent"])
def test_of_a_network_they_are_sums_over_its_terms(scope: str) -> None:
    problem = make_problem(make_model(), scope)
    with problem.active(), torch.set_grad_enabled(True):
        x, y = joined(problem.batches)[0]
        z = problem.model(x)
        J = jacobian(problem, z).reshape(len(x), 3, -1)
    p = torch.softmax(z.detach(), dim=1)
    C = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("tcn,tcd,tdm->nm", J, C, J) / len(x)
    gradients = torch.einsum("tcn,tc->tn", J, p - F.one_hot(y, 3))
    expected = {
        GaussNewtonOperator: fisher,
        FisherOperator: fisher,
        EmpiricalFisherOperator: gradients.T @ gradients / len(x),
    }
    for kind, dense in expected.items():
        torch.testing.assert_close(all_products(kind(problem)), dense, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(all_products(HessianOperator(problem)), fisher, rtol=0.1)


def test_ignored_labels_count_for_nothing_and_tokens_as_terms() -> None:
    model = TinyTransformer(lora=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    problem = Problem(model, token_batches(2, 1), token_loss, scope="adapter")
    fisher, gradients, count = torch.zeros(problem.size, problem.size, dtype=torch.float64), [], 0
    with problem.active(), torch.set_grad_enabled(True):
        for batch in problem.batches:
            z, y = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
            for t in (y != -100).nonzero().flatten().tolist():
                J, p = jacobian(problem, z[t]), torch.softmax(z[t].detach(), dim=0)
                fisher += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
                gradients.append(J.T @ (p - F.one_hot(y[t], len(p))))
                count += 1
    empirical = sum(torch.outer(g, g) for g in gradients)
    for kind, dense in ((GaussNewtonOperator, fisher), (FisherOperator, fisher), (EmpiricalFisherOperator, empirical)):
        torch.testing.assert_close(all_products(kind(problem)), dense / count, rtol=1e-9, atol=1e-12)


@pytest.mark.oracle
def test_they_equal_those_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, batches = mlp().eval(), rows(4, 4, 2)
    problem = Problem(model, batches, CROSS_ENTROPY)
    V = torch.randn(problem.size, 3, dtype=torch.float64)
    for ours, theirs in ((GaussNewtonOperator, "GGNLinearOperator"), (EmpiricalFisherOperator, "EFLinearOperator")):
        peer = getattr(curvlinops, theirs)(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
        torch.testing.assert_close(ours(problem).matmat(V), peer @ V, rtol=1e-9, atol=1e-12)


# --- what a loss may be


def test_smoothed_and_weighted_losses_have_their_own_gauss_newton_matrix() -> None:
    """By the outputs smoothing adds a linear term alone; weights count as they do in the mean."""
    model, batches = nn.Linear(4, 3).double(), rows(6)
    plain = all_products(GaussNewtonOperator(Problem(model, batches, CROSS_ENTROPY)))
    smoothed = Problem(model, batches, supervised_loss(functools.partial(F.cross_entropy, label_smoothing=0.3)))
    for operator in (GaussNewtonOperator(smoothed), FisherOperator(smoothed)):
        torch.testing.assert_close(all_products(operator), plain, rtol=1e-12, atol=1e-14)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    weighted = Problem(model, batches, supervised_loss(functools.partial(F.cross_entropy, weight=weights)))
    expected = all_products(HessianOperator(weighted))
    torch.testing.assert_close(all_products(GaussNewtonOperator(weighted)), expected, rtol=1e-12, atol=1e-14)
    for kind in (FisherOperator, EmpiricalFisherOperator):
        with pytest.raises(UserError, match="plain mean over its terms, without class weights"):
            all_products(kind(weighted))


def test_a_factor_before_the_loss_is_in_gauss_newton_and_refused_of_fisher() -> None:
    """A distribution has no such factor: Fisher's would leave it out, and the empirical one square it."""
    model, batches = nn.Linear(4, 3).double(), rows(6)
    plain, tripled = (
        Problem(model, batches, lambda m, b, c=c: c * CROSS_ENTROPY(m, b), terms=lambda batch: len(batch[1]))
        for c in (1, 3)
    )
    once, thrice = (all_products(GaussNewtonOperator(problem)) for problem in (plain, tripled))
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=1e-14)
    for kind in (FisherOperator, EmpiricalFisherOperator):
        all_products(kind(plain))
        with pytest.raises(UserError, match="as by a factor before it"):
            all_products(kind(tripled))


def penalised(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + model.weight.square().sum()


def of_its_own(model: nn.Module, batch: Any) -> Tensor:
    return -torch.log_softmax(model(batch[0]), dim=1)[torch.arange(len(batch[1])), batch[1]].mean()


@pytest.mark.parametrize(
    ("loss", "words"), [(penalised, "comes another way, as from a penalty"), (of_its_own, "batch 0's computes 0")]
)
def test_a_loss_that_is_not_one_of_outputs_is_refused(loss: Any, words: str) -> None:
    problem = Problem(nn.Linear(4, 3).double(), rows(4), loss, terms=lambda batch: len(batch[1]), check=False)
    with pytest.raises(UserError, match=words):
        GaussNewtonOperator(problem).matmat(torch.ones(problem.size, 1, dtype=torch.float64))


def test_a_vector_of_another_length_is_refused_and_the_model_left_as_it_was() -> None:
    model = make_model()
    operator, before = GaussNewtonOperator(make_problem(model)), state_of(model)
    with pytest.raises(ValueError, match="V must have shape"):
        operator.matmat(torch.ones(3, 1))
    operator.matmat(torch.ones(operator.size, 2, dtype=torch.float64))
    assert operator.products == 2
    assert_same_state(model, before)

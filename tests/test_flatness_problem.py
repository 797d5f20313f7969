"""The loss that is measured: weighted by loss terms, repeatable, and without a trace on the caller's model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flatness_cases import TinyTransformer, joined, mlp, quadratic_problem, rows, token_batches, token_loss
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness import Problem, count_terms, model_loss, supervised_loss

CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def test_loss_of_uneven_batches_equals_that_of_one_batch() -> None:
    batches = rows(4, 4, 2)
    model = mlp().eval()
    (x, y), *_ = joined(batches)
    problem = Problem(model, batches, CROSS_ENTROPY)
    assert problem.loss() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-14)
    loss, gradient = problem.loss_and_gradient()
    F.cross_entropy(model(x), y).backward()
    assert loss == pytest.approx(problem.loss(), rel=1e-14)
    torch.testing.assert_close(gradient, problem.flatten([p.grad for p in model.parameters()]))


def test_batches_weigh_as_many_terms_as_labels_are_not_ignored() -> None:
    batches = token_batches(3, 1, 2)
    model = TinyTransformer(lora=False)
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    problem = Problem(model, batches, token_loss)
    assert problem.num_terms == [int((batch["labels"] != -100).sum()) for batch in batches]
    assert problem.num_terms[0] != 3 * problem.num_terms[1]
    assert sum(problem.weights) == pytest.approx(1)
    assert problem.loss() == pytest.approx(Problem(model, [together], token_loss).loss(), rel=1e-14)


@pytest.mark.parametrize(
    ("batch", "terms"),
    [
        ({"labels": torch.tensor([[1, -100], [2, 3]])}, 3),
        ((torch.zeros(4, 2), torch.tensor([0, 1, 2, -100])), 3),
        ([torch.zeros(4, 2), torch.zeros(4, 3)], 12),
    ],
)
def test_terms_are_counted_from_the_labels(batch: object, terms: int) -> None:
    assert count_terms(batch) == terms


@pytest.mark.parametrize("batch", [torch.zeros(3), {"input_ids": torch.zeros(3)}, [], "text", (1, 2)])
def test_terms_of_a_batch_without_labels_are_an_error_that_names_the_argument(batch: object) -> None:
    with pytest.raises(UserError, match="Pass terms="):
        count_terms(batch)


def test_model_and_generators_are_as_before_after_every_call() -> None:
    model = mlp()
    model[0].eval()  # a mixture of modes, as fine-tuning often has
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    modes = [module.training for module in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    torch.backends.cuda.matmul.allow_tf32 = True

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        for draw in (torch.rand, np.random.rand, lambda n: [random.random()]):
            draw(1)
        return CROSS_ENTROPY(model, batch)

    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for scope in ("trainable", "model"):
        problem = Problem(model, rows(3, 2), loss, scope=scope)
        problem.loss_and_gradient()
        with pytest.raises(ZeroDivisionError), problem.active():
            raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def test_dropout_that_evaluation_does_not_switch_off_is_an_error_that_names_it() -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(F.dropout(model(batch[0])), batch[1])

    with pytest.raises(UserError, match=r"losses [\d.]+ and [\d.]+.*dropout, augmentation and shuffling"):
        Problem(mlp(), rows(6), loss)


def test_what_a_shuffling_loader_yields_once_is_the_sample() -> None:
    x, y = joined(rows(7))[0]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3, shuffle=True)
    problem = Problem(mlp(), loader, CROSS_ENTROPY)
    assert problem.num_terms == [3, 3, 1]
    assert problem.loss() == problem.loss()


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = mlp()
    model[3].bias.data[0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan"):
        Problem(model, rows(3), CROSS_ENTROPY)


def test_an_empty_sample_is_an_error() -> None:
    with pytest.raises(UserError, match="the sample is empty"):
        Problem(mlp(), [], CROSS_ENTROPY)


def test_a_batch_whose_labels_are_all_ignored_is_an_error_that_names_it() -> None:
    batches = rows(3, 2)
    batches[1][1].fill_(-100)
    with pytest.raises(UserError, match="batch 1 has 0 loss terms"):
        Problem(mlp(), batches, CROSS_ENTROPY)


@pytest.mark.parametrize("reduction", ["none", None])
def test_a_loss_that_is_not_one_number_is_an_error(reduction: str | None) -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> object:
        return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction) if reduction else 1.0

    with pytest.raises(UserError, match="batch 0 is not one number"):
        Problem(mlp(), rows(3), loss)


def test_batch_loss_outside_active_is_refused() -> None:
    problem = quadratic_problem([1.0, 2.0])
    with pytest.raises(ValueError, match="inside problem.active"):
        problem.batch_loss(0)


def test_flatten_and_unflatten_are_inverse() -> None:
    problem = Problem(mlp(), rows(3), CROSS_ENTROPY)
    v = torch.randn(2, problem.size, dtype=torch.float64)
    pieces = problem.unflatten(v)
    assert [piece.shape[1:] for piece in pieces] == [variable.shape for variable in problem.variables]
    assert torch.equal(problem.flatten([piece[1] for piece in pieces]), v[1])


def test_subset_and_another_scope_share_the_loss() -> None:
    model = mlp()
    batches = rows(4, 2)
    problem = Problem(model, batches, CROSS_ENTROPY)
    parts = [problem.subset([index]).loss() for index in (0, 1)]
    assert problem.loss() == pytest.approx((4 * parts[0] + 2 * parts[1]) / 6, rel=1e-14)
    model[0].weight.requires_grad_(False)
    assert problem.with_scope("trainable").size < problem.with_scope("model").size == problem.size


def test_hugging_face_t5_is_measured_by_its_own_loss() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double()
    tokens = torch.randint(1, 12, (5, 4))
    labels = torch.randint(1, 12, (5, 3))
    labels[2:, 1:] = -100
    batches = [{"input_ids": tokens[i], "labels": labels[i]} for i in (slice(0, 2), slice(2, 5))]
    problem = Problem(model, batches)
    assert problem.num_terms == [6, 3]
    whole = model_loss(model.eval(), {"input_ids": tokens, "labels": labels}).item()
    assert problem.loss() == pytest.approx(whole, rel=1e-12)
    # The embedding serves encoder, decoder and head, and is one variable.
    assert sum("shared" in name or "embed_tokens" in name or "lm_head" in name for name in problem.scope.names) == 1

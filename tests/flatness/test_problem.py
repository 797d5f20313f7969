"""The loss that is measured: weighted by loss terms, repeatable, and without a trace on the caller's model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness import HessianOperator, Problem, count_terms, model_loss, supervised_loss
from tests.flatness_cases import (
    TinyTransformer,
    all_products,
    dense_hessian,
    joined,
    mlp,
    quadratic_problem,
    rows,
    token_batches,
    token_loss,
)

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


# --- models that other code has made ready for training


def all_numbers(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], scope: str = "model") -> object:
    """Loss, gradient and Hessian, of which the first two are also taken once more after the last."""
    problem = Problem(model, batches, CROSS_ENTROPY, scope=scope)
    return problem.loss(), problem.loss_and_gradient()[1], all_products(HessianOperator(problem, compile=False))


def compiled_inside() -> nn.Module:
    model = mlp()
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(mlp(), backend="aot_eager"),
        compiled_inside,
        compiled_in_place,
        lambda: nn.DataParallel(mlp()),
        lambda: nn.DataParallel(torch.compile(mlp(), backend="aot_eager")),
        lambda: torch.jit.script(mlp().eval()),
    ],
)
def test_wrapped_and_compiled_models_have_the_numbers_of_the_plain_one(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model = make()
    for found, expected in zip(all_numbers(model, rows(4, 3)), all_numbers(mlp(), rows(4, 3)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    x, y = rows(4)[0]
    F.cross_entropy(model(x), y).backward()  # and train on as before
    if isinstance(model, nn.DataParallel):
        assert Problem(model, rows(4), CROSS_ENTROPY).scope.names[0] == "0.weight"


def test_a_compiled_criterion_is_differentiated_twice() -> None:
    torch._dynamo.reset()
    criterion = torch.compile(lambda logits, targets: F.cross_entropy(logits, targets), backend="aot_eager")
    operator = HessianOperator(Problem(mlp(), rows(4), supervised_loss(criterion)), compile=False)
    expected = HessianOperator(Problem(mlp(), rows(4), CROSS_ENTROPY), compile=False)
    torch.testing.assert_close(all_products(operator), all_products(expected))


def distributed() -> Iterator[nn.Module]:
    from torch.nn.parallel import DistributedDataParallel

    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            yield DistributedDataParallel(mlp())
        finally:
            torch.distributed.destroy_process_group()


def test_a_distributed_model_has_the_numbers_of_the_one_inside() -> None:
    for model in distributed():
        for found, expected in zip(all_numbers(model, rows(4, 3)), all_numbers(mlp(), rows(4, 3)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def embedded(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4, **options), nn.Flatten(1), nn.Linear(8, 3)).double()


TOKENS = [(torch.tensor([[0, 1], [1, 1], [2, 4], [0, 1]]), torch.tensor([0, 1, 2, 0]))]


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_embeddings_have_the_curvature_of_the_loss_whatever_their_gradients_are(option: str) -> None:
    model = embedded(**{option: True})
    plain = all_numbers(embedded(), TOKENS)
    for found, expected in zip(all_numbers(model, TOKENS), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    problem = Problem(model, TOKENS, CROSS_ENTROPY)
    assert problem.scope.names[0] == "0.weight"
    torch.testing.assert_close(plain[2], dense_hessian(Problem(embedded(), TOKENS, CROSS_ENTROPY)))
    assert getattr(model[0], option) is True
    if option == "sparse":
        F.cross_entropy(model(TOKENS[0][0]), TOKENS[0][1]).backward()
        assert model[0].weight.grad.is_sparse


def test_a_sparse_gradient_of_a_function_is_dense_once_and_refused_twice() -> None:
    class Looked(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.inner, self.sparse = embedded(), sparse

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = F.embedding(x, self.inner[0].weight, sparse=self.sparse)
            return self.inner[2](found.flatten(1))

    problem, plain = (Problem(Looked(sparse), TOKENS, CROSS_ENTROPY) for sparse in (True, False))
    torch.testing.assert_close(problem.loss_and_gradient()[1], plain.loss_and_gradient()[1])
    with pytest.raises(UserError, match="the gradient of a weight is sparse.*sparse=False.*finite-difference"):
        all_products(HessianOperator(problem))
    differences = all_products(HessianOperator(problem, mode="finite-difference"))
    torch.testing.assert_close(differences, all_products(HessianOperator(plain)), rtol=1e-5, atol=1e-7)


def test_an_embedding_whose_forward_pass_changes_its_weights_is_refused_unchanged() -> None:
    model = embedded(max_norm=0.1)
    before = model[0].weight.detach().clone()
    with pytest.raises(UserError, match="0 has max_norm=0.1, by which a forward pass changes its weights"):
        Problem(model, TOKENS, CROSS_ENTROPY)
    assert torch.equal(model[0].weight, before)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.lora_A = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.lora_A) @ self.lora_A).abs() + self.real


@pytest.mark.parametrize("scope", ["trainable", "model", "adapter"])
def test_complex_weights_are_refused_by_name(scope: str) -> None:
    with pytest.raises(UserError, match=f"scope={scope}: lora_A is complex.*view_as_real"):
        Problem(Complex(), rows(3), CROSS_ENTROPY, scope=scope)


def test_complex_weights_that_do_not_vary_are_no_hindrance() -> None:
    model = Complex()
    model.lora_A.requires_grad_(False)
    problem = Problem(model, rows(3), CROSS_ENTROPY)
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense_hessian(problem))


def test_weights_without_values_are_refused_by_name() -> None:
    model = mlp()
    model[3] = nn.Linear(5, 3, device="meta", dtype=torch.float64)
    with pytest.raises(UserError, match="3.weight is on the meta device and has no values. Load the weights"):
        Problem(model, rows(3), CROSS_ENTROPY)


def test_weights_of_which_a_process_has_a_part_are_refused_by_name() -> None:
    for model in distributed():
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        inner = model.module
        inner[3].weight = nn.Parameter(distribute_tensor(inner[3].weight.detach(), mesh))
        with pytest.raises(UserError, match="3.weight is partitioned over processes"):
            Problem(inner, rows(3), CROSS_ENTROPY)
    zero3 = mlp()
    zero3[0].weight.ds_tensor = zero3[0].weight.data.clone()  # as DeepSpeed leaves it
    zero3[0].weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(UserError, match="0.weight is partitioned over processes"):
        Problem(zero3, rows(3), CROSS_ENTROPY)


def test_a_weight_that_is_not_finite_is_named_whether_the_loss_shows_it_or_not() -> None:
    model = mlp()
    model[3].bias.data[0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan and 3.bias is not finite"):
        Problem(model, rows(3), CROSS_ENTROPY)
    model = mlp()
    model.unused = nn.Parameter(torch.full((2,), float("inf"), dtype=torch.float64))
    with pytest.raises(UserError, match="unused is not finite, although the loss is"):
        Problem(model, rows(3), lambda m, b: F.cross_entropy(m[3](m[1](m[0](b[0]))), b[1]))


def test_a_loss_without_gradients_is_refused() -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(UserError, match="depends on none of the 4 tensors of scope=trainable.*no_grad, detach"):
        Problem(mlp(), rows(3), loss)


def test_reentrant_checkpoints_are_refused_with_what_to_write_instead() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(reentrant: bool) -> Callable[..., torch.Tensor]:
        def compute(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            x = batch[0].detach().requires_grad_()
            return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), batch[1])

        return compute

    with pytest.raises(UserError, match="reentrant checkpoints.*use_reentrant=False"):
        Problem(mlp(), rows(3), loss(True)).loss_and_gradient()
    plain = Problem(mlp(), rows(3), CROSS_ENTROPY)
    torch.testing.assert_close(
        all_products(HessianOperator(Problem(mlp(), rows(3), loss(False)))), all_products(HessianOperator(plain))
    )

"""The scope tangent beside closed forms, dense spaces in float64 and what must not depend on the factors' writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    HessianOperator,
    Problem,
    ball_sharpness,
    checkpoint_point,
    find_scope,
    hutchinson,
    keskar_sharpness,
    supervised_loss,
)
from flatpatch.flatness.tangent import tangent_space
from tests.flatness.test_scope import (
    CROSS_ENTROPY,
    Encoder,
    TaskAttention,
    adapted,
    after_two_tasks,
    cllora_transformer,
    randomised,
)
from tests.flatness_cases import LoRALinear, all_products, import_file, import_folder, rows
from tests.flatness_lora import assert_same_state, factors, make_model, make_problem, state_of


def spectrum(problem: Problem) -> Tensor:
    return torch.linalg.eigvalsh(all_products(HessianOperator(problem)))


def dense_tangent(pairs: list[tuple[Tensor, Tensor, bool, bool]]) -> Tensor:
    """An orthonormal basis, as columns, of the changes of row-major vec(M) by pairs (B, A, B varies, A varies)."""
    columns = []
    for B, A, varies_b, varies_a in pairs:
        if varies_a:  # vec(B dA) = (B kron I) vec(dA)
            columns.append(torch.kron(B.contiguous(), torch.eye(A.shape[1], dtype=B.dtype)))
        if varies_b:  # vec(dB A) = (I kron A') vec(dB)
            columns.append(torch.kron(torch.eye(len(B), dtype=B.dtype), A.T.contiguous()))
    left, sizes, _ = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)
    return left[:, sizes > 1e-9 * sizes.max()]


def check_against_merged(model: nn.Module, problems: dict[str, Problem], bases: list[Tensor]) -> None:
    """The tangent spectrum is that of the merged Hessian between the bases; each may be in its own coordinates."""
    P = torch.block_diag(*bases).detach()
    dense = P.T @ all_products(HessianOperator(problems["merged"])) @ P
    assert problems["tangent"].size == P.shape[1]
    torch.testing.assert_close(spectrum(problems["tangent"]), torch.linalg.eigvalsh(dense), rtol=1e-9, atol=1e-11)
    assert problems["tangent"].loss() == pytest.approx(problems["merged"].loss(), rel=1e-13)


def both(model: nn.Module, batches: Any) -> dict[str, Problem]:
    return {scope: Problem(model, batches, CROSS_ENTROPY, scope=scope) for scope in ("merged", "tangent")}


# --- closed forms


def regression(B: Tensor, A: Tensor, X: Tensor) -> Problem:
    """1 / (N out) |M x - y|^2 over N examples, so that the Hessian by row-major M is I kron 2 X'X / (N out)."""
    model = LoRALinear(A.shape[1], len(B), r=len(A), bias=False).double()
    with torch.no_grad():
        model.lora_A["default"].weight.copy_(A)
        model.lora_B["default"].weight.copy_(B)
    return Problem(
        model, [(X, torch.ones(len(X), len(B), dtype=X.dtype))], supervised_loss(F.mse_loss), scope="tangent"
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_loss_equally_curved_in_all_directions_is_so_in_the_tangent_space() -> None:
    r, n, out = 2, 5, 4
    X = torch.linalg.qr(random(6, n)).Q
    problem = regression(random(out, r), random(r, n, seed=1), X)
    assert problem.size == r * (n + out - r)
    expected = torch.full((problem.size,), 2 / (6 * out), dtype=torch.float64)
    torch.testing.assert_close(spectrum(problem), expected, rtol=1e-12, atol=0)


def test_before_training_only_b_moves_and_the_spectrum_is_that_of_the_inputs_seen_through_a() -> None:
    """B = 0: T = {dB A}, in which the Hessian is I kron V' C V with C = 2 X'X / (N out) and V spanning A's rows."""
    r, n, out = 2, 5, 4
    A, X = random(r, n, seed=1), random(6, n)
    problem = regression(torch.zeros(out, r, dtype=torch.float64), A, X)
    V = torch.linalg.qr(A.T).Q
    expected = torch.linalg.eigvalsh(V.T @ (2 * X.T @ X / (6 * out)) @ V).repeat_interleave(out)
    torch.testing.assert_close(spectrum(problem), expected, rtol=1e-11, atol=0)


def test_coordinates_are_orthonormal_and_reach_all_of_the_space() -> None:
    B, A = random(7, 3), random(3, 5, seed=1)
    space = tangent_space([B], [A], (7, 5), B)
    X, N = random(3, 5, seed=2), random(4, 3, seed=3)
    element = space.matrix(X, N)
    assert float(element.norm()) == pytest.approx(float((X.norm() ** 2 + N.norm() ** 2).sqrt()), rel=1e-13)
    for found, given in zip(space.coordinates(element), (X, N), strict=True):
        torch.testing.assert_close(found, given, rtol=0, atol=1e-13)
    change = B @ random(3, 5, seed=4) + random(7, 3, seed=5) @ A
    torch.testing.assert_close(space.matrix(*space.coordinates(change)), change, rtol=0, atol=1e-12)
    outside = random(7, 5, seed=6)
    rest = outside - space.matrix(*space.coordinates(outside))
    assert float(rest.norm()) > 0.1
    assert float((rest * change).sum().abs()) < 1e-12


# --- dense references


@pytest.mark.parametrize("case", ["generic", "zero b", "zero a", "deficient", "frozen a", "frozen b"])
def test_spectrum_is_that_of_the_merged_hessian_in_the_directions_of_the_factors(case: str) -> None:
    model = make_model(seed=3, zero_b=case == "zero b")
    with torch.no_grad():
        for A, B in factors(model):
            if case == "zero a":
                A.zero_()
            if case == "deficient":
                B[:, 1] = 2 * B[:, 0]
                A[1] = -A[0]
            A.requires_grad_(case != "frozen a")
            B.requires_grad_(case != "frozen b")
    problems = {scope: make_problem(model, scope) for scope in ("merged", "tangent")}
    bases = [dense_tangent([(B, A, B.requires_grad, A.requires_grad)]) for A, B in factors(model)]
    check_against_merged(model, problems, bases)


def test_factors_that_no_forward_pass_uses_move_nothing() -> None:
    """InfLoRA's code marks factors of tasks to come as trainable; A is frozen."""
    model = after_two_tasks(TaskAttention())
    bases = []
    for name in "kv":
        A, B = (getattr(model.attention, f"lora_{factor}_{name}") for factor in "AB")
        B[2].weight.requires_grad_(True)
        bases.append(dense_tangent([(B[1].weight, A[1].weight, True, False)]))
    check_against_merged(model, both(model, rows(4, 3)), bases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_keep_all_their_directions_in_long_matrices(dtype: torch.dtype) -> None:
    """Their own precision times the side is over 1: every singular value would count as zero."""
    draw = torch.Generator().manual_seed(0)
    B, A = torch.randn(2000, 2, generator=draw).to(dtype), torch.randn(2, 1500, generator=draw).to(dtype)
    B = torch.cat([B, B[:, :1]], dim=1)  # a duplicate counts once
    space = tangent_space([B], [A], (2000, 1500), torch.zeros(1))
    assert space.U.shape == (2000, 2) and space.V.shape == (1500, 2)


def test_pairs_of_several_tasks_span_the_sum_of_their_spaces() -> None:
    model = after_two_tasks(TaskAttention())
    for name in "kv":
        for factor in "AB":
            getattr(model.attention, f"lora_{factor}_{name}")[0].weight.requires_grad_(True)
    bases = []
    for name in "kv":
        A, B = ([each.weight for each in getattr(model.attention, f"lora_{factor}_{name}")] for factor in "AB")
        bases.append(dense_tangent([(B[0], A[0], True, True), (B[1], A[1], True, False)]))
    check_against_merged(model, both(model, rows(4, 3)), bases)


def test_factors_named_the_other_way_round_move_the_matrices_they_are_in() -> None:
    """As in CL-LoRA, where A is the one next to the output, weighted, and shared adapters have theirs frozen."""
    model = adapted()
    problems = both(model, rows(4, 3))
    bases = []
    for name in problems["merged"].scope.names:
        up, down = sorted(problems["merged"].scope.factors[name], key=lambda factor: factor.shape[0], reverse=True)
        bases.append(dense_tangent([(up, down, up.requires_grad, down.requires_grad)]))
    check_against_merged(model, problems, bases)


# --- what does not depend on how the factors are written


def rewritten(model: nn.Module, seed: int) -> nn.Module:
    """A -> G A, B -> B G^-1 with random G, in place."""
    with torch.no_grad():
        for index, (A, B) in enumerate(factors(model)):
            G = random(len(A), len(A), seed=seed + index) + 2 * torch.eye(len(A), dtype=A.dtype)
            A.copy_(G @ A)
            B.copy_(B @ torch.linalg.inv(G))
    return model


def test_nothing_measured_depends_on_how_the_factors_are_written() -> None:
    """Not even the coordinates do, so that boxes, probes and random starts are the same."""
    found = []
    for model in (make_model(), rewritten(make_model(), 5)):
        problem = make_problem(model, "tangent")
        keskar, ball = keskar_sharpness(problem, ascent_steps=2), ball_sharpness(problem, 0.1, ascent_steps=2)
        trace = hutchinson(HessianOperator(problem), num_probes=3).value
        found.append((all_products(HessianOperator(problem)), keskar.phi, keskar.phi_lower_bound, ball.ascent, trace))
    (dense, *numbers), (other, *others) = found
    torch.testing.assert_close(other, dense, rtol=1e-9, atol=1e-10)
    assert others == pytest.approx(numbers, rel=1e-6)
    adapter = [keskar_sharpness(make_problem(m)).phi for m in (make_model(), rewritten(make_model(), 5))]
    assert adapter[0] != pytest.approx(adapter[1], rel=0.01)


def test_the_ball_is_that_of_the_matrices_norm() -> None:
    problem = make_problem(make_model(), "tangent")
    moved: Any = [each for layer in problem.scope.merged for each in layer._moved.values()]  # type: ignore[attr-defined]
    step = problem.loss_and_gradient()[1]
    with torch.no_grad():
        assert all(torch.equal(each.now(), each.matrix) for each in moved)
        for variable, piece in zip(problem.variables, problem.unflatten(0.3 * step / step.norm()), strict=True):
            variable.add_(piece)
        change = torch.cat([(each.now() - each.matrix).flatten() for each in moved])
    assert float(change.norm()) == pytest.approx(0.3, rel=1e-12)


def test_the_model_is_as_before_bit_for_bit() -> None:
    model = make_model()
    before = state_of(model)
    problem = make_problem(model, "tangent")
    HessianOperator(problem).matvec(torch.ones(problem.size, dtype=torch.float64))
    keskar_sharpness(problem, ascent_steps=1)
    assert_same_state(model, before)


# --- bad input


def test_a_model_without_directions_is_refused() -> None:
    with pytest.raises(UserError, match="scope=tangent needs LoRA layers"):
        find_scope(nn.Linear(2, 2), "tangent")
    model = make_model()
    with torch.no_grad():
        for A, B in factors(model):
            A.zero_()
            B.zero_()
    with pytest.raises(UserError, match="scope=tangent has no direction: of the 4 LoRA factors of 2 layers 4 are"):
        find_scope(model, "tangent")
    with pytest.raises(UserError, match="0 are trainable"):
        find_scope(make_model().requires_grad_(False), "tangent")


def test_a_checkpoint_is_no_point_of_a_tangent_space() -> None:
    model = make_model()
    with pytest.raises(UserError, match="scope=tangent has no lines between models"):
        checkpoint_point(make_problem(model, "tangent"), model.state_dict())


# --- the authors' own layers


@pytest.mark.third_party
@pytest.mark.parametrize("repository", ["N-LoRA", "InfLoRA", "CL-LoRA"])
def test_upstreams_layers_move_in_the_directions_of_their_factors(
    repository: str, upstream: Callable[[str], Path]
) -> None:
    checkout = upstream(repository)
    pairs = {}
    if repository == "N-LoRA":
        vendored = import_folder(checkout / "src" / "peft", "nlora_peft")
        config = vendored.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q", "v"], r_sum=3)
        model = randomised(vendored.get_peft_model(Encoder(), config)).double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("loranew_" in name)  # as its run script does
        batches = rows(4, 3)
        for name, layer in ((name, model.get_submodule(f"base_model.model.{name}")) for name in "qv"):
            A, B = layer.loranew_A["default"].weight, layer.loranew_B["default"].weight
            pairs[f"base_model.model.{name}.merged"] = (B, A, True, True)
    elif repository == "InfLoRA":
        module = import_file(checkout / "models" / "vit_inflora.py", "inflora_vit")
        model = after_two_tasks(module.Attention_LoRA(4, num_heads=2, r=2, n_tasks=3))
        batches = rows(4, 3)
        for name in "kv":
            A, B = (getattr(model.attention, f"lora_{factor}_{name}")[1].weight for factor in "AB")
            pairs[f"attention.{name}.merged"] = (B, A, True, False)  # A is fixed
    else:
        model, batches = cllora_transformer(checkout)
        for block in range(2):
            for index, name in ((0, "q"), (2, "v")):
                adapter = model.cur_adapter[block][index]
                pair = (adapter.lora_A.weight, adapter.lora_B.weight, True, True)  # A is the one next to the output
                pairs[f"blocks.{block}.attn.{name}_proj.merged"] = pair
    problems = both(model, batches)
    check_against_merged(model, problems, [dense_tangent([pairs[name]]) for name in problems["merged"].scope.names])

"""Products with the Hessian, in order of trust: closed forms, dense Hessians, differences, invariances.

Comparing autograd with autograd alone would hide a mistake that both make, so closed forms and differences of the
gradient stand beside the dense Hessians.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    HessianOperator,
    MatrixOperator,
    Problem,
    compiled,
    hutchinson,
    lanczos,
    quadrature,
    supervised_loss,
)
from tests.flatness_cases import (
    SPECTRA,
    Quadratic,
    TinyTransformer,
    all_products,
    dense_hessian,
    joined,
    mlp,
    quadratic_problem,
    rows,
    symmetric,
    token_batches,
    token_loss,
)

CROSS_ENTROPY = supervised_loss(F.cross_entropy)

WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "rebuilt": {"memory_budget": 0},
    "batched": {"vectors_per_pass": 7},
    "batched and rebuilt": {"vectors_per_pass": 3, "memory_budget": 0},
}


# --- closed forms


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_hessian_of_a_quadratic_is_its_matrix(spectrum: str) -> None:
    operator = HessianOperator(quadratic_problem(SPECTRA[spectrum]))
    torch.testing.assert_close(all_products(operator), symmetric(SPECTRA[spectrum]), rtol=1e-12, atol=1e-12)


def test_hessian_of_linear_regression_is_its_closed_form() -> None:
    x, _ = joined(rows(5, 3, 2))[0]
    targets = torch.randn(10, 2, dtype=torch.float64)
    batches = list(zip(x.split([5, 3, 2]), targets.split([5, 3, 2]), strict=True))
    problem = Problem(nn.Linear(4, 2, bias=False).double(), batches, supervised_loss(F.mse_loss))
    expected = torch.kron(torch.eye(2, dtype=torch.float64), 2 * x.T @ x / 20)  # the mean is over 10 x 2 entries
    torch.testing.assert_close(all_products(HessianOperator(problem)), expected, rtol=1e-13, atol=1e-14)


def test_hessian_of_logistic_regression_is_its_closed_form() -> None:
    x, y = joined(rows(6, 3, classes=2))[0]
    targets = y.double().unsqueeze(1)
    model = nn.Linear(4, 1, bias=False).double()
    batches = list(zip(x.split([6, 3]), targets.split([6, 3]), strict=True))
    problem = Problem(model, batches, supervised_loss(F.binary_cross_entropy_with_logits))
    p = torch.sigmoid(model(x)).detach()
    torch.testing.assert_close(all_products(HessianOperator(problem)), (x * p * (1 - p)).T @ x / 9)


def test_hessian_of_softmax_regression_is_its_closed_form() -> None:
    batches = rows(4, 4, 2)
    x, _ = joined(batches)[0]
    model = nn.Linear(4, 3, bias=False).double()
    p = torch.softmax(model(x), dim=1).detach()
    blocks = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("ncd,ni,nj->cidj", blocks, x, x).reshape(12, 12) / len(x)
    torch.testing.assert_close(all_products(HessianOperator(Problem(model, batches, CROSS_ENTROPY))), expected)


# --- dense Hessians


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["mlp", "transformer"])
def test_products_match_the_dense_hessian(case: str, way: str) -> None:
    if case == "mlp":
        problem = Problem(mlp(), rows(4, 4, 2), CROSS_ENTROPY)
    else:
        problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    operator = HessianOperator(problem, **WAYS[way])
    torch.testing.assert_close(all_products(operator), dense_hessian(problem), rtol=1e-9, atol=1e-12)
    assert operator.products == operator.size


@pytest.mark.parametrize("case", ["mlp", "transformer"])
def test_finite_differences_match_the_dense_hessian(case: str) -> None:
    if case == "mlp":
        problem = Problem(mlp(), rows(4, 4, 2), CROSS_ENTROPY)
    else:
        problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    operator = HessianOperator(problem, mode="finite-difference")
    # Steps of cbrt(eps) leave errors of about eps^(2/3) = 4e-11 times derivatives of third order.
    torch.testing.assert_close(all_products(operator), dense_hessian(problem), rtol=1e-5, atol=1e-6)


def test_float32_products_match_the_dense_hessian() -> None:
    problem = Problem(mlp(), rows(4, 4, 2), CROSS_ENTROPY)
    dense = dense_hessian(problem)
    model = mlp().float()
    single = Problem(model, [(x.float(), y) for x, y in rows(4, 4, 2)], CROSS_ENTROPY)
    operator = HessianOperator(single)
    assert operator.dtype == torch.float32
    products = all_products(operator)
    assert products.dtype == torch.float64
    torch.testing.assert_close(products, dense, rtol=1e-4, atol=1e-6)
    by_differences = HessianOperator(single, mode="finite-difference").matvec(torch.ones(single.size))
    error = (by_differences - dense.sum(dim=1)).norm() / dense.sum(dim=1).norm()
    assert error < 3e-3  # as stated in the docstring: about 1e-3


# --- invariances


def test_hvp_on_uneven_batches_equals_one_batch() -> None:
    v = torch.randn(43, dtype=torch.float64)
    apart, together = (
        HessianOperator(Problem(mlp(), b, CROSS_ENTROPY)) for b in (rows(4, 4, 2), joined(rows(4, 4, 2)))
    )
    torch.testing.assert_close(apart.matvec(v), together.matvec(v), rtol=1e-13, atol=1e-15)


def test_hvp_on_tokens_weighs_labels_not_rows() -> None:
    batches = token_batches(3, 1, 2)
    together = [{key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}]
    model = TinyTransformer(lora=True)
    one, other = (HessianOperator(Problem(model, b, token_loss, scope="adapter")) for b in (batches, together))
    torch.testing.assert_close(all_products(one), all_products(other), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_operator_is_symmetric_and_linear(way: str) -> None:
    operator = HessianOperator(Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss), **WAYS[way])
    V = torch.randn(operator.size, 3, dtype=torch.float64)
    u, v, w = operator.matmat(V).T
    assert float(V[:, 0] @ v) == pytest.approx(float(V[:, 1] @ u), rel=1e-10)
    torch.testing.assert_close(operator.matvec(2 * V[:, 0] - 3 * V[:, 2]), 2 * u - 3 * w, rtol=1e-9, atol=1e-12)


def test_order_of_the_parameters_does_not_matter() -> None:
    class TwoLayers(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(4, 4).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    first, second = TwoLayers("ab"), TwoLayers("ba")
    second.load_state_dict(first.state_dict())
    one, other = (Problem(model, rows(5), CROSS_ENTROPY) for model in (first, second))
    assert one.scope.names != other.scope.names
    places = dict(zip(other.scope.names, torch.arange(other.size).split(other.scope.sizes), strict=True))
    order = torch.cat([places[name] for name in one.scope.names])
    H = all_products(HessianOperator(other))[order][:, order]
    torch.testing.assert_close(all_products(HessianOperator(one)), H, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_scaled_loss_has_scaled_products(scale: float) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return scale * CROSS_ENTROPY(model, batch)

    v = torch.randn(43, dtype=torch.float64)
    plain, scaled = (HessianOperator(Problem(mlp(), rows(5), f)).matvec(v) for f in (CROSS_ENTROPY, loss))
    torch.testing.assert_close(scaled, scale * plain, rtol=1e-12, atol=0)


# --- memory


def counting(problem_loss: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        return problem_loss(model, batch)

    return loss, calls


def test_kept_graphs_are_built_once_and_others_at_every_product() -> None:
    loss, calls = counting(CROSS_ENTROPY)
    problem = Problem(mlp(), rows(4, 4, 2), loss, check=False)
    for budget, expected in ((None, 3), (0, 15)):
        calls[0] = 0
        operator = HessianOperator(problem, memory_budget=budget)
        for _ in range(5):
            operator.matvec(torch.ones(operator.size))
        assert calls[0] == expected
        assert operator.kept_batches == (3 if budget is None else 0)


def test_several_vectors_share_one_graph_also_when_it_is_not_kept() -> None:
    loss, calls = counting(CROSS_ENTROPY)
    operator = HessianOperator(Problem(mlp(), rows(4, 4), loss, check=False), memory_budget=0)
    operator.matmat(torch.randn(operator.size, 6))
    assert calls[0] == 2


def test_as_many_graphs_are_kept_as_the_budget_allows() -> None:
    problem = Problem(mlp(), rows(40, 40, 40, 40), CROSS_ENTROPY)
    full = HessianOperator(problem)
    expected = all_products(full)
    each = full.kept_bytes // 4
    # A gradient's graph holds at least the batch's inputs and activations once: 40 x (4 + 5 + 5 + 3) doubles.
    assert each > 40 * 17 * 8
    operator = HessianOperator(problem, memory_budget=int(2.5 * each))
    assert torch.equal(all_products(operator), expected)
    assert operator.kept_batches == 2
    assert operator.kept_bytes <= 2.5 * each
    small = HessianOperator(problem, memory_budget=each // 2)
    assert torch.equal(all_products(small), expected)
    assert small.kept_batches == 0
    operator.release()
    assert (operator.kept_batches, operator.kept_bytes) == (0, 0)
    assert torch.equal(all_products(operator), expected)


@pytest.mark.parametrize("budget", [None, 0])
def test_a_graph_that_is_not_kept_is_neither_measured_nor_held_after_use(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, retained = [], []
    grad, measure = torch.autograd.grad, torch.autograd.graph.saved_tensors_hooks

    def recording(*arguments: Any, **options: Any) -> Any:
        if "retain_graph" in options:
            retained.append(options["retain_graph"])
        return grad(*arguments, **options)

    def measuring(*arguments: Any) -> Any:
        hooks.append(arguments)
        return measure(*arguments)

    operator = HessianOperator(Problem(mlp(), rows(4, 4), CROSS_ENTROPY), memory_budget=budget)
    monkeypatch.setattr(torch.autograd, "grad", recording)
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", measuring)
    operator.matmat(torch.randn(operator.size, 2))
    if budget is None:
        assert len(hooks) == 2
        assert retained == [True] * 4
    else:
        assert not hooks
        assert retained == [True, False] * 2  # the second of two vectors is the last that needs the graph


def test_weights_do_not_count_as_memory_of_a_graph() -> None:
    big = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 3)).double()
    operator = HessianOperator(Problem(big, rows(1), CROSS_ENTROPY))
    operator.matvec(torch.ones(operator.size))
    # Gradients of the size of the weights may be held, the weights themselves are there anyway.
    assert operator.kept_bytes < 8 * operator.size + 20 * 1000 * 8


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_CODE", {})
    monkeypatch.setattr(compiled, "_COMPILED", set())


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_products_match_the_dense_hessian_and_are_compiled_once_per_shape() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    transformer = Problem(TinyTransformer(lora=False), token_batches(2, 2), token_loss)
    perceptron = Problem(mlp(), rows(4, 2, 4), CROSS_ENTROPY)
    for problem, batches, shapes in ((transformer, 2, 1), (perceptron, 3, 2)):
        operator = HessianOperator(problem, compile=True)
        expected = dense_hessian(problem)
        for _ in range(2):  # the first product is the plain one
            torch.testing.assert_close(all_products(operator), expected, rtol=1e-9, atol=1e-12)
        assert operator.kept_batches == len(operator._compiled) == batches
        assert operator._compiler is not None
        assert operator._compiler.compiled == shapes
        assert operator.compile_seconds > 0
        next(operator.problem.model.parameters()).data += 1
        with pytest.raises(ValueError, match="weights have changed"):
            operator.matvec(torch.ones(operator.size))


@pytest.mark.usefixtures("nothing_compiled")
def test_compiling_that_fails_is_an_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    operator = HessianOperator(Problem(mlp(), rows(4), CROSS_ENTROPY), compile=True)
    with pytest.raises(UserError, match=r"RuntimeError: no compiler here\). Set compile=False"):
        operator.matvec(torch.ones(operator.size))


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_code_that_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda code, inputs: lambda v, *rest: 1.001 * code(v, *rest))
    operator = HessianOperator(Problem(mlp(), rows(4), CROSS_ENTROPY), compile=True)
    with pytest.raises(UserError, match="gives other products"):
        operator.matvec(torch.ones(operator.size))


@pytest.mark.usefixtures("nothing_compiled")
def test_recorded_operations_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of compiling but the compiler."""
    monkeypatch.setattr(torch._inductor, "compile", lambda code, inputs: code)
    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1, 2), token_loss)
    operator = HessianOperator(problem, compile=True)
    expected = dense_hessian(problem)
    for _ in range(2):
        torch.testing.assert_close(all_products(operator), expected, rtol=1e-9, atol=1e-12)
    assert operator._compiler is not None
    assert operator._compiler.compiled == 2
    assert not operator._graphs


def slow_operator(monkeypatch: pytest.MonkeyPatch, **options: Any) -> HessianOperator:
    """An operator whose products seem to take half a minute, and a compiler that hands back what was recorded."""
    monkeypatch.setattr(torch._inductor, "compile", lambda code, inputs: code)
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(f"flatpatch.flatness.operator.time.{clock}", iter(range(0, 10**9, 30)).__next__)
    return HessianOperator(Problem(mlp(), rows(4, 4, 2), CROSS_ENTROPY), **options)


@pytest.mark.usefixtures("nothing_compiled")
def test_products_are_compiled_when_those_to_come_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = slow_operator(monkeypatch)
    found = quadrature(operator, num_probes=2, num_steps=10)
    assert len(operator._compiled) == 3
    assert found.compile_seconds == operator.compile_seconds == 3 * 30
    assert hutchinson(operator, num_probes=2).compile_seconds == 0
    expected = dense_hessian(operator.problem)
    torch.testing.assert_close(all_products(operator), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("options", [{"compile": False}, {"memory_budget": 0}, {"vectors_per_pass": 2}])
def test_products_are_not_compiled_where_it_is_refused_or_impossible(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    operator = slow_operator(monkeypatch, **options)
    assert quadrature(operator, num_probes=2, num_steps=10).compile_seconds == operator.compile_seconds == 0
    assert not operator._compiled


@pytest.mark.usefixtures("nothing_compiled")
def test_products_are_not_compiled_for_few_or_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = slow_operator(monkeypatch)
    # The first product builds the graphs and the second is timed. One is left: 12 s of its 30 do not pay.
    hutchinson(operator, num_probes=3)
    assert operator._seconds > 0
    assert not operator._compiled
    monkeypatch.undo()
    operator = HessianOperator(Problem(mlp(), rows(4), CROSS_ENTROPY))
    quadrature(operator, num_probes=4, num_steps=20)
    assert not operator._compiled


@pytest.mark.usefixtures("nothing_compiled")
def test_compiling_that_fails_unasked_is_a_warning_and_the_products_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = slow_operator(monkeypatch)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    operator.plan(1000)
    with pytest.warns(UserWarning, match="no compiler here.*Going on without"):
        for _ in range(3):  # the first builds the graphs, the second is timed
            products = all_products(operator)
    torch.testing.assert_close(products, dense_hessian(operator.problem), rtol=1e-9, atol=1e-12)
    assert not operator._compiled
    assert operator.kept_batches == 3


@pytest.mark.usefixtures("nothing_compiled")
def test_expected_gain_counts_every_shape_once_and_code_that_is_there_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, other = (100, 4, 43), (100, 2, 43)
    once = compiled.expected_gain(0.0, 10, [graph])
    again = compiled.expected_gain(0.0, 10, [graph, graph]) - once
    assert once < again < 0
    assert compiled.expected_gain(0.0, 10, [graph, other]) == pytest.approx(2 * once)
    compiled._COMPILED.add(graph)
    assert compiled.expected_gain(0.0, 10, [graph]) == pytest.approx(again)
    assert compiled.expected_gain(2.0, 10, [graph]) == pytest.approx(again + 8)


def test_an_operation_that_cannot_be_batched_is_done_vector_by_vector() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            assert isinstance(g.sum().item(), float)  # .item() is refused inside a batched backward pass
            return 2 * ctx.saved_tensors[0] * g

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return Square.apply(model(batch[0])).mean()

    problem = Problem(mlp(), rows(4), loss)
    operator = HessianOperator(problem, vectors_per_pass=4)
    torch.testing.assert_close(all_products(operator), all_products(HessianOperator(problem)))


# --- stale weights


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9


def change_through_data(model: nn.Module) -> None:
    model[3].bias.data[1] += 1e-9


def change_by_assignment(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * 2


def change_a_frozen_weight(model: nn.Module) -> None:
    model[0].bias.data[2] -= 1


@pytest.mark.parametrize("change", [change_in_place, change_through_data, change_by_assignment, change_a_frozen_weight])
@pytest.mark.parametrize("budget", [None, 0])
def test_changed_weights_are_noticed(change: Callable[[nn.Module], None], budget: int | None) -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    operator = HessianOperator(Problem(model, rows(4), CROSS_ENTROPY), memory_budget=budget)
    operator.matvec(torch.ones(operator.size))
    change(model)
    with pytest.raises(ValueError, match="weights have changed"):
        operator.matvec(torch.ones(operator.size))
    torch.testing.assert_close(
        all_products(HessianOperator(operator.problem)), dense_hessian(operator.problem), rtol=1e-9, atol=1e-12
    )


def test_a_changed_buffer_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    operator = HessianOperator(Problem(model, rows(4), CROSS_ENTROPY))
    model[1].running_mean += 0.1
    with pytest.raises(ValueError, match="weights have changed"):
        operator.matvec(torch.ones(operator.size))


# --- the caller's model


@pytest.mark.parametrize("mode", ["autograd", "finite-difference"])
def test_products_leave_no_trace_on_the_model(mode: str) -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    operator = HessianOperator(Problem(model, rows(4, 2), CROSS_ENTROPY, scope="model"), mode=mode)
    with torch.inference_mode():
        operator.matvec(torch.ones(operator.size))
    assert model.training
    assert not model[0].bias.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_operators_graphs_are_freed_with_it_without_waiting_for_the_garbage_collector() -> None:
    """A graph that holds itself (as ``backward(create_graph=True)`` leaves one) would grow memory run by run."""
    gc.collect()
    gc.disable()
    try:
        operator = HessianOperator(Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss))
        all_products(operator)
        graphs = [weakref.ref(gradient) for graph in operator._graphs.values() for gradient in graph]
        assert len(graphs) > 10
        assert all(ref() is not None for ref in graphs)
        del operator
        assert all(ref() is None for ref in graphs)
    finally:
        gc.enable()


def test_finite_differences_put_the_weights_back_when_the_loss_raises() -> None:
    model = mlp()
    problem = Problem(model, rows(4), CROSS_ENTROPY)
    before = [p.detach().clone() for p in model.parameters()]

    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError

    problem._loss = broken
    with pytest.raises(ZeroDivisionError):
        HessianOperator(problem, mode="finite-difference").matvec(torch.ones(problem.size))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- awkward models


def test_a_variable_that_the_loss_does_not_use_has_zero_curvature() -> None:
    model = mlp()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: model[3](torch.tanh(model[0](x)))
    problem = Problem(model, rows(4), CROSS_ENTROPY)
    for way in WAYS.values():
        H = all_products(HessianOperator(problem, **way))
        assert H.shape == (49, 49)
        assert not H[43:].any()
        assert not H[:, 43:].any()
        assert H[:43, :43].any()


@pytest.mark.parametrize("way", WAYS)
def test_a_linear_loss_has_zero_curvature(way: str) -> None:
    problem = Problem(nn.Linear(4, 1).double(), rows(4), lambda m, b: m(b[0]).mean())
    assert not all_products(HessianOperator(problem, **WAYS[way])).any()


@pytest.mark.parametrize("batched", [1, 5])
def test_fused_attention_is_differentiated_twice(batched: int) -> None:
    """Both the function and the modules that call it; the encoder layer's fast path has no derivative at all."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.1).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].unsqueeze(1).repeat(1, 3, 1)).mean(1), batch[1])

    problem = Problem(layer, rows(3, classes=4), loss)
    operator = HessianOperator(problem, vectors_per_pass=batched)
    torch.testing.assert_close(all_products(operator), dense_hessian(problem), rtol=1e-9, atol=1e-12)


class Once(torch.autograd.Function):
    """A square that claims to have one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def test_a_model_without_second_derivative_is_an_error_that_names_the_way_out() -> None:
    problem = Problem(mlp(), rows(4), lambda m, b: Once.apply(m(b[0])).pow(2).mean())
    with pytest.raises(UserError, match="finite-difference"):
        HessianOperator(problem).matvec(torch.ones(problem.size))
    plain = Problem(mlp(), rows(4), lambda m, b: m(b[0]).pow(4).mean())
    torch.testing.assert_close(
        all_products(HessianOperator(problem, mode="finite-difference")), dense_hessian(plain), rtol=1e-5, atol=1e-6
    )


def test_a_second_derivative_that_is_silently_wrong_is_exposed_by_differences() -> None:
    """At the end of the loss, torch has no reason to refuse: it takes Once's derivative for a constant."""
    plain = HessianOperator(Problem(mlp(), rows(4), lambda m, b: m(b[0]).pow(2).mean()))
    wrong = HessianOperator(Problem(mlp(), rows(4), lambda m, b: Once.apply(m(b[0])).mean()))
    assert plain.disagreement_with_differences() < 1e-6
    assert wrong.disagreement_with_differences() > 0.1


def test_a_product_that_is_not_finite_is_an_error() -> None:
    model = Quadratic(symmetric([1.0, 2.0]))
    model.w.data.zero_()
    problem = Problem(model, [torch.zeros(1, dtype=torch.float64)], lambda m, b: m.w.abs().sqrt().sum(), terms=len)
    with pytest.raises(ValueError, match="not finite"):
        HessianOperator(problem).matvec(torch.ones(2))


# --- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "mode must be one of autograd, finite-difference, got 'exact'"),
        ({"memory_budget": -1}, "memory_budget must be at least 0 bytes, got -1"),
        ({"vectors_per_pass": 0}, "vectors_per_pass must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianOperator(quadratic_problem([1.0, 2.0]), **options)


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"V must have shape \(2, p\), got \(3, 1\)"):
        HessianOperator(quadratic_problem([1.0, 2.0])).matvec(torch.ones(3))
    with pytest.raises(ValueError, match=r"square, got shape \(2, 3\)"):
        MatrixOperator(torch.zeros(2, 3))


# --- on a GPU


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu_and_chooses_how_many_vectors_to_batch() -> None:
    batches = token_batches(3, 1, 2)
    model = TinyTransformer(lora=False)
    expected = all_products(HessianOperator(Problem(model, batches, token_loss)))
    problem = Problem(model.cuda(), batches, token_loss)
    operator = HessianOperator(problem)
    H = operator.matmat(torch.eye(operator.size, dtype=torch.float64, device="cuda"))
    torch.testing.assert_close(H.cpu(), expected, rtol=1e-9, atol=1e-12)
    assert operator.kept_batches == 3
    assert operator._vectors == 16
    pairs = lanczos(operator, 3, tol=1e-9)
    torch.testing.assert_close(pairs.values.cpu(), torch.linalg.eigvalsh(expected).flip(0)[:3], rtol=1e-9, atol=0)

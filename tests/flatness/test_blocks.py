"""Diagonal blocks by layer and by factor beside the dense Hessian's."""

from __future__ import annotations

import pytest
import torch

from flatpatch.flatness import BlockOperator, HessianOperator, MatrixOperator, block_curvature
from flatpatch.flatness.blocks import _layer, factor_blocks, layer_blocks
from tests.flatness.test_scope import adapted
from tests.flatness_cases import all_products, symmetric
from tests.flatness_lora import make_model, make_problem


def test_a_block_is_that_part_of_the_matrix() -> None:
    matrix = symmetric([5.0, 4.0, 2.0, 1.0, -1.0, -3.0])
    indices = torch.tensor([1, 4, 5])
    block = BlockOperator(MatrixOperator(matrix), indices)
    torch.testing.assert_close(all_products(block), matrix[indices][:, indices])


@pytest.mark.parametrize("scope", ["adapter", "merged", "tangent"])
def test_eigenvalues_are_the_dense_blocks_and_traces_add_up(scope: str) -> None:
    problem = make_problem(make_model(), scope)
    dense = all_products(HessianOperator(problem))
    layers, factors = layer_blocks(problem), factor_blocks(problem)
    assert list(layers) == ["0", "3"]
    assert sorted(torch.cat(list(layers.values())).tolist()) == list(range(problem.size))
    assert list(factors) == ([] if scope == "merged" else ["A", "B"])
    found = block_curvature(MatrixOperator(dense), {**layers, **factors}, num_probes=50, tol=1e-8, max_products=90)
    for name, indices in {**layers, **factors}.items():
        block = dense[indices][:, indices]
        assert found[name].size == len(indices)
        assert found[name].top_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
        assert found[name].converged
        error = found[name].trace_standard_error
        # The probes are fixed; four standard errors are missed by chance once in 10,000 times.
        assert error is not None and abs(found[name].trace - float(block.trace())) < 4 * error + 1e-9
    assert sum(found[name].size for name in layers) == problem.size
    if factors:
        both = found["0"].trace + found["3"].trace
        assert found["A"].trace + found["B"].trace == pytest.approx(both, rel=1e-9)  # the same probes


def test_the_factor_next_to_the_input_is_a_whatever_it_is_called() -> None:
    problem = make_problem(make_model())
    names = [n for n, size in zip(problem.scope.names, problem.scope.sizes, strict=True) for _ in range(size)]
    assert all("lora_A" in names[index] for index in factor_blocks(problem)["A"].tolist())
    model = adapted()
    from flatpatch.flatness import Problem
    from tests.flatness.test_scope import CROSS_ENTROPY
    from tests.flatness_cases import rows

    swapped = Problem(model, rows(4), CROSS_ENTROPY, scope="adapter", check=False)
    names = [n for n, size in zip(swapped.scope.names, swapped.scope.sizes, strict=True) for _ in range(size)]
    assert all("lora_B" in names[index] for index in factor_blocks(swapped)["A"].tolist())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (
            "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight",
            "base_model.model.encoder.block.0",
        ),
        ("blocks.3.attn.lora_B_k.5.weight", "blocks.3"),
        ("blocks.11.attn.k.merged", "blocks.11"),
        ("0.tangent.B_dA", "0"),
        ("q.lora_A.default.weight", "q"),
        ("classifier.weight", "classifier"),
        ("weight", "weight"),
    ],
)
def test_a_layer_is_named_up_to_its_first_number(name: str, layer: str) -> None:
    assert _layer(name) == layer

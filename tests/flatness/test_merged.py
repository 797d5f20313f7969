"""Random directions over the factors of image methods' attentions, beside the dense products in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatpatch.families.vision.reference.vit import LoRALinear
from flatpatch.flatness import Problem, landscape, random_direction
from tests.flatness.test_scope import CROSS_ENTROPY, TaskAttention, adapted, after_two_tasks, cllora_transformer
from tests.flatness_cases import import_file, rows


def merged_rows_of(model: Any, batches: Any) -> dict[str, Tensor]:
    """Return a random direction by variable; the model is left as it was."""
    problem = Problem(model, batches, CROSS_ENTROPY, scope="adapter")
    before = copy.deepcopy(model.state_dict())
    direction = random_direction(problem, normalisation="merged_rows", seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.ptp(landscape(problem, [direction], [np.linspace(-1, 1, 5)]).losses) > 1e-3
    assert direction.zero_units == {}
    return dict(zip(problem.scope.names, problem.unflatten(direction.vector), strict=True))


def check_task_attention_rows(attention: Any, pieces: dict[str, Tensor], tasks: int) -> None:
    for name, W in zip("kv", attention.qkv.weight.chunk(3)[1:], strict=True):
        A, B = (getattr(attention, f"lora_{factor}_{name}") for factor in "AB")
        M = W + sum(B[t].weight @ A[t].weight for t in range(tasks))
        change = pieces[f"attention.lora_B_{name}.1.weight"] @ A[1].weight
        torch.testing.assert_close(change.norm(dim=1), M.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_rows_of_a_task_attention_are_those_of_its_matrices(when: str) -> None:
    """A is frozen, and B is zero before its task."""
    model = after_two_tasks(TaskAttention())
    if when == "before":
        for name in "kv":
            nn.init.zeros_(getattr(model.attention, f"lora_B_{name}")[1].weight)
    pieces = merged_rows_of(model, rows(4, 3))
    assert set(pieces) == {"attention.lora_B_k.1.weight", "attention.lora_B_v.1.weight"}
    check_task_attention_rows(model.attention, pieces, 2)


def test_merged_rows_leave_out_the_factors_that_the_loss_does_not_use() -> None:
    """As in InfLoRA's task 1 of 20, in which its code marks the factors of tasks 10 to 19 as trainable too."""
    model = after_two_tasks(TaskAttention())
    for name in "kv":
        getattr(model.attention, f"lora_B_{name}")[2].weight.requires_grad_(True)
    problem = Problem(model, rows(4, 3), CROSS_ENTROPY, scope="adapter")
    direction = random_direction(problem, normalisation="merged_rows")
    assert direction.zero_units == {f"attention.lora_B_{name}.2.weight": 4 for name in "kv"}
    pieces = dict(zip(problem.scope.names, problem.unflatten(direction.vector), strict=True))
    check_task_attention_rows(model.attention, pieces, 2)


def check_adapted_rows(model: Any, pieces: dict[str, Tensor], shared: dict[int, int], own: dict[int, int]) -> None:
    """Blocks by their adapter's position; the own ones are weighted."""
    for index, position in (shared | own).items():
        for j, name in ((0, "q"), (2, "v")):
            pair, scale = model.cur_adapter[position][j], 1.0
            if index in own:
                scale = model.block_weight[j, model.specfic_pos.index(index)]
            W = getattr(model.blocks[index].attn, f"{name}_proj").weight
            M = W + scale * pair.lora_A.weight @ pair.lora_B.weight
            prefix = f"cur_adapter.{position}.{j}"
            change = scale * pieces[f"{prefix}.lora_A.weight"] @ pair.lora_B.weight
            torch.testing.assert_close(change.norm(dim=1), M.norm(dim=1), rtol=1e-12, atol=0)
            # What goes down to the rank has filters of its own, where it varies: shared ones are frozen.
            assert (f"{prefix}.lora_B.weight" in pieces) == (index in own)
            if index in own:
                down = pieces[f"{prefix}.lora_B.weight"]
                torch.testing.assert_close(down.norm(dim=1), pair.lora_B.weight.norm(dim=1), rtol=1e-12, atol=0)


def freeze_all_but_adapters(model: Any, shared_positions: list[int], zero: bool) -> None:
    model.requires_grad_(False)
    model.cur_adapter.requires_grad_(True)
    model.block_weight.requires_grad_(True)
    for position, adapters in enumerate(model.cur_adapter):
        for pair in adapters:
            if isinstance(pair, nn.Identity):
                continue
            pair.lora_B.requires_grad_(position not in shared_positions)
            if zero:
                nn.init.zeros_(pair.lora_A.weight)


@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_rows_of_an_adapted_transformer_are_those_of_its_matrices(when: str) -> None:
    """Shared adapters, of which only the factor up from the rank varies, and a block's own with its weight."""
    model = adapted()
    freeze_all_but_adapters(model, [0], when == "before")
    check_adapted_rows(model, merged_rows_of(model, rows(4, 3)), {0: 0}, {2: 1})


@pytest.mark.third_party
@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_rows_of_inflora_attention_are_those_of_its_matrices(when: str, upstream: Callable[[str], Path]) -> None:
    module = import_file(upstream("InfLoRA") / "models" / "vit_inflora.py", "inflora_vit")
    model = after_two_tasks(module.Attention_LoRA(4, num_heads=2, r=2, n_tasks=3))
    if when == "before":
        for name in "kv":
            nn.init.zeros_(getattr(model.attention, f"lora_B_{name}")[1].weight)
    check_task_attention_rows(model.attention, merged_rows_of(model, rows(4, 3)), 2)


@pytest.mark.third_party
@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_rows_of_cllora_transformer_are_those_of_its_matrices(
    when: str, upstream: Callable[[str], Path]
) -> None:
    model, batches = cllora_transformer(upstream("CL-LoRA"))
    freeze_all_but_adapters(model, [], when == "before")
    check_adapted_rows(model, merged_rows_of(model, batches), {}, {0: 0, 1: 1})


def test_merged_rows_of_the_reference_engines_layer_are_those_of_its_matrix() -> None:
    """As its InfLoRA has it: A is frozen, earlier tasks' updates are summed up, and B begins at zero."""
    layer = LoRALinear(torch.randn(3, 4), torch.randn(3), 2).double()
    layer.old.normal_()
    model = nn.Sequential(layer)
    model.requires_grad_(False)
    layer.factor("B").requires_grad_(True)
    (piece,) = merged_rows_of(model, rows(4, 3)).values()
    torch.testing.assert_close(
        (piece @ layer.factor("A")).norm(dim=1), (layer.weight + layer.old).norm(dim=1), rtol=1e-12, atol=0
    )

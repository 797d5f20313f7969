"""The weights that LoRA adds to, found in the layers of the supported repositories."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.families.vision.reference.vit import LoRALinear
from flatpatch.sam import lora_pairs
from flatpatch.sam.frozen import frozen_weights
from tests.sam.test_pairs import HandedOut, Peft, PerTask
from tests.sam_training import tiny_t5


def layer_weight(layer):
    """What a layer computes with, read off its output."""
    unit = torch.eye(layer.in_features)
    return (layer(unit) - layer(torch.zeros_like(unit))).T.detach()


def test_row_norms_are_those_of_what_the_layers_compute_with():
    model = tiny_t5(dropout=0.0)
    pairs = lora_pairs(model)
    weights = frozen_weights(pairs)
    assert len(weights) == len(pairs) == 6
    for pair, each in zip(pairs, weights, strict=True):
        torch.testing.assert_close(each.row_norms(), layer_weight(pair.owner).norm(dim=1))
    layer = LoRALinear(torch.randn(5, 7), torch.randn(5), rank=2)
    with torch.no_grad():
        layer.factor("B").normal_()
        layer.old.normal_()
    (each,) = frozen_weights(lora_pairs(layer))
    torch.testing.assert_close(each.row_norms(), layer_weight(layer).norm(dim=1))


def test_earlier_tasks_factors_count_too():
    model = Peft()
    model.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    (each,) = frozen_weights(lora_pairs(model))
    expected = model.weight + 0.25 * sum(
        getattr(model, f"{name}_B")["default"].weight @ getattr(model, f"{name}_A")["default"].weight
        for name in ("lora", "loranew")
    )
    torch.testing.assert_close(each.row_norms(), expected.norm(dim=1))
    attention = PerTask()
    attention.qkv = nn.Linear(6, 18).requires_grad_(False)
    (each,) = frozen_weights(lora_pairs(attention))
    expected = attention.qkv.weight[12:] + sum(
        B.weight @ A.weight for B, A in zip(attention.lora_B_v, attention.lora_A_v, strict=True)
    )
    torch.testing.assert_close(each.row_norms(), expected.norm(dim=1))
    assert each.layer is attention.qkv
    assert each.first == 12


def test_weight_that_is_not_where_it_is_known_is_refused():
    with pytest.raises(UserError, match=r"^the weight that cur_adapter.0.0.lora_\*.weight adds to"):
        frozen_weights(lora_pairs(HandedOut()))

"""Scopes by the names that the supported repositories give their LoRA factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.sam import is_adapter, select_parameters

NAMES = {
    "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight": "A",
    "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_B.default.weight": "B",
    "base_model.model.decoder.block.1.layer.0.SelfAttention.v.loranew_A.default.weight": "A",
    "base_model.model.decoder.block.1.layer.0.SelfAttention.v.loranew_B.default.weight": "B",
    "image_encoder.blocks.3.attn.lora_A_k.0.weight": "A",
    "image_encoder.blocks.3.attn.lora_B_v.4.weight": "B",
    "blocks.0.adapter.lora_A.weight": "A",
    "layer.lora_embedding_B.default": "B",
    "layer.lora_a.2.weight": "A",
    "classifier_pool.0.weight": "head",
    "explora_A.weight": "head",
    "lora_Attention.weight": "head",
    "base_model.model.lm_head.modules_to_save.default.weight": "head",
}


def parameters(trainable=lambda name: True):
    return [(name, nn.Parameter(torch.zeros(2), requires_grad=trainable(name))) for name in NAMES]


@pytest.mark.parametrize("scope", ["A", "B", "head"])
def test_scope_is_read_from_the_name(scope):
    chosen = [name for name, _ in select_parameters(parameters(), scope)]
    assert chosen == [name for name, kind in NAMES.items() if kind == scope]


def test_lora_is_both_factors_and_all_is_everything():
    assert [name for name, _ in select_parameters(parameters(), "lora")] == [n for n in NAMES if is_adapter(n)]
    assert {NAMES[name] for name, _ in select_parameters(parameters(), "lora")} == {"A", "B"}
    assert len(select_parameters(parameters(), "all")) == len(NAMES)


def test_frozen_factors_of_earlier_tasks_are_never_chosen():
    chosen = select_parameters(parameters(lambda name: "loranew" in name), "lora")
    assert [NAMES[name] for name, _ in chosen] == ["A", "B"]
    assert all("loranew" in name for name, _ in chosen)


def test_empty_parameters_are_not_chosen():
    with pytest.raises(UserError, match="of 0 trainable tensors there are A 0, B 0, head 0"):
        select_parameters([("lora_A", nn.Parameter(torch.empty(0)))], "lora")


def test_unknown_scope_is_refused():
    with pytest.raises(UserError, match="scope='b' is not one of lora, A, B, head, all"):
        select_parameters(parameters(), "b")

"""The pairs of factors as the supported repositories hold them, with the scale of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.sam.pairs import lora_pairs
from tests.sam_training import tiny_t5


class Peft(nn.Module):
    """A layer with frozen factors of earlier tasks beside those that learn, scaled by name."""

    def __init__(self):
        super().__init__()
        self.scaling = {"default": 0.25}
        for name in ("lora", "loranew"):
            self.add_module(f"{name}_A", nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)}))
            self.add_module(f"{name}_B", nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)}))
        self.get_submodule("lora_A").requires_grad_(False)
        self.get_submodule("lora_B").requires_grad_(False)


class PerTask(nn.Module):
    """An attention with one pair for each task, of which the present task's B learns."""

    def __init__(self):
        super().__init__()
        for name in "kv":
            self.add_module(f"lora_A_{name}", nn.ModuleList(nn.Linear(6, 2, bias=False) for _ in range(3)))
            self.add_module(f"lora_B_{name}", nn.ModuleList(nn.Linear(2, 6, bias=False) for _ in range(3)))
        self.scale = 0.3  # of the attention
        self.requires_grad_(False)
        self.lora_B_v[1].requires_grad_(True)


class Scaled(nn.Module):
    """Factors of a projection, with one learned scale for all layers."""

    def __init__(self):
        super().__init__()
        self.linear_a_q, self.linear_b_q = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        wrapped = nn.Module()
        wrapped.param = nn.Parameter(torch.tensor([0.8]))
        self.scaling_factor = nn.ModuleList([wrapped])


class HandedOut(nn.Module):
    """Hands out adapters whose A is at the output, those of its second place with learned weights."""

    def __init__(self):
        super().__init__()
        self.adapt_pos, self.specfic_pos, self.use_block_weight = [0, 3], [3], True
        self.block_weight = nn.Parameter(torch.tensor([[0.5], [0.6], [0.7]]))
        self.cur_adapter = nn.ModuleList()
        for _ in self.adapt_pos:
            self.cur_adapter.append(nn.ModuleList())
            for _ in range(3):
                adapter = nn.Module()
                adapter.lora_A, adapter.lora_B = nn.Linear(2, 6, bias=False), nn.Linear(6, 2, bias=False)
                self.cur_adapter[-1].append(adapter)


def test_factors_beside_those_of_earlier_tasks():
    model = nn.Sequential(nn.Linear(3, 3), Peft())
    (pair,) = lora_pairs(model)
    assert pair.A is model[1].loranew_A["default"].weight
    assert pair.B is model[1].loranew_B["default"].weight
    assert (pair.scale, pair.name) == (0.25, "1.loranew_*.default.weight")


def test_frozen_partner_is_in_the_pair():
    model = PerTask()
    (pair,) = lora_pairs(model)
    assert pair.A is model.lora_A_v[1].weight
    assert pair.B is model.lora_B_v[1].weight
    assert pair.scale == 1


def test_learned_scale_follows_its_parameter():
    model = Scaled()
    (pair,) = lora_pairs(model)
    assert pair.A is model.linear_a_q.weight
    with torch.no_grad():
        model.scaling_factor[0].param.fill_(0.25)
    assert pair.scale.shape == ()
    assert pair.scale == 0.25
    assert not pair.scale.requires_grad


def test_factor_at_the_input_is_told_by_its_shape_and_a_blocks_weight_is_the_scale():
    model = HandedOut()
    pairs = lora_pairs(model)
    assert [tuple(pair.A.shape) for pair in pairs] == [(2, 6)] * 6
    assert [tuple(pair.B.shape) for pair in pairs] == [(6, 2)] * 6
    assert pairs[0].A is model.cur_adapter[0][0].lora_B.weight
    assert [float(pair.scale) for pair in pairs[:3]] == [1, 1, 1]
    with torch.no_grad():
        model.block_weight.mul_(2)
    torch.testing.assert_close(torch.stack([pair.scale for pair in pairs[3:]]), torch.tensor([1.0, 1.2, 1.4]))


def test_pairs_of_a_real_model_change_what_its_layers_compute():
    """By finite differences of the layer's output: s (B dA + dB A), with peft's own s."""
    model = tiny_t5(dropout=0.0)
    pairs = lora_pairs(model)
    assert len(pairs) == 6
    assert all(pair.scale == 2 for pair in pairs)
    pair = pairs[0]
    layer = model.get_submodule(pair.name.split(".lora_")[0])
    unit = torch.eye(layer.in_features)
    dA, dB = torch.randn_like(pair.A), torch.randn_like(pair.B)
    before = layer(unit).detach()
    expected = pair.scale * (pair.B @ dA + dB @ pair.A).detach()
    with torch.no_grad():
        pair.A.add_(1e-3 * dA)
        pair.B.add_(1e-3 * dB)
    torch.testing.assert_close((layer(unit).detach() - before).T / 1e-3, expected, rtol=0.01, atol=0.02)


def test_model_without_adapters_has_no_pairs():
    assert lora_pairs(nn.Linear(3, 3)) == []


def alone(model):
    del model.lora_A_v
    return model


def convolution(model):
    model.lora_B_v[1].weight = nn.Parameter(torch.zeros(6, 2, 1, 1))
    return model


def scaled(model):
    model.scaling = 0.5
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (alone, "lora_B_v.1.weight has no partner lora_A_v.1.weight"),
        (convolution, r"lora_B_v.1.weight \(6, 2, 1, 1\) and lora_A_v.1.weight \(2, 6\) are no"),
        (scaled, "lora_B_v.1.weight is scaled by 0.5, which may be another scale"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_one_message(change, message):
    with pytest.raises(UserError, match=f"{message}.*Choose sam_radius=factors"):
        lora_pairs(change(PerTask()))

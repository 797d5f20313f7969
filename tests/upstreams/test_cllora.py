"""What CL-LoRA's patches call: its backbone's attention, its block weights, and the step between two passes."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from flatpatch.errors import FlatpatchError
from flatpatch.upstreams import cllora
from tests.families.vision.test_places import started, vit
from tests.vision_upstream import SIZES

__all__ = ["started"]  # a fixture of the hooks' tests


def test_a_backbone_of_other_sizes_comes_with_its_attention_split(started, tmp_path):
    source = vit(1, num_classes=0).state_dict()
    save_file(source, tmp_path / "vit.safetensors")
    started(model=SIZES, weights=str(tmp_path / "vit.safetensors"))
    model = cllora.backbones(timm).create_model("vit_base_patch16_224", pretrained=True, num_classes=0)
    weights = model.state_dict()
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"blocks.1.attn.{part}_proj.{kind}") for part in "qkv"]
        assert torch.equal(torch.cat(parts), source[f"blocks.1.attn.qkv.{kind}"])
    assert not any("qkv" in name for name in weights)
    assert torch.equal(weights["patch_embed.proj.weight"], source["patch_embed.proj.weight"])


def test_absent_block_weights_are_ones_on_the_device_of_the_inputs(started):
    started()
    assert torch.equal(cllora.block_weight(None, torch.zeros(2, 3)), torch.ones(3))
    given = torch.zeros(3)
    assert cllora.block_weight(given, None) is given


def test_a_step_is_forgotten_only_where_one_was_noted(started, monkeypatch):
    monkeypatch.setattr(cllora, "_kept_versions", [])
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    started()
    cllora.keep_versions(optimizer)
    version = weight._version
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight._version > version
    cllora.forget_the_step()
    assert weight._version == version
    assert torch.equal(weight.detach(), torch.full((2,), 0.5))
    with pytest.raises(FlatpatchError, match="without keep_versions"):
        cllora.forget_the_step()


def test_without_a_run_nothing_is_touched(monkeypatch):
    monkeypatch.delenv("FLATPATCH_RUN", raising=False)
    untouched = object()
    assert cllora.backbones(untouched) is untouched
    assert cllora.block_weight(None, untouched) is None
    assert cllora.keep_versions(untouched) is None
    cllora.forget_the_step()

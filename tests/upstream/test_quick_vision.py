"""The quick benchmark's images and weights in the authors' own code: its data manager and its ViT take them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flatpatch.families.vision import quick as quick_vision
from flatpatch.patches import build
from flatpatch.upstreams import UPSTREAMS

pytestmark = pytest.mark.third_party
ROOT = Path(__file__).resolve().parents[2]

METHODS = {"InfLoRA": "inflora", "CL-LoRA": "cllora", "SD-LoRA": "sdlora"}
CONFIGS = {
    "InfLoRA": "configs/cifar100_inflora.json",
    "CL-LoRA": "exps/cifar.json",
    "SD-LoRA": "exps/sdlora_c100.json",
}
MODELS = {
    "InfLoRA": "from models.sinet_inflora import SiNet; model = SiNet(args).image_encoder",
    "CL-LoRA": "from utils.inc_net import get_backbone; model = get_backbone(args)",
    "SD-LoRA": "from utils.inc_net import get_backbone; model = get_backbone(args).base_vit",
}
SCRIPT = """
import json, sys, torch
from utils.data_manager import DataManager
args = json.load(open("config.json"))
args["device"] = [torch.device("cpu")]
data = DataManager(args["dataset"], args["shuffle"], 1, args["init_cls"], args["increment"], args)
images = [data.get_dataset(range(4), source=split, mode=split) for split in ("train", "test")]
{model}
torch.save(
    dict(
        sizes=[data.get_task_size(task) for task in range(data.nb_tasks)],
        order=data._class_order,
        images=[(len(split), split[0][1]) for split in images],
        weights=model.state_dict(),
    ),
    "found.pt",
)
"""


def separated(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name weights as CL-LoRA does: queries, keys and values apart, and the perceptron's layers without their block."""
    renamed = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            renamed |= {
                name.replace("qkv", f"{one}_proj"): part for one, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            renamed[name.replace(".mlp.", ".")] = tensor
    return renamed


@pytest.mark.parametrize("repo", METHODS)
def test_upstreams_code_takes_the_images_and_weights(
    repo: str, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    preset = {**quick_vision.PRESET, **UPSTREAMS[METHODS[repo]].quick}
    shipped = json.loads((upstream(repo) / CONFIGS[repo]).read_text())
    assert set(preset) <= set(shipped), "a key that upstream's configuration does not have"
    (tmp_path / "config.json").write_text(json.dumps(shipped | preset | {"dataset": "flatpatch_quick"}))
    hook: dict[str, Any] = {
        "schema": 1,
        "task_index": None,
        "task": None,
        "tasks": [],
        **{name: f"{name}.json" for name in ("metrics", "progress", "summary")},
        "sam": {"kind": "off", "rho": 0, "eta": 0, "scope": "lora", "sync": "local", "ascent_loss": "total", "seed": 0},
        "adapters": "upstream",
        "vision": {
            "device": "cpu",
            "data": None,
            "weights": str(quick_vision.WEIGHTS),
            "workers": 0,
            "model": dict(quick_vision.MODEL),
            "dataset": {"class": "flatpatch.families.vision.quick:QuickImages", "seed": 0},
            "sam_on": "both",
        },
    }
    (tmp_path / "hook.json").write_text(json.dumps(hook))
    tree = build(repo, into=tmp_path / "build").path
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(model=MODELS[repo])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "FLATPATCH_RUN": str(tmp_path / "hook.json")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["sizes"] == [preset["increment"]] * (quick_vision.CLASSES // preset["increment"])
    assert sorted(found["order"]) == list(range(quick_vision.CLASSES))
    assert [count for count, _ in found["images"]] == [4 * 80, 4 * 40]
    for _, image in found["images"]:
        assert image.shape == (3, 32, 32)
        assert -1 <= image.min() < image.max() <= 1
    ours = {name: tensor for name, tensor in load_file(quick_vision.WEIGHTS).items() if not name.startswith("head.")}
    for name, tensor in (separated(ours) if repo == "CL-LoRA" else ours).items():
        assert torch.equal(found["weights"][name], tensor), name

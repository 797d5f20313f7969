"""What the hooks keep of an image repository's network after a task, and that a full disk does not stop a training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from flatpatch.contract import read_description
from flatpatch.errors import UserError
from flatpatch.families.vision.keeping import keep_model, kept_file
from flatpatch.upstreams import UPSTREAMS


def inflora_network(tasks: int = 12) -> nn.Module:
    """InfLoRA's names: adapters and classifiers of all tasks, there from the beginning."""
    network = nn.Module()
    network.qkv = nn.Linear(2, 6)
    network.attn = nn.Module()
    for name in ("lora_A_k", "lora_B_k", "lora_A_v", "lora_B_v"):
        setattr(network.attn, name, nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(tasks)))
    network.classifier_pool = nn.ModuleList(nn.Linear(2, 1) for _ in range(tasks))
    network.classifier_pool_backup = nn.ModuleList(nn.Linear(2, 1) for _ in range(tasks))
    return network


def told(folder: Path) -> dict[str, str]:
    return {"folder": str(folder), "names": UPSTREAMS["inflora"].kept}


def kept(folder: Path, task: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    with safe_open(kept_file(folder, task), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["trained"])  # noqa: SIM118


def test_a_task_keeps_its_own_adapters_and_classifier_and_says_what_it_trained(tmp_path: Path) -> None:
    """Task 1 of 12: tasks 10 and 11 begin with the same digit, and InfLoRA's code marks them as trainable too."""
    network = inflora_network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_B_k.1" in name or "lora_B_v.1" in name or "classifier_pool.1" in name)
    keep_model(told(tmp_path / "models"), network, 1)
    tensors, trained = kept(tmp_path / "models", 1)
    head = {"classifier_pool.1.weight", "classifier_pool.1.bias"}
    assert set(tensors) == {f"attn.lora_{factor}_{part}.1.weight" for factor in "AB" for part in "kv"} | head
    assert set(trained) == {f"attn.lora_B_{part}.1.weight" for part in "kv"} | head
    assert all(torch.equal(tensor, network.get_parameter(name)) for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["2.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_kept_model_has_the_mode_of_other_files(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        keep_model(told(tmp_path / "models"), inflora_network(), 0)
    finally:
        os.umask(before)
    assert kept_file(tmp_path / "models", 0).stat().st_mode & 0o777 == mode


def test_a_model_that_cannot_be_written_is_said_and_the_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    keep_model(told(tmp_path / "models"), inflora_network(), 0)
    assert "FAILED to keep the model after task 1" in capsys.readouterr().out
    blocked = tmp_path / "blocked"
    kept_file(blocked, 0).mkdir(parents=True)
    keep_model(told(blocked), inflora_network(), 0)
    assert "FAILED to keep the model after task 1" in capsys.readouterr().out
    assert [path.name for path in blocked.iterdir()] == ["1.safetensors"]


@pytest.mark.parametrize(
    ("value", "is_right"),
    [(None, True), ({"folder": "/folder", "names": "a"}, True), ("/folder", False), ({"folder": "/folder"}, False)],
)
def test_description_takes_a_folder_to_keep_models_in_and_their_weights_names(
    value: Any, is_right: bool, tmp_path: Path
) -> None:
    path = tmp_path / "hook.json"
    sam = {"kind": "off", "rho": 0, "eta": 0, "scope": "lora", "sync": "local", "ascent_loss": "total", "seed": 0}
    files = {name: f"{name}.json" for name in ("metrics", "progress", "summary")}
    path.write_text(
        json.dumps(
            {"schema": 1, "task_index": 0, "task": "a", **files, "sam": sam, "adapters": "upstream", "keep": value}
        )
    )
    if is_right:
        assert read_description(path)["keep"] == value
    else:
        with pytest.raises(UserError, match="keep='/folder': Input should be a valid dictionary|keep has no 'names'"):
            read_description(path)

"""CIFAR-100 as the reference engine reads it: in torchvision's files, resized, and learned with the record's steps."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from flatpatch.errors import UserError
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.cifar import DEVIATION, MEAN, SIZE, CIFAR100Images
from flatpatch.families.vision.reference.images import load_tasks
from flatpatch.families.vision.reference.options import VisionReference
from flatpatch.files import read_json

TINY = {"img_size": SIZE, "patch_size": 112, "embed_dim": 8, "depth": 1, "num_heads": 2}
SHADE = 2  # by class: the value of all of an image's pixels


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with images of ours in CIFAR-100's format, which torchvision takes for whole."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    targets = np.arange(200) % 100
    content = {
        "data": np.repeat((targets * SHADE).astype(np.uint8)[:, None], 3072, axis=1),
        "fine_labels": targets.tolist(),
    }
    files = {"train": content, "test": content, "meta": {"fine_label_names": [str(name) for name in range(100)]}}
    for name, value in files.items():
        (folder / name).write_bytes(pickle.dumps(value))
    md5 = {name: calculate_md5(str(folder / name)) for name in files}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return tmp_path


def test_images_are_read_resized_and_normalised(cifar: Path) -> None:
    tasks = load_tasks(CIFAR100Images({"data_path": str(cifar)}), init_cls=5, increment=5)
    assert len(tasks) == 20 and tasks[3].names == (15, 16, 17, 18, 19)
    image, target = tasks[3].test[0]
    assert image.shape == (3, SIZE, SIZE) and target == 15
    expected = (torch.tensor(15 * SHADE / 255) - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(image, expected[:, None, None].expand_as(image))
    torch.testing.assert_close(tasks[3].train[0][0], image)


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_first_task_is_learned_at_a_constant_rate(cifar: Path, tmp_path: Path, tuning: str) -> None:
    steps: list[dict[str, Any]] = []
    rates = {}
    for schedule in ("constant", "cosine"):
        reference = VisionReference(
            method="seqlora",
            dataset=CIFAR100Images,
            output_dir=tmp_path / schedule,
            model=TINY,
            data_path=cifar,
            init_cls=5,
            increment=5,
            rank=2,
            tuning=tuning,
            tasks=1,
            epochs=2,
            batch_size=5,
            learning_rate=1e-3,
            optimizer="sgd",
            schedule=schedule,
        )
        (tmp_path / schedule).mkdir()
        vision.run(reference, on_step=steps.append)
        rates[schedule] = [step["learning_rate"] for step in steps]
        steps.clear()
        assert len(read_json(tmp_path / schedule / "results.json")["accuracy_matrix"]) == 1
    assert rates == {"constant": [1e-3] * 4, "cosine": [1e-3] * 2 + [5e-4] * 2}


def test_unknown_schedule_is_refused(tmp_path: Path) -> None:
    wrong = VisionReference(method="seqlora", dataset=CIFAR100Images, output_dir=tmp_path, schedule="constnat")
    with pytest.raises(UserError, match="unknown schedule 'constnat'. Did you mean 'constant'"):
        wrong.check()


def test_a_record_plan_names_what_is_missing_and_what_is_ours() -> None:
    from flatpatch.families.vision.results import CONFIG
    from flatpatch.runner.resolve import make_plan, parse

    words = ["method=seqlora_vit", "profile=record", "tasks=1", "device=cpu", "data=nowhere"]
    plan = make_plan(parse(words), dry_run=True)
    config = json.loads(plan.files[CONFIG])
    known = {"init_cls": 5, "increment": 5, "batch_size": 5, "epochs": 2, "lrate": 1e-3, "optim": "sgd", "rank": 8}
    assert known.items() <= config.items() and config["schedule"] == "constant"
    assert plan.stages[0].contract["vision"]["dataset"]["class"].endswith("cifar:CIFAR100Images")
    assert plan.benchmark == "CIFAR-100 in tasks of five classes"
    assert any("CIFAR-100 is not whole" in lack for lack in plan.lacks)
    assert any("vit_base_patch16_224.augreg_in21k" in lack for lack in plan.lacks)
    assert any("alpha of 32" in note for note in plan.notes)

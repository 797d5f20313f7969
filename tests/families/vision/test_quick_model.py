"""The shipped small ViT: whole, small, what its provenance says, and a fair start for the benchmark's tasks.

Learning rates and epochs were chosen with images drawn from seeds 1 and 2; the tests below use seed 0's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flatpatch.errors import UserError
from flatpatch.families.vision import quick as quick_vision
from flatpatch.families.vision.quick import build
from flatpatch.families.vision.quick.generator import PRETRAINING, draw
from flatpatch.families.vision.reference import VisionReference, run
from flatpatch.upstreams import UPSTREAMS

PER_TASK = quick_vision.CLASSES // quick_vision.TASKS


def provenance() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((quick_vision.WEIGHTS.parent / "provenance.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def model() -> Any:
    model = build.new_model()
    model.load_state_dict(load_file(quick_vision.WEIGHTS))
    return model


def test_shipped_weights_are_those_of_the_provenance() -> None:
    files = {path.name for path in quick_vision.WEIGHTS.parent.iterdir()} - {"provenance.json"}
    assert files == set(provenance()["sha256"]) == {quick_vision.WEIGHTS.name}
    digest = hashlib.sha256(quick_vision.WEIGHTS.read_bytes()).hexdigest()
    assert digest == provenance()["sha256"][quick_vision.WEIGHTS.name]


def test_shipped_weights_were_built_with_the_scripts_settings() -> None:
    assert provenance()["settings"] == build.SETTINGS
    assert provenance()["seed"] == build.SEED
    assert len(provenance()["loss_per_100_steps"]) == build.SETTINGS["steps"] // 100


def test_shipped_weights_take_less_than_two_megabytes() -> None:
    assert quick_vision.WEIGHTS.stat().st_size < 2_000_000


def test_shipped_weights_are_timms_in_float32(model: Any) -> None:
    """Loading them strictly, in ``model``, has shown that the names are timm's."""
    with safe_open(quick_vision.WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(model.state_dict())
    assert {weight.dtype for weight in load_file(quick_vision.WEIGHTS).values()} == {torch.float32}


def test_model_can_be_halved_into_general_and_specific_blocks() -> None:
    """CL-LoRA lists which blocks share their adapters over tasks and which do not."""
    own = UPSTREAMS["cllora"].quick
    assert own["general_pos"] + own["specfic_pos"] == list(range(int(quick_vision.MODEL["depth"])))
    assert len(own["general_pos"]) == len(own["specfic_pos"])


def test_presets_agree_with_the_model_and_the_benchmark() -> None:
    inflora = UPSTREAMS["inflora"].quick
    assert inflora["embd_dim"] == quick_vision.MODEL["embed_dim"]
    assert inflora["total_sessions"] == quick_vision.TASKS
    assert quick_vision.PRESET["init_cls"] == quick_vision.PRESET["increment"] == PER_TASK
    # CL-LoRA's accuracy over the first task's classes looks at the five likeliest of them.
    assert UPSTREAMS["cllora"].quick["init_cls"] >= 5


def test_model_reaches_on_its_own_classes_what_the_provenance_says(model: Any) -> None:
    """On other images than those counted there; four standard deviations of 1000 draws, plus those of 5000."""
    rng = np.random.Generator(np.random.PCG64(7))
    model.eval()
    with torch.no_grad():
        images, labels = build.pretraining_batch(rng, 1000)
        accuracy = 100 * (model(images).argmax(1) == labels).double().mean().item()
    expected = provenance()["accuracy"]
    spread = 100 * (expected / 100 * (1 - expected / 100)) ** 0.5
    assert abs(accuracy - expected) < 4 * spread * (1 / 1000 + 1 / 5000) ** 0.5


def test_pretraining_shows_a_model_what_the_dataset_shows_it() -> None:
    """The same scale of pixels; a batch's first images are those of its labels."""
    images, labels = build.pretraining_batch(np.random.Generator(np.random.PCG64(1)), 3)
    rng = np.random.Generator(np.random.PCG64(1))
    rng.random(3)
    drawn = draw(np.array(PRETRAINING)[labels.numpy()], rng)
    transform = quick_vision.QuickImages().common_trsf
    for image, pixels in zip(images, drawn, strict=True):
        shown = pixels
        for one in transform:
            shown = one(shown)
        assert torch.allclose(image, shown, atol=1e-6)


@pytest.mark.parametrize("arguments", [[], ["steps=1"], ["out=x", "depth=3"], ["out"]])
def test_build_says_what_it_takes_when_given_something_else(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"build takes out=<folder> and any of .*Example: python -m"):
        build.main(arguments)


def test_build_says_so_when_a_value_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'many'.*Expected numbers, e\.g\. steps=100\."):
        build.main([f"out={tmp_path / 'new'}", "steps=many"])
    assert not (tmp_path / "new").exists()


def test_building_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "accuracy", lambda model, batches: 0.0)  # seconds, and counted above
    for name in ("first", "second"):
        build.main([f"out={tmp_path / name}", "steps=3", "batch=4"])
    files = [tmp_path / name / quick_vision.WEIGHTS.name for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != quick_vision.WEIGHTS.read_bytes()
    written = json.loads((tmp_path / "first/provenance.json").read_text(encoding="utf-8"))
    assert written["sha256"] == {files[0].name: hashlib.sha256(files[0].read_bytes()).hexdigest()}
    assert written["settings"]["steps"] == 3


@pytest.fixture(scope="module")
def images() -> quick_vision.QuickImages:
    images = quick_vision.QuickImages(seed=0)
    images.download_data()
    return images


class Part(quick_vision.QuickImages):
    """The benchmark, or one task of it, without drawing the images anew."""

    def __init__(self, whole: quick_vision.QuickImages, task: int | None) -> None:
        super().__init__()
        self.whole, self.task = whole, task
        if task is not None:
            self.class_order = list(range(PER_TASK))

    def download_data(self) -> None:
        for split in ("train", "test"):
            data, targets = getattr(self.whole, f"{split}_data"), getattr(self.whole, f"{split}_targets")
            if self.task is not None:
                chosen = targets // PER_TASK == self.task
                data, targets = data[chosen], targets[chosen] - PER_TASK * self.task
            setattr(self, f"{split}_data", data)
            setattr(self, f"{split}_targets", targets)


def learn(images: quick_vision.QuickImages, output: Path, method: str, task: int | None = None) -> Any:
    """Train with the preset and return the accuracy matrix, in percent, nan where a task was not yet learned."""
    preset = {**quick_vision.PRESET, **UPSTREAMS[{"seqlora": "seqlora_vit"}.get(method, method)].quick}
    run(
        VisionReference(
            method=method,
            dataset=lambda _: Part(images, task),
            output_dir=output,
            model=quick_vision.MODEL,
            weights=quick_vision.WEIGHTS,
            init_cls=preset["init_cls"],
            increment=preset["increment"],
            batch_size=preset["batch_size"],
            epochs=preset["epochs"],
            learning_rate=preset["lrate"],
        )
    )
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return np.array(results["accuracy_matrix"], dtype=float)


@pytest.mark.slow
@pytest.mark.parametrize("task", range(quick_vision.TASKS))
def test_each_task_alone_is_learnable(images: quick_vision.QuickImages, tmp_path: Path, task: int) -> None:
    assert learn(images, tmp_path, "seqlora", task)[0, 0] >= 90


@pytest.mark.slow
def test_sequential_lora_forgets(images: quick_vision.QuickImages, tmp_path: Path) -> None:
    matrix = learn(images, tmp_path, "seqlora")
    assert (np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1]).mean() > 30
    assert matrix[-1].mean() < 60

"""A tiny CLIP with random weights, and runs of it by the reference engine, for the tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.families.clip import quick
from flatpatch.families.clip.arguments import Arguments
from flatpatch.families.clip.quick import build
from flatpatch.families.clip.reference import ClipReference
from flatpatch.files import folder_hash

SMALL = replace(
    Arguments(num_workers=0),
    datasets=("shapes", "colours"),
    rank=2,
    alpha=4.0,
    iterations=3,
    batch_size=8,
    eval_batch_size=16,
    warmup=1,
    learning_rate=(0.1,),
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def make_clip(folder: Path, *, seed: int = 0, image_size: int = 32) -> Path:
    """Save a CLIP of 16 channels with the quick form's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    numbers = build.vocabulary()
    text = {"vocab_size": len(numbers), "max_position_embeddings": build.LONGEST, "eos_token_id": len(numbers) - 1}
    vision = {"image_size": image_size, "patch_size": image_size // 2}
    model = CLIPModel(CLIPConfig(text_config=text | SIZES, vision_config=vision | SIZES, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():  # its own start is so small that all images look alike
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, safe_serialization=True)
    build.new_tokenizer().save_pretrained(folder)
    return folder


def make_reference(model: Path, output: Path, design: str = "sequential", **changes: Any) -> ClipReference:
    output.mkdir(parents=True, exist_ok=True)
    return ClipReference(
        design=design,
        arguments=replace(SMALL, **changes),
        model=model,
        base=str(folder_hash(model)),
        output_dir=output,
        seed=3,
    )


def results_of(reference: ClipReference) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((reference.output_dir / "results.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the drawn domains have three training images and two test images of a class."""
    monkeypatch.setattr("flatpatch.families.clip.quick.generator.TRAIN_IMAGES", 3)
    monkeypatch.setattr("flatpatch.families.clip.quick.generator.TEST_IMAGES", 2)


CLASSES = len(next(iter(quick.DOMAINS.values())))

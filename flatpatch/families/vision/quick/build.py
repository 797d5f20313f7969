"""Rebuild the small ViT that ships with the package.

    python -m flatpatch.families.vision.quick.build out=<folder>
    python -m flatpatch.families.vision.quick.build out=<folder> steps=200     # a quick try

The model learns to sort images of the 105 combinations that are no class of the benchmark. Everything is drawn from
seed 0. With the library versions and the number of threads named in ``provenance.json`` the file comes out the same,
bit for bit, on the same machine; on another one the weights may differ, because float sums do. The shipped file took
six minutes of one core (OMP_NUM_THREADS=1), spread over 26 on a busy machine.

Training stops long before the model is perfect, so that the benchmark's tasks leave something to learn.
"""

from __future__ import annotations

import json
import platform
import time
from typing import Any

import numpy as np

from flatpatch.families import pretraining
from flatpatch.families.pretraining import read_build, run_build
from flatpatch.families.vision.quick import MODEL, WEIGHTS
from flatpatch.families.vision.quick.generator import PRETRAINING, draw
from flatpatch.files import digest

SEED = 0
SETTINGS: dict[str, Any] = {"steps": 9000, "batch": 32, "learning_rate": 1e-3, "warmup": 300, "weight_decay": 0.05}


def new_model() -> Any:
    """Return the ViT with random weights and a head for the classes of pre-training."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**MODEL, num_classes=len(PRETRAINING))


def pretraining_batch(rng: np.random.Generator, size: int) -> tuple[Any, Any]:
    """Draw images of random classes of pre-training.

    Args:
        rng: Draws classes and images.
        size: How many.

    Returns:
        Images ``(size, 3, 32, 32)`` from -1 to 1, as ``QuickImages`` hands them to a model, and their classes.
    """
    import torch

    labels = (rng.random(size) * len(PRETRAINING)).astype(np.int64)
    images = torch.from_numpy(draw(np.array(PRETRAINING)[labels], rng)).permute(0, 3, 1, 2)
    return (images / 255 - 0.5) / 0.5, torch.from_numpy(labels)


def generator(stream: int) -> np.random.Generator:
    """Return the random numbers of one purpose: 0 training, 1 the accuracy reported."""
    return np.random.Generator(np.random.PCG64([SEED, 1000 + stream]))


def accuracy(model: Any, *, batches: int) -> float:
    """Return the accuracy on new images of the classes of pre-training, in percent.

    Args:
        model: What :func:`new_model` returned, trained.
        batches: How many times 500 images.

    Returns:
        The share of images whose class is the largest output, in percent.
    """
    import torch

    rng = generator(1)
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in (pretraining_batch(rng, 500) for _ in range(batches))
        )
    return 100 * hits / (500 * batches)


def pretrain(settings: dict[str, Any]) -> tuple[Any, list[float]]:
    """Train the ViT from random weights.

    Args:
        settings: As ``SETTINGS``.

    Returns:
        The model, and the mean loss of each hundred steps, in nats.
    """
    import torch
    import torch.nn.functional as F

    torch.manual_seed(SEED)
    model = new_model().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    rng = generator(0)

    def loss() -> torch.Tensor:
        images, labels = pretraining_batch(rng, settings["batch"])
        return F.cross_entropy(model(images), labels)

    return model, pretraining.pretrain(model, optimizer, loss, settings, floor=0.01)


def main(arguments: list[str]) -> None:
    """Build into the folder named by ``out=``; other ``key=value`` change ``SETTINGS``."""
    example = "python -m flatpatch.families.vision.quick.build out=build/vit-quick"
    folder, settings = read_build(arguments, SETTINGS, example)
    import safetensors
    import safetensors.torch
    import timm
    import torch

    started = time.monotonic()
    model, losses = pretrain(settings)
    seconds = round(time.monotonic() - started)
    weights = folder / WEIGHTS.name
    safetensors.torch.save_file(model.state_dict(), weights, metadata={"format": "pt"})
    reached = accuracy(model, batches=10)
    provenance = {
        "made_by": "python -m flatpatch.families.vision.quick.build",
        "images": "drawn by flatpatch.families.vision.quick.generator; no outside data",
        "seed": SEED,
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "accuracy": reached,
        "loss_per_100_steps": losses,
        "sha256": {weights.name: digest(weights)},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    print(f"{reached:.1f} % of 5000 new images of the {len(PRETRAINING)} classes of pre-training; {weights}")


if __name__ == "__main__":
    run_build(main)

"""A Vision Transformer of 30,000 weights, and coloured 16 x 16 images with the interface of InfLoRA's datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torchvision import transforms

if TYPE_CHECKING:
    from flatpatch.families.vision.reference import VisionReference

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
CLASSES = 8


class TinyImages:
    """Each class is a colour with noise, bright on one side; 11 training and 7 test images of each."""

    use_path = False
    train_trsf = [transforms.RandomResizedCrop(16, scale=(0.6, 1.0)), transforms.RandomHorizontalFlip()]
    test_trsf: list[Any] = []
    common_trsf = [transforms.ToTensor(), transforms.Normalize([0.45] * 3, [0.2] * 3)]
    class_order = list(range(CLASSES))

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = args

    def download_data(self) -> None:
        rng = np.random.RandomState(5)
        colours = rng.randint(40, 200, size=(CLASSES, 1, 1, 3))
        for split, count in (("train", 11), ("test", 7)):
            targets = np.tile(np.arange(CLASSES), count)
            images = colours[targets] + rng.randint(-40, 40, size=(len(targets), 16, 16, 3))
            images[:, :, :8] += 15 * (targets[:, None, None, None] % 2)
            setattr(self, f"{split}_data", images.clip(0, 255).astype(np.uint8))
            setattr(self, f"{split}_targets", targets)


def make_reference(output: Path, **changes: Any) -> VisionReference:
    """Return the arguments of a run of four tasks of two classes."""
    # Late, for upstream's process needs the images alone.
    from flatpatch.families.vision.reference import VisionReference

    arguments: dict[str, Any] = {
        "method": "inflora",
        "dataset": TinyImages,
        "output_dir": output,
        "model": SIZES,
        "init_cls": 2,
        "increment": 2,
        "rank": 3,
        "epochs": 3,
        "batch_size": 8,
    }
    return VisionReference(**{**arguments, **changes})

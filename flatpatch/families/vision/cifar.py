"""CIFAR-100 for the reference engine, as the experiment record's first task of images reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels."""


class CIFAR100Images:
    """CIFAR-100 with the dataset interface of InfLoRA's: resized to ViT's size, not augmented, classes in their order.

    Args:
        settings: ``data_path``: the folder that holds ``cifar-100-python/``.
        seed: Not used: nothing is drawn.
    """

    use_path = False
    train_data: NDArray[np.uint8]
    train_targets: NDArray[np.int64]
    test_data: NDArray[np.uint8]
    test_targets: NDArray[np.int64]

    def __init__(self, settings: Mapping[str, Any], seed: int = 0) -> None:
        from torchvision import transforms

        self._root = Path(settings["data_path"])
        self.class_order = list(range(100))
        self.train_trsf: list[Any] = []
        self.test_trsf: list[Any] = []
        self.common_trsf: list[Any] = [
            transforms.Resize((SIZE, SIZE)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]

    def download_data(self) -> None:
        """Read the images, which are there; the name is upstream's."""
        from torchvision.datasets import CIFAR100

        for split in ("train", "test"):
            read = CIFAR100(self._root, train=split == "train", download=False)
            setattr(self, f"{split}_data", np.asarray(read.data))
            setattr(self, f"{split}_targets", np.asarray(read.targets))

"""The quick benchmark as a dataset of InfLoRA's and CL-LoRA's: what their ``DataManager`` asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatpatch.families.vision.quick.generator import benchmark_images
from flatpatch.families.vision.quick.preset import CLASSES


class QuickImages:
    """The benchmark's images with upstream's dataset interface.

    Args:
        args: What upstream hands to its datasets, one dictionary or nothing; not used.
        seed: Draws other images of the same classes.
        kwargs: Not used.
    """

    use_path = False
    """The data are images, not the paths of their files."""

    train_data: NDArray[np.uint8]
    train_targets: NDArray[np.int64]
    test_data: NDArray[np.uint8]
    test_targets: NDArray[np.int64]

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        from torchvision import transforms

        self.seed = seed
        self.class_order = list(range(CLASSES))
        # No crops: a figure's size and place vary already. The mirror image of a class is of the same class.
        self.train_trsf: list[Any] = [transforms.RandomHorizontalFlip()]
        self.test_trsf: list[Any] = []
        self.common_trsf: list[Any] = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]

    def download_data(self) -> None:
        """Draw the images; upstream's name for making them available."""
        self.train_data, self.train_targets, self.test_data, self.test_targets = benchmark_images(seed=self.seed)

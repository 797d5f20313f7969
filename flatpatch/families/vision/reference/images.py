"""Images cut into tasks, read from datasets with the interface of InfLoRA's.

A class's number is its place in the class order; a task is a range of these numbers. Images of a task are ordered
by class, then as the dataset has them, so that one seed gives the batches of InfLoRA's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from flatpatch.errors import UserError
from flatpatch.families.thinning import thinned

Example = tuple[Tensor, int]


class Images(Dataset[Example]):
    """Images, or the paths of their files, with their classes' numbers."""

    def __init__(self, images: NDArray[Any], targets: NDArray[np.int64], transform: Compose) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = self.images[index]
        opened = Image.open(image) if isinstance(image, str) else Image.fromarray(image)
        return self.transform(opened.convert("RGB")), int(self.targets[index])


@dataclass(frozen=True)
class ImageTask:
    """One task's classes and images."""

    classes: range
    names: tuple[int, ...]
    """The classes' labels in the dataset, in the same order."""
    train: Images
    """As trained on: augmented."""
    measure: Images
    """The training images as a test image is read: not augmented."""
    test: Images

    def batches(self, size: int, *, split: str = "measure") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``(n, 3, height, width)`` and their classes, counted from the task's first, in order."""
        for images, targets in DataLoader(getattr(self, split), batch_size=size):
            yield images, targets - self.classes.start


def load_tasks(
    dataset: Any,
    *,
    init_cls: int,
    increment: int,
    shuffle_seed: int | None = None,
    fraction: float = 1.0,
    seed: int = 0,
) -> tuple[ImageTask, ...]:
    """Read a dataset and cut it into tasks.

    Args:
        dataset: An instance with the interface of InfLoRA's datasets.
        init_cls: Classes of the first task.
        increment: Classes of each later one; the last takes what is left.
        shuffle_seed: Order the classes by NumPy's permutation from this seed; None: in the dataset's own order.
        fraction: Share of each task's training images that it has; of each class its own share, to within rounding.
        seed: Draws these.

    Returns:
        The tasks.

    Raises:
        UserError: If there are fewer classes than the first task needs, or a class has no image in a split.
    """
    dataset.download_data()
    labels = np.unique(dataset.train_targets)
    order = list(dataset.class_order)
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(len(labels)).tolist()
    if init_cls > len(order):
        raise UserError(f"init_cls={init_cls}, but the dataset has {len(order)} classes. Expected at most that many.")
    for split in ("train", "test"):
        if missing := sorted(set(order) - set(np.unique(getattr(dataset, f"{split}_targets")).tolist())):
            raise UserError(f"the {split} images show no example of class {missing[0]}. Complete the dataset.")
    bounds = [0, *range(init_cls, len(order), increment), len(order)]
    train = Compose([*dataset.train_trsf, *dataset.common_trsf])
    test = Compose([*dataset.test_trsf, *dataset.common_trsf])

    def images(split: str, names: Sequence[int], first: int, transform: Compose) -> Images:
        data, targets = getattr(dataset, f"{split}_data"), np.asarray(getattr(dataset, f"{split}_targets"))
        places = [np.flatnonzero(targets == name) for name in names]
        numbers = np.repeat(np.arange(first, first + len(names)), [len(place) for place in places])
        chosen = np.concatenate(places)
        if split == "train" and fraction < 1:
            kept = thinned(numbers.tolist(), fraction, seed)
            chosen, numbers = chosen[kept], numbers[kept]
        return Images(np.asarray(data)[chosen], numbers, transform)

    tasks = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        names = tuple(order[first:end])
        tasks.append(
            ImageTask(
                range(first, end),
                names,
                images("train", names, first, train),
                images("train", names, first, test),
                images("test", names, first, test),
            )
        )
    return tuple(tasks)

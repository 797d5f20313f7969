"""What is measured of an image model: the loss, and the fixed sample of a task's training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatpatch.families.sample import SEED, Sample, draw_sample
from flatpatch.measuring import Request

IMAGE_LOSS = (
    "cross-entropy over the task's own classes, of training images augmented once with a fixed seed, without the "
    "method's penalty"
)


def images_sample_of(dataset: Any, first_class: int) -> Callable[[Request], Sample]:
    """As :func:`sample_of`, of images that are augmented at random: the same way for every run and point in time.

    Args:
        dataset: Its items end with the image, a tensor, and its class.
        first_class: The task's; classes are counted from it.
    """

    def collate(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = [int(item[-1]) - first_class for item in items]
        return torch.stack([item[-2] for item in items]), torch.tensor(labels)

    def draw(request: Request) -> Sample:
        torch.manual_seed(SEED)  # the measurer puts the training's random numbers back
        return draw_sample(dataset, collate, samples=request.samples, batch=request.batch)

    return draw

"""The fixed sample that a measurement is made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatpatch.errors import UserError
from flatpatch.measuring import Request

SEED = 0


@dataclass(frozen=True)
class Sample:
    """What a measurement is made on.

    Attributes:
        batches: What the loss takes.
        size: Examples in all.
        indices: Which of the data set's they are; None where that is not known.
    """

    batches: Sequence[Any]
    size: int
    indices: list[int] | None = None


def choose_indices(size: int, samples: int, *, seed: int = SEED) -> list[int]:
    """Choose which examples of a data set are measured: the same ones for every run, whatever its seed.

    Args:
        size: Examples there are.
        samples: Examples wanted; all where there are fewer.
        seed: Of the choice.

    Returns:
        Indices in increasing order, none twice.

    Raises:
        UserError: If there are no examples.
    """
    if size < 1:
        raise UserError("the sample is empty: the data set has no examples to measure on.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:samples].tolist())


def draw_sample(dataset: Any, collate: Callable[[list[Any]], Any], *, samples: int, batch: int) -> Sample:
    """Choose examples and collate them. Call it where the random numbers a collator draws are put back.

    Args:
        dataset: Anything with a length and items by index.
        collate: From a list of items to a batch.
        samples: As in ``choose_indices``.
        batch: Examples in a batch; the last may have fewer.

    Returns:
        The sample; batches that are mappings of some other kind become dictionaries.
    """
    indices = choose_indices(len(dataset), samples)
    made = [collate([dataset[i] for i in indices[start : start + batch]]) for start in range(0, len(indices), batch)]
    return Sample([dict(each) if isinstance(each, Mapping) else each for each in made], len(indices), indices)


def sample_of(dataset: Any, collate: Callable[[list[Any]], Any]) -> Callable[[Request], Sample]:
    """Return a function that draws the fixed sample of a data set and collates it."""
    return lambda request: draw_sample(dataset, collate, samples=request.samples, batch=request.batch)


def images_sample_of(dataset: Any, first_class: int = 0) -> Callable[[Request], Sample]:
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

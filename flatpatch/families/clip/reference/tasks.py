"""The tasks of a CLIP run: classes, prompts and images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from flatpatch.families.clip import quick
from flatpatch.families.clip.arguments import Arguments
from flatpatch.families.clip.data import Pictures, open_pictures, quick_pictures
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.reference.model import transforms


class Images(Dataset[tuple[Tensor, int]]):
    """Pictures as a model takes them, with their classes' numbers."""

    def __init__(self, pictures: Pictures, transform: Any) -> None:
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pictures[index]
        return self.transform(image.convert("RGB")), label


@dataclass(frozen=True)
class ClipTask:
    """One data set as a task.

    Attributes:
        classes: As prompts call them, in the order of their numbers.
        templates: The prompts, with ``{}`` for the class.
        train: As trained on: cut at random.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Images
    test: Images


def load_tasks(
    arguments: Arguments, *, data: Path | None, model: Path, size: int, skipped: tuple[str, ...]
) -> tuple[ClipTask, ...]:
    """Open the data sets of a run.

    Args:
        arguments: Which data sets.
        data: The data folder; None: the drawn ones of profile ``quick``.
        model: The model's folder.
        size: Of the model's images.
        skipped: Files that are left out, from the data folder.

    Raises:
        UserError: If one cannot be read.
    """
    to_train, to_test = transforms(model, size)

    def images(name: str, *, train: bool) -> Images:
        if data is None:
            pictures = quick_pictures(name, train=train)
        else:
            pictures = open_pictures(name, data, train=train).without([data / file for file in skipped])
        return Images(pictures, to_train if train else to_test)

    tasks = []
    for name in arguments.datasets:
        train, test = images(name, train=True), images(name, train=False)
        known = DATASETS.get(name)
        classes = train.pictures.classes
        prompts = tuple(known.prompt_of(each) for each in classes) if known else classes
        tasks.append(ClipTask(name, prompts, known.templates if known else quick.TEMPLATES, train, test))
    return tuple(tasks)

"""The models that a finished CLIP run left, rebuilt from its factors, and the images they learned."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.families.base import FinishedRun
from flatpatch.families.clip.measuring import loss_name
from flatpatch.families.clip.reference import ClipReference, ClipTask, criterion, read_reference, restore
from flatpatch.families.clip.reference.checkpoints import checkpoint_file
from flatpatch.families.clip.reference.tasks import load_tasks
from flatpatch.families.clip.results import CONFIG, PROCESS
from flatpatch.families.clip.upstream import ClipUpstream
from flatpatch.families.sample import Sample, images_sample_of
from flatpatch.files import folder_hash
from flatpatch.flatness import Loss, supervised_loss
from flatpatch.flatness.guard import random_states_kept
from flatpatch.measuring import Request

# Arguments in which runs may differ between whose models lies a line; the loss is the same.
OF_TRAINING = frozenset(
    ("iterations", "batch_size", "eval_batch_size", "learning_rate", "warmup", "optimizer", "momentum", "weight_decay")
    + ("lamb", "lame", "num_workers", "on_bad_image")
)


@dataclass(frozen=True)
class ClipRun(FinishedRun):
    """A finished run on CLIP, and what its process was told."""

    config: Mapping[str, Any]

    @property
    def loss(self) -> Loss:
        """The loss that was trained, over the classes of the task."""
        return supervised_loss(criterion(self._reference.arguments))

    @property
    def loss_name(self) -> str:
        """The loss in words."""
        return loss_name(self._reference.arguments)

    def rebuild(self, index: int, *, joined: bool = False) -> nn.Module:
        """Rebuild the model as it was when a task's training ended.

        Args:
            index: The task.
            joined: False: what varies is what the task trained. True: all factors do; with InfLoRA those of all tasks.

        Returns:
            The model, as :meth:`flatpatch.families.base.FinishedRun.ready` leaves it.

        Raises:
            UserError: If something that the run began with or kept is missing or is another's.
        """
        for task in range(index + 1):
            self.check_file(PROCESS, checkpoint_file(self._reference, task))
        with random_states_kept():
            model = restore(self._reference, index, joined=joined)
        task_of = self._tasks[index]
        model.ask(task_of.classes, task_of.templates[0])
        return self.ready(index, model)

    def draw_sample(self, index: int, request: Request) -> Sample:
        """Draw the fixed sample of a task's training images, cut as inside a run.

        Raises:
            UserError: If the images cannot be read.
        """
        with random_states_kept():
            return images_sample_of(self._tasks[index].train)(request)

    def learned(self, index: int) -> Sequence[Any]:
        """Return the task's name: models after different orders may be compared."""
        return self.record["tasks"][index : index + 1]  # type: ignore[no-any-return]

    def check_companion(self, other: FinishedRun) -> None:
        """Refuse a run of another method, model, data or shape of the factors; see the base class."""
        super().check_companion(other)
        assert isinstance(other, ClipRun)
        mine, theirs = self._comparable(), other._comparable()
        different = [f"{key} is {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]
        if different:
            raise UserError(
                f"{self.name} and {other.name} have models between which nothing lies: {'; '.join(different)}. Name "
                "runs that differ only in how they were trained."
            )

    def _comparable(self) -> dict[str, Any]:
        arguments = self.config["arguments"]
        kept = {key: arguments[key] for key in arguments if key not in OF_TRAINING}
        images = {key: value for key, value in self.record["inputs"].items()}
        return {"design": self.config["design"], "base model": self.config["base"], **kept, "inputs": images}

    @functools.cached_property
    def _reference(self) -> ClipReference:
        return read_reference(self.config, self.folder / "work", "cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _tasks(self) -> tuple[ClipTask, ...]:
        reference = self._reference
        arguments = dataclasses.replace(reference.arguments, num_workers=0)
        size = json.loads((reference.model / "config.json").read_text(encoding="utf-8"))["vision_config"]["image_size"]
        return load_tasks(
            arguments, data=reference.data, model=reference.model, size=int(size), skipped=reference.skipped
        )


def reopen(upstream: ClipUpstream, folder: Path, record: dict[str, Any]) -> ClipRun:
    """Return a finished run; see :class:`flatpatch.families.base.Family`."""
    path = folder / "work" / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, link = config["base"], folder / "work" / config["model"]
        if not {"design", "arguments", "output_dir", "data", "skipped", "seed"} <= config.keys():
            raise ValueError(f"{CONFIG} does not hold what it must")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run={folder.name}: what it was told cannot be read ({error}). Make the run again.") from None
    if (here := folder_hash(link.resolve())) != base:
        what = "is gone" if here is None else "holds other files now"
        raise UserError(
            f"{folder.name}: the CLIP it began with, {link.resolve()}, {what}, so its adapters fit no model. Restore "
            "it."
        )
    return ClipRun(folder, record, config)

"""One task of the reference engine, as a process of its own: the counterpart of one upstream invocation."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatpatch.contract import VARIABLE, read_description
from flatpatch.errors import FlatpatchError
from flatpatch.families.reference import StepRecorder
from flatpatch.families.sample import sample_of
from flatpatch.families.text import reference
from flatpatch.families.text.reference import ReferenceTask
from flatpatch.families.text.reference.classifier import Classifier
from flatpatch.families.text.scripts import pairs
from flatpatch.flatness import model_loss


def main(words: Sequence[str]) -> int:
    """Train and evaluate one task as the arguments say, with the SAM of the hook's settings."""
    arguments = {name: value or "" for name, value in pairs(list(words))}
    try:
        task = read_task(arguments)
        task.output_dir.mkdir(parents=True, exist_ok=True)
        run = read_description(Path(os.environ[VARIABLE]))
        with StepRecorder(run, resumes=True) as recorder:

            def measure(when: str, model: nn.Module, examples: Sequence[Any], collate: Callable[..., Any]) -> None:
                recorder.measure(
                    *(when, model, sample_of(examples, collate), run["task_index"], run["task"]), loss_of=loss_of
                )

            reference.run_task(
                task,
                make_gradients=recorder.make_gradients,
                on_step=recorder.on_step,
                on_predict=recorder.on_predict,
                at=measure,
                keeper=recorder.keeper,
            )
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def loss_of(index: int, task: str) -> Callable[[nn.Module, Any], torch.Tensor]:
    """Return a task's loss: the model's own, and of a classifier that of the task's head."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if not isinstance(model, Classifier):
            return model_loss(model, batch)
        active, model.active = model.active, task
        try:
            return model_loss(model, batch)
        finally:
            model.active = active

    return loss


def read_task(arguments: dict[str, str]) -> ReferenceTask:
    """Turn upstream-style arguments into the reference engine's own, ignoring those it has no use for."""
    configs = Path(arguments["task_config_dir"])
    previous = Path(arguments["model_name_or_path"])
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    types = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(ReferenceTask)}
    plain = {name: kinds[text](arguments[name]) for name, text in types.items() if name in arguments and text in kinds}
    return ReferenceTask(
        model=Path(arguments["base_model"]),
        data_dir=Path(arguments["data_dir"]),
        task=_datasets(configs / "train_tasks.json")[0],
        eval_tasks=_datasets(configs / "test_tasks.json"),
        output_dir=Path(arguments["output_dir"]),
        previous=previous if previous.name == "adapter" else None,
        device="cuda" if torch.cuda.is_available() else "cpu",
        **plain,
    )


def _datasets(path: Path) -> tuple[tuple[str, str], ...]:
    config = json.loads(path.read_text(encoding="utf-8"))
    return tuple((kind, entry["dataset name"]) for kind, entries in config.items() for entry in entries)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One task of the reference engine, as a process of its own: the counterpart of one upstream invocation."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flatpatch import hooks
from flatpatch.continual import reference
from flatpatch.continual.reference import ReferenceTask
from flatpatch.runs.scripts import pairs


def main(words: Sequence[str]) -> None:
    """Train and evaluate one task as the arguments say, with the SAM of the hook's settings."""
    arguments = {name: value or "" for name, value in pairs(list(words))}
    recorder = hooks.Recorder.from_environment()
    task = read_task(arguments)
    task.output_dir.mkdir(parents=True, exist_ok=True)
    reference.run_task(
        task,
        make_gradients=recorder.make_gradients,
        on_step=recorder.on_step,
        on_predict=recorder.on_predict,
    )


def read_task(arguments: dict[str, str]) -> ReferenceTask:
    """Turn upstream-style arguments into the reference engine's own, ignoring those it has no use for."""
    configs = Path(arguments["task_config_dir"])
    previous = Path(arguments["model_name_or_path"])
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ReferenceTask)}
    plain = {
        name: {"int": int, "float": float, "str": str}.get(str(kind).split(" ")[0], str)(arguments[name])
        for name, kind in types.items()
        if name in arguments and str(kind).split(" ")[0] in ("int", "float", "str")
    }
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
    main(sys.argv[1:])

"""What is kept of each task: its factors, and of which model they are; the model itself is not saved again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.families.clip.reference.model import PromptClassifier, build, factor
from flatpatch.families.clip.reference.options import ClipReference
from flatpatch.files import write_atomically


def checkpoint_file(reference: ClipReference, task: int) -> Path:
    """Return the file of a task, counted from 0."""
    return reference.output_dir / "tasks" / f"{task}.safetensors"


def _made(reference: ClipReference) -> dict[str, Any]:
    arguments = reference.arguments
    shape = {"rank": arguments.rank, "alpha": arguments.alpha, "targets": list(arguments.targets)}
    return {"design": reference.design, **shape, "tower": arguments.tower, "base_model": reference.base}


def save(reference: ClipReference, model: PromptClassifier, task: int) -> None:
    """Write the checkpoint of a task; a reader finds either the whole file or none."""
    path = checkpoint_file(reference, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{which}": factor(layer, which).detach().cpu().contiguous()
        for name, layer in model.layers.items()
        for which in "AB"
    }
    # Safetensors' own writer would make a file that nobody else may read.
    write_atomically(path, to_bytes(tensors, metadata={"made": json.dumps(_made(reference))}))


def restore(reference: ClipReference, task: int, *, joined: bool = False) -> PromptClassifier:
    """Return the model as it was after a task of a run.

    Args:
        reference: The run's arguments.
        task: From 0.
        joined: False: what varies is what the task trained. True: every factor that the model has varies; with InfLoRA
            those of all tasks, as one pair of matrices per layer.

    Returns:
        The model on its device, with no task's prompts yet.

    Raises:
        UserError: If a checkpoint is missing or was made with other arguments, or for another model.
    """
    adds_up = reference.design == "inflora"
    files = [read_factors(reference, index) for index in (range(task + 1) if adds_up else [task])]
    arguments = reference.arguments
    if joined and adds_up:
        many = len(files)
        wide = replace(arguments, rank=arguments.rank * many, alpha=arguments.alpha * many)  # the scale stays
        model = build(reference.model, wide, seed=reference.seed, device=reference.device)
        _fill(model, {name: torch.cat([f[name] for f in files], dim=int(name.endswith(".B"))) for name in files[0]})
    else:
        model = build(reference.model, arguments, seed=reference.seed, device=reference.device)
        for index, file in enumerate(files):
            if index:
                model.fold()
            _fill(model, file)
    model.train_only(("A", "B") if joined else reference.trained)
    return model


@torch.no_grad()
def _fill(model: PromptClassifier, tensors: dict[str, Tensor]) -> None:
    for name, layer in model.layers.items():
        for which in "AB":
            factor(layer, which).copy_(tensors[f"{name}.{which}"])


def read_factors(reference: ClipReference, task: int) -> dict[str, Tensor]:
    """Return a task's factors by layer and letter.

    Raises:
        UserError: If they are missing or damaged, or were made with other arguments or for another model.
    """
    path = checkpoint_file(reference, task)
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads(file.metadata()["made"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no whole adapter of task {task + 1} at {path}: {error}. Run the tasks again.") from None
    asked = _made(reference)
    if made.get("base_model") != asked["base_model"]:
        raise UserError(
            f"{path} is an adapter for another base model: it was trained on the CLIP with the hash "
            f"{str(made.get('base_model'))[:12]}, and {reference.model} has {reference.base[:12]}. Name the model that "
            "it was trained on."
        )
    if made != asked:
        other = ", ".join(
            f"{key} {made.get(key)} (asked: {asked[key]})" for key in asked if made.get(key) != asked[key]
        )
        raise UserError(f"{path} was made with {other}. Ask with the run's arguments.")
    return tensors

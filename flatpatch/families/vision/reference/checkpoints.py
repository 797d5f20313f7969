"""What is kept of each task: what was trained, and the task's classifier; a frozen backbone is not saved again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.families.vision.reference.duallora import make_model
from flatpatch.families.vision.reference.options import VisionReference
from flatpatch.families.vision.reference.vit import LoRAViT
from flatpatch.files import write_atomically


def checkpoint_file(reference: VisionReference, task: int) -> Path:
    """Return the file of a task, counted from 0."""
    return reference.output_dir / "tasks" / f"{task}.safetensors"


def _made(reference: VisionReference) -> dict[str, Any]:
    made = {"method": reference.method, "rank": reference.rank, "model": dict(reference.model)}
    made |= {"choices": asdict(reference.dual)} if reference.method == "duallora" else {}
    return made if reference.tuning == "lora" else {**made, "tuning": reference.tuning}


def _kept(reference: VisionReference, model: LoRAViT, task: int) -> dict[str, Tensor]:
    named = model.vit.named_parameters()
    kept = {name: value.data for name, value in named if ".lora_" in name or reference.tuning == "full"}
    if reference.method == "duallora":  # its bases, and what earlier tasks left
        kept |= dict(model.vit.named_buffers())
    return kept | {f"head.{name}": value.data for name, value in model.heads[task].named_parameters()}


def save(reference: VisionReference, model: LoRAViT) -> None:
    """Write the checkpoint of the present task; a reader finds either the whole file or none."""
    path = checkpoint_file(reference, model.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in _kept(reference, model, model.task).items()}
    # Safetensors' own writer would make a file that nobody else may read.
    write_atomically(path, to_bytes(tensors, metadata={"made": json.dumps(_made(reference))}))


def restore(reference: VisionReference, task: int, *, joined: bool = False) -> LoRAViT:
    """Return the model as it was after a task of a run.

    Args:
        reference: The run's arguments.
        task: From 0.
        joined: False: earlier tasks' updates are summed up, as when the task was trained. True: the factors of all
            tasks are one pair of matrices per layer.

    Returns:
        The model on its device; what the task trained requires a gradient, and with ``joined`` every factor.

    Raises:
        UserError: If a checkpoint is missing or was made with other arguments.
    """
    files = [_read(reference, index) for index in range(task + 1)]
    classes = [len(file["head.bias"]) for file in files]
    joins = joined and reference.method == "inflora"
    model = make_model(replace(reference, rank=reference.rank * len(files)) if joins else reference, classes)
    with torch.no_grad():
        for name, value in _kept(reference, model, task).items() if joins else ():
            of_all = [file[name] for file in files]
            factor = ".lora_" in name
            value.copy_(torch.cat(of_all, dim=0 if ".lora_A." in name else 1) if factor else of_all[-1])
        for index, file in enumerate(() if joins else files):
            if index and reference.method == "inflora":
                for layer in model.layers:
                    layer.fold()
            for name, value in _kept(reference, model, index).items():
                value.copy_(file[name])
    model.task = task
    model.train_only(("A", "B") if joined and reference.tuning == "lora" else reference.trained)
    return model


def _read(reference: VisionReference, task: int) -> dict[str, Tensor]:
    path = checkpoint_file(reference, task)
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads(file.metadata()["made"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"no checkpoint of task {task} at {path}: {error}. Run the tasks again.") from None
    if made != _made(reference):
        raise UserError(f"{path} was made with {made}, this asks for {_made(reference)}. Ask with the run's arguments.")
    return tensors

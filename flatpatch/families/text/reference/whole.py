"""Training every weight of a model: what is kept of it after a task, in the folder that an adapter would be kept in."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from flatpatch.errors import UserError
from flatpatch.files import write_atomically

FILE_NAME = "model.safetensors"


def save(folder: Path, model: nn.Module) -> None:
    """Write a model's weights into a folder, a shared one once; a reader finds either the whole file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    # Safetensors' own writer would make a file that nobody else may read.
    write_atomically(folder / FILE_NAME, to_bytes(tensors))


def load(folder: Path, model: nn.Module) -> None:
    """Put what `save` wrote into a model, in place.

    Raises:
        UserError: If there is no whole file in the folder, or it is of another model.
    """
    path = folder / FILE_NAME
    own = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            there = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"no weights of an earlier task at {path}: {error}. Run that task again.") from None
    wrong = sorted(own.keys() ^ there.keys()) or [name for name in own if own[name].shape != there[name].shape]
    if wrong:
        raise UserError(
            f"{path} is of another model: {len(wrong)} weights are missing, unknown or of another shape, the first "
            f"{wrong[0]}. Name the model that the run began with."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(there[name])

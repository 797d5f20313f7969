"""What an image run keeps of its network after each task, so that the model can be measured when the run is over.

Only what training changed and the task's loss depends on: the frozen ViT comes back from its weights file. Which
weights those are, each method's row says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatpatch.families.recording import announce
from flatpatch.files import written_atomically


def kept_file(folder: Path, task: int) -> Path:
    """Return the file of a task, counted from 0."""
    return folder / f"{task + 1}.safetensors"


def failure_of(task: int) -> str:
    """Return how the line begins that says that the model of a task, counted from 0, could not be kept."""
    return f"FAILED to keep the model after task {task + 1}:"


def keep_model(keep: Mapping[str, str], network: Any, task: int) -> None:
    """Write what the network has learned in a task; if that fails, say so: the training goes on.

    Args:
        keep: ``folder``, made if it is missing, and ``names``, a pattern of the weights' names with ``{task}`` in it.
        network: Upstream's, not wrapped. Nothing of it changes.
        task: Counted from 0.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    folder, form = Path(keep["folder"]), re.compile(keep["names"].replace("{task}", str(task)))
    kept = {name: parameter for name, parameter in network.named_parameters() if form.fullmatch(name)}
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in kept.items()}
    trained = [name for name, parameter in kept.items() if parameter.requires_grad]
    path = kept_file(folder, task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as unfinished:
            # Its own writer would make a file that nobody else may read.
            unfinished.write_bytes(save(tensors, metadata={"trained": json.dumps(trained)}))
    except (OSError, SafetensorError) as error:
        announce(f"{failure_of(task)} {error} (the training goes on)")

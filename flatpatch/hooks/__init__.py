"""All that a patched upstream may call. Without ``FLATPATCH_RUN`` in the environment every hook does nothing.

Importing this package loads neither torch nor numpy; they are used only once a hook has work to do.
"""

from __future__ import annotations

import importlib
from typing import Any

from flatpatch.families.text.hook import attach_trainer
from flatpatch.families.vision.hook import (
    begin_task,
    classification_loss,
    done_before,
    end_task,
    first_pass,
    second_pass,
    task_done,
)
from flatpatch.families.vision.places import (
    backbones,
    data_folder,
    dataset,
    embed_dim,
    load_weights,
    new_log,
    provides_dataset,
    redirect_paths,
    resize,
    resized,
    should_download,
    workers,
)


def upstream(name: str) -> Any:
    """Return a method's own file, for what its loop computes as no other's does.

    Args:
        name: The method's.
    """
    return importlib.import_module(f"flatpatch.upstreams.{name}")


__all__ = [
    "attach_trainer",
    "backbones",
    "begin_task",
    "classification_loss",
    "data_folder",
    "dataset",
    "done_before",
    "embed_dim",
    "end_task",
    "first_pass",
    "load_weights",
    "new_log",
    "provides_dataset",
    "redirect_paths",
    "resize",
    "resized",
    "second_pass",
    "should_download",
    "task_done",
    "upstream",
    "workers",
]

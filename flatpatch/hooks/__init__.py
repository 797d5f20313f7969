"""All that a patched upstream may call. Without ``FLATPATCH_RUN`` in the environment every hook does nothing.

Importing this package needs the standard library alone; torch is used only once a hook has work to do.
"""

from flatpatch.families.losses import classification_loss, cllora_distillation_loss, cllora_loss
from flatpatch.families.text.hook import attach_trainer
from flatpatch.families.vision.hook import begin_task, end_task, first_pass, second_pass
from flatpatch.families.vision.places import (
    backbones,
    block_weight,
    data_folder,
    dataset,
    fetches,
    forget_the_step,
    keep_versions,
    load_weights,
    new_log,
    place,
    resize,
    resized,
    serves,
    width,
    workers,
)

__all__ = [
    "attach_trainer",
    "backbones",
    "begin_task",
    "block_weight",
    "classification_loss",
    "cllora_distillation_loss",
    "cllora_loss",
    "data_folder",
    "dataset",
    "end_task",
    "fetches",
    "first_pass",
    "forget_the_step",
    "keep_versions",
    "load_weights",
    "new_log",
    "place",
    "resize",
    "resized",
    "second_pass",
    "serves",
    "width",
    "workers",
]

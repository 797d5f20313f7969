"""Sequential LoRA on a ViT: one pair of factors, trained on each task in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.upstreams.inflora import OPTIMIZERS, schedule_problems, share_problems


@dataclass(frozen=True, kw_only=True)
class SequentialLoRA(VisionUpstream):
    """The row. The reference engine alone has the method, and takes its settings in InfLoRA's spelling."""

    def value_problems(self, config: Mapping[str, Any], width: int, blocks: int) -> list[str]:
        """Return which values could not be used; see the base class."""
        return share_problems(config, width)

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what could not be used; see the base class."""
        return schedule_problems(config)


UPSTREAM = SequentialLoRA(
    name="seqlora_vit",
    title="sequential LoRA on a ViT",
    seed=0,
    tunings=("lora", "head", "full"),
    epochs=("epochs",),
    counts=("rank",),
    words={"optim": OPTIMIZERS},
    training_keys=("optim", "lamb", "lame", "rank"),
    quick={"epochs": 10, "lrate": 5e-3},
    profiles=("quick", "record"),
    record={
        "init_cls": 5,
        "increment": 5,
        "batch_size": 5,
        "epochs": 2,
        "lrate": 1e-3,
        "optim": "sgd",
        "schedule": "constant",
        "rank": 8,
    },
    record_weights="vit_base_patch16_224.augreg_in21k",
)

"""DualLoRA, a reconstruction: an orthogonal and a residual LoRA in parallel, recalled by a dynamic memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flatpatch.families.vision.dual_choices import DEFAULTS, WORDS, choices_of
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.upstreams.inflora import OPTIMIZERS, schedule_problems, share_problems


@dataclass(frozen=True, kw_only=True)
class DualLoRA(VisionUpstream):
    """The row. The reference engine alone has the method; beside its own keys it takes InfLoRA's."""

    def value_problems(self, config: Mapping[str, Any], width: int, blocks: int) -> list[str]:
        """Return which values could not be used; see the base class."""
        return share_problems(config, width)

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what could not be used; see the base class."""
        return [*schedule_problems(config), *(f"upstream.{problem}" for problem in choices_of(config).problems())]


UPSTREAM = DualLoRA(
    name="duallora",
    title="DualLoRA (reconstruction)",
    reconstruction=(
        "of the paper (arXiv:2411.00623) the abstract and summaries could be read, no formula, setting or number, so "
        "that what runs is one reading of them (docs/duallora.md)"
    ),
    seed=0,
    unpaired=True,
    epochs=("epochs",),
    counts=("rank",),
    words={"optim": OPTIMIZERS, **WORDS},
    choices=DEFAULTS,
    training_keys=("optim", "lamb", "lame", "rank"),
    quick={"epochs": 10, "lrate": 5e-3},
)

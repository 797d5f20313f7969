"""What a CLIP run of the reference engine is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.families.clip.arguments import Arguments, from_dict
from flatpatch.families.clip.upstream import DESIGNS


@dataclass(frozen=True)
class ClipReference:
    """Arguments of one run."""

    design: str
    """One of ``DESIGNS``: what becomes of a task's factors when the next one begins."""
    arguments: Arguments
    model: Path
    """Folder of the pre-trained CLIP and its tokenizer."""
    base: str
    """Hash of that folder's files: adapters fit no other model."""
    output_dir: Path
    """Where ``tasks/<n>.safetensors`` and results.json go."""
    data: Path | None = None
    """The data folder; None: the drawn images of profile ``quick``."""
    skipped: tuple[str, ...] = ()
    """Images that are left out, from the data folder."""
    seed: int = 42
    device: str = "cpu"

    @property
    def trained(self) -> tuple[str, ...]:
        """The factors that are trained."""
        return DESIGNS[self.design].trained


def read_reference(config: Mapping[str, Any], work: Path, device: str) -> ClipReference:
    """Return what a run's configuration says, its places being in the run's work folder."""
    return ClipReference(
        design=config["design"],
        arguments=from_dict(config["arguments"]),
        model=work / config["model"],
        base=config["base"],
        output_dir=work / config["output_dir"],
        data=None if config["data"] is None else work / config["data"],
        skipped=tuple(config["skipped"]),
        seed=config["seed"],
        device=device,
    )

"""What DualLoRA's reachable sources leave open, each a setting of the reconstruction. Loads no torch.

Of the paper (arXiv:2411.00623, "Replay-Free Continual Low-Rank Adaptation with Dynamic Memory") the abstract and other
people's summaries could be read, no formula and no number; docs/duallora.md says what is sourced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flatpatch.errors import did_you_mean

NEW = "new"
WORDS: Mapping[str, tuple[str, ...]] = {
    "residual_basis": (NEW, "previous", "old"),
    "basis_time": ("before", "after"),
    "basis_features": ("adapted", "pretrained"),
    "basis_energy": ("sigma2", "sigma4"),
    "orthogonal": ("per_task", "shared"),
    "similarity": ("relative", "plain"),
    "memory": ("max", "share", "off"),
    "memory_by": ("task", "direction"),
    "calibration": ("soft", "hard", "off"),
}
"""By setting: the values it takes."""


@dataclass(frozen=True)
class DualChoices:
    """One reading of the method; the defaults are ours."""

    residual_basis: str = NEW
    """On which directions a task's residual adapter works: those that the task itself adds (variant A), those that the
    task before it added, or those of all tasks before it (variant B)."""
    basis_time: str = "before"
    """Whether a task's inputs are looked at before or after it is learned."""
    basis_features: str = "adapted"
    """Inputs as the adapted model or as the pretrained one has them."""
    basis_energy: str = "sigma2"
    """What the shares ``lamb`` and ``lame`` are of: the inputs' energy (GPM's rule), or its squares (InfLoRA's)."""
    orthogonal: str = "per_task"
    """One orthogonal adapter for each task, merged when it ends, or one for all, whose changes are kept apart."""
    similarity: str = "relative"
    """How much of an image lies in a task's directions: over what the task's own images had there on average, or as it
    is. As it is, the first task is nearly always the nearest: its directions hold what all images have in common."""
    memory: str = "max"
    """The weight of a task's residual adapter when an image is answered: its similarity over the largest, its share of
    the squared similarities, or 1."""
    memory_by: str = "task"
    """One weight for each task, or one for each direction."""
    calibration: str = "soft"
    """How the guessed task changes the logits: soft adds the logarithm of its probability, hard leaves a confident
    guess's classes alone, off changes nothing."""
    calibration_weight: float = 1.0
    """What the logarithms are multiplied by."""
    temperature: float = 0.1
    """Of the softmax over the tasks' scores, the mean squares of their similarities."""
    confidence: float = 0.5
    """Probability from which on a guess counts as confident."""

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one message each."""
        found = []
        for name, words in WORDS.items():
            word = getattr(self, name)
            if word not in words:
                found.append(f"{name}={word} is unknown.{did_you_mean(str(word), words)} Expected: {', '.join(words)}.")
        if self.residual_basis == NEW and self.basis_time == "after":
            found.append(
                "residual_basis=new with basis_time=after: a task's own directions are not known while it is learned. "
                "Use residual_basis=previous or old, or basis_time=before."
            )
        if not self.temperature > 0:
            found.append(f"temperature={self.temperature}: expected a number over 0.")
        if self.calibration_weight < 0:
            found.append(f"calibration_weight={self.calibration_weight}: expected a number of at least 0.")
        if not 0 <= self.confidence <= 1:
            found.append(f"confidence={self.confidence}: expected a probability, from 0 to 1.")
        return found


DEFAULTS: Mapping[str, Any] = asdict(DualChoices())


def choices_of(config: Mapping[str, Any]) -> DualChoices:
    """Return the choices that a configuration names; the others are as they are by default."""
    return DualChoices(**{name: config[name] for name in DEFAULTS if name in config})

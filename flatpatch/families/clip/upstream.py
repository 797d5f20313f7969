"""What a CLIP method's row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from flatpatch.families.base import Upstream
from flatpatch.kinds import balances

if TYPE_CHECKING:
    from flatpatch.settings import Settings


@dataclass(frozen=True)
class Design:
    """What becomes of a task's factors when the next one begins.

    Attributes:
        words: What is done, for the recipe of a run.
        trained: The factors that are trained.
        note: What must be known to read its numbers; empty for nothing.
    """

    words: str
    trained: tuple[str, ...]
    note: str = ""


DESIGNS: Mapping[str, Design] = {
    "sequential": Design("one LoRA, trained on each task from where the last one left it", ("A", "B")),
    "per_task": Design(
        "one LoRA per task, each on the pre-trained model; each is tested on every task",
        ("A", "B"),
        "row i of the accuracy matrix is the adapter of task i alone on every task. The diagonal is each adapter's own "
        "task, and what stands beside it other tasks; forgetting and backward transfer compare different adapters",
    ),
    "inflora": Design("InfLoRA's design: one LoRA per task, with A fixed and earlier updates folded in", ("B",)),
}


@dataclass(frozen=True, kw_only=True)
class ClipUpstream(Upstream):
    """A method on CLIP. The reference engine alone has any.

    Attributes:
        design: One of ``DESIGNS``.
        quick: Its own arguments in profile ``quick``.
    """

    family: ClassVar[str] = "clip"

    design: str
    profiles: tuple[str, ...] = ("quick", "record")
    quick: Mapping[str, Any] = field(default_factory=dict)

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = super().check(settings)
        trained = DESIGNS[self.design].trained
        if settings.sam != "off" and settings.scope in ("A", "B", "head") and settings.scope not in trained:
            why = "trains LoRA factors alone" if settings.scope == "head" else f"trains {', '.join(trained)} alone"
            problems.append(f"scope={settings.scope} has nothing to perturb: {self.title} {why}. Use scope=lora.")
        if balances(settings.sam) and trained == ("B",):
            problems.append(
                f"sam={settings.sam} weighs LoRA's A against its B, and {self.title} trains B alone. Use another kind "
                "of SAM."
            )
        return problems

"""What a text method's row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from flatpatch.families.base import Upstream

if TYPE_CHECKING:
    from flatpatch.settings import Settings

# The four tasks of the standard benchmark (the figures of upstream's scripts/order_N.sh, checked against them by a
# test); used where there is no upstream script to read.
STANDARD_ORDERS: Mapping[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
# Arguments that the entry scripts of this family's repositories declare and never use.
DECLARED_ALONE = ("lang", "overwrite_cache", "preprocessing_num_workers", "do_demo")
# Words that upstream's code looks for in paths, changing what it does (run_N_lora.py, uie_collator.py).
WORDS_IN_PATHS = ("adapter", "llama")


@dataclass(frozen=True, kw_only=True)
class TextUpstream(Upstream):
    """A method whose settings stand in one shell script per task order.

    Attributes:
        scripts: By order: the script.
        orders_note: What else is to be said of the orders.
        penalty: Whether its loss has a penalty beside the task's.
        unused: Arguments that its code takes and never uses.
        quick: Its own arguments in profile ``quick``.
    """

    family: ClassVar[str] = "text"
    profiles: tuple[str, ...] = ("quick", "small")

    scripts: Mapping[str, str] = field(default_factory=dict)
    orders_note: str = ""
    penalty: bool = True
    unused: tuple[str, ...] = ()
    quick: Mapping[str, float] = field(default_factory=dict)

    @property
    def orders(self) -> tuple[str, ...]:
        """The task orders it can run."""
        return tuple(self.scripts or STANDARD_ORDERS)

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = super().check(settings)
        if settings.order not in self.orders:
            problems.append(
                f"unknown order '{settings.order}' for method {self.name}. Expected: {', '.join(self.orders)}."
                + (f" {self.orders_note}" if self.orders_note else "")
            )
        if settings.sam != "off" and settings.scope == "head" and settings.profile != "small":
            problems.append(
                f"scope=head has nothing to perturb: {self.title} trains no head. "
                f"Use scope={'all' if settings.tuning == 'full' else 'lora'}."
            )
        if settings.sam != "off" and settings.ascent_loss == "task" and not self.penalty:
            problems.append(f"ascent_loss=task has no penalty to leave out in {self.title}. Leave it out.")
        folder = str((Path(settings.output) / settings.run).absolute()).lower()
        problems += [
            f"the run folder {folder} has '{word}' in its path, and upstream's code changes what it does when it sees "
            "that word in a path. Choose another folder with output=FOLDER and run=NAME."
            for word in WORDS_IN_PATHS
            if word in folder
        ]
        return problems

"""What a text method's row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flatpatch.families.base import Upstream

# The four tasks of the standard benchmark (the figures of upstream's scripts/order_N.sh, checked against them by a
# test); used where there is no upstream script to read.
STANDARD_ORDERS: Mapping[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
# Arguments that the entry scripts of this family's repositories declare and never use.
DECLARED_ALONE = ("lang", "overwrite_cache", "preprocessing_num_workers", "do_demo")


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

    scripts: Mapping[str, str] = field(default_factory=dict)
    orders_note: str = ""
    penalty: bool = True
    unused: tuple[str, ...] = ()
    quick: Mapping[str, float] = field(default_factory=dict)

    @property
    def orders(self) -> tuple[str, ...]:
        """The task orders it can run."""
        return tuple(self.scripts or STANDARD_ORDERS)

"""The supported methods: one row each, with where its settings and task orders are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The four tasks of the standard benchmark (the figures of upstream's scripts/order_N.sh, checked against them by a
# test); used where there is no upstream script to read.
STANDARD_ORDERS: Mapping[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}


@dataclass(frozen=True)
class PaperArgument:
    """An argument for which the paper and upstream's script differ."""

    orders: tuple[str, ...]
    argument: str
    value: str
    source: str


@dataclass(frozen=True)
class Method:
    """One method: its repository (if any), its scripts by order, and what its paper says differently."""

    title: str
    repository: str | None
    scripts: Mapping[str, str] = field(default_factory=dict)
    orders_note: str = ""
    paper: tuple[PaperArgument, ...] = ()
    paper_notes: tuple[str, ...] = ()

    @property
    def orders(self) -> tuple[str, ...]:
        """The task orders this method can run."""
        return tuple(self.scripts or STANDARD_ORDERS)


METHODS: Mapping[str, Method] = {
    "nlora": Method(
        title="N-LoRA",
        repository="N-LoRA",
        scripts={
            **{str(n): f"scripts/order_{n}.sh" for n in range(1, 7)},
            **{f"llama{n}": f"scripts_llama/order_{n}.sh" for n in range(1, 4)},
        },
        paper=(
            PaperArgument(
                ("1",),
                "per_device_train_batch_size",
                "32",
                "the paper (as quoted by secondary sources) trains with batch 32; scripts/order_1.sh alone says 48",
            ),
        ),
        paper_notes=(
            "the paper penalises the L1 norm of the weight update BA, the code that of the r x r product AB; "
            "the code's penalty is what runs",
        ),
    ),
    "olora": Method(
        title="O-LoRA",
        repository="O-LoRA",
        scripts={
            **{str(n): f"scripts/order_{n}.sh" for n in range(1, 4)},
            "6": "scripts/long.sh",
            **{f"llama{n}": f"scripts_llama/order_{n}.sh" for n in range(1, 4)},
        },
        orders_note="O-LoRA ships no script for orders 4 and 5; its long.sh is order 6.",
        paper_notes=(
            "the paper's orthogonality loss is a squared norm, the code sums absolute values; the code's is what runs",
            "the paper averages three runs; the scripts pass no seed, which means 42: run seeds with the sweep verb",
        ),
    ),
    "seqlora": Method(title="sequential LoRA", repository=None),
    "inclora": Method(title="incremental LoRA", repository=None),
}

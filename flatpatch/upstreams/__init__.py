"""The supported methods: one row each, with where its settings and task orders are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flatpatch.upstreams.conflicts import CONFLICTS, Conflict

# The four tasks of the standard benchmark (the figures of upstream's scripts/order_N.sh, checked against them by a
# test); used where there is no upstream script to read.
STANDARD_ORDERS: Mapping[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}


@dataclass(frozen=True)
class Method:
    """One method: its repository (if any), and where upstream keeps its settings.

    A text method has one script per task order; a vision method one JSON file per variant and benchmark.
    """

    title: str
    repository: str | None
    scripts: Mapping[str, str] = field(default_factory=dict)
    orders_note: str = ""
    vision: bool = False
    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # variant -> benchmark -> shipped file
    config_flag: tuple[str, ...] = ()  # what stands before the configuration's name on upstream's command line
    seed: int = 42  # what upstream's script or configuration runs with; checked against them by a test
    reference: bool = True  # whether there is a reference implementation
    penalty: bool = True  # text: whether its loss has a penalty beside the task's

    @property
    def orders(self) -> tuple[str, ...]:
        """The task orders a text method can run."""
        return tuple(self.scripts or STANDARD_ORDERS)

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Where paper and repository disagree."""
        return CONFLICTS.get(self.repository or "", ())

    def config(self, variant: str, benchmark: str) -> str | None:
        """Return the shipped configuration of a variant and benchmark; empty means the first. None if none ships."""
        files = self.configs.get(variant or next(iter(self.configs)), {})
        return files.get(benchmark or next(iter(files), ""))


METHODS: Mapping[str, Method] = {
    "nlora": Method(
        title="N-LoRA",
        repository="N-LoRA",
        scripts={
            **{str(n): f"scripts/order_{n}.sh" for n in range(1, 7)},
            **{f"llama{n}": f"scripts_llama/order_{n}.sh" for n in range(1, 4)},
        },
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
    ),
    "seqlora": Method(title="sequential LoRA", repository=None, penalty=False),
    "inclora": Method(title="incremental LoRA", repository=None, penalty=False),
    "inflora": Method(
        title="InfLoRA",
        repository="InfLoRA",
        vision=True,
        configs={
            **{
                variant: {
                    "cifar100": f"configs/cifar100_{variant}.json",
                    **{f"imagenet_r_{n}": f"configs/mimg{n}_{variant}.json" for n in (5, 10, 20)},
                    "domainnet": f"configs/domainnet_{variant}.json",
                }
                for variant in ("inflora", "inflorab5")
            },
            "infloraca": {
                "cifar100": "configs/cifar100_infloraca.json",
                "imagenet_r_10": "configs/mimg10_infloraca.json",
            },
        },
        config_flag=("--config",),
        seed=0,
    ),
    "cllora": Method(
        title="CL-LoRA",
        repository="CL-LoRA",
        vision=True,
        configs={
            "cllora": {
                "cifar100": "exps/cifar.json",
                "imagenet_r": "exps/inr.json",
                "imagenet_a": "exps/ina.json",
                "vtab": "exps/vtab.json",
            }
        },
        seed=1993,
        reference=False,
    ),
    "seqlora_vit": Method(title="sequential LoRA on a ViT", repository=None, vision=True, seed=0),
}

"""Records and logs for the tests of comparison: runs with a given accuracy matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from flatpatch.families.base import LoggedRun
from flatpatch.families.vision import logs
from flatpatch.families.vision.comparing import as_logged
from flatpatch.families.vision.splits import HASHES, LOGGED, list_key
from flatpatch.metrics import from_lists, summarise, to_lists
from flatpatch.report.baselines import load_baseline
from flatpatch.upstreams import UPSTREAMS
from tests.report_records import make_record

Matrix = Sequence[Sequence[float | None]]


def shifted(matrix: Matrix, points: float) -> list[list[float | None]]:
    """Return the matrix with points added to every accuracy, kept below 100."""
    return [[None if x is None else min(100.0, round(x + points, 4)) for x in row] for row in matrix]


def inflora_record(seed: int = 0, points: float = 0.0, *, source: int | None = None, **changes: Any) -> dict[str, Any]:
    """Return the record of a run that gave what InfLoRA's shipped CIFAR-100 run gave, ``points`` better.

    ``source`` is the shipped seed whose accuracies it has; default: its own.
    """
    shipped = load_baseline("inflora_cifar100")["per_seed"]
    run = next(run for run in shipped if run["seed"] == (seed if source is None else source))
    matrix = shifted(run["accuracy_matrix"], points)
    curve = [min(100.0, round(x + points, 2)) for x in run["top1_curve"]]
    settings = {
        "method": {"value": "inflora", "source": "command line"},
        "benchmark": {"value": "", "source": "default"},
        "variant": {"value": "", "source": "default"},
        "sam": {"value": "off", "source": "default"},
        "rho": {"value": 0.05, "source": "default"},
        "seed": {"value": seed, "source": "command line"},
    }
    record = make_record(
        tuple(f"{10 * i}-{10 * i + 9}" for i in range(10)),
        method="inflora",
        benchmark="cifar100",
        seeds=[seed],
        settings=settings,
        accuracy_matrix=matrix,
        metrics=summarise(from_lists(matrix), sample_weighted=curve),
    )
    return _changed(record, changes)


def imagenet_r_record(seed: int = 0, split: str | None = LOGGED, **changes: Any) -> dict[str, Any]:
    """Return the record of a run that gave what InfLoRA's shipped ImageNet-R run gave, with the hashes of a split.

    ``split`` names a known one; another word makes hashes of its own, None leaves them out.
    """
    run = next(run for run in load_baseline("inflora_imagenet_r_10")["per_seed"] if run["seed"] == seed)
    record = inflora_record(seed)
    halves = HASHES.get(split or "", {half: f"{split} {half}" for half in ("train", "test")})
    return _changed(
        record,
        {
            "benchmark": "imagenet_r_10",
            "tasks": [f"{20 * i}-{20 * i + 19}" for i in range(10)],
            "inputs": {list_key(f"imagenet-r/{half}"): value for half, value in halves.items()} if split else {},
            "accuracy_matrix": run["accuracy_matrix"],
            "metrics": summarise(from_lists(run["accuracy_matrix"]), sample_weighted=run["top1_curve"]),
            **changes,
        },
    )


def olora_record(
    points: float = 0.0, *, order: str = "1", method: str = "olora", seed: int = 42, **changes: Any
) -> Any:
    """Return the record of a run that gave what O-LoRA's shipped order-1 run gave, ``points`` better."""
    baseline = load_baseline("olora_order1")
    matrix = (
        shifted(baseline["metrics"]["accuracy_matrix"], points) if points else baseline["metrics"]["accuracy_matrix"]
    )
    accuracy = from_lists(matrix)
    curve = [float(accuracy[i, : i + 1].mean()) for i in range(4)]
    settings = make_record()["settings"] | {
        "method": {"value": method, "source": "command line"},
        "order": {"value": order, "source": "default"},
        "sam": {"value": "off", "source": "default"},
        "seed": {"value": seed, "source": "default"},
    }
    record = make_record(
        method=method,
        seeds=[seed],
        settings=settings,
        accuracy_matrix=to_lists(accuracy),
        metrics=summarise(accuracy, sample_weighted=[*curve[:-1], baseline["metrics"]["micro_final"]["mean"] + points]),
    )
    return _changed(record, changes)


def with_setting(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a copy with other values of some settings."""
    record = copy.deepcopy(record)
    for key, value in values.items():
        record["settings"][key] = {"value": value, "source": "command line"}
    return record


def logged_runs(change: Callable[[int, Matrix], Matrix] = lambda _, matrix: matrix, **settings: str) -> list[LoggedRun]:
    """Return InfLoRA's five shipped CIFAR-100 runs as a log would give them, each matrix changed."""
    baseline = load_baseline("inflora_cifar100")
    runs = []
    for number, run in enumerate(baseline["per_seed"]):
        rows = [[x for x in row if x is not None] for row in change(run["seed"], run["accuracy_matrix"])]
        same = rows == [[x for x in row if x is not None] for row in run["accuracy_matrix"]]
        runs.append(
            logs.LoggedRun(
                seed=run["seed"],
                settings={
                    **{
                        key: str(baseline["setting"][key])
                        for key in ("dataset", "model_name", "rank", "lamb", "epochs")
                    },
                    **{"init_cls": "10", "increment": "10", "shuffle": "False", "device": "[0]", **settings},
                },
                class_order=tuple(range(100)),
                groups=tuple((10 * i, 10 * i + 9) for i in range(10)),
                accuracy=tuple(tuple(row) for row in rows),
                top1_curve=tuple(run["top1_curve"]) if same else tuple(round(sum(row) / len(row), 2) for row in rows),
                with_task_curve=(),
                task_id_curve=(),
                nme_top1_curve=(),
                complete=True,
                first_line=1 + 144 * number,
            )
        )
    return [as_logged(run, [UPSTREAMS["inflora"], UPSTREAMS["cllora"]]) for run in runs]


def _changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(record | changes)

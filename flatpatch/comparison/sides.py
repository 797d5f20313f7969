"""What is compared: finished runs, runs in an upstream log, shipped runs and rows of a paper, in one form.

All accuracies go through ``flatpatch.metrics``, those of shipped runs too, so that a name means one formula.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.families.vision.logs import LoggedRun
from flatpatch.files import digest
from flatpatch.metrics import averaged_accuracy_inflora, from_lists, summarise
from flatpatch.report.baselines import load_baseline
from flatpatch.report.records import setting

Matrix = Sequence[Sequence[float | None]]

# What InfLoRA's and CL-LoRA's configurations call the data sets, where the name differs by more than its case.
_DATASETS = {"cifar224": "cifar100", "imagenetr": "imagenet_r", "imageneta": "imagenet_a"}
# Settings in a log that say where and how a run ran, not what it computed. seed, data set and shuffling are compared
# on their own.
_INCIDENTAL = {"config", "device", "prefix", "data_path", "num_workers", "seed", "dataset", "shuffle"}


@dataclass(frozen=True)
class Run:
    """One run's numbers."""

    name: str
    seed: int | None  # None where it is not known
    order: tuple[object, ...] | None  # tasks, or classes, as trained; None: upstream's own for this seed
    metrics: Mapping[str, float | None]
    accuracy: Matrix | None


def subject_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is a run of, in the form of a baseline's ``applies_to``.

    Args:
        record: A run's record.

    Returns:
        Method and order (text), or method, dataset and number of tasks (images).
    """
    method = setting(record, "variant") or record["method"]
    order = setting(record, "order")
    if order is not None:
        return {"method": method, "order": str(order)}
    # A changed class order needs no mark here: overriding upstream's configuration labels the run off-protocol.
    return {"method": method, "dataset": re.sub(r"_\d+$", "", record["benchmark"]), "tasks": len(record["tasks"])}


def subject_of_log(run: LoggedRun) -> dict[str, Any]:
    """Return what a logged run is a run of, in the form of a baseline's ``applies_to``."""
    dataset = run.settings.get("dataset", "").lower()
    method = run.settings.get("model_name", "").lower()
    subject = {"method": method, "dataset": _DATASETS.get(dataset, dataset), "tasks": len(run.task_ranges)}
    # CL-LoRA's own configurations shuffle, InfLoRA's do not.
    changed = method != "cllora" and run.settings.get("shuffle") == "True"
    return subject | ({"shuffled": True} if changed else {})


def run_of_record(name: str, record: Mapping[str, Any]) -> Run:
    """Return the numbers of a finished run."""
    seeds = record["seeds"]
    text = setting(record, "order") is not None
    return Run(
        name,
        seeds[0] if len(seeds) == 1 else None,
        tuple(record["tasks"]) if text else None,
        record["metrics"],
        record["accuracy_matrix"],
    )


def run_of_log(name: str, run: LoggedRun) -> Run:
    """Return the numbers of a complete logged run."""
    matrix = run.accuracy_matrix() if run.groups_are_tasks else None
    return Run(name, run.seed, run.class_order, _metrics(matrix, run.top1_curve), matrix)


def runs_of_baseline(name: str, baseline: Mapping[str, Any]) -> list[Run]:
    """Return the runs behind a baseline that is not a paper's."""
    if "per_seed" in baseline:
        return [
            Run(
                f"{name}, seed {run['seed']}",
                run["seed"],
                tuple(range(_classes(baseline))) if run["class_order"] == "identity" else tuple(run["class_order"]),
                _metrics(run["accuracy_matrix"], run["top1_curve"]),
                run["accuracy_matrix"],
            )
            for run in baseline["per_seed"]
        ]
    seed = baseline["seeds"][0]
    seed = seed if isinstance(seed, int) else None
    numbers = baseline["metrics"]
    if "top1_curve_mean" in numbers:  # one run, so its mean is the run's own curve
        return [Run(name, seed, None, _metrics(None, numbers["top1_curve_mean"]), None)]
    tasks = baseline["setting"]["task_order"]
    rows = [[None] * len(tasks) if row is None else row for row in numbers["accuracy_matrix"]]
    printed = [None] * (len(tasks) - 1) + [numbers["micro_final"]["mean"]]
    return [Run(name, seed, tuple(tasks), _metrics(rows, printed), rows)]


def is_source(path: Path, name: str) -> bool:
    """Return whether a log is the file of upstream's that a baseline was read from, or a copy of it.

    Args:
        path: The log.
        name: The baseline's.
    """
    source = load_baseline(name).get("source") or {}
    return bool(source) and digest(path) == source.get("sha256")


def other_settings(run: LoggedRun, baseline: Mapping[str, Any]) -> list[str]:
    """Return the settings in which a logged run differs from a shipped run, as ``name is here, there there``."""
    theirs = baseline.get("setting", {})
    return [
        f"{key} is {value}, {theirs[key]} there"
        for key, value in run.settings.items()
        if key in theirs and key not in _INCIDENTAL and str(theirs[key]) != value
    ]


def _classes(baseline: Mapping[str, Any]) -> int:
    """How many classes the tasks of a shipped vision run have: their first task, and as many steps as follow."""
    first, increment = (int(baseline["setting"][key]) for key in ("init_cls", "increment"))
    return first + increment * (int(baseline["applies_to"]["tasks"]) - 1)


def _metrics(matrix: Matrix | None, curve: Sequence[float | None]) -> dict[str, float | None]:
    if matrix is not None:
        return summarise(from_lists(matrix), sample_weighted=curve)
    return {"sample_weighted_accuracy": curve[-1], "averaged_accuracy_inflora": averaged_accuracy_inflora(curve)}

"""What is compared: finished runs, runs in an upstream log, shipped runs and rows of a paper, in one form.

All accuracies go through ``flatpatch.metrics``, those of shipped runs too, so that a name means one formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.families import of_record
from flatpatch.families.base import LoggedRun
from flatpatch.files import digest
from flatpatch.metrics import from_lists, summarise
from flatpatch.report.baselines import load_baseline

Matrix = Sequence[Sequence[float | None]]


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
        Method and order, or method, dataset and number of tasks, as its family tells runs apart.
    """
    return of_record(record).subject(record)


def run_of_record(name: str, record: Mapping[str, Any]) -> Run:
    """Return the numbers of a finished run."""
    seeds = record["seeds"]
    return Run(
        name,
        seeds[0] if len(seeds) == 1 else None,
        None if of_record(record).learns_classes else tuple(record["tasks"]),
        record["metrics"],
        record["accuracy_matrix"],
    )


def run_of_log(name: str, run: LoggedRun) -> Run:
    """Return the numbers of a complete logged run."""
    return Run(name, run.seed, run.order, _metrics(run.accuracy, run.sample_weighted), run.accuracy)


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
        if key in theirs and str(theirs[key]) != value
    ]


def _classes(baseline: Mapping[str, Any]) -> int:
    """How many classes the tasks of a shipped run have: their first task, and as many steps as follow."""
    first, increment = (int(baseline["setting"][key]) for key in ("init_cls", "increment"))
    return first + increment * (int(baseline["applies_to"]["tasks"]) - 1)


def _metrics(matrix: Matrix | None, curve: Sequence[float | None]) -> dict[str, float | None]:
    return summarise(None if matrix is None else from_lists(matrix), sample_weighted=curve)

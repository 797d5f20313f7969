"""What an image run leaves, and how it gets into the run's record."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from flatpatch import metrics
from flatpatch.errors import FlatpatchError
from flatpatch.families.vision.logs import LoggedRun, read_cllora_log, read_inflora_log
from flatpatch.families.vision.planning import QUICK_DATASET, VisionPlan
from flatpatch.runner.record import read_json

LOGS = "logs"  # in the work folder: where upstream, and the reference engine, write what they measured
RESULTS = "results.json"  # of the reference engine
MODELS = "models"  # in the process's folder: what the hooks keep of upstream's network after each task
EVEN_TESTS = ("cifar100", "cifar224", QUICK_DATASET)  # as many test images of every class
_ROUNDING = 0.01 + 1e-9  # percent: the total and the accuracies are each printed with two decimals
_TIME = re.compile(r"\[trainer\.py\] => Time:([\d.]+)")


def result_file(plan: VisionPlan) -> Path:
    """Return the file that holds the accuracies.

    Raises:
        FlatpatchError: If upstream wrote no log, or several.
    """
    folder = plan.folder / "work" / LOGS
    if plan.engine == "reference":
        return folder / RESULTS
    logs = sorted(folder.rglob("*.log"))
    if len(logs) != 1:
        raise FlatpatchError(f"{folder} holds {len(logs)} logs of upstream's (expected one): not the run asked for.")
    return logs[0]


def collect(plan: VisionPlan, record: dict[str, Any]) -> None:
    """Put the accuracies of a finished run into its record.

    Raises:
        FlatpatchError: If they are not those of the tasks planned.
    """
    size = len(plan.classes)
    if plan.engine == "reference":
        results = read_json(result_file(plan))
        matrix, curve = results["accuracy_matrix"], results["top1_curve"]
        record["timing"]["train_seconds"] = results["train_seconds"]
    else:
        run = _the_run(plan)
        matrix, curve = run.accuracy_matrix(), list(run.top1_curve)
        seconds = [float(text) for text in _TIME.findall(result_file(plan).read_text(encoding="utf-8"))]
        if len(seconds) == 2 * size:  # InfLoRA's trainer prints one for training, one for testing; CL-LoRA's none
            record["timing"]["train_seconds"], record["timing"]["predict_seconds"] = seconds[::2], seconds[1::2]
    if len(matrix) != size or len(curve) != size:
        raise FlatpatchError(f"{result_file(plan)} has results of {len(curve)} tasks, expected {size}.")
    accuracy = metrics.from_lists(matrix)
    record["accuracy_matrix"] = metrics.to_lists(accuracy)
    record["metrics"] = metrics.summarise(accuracy, sample_weighted=curve)


def named_steps(plan: VisionPlan, texts: list[str]) -> list[str]:
    """Return the steps' lines with each task under its name in the record; the hooks only count them, from 1."""
    counted = {f"task {number}": name for number, name in enumerate(plan.task_names, 1)}
    steps = [json.loads(line) for text in texts for line in text.splitlines()]
    return [json.dumps({**step, "task": counted.get(step["task"], step["task"])}) + "\n" for step in steps]


def _the_run(plan: VisionPlan) -> LoggedRun:
    path = result_file(plan)
    runs = read_inflora_log(path) if plan.request.settings.method == "inflora" else read_cllora_log(path)
    seed = plan.request.settings.seed
    if len(runs) != 1 or runs[0].seed != seed or not runs[0].complete:
        found = ", ".join(f"seed {run.seed}, {len(run.accuracy)} tasks" for run in runs) or "none"
        raise FlatpatchError(f"{path} does not hold the one whole run of seed {seed} (found: {found}).")
    if runs[0].task_ranges != plan.classes:
        raise FlatpatchError(f"{path} has tasks {runs[0].task_ranges}, expected {plan.classes}.")
    even = len({last - first for first, last in plan.classes}) == 1
    _check_curve(path, runs[0], even and plan.config["dataset"].lower() in EVEN_TESTS)
    return runs[0]


def _check_curve(path: Path, run: LoggedRun, equal_tests: bool) -> None:
    """A total that cannot come from its tasks' accuracies would mean that the log was misread."""
    for total, row in zip(run.top1_curve, run.accuracy, strict=True):
        known = [value for value in row if value is not None]
        if not (math.floor(min(known)) <= total <= math.ceil(max(known))):
            raise FlatpatchError(f"{path}: the total {total} does not lie among its tasks' accuracies {known}.")
        mean = sum(known) / len(known)
        if equal_tests and abs(total - mean) > _ROUNDING:
            raise FlatpatchError(
                f"{path}: the total {total} is not the mean {mean:.3f} of its tasks' accuracies {known}."
            )

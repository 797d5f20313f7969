"""What an image run leaves, and the accuracies in it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from flatpatch.errors import FlatpatchError
from flatpatch.families.base import Plan, Results
from flatpatch.families.vision.logs import LoggedRun, read_log
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.files import read_json

CONFIG = "flatpatch-config.json"  # the changed copy of upstream's configuration, in the work folder
PROCESS = "all"  # the folder of the one process, in the run's tasks/
MODELS = "models"  # in that folder: what the hooks keep of upstream's network after each task
LOGS = "logs"  # in the work folder: where upstream, and the reference engine, write what they measured
RESULTS = "results.json"  # of the reference engine, in there
QUICK_DATASET = "flatpatch_quick"  # the name under which the hooks give upstream our images
_ROUNDING = 0.01 + 1e-9  # percent: the total and the accuracies are each printed with two decimals
_TIME = re.compile(r"\[trainer\.py\] => Time:([\d.]+)")


def collect(plan: Plan, stages: int) -> Results:
    """Read the accuracies of a finished run; see :class:`flatpatch.families.base.Family`."""
    path = result_file(plan)
    train_seconds: list[float] = []
    predict_seconds: list[float] = []
    if plan.engine == "reference":
        results = read_json(path)
        matrix, curve, train_seconds = results["accuracy_matrix"], results["top1_curve"], results["train_seconds"]
    else:
        run = _the_run(plan, path)
        matrix, curve = run.accuracy_matrix(), list(run.top1_curve)
        seconds = [float(text) for text in _TIME.findall(path.read_text(encoding="utf-8"))]
        if len(seconds) == 2 * len(plan.tasks):  # where the trainer prints one for training and one for testing
            train_seconds, predict_seconds = seconds[::2], seconds[1::2]
    if not len(matrix) == len(curve) == len(plan.tasks):
        raise FlatpatchError(f"{path} has results of {len(curve)} tasks, expected {len(plan.tasks)}.")
    return Results(matrix, curve, train_seconds, predict_seconds)


def result_file(plan: Plan) -> Path:
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


def _the_run(plan: Plan, path: Path) -> LoggedRun:
    config = json.loads(plan.files[CONFIG])
    runs = read_log(path, config["model_name"])
    seed = plan.request.settings.seed
    if len(runs) != 1 or runs[0].seed != seed or not runs[0].complete:
        found = ", ".join(f"seed {run.seed}, {len(run.accuracy)} tasks" for run in runs) or "none"
        raise FlatpatchError(f"{path} does not hold the one whole run of seed {seed} (found: {found}).")
    ranges = runs[0].task_ranges
    if tuple(f"{first}-{last}" for first, last in ranges) != plan.tasks:
        raise FlatpatchError(f"{path} has tasks {ranges}, expected {', '.join(plan.tasks)}.")
    even = len({last - first for first, last in ranges}) == 1
    # As many test images of every class, so that tasks of as many classes weigh the same.
    assert isinstance(plan.upstream, VisionUpstream)
    even_tests = config["dataset"] == QUICK_DATASET or plan.upstream.datasets[config["dataset"].lower()].even
    _check_curve(path, runs[0], even and even_tests)
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

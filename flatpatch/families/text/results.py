"""Read the result files that N-LoRA's and O-LoRA's scripts write into an accuracy matrix.

Each step leaves ``<outputs>/<step>-<dataset>/all_results.json`` (steps counted from 1), a flat object with

- ``predict_exact_match_for_<dataset>``: percent of that dataset's test samples answered exactly,
- ``predict_exact_match``: the same over all test samples of the datasets seen so far: the sample-weighted
  average. It is what the scripts print; it differs from the papers' task mean when test sets differ in size,
- ``predict_samples``, ``train_samples``, ``train_runtime``, ``predict_runtime`` (seconds).

The keys for task groups (``predict_exact_match_for_TC``) are not datasets and are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatpatch import metrics
from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.base import Plan, Results

RESULT_FILE = "all_results.json"
SAMPLE_WEIGHTED = "predict_exact_match"
DATASET_PREFIX = "predict_exact_match_for_"


@dataclass(frozen=True, eq=False)
class TextResults:
    """What upstream measured after each step; None (NaN in the matrix) where it did not.

    ``task_mean`` and ``sample_weighted`` are upstream's two averages: the papers' average accuracy, and the
    ``predict_exact_match`` that the scripts print.
    """

    tasks: tuple[str, ...]
    accuracy: NDArray[np.float64]  # (T, T) percent, read-only
    sample_weighted: tuple[float | None, ...]  # (T,) percent
    task_mean: tuple[float | None, ...]  # (T,) percent
    samples: tuple[int | None, ...]  # (T,) test samples of all tasks seen
    train_samples: tuple[int | None, ...]  # (T,)
    train_seconds: tuple[float | None, ...]  # (T,)
    predict_seconds: tuple[float | None, ...]  # (T,)


def collect(plan: Plan, stages: int) -> Results:
    """Read what the first stages of a run left; see :class:`flatpatch.families.base.Family`."""
    outputs = (plan.folder / "work" / plan.stages[0].output).parent
    found = read_results(outputs, plan.tasks, partial=True)
    return Results(
        accuracy=metrics.to_lists(found.accuracy),
        sample_weighted=found.sample_weighted,
        train_seconds=found.train_seconds,
        predict_seconds=found.predict_seconds,
    )


def read_results(outputs: Path, tasks: Sequence[str], *, partial: bool = False) -> TextResults:
    """Read every step's result file of one run.

    Args:
        outputs: Folder that holds the steps' folders ``1-<first task>``, ``2-<second task>``, ...
        tasks: Dataset names in training order.
        partial: Accept steps without results, and results without predictions (a step still running, or
            one that was stopped). A file that is there must still be sound.

    Returns:
        The accuracy matrix, upstream's two averages, sample counts and runtimes.

    Raises:
        UserError: If the folder is missing, holds other tasks or another order, or a step's results are
            missing (unless ``partial``), damaged, or lack a dataset. All problems are named at once.
    """
    outputs = Path(outputs)
    names = tuple(tasks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be distinct names, at least one; got {list(names)}.")
    if not outputs.is_dir():
        if partial and not outputs.exists():
            return _collect(names, [{} for _ in names])
        raise UserError(f"no results folder {outputs}. Expected it to hold {_folder(0, names)}/{RESULT_FILE}.")
    _check_order(outputs, names)
    problems = []
    steps: list[dict[str, Any]] = []
    for i in range(len(names)):
        path = outputs / _folder(i, names) / RESULT_FILE
        steps.append({})
        if partial and not path.exists():
            continue
        try:
            steps[i] = read_task_results(path)
            _check_predictions(path, steps[i], names[: i + 1], partial)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return _collect(names, steps)


def read_task_results(path: Path) -> dict[str, Any]:
    """Read one step's result file and check that its accuracies, counts and seconds are sound.

    Args:
        path: An ``all_results.json``.

    Returns:
        The file's object, as it is.

    Raises:
        UserError: If the file is missing, empty, cut short, no JSON object, or holds a number that cannot be.
    """
    path = Path(path)
    again = "Run that task again."
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no result file {path}: the task has not finished, or failed before its results.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}. {again}") from None
    if not text.strip():
        raise UserError(f"{path} is empty: the task was stopped while writing it. {again}")
    try:
        results = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is cut short or not JSON ({error}). {again}") from None
    if not isinstance(results, dict):
        raise UserError(f"{path} holds a {type(results).__name__}, expected an object of result names and numbers.")
    problems = [
        f"{path}: {key} is {results[key]!r}, expected {expected}. {again}"
        for key in results
        if (expected := _expectation(key)) and not _fits(results[key], key)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return results


def _folder(i: int, tasks: Sequence[str]) -> str:
    return f"{i + 1}-{tasks[i]}"


def _check_order(outputs: Path, tasks: Sequence[str]) -> None:
    """Refuse results of other tasks: a matrix read in the wrong order would look plausible."""
    found = [(int(match[1]), match[0]) for p in outputs.iterdir() if (match := re.fullmatch(r"(\d+)-.+", p.name))]
    expected = {_folder(i, tasks) for i in range(len(tasks))}
    strange = [name for _, name in sorted(found) if name not in expected]
    if strange:
        raise UserError(
            f"{outputs} holds results of other tasks or another order: {', '.join(strange)}. "
            f"Expected {', '.join(_folder(i, tasks) for i in range(len(tasks)))}. "
            f"Name the order these results were made with, or choose another folder."
        )


def _check_predictions(path: Path, results: Mapping[str, Any], seen: Sequence[str], partial: bool) -> None:
    datasets = [key.removeprefix(DATASET_PREFIX) for key in results if key.startswith(DATASET_PREFIX)]
    if SAMPLE_WEIGHTED not in results and not datasets:
        if partial:
            return
        raise UserError(f"{path} has no predictions: it was trained, but {SAMPLE_WEIGHTED} is missing. Predict again.")
    known = ", ".join(datasets) or "none"
    problems = [
        f"{path} has no {DATASET_PREFIX}{task}.{did_you_mean(task, datasets)} It has: {known}."
        for task in seen
        if task not in datasets
    ]
    if SAMPLE_WEIGHTED not in results:
        problems.append(f"{path} has no {SAMPLE_WEIGHTED}, the sample-weighted average. Run that task again.")
    if problems:
        raise UserError("\n".join(problems))


def _expectation(key: str) -> str:
    if key == SAMPLE_WEIGHTED or key.startswith(DATASET_PREFIX):
        return "a percentage from 0 to 100"
    if key in ("predict_samples", "train_samples"):
        return "a whole number"
    if key in ("predict_runtime", "train_runtime"):
        return "a number of seconds"
    return ""


def _fits(value: object, key: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not math.isfinite(value) or value < 0:
        return False
    if key.endswith("_samples"):
        return isinstance(value, int)
    return key.endswith("_runtime") or value <= 100


def _collect(tasks: tuple[str, ...], steps: Sequence[Mapping[str, Any]]) -> TextResults:
    accuracy = np.array(
        [[step.get(DATASET_PREFIX + task, math.nan) for task in tasks] for step in steps], dtype=np.float64
    )
    accuracy.setflags(write=False)
    seen_means = [accuracy[i, : i + 1].mean() for i in range(len(tasks))]
    return TextResults(
        tasks=tasks,
        accuracy=accuracy,
        sample_weighted=tuple(step.get(SAMPLE_WEIGHTED) for step in steps),
        task_mean=tuple(None if math.isnan(mean) else float(mean) for mean in seen_means),
        samples=tuple(step.get("predict_samples") for step in steps),
        train_samples=tuple(step.get("train_samples") for step in steps),
        train_seconds=tuple(step.get("train_runtime") for step in steps),
        predict_seconds=tuple(step.get("predict_runtime") for step in steps),
    )

"""A hypothesis's quantity, read from one run: a number for each of its tasks, or one for the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flatpatch.errors import UserError, did_you_mean
from flatpatch.measurement.files import GIVEN_BY, VALUES
from flatpatch.measuring import AT_LOSS, UPDATE, WHENS
from flatpatch.metrics import METRICS, summarise
from flatpatch.report.records import RECORD_FILE, read_record
from flatpatch.report.verdicts import AS_RECORDED
from flatpatch.studies.planning import Cell
from flatpatch.studies.schema import EACH, OTHERS, Quantity, Side

WHOLE = ""  # stands for the task where the number is one of the run


class Reader(Protocol):
    """Gives numbers of runs: those that their records hold, or what a plan says that they will hold."""

    def values(self, quantity: Quantity, cell: Cell) -> Mapping[str, float | None]:
        """Return the quantity's numbers by task, before ``reduce`` and the choice of a task."""


def of_side(quantity: Quantity, side: Side, arm: str) -> Quantity:
    """Return the quantity with what a side has of its own, measured in an arm's way."""
    names = ("value", "as_recorded", "scope", "when", "task", "reduce")
    given = {key: value for key in names if (value := getattr(side, key)) is not None}
    if side.value is not None:  # another value than the quantity's is not as recorded by what stands for that
        given.setdefault("as_recorded", None)
    own = quantity.model_copy(update=given)
    return own.model_copy(update={"value": own.as_recorded}) if arm == AS_RECORDED else own


def in_words(quantity: Quantity) -> str:
    """Return what a quantity is, in words."""
    if quantity.metric is not None:
        text = METRICS[quantity.metric].words.title if quantity.metric in METRICS else quantity.metric
    elif quantity.accuracy is not None:
        text = {
            "last": "accuracy after the last task",
            "own": "accuracy right after a task's own training",
            "others": "mean accuracy on all other tasks right after a task's training",
        }[quantity.accuracy]
    else:
        text = VALUES.get(str(quantity.value), str(quantity.value))
        parts = [f"over {quantity.scope}" if quantity.scope else "", _WHEN.get(quantity.when or "", "")]
        text = " ".join(filter(None, (text, *parts)))
    if quantity.task != EACH:
        text += {"first": ", first task", "last": ", last task", OTHERS: ", mean of the other tasks"}.get(
            quantity.task, f", {quantity.task}"
        )
    text += {"mean": "", "spread": ", spread over tasks", "seed_spread": ", spread over seeds"}[quantity.reduce]
    return f"{text}, log2" if quantity.scale == "log2" else text


_WHEN = {"before": "before training", "after": "after training", "at_loss": "at equal training loss"}


class Records:
    """The records of a study's runs, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, Mapping[str, Any] | None] = {}

    def of(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return a run's record; None where it has none."""
        folder = cell.plan.folder
        if folder not in self._known:
            self._known[folder] = read_record(folder) if (folder / RECORD_FILE).is_file() else None
        return self._known[folder]


@dataclass
class Recorded:
    """Reads what finished runs left.

    Attributes:
        records: Their records.
        missing: Gets a sentence for each number that is not there.
    """

    records: Records
    missing: dict[str, None] = field(default_factory=dict)

    def values(self, quantity: Quantity, cell: Cell) -> Mapping[str, float | None]:
        """Return the quantity's numbers by task."""
        record = self.records.of(cell)
        name = cell.plan.folder.name
        if record is None or record["status"] != "finished":
            self.missing[f"{name}: {'not there' if record is None else record['status']}"] = None
            return {}
        found = {task: _scaled(number, quantity) for task, number in _numbers(quantity, record).items()}
        for task, number in found.items():
            if number is None:
                self.missing[f"{name}: no {in_words(quantity)}{f', {task}' if task else ''}"] = None
        return found


def _numbers(quantity: Quantity, record: Mapping[str, Any]) -> dict[str, float | None]:
    if quantity.metric is not None:
        return {WHOLE: record["metrics"].get(quantity.metric)}
    tasks: Sequence[str] = record["tasks"]
    if quantity.accuracy is not None:
        return dict(zip(tasks, _accuracies(quantity.accuracy, record["accuracy_matrix"]), strict=True))
    entries = {
        entry["task"]: entry
        for entry in record["flatness"]
        if (entry["scope"], entry["when"]) == (quantity.scope, quantity.when)
    }
    return {task: _measured(entries.get(task), str(quantity.value)) for task in tasks}


def _measured(entry: Mapping[str, Any] | None, name: str) -> float | None:
    if entry is None:
        return None
    number: float | None = entry["loss"] if name == "loss" else entry["values"].get(name)
    return number


def _accuracies(kind: str, rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    if kind == "last":
        return list(rows[-1])
    if kind == "own":
        return [row[index] for index, row in enumerate(rows)]
    return [_mean([number for j, number in enumerate(row) if j != i]) for i, row in enumerate(rows)]


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(numbers) else None


def _scaled(number: float | None, quantity: Quantity) -> float | None:
    if number is None or quantity.scale == "plain":
        return number
    return math.log2(number) if number > 0 else None


@dataclass
class Planned:
    """Reads what runs will hold by their plans; every number is 1.

    Attributes:
        problems: Gets a sentence for each number that no record will hold.
    """

    problems: dict[str, None] = field(default_factory=dict)

    def values(self, quantity: Quantity, cell: Cell) -> Mapping[str, float | None]:
        """Return 1 for every task."""
        tasks = cell.plan.tasks
        if quantity.metric is not None:
            if not _can_be_made(quantity.metric, len(tasks)):
                self.problems[f"runs {cell.name!r} have too few tasks, {len(tasks)}, for {quantity.metric}"] = None
            return {WHOLE: 1.0}
        if quantity.accuracy == "others" and len(tasks) == 1:
            self.problems[f"runs {cell.name!r} have one task, and no accuracy on others"] = None
        if quantity.value is not None and (problem := self._not_measured(quantity, cell)):
            self.problems[problem] = None
        if quantity.task not in (EACH, "first", "last", OTHERS, *tasks):
            hint = did_you_mean(quantity.task, tasks)
            self.problems[
                f"{cell.plan.folder.name} has no task {quantity.task!r}.{hint} It has: {', '.join(tasks)}"
            ] = None
        return dict.fromkeys(tasks, 1.0)

    def _not_measured(self, quantity: Quantity, cell: Cell) -> str:
        """Say why a value will not be there, or return an empty string."""
        asked = cell.plan.request.settings.measuring
        kind = kind_of(str(quantity.value))
        if asked is None:
            return f"runs {cell.name!r} measure nothing, and {quantity.value} needs {kind}"
        if kind not in asked.kinds:
            return f"runs {cell.name!r} do not measure {kind}, which gives {quantity.value}: they measure " + ", ".join(
                asked.kinds
            )
        if problem := _never_there(quantity, cell.plan.tasks):
            return problem
        if quantity.value == MOVED and BEFORE not in asked.when:
            return f"runs {cell.name!r} are not measured before their tasks, and {quantity.value} needs it"
        if str(quantity.value).startswith("factor_") and cell.plan.request.settings.tuning != "lora":
            return f"runs {cell.name!r} train no LoRA, and {quantity.value} is of its factors"
        if quantity.scope not in asked.scopes:
            return (
                f"runs {cell.name!r} do not measure over scope {quantity.scope!r}: expected {', '.join(asked.scopes)}"
            )
        times = (*asked.when, *((AT_LOSS,) if asked.at_loss else ()))
        if quantity.when not in times:
            return f"runs {cell.name!r} do not measure at the time {quantity.when!r}: expected {', '.join(times)}"
        return ""


def _can_be_made(metric: str, num_tasks: int) -> bool:
    """Return whether a metric has a value where everything is known of so many tasks."""
    known = [50.0] * num_tasks
    return summarise([known] * num_tasks, sample_weighted=known, random_accuracy=known)[metric] is not None


MOVED, BEFORE, AFTER = "distance_moved", *WHENS
_OVERLAPS = ("update_column_overlap", "update_row_overlap")
_OF_MATRICES = ("update_entropy_rank", "update_stable_rank", *_OVERLAPS)


def _never_there(quantity: Quantity, tasks: Sequence[str]) -> str:
    """Say why no run has a value over this scope, at this time or of this task, or return an empty string."""
    value, of_update = str(quantity.value), kind_of(str(quantity.value)) == UPDATE
    if quantity.scope == "tangent" and (value == MOVED or of_update):
        return f"scope 'tangent' has no {value}: its directions at two times are not the same. Take 'merged'"
    if quantity.scope != "merged" and value in _OF_MATRICES:
        return f"scope {quantity.scope!r} has no {value}, which is of whole matrices. Take 'merged'"
    if quantity.scope == "merged" and value.startswith("factor_"):
        return f"scope 'merged' has no {value}: its matrices are not split into factors. Take 'adapter' or 'tangent'"
    if of_update and quantity.when != AFTER:
        return f"{value} is of a task's whole training: it is measured {AFTER!r}, not {quantity.when!r}"
    if value == MOVED and quantity.when == BEFORE:
        return f"nothing has moved before a task's training: {value} is measured {AFTER!r}"
    if value in _OVERLAPS and (quantity.task in ("first", OTHERS, tasks[0]) or len(tasks) == 1):
        return f"the first task has no {value}, as no update was before it. Take a later task, or all of them"
    return ""


def kind_of(value: str) -> str:
    """Return the kind of measurement that gives a value; empty where none does."""
    return next((kind for kind, names in GIVEN_BY.items() if value in names), "")


def wrong_names(quantity: Quantity) -> list[str]:
    """Return which of the names in a quantity nothing has."""
    problems = []
    if quantity.metric is not None and quantity.metric not in METRICS:
        hint = did_you_mean(quantity.metric, METRICS)
        problems.append(f"unknown metric {quantity.metric!r}.{hint} Expected: {', '.join(METRICS)}")
    for name in (quantity.value, quantity.as_recorded):
        if name is not None and not kind_of(name):
            names = [each for given in GIVEN_BY.values() for each in given]
            hint = did_you_mean(name, names)
            problems.append(f"unknown measured value {name!r}.{hint} docs/studies.md lists them all.")
    return problems


def reduced(
    numbers: Mapping[str, float | None], quantity: Quantity, others_than: str | None
) -> dict[str, float | None]:
    """Choose among a run's tasks, or take them together.

    Args:
        numbers: By task.
        quantity: Says how.
        others_than: The task that the opposite side names, for ``others``.

    Raises:
        UserError: If the other tasks are asked for, and the opposite side names none.
    """
    tasks = list(numbers)
    if tasks == [WHOLE] or not tasks:
        return dict(numbers)
    if quantity.task == OTHERS:
        if others_than in (None, EACH, OTHERS):
            raise UserError("task 'others' needs a task that the opposite side names")
        named = {"first": tasks[0], "last": tasks[-1]}.get(str(others_than), others_than)
        return {WHOLE: _mean([number for task, number in numbers.items() if task != named])}
    if quantity.task != EACH:
        named = {"first": tasks[0], "last": tasks[-1]}.get(quantity.task, quantity.task)
        return {WHOLE: numbers.get(named)}
    if quantity.reduce == "spread":
        known = [number for number in numbers.values() if number is not None]
        whole = len(known) == len(tasks) > 1
        return {WHOLE: float(np.std(known, ddof=1)) if whole else None}
    return dict(numbers)

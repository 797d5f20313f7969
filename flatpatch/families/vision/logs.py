"""Read the logs that the trainers of this family's repositories write.

A log line is ``<time> [<file>] => <message>``. A run opens with its settings, ``<name>: <value>`` each, and the class
order. After each task come ``CNN: {...}``, a dictionary of accuracies in percent rounded to two decimals, and the
curve of its ``total`` so far. One file may hold several runs: Python's logging keeps the first file it was given,
so all the seeds of one call land in the first seed's log, and later calls append to it.

``total`` is over all test images of the classes seen, so it weighs tasks by their test sets. The other groups are
blocks of classes, ``'00-09'`` and so on, of a fixed width. They are the tasks only where every task is as wide as
that; InfLoRA also leaves out a last block of one class. ``LoggedRun.groups_are_tasks`` says whether they agree.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError

# Searched for, not matched: in a terminal's output a progress bar may stand before it on the same line.
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[(?P<file>[\w.]+)\] => (?P<message>.*)")
_SETTING = re.compile(r"(?P<key>\w+): ?(?P<value>.*)")
_GROUP = re.compile(r"(\d+)-(\d+)")
_ACCURACIES = ("CNN", "NME")
# numpy 2 prints its numbers with their type.
_TYPED_NUMBER = re.compile(r"np\.\w+\(([^()]*)\)")


@dataclass(frozen=True)
class LoggedRun:
    """One run of an upstream trainer, as far as its log goes. T is the number of tasks done."""

    seed: int
    settings: dict[str, str]  # as printed
    class_order: tuple[int, ...] | None  # upstream's class number at each place; None if not reached
    groups: tuple[tuple[int, int], ...]  # first and last class of the groups of the last row
    accuracy: tuple[tuple[float | None, ...], ...]  # T rows of percent per group; None for a group without images
    top1_curve: tuple[float, ...]  # (T,) percent over all test images of the classes seen
    with_task_curve: tuple[float, ...]  # (T,) percent with the task known; may lack its end in a killed run
    task_id_curve: tuple[float, ...]  # (T,) share, 0 to 1, of images whose predicted class is of the right task
    nme_top1_curve: tuple[float, ...]  # (T,) percent of CL-LoRA's nearest-mean classifier; empty if it has none
    complete: bool  # every task of the class order was evaluated
    first_line: int  # in the file, from 1

    @property
    def task_ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last class of every task, done or not, as upstream's data manager cuts the class order."""
        if self.class_order is None:
            return ()
        first, increment = (int(self.settings[key]) for key in ("init_cls", "increment"))
        starts = [0]
        while starts[-1] < (size := len(self.class_order)):
            starts.append(min(starts[-1] + (first if len(starts) == 1 else increment), size))
        return tuple((start, end - 1) for start, end in zip(starts, starts[1:], strict=False))

    @property
    def groups_are_tasks(self) -> bool:
        """Whether the printed groups are the tasks done so far; the last group's label may reach past the classes."""
        tasks = self.task_ranges[: len(self.groups)]
        return len(self.groups) == len(self.accuracy) and all(
            group[0] == task[0] and (group[1] == task[1] or (task == self.task_ranges[-1] and group[1] > task[1]))
            for group, task in zip(self.groups, tasks, strict=True)
        )

    def accuracy_matrix(self) -> list[list[float | None]]:
        """Return the accuracy after each task (row) on each task (column), percent, None where not evaluated.

        Returns:
            A square matrix over all the tasks, also those a killed run did not reach.

        Raises:
            ValueError: If the printed groups are not the tasks.
        """
        if not self.groups_are_tasks:
            raise ValueError(
                f"the log's groups of classes are not its tasks (groups {_ranges(self.groups)}, "
                f"tasks {_ranges(self.task_ranges)}), so it holds no accuracy per task."
            )
        size = len(self.task_ranges)
        rows = [[*row, *[None] * (size - len(row))] for row in self.accuracy]
        return rows + [[None] * size for _ in range(size - len(rows))]


def read_log(path: Path, model: str = "") -> list[LoggedRun]:
    """Read every run in a log of an upstream trainer, in the file's order.

    Args:
        path: The log; an empty one (of a later seed of the same call) holds no run.
        model: The ``model_name`` that all of its runs must have; empty for any.

    Returns:
        The runs; those cut short have ``complete`` False.

    Raises:
        UserError: If the file cannot be read, has a run of another model, or a line of it is damaged; names file and
            line.
    """
    runs = _read(Path(path))
    for run in runs:
        name = run.settings.get("model_name", "")
        if model and name.lower() != model.lower():
            raise UserError(f"{path}, line {run.first_line}: a run of model '{name}', expected '{model}'.")
    return runs


@dataclass
class _Open:
    """A run while its lines are read."""

    first_line: int
    settings: dict[str, str] = field(default_factory=dict)
    reading_settings: bool = True
    class_order: tuple[int, ...] | None = None
    rows: list[dict[str, float | None]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)


class _DamagedError(Exception):
    """What is wrong with a line."""


def _read(path: Path) -> list[LoggedRun]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {number}: not text ({error.reason}). Take the log from upstream again."
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}.") from None
    lines = text.split("\n")  # not splitlines: a progress bar's \r does not end a line
    runs: list[_Open] = []
    for number, line in enumerate(lines, start=1):
        if not (found := _LINE.search(line)):
            continue
        try:
            _take(runs, number, found["file"], found["message"].rstrip())
        except _DamagedError as problem:
            if number == len(lines):  # without its end: the run was killed while writing it
                break
            raise UserError(
                f"{path}, line {number}: {problem}. The log is damaged; take it from upstream again."
            ) from None
    return [_close(run, path) for run in runs]


def _take(runs: list[_Open], number: int, file: str, message: str) -> None:
    setting = _SETTING.fullmatch(message) if file == "trainer.py" else None
    if setting and setting["key"] not in (*_ACCURACIES, "Time"):
        if not runs or not runs[-1].reading_settings or setting["key"] in runs[-1].settings:
            runs.append(_Open(number))
        runs[-1].settings[setting["key"]] = setting["value"].strip()
        return
    if not runs:
        if any(message.startswith(f"{name}: ") for name in _ACCURACIES):
            raise _DamagedError("results of a run whose settings are missing")
        return
    run = runs[-1]
    run.reading_settings = False
    if file == "data_manager.py" and message.startswith("["):
        run.class_order = _class_order(message)
    elif message.startswith("CNN: "):
        run.rows.append(_accuracies(message.removeprefix("CNN: ")))
    elif message.startswith("NME: "):
        run.curves.setdefault("NME", []).append(_total(_accuracies(message.removeprefix("NME: "))))
    elif message.startswith("CNN top1 curve: "):
        printed, totals = _numbers(message), [_total(row) for row in run.rows]
        if printed != totals:
            raise _DamagedError(f"the curve {printed} is not that of the accuracies printed before it, {totals}")
    elif message.startswith("CNN top1 with task curve: "):
        run.curves["with task"] = _numbers(message)
    elif message.startswith("CNN top1 task curve: "):
        run.curves["task id"] = _numbers(message)
    elif message.startswith("Task acc: "):
        run.curves.setdefault("with task", []).append(_number(message))
    elif message.startswith("Task correct: "):
        run.curves.setdefault("task id", []).append(_number(message) / 100)


def _close(run: _Open, path: Path) -> LoggedRun:
    groups: dict[str, tuple[int, int]] = {
        key: (int(match[1]), int(match[2]))
        for key in (run.rows[-1] if run.rows else {})
        if (match := _GROUP.fullmatch(key))
    }
    try:
        seed = int(run.settings["seed"])
        result = LoggedRun(
            seed=seed,
            settings=run.settings,
            class_order=run.class_order,
            groups=tuple(groups.values()),
            accuracy=tuple(tuple(value for key, value in row.items() if _GROUP.fullmatch(key)) for row in run.rows),
            top1_curve=tuple(_total(row) for row in run.rows),
            with_task_curve=tuple(run.curves.get("with task", ())),
            task_id_curve=tuple(run.curves.get("task id", ())),
            nme_top1_curve=tuple(run.curves.get("NME", ())),
            complete=False,
            first_line=run.first_line,
        )
        tasks = len(result.task_ranges)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}, line {run.first_line}: the run that starts here lacks a sound setting ({error}); expected "
            "whole numbers for seed, init_cls and increment."
        ) from None
    if tasks and len(run.rows) > tasks:
        raise UserError(
            f"{path}, line {run.first_line}: the run that starts here has results of {len(run.rows)} tasks, but its "
            f"settings make {tasks}."
        )
    return LoggedRun(**{**vars(result), "complete": 0 < tasks == len(run.rows)})


def _literal(text: str) -> Any:
    text = _TYPED_NUMBER.sub(r"\1", text)
    try:
        return ast.literal_eval(re.sub(r"\bnan\b", "None", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise _DamagedError(f"{_short(text)} cannot be read") from None


def _class_order(text: str) -> tuple[int, ...]:
    order = _literal(text)
    if not isinstance(order, list) or sorted(order, key=str) != sorted(range(len(order)), key=str):
        raise _DamagedError(f"the class order {_short(text)} does not hold every class once")
    return tuple(order)


def _accuracies(text: str) -> dict[str, float | None]:
    found = _literal(text)
    if not isinstance(found, dict) or "total" not in found:
        raise _DamagedError(f"{_short(text)} is not a dictionary of accuracies with a total")
    for key, value in found.items():
        if value is not None or key == "total":
            found[key] = _percent(value)
    return found


def _total(row: dict[str, float | None]) -> float:
    value = row["total"]
    assert value is not None  # _accuracies saw to it
    return value


def _numbers(message: str) -> list[float]:
    values = _literal(message.partition(": ")[2])
    if not isinstance(values, list):
        raise _DamagedError(f"{_short(message)} is not a list of numbers")
    return [_percent(value) for value in values]


def _number(message: str) -> float:
    return _percent(_literal(message.partition(": ")[2]))


def _percent(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise _DamagedError(f"{_short(str(value))} is not a percentage")
    return float(value)


def _ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    return " ".join(f"{first}-{last}" for first, last in ranges)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

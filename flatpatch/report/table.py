"""A run's results as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flatpatch.families import of_record
from flatpatch.metrics import METRICS
from flatpatch.report.flatness_run import flatness_table
from flatpatch.report.ledger import ledger_table
from flatpatch.report.titles import describe, warning

_NUMBER_WIDTH = len("100.00")


def summary_table(record: Mapping[str, Any], folder: Path | None = None, *, width: int = 80) -> str:
    """Return a run's results in lines of at most ``width`` characters.

    Args:
        record: A run's record, as ``read_record`` returns it.
        folder: The run's, where its ledger of forgetting is to be shown too.
        width: Characters per line, at least 70; the accuracy matrix is cut into blocks of columns to fit.

    Returns:
        Plain text (no colours), ending with a newline. Percentages have two decimals, ``-`` where not evaluated.
    """
    lines: list[str] = []
    if label := warning(record):
        lines += ["*" * width, *_wrapped(label, width, "* "), "*" * width]
    lines += _wrapped(describe(record), width)
    classes = of_record(record).learns_classes
    lines += _wrapped("tasks are named by their classes" if classes else record["benchmark"], width)
    lines += _wrapped(_deviations(record), width)
    lines += ["", "accuracy in percent, after training a task (row) on a task (column)"]
    before = record.get("accuracy_before_training")
    for block in _matrix_blocks(record["tasks"], record["accuracy_matrix"], width, before):
        lines += [*block, ""]
    values = record["metrics"]
    words = {name: metric.say(classes) for name, metric in METRICS.items()}
    titles = {
        name: f"{said.title} ({said.brief})"
        for name, said in words.items()
        if said.brief and not (METRICS[name].every_task and values.get(name) is None)
    }
    title_width = max(map(len, titles.values()))
    lines += [f"{title:<{title_width}}  {_number(values.get(key)):>8}" for key, title in titles.items()]
    if table := flatness_table(record):
        lines += ["", *table]
    if folder is not None and (sums := ledger_table(folder, record["tasks"])):
        lines += ["", *sums]
    lines += ["", _times(record["timing"]), *_status(record)]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int, start: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=start or "  ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _deviations(record: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(row["what"] for row in record["deviations"]))
    if not names:
        return "no deviations from upstream's own run" if record["upstream"] else ""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} deviation{'s' if len(names) > 1 else ''} from upstream's own run: {shown} (record.json)"


def _matrix_blocks(
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    width: int,
    before: Sequence[float | None] | None,
) -> Iterator[list[str]]:
    names = [f"{i + 1} {task}" for i, task in enumerate(tasks)]
    first = max(map(len, names)) + 1
    column = max(_NUMBER_WIDTH, *map(len, tasks)) + 1
    per_block = max(1, (width - first) // column)
    for start in range(0, len(tasks), per_block):
        columns = range(start, min(start + per_block, len(tasks)))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", no_wrap=True, min_width=first - 1)
        for j in columns:
            table.add_column(tasks[j], justify="right", no_wrap=True, min_width=column - 1)
        if before:
            table.add_row("0 before", *(_number(before[j]) for j in columns))
        for i, row in enumerate(matrix):
            if i >= start or any(row[j] is not None for j in columns):
                table.add_row(names[i], *(_number(row[j]) for j in columns))
        console = Console(file=StringIO(), width=max(width, first + column), color_system=None)
        with console.capture() as capture:
            console.print(table)
        yield [line.rstrip() for line in capture.get().splitlines()]


def _times(timing: Mapping[str, Any]) -> str:
    parts = []
    for key, name in (("train_seconds", "training"), ("predict_seconds", "prediction")):
        known = [seconds for seconds in timing.get(key, ()) if seconds is not None]
        if known:
            parts.append(f"{name} {sum(known):.0f} s")
    if timing.get("total_seconds") is not None:
        parts.append(f"in all {timing['total_seconds']:.0f} s")
    return ", ".join(parts) or "no times recorded"


def _status(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if record["status"] != "finished":
        done = sum(any(x is not None for x in row) for row in record["accuracy_matrix"])
        lines.append(f"{record['status'].upper()}: results of {done} of {len(record['tasks'])} tasks")
    if record["restarts"]:
        lines.append(f"resumed {record['restarts']} time{'s' if record['restarts'] > 1 else ''}")
    return lines

"""Several runs on one screen: a line each. What else there is stands on their page and in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.report.titles import short_warning

_COLUMNS = (("average accuracy", "average_accuracy"), ("forgetting", "forgetting"))


def overview(records: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return one line per run, under the labels that say how far the numbers carry.

    Args:
        records: Names and records of the runs.

    Returns:
        Plain text. Percent with two decimals, ``-`` where there is no number; behind a run that is not finished its
        state and how many of its tasks have results.
    """
    lines = list(dict.fromkeys(text for _, record in records if (text := short_warning(record))))
    width = max(len("run"), *(len(name) for name, _ in records))
    lines.append(f"{'run':<{width}}" + "".join(f"  {title:>{len(title)}}" for title, _ in _COLUMNS))
    for name, record in records:
        cells = "".join(f"  {_number(record['metrics'].get(key)):>{len(title)}}" for title, key in _COLUMNS)
        lines.append(f"{name:<{width}}{cells}{_state(record)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _state(record: Mapping[str, Any]) -> str:
    if record["status"] == "finished":
        return ""
    done = sum(any(x is not None for x in row) for row in record["accuracy_matrix"])
    return f"  {record['status'].upper()}: results of {done} of {len(record['tasks'])} tasks"

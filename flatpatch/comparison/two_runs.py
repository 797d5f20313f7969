"""The verb ``diff``: what two runs' records differ in, and from which step on their losses part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.report.records import RECORD_FILE, read_record, read_step_metrics, run_folder
from flatpatch.settings import OF_PLACES, read_words, shown

USAGE = """usage: python -m flatpatch diff run=FOLDER with=FOLDER

Says what two runs differ in: settings, upstream's code, deviations, environment, inputs, results, and the first step at
which their recorded losses are not the same number. A record.json may stand for its folder. What differs between any
two runs (times, folders, how often they were stopped) is left out.

examples:
  python -m flatpatch diff run=runs/NAME with=runs/OTHER
  python -m flatpatch diff run=runs/NAME/record.json with=/other/machine/record.json
"""

_OF_RUN = ("schema", "method", "family", "benchmark", "profile", "engine", "labels", "seeds", "tasks", "forked")
_RESULTS = ("status", "accuracy_matrix", "accuracy_before_training", "metrics")
_TOLD_OTHERWISE = (*OF_PLACES, "profile", "engine")  # the last two by what they came to
_ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One difference: its section, what it is in, and both values in words."""

    section: str
    what: str
    here: str
    there: str


def diff(words: Sequence[str]) -> int:
    """Print what two runs differ in."""
    if not words or "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    given, problems = read_words("diff", words, ("run", "with"))
    if not problems and (lacking := [f"{key}=FOLDER" for key in ("run", "with") if key not in given]):
        problems.append(f"diff needs {' and '.join(lacking)} too: two runs, e.g. diff run=runs/NAME with=runs/OTHER.")
    if problems:
        raise UserError.collect(problems)
    places = (run_folder(given[key], key) for key in ("run", "with"))
    here, there = (place.parent if place.name == RECORD_FILE else place for place in places)
    print(render(here, there), end="")
    return 0


def render(here: Path, there: Path) -> str:
    """Return what two runs differ in as text."""
    rows = differences(read_record(here), read_record(there))
    lines = [f"here   {here}", f"there  {there}"]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", section]
        lines += [f"  {row.what}: {row.here} | {row.there}" for row in rows if row.section == section]
    lines += ["", f"steps\n  {parting(here / 'metrics.jsonl', there / 'metrics.jsonl')}"]
    if not rows:
        lines.append("The records differ in nothing that a number could depend on.")
    return "\n".join(lines) + "\n"


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Row]:
    """Return what differs in two records, in the order of their sections."""
    rows = []
    one, other = _contents(here), _contents(there)
    for section in one:
        for name in dict.fromkeys([*one[section], *other[section]]):
            values = [side[section].get(name) for side in (one, other)]
            if values[0] != values[1]:
                rows.append(Row(section, name, *map(_shown, values)))
    return rows


def _contents(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by section what two records are compared by."""
    return {
        "run": {key: record.get(key) for key in _OF_RUN},
        "settings": {key: own["value"] for key, own in record["settings"].items() if key not in _TOLD_OTHERWISE},
        "upstream's code": dict(record.get("upstream") or {}),
        "deviations": {_name(entry): f"{entry['upstream']} -> {entry['here']}" for entry in record["deviations"]},
        "environment": dict(_flat(record["environment"])),
        "inputs": dict(record.get("inputs") or {}),
        "results": dict(_flat({key: record.get(key) for key in _RESULTS})),
    }


def _shown(value: Any) -> str:
    return _ABSENT if value is None else shown(value)


def _name(deviation: Mapping[str, Any]) -> str:
    return " ".join([deviation["what"], *(f"({task})" for task in deviation.get("tasks", ()))])


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested objects, and each row of a matrix, with its place."""
    for key, inner in value.items():
        place = f"{before}{key}"
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{place}.")
        elif isinstance(inner, list) and any(isinstance(part, list) for part in inner):
            yield from ((f"{place}, row {number}", row) for number, row in enumerate(inner, 1))
        else:
            yield place, inner


def parting(here: Path, there: Path) -> str:
    """Say from which step on two runs' recorded losses are not the same numbers.

    Args:
        here: A run's ``metrics.jsonl``.
        there: The other's.
    """
    missing = [str(path) for path in (here, there) if not path.is_file()]
    if missing:
        return f"not compared: there is no {' and no '.join(missing)}"
    one, other = (read_step_metrics(path) for path in (here, there))
    for number, (a, b) in enumerate(zip(one, other, strict=False), 1):
        if (a["task"], a["step"]) != (b["task"], b["step"]):
            return f"line {number}: task {a['task']} step {a['step']} | task {b['task']} step {b['step']}"
        if a["loss"] != b["loss"]:
            known = a["loss"] is not None and b["loss"] is not None
            gap = f" (a difference of {abs(a['loss'] - b['loss']):.2g})" if known else ""
            return (
                f"the losses are the same up to line {number - 1}; then, at task {a['task']} step {a['step']}: "
                f"{a['loss']} | {b['loss']}{gap}"
            )
    same = min(len(one), len(other))
    if len(one) != len(other):
        return f"the losses of the first {same} steps are the same; then one ends: {len(one)} | {len(other)} steps"
    return f"all {same} losses are the same numbers"

"""Two groups of runs beside each other, paired by seed: is the first better?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatpatch.comparison.compare import check_request, check_set, compare_data, differing
from flatpatch.comparison.sides import subject_of
from flatpatch.errors import UserError
from flatpatch.metrics import IN_A_LINE, MARGIN
from flatpatch.report.copies import copied_records
from flatpatch.report.effects import Contrast, Runs, contrasts
from flatpatch.report.records import settings_of
from flatpatch.settings import idle_settings

_IN_TITLE = 4  # settings that a group is named by


@dataclass(frozen=True)
class TwoGroups:
    """What was found of two groups of runs."""

    contrast: Contrast
    differ_in: tuple[str, ...]  # settings, and what else makes runs two groups
    notes: tuple[str, ...]


def compare_groups(
    here: Mapping[str, Mapping[str, Any]],
    there: Mapping[str, Mapping[str, Any]],
    *,
    metrics: Sequence[str] | None = None,
    margin: float = MARGIN,
) -> TwoGroups:
    """Compare two groups of finished runs, each of which differs by the seed alone.

    Args:
        here: Records by the runs' names: those that the hypothesis calls better.
        there: The other group's.
        metrics: Names as in a record's ``metrics``; default: those that one line has room for.
        margin: The smallest difference that matters, in points.

    Returns:
        The paired differences, what the groups differ in, and what could not be checked.

    Raises:
        UserError: If a group is no such set, the groups share a run, or their numbers have no common meaning.
    """
    check_request(metrics, margin)
    problems = []
    for word, side in (("run=", here), ("with=", there)):
        try:
            check_set(list(side.values()), list(side))
        except UserError as error:
            problems.append(f"{word} {error}")
    if both := [name for name in here if name in there]:
        problems.append(f"{both[0]} is on both sides. Name each run once.")
    if problems:
        raise UserError.collect(problems)
    one, other = next(iter(here.values())), next(iter(there.values()))
    names, records = [*here, *there], [*here.values(), *there.values()]
    other_data, notes = compare_data(records, names, subject_of(one), "")
    if obstacle := _obstacle(one, other) or other_data:
        raise UserError(f"the two groups cannot be compared: {obstacle}.")
    keys = tuple(differing(one, other))
    if not keys:
        notes.append("the two groups have the same settings, so that any difference is one of seeds and machines")
    elif one["tasks"] != other["tasks"]:
        notes.append("the groups learn the same tasks in another order")
    titles = [_title(record, keys) for record in (one, other)]
    if titles[0] == titles[1]:
        titles = ["the runs of run=", "those of with="]
    pair = (Runs(titles[0], list(here.values())), Runs(titles[1], list(there.values())))
    found = contrasts([pair], metrics=metrics or IN_A_LINE, margin=margin)[0]
    return TwoGroups(found, keys, (*copied_records(names, records), *notes))


def _obstacle(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say why numbers of two groups have no common meaning, or return an empty string."""
    if one["profile"] != other["profile"] and "quick" in (one["profile"], other["profile"]):
        profiles = f"profile {one['profile']} here, {other['profile']} there"
        return f"{profiles}, and a small model and data are compared with their like alone"
    if sorted(one["tasks"]) != sorted(other["tasks"]):
        return f"their tasks are others: {_list(one['tasks'])} here, {_list(other['tasks'])} there"
    return ""


def _title(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Name a group by what sets it apart from the other."""
    settings = settings_of(record)
    values = {key: settings.get(key, record.get(key)) for key in keys if key not in idle_settings(record)}
    shown = [f"{key}={_list(value) if isinstance(value, list) else value}" for key, value in values.items()]
    return ", ".join([*shown[:_IN_TITLE], *(["..."] if len(shown) > _IN_TITLE else [])])


def _list(items: Sequence[object]) -> str:
    return ",".join(map(str, items[:6])) + (",..." if len(items) > 6 else "")

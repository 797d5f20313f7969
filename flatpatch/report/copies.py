"""Runs with one and the same accuracy matrix that should not have one: a sign that a result was copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from flatpatch.report.records import setting, settings_of
from flatpatch.settings import OF_MACHINE, OF_MEASURING, OF_PLACES, idle_settings, with_role

# What may differ between runs whose accuracies are equal for a good reason: where they lie and ran, and measuring.
_HARMLESS = frozenset((*OF_MEASURING, *OF_PLACES, *OF_MACHINE, "sync", "adapters"))
_NAMED = 3  # settings that one sentence names


def is_telling(matrix: Sequence[Sequence[float | None]]) -> bool:
    """Return whether two runs are unlikely to have this accuracy matrix by chance: not one number, nor one value."""
    known = [value for row in matrix for value in row if value is not None]
    return len(known) > 2 and len(set(known)) > 1


def trained_with(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's accuracies follow from. SAM of radius 0 is no SAM; the recorded step stays itself."""
    idle = idle_settings(record)
    found = {
        key: value
        for key, value in settings_of(record).items()
        if key not in _HARMLESS and key not in idle and value not in ("", "auto")
    }
    if setting(record, "sam", "off") not in ("off", "recorded") and setting(record, "rho") == 0:
        found = {key: value for key, value in found.items() if key not in with_role("sam")}
        found["sam"] = "off"
    found |= {key: record[key] for key in ("method", "benchmark", "profile", "engine")}
    return found | {"seed": ", ".join(map(str, record["seeds"]))}


def copied(runs: Sequence[tuple[str, Mapping[str, Any], Sequence[Sequence[float | None]]]]) -> list[str]:
    """Name each two runs that have equal accuracies and were trained differently.

    Args:
        runs: Of each its name, what it was trained with and its accuracy matrix.

    Returns:
        One sentence for each two.
    """
    found = []
    for (one, first, matrix), (other, second, same) in combinations(runs, 2):
        different = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        if different and matrix == same and is_telling(matrix):
            shown = [f"{key} {first.get(key, '-')} and {second.get(key, '-')}" for key in different[:_NAMED]]
            shown += ["..."] if len(different) > _NAMED else []
            found.append(
                f"WARNING: {one} and {other} have the same {len(matrix)} x {len(matrix)} accuracy matrix, though they "
                f"differ in {', '.join(shown)}: was one copied?"
            )
    return found


def copied_records(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each two runs whose records have equal accuracies, and settings or seeds that should give others."""
    return copied(
        [(name, trained_with(record), record["accuracy_matrix"]) for name, record in zip(names, records, strict=True)]
    )

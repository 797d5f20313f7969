"""A page's tables of the curvature by layer and factor, from the files that the runs' records name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flatpatch.report.flatness_run import results_of
from flatpatch.report.groups import Group, spread
from flatpatch.report.writing import mark_of, writing_sentence

VALUES = ("top_eigenvalue", "trace")


def layer_tables(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one table per scope, a row per block and group: the largest eigenvalue and the trace over the seeds.

    Of each run the latest measuring point that has blocks is in it; a file that is missing or damaged counts as none.
    """
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    places: dict[str, dict[str, None]] = {}
    of_lora: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        for run in group.counted:
            latest = {entry["scope"]: entry for entry in run.record["flatness"] if "layer_trace_max" in entry["values"]}
            for scope, entry in latest.items():
                blocks = results_of(run.folder, entry).get("layers")
                if not blocks:
                    continue
                named = {
                    **blocks["layers"],
                    **{f"all factors {name}": block for name, block in blocks["factors"].items()},
                }
                places.setdefault(scope, {})[f"{entry['when']} task {entry['task_index'] + 1} {entry['task']}"] = None
                if mark_of(run.record, entry):
                    of_lora.setdefault(scope, []).append(entry["values"])
                for name, block in named.items():
                    found.setdefault(scope, {}).setdefault(name, {}).setdefault(group.letter, []).append(block)
    letters = {group.letter: group for group in groups}
    return [
        {
            "scope": scope,
            "places": list(places[scope]),
            "writing": writing_sentence(scope, of_lora[scope]) if scope in of_lora else "",
            "rows": [
                {
                    "name": name,
                    "group": letters[letter],
                    "size": own[0]["size"],
                    "cells": [spread(block[value] for block in own) for value in VALUES],
                }
                for name, by_letter in blocks.items()
                for letter, own in by_letter.items()
            ],
        }
        for scope, blocks in found.items()
    ]

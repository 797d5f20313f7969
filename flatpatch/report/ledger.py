"""The ledger of forgetting of a run, drawn and summed: what the change of each earlier task's loss is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flatpatch.report.drawing import BELOW, COLOURS, finish
from flatpatch.report.groups import Group, spread

# Of a ledger's terms: how each is called, and its colour. What they add up to is drawn in black.
TERMS = {
    "gradient": ("gradient term", COLOURS[0]),
    "curvature": ("curvature term", COLOURS[1]),
    "remainder": ("remainder", COLOURS[3]),
}
CHANGE = "change of the loss"
SUMS = {**{name: label for name, (label, _) in TERMS.items()}, "change": CHANGE}
_MOST_PANELS = 6
_NEEDED = ("task_index", "change", *TERMS, "steps", "losses", "gradients", "curvatures")

Ledger = Mapping[str, Any]


def read_ledgers(folder: Path) -> list[Ledger]:
    """Return the files ``flatness/*-ledger.json`` of a run that are whole, in the order of the tasks.

    Args:
        folder: The run's.

    Returns:
        What each holds, as :mod:`flatpatch.measurement.ledger` says; none of those that are damaged or failed.
    """
    return read_whole(
        folder,
        "ledger",
        lambda content: all(key in row for row in content["ledger"]["earlier"] for key in _NEEDED),
    )


def read_whole(folder: Path, kind: str, has_all: Callable[[Mapping[str, Any]], bool]) -> list[Mapping[str, Any]]:
    """Return the files of a training that was followed which are whole, in the order of the tasks.

    Args:
        folder: The run's.
        kind: Of measurement.
        has_all: Tells whether a file's content has all that is drawn of it; may raise.
    """
    found = []
    for path in sorted((folder / "flatness").glob(f"*-{kind}.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["error"] is None and has_all(content):
                found.append((int(content["task_index"]), content))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [content for _, content in sorted(found, key=lambda pair: pair[0])]


def ledger_sums(folder: Path, tasks: int) -> dict[int, dict[str, float]]:
    """Return of each earlier task the change of its loss and the terms of that, over the training of all later tasks.

    Args:
        folder: The run's.
        tasks: How many tasks the run has.

    Returns:
        By the earlier task's place from 0; one that some later task has in no whole ledger is left out.
    """
    ledgers = read_ledgers(folder)
    found = {}
    for task in range(tasks - 1):
        rows = [row for ledger in ledgers for row in ledger["ledger"]["earlier"] if row["task_index"] == task]
        if len(rows) == tasks - 1 - task:
            found[task] = {name: math.fsum(row[name] for row in rows) for name in SUMS}
    return found


def ledger_table(folder: Path, tasks: Sequence[str]) -> list[str]:
    """Return the lines of a run's table of :func:`ledger_sums`; none where there is no whole ledger."""
    sums = ledger_sums(folder, len(tasks))
    if not sums:
        return []
    names = {task: f"{task + 1} {tasks[task]}" for task in sums}
    title = "ledger of forgetting"
    width = max(len(title), *map(len, names.values()))
    wide = {name: max(12, 2 + len(label)) for name, label in SUMS.items()}
    lines = [f"{title:<{width}}" + "".join(f"{label:>{wide[name]}}" for name, label in SUMS.items())]
    for task, own in sums.items():
        lines.append(f"{names[task]:<{width}}" + "".join(f"{own[name]:>{wide[name]}.4f}" for name in SUMS))
    return lines


def ledger_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the rows of a page's table of :func:`ledger_sums`: each group's earlier tasks, over its seeds."""
    rows = []
    for group in groups:
        sums = [ledger_sums(run.folder, len(group.tasks)) for run in group.counted]
        for task in sorted({task for own in sums for task in own}):
            cells = [spread(own.get(task, {}).get(name) for own in sums) for name in SUMS]
            rows.append({"task": f"{task + 1} {group.tasks[task]}", "group": group, "cells": cells})
    return rows


def make_ledger_figure(ledgers: Sequence[Ledger], record: Mapping[str, Any]) -> Figure | None:
    """Return the terms of every earlier task through every later one, and how they add up along the steps.

    Args:
        ledgers: As ``read_ledgers`` returns them.
        record: The run's record.

    Returns:
        Above, stacked bars for each earlier task and each task trained after it; below, a panel for each earlier task
        with the sums so far over the steps, broken where a later task has no whole ledger. None where no earlier task
        was followed.
    """
    pairs = [(row, ledger) for ledger in ledgers for row in ledger["ledger"]["earlier"]]
    if not pairs:
        return None
    tasks = record["tasks"]
    earlier = sorted({row["task_index"] for row, _ in pairs})
    shown = earlier[:_MOST_PANELS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(6.4, 2.4 * columns), 2.9 + 1.9 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.4, *[1.0] * rows])
    bars = figure.add_subplot(grid[0, :])
    pairs.sort(key=lambda pair: (pair[0]["task_index"], pair[1]["task_index"]))
    _draw_bars(bars, pairs)
    for k, index in enumerate(shown):
        axes = figure.add_subplot(grid[1 + k // columns, k % columns])
        _draw_lines(axes, [pair for pair in pairs if pair[0]["task_index"] == index])
        axes.set_title(f"task {index + 1} {tasks[index]}", fontsize=8)
    figure.legend(*bars.get_legend_handles_labels(), **BELOW, ncols=4)
    every = ", ".join(str(each) for each in sorted({ledger["ledger"]["every"] for ledger in ledgers}))
    notes = [
        f"an entry each {every} steps; below: sums over the entries so far (dashed: the change itself), dotted where a "
        "task's training ends"
    ]
    done = sum(any(x is not None for x in row) for row in record["accuracy_matrix"])
    if missing := sorted({*range(1, done)} - {ledger["task_index"] for ledger in ledgers}):
        names = ", ".join(f"{index + 1} {tasks[index]}" for index in missing)
        notes.append(
            f"no whole ledger of task {names}: grey before the next, drawn as long as that; sums begin again at 0"
        )
    if len(earlier) > len(shown):
        notes.append(f"of {len(earlier)} earlier tasks the first {len(shown)} have panels")
    return finish(figure, "What the change of earlier tasks' losses is made of", notes, record=record)


def _draw_bars(axes: Any, pairs: Sequence[tuple[Mapping[str, Any], Ledger]]) -> None:
    x = np.arange(len(pairs))
    above, below = np.zeros(len(pairs)), np.zeros(len(pairs))
    for name, (label, colour) in TERMS.items():
        values = np.array([row[name] for row, _ in pairs], dtype=np.float64)
        axes.bar(x, values, bottom=np.where(values >= 0, above, below), color=colour, width=0.65, label=label)
        above, below = above + values.clip(min=0), below + values.clip(max=0)
    changes = [row["change"] for row, _ in pairs]
    axes.plot(x, changes, linestyle="none", marker="D", markersize=4, color="black", label=CHANGE)
    axes.axhline(0, color="0.4", linewidth=0.7)
    names = [f"{row['task_index'] + 1} in {ledger['task_index'] + 1}" for row, ledger in pairs]
    axes.set_xticks(x, names, rotation=60 if len(pairs) > 12 else 0)
    axes.set_xlim(-0.6, max(len(pairs), 5) - 0.4)  # one bar alone would fill the figure
    axes.set_xlabel("earlier task in the training of a later one", fontsize=8)
    axes.set_ylabel("change of the loss", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def _draw_lines(axes: Any, pairs: Sequence[tuple[Mapping[str, Any], Ledger]]) -> None:
    end, trained = 0.0, pairs[0][0]["task_index"]
    parts: dict[str, list[float]] = {name: [0.0] for name in (*TERMS, "change")}
    steps, ends = [0.0], list[float]()
    for row, ledger in pairs:
        own = ledger["ledger"]["steps"]
        if unknown := ledger["task_index"] - trained - 1:  # tasks without a ledger, of unknown length
            axes.axvspan(end, end + unknown * own, color="0.9", linewidth=0)
            end += unknown * own
            steps += [np.nan, end]
            for sums in parts.values():
                sums += [np.nan, 0.0]
        steps += [end + step for step in row["steps"]]
        for name, values in entries_of(row):
            before = parts[name][-1]
            parts[name] += (before + np.cumsum(values)).tolist()
        end, trained = end + own, ledger["task_index"]
        ends.append(end)
    for name, (_, colour) in TERMS.items():
        axes.plot(steps, parts[name], color=colour, linewidth=1.2)
    axes.plot(steps, parts["change"], color="black", linewidth=1.0, linestyle="--")
    for end in ends[:-1]:
        axes.axvline(end, color="0.45", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="0.4", linewidth=0.7)
    axes.set_xlabel("steps since it was learned", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def entries_of(row: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[float]]]:
    """Yield the change of the loss and its terms, each with its value in every entry of the ledger."""
    changes = np.diff(np.asarray(row["losses"], dtype=np.float64))
    gradients, curvatures = (np.asarray(row[name], dtype=np.float64) for name in ("gradients", "curvatures"))
    yield "change", changes.tolist()
    yield "gradient", gradients.tolist()
    yield "curvature", curvatures.tolist()
    yield "remainder", (changes - gradients - curvatures).tolist()

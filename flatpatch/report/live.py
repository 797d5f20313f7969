"""What was followed during a run's training, drawn and in a sentence: the dominant eigenvalue and SAM's gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flatpatch.report.drawing import COLOURS, finish
from flatpatch.report.ledger import read_whole

Live = Mapping[str, Any]

_NAMED_TASKS = 6
_NUMBERS = ("steps", "measured", "eigenvalues", "residuals", "gaps", "losses", "restarted", "scope", "rho", "share")


def read_live(folder: Path) -> list[Live]:
    """Return the files ``flatness/*-live.json`` of a run that are whole, in the order of the tasks.

    Args:
        folder: The run's.

    Returns:
        What each holds, as :mod:`flatpatch.measurement.live` says; none of those that are damaged or failed.
    """
    return read_whole(folder, "live", lambda content: all(name in content["live"] for name in _NUMBERS))


def live_sentence(folders: Sequence[Path]) -> str:
    """Say how closely the trainings of some runs were followed; empty where none was.

    Args:
        folders: The runs'.
    """
    runs = [found for folder in folders if (found := read_live(folder))]
    tasks = [content["live"] for found in runs for content in found]
    if not tasks:
        return ""
    looks, steps = (sum(counts) for counts in zip(*((len(t["measured"]), t["steps"]) for t in tasks), strict=True))
    scopes = " and ".join(sorted({task["scope"] for task in tasks}))
    text = f"{len(runs)} run{'s' * (len(runs) > 1)} followed over {scopes}: measured after {looks} of {steps} steps"
    if shares := [task["share"] for task in tasks if task["share"] is not None]:
        text += f", in at most {100 * max(shares):.2g} % of a task's training time"
    if ends := [_relative(task)[-1] for task in tasks if task["measured"]]:
        text += f"; at a task's end the residual was up to {100 * max(ends):.2g} % of the eigenvalue"
    return f"{text}."


def _relative(task: Mapping[str, Any]) -> list[float]:
    pairs = zip(task["eigenvalues"], task["residuals"], strict=True)
    return [residual / abs(value) if value else 0.0 for value, residual in pairs]


def make_live_figure(lives: Sequence[Live], record: Mapping[str, Any]) -> Figure | None:
    """Return the dominant eigenvalue and SAM's gap over the steps of all tasks.

    Args:
        lives: As ``read_live`` returns them.
        record: The run's record.

    Returns:
        Above the eigenvalue, in a band of its residual, which is broken between tasks; below the gap. Hollow points are
        those at which power iteration began anew, dotted lines ends of tasks. None where no step was measured.
    """
    if not any(content["live"]["measured"] for content in lives):
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    done = sum(any(x is not None for x in row) for row in record["accuracy_matrix"])
    found = {content["task_index"]: content["live"] for content in lives}
    usual = max(task["steps"] for task in found.values())
    begin = 0
    for index in range(max(done, max(found) + 1)):
        task = found.get(index)
        end = begin + (task["steps"] if task else usual)
        for axes in (top, bottom):
            if task is None:
                axes.axvspan(begin, end, color="0.9", linewidth=0)
            if begin:
                axes.axvline(begin, color="0.45", linewidth=0.8, linestyle=":")
        name = f"{index + 1} {record['tasks'][index]}" if max(found) < _NAMED_TASKS else str(index + 1)
        top.text((begin + end) / 2, 1.02, name, transform=top.get_xaxis_transform(), fontsize=7.5, ha="center")
        if task is not None:
            _draw(top, task, begin, "eigenvalues", COLOURS[0])
            _draw(bottom, task, begin, "gaps", COLOURS[5])
        begin = end
    top.set_ylabel("dominant eigenvalue", fontsize=8)
    bottom.set_ylabel("SAM's gap", fontsize=8)
    bottom.set_xlabel("steps of the training", fontsize=8)
    for axes in (top, bottom):
        axes.axhline(0, color="0.4", linewidth=0.7)
        axes.set_xlim(0, begin)
        axes.tick_params(labelsize=7.5)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    first = next(iter(found.values()))
    shares = [task["share"] for task in found.values() if task["share"] is not None]
    notes = [
        f"over {first['scope']}; band: the residual, an eigenvalue is in it; hollow: power iteration begins anew; gap: "
        f"rise of the loss at SAM's one step of rho={first['rho']:g}",
        f"at most {100 * max(shares):.2g} % of a task's training time" if shares else "",
    ]
    if missing := sorted(set(range(done)) - set(found)):
        notes.append(f"not followed to the end, grey: task {', '.join(str(index + 1) for index in missing)}")
    return finish(figure, "Dominant eigenvalue and SAM's gap during the training", notes, record=record)


def _draw(axes: Any, task: Mapping[str, Any], begin: int, name: str, colour: str) -> None:
    steps, values = begin + np.asarray(task["measured"]), np.asarray(task[name], dtype=np.float64)
    few = len(steps) <= 40
    axes.plot(steps, values, color=colour, linewidth=1.2, marker="o" if few else None, markersize=3.5)
    if name == "eigenvalues":
        band = np.asarray(task["residuals"], dtype=np.float64)
        axes.fill_between(steps, values - band, values + band, color=colour, alpha=0.2, linewidth=0)
        anew = np.isin(task["measured"], task["restarted"])
        axes.plot(steps[anew], values[anew], linestyle="none", marker="o", markersize=5, color=colour, mfc="white")

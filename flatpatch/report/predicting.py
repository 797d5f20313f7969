"""What predicts forgetting: over several runs, each earlier task's loss of accuracy beside what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from flatpatch.measuring import DEPENDS, INVARIANT
from flatpatch.report.drawing import BELOW, COLOURS, finish
from flatpatch.report.groups import Group, Run, forgetting_per_task
from flatpatch.report.ledger import ledger_sums
from flatpatch.report.writing import mark_of
from flatpatch.statistics import FEWEST_RUNS, RankCorrelation, rank_correlation

_LEDGER = {
    "change": "change of its loss by the ledger",
    "gradient": "gradient term of the ledger",
    "curvature": "curvature term of the ledger",
}
_FLATNESS = {
    "top_eigenvalue": "largest eigenvalue",
    "trace": "trace",
    "sam_sharpness_ascent": "loss rise in SAM's ball",
}


@dataclass(frozen=True)
class Predictor:
    """One measured number beside forgetting, over runs."""

    title: str
    found: RankCorrelation | None
    n: int  # pairs of a run and an earlier task that other runs have too
    runs: int

    @property
    def note(self) -> str:
        """What must be said of so few runs; empty where they are enough."""
        if self.found is None:
            return "no correlation: too few pairs, or one side does not vary within a task"
        if self.found.low is None:
            return f"too few runs for an interval: {self.runs} of at least {FEWEST_RUNS}"
        return ""


def predictors(groups: Sequence[Group]) -> list[Predictor]:
    """Correlate forgetting with what was measured, over the finished runs of all groups.

    A pair is a run and an earlier task of it: the task's best earlier accuracy minus its last one, in points, beside
    the sum of the ledger's terms over all later tasks, or beside what was measured right after the task was learned.
    Both are ranked within each task, one of the same name at the same place, so tasks that are forgotten more than
    others show nothing by themselves: runs that forget a task more than other runs do.

    Args:
        groups: As ``group_runs`` returns them.

    Returns:
        One for each number that two runs or more have, in a fixed order; of flatness one for each scope.
    """
    runs = [run for group in groups if group.is_finished for run in group.counted]
    ledgers = {id(run): ledger_sums(run.folder, len(run.record["tasks"])) for run in runs}
    readers: dict[str, Callable[[Run, int], float | None]] = {
        title: (lambda run, task, name=name: ledgers[id(run)].get(task, {}).get(name))  # type: ignore[misc]
        for name, title in _LEDGER.items()
    }
    for scope in dict.fromkeys(entry["scope"] for run in runs for entry in run.record["flatness"]):
        for name, title in _FLATNESS.items():
            readers[f"{title} after learning it, {scope}{_mark(runs, scope)}"] = (
                lambda run, task, name=name, scope=scope: _flatness(run, task, name, scope)  # type: ignore[misc]
            )
    found = []
    for title, read in readers.items():
        pairs = [_pairs(run, read) for run in runs]
        known = sum(bool(own) for own in pairs)
        if known > 1:
            correlation = rank_correlation(pairs)
            n, count = (correlation.n, correlation.runs) if correlation else (sum(map(len, pairs)), known)
            found.append(Predictor(title, correlation, n, count))
    return found


def _pairs(run: Run, read: Callable[[Run, int], float | None]) -> dict[Hashable, tuple[float, float]]:
    """Return a number and what was lost, by the task's place and name."""
    rows = {
        (task, run.record["tasks"][task]): (read(run, task), lost) for task, lost in enumerate(forgetting_per_task(run))
    }
    return {
        task: (value, lost)
        for task, (value, lost) in rows.items()
        if value is not None and lost is not None and math.isfinite(value)
    }


def _mark(runs: Sequence[Run], scope: str) -> str:
    """Say in brackets whether a scope's numbers depend on how LoRA is written, those of any run; empty without LoRA."""
    entries = ((run.record, entry) for run in runs for entry in run.record["flatness"] if entry["scope"] == scope)
    marks = [mark for record, entry in entries if (mark := mark_of(record, entry))]
    depends = any(not mark.startswith(INVARIANT) for mark in marks)
    return f" ({DEPENDS if depends else INVARIANT})" if marks else ""


def _flatness(run: Run, task: int, name: str, scope: str) -> float | None:
    for entry in run.record["flatness"]:
        if (entry["task_index"], entry["when"], entry["scope"]) == (task, "after", scope):
            value: float | None = entry["values"].get(name)
            return value
    return None


def make_predictors_figure(found: Sequence[Predictor]) -> Figure | None:
    """Return each rank correlation with its interval and its range; None where there is none.

    Args:
        found: As ``predictors`` returns them.
    """
    shown = [(each, each.found) for each in found if each.found is not None]
    if not shown:
        return None
    figure = Figure(figsize=(6.0, 1.3 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for k, (_, each) in enumerate(shown):
        if each.least is not None and each.most is not None:
            axes.plot([each.least, each.most], [k, k], color=COLOURS[4], linewidth=5, solid_capstyle="butt")
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [k, k], color="black", linewidth=1.1)
        axes.plot([each.rho], [k], color="black", marker="o", markersize=4, linestyle="none")
    axes.plot([], [], color=COLOURS[4], linewidth=5, label="range with one run left out")
    axes.plot([], [], color="black", linewidth=1.1, label="95 % interval, runs resampled")
    axes.axvline(0, color="0.4", linewidth=0.7)
    titles = [each.title.replace(" after", "\nafter") for each, _ in shown]
    axes.set_yticks(range(len(shown)), titles, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("rank correlation with forgetting, within each task", fontsize=8)
    axes.tick_params(axis="x", labelsize=7.5)
    figure.legend(*axes.get_legend_handles_labels(), **BELOW, ncols=2)
    return finish(figure, "", [])

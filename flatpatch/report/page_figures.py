"""Figures of several runs side by side, one line per group of runs, with the spread over its seeds.

Each ``make_..._figure`` returns a matplotlib ``Figure``, or None where there is nothing to show. A group keeps its
colour, line style and letter in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from flatpatch.report.drawing import BELOW, constant, finish, not_drawn
from flatpatch.report.figures import StepCurves, of_one_loss, step_curves
from flatpatch.report.groups import Group, Run, Spread, mean_accuracies, spread

FloatArray = NDArray[np.float64]

# Okabe and Ito's, as in the other figures, but dark enough for white letters on them.
COLOURS = ("#0072B2", "#C24E00", "#00785A", "#A0408A", "#8A5F00", "#4A5FA8", "#4D4D4D")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# More tasks than these are told apart by shade, not by name, and without bands.
FEW_TASKS = 10
_TASK_MAP = "viridis"
_BAND = 0.18
# Drawn even where they do not vary.
_ALWAYS = frozenset({"loss", "perturbed_loss"})
_IN_WORDS = {
    "grad_norm": "gradient norm",
    "effective_perturbation_norm": "norm of the perturbation, before and after rounding",
    "perturbation_cosine": "cosine, after to before rounding",
}
# Scalars that tell how far another one can be trusted: in the table only.
_AUXILIARY = ("_residual", "_standard_error", "_quartile", "_unconverged", "_overlap", "_reach")
# Points drawn per line over all tasks: more than a screen can show tells nothing, and makes the page large.
_POINTS = 900
_LOG_RATIO = 30.0
# Of a figure, in inches: so narrow that its letters can still be read where a phone shrinks it.
_WIDTH = 6.0


def make_mean_figure(groups: Sequence[Group], letters: Sequence[str]) -> Figure | None:
    """Return the mean accuracy over the tasks seen so far, one line per group; None before two tasks are evaluated.

    Args:
        groups: With the same tasks.
        letters: All groups' letters, which decide the colours.
    """
    tasks = groups[0].tasks
    per_group = [_stacked([mean_accuracies(run) for run in group.counted]) for group in groups]
    if max(int(np.isfinite(values).any(axis=0).sum()) for values in per_group) < 2:
        return None
    figure = _figure(_WIDTH, 3.4)
    axes = figure.subplots()
    x = np.arange(1.0, len(tasks) + 1)
    for group, values in zip(groups, per_group, strict=True):
        _draw_spread(axes, x, values, _look(letters.index(group.letter), marker=len(tasks) <= 20), _legend(group))
    axes.set_ylabel("mean accuracy (%)")
    _name_tasks(axes, tasks)
    _finish(figure, axes)
    return figure


def make_tasks_figure(group: Group) -> Figure | None:
    """Return each task's accuracy as training goes on, mean over the group's seeds; None before two are evaluated."""
    matrices = np.array([_stacked(run.record["accuracy_matrix"]) for run in group.counted])  # (seeds, T, T)
    rows = np.nonzero(np.isfinite(matrices).any(axis=(0, 2)))[0]
    if len(rows) < 2:
        return None
    tasks = group.tasks
    few = len(tasks) <= FEW_TASKS
    figure = _figure(_WIDTH, 3.4 if few else 4.0)
    axes = figure.subplots()
    x = np.arange(1.0, len(tasks) + 1)
    shades = Normalize(1, max(2, len(tasks)))
    for j, task in enumerate(tasks):
        look = _look(j, marker=True) | {"linewidth": 1.3}
        if not few:
            look = {"color": colormaps[_TASK_MAP](0.92 * shades(j + 1)), "linewidth": 1.1}
        _draw_spread(axes, x, matrices[:, :, j], look, f"{j + 1} {task}", band=few)
    axes.set_ylabel("accuracy (%)")
    _name_tasks(axes, tasks)
    if few:
        _finish(figure, axes, columns=5)
        return figure
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    levels = ListedColormap([colormaps[_TASK_MAP](0.92 * k / 255) for k in range(256)])
    bar = figure.colorbar(ScalarMappable(shades, levels), ax=axes, label="task tested", fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _trim(figure)
    return figure


def make_losses_figure(groups: Sequence[Group], letters: Sequence[str]) -> Figure | None:
    """Return the training loss, and under SAM the loss at the ascent step, of groups with the same tasks."""
    panels = {"loss": "training loss", "perturbed_loss": "perturbed loss\n(at the ascent step)"}
    return _steps_figure(groups, letters, panels)


def make_ascent_figure(groups: Sequence[Group], letters: Sequence[str]) -> Figure | None:
    """Return gradient norm, the perturbation before and after rounding and their cosine; None without SAM."""
    panels = {
        "grad_norm": "gradient norm",
        "effective_perturbation_norm": "perturbation norm\n(thin: before rounding)",
        "perturbation_cosine": "cosine, after to\nbefore rounding",
    }
    perturbed = [
        group
        for group in groups
        if any(row.get("perturbation_norm") is not None for run in group.counted for row in run.steps)
    ]
    return _steps_figure(perturbed, letters, panels) if perturbed else None


def make_flatness_figure(
    groups: Sequence[Group], letters: Sequence[str], scope: str, names: Sequence[str]
) -> Figure | None:
    """Return the scalars measured in one scope, over the tasks: one panel per scalar, one line per group and time.

    Args:
        groups: With the same tasks.
        letters: All groups' letters, which decide the colours.
        scope: Which parameters were measured.
        names: Of the scalars, in the order of the panels.
    """
    tasks = groups[0].tasks
    x = np.arange(1.0, len(tasks) + 1)
    drawn: dict[str, list[tuple[Group, str, FloatArray]]] = {}
    for name in names:
        if name.endswith(_AUXILIARY):
            continue
        for group in groups:
            for when in _TIMES:
                values = np.array([measured(run, scope, when, name) for run in group.counted])
                if np.isfinite(values).any():
                    drawn.setdefault(name, []).append((group, when, values))
    flat = {
        name: value
        for name, lines in drawn.items()
        if (value := constant(np.concatenate([values.ravel() for *_, values in lines]))) is not None
    }
    drawn = {name: lines for name, lines in drawn.items() if name not in flat}
    if not drawn:
        return None
    whens = [when for when in _TIMES if any(when == at for lines in drawn.values() for _, at, _ in lines)]
    trained = np.isfinite(np.concatenate([values for lines in drawn.values() for *_, values in lines])).any(axis=0)
    # Of a single task each panel has the times side by side: over the tasks it would be mostly empty.
    single = int(np.argmax(trained)) if trained.sum() == 1 else None
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = _figure(max(3.4, 2.3 * columns), 1.75 * rows + 0.7)
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in all_axes.flat[len(drawn) :]:
        axes.set_axis_off()
    for axes, (name, lines) in zip(all_axes.flat, drawn.items(), strict=False):
        for group, when, values in lines:
            look = _look(letters.index(group.letter), marker=len(tasks) <= 20) | {"linestyle": _TIMES[when]}
            if single is None:
                label = _legend(group) + (f", {_WHEN[when]}" if len(whens) > 1 else "")
                _draw_spread(axes, x, values, look, label)
            else:
                own = values[:, single]
                place = np.array([whens.index(when) + 0.1 * (letters.index(group.letter) - (len(letters) - 1) / 2)])
                axes.errorbar(
                    place,
                    [np.nanmean(own)],
                    yerr=[np.nanstd(own, ddof=1) if np.isfinite(own).sum() > 1 else 0.0],
                    **(look | {"linestyle": "none", "capsize": 2}),
                    label=_legend(group),
                )
        axes.set_title(name.replace("_", " "), fontsize=8.5)
        _scale(axes, np.concatenate([values.ravel() for *_, values in lines]))
        axes.tick_params(labelsize=8)
        axes.xaxis.set_tick_params(labelbottom=True)
        if single is None:
            axes.set_xlabel("task", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.set_xlim(0.6, len(tasks) + 0.4)
        else:
            axes.set_xticks(range(len(whens)), whens)
            axes.set_xlim(-0.5, len(whens) - 0.5)
    handles: dict[str, Any] = {}
    for axes in all_axes.flat:
        handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    _legend_below(figure, handles, columns=1 if len(handles) > 2 else 2)
    at = "" if single is None else f"Measured on one task alone: {single + 1} {tasks[single]}."
    return finish(figure, "", [at, not_drawn({name.replace("_", " "): value for name, value in flat.items()})])


_TIMES = {"before": ":", "at_loss": "-.", "after": "-", "finished": "--"}
_WHEN = {
    "before": "before training the task",
    "at_loss": "at the loss asked for",
    "after": "after training the task",
    "finished": "measured afterwards",
}


def step_summary(run: Run) -> dict[str, float | None]:
    """Return the means over the logged steps of what SAM's steps measured; None where nothing was logged.

    Where a batch takes several steps, each with a loss of its own, those of the task's loss count, as in the figures.
    """
    keys = ("loss", "grad_norm", "perturbation_norm", "effective_perturbation_norm", "perturbation_cosine")
    means = {key: _mean(row.get(key) for row in of_one_loss(run.steps, key)) for key in keys}
    means["rise"] = _mean(
        row["perturbed_loss"] - row["loss"]
        for row in of_one_loss(run.steps, "perturbed_loss")
        if row.get("perturbed_loss") is not None and row.get("loss") is not None
    )
    return means


def _mean(values: Any) -> float | None:
    found: Spread | None = spread(values)
    return found.mean if found else None


def measured(run: Run, scope: str, when: str, name: str) -> list[float]:
    """Return one scalar of a run's flatness for each task, NaN where it was not measured or has no value.

    Args:
        run: The run.
        scope: Which parameters were measured.
        when: ``before``, ``at_loss``, ``after`` or ``finished``.
        name: Of the scalar; ``loss`` is the loss at which the others were measured.
    """
    values = [math.nan] * len(run.record["tasks"])
    for entry in run.record["flatness"]:
        if (entry["scope"], entry["when"]) == (scope, when):
            value = entry["loss"] if name == "loss" else entry["values"].get(name)
            values[entry["task_index"]] = math.nan if value is None else float(value)
    return values


def _steps_figure(groups: Sequence[Group], letters: Sequence[str], panels: Mapping[str, str]) -> Figure | None:
    curves = {
        group.letter: [step_curves(group.tasks, run.steps) for run in group.counted if run.steps] for group in groups
    }
    known = [key for key in panels if any(curve.has(key) for own in curves.values() for curve in own)]
    flat = {key: value for key in known if (value := _one_value(curves, key)) is not None and key not in _ALWAYS}
    shown = [key for key in known if key not in flat]
    if not shown:
        return None
    figure = _figure(_WIDTH, 1.1 + 1.5 * len(shown))
    all_axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    starts: dict[float, str] = {}
    window = 1
    for axes, key in zip(all_axes, shown, strict=True):
        for group in groups:
            own = [curve for curve in curves[group.letter] if curve.has(key)]
            if not own:
                continue
            first = own[0]
            window = max(window, first.window)
            starts |= dict(zip(first.starts, first.names, strict=True))
            look = _look(letters.index(group.letter), marker=False)
            _draw_steps(axes, own, key, look, _legend(group))
            if key == "effective_perturbation_norm":
                _draw_steps(axes, own, "perturbation_norm", look | {"linewidth": 0.8, "linestyle": "-"}, "_")
        drawn = [line.get_ydata() for line in axes.get_lines()]
        _scale(axes, np.concatenate([np.asarray(values, dtype=np.float64) for values in drawn]))
        axes.set_ylabel(panels[key])
    last = max(curve.x[-1] for own in curves.values() for curve in own if len(curve.x))
    for axes in all_axes:
        axes.set_xlim(0, max(1.0, last))
        for start in sorted(starts)[1:]:
            axes.axvline(start, color="0.45", linewidth=0.8, linestyle=":")
    _name_stretches(all_axes[0], starts, last)
    note = f"mean of {window} steps" if window > 1 else "each step"
    all_axes[-1].set_xlabel(f"optimizer steps over all tasks ({note})")
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    _legend_below(figure, handles, columns=2)
    return finish(figure, "", [not_drawn({_IN_WORDS.get(key, key): value for key, value in flat.items()})])


def _one_value(curves: Mapping[str, Sequence[StepCurves]], key: str) -> float | None:
    """Return the value that a measurement has at every step of all runs; with its intended one, where it has one."""
    keys = [key, "perturbation_norm"] if key == "effective_perturbation_norm" else [key]
    return constant(np.concatenate([curve.values[name] for own in curves.values() for curve in own for name in keys]))


def _draw_steps(axes: Axes, curves: Sequence[StepCurves], key: str, look: dict[str, Any], label: str) -> None:
    """Draw one line per task, the mean over seeds with its spread, where all seeds logged."""
    common = curves[0].x
    for curve in curves[1:]:
        common = np.intersect1d(common, curve.x)
    values = np.array([curve.smooth(key)[np.isin(curve.x, common)] for curve in curves])
    edges = [*curves[0].starts, math.inf]
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (common > low) & (common <= high)
        if not np.isfinite(values[:, inside]).any():  # no step of this task, or none that was perturbed
            continue
        most = max(20, _POINTS // len(curves[0].starts))
        x, y = _thinned(common[inside], most), np.array([_thinned(row, most) for row in values[:, inside]])
        _draw_spread(axes, x, y, look, label)
        label = "_"  # matplotlib's mark for a line that is not in the legend


def _thinned(values: FloatArray, most: int) -> FloatArray:
    """Return means over neighbours, at most so many of them."""
    size = math.ceil(len(values) / most)
    if size == 1:
        return values
    return np.array([values[k : k + size].mean() for k in range(0, len(values), size)])


def _draw_spread(
    axes: Axes, x: FloatArray, values: FloatArray, look: dict[str, Any], label: str, *, band: bool = True
) -> None:
    """Draw the mean over rows and, for two rows or more, a band of one standard deviation on either side."""
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    x, values = x[known], values[:, known]
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    means = np.where(finite, values, 0.0).sum(axis=0) / count
    squares = (np.where(finite, values, means) - means) ** 2
    deviations = np.sqrt(squares.sum(axis=0) / np.maximum(count - 1, 1))
    axes.plot(x, means, label=label, **look)
    if band and deviations.any():
        axes.fill_between(x, means - deviations, means + deviations, color=look["color"], alpha=_BAND, linewidth=0)


def _look(number: int, *, marker: bool) -> dict[str, Any]:
    look: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "linewidth": 1.6,
    }
    return look | ({"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4.5} if marker else {})


def _legend(group: Group) -> str:
    count = f"n = {len(group.counted)}" if group.is_finished else "unfinished"
    return f"{group.letter}: {group.title} ({count})"


def _stacked(rows: Sequence[Sequence[float | None]]) -> FloatArray:
    return np.array([[math.nan if x is None else x for x in row] for row in rows], dtype=np.float64)


def _name_tasks(axes: Axes, tasks: Sequence[str]) -> None:
    names = [f"{i + 1} {task if len(task) <= 14 else task[:13] + '…'}" for i, task in enumerate(tasks)]
    if len(tasks) <= 6:
        axes.set_xticks(range(1, len(tasks) + 1), names)
    elif len(tasks) <= 20:
        axes.set_xticks(range(1, len(tasks) + 1), names, rotation=40, ha="right", fontsize=8)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.set_xlim(0.8, len(tasks) + 0.2)
    axes.set_xlabel("after training task")


def _name_stretches(axes: Axes, starts: Mapping[float, str], last: float) -> None:
    ordered = sorted(starts)
    crowded = len(ordered) > 6
    for number, (start, end) in enumerate(zip(ordered, [*ordered[1:], last], strict=True), 1):
        axes.annotate(
            str(number) if crowded else starts[start],
            ((start + end) / 2, 1.0),
            xytext=(0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="0.3",
        )


def _scale(axes: Axes, values: FloatArray) -> None:
    """Take a logarithmic axis for a wide range of positive values; show no less than a hundredth of the largest."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > _LOG_RATIO * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif high - low < 0.01 * max(abs(low), abs(high)):
        middle, half = (low + high) / 2, 0.01 * max(abs(low), abs(high))
        axes.set_ylim(middle - half, middle + half)


def _finish(figure: Figure, axes: Axes, columns: int = 2) -> None:
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    handles, labels = axes.get_legend_handles_labels()
    _legend_below(figure, dict(zip(map(str, labels), handles, strict=True)), columns)
    finish(figure, "")


def _legend_below(figure: Figure, handles: Mapping[str, Any], columns: int) -> None:
    """Add a legend below the axes: in one column where names are long, and cut where they would leave the figure."""
    columns = min(columns, len(handles))
    room = int(figure.get_size_inches()[0] * 72 / (0.55 * 8))  # a letter is about half as wide as it is high
    if max(map(len, handles)) > room // columns - 8:
        columns = 1
    names = [name if len(name) <= room - 8 else f"{name[: room - 9]}…" for name in handles]
    figure.legend(list(handles.values()), names, **BELOW, ncols=columns)


def _trim(figure: Figure) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")

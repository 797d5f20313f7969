"""Figures of one run, drawn from its record and step metrics.

Each ``make_..._figure`` returns a matplotlib ``Figure`` (no window, no global state), or None where there is
nothing to show; ``draw_run`` saves those there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatpatch.report.drawing import (
    BELOW,
    COLOURS,
    HEAT,
    MARKERS,
    FloatArray,
    constant,
    finish,
    not_drawn,
    remove,
    save,
)
from flatpatch.report.titles import radius_note

_STYLES = ("-", "--", ":")
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "0.45"
_NORMS = ("perturbation_norm", "effective_perturbation_norm")
_DPI = 150
# A curve whose largest value is this many times its smallest is drawn on a logarithmic axis.
_LOG_RATIO = 30.0


def draw_run(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every figure the run has data for, as PNG and PDF files.

    Args:
        record: The run's record.
        metrics: Its step metrics, as ``read_step_metrics`` returns them; may be empty.
        folder: Where to write; made if needed. Figures of the same names are replaced.

    Returns:
        The files written: of ``accuracy_matrix``, ``accuracy_over_tasks``, ``loss`` and ``perturbation``.
    """
    figures = {
        "accuracy_matrix": make_matrix_figure(record),
        "accuracy_over_tasks": make_accuracy_figure(record),
        "loss": make_loss_figure(record, metrics),
        "perturbation": make_perturbation_figure(record, metrics),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is None:
            # One left from an earlier state of the run would tell of data that is no longer there.
            remove(folder / name)
        else:
            written += save(figure, folder / name, dpi=_DPI)
    return written


def make_matrix_figure(record: Mapping[str, Any]) -> Figure | None:
    """Return the accuracy matrix as an annotated heat map; None before the first result."""
    accuracy = _matrix(record)
    if np.isnan(accuracy).all():
        return None
    tasks = record["tasks"]
    size = len(tasks)
    cell = 0.8 if size <= 6 else 0.58
    figure = _figure(max(6.0, size * cell + 2.6), max(4.2, size * cell * 0.8 + 2.2))
    axes = figure.subplots()
    image = axes.imshow(accuracy, cmap=HEAT, vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor("0.95")
    decimals = 2 if size <= 6 else 1
    for i, j in zip(*np.nonzero(~np.isnan(accuracy)), strict=True):
        text = f"{accuracy[i, j]:.{decimals}f}"
        axes.text(j, i, text, ha="center", va="center", color="black", fontsize=10 if size <= 6 else 8)
    axes.set_xticks(range(size), tasks, rotation=0 if size <= 6 else 45, ha="center" if size <= 6 else "right")
    axes.set_yticks(range(size), [f"{i + 1} {task}" for i, task in enumerate(tasks)])
    axes.set_xlabel("tested on")
    axes.set_ylabel("after training")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy (%)", fraction=0.05, pad=0.02)
    bar.ax.spines["outline"].set_visible(False)
    return finish(figure, "Accuracy after each task", record=record)


def make_accuracy_figure(record: Mapping[str, Any]) -> Figure | None:
    """Return each task's accuracy as training goes on, and their mean; None before two tasks are evaluated."""
    accuracy = _matrix(record)
    rows = np.nonzero(~np.isnan(accuracy).all(axis=1))[0]
    if len(rows) < 2:
        return None
    tasks = record["tasks"]
    size = len(tasks)
    figure = _figure(7.5 if size <= 6 else 10.5, 4.6 if size <= 6 else 6.0)
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    for j, task in enumerate(tasks):
        seen = rows[~np.isnan(accuracy[rows, j])]
        if not seen.size:
            continue
        colour = COLOURS[j % len(COLOURS)]
        axes.plot(
            seen,
            accuracy[seen, j],
            color=colour,
            marker=MARKERS[j % len(MARKERS)],
            linestyle=_STYLES[j // len(COLOURS) % len(_STYLES)],
            markersize=4.5,
            linewidth=1.3,
            label=task,
        )
        ends.append((float(accuracy[seen[-1], j]), task, colour))
    means = np.array([np.mean(accuracy[i, : i + 1]) for i in rows])
    axes.plot(rows, means, color="black", linewidth=2.8, label="mean of tasks seen")
    if not math.isnan(means[-1]):
        ends.append((float(means[-1]), "mean of tasks seen", "black"))
    axes.set_ylim(*_percent_limits(accuracy))
    axes.set_xlim(-0.2, rows[-1] + 0.15)
    named = size <= 20  # more names than that would run into each other; the ends of the lines have them too
    axes.set_xticks(range(rows[-1] + 1), [f"{i + 1}\n{tasks[i]}" if named else str(i + 1) for i in range(rows[-1] + 1)])
    if size > 6:
        axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("after training task")
    axes.set_ylabel("accuracy (%)")
    _label_ends(figure, axes, ends, fontsize=9 if size <= 6 else 8.5)
    return finish(figure, "Accuracy of each task over the training", record=record)


def make_loss_figure(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return the training loss, and under SAM the perturbed loss, over all steps; None if none was logged."""
    curves = step_curves(record["tasks"], metrics)
    if not curves.has("loss"):
        return None
    figure = _figure(7.0, 4.0)
    axes = figure.subplots()
    shown = [("loss", "loss", _BLUE, "-")]
    if curves.has("perturbed_loss"):
        shown.append(("perturbed_loss", "perturbed loss (at the ascent step)", _VERMILION, "--"))
    for key, name, colour, style in shown:
        _draw_curve(axes, curves, key, name, colour, style)
    _log_if_wide(axes, np.concatenate([curves.values[key] for key, *_ in shown]))
    axes.set_ylabel("training loss")
    figure.legend(**BELOW, ncols=2)
    _mark_tasks(axes, curves)
    return _finish_steps(figure, axes, curves, "Training loss", record)


def make_perturbation_figure(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return how SAM's perturbation fared: gradient norm, norms of the step, and their cosine.

    After rounding to their number format is what the weights moved. None if no perturbation was logged (SAM off).
    """
    curves = step_curves(record["tasks"], metrics, of="perturbation_norm")
    norms = [key for key in _NORMS if curves.has(key)]
    if not norms:
        return None
    panels: dict[str, list[str]] = {"gradient norm": ["grad_norm"], "perturbation\nnorm": norms}
    panels["cosine, after to\nbefore rounding"] = ["perturbation_cosine"]
    panels = {title: [key for key in keys if curves.has(key)] for title, keys in panels.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    flat = [title for title, keys in panels.items() if _one_value(curves, keys) is not None]
    drawn = [title for title in panels if title not in flat]
    note = not_drawn({" ".join(title.split()): _one_value(curves, panels[title]) or 0.0 for title in flat})
    if not drawn:
        return None
    heading = "Gradient norm under SAM" if drawn == ["gradient norm"] else "SAM's perturbation"
    figure = _figure(7.0, 1.6 + 1.6 * len(drawn))
    all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    names = {"perturbation_norm": "before rounding", "effective_perturbation_norm": "after rounding"}
    for axes, title in zip(all_axes, drawn, strict=True):
        keys = panels[title]
        for key, colour, style in zip(keys, (_BLUE, _VERMILION), ("-", "--"), strict=False):
            _draw_curve(axes, curves, key, names.get(key, ""), colour, style)
        axes.set_ylabel(title, fontsize=9)
        values = np.concatenate([curves.values[key] for key in keys])
        if title == "gradient norm":
            _log_if_wide(axes, values)
        elif keys == norms:
            _set_limits(axes, values, least=0.04)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, borderpad=0)
        else:
            _set_limits(axes, np.append(values, 1.0), least=0.01)
        _mark_tasks(axes, curves, names=title == drawn[0])
    return _finish_steps(figure, all_axes[-1], curves, heading, record, note, radius_note(record))


def _one_value(curves: StepCurves, keys: Sequence[str]) -> float | None:
    return constant(np.concatenate([curves.values[key] for key in keys]))


@dataclass(frozen=True)
class StepCurves:
    """Step metrics of all tasks laid end to end."""

    x: FloatArray  # (n,) steps counted over the whole run
    starts: tuple[float, ...]  # one per task that logged: where it begins, in steps
    first: tuple[int, ...]  # one per start: the task's first place in x
    names: tuple[str, ...]  # one per start
    losses: tuple[str, ...]  # whose steps they are, where a batch takes several
    values: Mapping[str, FloatArray]  # each (n,), NaN where not logged

    @property
    def window(self) -> int:
        """Steps to average over: a twentieth of a task, so that what happens within a task stays visible."""
        return min(25, max(1, len(self.x) // len(self.starts) // 20))

    @property
    def parts(self) -> list[slice]:
        """Each task's place in ``x``."""
        ends = (*self.first[1:], len(self.x))
        return [slice(low, high) for low, high in zip(self.first, ends, strict=True)]

    def has(self, key: str) -> bool:
        """Tell whether anything can be drawn of a measurement."""
        return bool(np.isfinite(self.values[key]).any())

    def smooth(self, key: str) -> FloatArray:
        """Return the mean of up to ``window`` steps around each step, never across tasks."""
        back, ahead = (self.window - 1) // 2, self.window // 2 + 1
        smoothed = np.empty_like(self.x)
        for part in self.parts:
            y = self.values[key][part]
            smoothed[part] = [y[max(0, k - back) : k + ahead].mean() for k in range(len(y))]
        return smoothed


def of_one_loss(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Keep the steps of one loss where batches take several steps, each with a loss of its own (CL-LoRA)."""
    losses = {row["loss_name"] for row in metrics if row.get("loss_name") and row.get(key) is not None}
    chosen = "task" if "task" in losses else next(iter(losses), None)
    return [row for row in metrics if row.get("loss_name") in (None, chosen)]


def step_curves(tasks: Sequence[str], metrics: Sequence[Mapping[str, Any]], of: str = "loss") -> StepCurves:
    """Put the logged lines in the order of the run; of a step logged twice (a resumed task) the later counts.

    Where a batch takes several steps, those on one loss are kept: the task's, unless another alone has ``of``.
    """
    metrics = of_one_loss(metrics, of)
    lines: dict[tuple[int, float], Mapping[str, Any]] = {}
    for row in metrics:
        task = row.get("task")
        number = tasks.index(task) if task in tasks else task
        if isinstance(number, int) and 0 <= number < len(tasks) and row.get("step") is not None:
            lines[number, float(row["step"])] = row
    x: list[float] = []
    starts, first, names = [], [], []
    offset = last = 0.0
    current = -1
    for number, step in sorted(lines):
        if number != current:
            current, offset = number, last
            starts.append(offset)
            first.append(len(x))
            names.append(tasks[number])
        last = offset + step
        x.append(last)
    ordered = [lines[key] for key in sorted(lines)]
    values = {
        key: np.array([math.nan if row.get(key) is None else float(row[key]) for row in ordered])
        for key in ("loss", "perturbed_loss", "grad_norm", *_NORMS, "perturbation_cosine")
    }
    losses = tuple(sorted({row["loss_name"] for row in ordered if row.get("loss_name")}))
    return StepCurves(np.array(x, dtype=np.float64), tuple(starts), tuple(first), tuple(names), losses, values)


def _draw_curve(axes: Axes, curves: StepCurves, key: str, name: str, colour: str, style: str) -> None:
    smoothed = curves.smooth(key)
    # One line per task: a line across two would suggest training that never happened.
    for part in curves.parts:
        x = curves.x[part]
        if curves.window > 1:
            axes.plot(x, curves.values[key][part], color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(x, smoothed[part], color=colour, linestyle=style, linewidth=1.6, label=name)
        name = "_"  # matplotlib's mark for a line that is not in the legend


def _mark_tasks(axes: Axes, curves: StepCurves, *, names: bool = True) -> None:
    for start in curves.starts[1:]:
        axes.axvline(start, color=_GREY, linewidth=0.8, linestyle=":")
    if not names:
        return
    crowded = len(curves.starts) > 6
    ends = [*curves.starts[1:], curves.x[-1]]
    for start, end, name in zip(curves.starts, ends, curves.names, strict=True):
        axes.annotate(
            name,
            ((start + end) / 2, 1.0),
            xytext=(0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if crowded else "center",
            va="bottom",
            rotation=40 if crowded else 0,
            rotation_mode="anchor",
            fontsize=8,
            color="0.3",
        )


def _finish_steps(
    figure: Figure, axes: Axes, curves: StepCurves, heading: str, record: Mapping[str, Any], *more: str
) -> Figure:
    window = curves.window
    note = f"thin: each step; thick: mean of {window} steps" if window > 1 else "each step"
    if curves.losses:
        note += f"; steps on the {' and '.join(curves.losses)} loss"
    axes.set_xlabel(f"optimizer steps over all tasks ({note})")
    axes.set_xlim(0, max(1.0, curves.x[-1]))
    return finish(figure, heading, more, record=record)


def _log_if_wide(axes: Axes, values: FloatArray) -> None:
    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > _LOG_RATIO * finite.min():
        axes.set_yscale("log")


def _set_limits(axes: Axes, values: FloatArray, *, least: float) -> None:
    """Show at least a given share of the largest value, so that rounding noise does not look like a signal."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    span = max(high - low, least * high) or 1.0
    axes.set_ylim(min(low, high - span) - 0.05 * span, high + 0.05 * span)


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, str]], fontsize: float) -> None:
    """Name each line at its right end, pushed apart so that no two names overlap."""
    low, high = axes.get_ylim()
    # The axes take about seven tenths of the figure's height, at 72 points an inch.
    gap = (high - low) * 1.25 * fontsize / (figure.get_size_inches()[1] * 72 * 0.7)
    ordered = sorted(ends)
    heights = [value for value, *_ in ordered]
    for _ in range(100):
        for k in range(len(heights) - 1):
            overlap = max(0.0, gap - (heights[k + 1] - heights[k]))
            heights[k] -= overlap / 2
            heights[k + 1] += overlap / 2
        heights[-1] = min(heights[-1], high)
    right = axes.get_xlim()[1]
    for height, (value, name, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            f"{name} {value:.1f}",
            (right, value),
            xytext=(right * 1.03, height),
            va="center",
            fontsize=fontsize,
            color=colour,
            fontweight="bold" if colour == "black" else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _percent_limits(accuracy: FloatArray) -> tuple[float, float]:
    """Cut off what is empty below, in steps of ten; 100 always stays in sight."""
    low = 10 * math.floor(float(np.nanmin(accuracy)) / 10)
    return max(-2.0, low - 2.0), 102.0


def _matrix(record: Mapping[str, Any]) -> FloatArray:
    rows = record["accuracy_matrix"]
    return np.array([[math.nan if x is None else x for x in row] for row in rows], dtype=np.float64)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")

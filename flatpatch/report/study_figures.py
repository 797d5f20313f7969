"""Figures of a study: effects with their intervals, and what several runs gave, side by side on the same axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flatpatch.report.drawing import BELOW, COLOURS, HEAT, MARKERS, FloatArray, finish
from flatpatch.report.verdicts import AS_RECORDED, CORRECT
from flatpatch.statistics import CONTRADICTED, SUPPORTED, TOO_SMALL, least_squares

CONTROL = "against a control"
_WIDTH = 7.4
_LABEL = 40  # characters in a line of an effect's name
_LINE = 0.165  # inches of a line of small letters
# An interval that reaches this many times farther than the middle one is cut at the edge, with an arrow.
_FAR = 4.0
_LOG_RATIO = 30.0
_SHADE = "0.92"  # of what is too small to matter
_LOOKS: Mapping[str, Mapping[str, Any]] = {
    CORRECT: {"color": COLOURS[0], "marker": "o", "markersize": 6},
    AS_RECORDED: {"color": COLOURS[5], "marker": "s", "markersize": 5.5},
    CONTROL: {"color": "0.35", "marker": "D", "markersize": 4.5},
}
_SIGNS = {SUPPORTED: "+", CONTRADICTED: "−", TOO_SMALL: "≈"}


@dataclass(frozen=True)
class Row:
    """One line of the figure of effects."""

    label: str
    kind: str  # CORRECT, AS_RECORDED or CONTROL
    unit: str
    effect: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str
    direction: str
    smallest: float


def make_forest_figure(rows: Sequence[Row], *, title: str = "Effects", notes: Sequence[str] = ()) -> Figure:
    """Return effects with their intervals, one panel for each unit, and beside each its verdict.

    Args:
        rows: The effects, in the order in which they are to stand; at least one.
        title: What the figure shows.
        notes: What else to say below.

    Returns:
        The figure. What is too small to matter is shaded; a triangle behind a row's name says which way the
        hypothesis points.

    Raises:
        ValueError: If there is no effect.
    """
    if not rows:
        raise ValueError("a figure of effects needs at least one")
    units = {unit: [row for row in rows if row.unit == unit] for unit in dict.fromkeys(row.unit for row in rows)}
    names = {unit: [_name(row) for row in own] for unit, own in units.items()}
    heights = [_LINE * sum(name.count("\n") + 1.9 for name in names[unit]) + 0.25 for unit in units]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5 * len(units) + 0.9), layout="constrained")
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
    cut = False
    for axes, (unit, own) in zip(panels, units.items(), strict=True):
        cut = _draw_effects(axes, own, names[unit], unit) or cut
    kinds = [kind for kind in _LOOKS if any(row.kind == kind for row in rows)]
    handles = [Line2D([], [], linestyle="-", **_LOOKS[kind], label=kind) for kind in kinds]
    if len(handles) > 1:
        figure.legend(handles=handles, **{**BELOW, "handlelength": 2}, ncols=len(handles))
    said = ["bars: 95 % intervals; shaded: too small to matter; hollow: no interval, one seed or no spread"]
    said += ["arrows: the interval reaches beyond the edge"] if cut else []
    return finish(figure, title, [*said, *notes])


def _name(row: Row) -> str:
    arrow = "▶" if row.direction == "higher" else "◀"
    return textwrap.fill(f"{row.label}\u00a0{arrow}", _LABEL)  # on one line with the last word


def _draw_effects(axes: Axes, rows: Sequence[Row], names: Sequence[str], unit: str) -> bool:
    """Draw the effects of one unit; returns whether an interval was cut at the edge."""
    lines = [name.count("\n") + 1.9 for name in names]
    ends = np.cumsum(lines)
    middles = ends - np.array(lines) / 2
    reach = _reach(rows)
    cut = False
    for row, place, end, height in zip(rows, middles, ends, lines, strict=True):
        look = dict(_LOOKS[row.kind])
        if row.smallest:
            near = min(row.smallest, reach)
            axes.fill_betweenx([end - height, end], -near, near, color=_SHADE, linewidth=0, zorder=0)
        if row.effect is None:
            axes.text(0, place, "no number", ha="center", va="center", fontsize=7.5, color="0.35")
            continue
        spread = row.low is not None and row.high is not None
        if row.low is not None and row.high is not None:
            low, high = max(row.low, -reach), min(row.high, reach)
            axes.plot([low, high], [place, place], color=look["color"], linewidth=1.6, solid_capstyle="butt")
            for bound, edge, sign in ((row.low, -reach, "<"), (row.high, reach, ">")):
                if abs(bound) > reach and bound * edge > 0:
                    cut = True
                    axes.plot(0.985 * edge, place, marker=sign, color=look["color"], markersize=6)
        look |= {} if spread else {"markerfacecolor": "white"}
        axes.plot(float(np.clip(row.effect, -reach, reach)), place, linestyle="none", **look)
    axes.axvline(0, color="0.4", linewidth=0.9)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(float(ends[-1]), 0)
    axes.set_yticks(middles, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"effect ({unit})" if unit else "effect", fontsize=8.5)
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.set_yticks(middles, [_beside(row) for row in rows], fontsize=7.5)
    beside.tick_params(axis="y", length=0)
    beside.spines[:].set_visible(False)
    return cut


def _beside(row: Row) -> str:
    if row.effect is None:
        return f"{row.verdict}\nn = {row.n}"
    sign = _SIGNS.get(row.verdict, "?")
    return f"{sign} {row.verdict}\n{_signed(row.effect)}, n = {row.n}"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _reach(rows: Sequence[Row]) -> float:
    """Return how far the axis goes to either side of zero: not to the end of intervals of few seeds."""
    sizes = [max(abs(row.effect), row.smallest) for row in rows if row.effect is not None]
    bounds = [max(abs(row.low), abs(row.high)) for row in rows if row.low is not None and row.high is not None]
    if not sizes:
        return max([row.smallest for row in rows if row.smallest] or [1.0]) * 1.5
    inner = max(sizes)
    outer = max([inner, *bounds])
    return 1.08 * min(outer, max(1.3 * inner, _FAR * float(np.median([*sizes, *bounds])))) or 1.0


def make_matrices_figure(
    matrices: Mapping[str, FloatArray], tasks: Sequence[str], *, title: str, notes: Sequence[str] = ()
) -> Figure:
    """Return accuracy matrices side by side, with one scale of colours.

    Args:
        matrices: By panel, (T, T) percent, NaN where not evaluated.
        tasks: In the order of training.
        title: What the figure shows.
        notes: What to say below.

    Raises:
        ValueError: If there is no matrix.
    """
    if not matrices:
        raise ValueError("a figure of accuracy matrices needs at least one")
    size, count = len(tasks), len(matrices)
    columns = min(count, 3 if size <= 5 else 2)
    rows = math.ceil(count / columns)
    side = max(2.0, 0.46 * min(size, 12) + 0.5)
    figure = Figure(figsize=(side * columns + 1.6, (0.72 * side + 1.1) * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    names = [_short(task) for task in tasks]
    image = None
    for axes in places.flat[count:]:
        axes.set_axis_off()
    for k, (axes, (name, matrix)) in enumerate(zip(places.flat, matrices.items(), strict=False)):
        image = axes.imshow(matrix, cmap=HEAT, vmin=0, vmax=100, aspect="auto")
        axes.set_facecolor("0.95")
        if size <= 10:
            for i, j in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
                axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7.5, color="black")
        axes.set_title("\n".join(textwrap.fill(line, int(side * 13)) for line in name.splitlines()), fontsize=8)
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=7.5)
        axes.set_yticks(range(size), [f"{i + 1} {name}" for i, name in enumerate(names)], fontsize=7.5)
        axes.tick_params(length=0, labelbottom=k + columns >= count)
        axes.spines[:].set_visible(False)
        if k + columns >= count:
            axes.set_xlabel("tested on", fontsize=8)
    for axes in places[:, 0]:
        axes.set_ylabel("after training", fontsize=8)
    bar = figure.colorbar(image, ax=places, fraction=0.04, pad=0.02)  # type: ignore[arg-type]
    bar.set_label("accuracy (%)", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.ax.spines["outline"].set_visible(False)
    return finish(figure, title, notes)


@dataclass(frozen=True)
class Strip:
    """Values of several groups of runs, to be drawn in one panel."""

    title: str
    values: Mapping[str, Sequence[tuple[int, float]]]  # by group: (seed, value)
    recorded: bool = False
    scale: str = ""  # panels of one scale have the same limits


def make_values_figure(strips: Sequence[Strip], *, title: str, notes: Sequence[str] = ()) -> Figure:
    """Return each run's value as a mark, and each group's mean as a line, one panel for each thing that was measured.

    Args:
        strips: The panels. They share their groups, and those of one scale the limits of their axes.
        title: What the figure shows.
        notes: What to say below.

    Raises:
        ValueError: If there is no panel.
    """
    if not strips:
        raise ValueError("a figure of values needs at least one")
    groups = list(dict.fromkeys(name for strip in strips for name in strip.values))
    columns = min(len(strips), 2)
    rows = math.ceil(len(strips) / columns)
    names = [textwrap.fill(name, 26) for name in groups]
    height = _LINE * sum(name.count("\n") + 1.6 for name in names) + 0.85
    figure = Figure(figsize=(_WIDTH, height * rows + 0.3), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in places.flat[len(strips) :]:
        axes.set_axis_off()
    for axes, strip in zip(places.flat, strips, strict=False):
        colour = _LOOKS[AS_RECORDED if strip.recorded else CORRECT]["color"]
        everything = [value for own in strip.values.values() for _, value in own]
        for place, name in enumerate(groups):
            own = strip.values.get(name, ())
            for k, (seed, value) in enumerate(own):
                beside = place + 0.26 * ((k + 0.5) / len(own) - 0.5) * (len(own) > 1)
                marker = MARKERS[seed % len(MARKERS)]
                axes.plot(value, beside, marker=marker, color=colour, markersize=4.5, alpha=0.75, linestyle="none")
            if len(own) > 1:
                mean = math.fsum(value for _, value in own) / len(own)
                axes.plot([mean, mean], [place - 0.34, place + 0.34], color="black", linewidth=1.3)
        if everything and min(everything) > 0 and max(everything) > _LOG_RATIO * min(everything):
            axes.set_xscale("log")
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), names, fontsize=7.5)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_xlabel(textwrap.fill(strip.title, 46), fontsize=8, color=colour if strip.recorded else "black")
    for scale in {strip.scale for strip in strips if strip.scale}:
        alike = [axes for axes, strip in zip(places.flat, strips, strict=False) if strip.scale == scale]
        logarithmic = any(axes.get_xscale() == "log" for axes in alike)
        low, high = (pick(axes.get_xlim()[k] for axes in alike) for k, pick in ((0, min), (1, max)))
        margin = 0.0 if logarithmic else 0.03 * (high - low)  # a mark at the edge would be half hidden
        for axes in alike:
            axes.set_xscale("log" if logarithmic and low > 0 else "linear")
            axes.set_xlim(low - margin, high + margin)
    return finish(figure, title, ["marks: seeds, each with its own; lines: means over them", *notes])


def make_slope_figure(
    panels: Mapping[str, Sequence[Mapping[str, Any]]], *, x_label: str, y_label: str, title: str
) -> Figure:
    """Return what slopes were laid through, and each seed's straight line, one panel for each way of measuring.

    Args:
        panels: By the way of measuring, points with ``label``, that of their line, ``seed``, ``x`` and ``y``.
        x_label: What the setting is, with its unit.
        y_label: What was measured, with its unit.
        title: What the figure shows.

    Raises:
        ValueError: If there is no point.
    """
    if not any(panels.values()):
        raise ValueError("a figure of slopes needs at least one point")
    shown = {name: points for name, points in panels.items() if points}
    figure = Figure(figsize=(_WIDTH if len(shown) > 1 else 4.6, 3.3), layout="constrained")
    places = figure.subplots(1, len(shown), squeeze=False, sharex=True)[0]
    handles: dict[int, Line2D] = {}
    for axes, (name, points) in zip(places, shown.items(), strict=True):
        for k, seed in enumerate(sorted({point["seed"] for point in points})):
            own = [point for point in points if point["seed"] == seed]
            x, y = ([float(point[key]) for point in own] for key in ("x", "y"))
            look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4.5}
            handles.setdefault(seed, *axes.plot(x, y, linestyle="none", **look, label=f"seed {seed}"))
            for label in dict.fromkeys(point["label"] for point in own):
                line = [(float(point["x"]), float(point["y"])) for point in own if point["label"] == label]
                across, up = zip(*line, strict=True)
                ends, x_mean, y_mean = (
                    (min(across), max(across)),
                    math.fsum(across) / len(line),
                    math.fsum(up) / len(line),
                )
                if ends[0] < ends[1]:
                    slope = least_squares(across, up)
                    heights = [y_mean + slope * (end - x_mean) for end in ends]
                    axes.plot(ends, heights, color=look["color"], linewidth=1.2)
        axes.set_title(name, fontsize=8.5)
        axes.set_xlabel(x_label, fontsize=8.5)
        axes.tick_params(labelsize=8)
    places[0].set_ylabel(textwrap.fill(y_label, 40), fontsize=8.5)
    figure.legend(handles=list(handles.values()), **{**BELOW, "handlelength": 1}, ncols=min(5, len(handles)))
    return finish(
        figure, title, ["lines: least squares, each through the points of one seed that are alike in everything else"]
    )


def _short(text: str, most: int = 12) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

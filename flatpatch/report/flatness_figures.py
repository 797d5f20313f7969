"""Figures of measured flatness: loss landscapes, lines between models and Hessian spectra.

Each ``make_..._figure`` returns a matplotlib ``Figure`` (no window, no global state) with what was varied written on
it. Cells that are infinite or NaN are shown as such, never filled in. Landscapes are read from the ``.npz`` files of
``flatpatch.flatness.landscape``; spectra are mappings as its results' ``as_dict`` give them, read from JSON.
"""

from __future__ import annotations

import json
import math
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline

from flatpatch.errors import UserError
from flatpatch.report.drawing import BELOW, COLOURS, MARKERS, FloatArray, finish, look

_COLOURS, _MARKERS = COLOURS, MARKERS
_STYLES = ("-", "--", "-.", ":")
_LEGEND: Mapping[str, Any] = {"loc": "best", "fontsize": 8, "framealpha": 0.9, "edgecolor": "none"}
# Without its darkest third, on which neither lines nor numbers could be read.
_MAP = ListedColormap([colormaps["cividis"](0.35 + 0.65 * k / 255) for k in range(256)])
_LEVELS = 14
# A panel that fewer of the common levels cross has contours of its own: on the common colours it would be one patch.
_FEWEST = 3
# What varies by less than this share is rounding, which has no contours.
_ROUNDING = 1e-6
# Of landscapes side by side the lower one needs levels of its own sooner.
_LEVEL_RATIO = 8.0
# Landscapes of fewer points a side are drawn by interpolation.
_FINE = 25
# Losses whose largest is this many times their smallest are shown on a logarithmic scale.
_LOG_RATIO = 30.0
_SCHEMA = 1
# Kernel width of a density by default, as a share of the spectrum's range.
_KERNEL = 0.01

_SCOPES = {
    "adapter": "LoRA factors A and B",
    "merged": "merged matrices W + s B A",
    "tangent": "directions s (B dA + dB A) of the merged matrices",
    "trainable": "all trainable weights",
    "model": "all weights of the model",
}
_PICTURES = {
    "over_tasks": "Flatness over the tasks",
    "eigenvalues": "Hessian eigenvalues",
    "layers": "Curvature by layer and factor",
    "density": "Density of the Hessian's eigenvalues",
    "slices": "Loss along one direction",
    "landscape": "Loss landscape",
    "landscapes": "Loss landscapes side by side",
    "surface": "Loss landscape as a surface",
    "plane": "Plane through three models",
    "connectivity": "Loss on the straight line between the models",
    "ledger": "What the change of earlier tasks' losses is made of",
    "live": "Dominant eigenvalue and SAM's gap during the training",
    "as_recorded_eigenvalues": "As recorded, faults included: eigenvalues beside the correct ones",
    "as_recorded_landscape": "As recorded, faults included: loss landscape",
}
_NORMALISATIONS = {
    "filter": "filter-normalised",
    "layer": "normalised by layer",
    "merged_rows": "B normalised by rows of the merged matrix",
    "l2": "direction of unit length",
    "as recorded": "AS RECORDED: directions scaled tensor by tensor; where a tensor is zero it does not move",
}
_FACTOR_FILTERS = "filter-normalised (rows of A, columns of B)"


@dataclass(frozen=True)
class Grid:
    """A landscape's file: losses (p,) or (p, q) with their coordinates, marks (k, d), and what was varied."""

    losses: FloatArray
    done: NDArray[np.bool_]
    axes: tuple[FloatArray, ...]
    marks: FloatArray
    mark_losses: FloatArray
    origin_loss: float
    about: Mapping[str, Any]


def read_grid(path: Path, *, prefix: str = "") -> Grid:
    """Read a landscape's file.

    Args:
        path: The file.
        prefix: Of its arrays' names, where it holds another landscape's too.

    Raises:
        UserError: If it is not one, or of another version.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            grid = Grid(
                **{name: file[prefix + name] for name in ("losses", "done", "marks", "mark_losses")},
                axes=tuple(file[f"{prefix}axis_{k}"] for k in range(file[f"{prefix}losses"].ndim)),
                origin_loss=float(file[f"{prefix}origin_loss"]),
                about=json.loads(str(file[f"{prefix}about"])),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a landscape's file: {error}. Measure again.") from None
    if grid.about.get("schema") != _SCHEMA:
        raise UserError(f"{path} has schema {grid.about.get('schema')}, this version reads {_SCHEMA}. Measure again.")
    return grid


def make_contour_figure(
    grid: Grid, *, title: str = "Loss landscape", record: Mapping[str, Any] | None = None, note: str = ""
) -> Figure:
    """Return a two-dimensional landscape as filled contours, with its models where they lie.

    Args:
        grid: Two-dimensional.
        title: What the figure shows.
        record: Of the run it was measured on, to be named below.
        note: What else to say below.

    Returns:
        The figure. Axes in weight units are drawn to one scale.

    Raises:
        ValueError: If the grid is not two-dimensional or has fewer than 2 x 2 cells.
    """
    return make_landscapes_figure({"": grid}, title=title, record=record, note=note)


def make_landscapes_figure(
    grids: Mapping[str, Grid],
    *,
    title: str = "Loss landscape",
    in_a_row: int = 4,
    level_with: Iterable[Grid] = (),
    record: Mapping[str, Any] | None = None,
    note: str = "",
) -> Figure:
    """Return two-dimensional landscapes side by side, all with the same colours and contour levels.

    A panel that fewer than three of those levels cross has a second set of contours of its own, dashed, which the
    figure says.

    A grid of fewer than 25 x 25 points, all finite, is drawn by cubic interpolation between them, which the figure
    says; the points themselves are dots.

    Args:
        grids: By the name of each, two-dimensional.
        title: What the figure shows.
        in_a_row: After how many panels a new row begins.
        level_with: Landscapes of other figures, whose colours and levels are to be the same.
        record: Of the run they were measured on, to be named below.
        note: What else to say below.

    Raises:
        ValueError: If there is no grid, or one is not two-dimensional or has fewer than 2 x 2 cells.
    """
    if not grids:
        raise ValueError("a figure of landscapes needs at least one")
    for grid in grids.values():
        _check_two_dimensional(grid)
    first = next(iter(grids.values()))
    count = len(grids)
    columns = min(count, in_a_row)
    rows = math.ceil(count / columns)
    # Axes of one scale need panels of about their shape.
    ratio = np.ptp(first.axes[1]) / np.ptp(first.axes[0]) if _in_weight_units(first) else 1.0
    width = 4.6 if count == 1 else 3.1
    height = float(np.clip(1.3 + width * ratio * 0.86, 3.2, 8.0))
    figure = Figure(figsize=(width * columns + 0.9, height * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False)
    panels = list(places.flat[:count])
    for axes in places.flat[count:]:
        axes.set_axis_off()
    levels = _levels([*grids.values(), *level_with])
    filled = None
    interpolated = own_levels = False
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        missing = ~np.isfinite(grid.losses)
        x, y, fine = _refined(grid, logarithmic=_is_geometric(levels))
        fine = fine.clip(*levels[[0, -1]])  # rounding may have left the range
        if not missing.all():
            norm = LogNorm(*levels[[0, -1]]) if _is_geometric(levels) else Normalize(*levels[[0, -1]])
            filled = axes.contourf(x, y, fine.T, levels=levels, norm=norm, cmap=_MAP)
            lines = axes.contour(x, y, fine.T, levels=levels, colors="black", linewidths=0.4, alpha=0.7)
            if (own := _own_levels(fine, levels)).size:
                own_levels = True
                thin = axes.contour(x, y, fine.T, levels=own, colors="black", linewidths=0.5, linestyles="--")
                axes.clabel(thin, fmt="{:.10g}".format, fontsize=6.5, colors="black")
            elif np.ptp(fine[np.isfinite(fine)]) > 0:
                axes.clabel(lines, levels[1:-1:2], fmt="%.3g", fontsize=6.5, colors="black")
        if len(x) > len(grid.axes[0]):
            interpolated = True
            axes.plot(*(part.ravel() for part in np.meshgrid(*grid.axes)), ".", color="black", markersize=1.2)
        _hatch_missing(axes, grid)
        if grid.marks.size:
            _draw_marks(axes, grid)
        else:
            axes.plot(0, 0, marker="+", color="black", markersize=10, markeredgewidth=1.6)
        _name_axes(axes, grid)
        axes.tick_params(labelsize=8)
        if axes not in places[:, 0]:
            axes.set_ylabel("")
        if axes not in panels[-columns:]:  # its place is the next panel's heading
            axes.set_xlabel("")
        if _in_weight_units(grid):
            axes.set_aspect("equal")
        axes.set_title(_range(name, grid), fontsize=8)
    if filled is not None:
        bar = figure.colorbar(filled, ax=list(panels), label="loss", ticks=levels[::2], fraction=0.05, pad=0.02)
        bar.ax.set_yticklabels([f"{level:.3g}" for level in levels[::2]], fontsize=8)
        bar.ax.minorticks_off()
        bar.ax.spines["outline"].set_visible(False)
    size = " x ".join(map(str, first.losses.shape))
    drawn = f"{size} points measured" + (" (dots), cubic interpolation between them" if interpolated else "")
    dashed = "dashed: levels of that panel alone, which few of the common ones cross" if own_levels else ""
    return finish(figure, title, [describe_variation(first.about), drawn, dashed, note], record=record)


def _own_levels(heights: FloatArray, common: FloatArray) -> FloatArray:
    """Return round levels for a panel that too few of the common ones cross; none for any other, or a constant one."""
    low, high = float(np.nanmin(heights)), float(np.nanmax(heights))
    if ((common > low) & (common < high)).sum() >= _FEWEST or high - low <= _ROUNDING * max(abs(low), abs(high)):
        return np.empty(0)
    levels = np.asarray(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), dtype=np.float64)
    margin = 1e-3 * (high - low)
    return levels[(levels > low + margin) & (levels < high - margin)]


def _range(name: str, grid: Grid) -> str:
    """Return a panel's heading: its name, and its own losses, which the common colours may not tell."""
    finite = grid.losses[np.isfinite(grid.losses)]
    words = f"{finite.min():.3g} to {finite.max():.3g}" if finite.size else "no finite loss"
    if not grid.marks.size:
        words += f"; at the weights (+) {grid.origin_loss:.3g}"
    return f"{name}\n{words}" if name else words  # in one line it would meet the next panel's


def _refined(grid: Grid, *, logarithmic: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return coordinates and losses to draw: a coarse grid is interpolated, within the range of what was measured."""
    x, y = grid.axes
    losses = np.where(np.isfinite(grid.losses), grid.losses, np.nan)
    if min(losses.shape) < 4 or min(losses.shape) >= _FINE or np.isnan(losses).any():
        return x, y, losses
    heights = np.log(losses) if logarithmic else losses
    fine_x, fine_y = (np.linspace(axis[0], axis[-1], 2 * _FINE + 1) for axis in (x, y))
    fine = RectBivariateSpline(x, y, heights)(fine_x, fine_y).clip(heights.min(), heights.max())
    return fine_x, fine_y, np.exp(fine) if logarithmic else fine


def make_surface_figure(
    grid: Grid, *, title: str = "Loss landscape", record: Mapping[str, Any] | None = None, note: str = ""
) -> Figure:
    """Return a two-dimensional landscape as a surface; cells that are not finite are holes.

    Args:
        grid: Two-dimensional.
        title: What the figure shows.
        record: Of the run it was measured on.
        note: What else to say below.

    Returns:
        The figure. The height is the logarithm of the loss where losses span more than a factor of thirty.

    Raises:
        ValueError: If the grid is not two-dimensional or has fewer than 2 x 2 cells.
    """
    _check_two_dimensional(grid)
    figure = Figure(figsize=(5.0, 4.4), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    finite = grid.losses[np.isfinite(grid.losses)]
    logarithmic = _is_wide(finite)
    x, y, heights = _refined(grid, logarithmic=logarithmic)
    a, b = np.meshgrid(x, y, indexing="ij")
    if logarithmic:
        heights = np.log10(heights)
    if finite.size:
        low, high = float(np.nanmin(heights)), float(np.nanmax(heights))
        axes.plot_surface(
            a,
            b,
            heights,
            cmap=_MAP,
            norm=Normalize(low, high if high > low else low + 1),
            rcount=51,
            ccount=51,
            linewidth=0.2,
            edgecolor=(1, 1, 1, 0.25),
        )
    _name_axes(axes, grid)
    axes.set_zlabel("log10 of the loss" if logarithmic else "loss", labelpad=4, fontsize=8)
    axes.view_init(elev=32, azim=-57)
    axes.set_box_aspect(None, zoom=0.85)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_tick_params(labelsize=7.5)
        axis.pane.set_facecolor("0.97")
    size = " x ".join(map(str, grid.losses.shape))
    drawn = f"{size} points measured" + (", cubic interpolation between them" if len(x) > len(grid.axes[0]) else "")
    return finish(figure, title, [describe_variation(grid.about), drawn, note], record=record)


def make_slices_figure(
    grids: Mapping[str, Grid],
    *,
    title: str = "Loss along one direction",
    places: Mapping[str, tuple[int, str]] | None = None,
    record: Mapping[str, Any] | None = None,
    note: str = "",
) -> Figure:
    """Return one-dimensional landscapes in one set of axes.

    Args:
        grids: By the name of each.
        title: What the figure shows.
        places: By the same names, of which task and when: a task keeps its colour and marker.
        record: Of the run they were measured on.
        note: What else to say below.

    Returns:
        The figure. Infinite cells are marked at the upper edge, NaN cells at the lower one.

    Raises:
        ValueError: If there is no grid, or one is not one-dimensional.
    """
    _check_one_dimensional(grids)
    variations = {name: describe_variation(grid.about) for name, grid in grids.items()}
    alike = len(set(variations.values())) == 1
    # The legend stands below the axes and takes from their height.
    rows = math.ceil(len(grids) / 3) if alike else 2 * len(grids)
    figure = Figure(figsize=(6.4, 3.6 + 0.18 * rows), layout="constrained")
    axes = figure.subplots()
    for k, (name, grid) in enumerate(grids.items()):
        # Where several things were varied, each line says its own, and else the title does.
        label = name if alike else textwrap.fill(f"{name}: {variations[name]}", 95, subsequent_indent="    ")
        _draw_line(axes, grid.axes[0], grid.losses, label, *(places or {}).get(name, (k, "")))
    _log_if_wide(axes, np.concatenate([grid.losses for grid in grids.values()]))
    axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    labels = {grid.about["axes"][0]["label"] for grid in grids.values()}
    first = next(iter(grids.values()))
    axes.set_xlabel(_axis_label(first, 0) if len(labels) == 1 else "coordinate along each line's direction")
    axes.set_ylabel("loss")
    figure.legend(**BELOW, ncols=3 if alike else 1)
    return finish(figure, title, [variations[next(iter(variations))] if alike else "", note], record=record)


def make_connectivity_figure(
    grids: Mapping[str, Grid], *, record: Mapping[str, Any] | None = None, note: str = ""
) -> Figure:
    """Return the loss on the straight lines between two models, with each barrier.

    Args:
        grids: Lines by name, such as one in factor and one in merged space.
        record: Of the run they were measured on.
        note: What else to say below.

    Returns:
        The figure; thin lines join the ends, the barrier is the highest loss above them.

    Raises:
        ValueError: If there is no line, or one is not one-dimensional.
    """
    _check_one_dimensional(grids)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for k, (name, grid) in enumerate(grids.items()):
        alphas, losses = grid.axes[0], grid.losses
        colour = _COLOURS[k % len(_COLOURS)]
        straight = losses[0] + alphas * (losses[-1] - losses[0])
        above = (losses - straight)[1:-1]
        label = f"{name}: {grid.about['space']}, {grid.about['num_parameters']:,} weights"
        if np.isfinite(above).all():
            top = 1 + int(np.argmax(above))
            label += f", barrier {above[top - 1]:.3g}"
            axes.plot([alphas[top]] * 2, [straight[top], losses[top]], color=colour, linewidth=1.2, linestyle=":")
        else:
            label += ", barrier not finite"
        _draw_line(axes, alphas, losses, label, k)
        axes.plot(alphas[[0, -1]], losses[[0, -1]], color=colour, linewidth=0.8, alpha=0.6)
    axes.set_xlabel("share of the second model")
    axes.set_ylabel("loss")
    figure.legend(**BELOW)
    lines = dict.fromkeys(grid.about["axes"][0]["label"] for grid in grids.values())
    return finish(figure, "Linear mode connectivity", [f"straight lines {', '.join(lines)}", note], record=record)


def make_density_figure(
    spectra: Mapping[str, Mapping[str, Any]],
    *,
    scope: str | None = None,
    kernel: float = _KERNEL,
    title: str = "Hessian spectrum",
    record: Mapping[str, Any] | None = None,
    note: str = "",
) -> Figure:
    """Return the density of eigenvalues, and below it how many lie beyond each value, without a kernel.

    Args:
        spectra: By name, mappings with ``nodes`` and ``weights`` (num_probes, num_steps) and ``size``.
        scope: What was varied: one of the scopes' names, or other words.
        kernel: Standard deviation of the density's Gaussian bumps, as a share of the range of all nodes.
        title: What the figure shows.
        record: Of the run they were measured on.
        note: What else to say below.

    Returns:
        The figure. The band is the least and greatest over probes.

    Raises:
        ValueError: If there is no spectrum.
    """
    if not spectra:
        raise ValueError("a figure of densities needs at least one spectrum")
    nodes = {name: np.asarray(spectrum["nodes"], dtype=np.float64) for name, spectrum in spectra.items()}
    weights = {name: np.asarray(spectrum["weights"], dtype=np.float64) for name, spectrum in spectra.items()}
    low, high = min(x.min() for x in nodes.values()), max(x.max() for x in nodes.values())
    span = (high - low) or abs(high) or 1.0
    sigma = kernel * span
    margin = max(0.05 * span, 5 * sigma)
    grid = np.linspace(low - margin, high + margin, 1201)
    figure = Figure(figsize=(6.4, 5.2 + 0.18 * math.ceil(len(spectra) / 2)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    floors, peaks, sizes = [], [], []
    for k, (name, spectrum) in enumerate(spectra.items()):
        size = int(spectrum["size"])
        colour, style = _COLOURS[k % len(_COLOURS)], _STYLES[k // len(_COLOURS) % len(_STYLES)]
        bumps = np.exp(-0.5 * ((grid - nodes[name][..., None]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        per_probe = (weights[name][..., None] * bumps).sum(axis=1)
        _draw_band(above, grid, per_probe, f"{name} ({size:,} eigenvalues)", colour, style)
        floors.append(1 / (size * sigma * math.sqrt(2 * math.pi)))
        peaks.append(float(per_probe.max()))
        sizes.append(size)
        _draw_band(below, grid, _counts_beyond(nodes[name], weights[name], grid) * size, f"_{name}", colour, style)
    above.axhline(min(floors), color="0.5", linewidth=0.8, linestyle=":")
    # Lower values are the tails of the kernel and no eigenvalues.
    above.set_yscale("log")
    above.set_ylim(0.1 * min(floors), 4 * max(peaks))
    above.annotate("peak of one\neigenvalue", (1, min(floors)), (4, 0), **_EDGE_NOTE)
    above.set_ylabel("density per unit eigenvalue")
    figure.legend(**BELOW, ncols=2)  # inside the axes it would cover the peak
    below.set_yscale("log")
    below.set_ylim(0.1, 2 * max(sizes))
    below.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    below.annotate("one\neigenvalue", (1, 1), (4, 0), **_EDGE_NOTE)
    below.set_ylabel("eigenvalues beyond it,\naway from zero")
    below.set_xlabel("eigenvalue of the Hessian")
    for axes in (above, below):
        axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlim(grid[0], grid[-1])
    probes = {x.shape for x in nodes.values()}
    made = ", ".join(f"{count} probes x {steps} steps" for count, steps in sorted(probes))
    how = f"{made}; Gaussian kernel of standard deviation {sigma:.3g} (above), none (below)"
    how += "; bands: least to greatest over probes"
    return finish(figure, title, [describe_variation({"scope": scope, "note": how}), note], record=record)


def make_eigenvalues_figure(
    spectra: Mapping[str, Mapping[str, Any]],
    *,
    scope: str | None = None,
    places: Mapping[str, tuple[int, str]] | None = None,
    title: str = "Hessian eigenvalues",
    record: Mapping[str, Any] | None = None,
    note: str = "",
) -> Figure:
    """Return eigenvalues in order, with residuals as error bars; those that did not converge are crossed out.

    Args:
        spectra: By name, mappings with ``values``, ``residuals`` and ``converged``, (k,) each.
        scope: What was varied: one of the scopes' names, or other words.
        places: By the spectra's names, of which task and when: a task keeps its colour and marker.
        title: What the figure shows.
        record: Of the run they were measured on.
        note: What else to say below.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no spectrum.
    """
    if not spectra:
        raise ValueError("a figure of eigenvalues needs at least one spectrum")
    figure = Figure(figsize=(6.4, 3.6 + 0.18 * math.ceil(len(spectra) / 3)), layout="constrained")
    axes = figure.subplots()
    crossed = False
    everything = np.concatenate([np.asarray(spectrum["values"], dtype=np.float64) for spectrum in spectra.values()])
    longest = max(len(spectrum["values"]) for spectrum in spectra.values())
    for k, (name, spectrum) in enumerate(spectra.items()):
        values, residuals = (np.asarray(spectrum[key], dtype=np.float64) for key in ("values", "residuals"))
        converged = np.asarray(spectrum["converged"], dtype=bool)
        # Side by side, so that equal values do not hide one another.
        beside = np.arange(1, len(values) + 1) + 0.5 * ((k + 0.5) / len(spectra) - 0.5)
        own = look(*(places or {}).get(name, (k, "")))
        axes.errorbar(beside, values, yerr=residuals, color=own["color"], linestyle="none", capsize=3, linewidth=1)
        axes.plot(beside, values, **{**own, "linestyle": "none"}, label=name)
        axes.plot(beside[~converged], values[~converged], "x", color="black", markersize=10)
        crossed = crossed or not converged.all()
    _log_if_wide(axes, everything)
    if axes.get_yscale() == "linear":
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_xlabel("eigenvalue, in the order of the search")
    axes.set_ylabel("eigenvalue of the Hessian")
    figure.legend(**BELOW, ncols=3)
    how = "bars: residuals" + ("; crossed out: not converged" if crossed else "")
    return finish(figure, title, [describe_variation({"scope": scope, "note": how}), note], record=record)


def make_layers_figure(
    found: Mapping[str, Mapping[str, Any]],
    *,
    scope: str | None = None,
    places: Mapping[str, tuple[int, str]] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Figure:
    """Return the largest eigenvalue and the trace of each layer's block and of the factors' blocks.

    Args:
        found: By name, mappings with ``layers`` and ``factors``, each by name a mapping with ``top_eigenvalue``,
            ``residual``, ``trace`` and ``trace_standard_error``.
        scope: What was varied: one of the scopes' names, or other words.
        places: By the same names, of which task and when: a task keeps its colour and marker.
        record: Of the run they were measured on.

    Returns:
        The figure, with residuals and standard errors as bars.

    Raises:
        ValueError: If there is nothing to show.
    """
    if not found:
        raise ValueError("a figure of layers needs at least one measuring point")
    names = list(dict.fromkeys(name for each in found.values() for name in each["layers"]))
    factors = list(dict.fromkeys(name for each in found.values() for name in each["factors"]))
    figure = Figure(figsize=(min(6.4 + 0.15 * max(len(names) - 12, 0), 12), 5.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    rows = (("top_eigenvalue", "residual", "largest eigenvalue"), ("trace", "trace_standard_error", "trace"))
    for axes, (key, error, words) in zip(panels, rows, strict=True):
        for k, (title, each) in enumerate(found.items()):
            blocks = {**each["layers"], **{f"all {name}": block for name, block in each["factors"].items()}}
            order = [*names, *(f"all {name}" for name in factors)]
            values = [math.nan if (v := blocks.get(name, {}).get(key)) is None else v for name in order]
            bars = [blocks.get(name, {}).get(error) or 0.0 for name in order]
            beside = np.arange(len(order)) + 0.5 * ((k + 0.5) / len(found) - 0.5)
            own = look(*(places or {}).get(title, (k, "")))
            axes.errorbar(beside, values, yerr=bars, color=own["color"], linestyle="none", capsize=3, linewidth=1)
            axes.plot(beside, values, **{**own, "linestyle": "none"}, label=title)
        axes.set_ylabel(words)
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        if factors:
            axes.axvline(len(names) - 0.5, color="0.6", linewidth=0.8)
    ticks = [*_without_common_start(names), *(f"all {name}" for name in factors)]
    turned = 60 if len(names) > 6 else 20
    panels[1].set_xticks(range(len(ticks)), ticks, rotation=turned, ha="right", rotation_mode="anchor", fontsize=7.5)
    figure.legend(*panels[0].get_legend_handles_labels(), **BELOW, ncols=3)
    how = "each block by itself; bars: residual, standard error"
    title = "Curvature by layer" + (" and factor" if factors else "")
    return finish(figure, title, [describe_variation({"scope": scope, "note": how})], record=record)


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Leave out the modules that all names begin with, but for the last two parts of each."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(parts) > 1 and all(len(own) > common + 2 and own[common] == parts[0][common] for own in parts):
        common += 1
    return [".".join(own[common:]) for own in parts]


def make_recorded_eigenvalues_figure(
    pools: Mapping[str, Sequence[float]],
    correct: Mapping[str, Sequence[float]],
    *,
    scope: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Figure:
    """Return what block Lanczos as recorded gives at each measuring point, and beside it what is true.

    Args:
        pools: By measuring point, the recorded values of all batches.
        correct: By measuring point, the dominant eigenvalue of each batch, where that was measured.
        scope: What was varied.
        record: Of the run they were measured on.

    Raises:
        ValueError: If there is no measuring point.
    """
    if not pools:
        raise ValueError("a figure of recorded eigenvalues needs at least one measuring point")
    figure = Figure(figsize=(max(4.2, 1.6 + 0.75 * len(pools)), 4.2), layout="constrained")
    axes = figure.subplots()
    series = (
        (pools, "x", _COLOURS[5], "as recorded"),
        (correct, "o", _COLOURS[0], "correct, each batch's dominant one"),
    )
    for k, (found, marker, colour, label) in enumerate(series):
        own = [(place, np.asarray(found[name], dtype=np.float64)) for place, name in enumerate(pools) if name in found]
        for number, (place, values) in enumerate(own):
            beside = np.full(len(values), place + 0.3 * (k - 0.5))
            axes.plot(beside, values, marker, color=colour, markersize=5, label=label if number == 0 else "_")
    _log_if_wide(axes, np.concatenate([np.asarray(v, dtype=np.float64) for v in (*pools.values(), *correct.values())]))
    axes.set_xticks(range(len(pools)), list(pools), rotation=40, ha="right", fontsize=7.5)
    axes.set_xlim(-0.6, len(pools) - 0.4)
    axes.set_ylabel("eigenvalue of a batch's Hessian")
    figure.legend(**BELOW, ncols=2)
    how = "as recorded: basis not orthogonal, so values are repeated and too large; loss over padding too"
    return finish(
        figure,
        "As recorded, faults included: eigenvalues",
        [describe_variation({"scope": scope, "note": how})],
        record=record,
    )


def describe_scope(scope: str) -> str:
    """Return in words which weights a scope chooses; other words stay as they are."""
    return _SCOPES.get(scope, scope)


def picture_words(name: str, tasks: Sequence[str] = ()) -> str:
    """Return in words what a figure shows, from its file's name without suffix.

    >>> picture_words("flatness_adapter_landscape_2", ["dbpedia", "amazon"])
    'Loss landscape, task 2 amazon: LoRA factors A and B'
    """
    parts = name.removeprefix("flatness_").replace("-", "_").split("_")
    scope = next((part for part in parts if part in _SCOPES), "")
    number = next((int(part) for part in parts if part.isdecimal()), 0)
    kind = "_".join(part for part in parts if part != scope and not part.isdecimal())
    if kind not in _PICTURES:
        return name.replace("_", " ").replace("-", " ")
    task = f", task {number} {tasks[number - 1]}" if 0 < number <= len(tasks) else ""
    return f"{_PICTURES[kind]}{task}" + (f": {describe_scope(scope)}" if scope else "")


def describe_variation(about: Mapping[str, Any]) -> str:
    """Return in words what was varied: which weights, along what, and where a direction is zero by construction."""
    parts = []
    if scope := about.get("scope"):
        count = about.get("num_parameters")
        parts.append(describe_scope(scope) + (f" ({count:,} weights)" if count else ""))
    axes = about.get("axes", [])
    if marks := about.get("marks"):
        parts.append(f"plane through {', '.join(marks)}")
    else:
        parts += dict.fromkeys(_words(about, axis) for axis in axes)
    for axis in axes:
        if zeros := sum(axis.get("zero_units", {}).values()):
            parts.append(f"{zeros} units have zero weights and do not move along {axis['label']}")
    if skipped := len({name for axis in axes for name in axis.get("skipped", ())}):
        parts.append(f"{skipped} biases and norm weights held fixed")
    if note := about.get("note"):
        parts.append(note)
    return "; ".join(part for part in parts if part)


_LABEL: Mapping[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 8.5,
    "color": "black",
    "bbox": {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"},
}
_EDGE_NOTE: Mapping[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "textcoords": "offset points",
    "va": "center",
    "fontsize": 7,
    "color": "0.4",
    "annotation_clip": False,
}


def _words(about: Mapping[str, Any], axis: Mapping[str, Any]) -> str:
    kind = axis.get("normalisation", "")
    if kind == "filter" and about.get("scope") == "adapter":
        return _FACTOR_FILTERS
    return _NORMALISATIONS.get(kind, "")


def _levels(grids: Iterable[Grid]) -> FloatArray:
    """Return contour levels for all of some landscapes: evenly spaced, by their logarithms where losses span much."""
    values = np.concatenate([grid.losses[np.isfinite(grid.losses)] for grid in grids])
    if not values.size:
        return np.linspace(0.0, 1.0, _LEVELS)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > _LEVEL_RATIO * low:
        return np.geomspace(low, high, _LEVELS)
    # A flat landscape has no levels of its own.
    return np.linspace(low, high if high > low else low + max(abs(low), 1.0) * 1e-6, _LEVELS)


def _is_geometric(levels: FloatArray) -> bool:
    return bool(levels[0] > 0 and levels[-1] > _LEVEL_RATIO * levels[0])


def _is_wide(values: FloatArray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > _LOG_RATIO * finite.min())


def _log_if_wide(axes: Axes, values: FloatArray) -> None:
    if _is_wide(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())


def _hatch_missing(axes: Axes, grid: Grid) -> None:
    """Fill what no contour covers with a hatching, and say in a legend what it is."""
    kinds = {
        "NaN": int((grid.done & np.isnan(grid.losses)).sum()),
        "infinite": int(np.isinf(grid.losses).sum()),
        "not evaluated": int((~grid.done).sum()),
    }
    words = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
    axes.set_facecolor("0.9")
    if not words:
        return
    axes.patch.set(hatch="///", edgecolor="0.6", linewidth=0)
    # The hatching shows through between a missing cell and its neighbours too: contours need all corners.
    key = Patch(facecolor="0.9", edgecolor="0.6", hatch="///", label=f"cells: {words}")
    axes.legend(handles=[key], **{**_LEGEND, "loc": "lower right"})
    for index in zip(*np.nonzero(~np.isfinite(grid.losses) & grid.done), strict=True):
        symbol = "x" if np.isnan(grid.losses[index]) else "^"
        place = [axis[k] for axis, k in zip(grid.axes, index, strict=True)]
        axes.plot(*place, marker=symbol, color="black", markersize=3.5, linestyle="none")


def _draw_marks(axes: Axes, grid: Grid) -> None:
    for k, (name, (x, y), loss) in enumerate(zip(grid.about["marks"], grid.marks, grid.mark_losses, strict=True)):
        axes.plot(
            x, y, marker=_MARKERS[k % len(_MARKERS)], color="white", markeredgecolor="black", markersize=8, linestyle=""
        )
        low, high = grid.axes[0][[0, -1]]
        inwards: dict[str, Any] = {"ha": "right"} if x > low + 0.65 * (high - low) else {}
        axes.annotate(f"{name}: {loss:.4g}", (x, y), (-8 if inwards else 8, 8), **_LABEL, **inwards)


def _draw_line(axes: Axes, x: FloatArray, y: FloatArray, label: str, k: int, when: str = "") -> None:
    own = look(k, when)
    colour = own["color"]
    finite = np.where(np.isfinite(y), y, np.nan)
    every = max(1, len(x) // 8)  # closer markers would hide the dashes
    axes.plot(x, finite, **own, markersize=4.5, markevery=(k % every, every), linewidth=1.4, label=label)
    for missing, symbol, height in ((np.isposinf(y), "^", 0.98), (np.isnan(y) | np.isneginf(y), "x", 0.02)):
        if missing.any():
            what = "infinite" if symbol == "^" else "NaN"
            axes.plot(
                x[missing],
                np.full(int(missing.sum()), height),
                transform=axes.get_xaxis_transform(),
                color=colour,
                marker=symbol,
                linestyle="none",
                label=f"{what} ({int(missing.sum())})",
            )


def _draw_band(axes: Axes, x: FloatArray, per_probe: FloatArray, label: str, colour: str, style: str) -> None:
    axes.fill_between(x, per_probe.min(axis=0), per_probe.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, per_probe.mean(axis=0), color=colour, linestyle=style, linewidth=1.5, label=label)


def _counts_beyond(nodes: FloatArray, weights: FloatArray, grid: FloatArray) -> FloatArray:
    """Return the share of eigenvalues at least as far from zero as each point, on its side, per probe."""
    farther = np.where(grid >= 0, nodes[..., None] >= grid, nodes[..., None] <= grid)
    shares: FloatArray = (weights[..., None] * farther).sum(axis=1)
    return shares


def _in_weight_units(grid: Grid) -> bool:
    return all(axis.get("normalisation") == "l2" for axis in grid.about["axes"])


def _axis_label(grid: Grid, k: int) -> str:
    axis = grid.about["axes"][k]
    unit = " (weight units)" if axis.get("normalisation") == "l2" else ""
    return f"{axis['label']}{unit}"


def _name_axes(axes: Axes, grid: Grid) -> None:
    axes.set_xlabel(_axis_label(grid, 0), fontsize=8)
    axes.set_ylabel(_axis_label(grid, 1), fontsize=8)


def _check_two_dimensional(grid: Grid) -> None:
    if grid.losses.ndim != 2 or min(grid.losses.shape) < 2:
        raise ValueError(f"a contour or surface needs a grid of at least 2 x 2 cells, got {grid.losses.shape}")


def _check_one_dimensional(grids: Mapping[str, Grid]) -> None:
    if not grids:
        raise ValueError("a figure of slices needs at least one")
    for name, grid in grids.items():
        if grid.losses.ndim != 1:
            raise ValueError(f"{name} is not one-dimensional but {grid.losses.shape}")

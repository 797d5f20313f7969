"""Figures and a table of the flatness that was measured in a run, from its record and the files that this names."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flatpatch.measuring import WHENS
from flatpatch.report.drawing import BELOW, SUFFIXES, finish, save
from flatpatch.report.flatness_figures import (
    Grid,
    describe_scope,
    make_density_figure,
    make_eigenvalues_figure,
    make_landscapes_figure,
    make_layers_figure,
    make_recorded_eigenvalues_figure,
    make_slices_figure,
    make_surface_figure,
    read_grid,
)
from flatpatch.report.ledger import make_ledger_figure, read_ledgers
from flatpatch.report.live import make_live_figure, read_live
from flatpatch.report.writing import certificate_table, mark_of

_DPI = 150
_PREFIX = "flatness_"
_COLOURS = {"before": "#56B4E9", "at_loss": "#009E73", "after": "#0072B2", "finished": "#D55E00"}
_WHEN = {"before": "before", "at_loss": "at the loss asked for", "after": "after", "finished": "measured afterwards"}
_MARKERS = {"before": "o", "at_loss": "D", "after": "s", "finished": "^"}
# What is drawn over the tasks, with the value that tells how far it can be trusted.
_OVER_TASKS = {
    "loss": ("loss of the sample", None),
    "top_eigenvalue": ("largest eigenvalue", "top_eigenvalue_residual"),
    "trace": ("trace", "trace_standard_error"),
    "keskar_lower_bound": ("Keskar's sharpness (%),\nhighest found", None),
    "sam_sharpness_ascent": ("loss rise in SAM's ball,\nprojected ascent", None),
}
# Columns of the table, each with its two lines of heading.
_COLUMNS = {
    "loss": ("", "loss"),
    "top_eigenvalue": ("", "top eigenv."),
    "trace": ("", "trace"),
    "keskar_sharpness": ("Keskar (%),", "protocol"),
    "keskar_lower_bound": ("Keskar (%),", "highest found"),
    "sam_sharpness_ascent": ("SAM ball,", "ascent"),
    "as_recorded_eigenvalue_median": ("as recorded:", "median eigenv."),
    "as_recorded_eigenvalue_max": ("as recorded:", "top eigenv."),
    "as_recorded_keskar_sharpness": ("as recorded:", "Keskar (%)"),
}
# Measured with the faults of the experiment record's code: arrays and figures of their own, labelled so.
_RECORDED = "as_recorded_"

Entry = Mapping[str, Any]


def draw_flatness(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured in a run, as PNG and PDF files in ``figures/``.

    Args:
        record: The run's record.
        folder: The run's folder, in which the measurements' files are.

    Returns:
        The files written, none where nothing was measured: per scope the values over the tasks, eigenvalues, the
        curvature by layer, densities and slices, and per task its landscapes side by side; the last landscape as a
        surface too, the ledger of forgetting, and what was followed live. Those side by side have the same colours and
        levels. What was measured as recorded has figures of its own. A file that is missing or damaged is left out.
    """
    target = folder / "figures"
    for suffix in SUFFIXES:
        for old in target.glob(f"{_PREFIX}*{suffix}"):
            old.unlink()
    written = []
    for name, figure in _figures(record, folder):
        target.mkdir(parents=True, exist_ok=True)
        written += save(figure, target / f"{_PREFIX}{name}", dpi=_DPI)
    return written


def _figures(record: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Figure]]:
    for scope in dict.fromkeys(entry["scope"] for entry in record["flatness"]):
        chosen = [entry for entry in record["flatness"] if entry["scope"] == scope]
        if (figure := make_over_tasks_figure(chosen, record)) is not None:
            yield f"{scope}_over_tasks", figure
        results = {_name(entry): results_of(folder, entry) for entry in chosen}
        places = {_name(entry): (entry["task_index"], entry["when"]) for entry in chosen}
        if spectra := {name: found["eigenvalues"] for name, found in results.items() if "eigenvalues" in found}:
            figure = make_eigenvalues_figure(spectra, scope=scope, places=places, record=record)
            yield f"{scope}_eigenvalues", figure
        if blocks := {name: found["layers"] for name, found in results.items() if "layers" in found}:
            yield f"{scope}_layers", make_layers_figure(blocks, scope=scope, places=places, record=record)
        latest = [entry for entry in chosen if entry["when"] != "before"] or chosen
        densities = {_name(entry): results[_name(entry)].get("density") for entry in latest}
        if shown := {name: density for name, density in densities.items() if density}:
            yield f"{scope}_density", make_density_figure(shown, scope=scope, record=record)
        if slices := {name: grid for name, found in results.items() if (grid := _slice(found)) is not None}:
            yield f"{scope}_slices", make_slices_figure(slices, places=places, record=record)
        pools = {
            name: found["recorded_eigenvalues"] for name, found in results.items() if "recorded_eigenvalues" in found
        }
        if pools:
            figure = make_recorded_eigenvalues_figure(
                {name: [value for values in found["values"] for value in values] for name, found in pools.items()},
                {name: results[name]["batchwise"]["values"] for name in pools if "batchwise" in results[name]},
                scope=scope,
                record=record,
            )
            yield f"{scope}_{_RECORDED}eigenvalues", figure
        for prefix, words in ((_RECORDED, "As recorded, faults included: loss landscape"), ("", "Loss landscape")):
            grids = [(entry, grid) for entry in chosen if (grid := _landscape(folder, entry, prefix)) is not None]
            for index in dict.fromkeys(entry["task_index"] for entry, _ in grids):
                own = {_WHEN[entry["when"]]: grid for entry, grid in grids if entry["task_index"] == index}
                title = f"{words}, task {index + 1} {record['tasks'][index]}"
                yield f"{scope}_{prefix}landscape_{index + 1}", make_landscapes_figure(own, title=title, record=record)
        if not grids:
            continue
        entry, last = grids[-1]
        title = f"Loss landscape, task {entry['task_index'] + 1} {entry['task']}, {_WHEN[entry['when']]}"
        yield f"{scope}_surface", make_surface_figure(last, title=title, record=record)
    if (figure := make_ledger_figure(read_ledgers(folder), record)) is not None:
        yield "ledger", figure
    if (figure := make_live_figure(read_live(folder), record)) is not None:
        yield "live", figure


def make_over_tasks_figure(entries: Sequence[Entry], record: Mapping[str, Any]) -> Figure | None:
    """Return the values of one scope over the tasks, before and after each.

    Args:
        entries: Of the record's ``flatness``, of one scope.
        record: The run's record.

    Returns:
        The figure, with bars for the residual of an eigenvalue and the standard error of a trace; None where
        nothing was measured.
    """
    known = [name for name in _OVER_TASKS if any(_value(entry, name) is not None for entry in entries)]
    if not known:
        return None
    whens = [when for when in _COLOURS if any(entry["when"] == when for entry in entries)]
    trained = sorted({entry["task_index"] for entry in entries})
    # Of a single task the times stand side by side, in small panels: over the tasks they would be mostly empty.
    single = len(trained) == 1
    if single and len(whens) == 1:
        return None  # one number each, which the tables have
    if single:
        figure = Figure(figsize=(1.2 + 1.35 * len(known), 2.7), layout="constrained")
        panels = figure.subplots(1, len(known), squeeze=False)[0]
    else:
        figure = Figure(figsize=(6.4, 1.3 + 1.3 * len(known)), layout="constrained")
        panels = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, known, strict=True):
        text, error = _OVER_TASKS[name]
        for k, when in enumerate(whens):
            points = [(e["task_index"], _value(e, name), _value(e, error)) for e in entries if e["when"] == when]
            seen = [point for point in points if point[1] is not None]
            if not seen:
                continue
            offset = 0.0 if single else 0.12 * (k - (len(whens) - 1) / 2)
            axes.errorbar(
                [k if single else point[0] + offset for point in seen],
                [point[1] for point in seen],
                yerr=[point[2] or 0.0 for point in seen] if error else None,
                color=_COLOURS[when],
                marker=_MARKERS[when],
                markersize=5,
                linestyle="none",
                capsize=3,
                label=f"{when} the task" if when in WHENS else _WHEN[when],
            )
        if single:
            axes.set_title(text, fontsize=7.5)
            axes.set_xticks(range(len(whens)), [_WHEN[when] for when in whens], rotation=30, ha="right")
            axes.set_xlim(-0.6, len(whens) - 0.4)
        else:
            axes.set_ylabel(text, fontsize=8)
        axes.tick_params(labelsize=7.5 if single else 8)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    if not single:
        tasks = record["tasks"]
        panels[-1].set_xticks(range(len(tasks)), [f"{i + 1} {task}" for i, task in enumerate(tasks)])
        panels[-1].set_xlim(-0.4, len(tasks) - 0.6)
        if len(tasks) > 6:
            panels[-1].tick_params(axis="x", labelrotation=40)
        figure.legend(*panels[0].get_legend_handles_labels(), **BELOW, ncols=len(whens))
    samples = ", ".join(map(str, sorted({entry["samples"] for entry in entries})))
    title = f"Flatness of {describe_scope(entries[0]['scope'])}"
    if single:
        title += f", task {trained[0] + 1} {record['tasks'][trained[0]]}"
    note = f"{samples} training examples of the task at hand; bars: residual, standard error"
    return finish(figure, title, [note], record=record)


def flatness_table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of a small table of what was measured; none where nothing was.

    Each row ends with the mark of its scope: whether its numbers, the loss apart, depend on how LoRA's factors are
    written; a row of a loss alone has none. Below stand the certificates of that, as far as they were measured.
    """
    entries = record["flatness"]
    shown = [name for name in _COLUMNS if any(_value(entry, name) is not None for entry in entries)]
    if not entries:
        return []
    title = "flatness around"
    width = max(len(title), *(len(f"{e['task_index'] + 1} {e['task']} {e['when']}") for e in entries))
    wide = {name: max(12, 1 + max(map(len, _COLUMNS[name]))) for name in shown}
    upper, lower = ("".join(f"{_COLUMNS[name][k]:>{wide[name]}}" for name in shown) for k in (0, 1))
    lines = [f"{'':<{width}} {'':<9}{upper}"] if upper.strip() else []
    flat = [name for name in shown if name != "loss"]
    marks = [
        mark_of(record, entry) if any(_value(entry, name) is not None for name in flat) else "" for entry in entries
    ]
    lines.append(
        f"{title:<{width}} {'scope':<9}{lower}".rstrip() + ("  but for the loss: LoRA's writing" if any(marks) else "")
    )
    for entry, mark in zip(entries, marks, strict=True):
        place = f"{entry['task_index'] + 1} {entry['task']} {entry['when']}"
        numbers = "".join(f"{_short(_value(entry, name)):>{wide[name]}}" for name in shown)
        lines.append(f"{place:<{width}} {entry['scope']:<9}{numbers}" + (f"  {mark}" if mark else ""))
    return lines + certificate_table(entries)


def _value(entry: Entry, name: str | None) -> float | None:
    if name is None:
        return None
    value = entry["loss"] if name == "loss" else entry["values"].get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _name(entry: Entry) -> str:
    return f"{entry['task_index'] + 1} {entry['task']}, {entry['when']}"


def results_of(folder: Path, entry: Entry) -> dict[str, Any]:
    """Return all that each kind found at a measuring point, by kind; empty where the file cannot be read."""
    try:
        content = json.loads((folder / entry["file"]).read_text(encoding="utf-8"))
        found: dict[str, Any] = content["scopes"][entry["scope"]]["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _slice(results: Mapping[str, Any]) -> Grid | None:
    found = results.get("slice")
    if not found:
        return None
    losses = np.array([math.nan if loss is None else loss for loss in found["losses"]], dtype=np.float64)
    axes = (np.asarray(found["coordinates"], dtype=np.float64),)
    return Grid(losses, np.ones(len(losses), dtype=bool), axes, np.empty((0, 1)), np.empty(0), math.nan, found)


def _landscape(folder: Path, entry: Entry, prefix: str) -> Grid | None:
    path = folder / (entry["arrays"] or "")
    if entry["arrays"] is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if f"{prefix}losses" not in file:
                return None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return read_grid(path, prefix=prefix)

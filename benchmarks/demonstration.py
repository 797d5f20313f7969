r"""The tables and figures of docs/demonstration.md, from the runs' own records.

Run from the repository's root, first the runs, then this::

    for seed in 0 1 2; do for sam in off sam; do
      python -m flatpatch run method=nlora profile=quick device=cpu sam=$sam rho=0.05 seed=$seed \
        measure=all measure_samples=16 measure_batch=8 measure_effort=quick run=nlora-$sam-seed$seed
    done; done
    python -m flatpatch measure run=nlora-off-seed0,nlora-sam-seed0 measure=density \
      measure_samples=16 measure_batch=8 measure_effort=quick output=runs/off-and-sam
    python benchmarks/demonstration.py 'runs=runs/nlora-*-seed?' together=runs/off-and-sam output=docs

The tables take the place of what stands between the marks in docs/demonstration.md; the rest of the page is left.
"""

from __future__ import annotations

import argparse
import glob
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from flatpatch.report.flatness_figures import make_connectivity_figure, read_grid
from flatpatch.report.records import read_record

VALUES = {
    "loss": "loss",
    "top_eigenvalue": "top eigenvalue",
    "trace": "trace",
    "keskar_lower_bound": "Keskar, %",
    "sam_sharpness_ascent": "SAM ball",
}
FURTHER = {
    "batch_eigenvalue_median": "dominant by batch",
    "density_smallest": "lowest node",
    "negative_weight": "negative weight",
    "asam_sharpness_ascent": "ASAM ball",
    "landscape_mean_rise": "landscape rise",
    "slice_mean_rise": "slice rise",
}
SCOPES = ("adapter", "merged")
WHENS = ("before", "after")
LABELS = {"off": "SAM off", "sam": "SAM, rho = 0.05"}
COLOURS = {"off": "#0072B2", "sam": "#D55E00"}
LARGEST_FIGURE = 150_000  # bytes

Record = Mapping[str, Any]


def main(words: Sequence[str]) -> int:
    """Read the runs and write what docs/demonstration.md shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs=3, metavar="runs=PATTERN together=FOLDER output=FOLDER")
    given = dict(word.split("=", 1) for word in parser.parse_args(words).settings)
    folders = sorted(Path(name) for name in glob.glob(given["runs"]))
    records = [read_record(folder) for folder in folders]
    groups = {
        kind: [record for record in records if record["settings"]["sam"]["value"] == kind] for kind in ("off", "sam")
    }
    if not all(groups.values()) or any(record["status"] != "finished" for record in records):
        print(
            f"expected finished runs with SAM off and on, found {[folder.name for folder in folders]}", file=sys.stderr
        )
        return 2
    output = Path(given["output"])
    page = output / "demonstration.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables(groups).items():
        parts = re.split(rf"(<!-- {name} -->\n).*?(<!-- end -->)", text, flags=re.DOTALL)
        if len(parts) != 4:
            print(f"{page} has no single place for the table '{name}'", file=sys.stderr)
            return 2
        text = parts[0] + parts[1] + table + parts[2] + parts[3]
    page.write_text(text, encoding="utf-8")
    together = Path(given["together"])
    finished = {kind: next(f for f in folders if f.name == f"nlora-{kind}-seed0") for kind in groups}
    figures = {
        "flatness-over-tasks": draw_over_tasks(groups),
        "landscapes": draw_landscapes(finished),
        "connectivity": make_connectivity_figure(
            {scope: read_grid(together / f"connectivity-{scope}.npz") for scope in SCOPES}
        ),
    }
    figures["connectivity"].suptitle(_title("The line between the models after the last task, seed 0"), fontsize=10.5)
    (output / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = output / "figures" / f"{name}.png"
        figure.savefig(path, dpi=100)
        print(f"{path}: {path.stat().st_size} bytes")
        if path.stat().st_size > LARGEST_FIGURE:
            print(f"{path} is larger than {LARGEST_FIGURE} bytes", file=sys.stderr)
            return 1
    return 0


def spread(records: Sequence[Record], task: int, when: str, scope: str, name: str) -> list[float]:
    """Return one value of every run, NaN where it was not measured."""
    found = []
    for record in records:
        place = (task, when, scope)
        entry = next(e for e in record["flatness"] if (e["task_index"], e["when"], e["scope"]) == place)
        value = entry["loss"] if name == "loss" else entry["values"].get(name)
        found.append(math.nan if value is None else float(value))
    return found


def tables(groups: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Return the page's tables in Markdown, by the name of their mark."""
    tasks = next(iter(groups.values()))[0]["tasks"]
    made = {}
    for scope in SCOPES:
        lines = [f"| task | time | SAM | {' | '.join(VALUES.values())} |", "|---|---|---|" + "---|" * len(VALUES)]
        for index, task in enumerate(tasks):
            for when in WHENS:
                for kind, records in groups.items():
                    cells = [_cell(spread(records, index, when, scope, name)) for name in VALUES]
                    sam = "off" if kind == "off" else "on"
                    lines.append(f"| {index + 1} {task} | {when} | {sam} | {' | '.join(cells)} |")
        made[scope] = "\n".join(lines) + "\n"
    lines = [f"| scope | task | SAM | {' | '.join(FURTHER.values())} |", "|---|---|---|" + "---|" * len(FURTHER)]
    for scope in SCOPES:
        for index, task in enumerate(tasks):
            for kind, records in groups.items():
                cells = [_cell(spread(records, index, "after", scope, name)) for name in FURTHER]
                lines.append(
                    f"| {scope} | {index + 1} {task} | {'off' if kind == 'off' else 'on'} | {' | '.join(cells)} |"
                )
    made["further"] = "\n".join(lines) + "\n"
    lines = ["| SAM | runs | seeds | average accuracy | forgetting | seconds of a run |", "|---|---|---|---|---|---|"]
    for kind, records in groups.items():
        accuracy, forgetting = ([r["metrics"][name] for r in records] for name in ("average_accuracy", "forgetting"))
        seeds = ", ".join(str(record["seeds"][0]) for record in records)
        seconds = [record["timing"]["total_seconds"] for record in records]
        measuring = [sum(e["seconds"] for e in r["flatness"] if e["when"] != "finished") for r in records]
        lines.append(
            f"| {LABELS[kind]} | {len(records)} | {seeds} | {_cell(accuracy)} | {_cell(forgetting)} | "
            f"{statistics.mean(seconds):.0f}, of which measuring {statistics.mean(measuring):.0f} |"
        )
    made["accuracy"] = "\n".join(lines) + "\n"
    made["lower"] = _lower(groups, tasks)
    return made


def _lower(groups: Mapping[str, Sequence[Record]], tasks: Sequence[str]) -> str:
    """Return in how many seeds a value is lower with SAM than without, after each task."""
    lines = ["| scope | value | " + " | ".join(f"{i + 1} {t}" for i, t in enumerate(tasks)) + " |"]
    lines.append("|---|---|" + "---|" * len(tasks))
    for scope in SCOPES:
        for name, title in VALUES.items():
            cells = []
            for index in range(len(tasks)):
                without, with_sam = (spread(groups[kind], index, "after", scope, name) for kind in ("off", "sam"))
                lower = sum(a < b for a, b in zip(with_sam, without, strict=True))
                cells.append(f"{lower} of {len(with_sam)}")
            lines.append(f"| {scope} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    deviation = f" ± {_short(statistics.stdev(known))}" if len(known) > 1 else ""
    return f"{_short(statistics.mean(known))}{deviation}"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def draw_over_tasks(groups: Mapping[str, Sequence[Record]]) -> Figure:
    """Return every run's values after each task, and their means, for both scopes."""
    names = [name for name in VALUES if name != "loss"]
    tasks = next(iter(groups.values()))[0]["tasks"]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = figure.subplots(len(SCOPES), len(names), sharex=True)
    for row, scope in zip(panels, SCOPES, strict=True):
        for axes, name in zip(row, names, strict=True):
            for k, (kind, records) in enumerate(groups.items()):
                points = np.array([spread(records, index, "after", scope, name) for index in range(len(tasks))])
                places = np.arange(len(tasks)) + 0.24 * (k - 0.5)
                axes.plot(places, points, "o" if kind == "off" else "^", color=COLOURS[kind], markersize=4, alpha=0.6)
                axes.errorbar(
                    *(places, points.mean(axis=1), points.std(axis=1, ddof=1) if points.shape[1] > 1 else None),
                    **{"fmt": "_", "color": COLOURS[kind], "markersize": 14, "capsize": 4, "label": LABELS[kind]},
                )
            axes.set_title(f"{VALUES[name]}, {scope}", fontsize=9.5)
            axes.set_xticks(range(len(tasks)), [f"{i + 1}\n{task}" for i, task in enumerate(tasks)], fontsize=8)
            axes.tick_params(axis="y", labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(_title("Flatness after each task: each seed, mean and standard deviation"), fontsize=10.5)
    return figure


def draw_landscapes(folders: Mapping[str, Path]) -> Figure:
    """Return the loss around the last task's models with and without SAM, side by side on one scale."""
    figure = Figure(figsize=(9.2, 8.2), layout="constrained")
    panels = figure.subplots(len(SCOPES), len(folders))
    for row, scope in zip(panels, SCOPES, strict=True):
        grids = {}
        for kind, folder in folders.items():
            record = read_record(folder)
            place = (len(record["tasks"]) - 1, "after", scope)
            entry = next(e for e in record["flatness"] if (e["task_index"], e["when"], e["scope"]) == place)
            grids[kind] = read_grid(folder / entry["arrays"])
        rises = {kind: np.log10(np.maximum(grid.losses, 1e-6)) for kind, grid in grids.items()}
        low, high = min(r.min() for r in rises.values()), max(r.max() for r in rises.values())
        levels = np.linspace(low, high, 15)
        for axes, (kind, rise) in zip(row, rises.items(), strict=True):
            grid = grids[kind]
            shown = axes.contourf(*grid.axes, rise.T, levels=levels, norm=Normalize(low, high), cmap="cividis")
            axes.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=2)
            axes.set_title(f"{LABELS[kind]}, {scope}: loss {grid.origin_loss:.4f} at the weights", fontsize=9)
            axes.set_xlabel("random direction, seed 0", fontsize=8)
            axes.set_ylabel("random direction, seed 1", fontsize=8)
            axes.tick_params(labelsize=8)
        figure.colorbar(shown, ax=list(row), label="log10 of the loss", fraction=0.04)
    words = "Loss around the models after the last task, seed 0 (the same two directions' draws in a row)"
    figure.suptitle(_title(words), fontsize=10.5)
    return figure


def _title(words: str) -> str:
    return f"{words}\nN-LoRA, order 1, QUICK RUNS of a small model: not comparable with the paper's numbers"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

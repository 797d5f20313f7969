"""A study's verdicts and the runs behind them, read from files for its page."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatpatch.errors import UserError, did_you_mean
from flatpatch.report.flatness_figures import Grid, read_grid
from flatpatch.report.records import RECORD_FILE, read_record, setting
from flatpatch.report.verdicts import CORRECT, SCHEMA, STUDIES, VERDICTS
from flatpatch.settings import idle_settings

_WIDTH = 110
RECORDED = "as_recorded_"  # before the names of arrays and values that repeat the record's faults
_PARTS = {
    "": ("study", "title", "question", "form", "where", "seeds", "measure", "runs", "hypotheses", "conclusions"),
    "runs": ("name", "folder", "settings", "seed", "status"),
    "hypotheses": ("hypothesis", "statement", "unit", "direction", "smallest", "arm", "tested", "controls", "points"),
    "conclusions": ("outcome", "as_recorded", "sentence"),
}


@dataclass(frozen=True)
class StudyRun:
    """A run of the study that is finished."""

    name: str  # of the study's runs entry
    settings: Mapping[str, str]  # those in which the study's runs differ
    seed: int
    folder: Path
    record: Mapping[str, Any]

    def value(self, key: str) -> str:
        """Return a setting's value as text."""
        return str(self.settings.get(key, setting(self.record, key, "-")))


@dataclass(frozen=True)
class Study:
    """What a study found, in one of its forms."""

    verdicts: Mapping[str, Any]  # as its file holds them
    folder: Path  # of the file
    runs: tuple[StudyRun, ...]  # the finished ones
    unreadable: tuple[str, ...]  # a sentence for each run that cannot be read

    @property
    def name(self) -> str:
        """The study's name, and its form."""
        return f"{self.verdicts['study']}, {self.verdicts['form']} form"

    @property
    def key(self) -> str:
        """A word that tells the study and form apart from others."""
        return f"{self.verdicts['study']}-{self.verdicts['form']}"


@dataclass(frozen=True)
class Point:
    """One measuring point of a run, in one scope."""

    run: StudyRun
    entry: Mapping[str, Any]  # of the record's flatness
    content: Mapping[str, Any]  # of the measuring point's file

    @property
    def results(self) -> Mapping[str, Any]:
        """What each kind of measurement found."""
        found: Mapping[str, Any] = self.content.get("scopes", {}).get(self.entry["scope"], {}).get("results", {})
        return found

    @property
    def sample(self) -> tuple[Any, ...]:
        """What the batch was: equal ones mean the same examples in the same batches."""
        keys = ("task", "indices", "sample_seed", "samples", "batches")
        return tuple(json.dumps(self.content.get(key)) for key in keys)

    def slice(self) -> Grid | None:
        """Return the loss along one direction."""
        found = self.results.get("slice")
        if not found:
            return None
        losses = np.array([math.nan if loss is None else loss for loss in found["losses"]], dtype=np.float64)
        axes = (np.asarray(found["coordinates"], dtype=np.float64),)
        empty = np.empty(0)
        return Grid(losses, np.ones(len(losses), dtype=bool), axes, empty.reshape(0, 1), empty, math.nan, found)

    def landscape(self, prefix: str = "") -> Grid | None:
        """Return the landscape; ``RECORDED`` as a prefix gives the one with the record's faults.

        None where there is none, or its file is damaged: a study's other figures do not depend on it.
        """
        path = self.run.folder / (self.entry["arrays"] or "")
        try:
            return read_grid(path, prefix=prefix) if path.is_file() else None
        except UserError:
            return None


def find_studies(output: Path, name: str, form: str = "") -> list[Path]:
    """Return the verdicts' files of a study, or of all, below the folder that holds the runs.

    Args:
        output: The folder.
        name: The study's, or ``all``.
        form: Of which form; empty for each that has been run.

    Returns:
        One file for each form, by study and form.

    Raises:
        UserError: If there is none.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted((output / STUDIES).glob(f"*/*/{VERDICTS}")):
        if form in ("", path.parts[-2]):
            found.setdefault(path.parts[-3], []).append(path)
    if name == "all" and found:
        return [path for own in found.values() for path in own]
    if name not in found:
        known = f"{did_you_mean(name, found)} There are: {', '.join(found)}." if found else " None has been run there."
        in_form = f" in form={form}" if form else ""
        example = "exp4" if name == "all" else name
        raise UserError(
            f"study={name}: {output / STUDIES} has no verdicts of it{in_form}.{known} Run it first, python -m "
            f"flatpatch study name={example}, or name the folder that holds its runs with output=FOLDER."
        )
    return found[name]


def read_verdicts(path: Path) -> Study:
    """Read a study's verdicts and its finished runs' records.

    Args:
        path: The verdicts' file, ``<output>/studies/<name>/<form>/verdicts.json``.

    Raises:
        UserError: If the file is missing, damaged or of another version.
    """
    try:
        verdicts = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(verdicts)
    except FileNotFoundError:
        raise UserError(f"there are no verdicts {path}. Run the study first: python -m flatpatch study.") from None
    except (OSError, ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path} cannot be read: {problem}. The command that ran the study writes it anew.")
    output, runs, unreadable = path.parents[3], [], []
    for run in verdicts["runs"]:
        folder = output / run["folder"]
        if run["status"] != "finished" or not (folder / RECORD_FILE).is_file():
            continue
        try:
            record = read_record(folder)
        except UserError as error:
            unreadable.append(str(error))
            continue
        runs.append(StudyRun(run["name"], run["settings"], run["seed"], folder, record))
    return Study(verdicts, path.parent, tuple(runs), tuple(unreadable))


def verdicts_text(study: Study) -> str:
    """Return a study's verdicts for the terminal: a sentence each, and one on each of the record's conclusions."""
    verdicts = study.verdicts
    lines = [f"{study.name}: {verdicts['question']}"]
    for found in verdicts["hypotheses"]:
        arm = "" if found["arm"] == CORRECT else f" ({found['arm']})"
        lines.append(f"- {found['tested']['sentence']}{arm}")
    lines += [f"=> {one['sentence']}" for one in verdicts["conclusions"]]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="     "))


def points_of(run: StudyRun) -> list[Point]:
    """Return a run's measuring points whose files can be read, in the record's order."""
    found, contents = [], {}
    for entry in run.record["flatness"]:
        path = run.folder / entry["file"]
        if path not in contents:
            try:
                contents[path] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                contents[path] = {}
        found.append(Point(run, entry, contents[path]))
    return found


def words(run: StudyRun, keys: Sequence[str]) -> tuple[str, ...]:
    """Return a run's values of some settings as ``key=value``, without those that had no effect."""
    idle = idle_settings(run.record)
    return tuple(f"{key}={run.value(key)}" for key in keys if key not in idle)


def fairness(points: Mapping[str, Point], grids: Mapping[str, Grid], each: str = "panel") -> list[str]:
    """Say what landscapes that stand side by side share, and what they do not: batch, directions, loss at the centre.

    Args:
        points: By panel, or line.
        grids: The landscapes by the same names; none for other measurements.
        each: What one of them is called.
    """
    said = []
    samples = {point.sample for point in points.values()}
    size = sorted({str(point.entry["samples"]) for point in points.values()})
    examples = f"{', '.join(size)} training examples"
    if len(points) == 1:
        said.append(f"batch: {examples}")
    elif len(samples) == 1:
        said.append(f"batch: the same {examples} for every {each}")
    else:
        tasks = {point.entry["task"] for point in points.values()}
        whose = "each of its own task" if len(tasks) > 1 else f"NOT THE SAME for every {each}"
        said.append(f"batch: {examples}, {whose}")
    if not grids:
        return said
    seeds = {tuple(axis.get("seed") for axis in grid.about["axes"]) for grid in grids.values()}
    kinds = sorted({str(axis.get("normalisation")) for grid in grids.values() for axis in grid.about["axes"]})
    alike = len(seeds) == 1 and len(kinds) == 1
    drawn = ", ".join(str(seed) for seed in next(iter(seeds)))
    said.append(
        f"directions: random, seeds {drawn}, scaled in the same way to the weights of each {each}"
        if alike
        else f"DIRECTIONS DIFFER from {each} to {each}: {', '.join(kinds).replace('_', ' ')}"
    )
    centres = {name: grid.origin_loss for name, grid in grids.items() if math.isfinite(grid.origin_loss)}
    if len(centres) > 1:
        low, high = min(centres, key=lambda name: centres[name]), max(centres, key=lambda name: centres[name])
        if centres[high] - centres[low] > 1e-3 * abs(centres[high]):
            said.append(
                f"the loss at the centre is not equal: {centres[low]:.3g} ({low}) to {centres[high]:.3g} ({high})"
            )
        else:
            said.append(f"the loss at the centre is equal, {centres[low]:.3g}")
    return said


def planes(study: Study) -> list[tuple[str, Path, Mapping[str, Any]]]:
    """Return each plane through three of the study's runs that was measured: its scope, file and comparison."""
    known = {run.folder.resolve() for run in study.runs}
    output = study.folder.parents[2]
    found = []
    for path in sorted({*output.glob("*/comparison.json"), *study.folder.glob("*/comparison.json")}):
        try:
            comparison = json.loads(path.read_text(encoding="utf-8"))
            folders = {Path(run["folder"]).resolve() for run in comparison["runs"]}
            scopes = comparison["scopes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if len(folders) == 3 and folders <= known:
            found += [(scope, path.parent / result["arrays"], comparison) for scope, result in scopes.items()]
    return [(scope, path, comparison) for scope, path, comparison in found if path.is_file()]


def _problem(verdicts: Any) -> str:
    """Say what a verdicts' file lacks, or return an empty string."""
    if not isinstance(verdicts, dict):
        return "it holds no object"
    if verdicts.get("schema") != SCHEMA:
        return f"it has schema {verdicts.get('schema')}, this version reads {SCHEMA}"
    for part, keys in _PARTS.items():
        for row in [verdicts] if not part else verdicts[part]:
            if lacking := [key for key in keys if key not in row]:
                return f"{part or 'it'} lacks {', '.join(lacking)}"
    return ""

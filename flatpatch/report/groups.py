"""Runs put together: those that differ by their seed alone make one group, with mean and standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.files import digest
from flatpatch.report.records import RECORD_FILE, read_record, read_step_metrics, setting, settings_of
from flatpatch.settings import OF_PLACES, OF_SAM_NAMED, idle_settings, sam_title, without_effect

# Settings that say where a run lies, or that make the runs of one group different.
_NOT_COMPARED = frozenset({"seed", *OF_PLACES})
# Measuring leaves the training as it is; all its settings begin with this word.
_MEASURING = "measure"
# What mostly follows from the settings: told only where two groups would else have one name.
_FOLLOWING = ("tasks", "benchmark", "profile", "engine", "device", "launcher", "processes", "pin", "patched_tree")
# Where the package lies and which of several GPUs ran it.
_HARMLESS = frozenset({"variables.PYTHONPATH", "variables.CUDA_VISIBLE_DEVICES"})
# What draw_run makes anew from the record; every other figure of a run was measured.
_REDRAWN = frozenset({"accuracy_matrix.png", "accuracy_over_tasks.png", "loss.png", "perturbation.png"})


@dataclass(frozen=True)
class Run:
    """One run, as its folder holds it."""

    folder: Path
    record: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]] = ()
    images: tuple[Path, ...] = ()  # figures of what was measured, PNG
    digest: str = ""  # SHA-256 of record.json

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def seed(self) -> str:
        """The run's seed, or its seeds, as text."""
        return ", ".join(map(str, self.record["seeds"])) or "none"

    @property
    def is_finished(self) -> bool:
        """Whether every task was trained."""
        return bool(self.record["status"] == "finished")

    @property
    def tasks_done(self) -> int:
        """Number of tasks after which anything was evaluated."""
        return sum(any(x is not None for x in row) for row in self.record["accuracy_matrix"])


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a few numbers."""

    mean: float
    standard_deviation: float | None  # None for one number
    n: int


@dataclass(frozen=True)
class Group:
    """Runs whose settings are equal but for the seed."""

    letter: str
    title: str  # what sets it apart from the other groups
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]  # one finished run per seed; else the one run that got furthest

    @property
    def is_finished(self) -> bool:
        """Whether the counted runs are finished ones."""
        return self.counted[0].is_finished

    @property
    def record(self) -> Mapping[str, Any]:
        """The first counted run's record."""
        return self.counted[0].record

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of training."""
        return tuple(self.record["tasks"])


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: If it holds no sound record.
    """
    folder = Path(folder)
    record = read_record(folder)
    return Run(
        folder=folder,
        record=record,
        steps=read_step_metrics(folder / "metrics.jsonl"),
        images=tuple(path for path in sorted((folder / "figures").rglob("*.png")) if path.name not in _REDRAWN),
        digest=digest(folder / RECORD_FILE),
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put together the runs that differ by their seed alone; runs that were not measured join those that were.

    A seed that was run twice counts once: two runs of one seed are not two observations.

    Args:
        runs: At least one.

    Returns:
        The groups, in the order in which their first runs were given.
    """
    members: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(sorted(_facets(run.record).items())), []).append(run)
    members = {facets: own for key, trained in members.items() for facets, own in _by_measuring(key, trained).items()}
    given = {key for run in runs for key, entry in run.record["settings"].items() if entry["source"] != "default"}
    titles = _titles([dict(key) for key in members], [settings_of(own[0].record) for own in members.values()], given)
    return [
        Group(_letter(k), title, tuple(own), _counted(own))
        for k, (title, own) in enumerate(zip(titles, members.values(), strict=True))
    ]


def apart(one: Group, other: Group) -> set[str]:
    """Return the settings, and what else tells groups apart, in which two differ; measuring does not count."""
    first, second = _facets(one.record), _facets(other.record)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean, standard deviation and n of the numbers there are; None if there is none.

    A training that diverged has infinite or undefined losses: then the standard deviation is NaN.
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    if not all(map(math.isfinite, found)):
        return Spread(sum(found) / len(found), math.nan if len(found) > 1 else None, len(found))
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def matrix_spread(group: Group) -> list[list[Spread | None]]:
    """Return the accuracy matrix over the group's seeds, percent."""
    matrices = [run.record["accuracy_matrix"] for run in group.counted]
    size = range(len(group.tasks))
    return [[spread(matrix[i][j] for matrix in matrices) for j in size] for i in size]


def mean_accuracies(run: Run) -> list[float | None]:
    """Return, after each task, the mean accuracy over the tasks seen so far; None where an entry is missing."""
    rows = [row[: i + 1] for i, row in enumerate(run.record["accuracy_matrix"])]
    return [None if None in row else statistics.fmean(row) for row in rows]


def forgetting_per_task(run: Run) -> list[float | None]:
    """Return each old task's best earlier accuracy minus its last, in points; None where an entry is missing."""
    matrix = run.record["accuracy_matrix"]
    losses: list[float | None] = []
    for j in range(len(matrix) - 1):
        seen = [row[j] for row in matrix[j:]]
        losses.append(None if None in seen else max(seen[:-1]) - seen[-1])
    return losses


def gaps(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Name every run that one would expect here and that does not count, each with the reason.

    Args:
        groups: As ``group_runs`` returns them.

    Returns:
        Rows of ``letter``, ``seed``, ``state`` and ``why``.
    """
    rows = []
    for group in groups:
        for run in group.runs:
            if not run.is_finished:
                done = f"{run.tasks_done} of {len(run.record['tasks'])} tasks have results"
                error = run.record.get("error", "")
                rows.append(
                    _gap(group, run.seed, run.record["status"], f"{run.name}: {done}" + (f"; {error}" if error else ""))
                )
            elif run not in group.counted:
                first = next(other for other in group.counted if other.seed == run.seed)
                same = run.record["accuracy_matrix"] == first.record["accuracy_matrix"]
                why = f"{run.name} has the settings and the seed of {first.name}"
                rows.append(
                    _gap(group, run.seed, "not counted", f"{why}, with {'the same' if same else 'OTHER'} accuracies")
                )
        own = {run.seed for run in group.runs}
        others = [other for other in groups if _series(other) == _series(group)]
        if lacking := list(dict.fromkeys(run.seed for other in others for run in other.runs if run.seed not in own)):
            holders = [other.letter for other in others if any(run.seed in lacking for run in other.runs)]
            rows.append(_gap(group, ", ".join(lacking), "no run", f"there is one in {', '.join(holders)}"))
    return rows


def other_conditions(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    """Return what the runs do not share beside their settings: libraries, hardware, inputs, code.

    Args:
        groups: As ``group_runs`` returns them.

    Returns:
        For each such thing its values, each with the groups, and seeds where not all of a group's, that have it.
    """
    runs = [(group, run) for group in groups for run in group.runs]
    rows = [{**flatten(run.record["environment"]), **flatten(run.record.get("inputs", {}), "input")} for _, run in runs]
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        holders: dict[str, list[tuple[Group, Run]]] = {}
        for row, holder in zip(rows, runs, strict=True):
            if name in row:  # methods record different things
                holders.setdefault(row[name], []).append(holder)
        if len(holders) > 1 and name not in _HARMLESS:
            found[name] = {value: where(groups, own) for value, own in holders.items()}
    return found


def where(groups: Sequence[Group], holders: Sequence[tuple[Group, Run]]) -> str:
    """Name the groups that some runs are of; with the seeds where they are not all of a group's runs."""
    parts = []
    for group in groups:
        own = [run for other, run in holders if other is group]
        if own:
            whole = len(own) == len(group.runs)
            parts.append(group.letter if whole else f"{group.letter} seed {', '.join(run.seed for run in own)}")
    return "; ".join(parts)


def _series(group: Group) -> tuple[str, ...]:
    """Return what groups share in which one expects the same seeds."""
    return tuple(group.record[key] for key in ("method", "benchmark", "profile", "engine"))


def _gap(group: Group, seed: str, state: str, why: str) -> dict[str, str]:
    return {"letter": group.letter, "seed": seed, "state": state, "why": why}


def _facets(record: Mapping[str, Any]) -> dict[str, str]:
    """Return all that two runs must share to be of one group, but for how they were measured."""
    sam = setting(record, "sam", "off")
    environment = record["environment"]
    idle = idle_settings(record)
    facets = {
        key: str(value)
        for key, value in settings_of(record).items()
        if key not in _NOT_COMPARED and not key.startswith(_MEASURING) and key not in idle
    }
    # Where a setting says "auto", what it came to.
    facets |= {key: str(record[key]) for key in ("method", "benchmark", "profile", "engine")}
    facets |= {key: str(environment[key]) for key in ("device", "launcher") if key in environment}
    facets |= {"processes": str(environment["world_size"])} if "world_size" in environment else {}
    facets["sam"] = str(sam)
    facets["tasks"] = ",".join(record["tasks"])
    if "forked" in record:
        facets["begun by another run"] = f"{record['forked']['tasks']} tasks"
    if record["upstream"]:
        facets |= {key: record["upstream"][key] for key in ("pin", "patched_tree")}
    return facets


def _by_measuring(
    key: tuple[tuple[str, str], ...], runs: Sequence[Run]
) -> dict[tuple[tuple[str, str], ...], list[Run]]:
    """Take apart runs that were measured in different ways, whose values have no common mean."""
    ways = [
        tuple(
            (name, str(value))
            for name, value in sorted(settings_of(run.record).items())
            if name.startswith(_MEASURING) and name not in idle_settings(run.record)
        )
        for run in runs
    ]
    if len({way for way, run in zip(ways, runs, strict=True) if setting(run.record, "measure")}) < 2:
        return {key: list(runs)}
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for way, run in zip(ways, runs, strict=True):
        found.setdefault((*key, *way), []).append(run)
    return found


def _titles(
    keys: Sequence[Mapping[str, str]], settings: Sequence[Mapping[str, Any]], given: Collection[str]
) -> list[str]:
    """Name each group by SAM's settings, by every setting that differs, and by what else tells them apart.

    Args:
        keys: Each group's facets.
        settings: Each group's settings.
        given: Names of the settings that somebody set; one that is unknown to other methods is told only if it was.
    """
    names = list(dict.fromkeys(name for key in keys for name in key))
    differing = [name for name in names if len({key.get(name) for key in keys}) > 1]
    idle = without_effect("off", "")
    asked = [
        name
        for name in differing
        if name not in ("method", "sam", "rho", *_FOLLOWING)
        and (len({key[name] for key in keys if name in key}) > 1 or (name in given and name not in idle))
    ]
    titles = []
    for key, values in zip(keys, settings, strict=True):
        parts = [key["method"]] if "method" in differing else []
        parts.append(sam_title(values, told=asked))
        parts += [_named(key, name) for name in asked if name in key and name not in OF_SAM_NAMED]
        titles.append(", ".join(parts))
    for name in _FOLLOWING:
        same = [k for k in range(len(keys)) if titles.count(titles[k]) > 1]
        if name in differing and len({keys[k].get(name) for k in same}) > 1:
            titles = [
                f"{title}, {_named(keys[k], name)}" if k in same and name in keys[k] else title
                for k, title in enumerate(titles)
            ]
    return titles


def _named(key: Mapping[str, str], name: str) -> str:
    return f"{name}={_shortened(key[name])}"


def _shortened(value: str) -> str:
    return value if len(value) <= 30 else value[:12] + "…"


def _counted(runs: Sequence[Run]) -> tuple[Run, ...]:
    first: dict[str, Run] = {}
    for run in runs:
        if run.is_finished:
            first.setdefault(run.seed, run)
    return tuple(first.values()) or (max(runs, key=lambda run: run.tasks_done),)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Return nested mappings as one, ``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; values as text."""
    if not isinstance(value, Mapping):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        return {name: "none" if shown in (None, "") else str(shown)}
    flat: dict[str, str] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{name}.{key}" if name else str(key))
    return flat


def _letter(number: int) -> str:
    """Return A, B, ... Z, AA, AB, ... for 0, 1, ..."""
    first, last = divmod(number, 26)
    return (_letter(first - 1) if first else "") + chr(ord("A") + last)

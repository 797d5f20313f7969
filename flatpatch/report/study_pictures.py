"""Which figures a study's page has: what its file asks for, made of its runs, captioned with what is equal in them.

The settings in which a study's runs differ are those that its file calls ``panels``, and the rest. A figure of many
settings is cut into several, each with at most ``MOST`` panels or lines that share axes and levels: landscapes of equal
rest stay together, lines and values of equal panels. Of measured landscapes, spectra and densities one seed is shown:
the lowest that most settings have.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flatpatch.errors import UserError
from flatpatch.metrics import METRICS
from flatpatch.report.flatness_figures import (
    Grid,
    describe_scope,
    make_contour_figure,
    make_density_figure,
    make_eigenvalues_figure,
    make_landscapes_figure,
    make_slices_figure,
    read_grid,
)
from flatpatch.report.study_data import RECORDED, Point, Study, StudyRun, fairness, planes, points_of, words
from flatpatch.report.study_figures import (
    CONTROL,
    Row,
    Strip,
    make_forest_figure,
    make_matrices_figure,
    make_slope_figure,
    make_values_figure,
)
from flatpatch.report.verdicts import AS_RECORDED, CORRECT

MOST = 6  # panels, or lines, of one figure
_MOST_FIGURES = 8  # of one entry of the study's file
_ROWS = 24  # effects in one figure
_STRIPS = 4  # panels of values
_IN_A_LINE = 34  # characters of a panel's name
_TASK, _WHEN = "task", "when"
_WHENS = {"before": "before", "at_loss": "at equal loss", "after": "after", "finished": "after, measured later"}
_DEFAULT: tuple[Mapping[str, Any], ...] = ({"kind": "accuracy_matrix"},)
# What of a metric or a measured value stands on an axis.
_VALUES = {
    "top_eigenvalue": "largest eigenvalue of the Hessian",
    "trace": "trace of the Hessian",
    "batch_eigenvalue_median": "median over batches of the dominant eigenvalue",
    "keskar_sharpness": "Keskar's sharpness (%), the paper's protocol",
    "keskar_lower_bound": "Keskar's sharpness (%), highest found",
    "sam_sharpness": "rise of the loss at SAM's step",
    "sam_sharpness_ascent": "rise of the loss in SAM's ball, by ascent",
    "landscape_mean_rise": "mean rise of the loss over the plane",
    "slice_mean_rise": "mean rise of the loss over the line",
    "outliers": "eigenvalues above a tenth of the largest magnitude",
    "as_recorded_eigenvalue_max": "largest of block Lanczos's values",
    "as_recorded_eigenvalue_median": "median of block Lanczos's values",
    "as_recorded_eigenvalue_mean": "mean of block Lanczos's values",
    "as_recorded_keskar_sharpness": "highest loss on a random walk (%)",
    "as_recorded_landscape_mean_rise": "mean rise over the plane scaled by tensor",
}
# The record's own way of measuring beside the correct one.
_TWINS = {
    "top_eigenvalue": "as_recorded_eigenvalue_max",
    "batch_eigenvalue_median": "as_recorded_eigenvalue_median",
    "batch_eigenvalue_mean": "as_recorded_eigenvalue_mean",
    "batch_eigenvalue_max": "as_recorded_eigenvalue_max",
    "keskar_sharpness": "as_recorded_keskar_sharpness",
    "keskar_lower_bound": "as_recorded_keskar_sharpness",
    "landscape_mean_rise": "as_recorded_landscape_mean_rise",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str  # of its files, without suffix
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Asked:
    """One entry of the study's figures, with what it is made of."""

    study: Study
    title: str
    value: str
    scopes: tuple[str, ...]
    whens: tuple[str, ...]
    panels: tuple[str, ...]  # settings by whose values panels stand side by side
    rest: tuple[str, ...]  # the others in which the runs differ
    by_task: bool

    def wants(self, entry: Mapping[str, Any]) -> bool:
        """Tell whether a measuring point is asked for."""
        return (not self.scopes or entry["scope"] in self.scopes) and (not self.whens or entry["when"] in self.whens)


@dataclass(frozen=True)
class _Item:
    """One panel or line: a measuring point, and what tells it from others."""

    panel: tuple[str, ...]
    rest: tuple[str, ...]
    point: Point

    @property
    def words(self) -> tuple[str, ...]:
        """All that tells it apart, the time last."""
        when = self.point.entry["when"]
        return (*self.panel, *self.rest, _WHENS.get(when, when))


def pictures(study: Study) -> tuple[list[Picture], list[str]]:
    """Return a study's figures, and a sentence for each that was asked for and cannot be drawn."""
    made, missing = [], []
    differing = list(dict.fromkeys(key for run in study.runs for key in run.settings))
    for row in _with_effects(study.verdicts.get("figures", ())):
        named = tuple(key for key in row.get("panels") or () if key not in (_TASK, _WHEN))
        asked = _Asked(
            study,
            row.get("title") or "",
            row.get("value") or "",
            tuple(row.get("scopes") or ()),
            tuple(row.get("when") or ()),
            named,
            tuple(key for key in differing if key not in named),
            _TASK in (row.get("panels") or ()),
        )
        found = list(_MAKERS[row["kind"]](asked)) if row["kind"] in _MAKERS else []
        kind = str(row["kind"]).replace("_", " ")
        if not found:
            missing.append(f"{asked.title or kind}: no finished run has what it is made of")
        if len(found) > _MOST_FIGURES:
            missing.append(
                f"{asked.title or kind}: {len(found) - _MOST_FIGURES} of {len(found)} figures, for want of room"
            )
        made += found[:_MOST_FIGURES]
    return _numbered(made), missing


def _with_effects(asked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return what is drawn: the effects first, then what the study asks for, or what any study has."""
    forests = [row for row in asked if row["kind"] == "forest"] or [{"kind": "forest"}]
    return [*forests[:1], *([row for row in asked if row["kind"] != "forest"] or _DEFAULT)]


def _numbered(made: Sequence[Picture]) -> list[Picture]:
    """Return the figures with names that tell them apart and keep their order in a folder."""
    return [Picture(f"{k:02}_{one.name}", one.caption, one.figure) for k, one in enumerate(made, 1)]


def effect_rows(study: Study) -> list[Row]:
    """Return the lines of the figure of effects: each hypothesis by each way of measuring, and against its controls."""
    rows = []
    for found in study.verdicts["hypotheses"]:
        kind = AS_RECORDED if found["arm"] == AS_RECORDED else CORRECT
        rows.append(_row(found, found["tested"], kind, found["statement"]))
        rows += [_row(found, one, CONTROL, f"against {name}") for name, one in found["controls"].items()]
    return rows


def _row(found: Mapping[str, Any], tested: Mapping[str, Any], kind: str, label: str) -> Row:
    numbers = {key: tested[key] for key in ("effect", "low", "high", "n", "verdict")}
    return Row(
        _plain([label]),
        kind,
        _plain([found["unit"]]),
        **numbers,
        direction=found["direction"],
        smallest=found["smallest"],
    )


def _forest(asked: _Asked) -> Iterator[Picture]:
    rows = effect_rows(asked.study)
    for k, part in enumerate(_parts(rows, _ROWS)):
        title = asked.title or "Effects with their 95 % intervals"
        where = asked.study.verdicts["where"]
        notes = [f"{asked.study.name}, seeds {', '.join(map(str, asked.study.verdicts['seeds']))}"]
        notes += [f"effects {where}"] if where else []
        caption = f"{title}{f' {where}' if where else ''}. ▶ the hypothesis says higher, ◀ lower."
        yield Picture(f"effects_{k + 1}", caption, make_forest_figure(part, title=title, notes=notes))


def _matrices(asked: _Asked) -> Iterator[Picture]:
    by_tasks: dict[tuple[str, ...], dict[str, list[StudyRun]]] = {}
    for run in asked.study.runs:
        name = _plain(words(run, (*asked.panels, *asked.rest))) or run.name
        by_tasks.setdefault(tuple(run.record["tasks"]), {}).setdefault(name, []).append(run)
    for tasks, groups in by_tasks.items():
        if len(tasks) < 2:
            continue  # one number, which other figures show
        for names in _kept_together(list(groups), MOST):
            apart, every = _apart(names)
            means, counts = {}, []
            for name in names:
                stack = np.array([_numbers(run.record["accuracy_matrix"]) for run in groups[name]])
                means[f"{apart[name]}\nn = {len(stack)}"] = stack.mean(axis=0)
                counts.append(len(stack))
            title = asked.title or "Accuracy after each task"
            notes = [f"{asked.study.name}; means over seeds" if max(counts) > 1 else asked.study.name]
            notes += [f"every panel: {every}"] if every else []
            figure = make_matrices_figure(means, [_plain([task]) for task in tasks], title=title, notes=notes)
            said = [f"{title}: {', '.join(tasks)}", "one scale of colours for all panels", *notes[1:]]
            yield Picture("accuracy", f"{'; '.join(said)}.", figure)


def _numbers(rows: Sequence[Sequence[float | None]]) -> Any:
    return np.array([[np.nan if x is None else x for x in row] for row in rows], dtype=np.float64)


def _landscapes(asked: _Asked) -> Iterator[Picture]:
    for prefix, arm in (("", CORRECT), (RECORDED, AS_RECORDED)):
        items = _items(asked, lambda point, prefix=prefix: point.landscape(prefix) is not None)  # type: ignore[misc]
        figures = list(_side_by_side(asked, items, together="rest"))
        for scope in dict.fromkeys(item.point.entry["scope"] for item in items):
            own = [(where, points) for where, points in figures if _scope_of(points) == scope]
            grids = [_grids(points, prefix) for _, points in own]
            everything = [grid for found in grids for grid in found.values()]
            for (where, points), found in zip(own, grids, strict=True):
                said = fairness(points, found)
                if len(everything) > 1:
                    among = f"all {len(own)} figures of {describe_scope(scope)}" if len(own) > 1 else "every panel"
                    said.append(f"levels: the same in {among}{f', {arm}' if prefix else ''}")
                title = f"{asked.title or 'Loss landscapes'}: {where}" + (f" ({arm})" if prefix else "")
                figure = make_landscapes_figure(
                    {_wrapped(name): grid for name, grid in found.items()},
                    title=textwrap.shorten(title, 100),
                    in_a_row=2 if len(found) in (2, 4) else 3,
                    level_with=everything,
                    note="; ".join([*said, asked.study.name]),
                )
                yield Picture(f"landscape{'_as_recorded' if prefix else ''}", f"{title}; {'; '.join(said)}.", figure)


def _grids(points: Mapping[str, Point], prefix: str) -> dict[str, Grid]:
    return {name: grid for name, point in points.items() if (grid := point.landscape(prefix)) is not None}


def _scope_of(points: Mapping[str, Point]) -> str:
    return str(next(iter(points.values())).entry["scope"])


def _slices(asked: _Asked) -> Iterator[Picture]:
    for where, points in _side_by_side(asked, _items(asked, lambda point: point.slice() is not None)):
        grids = {name: grid for name, point in points.items() if (grid := point.slice()) is not None}
        title = f"{asked.title or 'Loss along one direction'}: {where}"
        said = fairness(points, grids, "line")
        note = "; ".join([*said, asked.study.name])
        figure = make_slices_figure(grids, title=textwrap.shorten(title, 100), places=_places(points), note=note)
        yield Picture("slice", f"{title}; {'; '.join(said)}.", figure)


def _places(points: Mapping[str, Point]) -> dict[str, tuple[int, str]]:
    """Return how lines are told apart: a setting, or task, keeps its colour before and after training."""
    ends = tuple(f", {when}" for when in _WHENS.values())
    names = {name: name.rpartition(", ")[0] if name.endswith(ends) else name for name in points}
    order = list(dict.fromkeys(names.values()))
    return {name: (order.index(names[name]), point.entry["when"]) for name, point in points.items()}


def _spectra(kind: str, words: str, make: Callable[..., Figure]) -> Callable[[_Asked], Iterator[Picture]]:
    def draw(asked: _Asked) -> Iterator[Picture]:
        for where, points in _side_by_side(asked, _items(asked, lambda point: kind in point.results)):
            spectra = {name: point.results[kind] for name, point in points.items()}
            scope = _scope_of(points)
            said = fairness(points, {}, "line")
            title = f"{asked.title or words}: {where}"
            note = "; ".join([*said, asked.study.name])
            more = {"places": _places(points)} if kind == "eigenvalues" else {}
            figure = make(spectra, scope=scope, title=textwrap.shorten(title, 100), note=note, **more)
            yield Picture(kind, f"{title}; {'; '.join(said)}; one set of axes for all.", figure)

    return draw


def _values(asked: _Asked) -> Iterator[Picture]:
    names = [asked.value or "top_eigenvalue"]
    names += [_TWINS[names[0]]] if names[0] in _TWINS else []
    arms = [list(_strips(asked, name)) for name in names]
    few = sum(map(len, arms)) <= _STRIPS
    parts = [sum(arms, [])] if few else [part for own in arms for part in _parts(own, _STRIPS)]
    for part in filter(None, parts):
        title = asked.title or "What was measured in each run"
        apart, every = _apart(list(dict.fromkeys(name for strip in part for name in strip.values)))
        shown = [replace(strip, values={apart[name]: own for name, own in strip.values.items()}) for strip in part]
        caption = f"{title}: {'; '.join(strip.title for strip in part)}{f'; every row: {every}' if every else ''}."
        notes = [asked.study.name, *([f"every row: {every}"] if every else [])]
        yield Picture("values", caption, make_values_figure(shown, title=title, notes=notes))


def _strips(asked: _Asked, name: str) -> Iterator[Strip]:
    """Yield a panel for each value of the panels' settings, scope and time, with a row for each of the others."""
    found: dict[tuple[str, ...], dict[str, dict[int, list[float]]]] = {}
    for run in asked.study.runs:
        for scope, when, task, value in _numbers_of(asked, run, name):
            own = (*words(run, asked.panels), *([task] if asked.by_task and task else []))
            rest = words(run, asked.rest)
            # Where nothing else tells runs apart, the panels' settings are the rows.
            place, row = ((scope, when, *own), rest) if asked.rest else ((scope, when), own)
            rows = found.setdefault(place, {})
            rows.setdefault(_plain(row) or run.name, {}).setdefault(run.seed, []).append(value)
    recorded = name.startswith(RECORDED)
    metric = METRICS.get(name)
    said = f"{metric.words.title} ({metric.unit})" if metric else ""
    said = said or _VALUES.get(name, name.removeprefix(RECORDED).replace("_", " "))
    for (scope, when, *panel), groups in found.items():
        values = {
            label: [(seed, sum(own) / len(own)) for seed, own in seeds.items()] for label, seeds in groups.items()
        }
        several = any(len(own) > 1 for seeds in groups.values() for own in seeds.values())
        facts = [_plain(panel), _WHENS.get(when, when), describe_scope(scope) if scope else ""]
        facts += ["mean over tasks"] if several else []
        title = ", ".join([said, *filter(None, facts)])
        yield Strip(f"{AS_RECORDED}: {title}" if recorded else title, values, recorded, scale=f"{name} {scope}")


def _numbers_of(asked: _Asked, run: StudyRun, name: str) -> Iterator[tuple[str, str, str, float]]:
    """Yield a run's values of one name with scope, time and task; a metric has none of these."""
    if name in METRICS:
        if (metric := run.record["metrics"].get(name)) is not None:
            yield "", "", "", metric
        return
    for entry in run.record["flatness"]:
        value = entry["loss"] if name == "loss" else entry["values"].get(name)
        if value is not None and asked.wants(entry):
            yield entry["scope"], entry["when"], entry["task"], value


def _slopes(asked: _Asked) -> Iterator[Picture]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for hypothesis in asked.study.verdicts["hypotheses"]:
        if hypothesis["points"]:
            found.setdefault(hypothesis["hypothesis"], []).append(hypothesis)
    for own in found.values():
        first = own[0]
        arms = {one["arm"]: one["points"] for one in own}
        title = textwrap.shorten(_plain([first["statement"]]), 100)
        figure = make_slope_figure(
            arms if len(arms) > 1 else {asked.study.name: first["points"]},
            x_label=first.get("x_label") or "setting",
            y_label=first.get("quantity") or first["unit"],
            title=title,
        )
        yield Picture("slope", f"{asked.title or 'Slope'}: {first['statement']}. {asked.study.name}.", figure)


def _planes(asked: _Asked) -> Iterator[Picture]:
    for scope, path, comparison in planes(asked.study):
        if asked.scopes and scope not in asked.scopes:
            continue
        try:
            grid = read_grid(path)
        except UserError:
            continue
        title = f"{asked.title or 'Plane through three models'}: {describe_scope(scope)}"
        note = (
            f"models after task {comparison['task']}, {comparison['samples']} training examples of it, the same for all"
        )
        figure = make_contour_figure(grid, title=title, note=note)
        yield Picture("plane", f"{title}; {note}.", figure)


def _items(asked: _Asked, has: Callable[[Point], bool]) -> list[_Item]:
    """Return the measuring points, of one seed, that have what is to be drawn."""
    found: dict[int, list[_Item]] = {}
    for run in asked.study.runs:
        for point in points_of(run):
            if asked.wants(point.entry) and has(point):
                several = asked.by_task and len(run.record["tasks"]) > 1
                panel = (*words(run, asked.panels), *([point.entry["task"]] if several else []))
                found.setdefault(run.seed, []).append(_Item(panel, words(run, asked.rest), point))
    if not found:
        return []
    return found[min(found, key=lambda seed: (-len({item.words for item in found[seed]}), seed))]


def _side_by_side(
    asked: _Asked, items: Sequence[_Item], *, together: str = "panel"
) -> Iterator[tuple[str, dict[str, Point]]]:
    """Yield what stands in one figure: of one scope, and one task unless tasks are panels, at most ``MOST`` points.

    Args:
        asked: The entry of the study's file.
        items: The points.
        together: Where they are too many, those that have this in common stay together.

    Yields:
        What all points of the figure share, in words, and the points by what tells them apart.
    """
    groups: dict[tuple[str, ...], list[_Item]] = {}
    for item in items:
        entry = item.point.entry
        groups.setdefault((entry["scope"], "" if asked.by_task else entry["task"]), []).append(item)
    for (scope, task), own in groups.items():
        parts = [own]
        if len(own) > MOST:
            by_words: dict[tuple[str, ...], list[_Item]] = {}
            for item in own:
                by_words.setdefault(getattr(item, together), []).append(item)
            parts = [part for group in by_words.values() for part in _parts(group, MOST)]
        for part in parts:
            shared = [word for word in part[0].words if all(word in item.words for item in part)]
            points = {}
            for item in part:
                apart = [word for word in item.words if word not in shared]
                points[_plain(apart) or item.point.run.name] = item.point
            where = [describe_scope(scope), f"task {task}" if task else "", *shared]
            yield _plain([*filter(None, where), f"seed {part[0].point.run.seed}"]), points


def _parts(items: Sequence[Any], most: int) -> list[list[Any]]:
    """Return a sequence in equal parts of at most so many."""
    if not items:
        return []
    size = -(-len(items) // -(-len(items) // most))
    return [list(items[k : k + size]) for k in range(0, len(items), size)]


def _plain(words: Sequence[str]) -> str:
    """Return words in one, in which a dollar sign begins no formula."""
    return ", ".join(words).replace("$", r"\$")


def _apart(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return names without the words that all of them have, and these words; a name alone keeps its own.

    Of the shared words those are left out that say nothing: a setting that the method lacks, or an empty one.
    """
    told = {name: name.split(", ") for name in names}
    shared = [word for word in told[names[0]] if len(names) > 1 and all(word in own for own in told.values())]
    apart = {name: ", ".join(word for word in own if word not in shared) or name for name, own in told.items()}
    return apart, ", ".join(word for word in shared if not word.endswith(("=", "=-")))


def _kept_together(names: Sequence[str], most: int) -> list[list[str]]:
    """Return names in parts of at most so many, cut where their first words change if that can be."""
    if len(names) <= most:
        return [list(names)] if names else []
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(", ")[0], []).append(name)
    parts: list[list[str]] = [[]]
    for own in (part for group in groups.values() for part in _parts(group, most)):
        if len(parts[-1]) + len(own) > most:
            parts.append([])
        parts[-1] += own
    return [part for part in parts if part]


def _wrapped(name: str) -> str:
    return textwrap.fill(name, _IN_A_LINE)


_MAKERS: Mapping[str, Callable[[_Asked], Iterator[Picture]]] = {
    "forest": _forest,
    "accuracy_matrix": _matrices,
    "landscape": _landscapes,
    "slice": _slices,
    "density": _spectra("density", "Density of the Hessian's eigenvalues", make_density_figure),
    "spectrum": _spectra("eigenvalues", "Largest eigenvalues of the Hessian", make_eigenvalues_figure),
    "statistics": _values,
    "slope": _slopes,
    "plane": _planes,
}

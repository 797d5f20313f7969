"""From a study's file to plans of ordinary runs, every one of them checked before the first is started."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flatpatch import patches
from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.base import Plan
from flatpatch.measuring import IN_MINIATURE
from flatpatch.runner.record import compared_settings
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.settings import (
    DEFAULTS,
    FIELDS,
    MINIATURES,
    OF_MACHINE,
    OF_MEASURING,
    OF_PLACES,
    Request,
    shown,
    without_effect,
)
from flatpatch.studies.schema import Form, FormName, Runs, RunsOfForm, Side, Study, left_out_runs

# What somebody who runs a study may say of all its runs: where they run, and on which files.
PASSED_ON = (*(key for key in OF_MACHINE), "model", "data")
# What the study says in other places of its file, or its reader on the command line.
NOT_IN_A_FILE = ("seed", *OF_MEASURING, *OF_PLACES)
UPSTREAM = "upstream."
Value = str | int | float


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study; equal to itself alone.

    Attributes:
        name: What the study calls the runs that it is one of.
        seed: Its seed.
        plan: What will be done.
        words: What asks for it, but for its folder's name.
    """

    name: str
    seed: int
    plan: Plan
    words: tuple[str, ...]

    @cached_property
    def settings(self) -> Mapping[str, Value]:
        """All of its settings, with those of upstream's arguments that were asked for.

        An argument that is given the value which it has anyway is no override, and yet has a place on an axis.
        """
        named = (word.split("=", 1) for word in self.words if word.startswith(UPSTREAM))
        return {**dataclasses.asdict(self.plan.request.settings), **{key: typed(key, text) for key, text in named}}

    @cached_property
    def idle(self) -> frozenset[str]:
        """The settings that change nothing of it."""
        return without_effect(str(self.settings["sam"]), str(self.settings["measure"]))

    def value(self, key: str) -> Value:
        """Return a setting's value; that of an argument of upstream's which was not asked for is empty."""
        return self.settings.get(key, "")


@dataclass(frozen=True)
class Asked:
    """What of a study is run.

    Attributes:
        form: Its form.
        seeds: The seeds.
        full: Whether the whole grid is asked for.
        passed: Words for all runs.
    """

    form: FormName
    seeds: tuple[str, ...]
    full: bool = False
    passed: tuple[str, ...] = ()


def typed(key: str, text: str) -> Value:
    """Return a setting's value as settings have it: of an argument of upstream's a number where it reads as one.

    >>> typed("rho", ".05"), typed("upstream.lora_r", "8"), typed("sam", "off")
    (0.05, 8.0, 'off')
    """
    if key in FIELDS:
        kind = type(DEFAULTS[key])
        try:
            return text if kind is str else kind(text)
        except ValueError:
            return text
    try:
        return float(text)
    except ValueError:
        return text


def plan_study(study: Study, asked: Asked, *, dry_run: bool = False) -> list[Cell]:
    """Plan every run of a study; equal ones once.

    Args:
        study: The study.
        asked: What of it.
        dry_run: Plan for a machine that has what is missing here.

    Raises:
        UserError: With every mistake; nothing was started.
    """
    form = study.forms[asked.form]
    cells: list[Cell] = []
    problems: list[str] = []
    left_out = left_out_runs(form, full=asked.full)
    wanted = [
        (runs.name, [*words, f"seed={seed}", *asked.passed])
        for runs in study.runs
        if runs.name not in left_out
        for words in _expanded(study, form, runs, full=asked.full)
        for seed in asked.seeds
    ]
    with patches.verified_once():
        for name, words in wanted:
            try:
                cells.append(_planned(name, words, dry_run))
            except UserError as error:
                problems.append(f"runs {name!r}: {error}")
    if problems:
        raise UserError.collect(list(dict.fromkeys(problems)))  # the same mistake in every run is one
    return _each_once(cells)


def _each_once(cells: Sequence[Cell]) -> list[Cell]:
    """Leave out cells that are the same run by the same name; one run may still be of several names."""
    known: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        known.setdefault((cell.name, str(cell.plan.folder)), cell)
    return list(known.values())


def folders_of(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, of those that are one run the first alone."""
    return list({str(cell.plan.folder): cell for cell in reversed(cells)}.values())[::-1]


def _expanded(study: Study, form: Form, runs: Runs, *, full: bool) -> Iterator[list[str]]:
    """Yield the words of every combination of settings, without seeds."""
    own = form.runs.get(runs.name, RunsOfForm())
    settings = {**study.settings, **form.settings, **runs.settings, **own.settings}
    measure: dict[str, str] = {}
    for part in (study.measure, form.measure, runs.measure, own.measure):
        measure |= part.words()
    grid = dict(runs.grid)
    if not full:
        grid |= {key: values for key, values in {**form.grid, **own.grid}.items() if key in grid}
    fixed = [f"{key}={value}" for key, value in {**settings, **measure}.items() if key not in grid]
    for values in itertools.product(*grid.values()):
        yield [*fixed, *(f"{key}={value}" for key, value in zip(grid, values, strict=True))]


def could_stand(study: Study, form: Form, runs: Runs, side: Side) -> bool:
    """Return whether one of the combinations of some runs, of the whole grid, fits a side of a hypothesis."""
    if side.run is not None and runs.name not in side.run:
        return False
    combinations = [dict(word.split("=", 1) for word in words) for words in _expanded(study, form, runs, full=True)]
    return any(
        all(
            typed(key, given.get(key, str(DEFAULTS.get(key, "")))) == typed(key, text)
            for key, text in side.settings.items()
        )
        for given in combinations
    )


def _planned(name: str, words: Sequence[str], dry_run: bool) -> Cell:
    request = parse(words)
    plan = make_plan(request, dry_run=dry_run)
    plan = make_plan(_named(request, plan), dry_run=dry_run)
    return Cell(name, plan.request.settings.seed, plan, tuple(words))


def _named(request: Request, plan: Plan) -> Request:
    """Name the run's folder by all of its settings: a family's own name need not tell how is measured."""
    settings = {key: value for key, value in compared_settings(plan).items() if key != "seed"}
    tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, run=f"{plan.folder.name}-{tag}"))


def wrong_settings(study: Study) -> list[str]:
    """Return what is wrong with the names of settings in a study's file, wherever they stand."""
    places: list[tuple[str, Mapping[str, object]]] = [("settings", study.settings)]
    for runs in study.runs:
        places += [(f"runs {runs.name!r}: settings", runs.settings), (f"runs {runs.name!r}: grid", runs.grid)]
    for name, form in study.forms.items():
        for where, part in ((f"forms.{name}", form), *((f"forms.{name}.runs.{k}", v) for k, v in form.runs.items())):
            places += [(f"{where}.settings", part.settings), (f"{where}.grid", part.grid)]
    for hypothesis in study.hypotheses:
        sides = {"side": hypothesis.side, "against": hypothesis.against, **hypothesis.controls}
        places += [
            (f"hypothesis {hypothesis.id!r}: {where}.settings", side.settings) for where, side in sides.items() if side
        ]
        named = [*hypothesis.ignore, *hypothesis.for_each]
        named += [hypothesis.slope.over] if hypothesis.slope and hypothesis.slope.over else []
        places += [(f"hypothesis {hypothesis.id!r}", dict.fromkeys(named))]
    problems = []
    for where, settings in places:
        for key in settings:
            if key in NOT_IN_A_FILE:
                problems.append(f"{where} has {key!r}, which a study says elsewhere: {_elsewhere(key)}.")
            elif key not in FIELDS and not key.startswith(UPSTREAM):
                problems.append(f"{where} has the unknown setting {key!r}.{did_you_mean(key, FIELDS)}")
    return problems


def _elsewhere(key: str) -> str:
    if key == "seed":
        return "in a form's seeds"
    return "in measure" if key in OF_MEASURING else f"on the command line, as {key}="


def varying(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return the settings in which some cells differ, but for their seeds, measuring and places."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings)
    left_out = {"seed", *OF_MEASURING, *OF_PLACES}
    return tuple(key for key in keys if key not in left_out and len({cell.value(key) for cell in cells}) > 1)


def told(settings: Mapping[str, Value]) -> str:
    """Return settings as words, ``every run`` for none."""
    return " ".join(f"{key}={shown(value)}" for key, value in settings.items()) or "every run"


def measure_words(study: Study, form: Form, cells: Sequence[Cell]) -> Mapping[str, str]:
    """Return how is measured in most runs of a form."""
    defaults = {key: str(DEFAULTS[key]) for key in OF_MEASURING}
    if all(cell.plan.profile in MINIATURES for cell in cells):
        defaults |= {key: str(value) for key, value in IN_MINIATURE.items()}
    merged: dict[str, str] = {}
    for part in (study.measure, form.measure):
        merged |= part.words()
    return defaults | merged

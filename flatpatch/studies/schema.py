"""What a study's file says, and how it is read.

A file is YAML of which every scalar is read as the text that stands there, so that ``off`` is no truth value and
``0.10`` stays what was written. :data:`Study` says which keys there are. What a file names (settings, metrics, measured
values, runs) is checked by :mod:`flatpatch.studies.checks`, once the runs are known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flatpatch.errors import UserError, did_you_mean, named_path
from flatpatch.runner.sweep import listed

LIBRARY = Path(__file__).parent / "library"
FormName = Literal["quick", "small", "record"]
FORMS: tuple[FormName, ...] = get_args(FormName)
EACH, OTHERS = "each", "others"  # of a run's tasks


def _as_list(value: Any) -> Any:
    """Return what ``off,sam`` or ``0..4`` lists; a list stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return list(listed(value, "values", value))
    except UserError as error:
        raise ValueError(str(error)) from None


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Settings = dict[str, str]
Grid = dict[str, Texts]


class Part(BaseModel):
    """A part of the file: every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Measure(Part):
    """What is measured in the runs; what is left out is as the more general part of the file has it.

    Attributes:
        kinds: As ``measure=`` names them; an empty list measures nothing.
        scope: As ``measure_scope=``.
        when: As ``measure_when=``.
        samples: As ``measure_samples=``; ``batch``, ``rho``, ``effort``, ``at_loss``, ``ledger_every``, ``live_every``
            and ``live_samples`` likewise.
    """

    kinds: Texts | None = None
    scope: Texts | None = None
    when: Texts | None = None
    samples: str | None = None
    batch: str | None = None
    rho: str | None = None
    effort: str | None = None
    at_loss: str | None = None
    ledger_every: str | None = None
    live_every: str | None = None
    live_samples: str | None = None

    def words(self) -> dict[str, str]:
        """Return it as settings of a run."""
        names = {name: "measure" if name == "kinds" else f"measure_{name}" for name in type(self).model_fields}
        given = {names[name]: value for name in names if (value := getattr(self, name)) is not None}
        return {key: ",".join(value) if isinstance(value, tuple) else value for key, value in given.items()}


class Runs(Part):
    """Runs that are made by one list of settings: one for every combination of the grid, and every seed.

    Attributes:
        name: What sides of a hypothesis call them.
        settings: Those that all of them have.
        grid: Values of those in which they differ.
        measure: What is measured in them, where it is not what the study says.
    """

    name: str
    settings: Settings = {}
    grid: Grid = {}
    measure: Measure = Measure()


class RunsOfForm(Part):
    """What a form changes in some runs.

    Attributes:
        settings: Put over those of the runs.
        grid: The values taken, unless the whole grid is asked for.
        measure: Put over what is measured.
    """

    settings: Settings = {}
    grid: Grid = {}
    measure: Measure = Measure()


class Form(RunsOfForm):
    """One size in which the study can be run.

    Attributes:
        seeds: Those taken where none are asked for.
        minutes: What it may take with them on two CPU cores; None where that is not known.
        runs: Changes for some runs alone.
        without_runs: Names of runs that this form cannot make.
        full_alone: Names of runs that it makes only where the whole grid is asked for. Controls may be among them.
        without: Hypotheses that this form cannot test.
        why_without: The reason for both.
        ours: What is this project's own choice, where the record does not say.
    """

    seeds: Texts
    minutes: Annotated[float, Field(gt=0)] | None = None
    runs: dict[str, RunsOfForm] = {}
    without_runs: Texts = ()
    full_alone: Texts = ()
    without: Texts = ()
    why_without: str = ""
    ours: tuple[str, ...] = ()


class Quantity(Part):
    """One number of a run, or one for each of its tasks. One of the first three says which.

    Attributes:
        metric: A metric of the record.
        accuracy: Accuracies of each task: ``last`` after the last task, ``own`` right after its own training, or
            ``others`` for the mean over all other tasks right after its training.
        value: A measured value.
        as_recorded: The value that stands for it in the record's own way of measuring.
        scope: Over which weights it was measured.
        when: At which time of a task's training.
        task: ``each``, ``first``, ``last`` or a task's name; for a side also ``others``, the mean over those that the
            opposite side does not name.
        reduce: ``mean`` takes the tasks' mean; ``spread`` the standard deviation over the tasks of one seed;
            ``seed_spread`` the one over the seeds, task by task, of which each seed has its share.
        scale: ``log2`` counts doublings.
    """

    metric: str | None = None
    accuracy: Literal["last", "own", "others"] | None = None
    value: str | None = None
    as_recorded: str | None = None
    scope: str | None = None
    when: str | None = None
    task: str = EACH
    reduce: Literal["mean", "spread", "seed_spread"] = "mean"
    scale: Literal["plain", "log2"] = "plain"


class Side(Part):
    """Which runs stand on one side of a comparison, and what of the quantity is another than there.

    Attributes:
        run: The names of the runs; None for any.
        settings: What they must have; a setting that the opposite side names and this one does not is at its default.
        constant: A number instead of runs.
    """

    run: Texts | None = None
    settings: Settings = {}
    constant: Annotated[float, Field(allow_inf_nan=False)] | None = None
    value: str | None = None
    as_recorded: str | None = None
    scope: str | None = None
    when: str | None = None
    task: str | None = None
    reduce: Literal["mean", "spread", "seed_spread"] | None = None


class Slope(Part):
    """The quantity, or its difference between the sides, as a straight line over something.

    Attributes:
        over: The setting.
        over_quantity: Or another quantity of the same runs.
        scale: ``log2`` and ``log10`` take its logarithm.
    """

    over: str | None = None
    over_quantity: Quantity | None = None
    scale: Literal["plain", "log2", "log10"] = "plain"


class Hypothesis(Part):
    """One tested sentence.

    Attributes:
        id: Its short name.
        statement: The sentence.
        quantity: What is compared.
        side: The runs of which it says something.
        against: Those that it compares them with; None where a slope of the side alone is tested.
        controls: Other runs that the side is compared with too, by what they are called.
        slope: Tests how the quantity grows instead.
        direction: Of side minus against, or of the slope.
        smallest: The smallest effect that would matter, in ``unit``.
        unit: Of the effect.
        ignore: Settings in which a pair need not agree; where several runs fit, their mean counts.
        for_each: Settings of which each value makes a hypothesis of its own.
    """

    id: Annotated[str, Field(pattern=r"^[^\[\]]+$")]
    statement: str
    quantity: Quantity
    side: Side = Side()
    against: Side | None = None
    controls: dict[str, Side] = {}
    slope: Slope | None = None
    direction: Literal["higher", "lower"]
    smallest: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    unit: str
    ignore: Texts = ()
    for_each: Texts = ()


class Conclusion(Part):
    """What the record concluded, or left open, and the hypotheses by which that is judged.

    Attributes:
        text: In this project's words.
        hypotheses: All of them must be supported for it to survive.
        open: Whether the record left it open.
    """

    text: str
    hypotheses: Texts
    open: bool = False


class Figure(Part):
    """A figure of the page.

    Attributes:
        kind: What is drawn.
        title: Above it.
        value: Of measured values: which.
        scopes: Over which weights; all that were measured where it is empty.
        when: At which times.
        panels: Settings or ``task`` by whose values panels stand side by side.
    """

    kind: Literal[
        "landscape", "slice", "density", "spectrum", "accuracy_matrix", "plane", "forest", "statistics", "slope"
    ]
    title: str = ""
    value: str | None = None
    scopes: Texts = ()
    when: Texts = ()
    panels: Texts = ()


class Study(Part):
    """A whole file.

    Attributes:
        name: As ``name=`` takes it; plain, since it names a folder.
        title: In a line.
        question: What it asks.
        record: The part of the record that it belongs to; empty for a study of one's own.
        settings: What all runs have.
        measure: What is measured in all of them.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    title: str
    question: str
    record: str = ""
    settings: Settings = {}
    measure: Measure = Measure()
    forms: dict[FormName, Form]
    runs: tuple[Runs, ...]
    hypotheses: tuple[Hypothesis, ...]
    conclusions: tuple[Conclusion, ...] = ()
    figures: tuple[Figure, ...] = ()


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Reads every scalar as text, and refuses a key that stands twice, of which one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def left_out_runs(form: Form, *, full: bool) -> frozenset[str]:
    """Return the names of the runs that a form does not make."""
    return frozenset((*form.without_runs, *(() if full else form.full_alone)))


def library() -> dict[str, Path]:
    """Return the files of the studies that come with this project, by their names."""
    return {path.stem: path for path in sorted(LIBRARY.glob("*.yaml"))}


def find_study(name: str) -> Path:
    """Return the file of one of this project's studies.

    Raises:
        UserError: If there is none of that name.
    """
    known = library()
    if name not in known:
        raise UserError(
            f"name={name}: there is no such study.{did_you_mean(name, known)} There are: {', '.join(known)}. "
            "A file of your own is named with file=FILE."
        )
    return known[name]


def read_study(path: Path) -> Study:
    """Read a study's file and check its form.

    Raises:
        UserError: With every mistake, each with the file and its place in it.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no study {path}. Expected a YAML file; docs/studies.md has one.") from None
    except UnicodeDecodeError:
        raise UserError(f"the study {path} is not text in UTF-8.") from None
    except OSError as error:
        raise UserError(f"the study {path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise UserError(f"the study {path} is nested too deeply. Expected a YAML file as in docs/studies.md.") from None
    except yaml.YAMLError as error:
        raise UserError(f"the study {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"the study {path} holds no keys. Expected a YAML file as in docs/studies.md.")
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise UserError.collect([f"{path}: {_said(problem)}" for problem in error.errors()]) from None
    if problems := [f"{path}: {problem}" for problem in _inconsistencies(study)]:
        raise UserError.collect(problems)
    return study


def named_file(word: str) -> Path:
    """Return the file that ``file=`` names.

    Raises:
        UserError: If nothing can be there.
    """
    path = named_path("file", word)
    if os.path.isdir(path):
        raise UserError(f"file={word} is a folder. Name a study's YAML file.")
    return path


# Parts of the file by the key that holds them, for "did you mean".
_PARTS: Mapping[str, type[Part]] = {
    **{"measure": Measure, "runs": Runs, "quantity": Quantity, "over_quantity": Quantity, "side": Side},
    **{"against": Side, "controls": Side, "slope": Slope, "hypotheses": Hypothesis, "conclusions": Conclusion},
    **{"figures": Figure, "forms": Form, "quick": Form, "small": Form, "record": Form},
}


def _said(problem: Any) -> str:
    """Return one of pydantic's findings as a sentence with its place."""
    place = [str(part) for part in problem["loc"] if part not in ("[key]",)]
    where, last = ".".join(place[:-1]), place[-1] if place else ""
    around = f"{where} has" if where else "it has"
    if problem["type"] == "missing":
        return f"{around} no {last!r}."
    if problem["type"] == "extra_forbidden":
        names = [part for part in place[:-1] if not part.isdigit()]
        part = next((_PARTS[name] for name in reversed(names) if name in _PARTS), Study)
        if names[:1] == ["forms"] and names[2:3] == ["runs"]:
            part = RunsOfForm
        return f"{around} an unknown key {last!r}.{did_you_mean(last, part.model_fields)}"
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
        hint = did_you_mean(str(problem["input"]), expected.replace("'", "").replace(" or ", ", ").split(", "))
        return f"{'.'.join(place)} is {problem['input']!r}.{hint} Expected: {expected}."
    return f"{'.'.join(place) or 'it'} is {problem['input']!r}: {problem['msg']}."


def _inconsistencies(study: Study) -> Iterator[str]:
    """Yield what keys say that do not go together."""
    for what, names in (("runs", [each.name for each in study.runs]), ("hypotheses", _ids(study))):
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{what} has {name!r} twice. Name each once."
    for what, expected in (("forms", f"some of {', '.join(FORMS)}"), ("runs", "a list"), ("hypotheses", "a list")):
        if not getattr(study, what):
            yield f"{what} is empty. Expected {expected}."
    runs = [each.name for each in study.runs]
    for name, form in study.forms.items():
        for key in (*form.runs, *form.without_runs, *form.full_alone):
            if key not in runs:
                yield f"forms.{name} names runs {key!r}, which the study does not have.{did_you_mean(key, runs)}"
        for seed in form.seeds:
            if not seed.isdecimal():
                yield f"forms.{name}.seeds has {seed!r}, which is no whole number. Expected e.g. 0..2 or [0, 1, 2]."
        for key in form.without:
            if key not in _ids(study):
                yield f"forms.{name}.without names {key!r}, which is no hypothesis.{did_you_mean(key, _ids(study))}"
        if (form.without or form.without_runs) and not form.why_without:
            yield f"forms.{name} leaves something out and does not say why. Add why_without."
    for hypothesis in study.hypotheses:
        yield from _wrong_in(hypothesis, runs)
    for conclusion in study.conclusions:
        for key in conclusion.hypotheses:
            if key not in _ids(study):
                yield f"conclusions: {key!r} is no hypothesis.{did_you_mean(key, _ids(study))}"
        if not conclusion.hypotheses:
            yield f"conclusions: {conclusion.text!r} names no hypothesis."


def _ids(study: Study) -> list[str]:
    return [each.id for each in study.hypotheses]


def _wrong_in(hypothesis: Hypothesis, runs: list[str]) -> Iterator[str]:
    where = f"hypothesis {hypothesis.id!r}"
    quantities = [("quantity", hypothesis.quantity)]
    slope = hypothesis.slope
    if slope is not None:
        if (slope.over is None) == (slope.over_quantity is None):
            yield f"{where}: its slope needs one of 'over', a setting, and 'over_quantity'."
        if slope.over_quantity is not None:
            quantities.append(("slope.over_quantity", slope.over_quantity))
    for name, quantity in quantities:
        kinds = [key for key in ("metric", "accuracy", "value") if getattr(quantity, key) is not None]
        if len(kinds) != 1:
            yield f"{where}: {name} has {' and '.join(kinds) or 'none'} of 'metric', 'accuracy' and 'value'. Give one."
        if quantity.metric is not None and quantity.task != EACH:
            yield f"{where}: {name} is a metric, which is one number of a run and takes no 'task'."
        if quantity.reduce == "spread" and (quantity.metric is not None or quantity.task != EACH):
            yield f"{where}: {name} reduces to the spread over tasks, and has one number of a run. Leave out 'reduce'."
    if hypothesis.against is None and slope is None:
        yield f"{where} has neither 'against' nor 'slope', so there is nothing to test."
    if hypothesis.side.constant is not None:
        yield f"{where}: its side is a constant. Put the constant into 'against'."
    if hypothesis.controls and hypothesis.against is None:
        yield f"{where} has controls and no 'against'."
    sides = [("side", hypothesis.side), ("against", hypothesis.against), *hypothesis.controls.items()]
    for name, side in sides:
        for key in side.run or () if side is not None else ():
            if key not in runs:
                hint = did_you_mean(key, runs)
                yield f"{where}: {name} names runs {key!r}, which the study does not have.{hint}"

"""The verb ``study``: runs a study, and ends with its verdicts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatpatch.errors import UserError, did_you_mean, named_path
from flatpatch.files import folder_problems
from flatpatch.progress import Progress
from flatpatch.report.study_page import PAGE, write_studies_page
from flatpatch.runner.executors.local import LOGS, carry_out, room_for
from flatpatch.runner.jobs import missing
from flatpatch.runner.resolve import cuda_devices
from flatpatch.runner.sweep import listed
from flatpatch.settings import DEFAULTS, check_folder, read_words
from flatpatch.studies.checks import check_hypotheses, check_names, hypotheses_of
from flatpatch.studies.evaluate import evaluate
from flatpatch.studies.planning import PASSED_ON, Asked, Cell, folders_of, plan_study
from flatpatch.studies.result import folder_of, write_result
from flatpatch.studies.schema import LIBRARY, FormName, Hypothesis, Study, find_study, library, named_file, read_study
from flatpatch.studies.verdict_table import verdict_table
from flatpatch.terminal import say

USAGE = """usage: python -m flatpatch study name=NAME [key=value ...] [--dry-run]
       python -m flatpatch study file=FILE.yaml [key=value ...] [--dry-run]

Runs what a study lacks and ends with a verdict on each of its hypotheses. Its runs are ordinary runs: finished ones are
kept and shared with other studies of the same output folder, and the same command goes on where it stopped. Without
words it lists the studies. docs/studies.md says how to write one, and what the verdicts mean.

  name=            one of this project's studies
  file=            or a file of your own
  profile=auto     quick: the miniature, minutes on two CPU cores; small: a real pre-trained encoder; record: the
                   record's own size; auto: record where there is a GPU and the study has it, else quick
  seeds=           0..4, or 0,1,2; default: those of the form
  grid=short       full takes every value that the study names; short those of the form
  parallel=0       how many runs go at once; 0: as many as fit: a GPU each, or on a CPU as their threads leave room
  output=runs      where the runs are; the verdicts are in OUTPUT/studies/NAME/PROFILE/
  {passed}
                   as for run, for all runs
  --dry-run        plan everything, say which runs are missing, and start nothing

examples:
  python -m flatpatch study
  python -m flatpatch study name=exp4
  python -m flatpatch study name=exp4 seeds=0..4 output=runs/five-seeds
  python -m flatpatch study name=exp5_2 grid=full --dry-run
  python -m flatpatch study file=mine.yaml profile=quick
"""
KEYS = ("name", "file", "profile", "seeds", "grid", "parallel", "output", *PASSED_ON)


@dataclass(frozen=True)
class Words:
    """What the words of the verb ask for."""

    path: Path
    profile: str
    seeds: tuple[str, ...]
    full: bool
    parallel: int
    output: str
    passed: tuple[str, ...]


def study(words: Sequence[str]) -> int:
    """Run a study; returns 1 if a run failed.

    Raises:
        UserError: With every mistake; nothing was started.
    """
    if "--help" in words or "-h" in words:
        print(USAGE.format(passed="  ".join(f"{key}=" for key in PASSED_ON)))
        return 0
    if not words:
        print(_list())
        return 0
    dry_run = "--dry-run" in words
    asked_for = parse_words([word for word in words if word != "--dry-run"])
    found = read_study(asked_for.path)
    with _of_file(asked_for.path):
        check_names(found)
        asked = _choose(found, asked_for)
        cells = plan_study(found, asked, dry_run=dry_run)
        check_hypotheses(found, asked, cells)
    output = named_path("output", asked_for.output).absolute()
    runs = folders_of(cells)
    if dry_run:
        print(_planned(found, asked, runs, hypotheses_of(found, asked, cells)))
        return 0
    return _carry_out(found, asked, cells, output, asked_for.parallel)


@contextlib.contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """Begin with the file whatever is said of a file that is not ours."""
    try:
        yield
    except UserError as error:
        raise error if path.parent == LIBRARY else UserError(f"{path}: {error}") from None


def _carry_out(found: Study, asked: Asked, cells: Sequence[Cell], output: Path, parallel: int) -> int:
    runs = folders_of(cells)
    lacking = missing(runs)
    room = room_for(parallel, lacking)
    folder = folder_of(output, found.name, asked.form)
    if problems := folder_problems(folder, 0, "study"):
        raise UserError.collect(problems)
    say(_headline(found, asked, runs, len(lacking), room.at_once))
    failures = carry_out(f"study {found.name}", lacking, room=room, logs=folder / LOGS)
    result = evaluate(found, asked, cells, output)
    verdicts = write_result(folder, result)
    print(f"\n{verdict_table(result)}")
    for failure in failures:
        print(f"failed: {failure}")
    say(f"\nrecords  {output}/<run>/record.json\nverdicts {verdicts}")
    _leave_page(verdicts)
    return 1 if failures else 0


def _leave_page(verdicts: Path) -> None:
    """Write the study's page; where that fails, say so and let the verdicts count."""
    page = verdicts.parent / PAGE
    try:
        with Progress("page", "study") as shown:
            write_studies_page([verdicts], page, advance=lambda done, total: shown.update("", done, total))
    except Exception as error:
        again = f"python -m flatpatch report study={verdicts.parents[1].name} output={verdicts.parents[3]}"
        print(
            f"WARNING: the page {page} was not written, the verdicts are whole: {type(error).__name__}: {error}. "
            f"To try again: {again}",
            flush=True,
        )
    else:
        say(f"page     {page}")


def parse_words(words: Sequence[str]) -> Words:
    """Read the verb's words.

    Raises:
        UserError: With every mistake.
    """
    given, problems = read_words("study", words, KEYS)
    path = Path()
    if ("name" in given) == ("file" in given):
        problems.append(f"study needs one of name= and file=. Studies: {', '.join(library())}.")
    else:
        try:
            path = find_study(given["name"]) if "name" in given else named_file(given["file"])
        except UserError as error:
            problems.append(str(error))
    seeds: tuple[str, ...] = ()
    if given.get("seeds"):
        try:
            seeds = tuple(listed(f"seeds={given['seeds']}", "seeds", given["seeds"]))
        except UserError as error:
            problems.append(str(error))
        problems += [
            f"seeds={given['seeds']}: {seed!r} is not a whole number." for seed in seeds if not seed.isdecimal()
        ]
    for key, choices in {"profile": ("auto", "quick", "small", "record"), "grid": ("short", "full")}.items():
        if (value := given.get(key, choices[0])) not in choices:
            problems.append(f"unknown {key} '{value}'.{did_you_mean(value, choices)} Expected: {', '.join(choices)}.")
    parallel = given.get("parallel", "0")
    if not parallel.isdecimal():
        problems.append(f"parallel='{parallel}' is not a whole number (expected e.g. parallel=2).")
    output = given.get("output", str(DEFAULTS["output"]))
    problems += check_folder("output", output)
    if problems:
        raise UserError.collect(problems)
    passed = tuple(f"{key}={given[key]}" for key in PASSED_ON if given.get(key))
    return Words(path, given.get("profile", "auto"), seeds, given.get("grid") == "full", int(parallel), output, passed)


def _choose(found: Study, words: Words) -> Asked:
    """Choose the form, and the seeds of it.

    Raises:
        UserError: If the study has no such form.
    """
    forms: Mapping[str, FormName] = {form: form for form in found.forms}
    name = words.profile
    if name == "auto":
        name = "record" if "record" in forms and cuda_devices() else "quick"
        name = name if name in forms else next(iter(forms))
    if name not in forms:
        raise UserError(f"study {found.name} has no form {name}. It has: {', '.join(forms)}.")
    form = forms[name]
    seeds = words.seeds or found.forms[form].seeds
    return Asked(form, seeds, words.full, (*words.passed, f"output={words.output}"))


def _list() -> str:
    lines = ["studies: python -m flatpatch study name=NAME, or bash run_scripts/NAME.sh", ""]
    for name, path in library().items():
        found = read_study(path)
        lines.append(f"  {name:<8} {found.title} [{', '.join(found.forms)}]")
    return "\n".join([*lines, "", "--help says more."])


def _headline(found: Study, asked: Asked, runs: Sequence[Cell], missing: int, at_once: int) -> str:
    form = found.forms[asked.form]
    lines = [
        f"study {found.name}: {found.title}",
        f"  {found.question}",
        f"  form {asked.form}, seeds {', '.join(asked.seeds)}: {len(runs)} runs, {missing} of them missing"
        + (f", {at_once} at once" if at_once > 1 else ""),
    ]
    if form.minutes:
        seeds = ", ".join(form.seeds)
        lines.append(f"  made to end within {form.minutes:g} min on two cores with seeds {seeds} and the short grid")
    lines += [f"  ours: {text}" for text in form.ours]
    return "\n".join(lines)


def _planned(found: Study, asked: Asked, runs: Sequence[Cell], hypotheses: Sequence[Hypothesis]) -> str:
    lacks = dict.fromkeys(lack for cell in runs for lack in cell.plan.lacks)
    lines = [_headline(found, asked, runs, len(runs), 1), ""]
    lines += [f"  {cell.plan.folder.name}" for cell in runs]
    lines += [
        "",
        f"{len(hypotheses)} hypotheses:",
        *(f"  {each.id}: {each.statement}" for each in hypotheses),
    ]
    lines += ["", "These runs cannot start here:", *(f"  - {lack}" for lack in lacks)] if lacks else []
    return "\n".join(lines)

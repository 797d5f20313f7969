"""Several runs one after another, and finished runs shown again."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.errors import FlatpatchError, UserError, named_path
from flatpatch.families.base import Plan
from flatpatch.files import unwritable
from flatpatch.report.copies import copied_records
from flatpatch.report.overview import overview
from flatpatch.report.records import RECORD_FILE, lacking_steps, read_record, read_step_metrics, run_folder
from flatpatch.report.table import summary_table
from flatpatch.runner.execute import execute
from flatpatch.runner.figures import leave_figures, tell_figures
from flatpatch.runner.pages import leave_page, place_of, write_page
from flatpatch.runner.record import check_continues, compared_settings
from flatpatch.runner.resolve import make_plan, parse, render
from flatpatch.settings import (
    HOW_MEASURED,
    WHOLE,
    Request,
    explicit_settings,
    given_twice,
    named_runs,
    read_words,
    repeated,
    shown,
    split_word,
)
from flatpatch.terminal import say

MANY = 1_000  # runs that need a word more
MOST = 10_000  # runs that are planned at all
SURE = "yes"
SHOWN = 20  # runs whose commands a dry run prints

REPORT_USAGE = """usage: python -m flatpatch report run=FOLDER[,FOLDER...] [page=FILE]

Prints one run's table again, or of several the means over seeds and a line each; redraws the figures of finished ones,
and writes one HTML page about all of them that needs no other file and no network. A folder of runs stands for all runs
in it. Runs that differ by their seed alone are put together as mean, standard deviation and n; missing, unfinished and
unreadable ones are named.

The page is FOLDER/report.html for one run, report.html in the folder that holds the first run for several.

examples:
  python -m flatpatch report run=runs/NAME
  python -m flatpatch report run=runs/NAME,runs/OTHER page=both.html
  python -m flatpatch report run=runs
"""


def expand(words: Sequence[str]) -> list[list[str]]:
    """Return one list of ``key=value`` words for every combination of the listed values.

    Raises:
        UserError: If a range is empty, a list names a value twice, or the combinations are too many to mean that.

    >>> expand(["rho=0,0.1", "seed=0..1"])
    [['rho=0', 'seed=0'], ['rho=0', 'seed=1'], ['rho=0.1', 'seed=0'], ['rho=0.1', 'seed=1']]
    """
    last: dict[str, Sequence[str]] = {}
    sure = False
    for word in words:
        key, value = split_word(word)
        if key == SURE:
            sure = _is_sure(value)
        elif key in WHOLE or key.startswith("upstream."):
            last[key] = [value]
        else:
            last[key] = _values(word, key, value)
    count = math.prod(map(len, last.values()))
    if count > MOST or (count > MANY and not sure):
        longest = max(last, key=lambda key: len(last[key]))
        advice = f"If you mean it, add {SURE}=true." if count <= MOST else f"A sweep has at most {MOST}: split it."
        raise UserError(f"these are {count} runs, {len(last[longest])} values of {longest} alone. {advice}")
    chosen = [[f"{key}={value}" for value in values] for key, values in last.items()]
    return [list(combination) for combination in itertools.product(*chosen)]


def _values(word: str, key: str, value: str) -> Sequence[str]:
    """Return the values that a word lists; of a long range no more than shows that it is too long."""
    match = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", value)
    if match is None:
        values = [part.strip() for part in value.split(",")]
        if twice := repeated(values):
            raise UserError(f"{word} names {twice} twice. Name each value once.")
        return values
    first, final = int(match[1]), int(match[2])
    if final < first:
        raise UserError(f"{word}: the range is empty (expected the smaller number first, e.g. {key}={final}..{first}).")
    if final - first >= MOST:
        raise UserError(f"{word}: these are {final - first + 1} runs. A sweep has at most {MOST}: split it.")
    return [str(number) for number in range(first, final + 1)]


def _is_sure(value: str) -> bool:
    if value not in ("true", "false"):
        raise UserError(f"{SURE}='{value}' is neither true nor false.")
    return value == "true"


def sweep(words: Sequence[str]) -> int:
    """Run every combination, then print what they gave; returns 1 if a run failed."""
    dry_run = "--dry-run" in words
    combinations = expand([word for word in words if word != "--dry-run"])
    if combinations == [[]] and not dry_run:
        raise UserError("nothing to sweep over: name at least one setting, e.g. seed=0..2. See sweep --help.")
    requests = [parse(combination) for combination in combinations]
    if said := given_twice([word for word in words if word != "--dry-run"]):
        say("\n".join(f"note: {note}" for note in said))
    if len(requests) > 1:
        say("\n".join([f"{len(requests)} combinations", *_without_effect(requests)]))
    plans: list[Plan] = []
    known: list[tuple[Any, ...]] = []
    for plan in (make_plan(request, dry_run=dry_run) for request in requests):
        # Without SAM its radius changes nothing, and auto may come to what is named too: one run stands for all.
        what = (plan.folder, plan.profile, plan.engine, compared_settings(plan))
        if what not in known:
            known.append(what)
            plans.append(plan)
    if len(plans) > 1 and any(plan.request.settings.run for plan in plans):
        raise UserError(
            "run=NAME would put every run of the sweep into one folder. Leave run= out, or set output=FOLDER."
        )
    folders = [plan.folder for plan in plans]
    if twice := repeated([str(folder) for folder in folders]):
        raise UserError(
            f"two runs of this sweep would use {twice}. Give them different output= folders, one sweep each."
        )
    if dry_run:
        print("1 run\n" if len(plans) == 1 else f"{len(plans)} runs that differ\n")
        if len(plans) <= SHOWN:
            print("\n\n".join(render(plan) for plan in plans))
            return 0
        print(render(plans[0]))
        print("\nand in the same way (with run instead of sweep, --dry-run shows the commands of one):")
        print("\n".join(f"  {plan.folder}" for plan in plans[1:]))
        return 0
    for plan in plans:
        check_continues(plan.folder, plan)
    records, failures = [], []
    for number, plan in enumerate(plans, 1):
        say(f"\nrun {number}/{len(plans)}: {plan.folder.name}")
        try:
            records.append(execute(plan))
        except FlatpatchError as error:
            if error.exit_code != 1:
                raise
            print(f"flatpatch: {error}")
            failures.append(plan.folder.name)
    print("\n" + seeds_table(records))
    if failures:
        print(f"failed: {', '.join(failures)}")
    leave_page(folders)
    return 1 if failures else 0


def _without_effect(requests: Sequence[Request]) -> list[str]:
    """Say which settings change nothing, and where: runs that differ by them alone are one."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for request in requests:
        for key, why in request.idle().items():
            values.setdefault((key, why), {})[shown(getattr(request.settings, key))] = None
    return [f"note: {key}={','.join(given)} has no effect where {why}" for (key, why), given in values.items()]


def seeds_table(records: Sequence[dict[str, Any]]) -> str:
    """Return mean, standard deviation (n - 1) and n over runs that differ by their seed, or by what was measured.

    Measuring changes no training. A seed that was run twice counts once, as on the page.
    """
    groups: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for record in records:
        settings = {key: entry["value"] for key, entry in record["settings"].items()}
        shown = [
            record["method"],
            f"order {settings['order']}" if "order" in settings else record["benchmark"],
            record["profile"],
            record["engine"],
            settings["sam"],
        ]
        shown += [f"rho={settings['rho']:g}"] if settings["sam"] != "off" else []
        shown += [
            f"{key}={value}"
            for key, value in explicit_settings(record).items()
            if key not in ("method", "order", "benchmark", "profile", "engine", "sam", "rho", "seed", "run", "output")
            and key not in ("measure", *HOW_MEASURED)
        ]
        groups.setdefault(" ".join(shown), {}).setdefault(tuple(record["seeds"]), record)
    lines = [f"{'mean and standard deviation over seeds':<60} {'average accuracy':>20} {'forgetting':>18}   n"]
    for name, own in groups.items():
        members = own.values()
        accuracy = _spread([member["metrics"]["average_accuracy"] for member in members])
        forgetting = _spread([member["metrics"]["forgetting"] for member in members])
        first, *more = textwrap.wrap(name, 60, subsequent_indent="  ")
        lines += [f"{first:<60} {accuracy:>20} {forgetting:>18} {len(members):>3}", *more]
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{deviation}"


def show(words: Sequence[str]) -> int:
    """Print runs' tables again, redraw their figures and write one HTML page about all of them."""
    if not words or "--help" in words or "-h" in words:
        print(REPORT_USAGE)
        return 0
    given, problems = read_words("report", words, ("run", "page"))
    if "run" not in given:
        problems.append("report needs run=FOLDER, e.g. report run=runs/NAME.")
    if problems:
        raise UserError.collect(problems)
    folders, unreadable = _find_runs(named_runs(given["run"]))
    page = _page_file(given.get("page", ""), folders)
    named = [(folder.name, read_record(folder)) for folder in folders]
    finished = [(name, record) for name, record in named if record["status"] == "finished"]
    if len(named) == 1:
        print(summary_table(named[0][1]))
    else:
        names, records = [name for name, _ in finished], [record for _, record in finished]
        print(f"{seeds_table(records)}\n" if finished else "", end="")
        print("\n".join([overview(named), *copied_records(names, records)]))
    for folder, (_, record) in zip(folders, named, strict=True):
        unreadable += _missing_steps(folder, record)
    for text in unreadable:
        print(f"left out {text}")
    say()
    for folder, (_, record) in zip(folders, named, strict=True):
        if record["status"] == "finished":
            tell_figures(leave_figures(folder, record))
    write_page(folders, page, unreadable)
    return 0


def _missing_steps(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Say which of a run's steps cannot be shown, for whatever reason."""
    said: list[str] = []
    steps = read_step_metrics(folder / "metrics.jsonl", said)
    if not said and (lack := lacking_steps(record, len(steps))):
        said.append(f"{lack} ({folder})")
    return said


def _find_runs(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the run folders that are meant, and a sentence for each damaged one in a folder of runs."""
    folders: list[Path] = []
    unreadable: list[str] = []
    for name in names:
        place = run_folder(name).absolute()
        inside = sorted(path.parent for path in place.glob(f"*/{RECORD_FILE}"))
        if (place / RECORD_FILE).exists() or not inside:
            read_record(place)  # a run that is named must be sound
            folders.append(place)
            continue
        for folder in inside:
            try:
                read_record(folder)
            except UserError as error:
                unreadable.append(str(error))
            else:
                folders.append(folder)
    if not folders:
        raise UserError.collect(unreadable)
    if twice := repeated([str(folder.resolve()) for folder in folders]):
        raise UserError(f"run={','.join(names)} names {twice} twice. Name each run once.")
    return folders, unreadable


def _page_file(name: str, folders: Sequence[Path]) -> Path:
    """Return where the page goes; checked before anything is drawn."""
    page = named_path("page", name) if name else place_of(folders)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"page={page}: expected a name that ends in .html, so that no other file is replaced.")
    if page.is_dir() or not page.parent.is_dir():
        raise UserError(f"page={page}: expected a file in a folder that exists, e.g. page=report.html.")
    if problem := unwritable(page.parent):
        raise UserError(
            f"the page cannot be written into {page.parent.absolute()}: {problem}. Choose another place with page=FILE."
        )
    return page

"""Several runs one after another, and finished runs shown again."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.report.figures import draw_run
from flatpatch.report.flatness_run import draw_flatness
from flatpatch.report.records import read_record, read_step_metrics
from flatpatch.report.table import summary_table
from flatpatch.runs.execute import execute
from flatpatch.runs.plan import make_plan, render
from flatpatch.runs.record import check_continues
from flatpatch.settings import PLACES, parse, split_word

USAGE = """usage: python -m flatpatch sweep key=value[,value...] ... [--dry-run]

One run for every combination; finished ones are kept, so the same command goes on where it stopped.
seed=0..4 is short for seed=0,1,2,3,4. Ends with mean, standard deviation and n over the seeds.

example:
  python -m flatpatch sweep method=nlora sam=off,sam seed=0..2

settings:
{settings}
"""


def expand(words: Sequence[str]) -> list[list[str]]:
    """Return one list of ``key=value`` words for every combination of the listed values.

    >>> expand(["rho=0,0.1", "seed=0..1"])
    [['rho=0', 'seed=0'], ['rho=0', 'seed=1'], ['rho=0.1', 'seed=0'], ['rho=0.1', 'seed=1']]
    """
    last: dict[str, list[str]] = {}
    for word in words:
        key, value = split_word(word)
        if key in PLACES or key.startswith("upstream."):
            values = [value]
        elif match := re.fullmatch(r"(\d+)\.\.(\d+)", value):
            first, final = int(match[1]), int(match[2])
            if final < first:
                raise UserError(
                    f"{word}: the range is empty (expected the smaller number first, e.g. {key}={final}..{first})."
                )
            values = [str(number) for number in range(first, final + 1)]
        else:
            values = value.split(",")
        last[key] = [f"{key}={value}" for value in values]
    return [list(combination) for combination in itertools.product(*last.values())]


def sweep(words: Sequence[str]) -> int:
    """Run every combination, then print what they gave; returns 1 if a run failed."""
    dry_run = "--dry-run" in words
    combinations = expand([word for word in words if word != "--dry-run"])
    requests = [parse(combination) for combination in combinations]
    # Without SAM its radius changes nothing: one run stands for all.
    seen: list[object] = []
    for request in list(requests):
        settings = request.settings
        key = replace(settings, rho=0.0, eta=0.0, scope="lora", sam_on="both") if settings.sam == "off" else settings
        if key in seen:
            requests.remove(request)
        seen.append(key)
    if len(requests) > 1 and any(request.settings.run for request in requests):
        raise UserError(
            "run=NAME would put every run of the sweep into one folder. Leave run= out, or set output=FOLDER."
        )
    plans = [make_plan(request, dry_run=dry_run) for request in requests]
    folders = [plan.folder for plan in plans]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(f"two runs of this sweep would use {twice}. Give them different output= folders, one sweep each.")
    if dry_run:
        print("\n\n".join(render(plan) for plan in plans))
        return 0
    for plan in plans:
        check_continues(plan.folder, plan)
    records, failures = [], []
    for number, plan in enumerate(plans, 1):
        print(f"\nrun {number}/{len(plans)}: {plan.folder.name}", flush=True)
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
    return 1 if failures else 0


def seeds_table(records: Sequence[dict[str, Any]]) -> str:
    """Return mean, standard deviation (n - 1) and n over runs that differ by their seed alone."""
    groups: dict[str, list[dict[str, Any]]] = {}
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
            f"{key}={settings[key]}"
            for key, entry in record["settings"].items()
            if entry["source"] == "command line"
            and key not in ("method", "order", "benchmark", "profile", "engine", "sam", "rho", "seed", "run", "output")
        ]
        groups.setdefault(" ".join(shown), []).append(record)
    lines = [f"{'mean and standard deviation over seeds':<60} {'average accuracy':>20} {'forgetting':>18}   n"]
    for name, members in groups.items():
        accuracy = _spread([member["metrics"]["average_accuracy"] for member in members])
        forgetting = _spread([member["metrics"]["forgetting"] for member in members])
        lines.append(f"{name:<60} {accuracy:>20} {forgetting:>18} {len(members):>3}")
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{deviation}"


def show(words: Sequence[str]) -> int:
    """Print finished runs' tables again and redraw their figures: ``report run=FOLDER[,FOLDER...]``."""
    if not words or "--help" in words or "-h" in words:
        print("usage: python -m flatpatch report run=FOLDER[,FOLDER...]\n\nexample: report run=runs/NAME")
        return 0
    given = dict(split_word(word) for word in words)
    unknown = [key for key in given if key != "run"]
    if unknown or "run" not in given:
        raise UserError(f"report takes run=FOLDER alone (got {' '.join(words)}), e.g. run=runs/NAME.")
    records = []
    for name in given["run"].split(","):
        folder = Path(name) if Path(name).exists() else Path("runs") / name
        record = read_record(folder / "record.json")
        print(summary_table(record), "\n")
        if record["status"] == "finished":
            drawn = draw_run(record, read_step_metrics(folder / "metrics.jsonl"), folder / "figures")
            for path in [*drawn, *draw_flatness(record, folder)]:
                print(f"figure   {path}")
            records.append(record)
    if len(records) > 1:
        print(seeds_table(records))
    return 0

"""The verb ``rerun``: the run of a record once more, and what came out otherwise."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.comparison.two_runs import render as render_differences
from flatpatch.errors import UserError
from flatpatch.report.records import RECORD_FILE, fork_command, read_record, run_folder
from flatpatch.runner.execute import execute
from flatpatch.runner.pages import leave_page
from flatpatch.runner.resolve import make_plan, parse, render
from flatpatch.settings import OF_PLACES, read_words, shown
from flatpatch.upstreams import UPSTREAMS

OUTPUT = "runs/again"
_TAKEN = ("record", "output", "run", "device", "threads", "port", "model", "data")

USAGE = f"""usage: python -m flatpatch rerun record=FILE [key=value ...] [--dry-run]

Makes the run of a record.json once more: every setting that was given then, the profile and the engine that it came to,
and the seed. Ends with what differs between the two, as diff says it. The same command continues a stopped one.

  record=     a run's record.json, or its folder
  output=     where the new run's folder is made; default: {OUTPUT}
  run= device= threads= port= model= data=
              as for run, in place of what the record says: another machine has other folders

examples:
  python -m flatpatch rerun record=runs/NAME/record.json
  python -m flatpatch rerun record=/other/machine/record.json model=models/t5-large device=0 --dry-run
"""


def rerun(words: Sequence[str]) -> int:
    """Make the run of a record once more."""
    if not words or "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    dry_run = "--dry-run" in words
    given, problems = read_words("rerun", [word for word in words if word != "--dry-run"], _TAKEN)
    if not problems and "record" not in given:
        problems.append("rerun needs record=FILE, e.g. rerun record=runs/NAME/record.json.")
    if problems:
        raise UserError.collect(problems)
    place = run_folder(given.pop("record"), "record")
    folder = place.parent if place.name == RECORD_FILE else place
    record = read_record(folder)
    if "forked" in record:
        raise UserError(f"{folder} continues another run's state. To make it again: {shlex.join(fork_command(record))}")
    request = parse(words_of(record, {"run": folder.resolve().name, **given}))
    plan = make_plan(request, dry_run=dry_run)
    if plan.folder.resolve() == folder.resolve():
        raise UserError(f"{folder} is the record's own run. Name another place with output=FOLDER.")
    if dry_run:
        print(render(plan))
        return 0
    execute(plan)
    leave_page([plan.folder])
    print("\n" + render_differences(folder, plan.folder), end="")
    return 0


def words_of(record: Mapping[str, Any], instead: Mapping[str, str]) -> list[str]:
    """Return the words that ask for a record's run.

    Args:
        record: The record.
        instead: Words that take the place of the record's, and ``output``.

    Raises:
        UserError: If the record is of a method that this version does not have.
    """
    if record["method"] not in UPSTREAMS:
        raise UserError(
            f"the record is of method {record['method']}, which is not here. It has: {', '.join(UPSTREAMS)}."
        )
    values = {
        key: shown(entry["value"])
        for key, entry in record["settings"].items()
        if entry["source"] == "command line" and key not in OF_PLACES
    }
    values |= {key: str(record[key]) for key in ("method", "profile", "engine")}
    values |= {"seed": str(record["seeds"][0]), "output": OUTPUT, **instead}
    return [f"{key}={value}" for key, value in values.items()]

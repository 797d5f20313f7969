"""The verb ``fork``: several continuations of a finished run from the state after one of its tasks.

All of them start from the same weights, bit for bit, so that runs with SAM and without are paired by their state and
not by their seed alone. A fork is an ordinary run whose first tasks are another's: the same command goes on with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.families.base import Plan
from flatpatch.files import folder_problems, made_whole
from flatpatch.report.records import read_record, run_folder
from flatpatch.runner.execute import brought
from flatpatch.runner.executors.local import LOGS, carry_out, room_for
from flatpatch.runner.jobs import Job, make_job, missing
from flatpatch.runner.record import made_otherwise, new_record, write_record
from flatpatch.runner.rerun import words_of
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.runner.sweep import conclude, expand
from flatpatch.settings import in_name, named_runs, read_words, split_word, with_role
from flatpatch.terminal import say

VARIED = ("sam", *with_role("sam"))
_OTHERS = (*with_role("measure"), *with_role("machine"), "track", "checkpoint_every")
_SEVERAL = ("run", "task", "parallel")

USAGE = f"""usage: python -m flatpatch fork run=FOLDER[,FOLDER...] task=N key=value[,value...] ... [--dry-run]

Continues finished runs from the state after task N, once for every combination of the settings, each in a folder of its
own beside the run's. All continuations of a run start from the same weights, so that they are paired by state: the
table at the end has their differences, paired, and what the pairing saves. Text methods; image runs keep no state of
their finished tasks.

  run=        finished runs of one method, e.g. one for each seed
  task=       after which task the continuations begin, counted from 1; at least one must be left
  parallel=0  how many go at once; 0: as many as fit
  {", ".join(f"{key}=" for key in VARIED)}
              what the continuations do otherwise; several values with commas between them
  {", ".join(f"{key}=" for key in _OTHERS)}
              as for run

examples:
  python -m flatpatch fork run=runs/NAME task=2 sam=off,sam,random rho=0.05
  python -m flatpatch fork run=runs/NAME-seed0,runs/NAME-seed1,runs/NAME-seed2 task=3 sam=off,sam
"""


def fork(words: Sequence[str]) -> int:
    """Continue finished runs in several ways; returns 1 if a run failed."""
    if not words or "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    dry_run = "--dry-run" in words
    given, varied = _parse([word for word in words if word != "--dry-run"])
    combinations = expand(varied)
    jobs: list[Job] = []
    sources: list[tuple[Path, dict[str, Any], int]] = []
    for name in named_runs(given["run"]):
        parent = run_folder(name)
        record = read_record(parent)
        kept = _kept(given["task"], parent, record)
        for combination in combinations:
            job = _job(parent, record, kept, combination, dry_run=dry_run)
            if job.id not in [other.id for other in jobs]:
                jobs.append(job)
                sources.append((parent, record, kept))
    if dry_run:
        print("\n".join(f"{job.plan.folder}" for job in jobs))
        return 0
    for job, (parent, record, kept) in zip(jobs, sources, strict=True):
        lay_out(job.plan, parent, record, kept)
    lacking = missing(jobs)
    say(f"{len(jobs)} continuations, {len(jobs) - len(lacking)} of them finished")
    room = room_for(int(given.get("parallel", "0")), lacking)
    failures = carry_out("fork", lacking, room=room, logs=jobs[0].plan.folder.parent / LOGS, show=True)
    return conclude(jobs, failures)


def _parse(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the words into what is continued from where, and what the continuations do.

    Raises:
        UserError: With every mistake.
    """
    known = (*_SEVERAL, *VARIED, *_OTHERS)
    given, problems = read_words("fork", words, known)
    if not problems:
        problems += [f"fork needs {key}=." for key in ("run", "task") if key not in given]
        if not any(key in given for key in VARIED):
            problems.append(f"fork needs what the continuations do otherwise, e.g. sam=off,sam: {', '.join(VARIED)}.")
        if not given.get("parallel", "0").isdecimal():
            problems.append(f"parallel='{given['parallel']}' is not a whole number (expected e.g. parallel=2).")
    if problems:
        raise UserError.collect(problems)
    return given, [word for word in words if split_word(word)[0] not in _SEVERAL]


def _kept(task: str, parent: Path, record: Mapping[str, Any]) -> int:
    """Return how many tasks of a run its continuations keep.

    Raises:
        UserError: If it cannot be continued from there.
    """
    count = len(record["tasks"])
    if not (task.isascii() and task.isdecimal() and 1 <= int(task) < count):
        raise UserError(
            f"task={task}: {parent} has {count} tasks (expected a number from 1 to {count - 1}, so that one is left)."
        )
    if record["status"] != "finished":
        raise UserError(f"run={parent} is {record['status']}, not finished. The command that began it goes on.")
    return int(task)


def _job(parent: Path, record: Mapping[str, Any], kept: int, combination: Sequence[str], *, dry_run: bool) -> Job:
    """Plan one continuation."""
    settings = {"output": str(parent.resolve().parent), **dict(split_word(word) for word in combination)}
    asked = parse(words_of(record, settings)).settings
    name = [parent.resolve().name, f"after{kept}", asked.sam]
    name += [f"rho{asked.rho:g}"] if asked.sam != "off" else []
    name += [f"{key}{value}" for key, value in in_name(asked, VARIED).items() if key not in ("sam", "rho")]
    name += ["measured"] if "measure" in settings else []
    name += [f"{key}{value}" for key, value in in_name(asked, with_role("machine")).items() if key in settings]
    words = words_of(record, {**settings, "run": "-".join(name)})
    plan = make_plan(parse(words), dry_run=dry_run)
    if any(len(stage.tasks) != 1 for stage in plan.stages):
        raise UserError(
            f"run={parent}: one process learns all tasks of such a run, and keeps no state of the done ones. Fork "
            "a run of a text method."
        )
    if list(plan.tasks) != record["tasks"]:
        raise UserError(f"run={parent}: it learned {record['tasks']}, and the same words now mean {list(plan.tasks)}.")
    return make_job(plan, words)


def lay_out(plan: Plan, parent: Path, record: Mapping[str, Any], kept: int) -> None:
    """Make a continuation's folder, with what the run left of the tasks that it keeps; leave one that is there.

    Raises:
        UserError: If the run no longer has it, whole.
    """
    if plan.folder.exists():
        return
    if problems := folder_problems(plan.folder, plan.bytes_needed):
        raise UserError.collect(problems)
    files = brought(plan, parent, kept)
    if different := made_otherwise(record, plan):
        raise UserError(f"run={parent} was made otherwise than it would be here: {'; '.join(different)}.")
    own = new_record(plan)
    before = {key: record["settings"].get(key, {}).get("value") for key in VARIED}
    after = {key: own["settings"].get(key, {}).get("value") for key in VARIED}
    changed = {key: [before[key], after[key]] for key in VARIED if before[key] != after[key]}
    own |= {"status": "interrupted"}
    own["forked"] = {"run": parent.resolve().name, "tasks": kept, "changed": changed, "begun": False}
    with made_whole(plan.folder) as folder:
        for path in files:
            target = folder / path.relative_to(parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        write_record(folder, own)

"""Several runs: every combination of listed values, carried out here, by SLURM, or by whoever takes the commands."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.base import Plan
from flatpatch.files import locked
from flatpatch.report.effects import effects_of_sam, effects_text
from flatpatch.report.groups import Run, group_runs
from flatpatch.report.overview import seeds_table
from flatpatch.report.records import RECORD_FILE, read_record
from flatpatch.runner.estimate import Estimate, estimate
from flatpatch.runner.executors import slurm
from flatpatch.runner.executors.local import LOGS, PATIENCE, Room, carry_out, room_for
from flatpatch.runner.jobs import Job, command_of, folder_of, make_job, missing, write_list
from flatpatch.runner.pages import leave_page
from flatpatch.runner.record import LOCK, SLURM_LOG
from flatpatch.runner.resolve import make_plan, parse, render
from flatpatch.settings import WHOLE, Request, given_twice, repeated, shown, split_word
from flatpatch.terminal import is_quiet, quietly, say

MANY = 200  # runs that need a word more
MOST = 10_000  # runs that are planned at all
LONG = 24 * 3600.0  # seconds that need a word more
SURE = "yes"
EXECUTORS = ("local", "slurm", "print")
OPTIONS = ("executor", "parallel", SURE)
OF_SLURM = "slurm."
SHOWN = 20  # runs whose commands a dry run prints


def expand(words: Sequence[str], *, sure: bool = False) -> list[list[str]]:
    """Return one list of ``key=value`` words for every combination of the listed values.

    Args:
        words: The words, with lists and ranges.
        sure: Whether many combinations are meant.

    Raises:
        UserError: If a range is empty, a list names a value twice, or the combinations are too many to mean that.

    >>> expand(["rho=0,0.1", "seed=0..1"])
    [['rho=0', 'seed=0'], ['rho=0', 'seed=1'], ['rho=0.1', 'seed=0'], ['rho=0.1', 'seed=1']]
    """
    last: dict[str, Sequence[str]] = {}
    for word in words:
        key, value = split_word(word)
        if key in WHOLE or key.startswith("upstream."):
            last[key] = [value]
        else:
            last[key] = listed(word, key, value)
    count = math.prod(map(len, last.values()))
    if count > MOST or (count > MANY and not sure):
        longest = max(last, key=lambda key: len(last[key]))
        advice = f"If you mean it, add {SURE}=true." if count <= MOST else f"A sweep has at most {MOST}: split it."
        raise UserError(f"these are {count} runs, {len(last[longest])} values of {longest} alone. {advice}")
    chosen = [[f"{key}={value}" for value in values] for key, values in last.items()]
    return [list(combination) for combination in itertools.product(*chosen)]


def listed(word: str, key: str, value: str) -> Sequence[str]:
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


@dataclass(frozen=True)
class Options:
    """How a sweep is carried out, whatever its runs are.

    Attributes:
        executor: Who carries it out.
        parallel: How many runs may go at once; 0 leaves it to the machine, or to SLURM.
        sure: Whether many runs, or long ones, are meant.
        slurm: What SLURM is told beside.
    """

    executor: str = EXECUTORS[0]
    parallel: int = 0
    sure: bool = False
    slurm: Mapping[str, str] = field(default_factory=dict)


def read_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Split a sweep's words into how it is carried out and what its runs are.

    Raises:
        UserError: With every mistake in the former.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if "=" in word and (key in OPTIONS or key.startswith(OF_SLURM)):
            given[key] = value.strip()
        else:
            rest.append(word)
    executor = given.get("executor", EXECUTORS[0])
    own = {key.removeprefix(OF_SLURM): value for key, value in given.items() if key.startswith(OF_SLURM)}
    problems = slurm.option_problems(own)
    if executor not in EXECUTORS:
        hint = did_you_mean(executor, EXECUTORS)
        problems.append(f"unknown executor '{executor}'.{hint} Expected: {', '.join(EXECUTORS)}.")
    elif own and executor != "slurm":
        problems.append(f"{OF_SLURM}{next(iter(own))}= has no meaning with executor={executor}. Add executor=slurm.")
    parallel = given.get("parallel", "0")
    if not (parallel.isascii() and parallel.isdecimal()):
        problems.append(f"parallel='{parallel}' is not a whole number (expected e.g. parallel=2).")
    elif int(parallel) and executor == "print":
        problems.append("parallel= has no meaning with executor=print: whoever takes the commands says how many.")
    sure = given.get(SURE, "false")
    if sure not in ("true", "false"):
        problems.append(f"{SURE}='{sure}' is neither true nor false.")
    if problems:
        raise UserError.collect(problems)
    return Options(executor, int(parallel), sure == "true", own), rest


def sweep(words: Sequence[str]) -> int:
    """Carry out every combination, then print what they gave; returns 1 if a run failed.

    Raises:
        UserError: With what is wrong; nothing was started.
        Interrupted: If a signal asks to stop, or a disk is full.
    """
    dry_run = "--dry-run" in words
    options, own = read_options([word for word in words if word != "--dry-run"])
    combinations = expand(own, sure=options.sure)
    if combinations == [[]] and not dry_run:
        raise UserError("nothing to sweep over: name at least one setting, e.g. seed=0..2. See sweep --help.")
    prints = options.executor == "print"
    with quietly(is_quiet() or prints):  # commands that go on to another program stand alone
        jobs = _plan(combinations, given_twice(own), dry_run=dry_run, elsewhere=options.executor != "local")
    if dry_run:
        print(_planned([job.plan for job in jobs]))
        return 0
    if options.executor == "slurm":
        slurm.check_here()
    lacking = missing(jobs, elsewhere=options.executor != "local")
    if prints:
        print("".join(f"cd {shlex.quote(str(Path.cwd()))} && {command_of(job)}\n" for job in lacking), end="")
        return 0
    folder = folder_of(jobs)
    room = Room(1) if options.executor == "slurm" else room_for(options.parallel, lacking)
    expected = estimate([job.plan for job in lacking], folder.parents[1])
    _announce(jobs, lacking, expected, room, options)
    write_list(folder, jobs)
    if options.executor == "slurm":
        return _submit(folder, jobs, lacking, options)
    with locked(folder / LOCK, f"another process carries out this sweep, {folder}. Wait for it.", patience=PATIENCE):
        each = None if expected.seconds is None else expected.seconds / max(len(lacking), 1)
        failures = carry_out("sweep", lacking, room=room, logs=folder / LOGS, show=True, expected=each)
    return conclude(jobs, failures)


def _plan(
    combinations: Sequence[Sequence[str]], repeats: Sequence[str], *, dry_run: bool, elsewhere: bool
) -> list[Job]:
    """Plan the runs that differ.

    Raises:
        UserError: If two of them would be in one folder.
    """
    requests = [parse(combination) for combination in combinations]
    if repeats:
        say("\n".join(f"note: {note}" for note in repeats))
    if len(requests) > 1:
        say("\n".join([f"{len(requests)} combinations", *_without_effect(requests)]))
    jobs: dict[str, Job] = {}
    for combination, request in zip(combinations, requests, strict=True):
        # What is missing here may be there where the run goes.
        job = make_job(make_plan(request, dry_run=dry_run or elsewhere), combination)
        # Without SAM its radius changes nothing, and auto may come to what is named too: one run stands for all.
        jobs.setdefault(job.id, job)
    plans = [job.plan for job in jobs.values()]
    if len(plans) > 1 and any(plan.request.settings.run for plan in plans):
        raise UserError(
            "run=NAME would put every run of the sweep into one folder. Leave run= out, or set output=FOLDER."
        )
    if twice := repeated([str(plan.folder) for plan in plans]):
        raise UserError(
            f"two runs of this sweep would use {twice}. Give them different output= folders, one sweep each."
        )
    if not dry_run and (lacks := dict.fromkeys(lack for plan in plans for lack in plan.lacks)):
        say("\n".join(["What these runs need and this machine lacks:", *(f"  - {lack}" for lack in lacks)]))
    return list(jobs.values())


def _planned(plans: Sequence[Plan]) -> str:
    count = "1 run\n" if len(plans) == 1 else f"{len(plans)} runs that differ\n"
    if len(plans) <= SHOWN:
        return "\n".join([count, "\n\n".join(render(plan) for plan in plans)])
    others = [f"  {plan.folder}" for plan in plans[1:]]
    return "\n".join(
        [
            count,
            render(plans[0]),
            "\nand in the same way (with run instead of sweep, --dry-run shows the commands of one):",
            *others,
        ]
    )


def _announce(jobs: Sequence[Job], lacking: Sequence[Job], expected: Estimate, room: Room, options: Options) -> None:
    """Say how many runs there are and how long they will take.

    Raises:
        UserError: If that is more than a day, and nobody said that it is meant.
    """
    at_once = room.at_once if options.executor == "local" else max(options.parallel, 1)
    if lacking and expected.seconds is not None and expected.seconds / at_once > LONG and not options.sure:
        raise UserError(
            f"these {len(lacking)} runs take {expected.sentence(at_once)}. If you mean it, add {SURE}=true."
        )
    finished = len(jobs) - len(lacking)
    say(f"{len(jobs)} run{'s' if len(jobs) > 1 else ''}, {finished} of them finished")
    if lacking:
        say(f"{len(lacking)} to do: {expected.sentence(at_once)}")


def _submit(folder: Path, jobs: Sequence[Job], lacking: Sequence[Job], options: Options) -> int:
    """Hand the missing runs to SLURM, unless it has them; with none missing, print what they gave."""
    if not lacking:
        return conclude(jobs, [])
    if waiting := slurm.queued(folder):
        print(f"SLURM has this sweep: {len(waiting)} elements, {waiting[0]} is the first. Nothing was submitted.")
        return 0
    number = slurm.submit(folder, lacking, slurm.Slurm(options.slurm, options.parallel))
    print(f"submitted: SLURM's job {number}, {len(lacking)} elements, one for each run that is not finished")
    say(
        f"script   {folder / slurm.SCRIPT}\nlogs     {folder.parents[1]}/<run>/{SLURM_LOG}\n"
        f"queue    squeue --job={number}\n"
        "When they have ended, the same command prints what they gave, and submits again those that did not finish."
    )
    return 0


def conclude(jobs: Sequence[Job], failures: Sequence[str]) -> int:
    """Print what finished runs gave and which failed."""
    folders = [job.plan.folder for job in jobs]
    records = {folder: read_record(folder) for folder in folders if (folder / RECORD_FILE).is_file()}
    finished = {folder: record for folder, record in records.items() if record["status"] == "finished"}
    print("\n" + seeds_table(list(finished.values())))
    if effects := effects_of_sam(group_runs([Run(folder, record) for folder, record in finished.items()])):
        print(f"\n{effects_text(effects)}")
    for failure in failures:
        print(f"failed: {failure}")
    leave_page(folders)
    return 1 if failures else 0


def _without_effect(requests: Sequence[Request]) -> list[str]:
    """Say which settings change nothing, and where: runs that differ by them alone are one."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for request in requests:
        for key, why in request.idle().items():
            values.setdefault((key, why), {})[shown(getattr(request.settings, key))] = None
    return [f"note: {key}={','.join(given)} has no effect where {why}" for (key, why), given in values.items()]

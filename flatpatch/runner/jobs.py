"""The runs of a sweep: which they are, which of them are missing, and the file that lists them.

A run's id is a hash of what makes it, and a sweep's of its runs' ids: who asks for the same again gets the same list.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flatpatch.errors import UserError
from flatpatch.families.base import Plan
from flatpatch.files import folder_problems, write_atomically
from flatpatch.runner.record import check_continues, compared_settings

SCHEMA = 1
SWEEPS = "sweeps"
LIST = "jobs.jsonl"


class Planned(Protocol):
    """A run that was planned, and the words that ask for it."""

    @property
    def plan(self) -> Plan:
        """What will be done."""

    @property
    def words(self) -> tuple[str, ...]:
        """What asks for it."""


Anything = TypeVar("Anything", bound=Planned)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    plan: Plan
    words: tuple[str, ...]
    id: str


def make_job(plan: Plan, words: Sequence[str]) -> Job:
    """Return a plan as a job, whose words say what every ``auto`` came to: another machine may choose otherwise."""
    chosen = {"profile": plan.profile, "engine": plan.engine}
    kept = [word for word in words if word.partition("=")[0] not in chosen]
    return Job(plan, (*kept, *(f"{key}={value}" for key, value in chosen.items())), job_id(plan))


def job_id(plan: Plan) -> str:
    """Return a hash of what makes a run: its folder, profile, engine, compared settings and pin."""
    return _hash(
        {
            "folder": str(plan.folder.absolute()),
            "profile": plan.profile,
            "engine": plan.engine,
            "settings": compared_settings(plan),
            "pin": plan.verified.pin if plan.verified else None,
        }
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(jobs: Sequence[Job]) -> Path:
    """Return the folder of a sweep, in the one that holds its runs: its name is the hash of their ids."""
    return jobs[0].plan.folder.parent / SWEEPS / _hash(sorted(job.id for job in jobs))


def command_of(job: Planned) -> str:
    """Return the ordinary command of a run, quoted for a shell; relative folders in it start at the working one."""
    return shlex.join([sys.executable, "-m", "flatpatch", "run", *job.words])


def write_list(folder: Path, jobs: Sequence[Job]) -> None:
    """Write the list of a sweep's runs, unless it is there.

    Raises:
        UserError: If it cannot be written, or what is there is another list.
    """
    path = folder / LIST
    if path.exists():
        _check_list(path, jobs)
        return
    if problems := folder_problems(folder, 0, "sweep"):
        raise UserError.collect(problems)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"schema": SCHEMA, "id": job.id, "words": job.words, "folder": str(job.plan.folder)} for job in jobs]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _check_list(path: Path, jobs: Sequence[Job]) -> None:
    advice = "Remove it and run the same command again: finished runs are kept."
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        versions = {row["schema"] for row in rows}
        ids = {row["id"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the job list {path} cannot be read ({type(error).__name__}: {error}). {advice}") from error
    if other := sorted(map(str, versions - {SCHEMA})):
        raise UserError(
            f"the job list {path} is of version {', '.join(other)}, and this flatpatch writes version {SCHEMA}. "
            f"{advice}"
        )
    if ids != {job.id for job in jobs}:
        raise UserError(f"the job list {path} was changed: it lists other runs than this sweep has. {advice}")


def missing(jobs: Sequence[Anything], *, elsewhere: bool = False) -> list[Anything]:
    """Return the jobs whose runs are not finished; ``elsewhere`` says that another machine carries them out.

    Raises:
        UserError: With every folder that holds something else.
    """
    found, problems = [], []
    for job in jobs:
        try:
            old = check_continues(job.plan.folder, job.plan, elsewhere=elsewhere)
        except UserError as error:
            problems.append(str(error))
            continue
        if old is None or old["status"] != "finished":
            found.append(job)
    if problems:
        raise UserError.collect(problems)
    return found

"""Hand runs to SLURM: one job array, in which each element is the ordinary command of one run.

We write the script ourselves. The usual library, submitit, puts a pickled Python function between SLURM and the command
and queues a job again only by its own call from inside that function; here the exit code 85 has to do it, and what runs
is a command that anybody can repeat by hand.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatpatch.errors import Interrupted, UserError
from flatpatch.files import write_atomically
from flatpatch.runner.jobs import Job, command_of
from flatpatch.runner.record import SLURM_LOG

SCRIPT = "array.sbatch"
SECONDS_BEFORE = 120  # the end of the time, at which a run is told to save
MOST_RESTARTS = 50  # of one element, so that one that never gets anywhere does not go on for ever
# What the script says itself.
OURS = ("array", "chdir", "job_name", "open_mode", "output", "parsable", "requeue", "signal", "wrap")


@dataclass(frozen=True)
class Slurm:
    """What is asked of SLURM.

    Attributes:
        options: What sbatch is told, by the names of its own long options.
        at_once: How many elements may run at once; 0 leaves it to SLURM.
    """

    options: Mapping[str, str]
    at_once: int = 0


def option_problems(options: Mapping[str, str]) -> list[str]:
    """Return what is wrong with settings ``slurm.<name>=<value>``."""
    problems = []
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            problems.append(f"slurm.{name}= is no option of sbatch (expected its long name, e.g. slurm.partition=gpu).")
        elif name.replace("-", "_") in OURS:
            problems.append(f"slurm.{name}= cannot be chosen: the script that flatpatch writes says it.")
        elif not value:
            problems.append(f"slurm.{name}= is empty. An option that takes no value is written slurm.{name}=true.")
    return problems


def check_here() -> None:
    """See that there is SLURM.

    Raises:
        UserError: If there is none.
    """
    absent = [name for name in ("sbatch", "squeue") if shutil.which(name) is None]
    if absent:
        raise UserError(
            f"no SLURM on this machine: {' and '.join(absent)} cannot be found. Use the cluster's login node, or "
            "executor=print, which prints the commands for another scheduler, or executor=local."
        )


def queued(folder: Path) -> list[str]:
    """Return the elements of a sweep that SLURM has and has not ended.

    Raises:
        UserError: If SLURM does not answer.
    """
    words = ["squeue", "--noheader", "--array", "--me", f"--name={_name(folder)}", "--format=%i"]
    return _ask(words).split()


def submit(folder: Path, jobs: Sequence[Job], asked: Slurm) -> str:
    """Submit runs as one array.

    Args:
        folder: The sweep's.
        jobs: Those of its runs that are missing.
        asked: What SLURM is to be told.

    Returns:
        The array's number.

    Raises:
        UserError: If SLURM refuses it.
    """
    path = folder / SCRIPT
    write_atomically(path, script(folder, jobs, asked))
    return _ask(["sbatch", "--parsable", str(path)]).strip().partition(";")[0]


def script(folder: Path, jobs: Sequence[Job], asked: Slurm) -> str:
    """Return the script of an array; SLURM keeps a copy of its own, so that it may be written anew at any time."""
    throttle = f"%{asked.at_once}" if asked.at_once else ""
    options = {
        "job-name": _name(folder),
        "array": f"0-{len(jobs) - 1}{throttle}",
        "chdir": str(Path.cwd()),
        "output": str(folder / "slurm-%a.txt"),
        "open-mode": "append",
        "requeue": "true",
        "signal": f"B:USR1@{SECONDS_BEFORE}",
        **_several_nodes(jobs),
        **{name.replace("_", "-"): value for name, value in asked.options.items()},
    }
    lines = [
        f"#SBATCH --{name}" + ("" if value == "true" else f"={shlex.quote(value)}") for name, value in options.items()
    ]
    return _SCRIPT.format(
        options="\n".join(lines),
        folders="\n".join(f"  {shlex.quote(str(job.plan.folder))}" for job in jobs),
        commands="\n".join(f"  {shlex.quote(command_of(job))}" for job in jobs),
        log=SLURM_LOG,
        resumable=Interrupted.exit_code,
        most=MOST_RESTARTS,
    )


def _several_nodes(jobs: Sequence[Job]) -> dict[str, str]:
    """Return what gives each run its nodes.

    Raises:
        UserError: If the runs want different numbers: the elements of an array are alike.
    """
    wanted = sorted({job.plan.request.settings.nodes for job in jobs})
    if len(wanted) > 1:
        raise UserError(
            f"nodes={','.join(map(str, wanted))}: all runs of an array get as many nodes. Sweep them one at a time."
        )
    return {"nodes": str(wanted[0]), "ntasks-per-node": "1"} if wanted[0] > 1 else {}


_SCRIPT = """\
#!/bin/bash
{options}
# One element for each run that was not finished when this was written: python -m flatpatch sweep ... executor=slurm
folders=(
{folders}
)
commands=(
{commands}
)
folder=${{folders[SLURM_ARRAY_TASK_ID]}}
mkdir -p -- "$folder"
exec >>"$folder/{log}" 2>&1
echo "$(date +%FT%T) $(hostname): element $SLURM_ARRAY_TASK_ID, restart ${{SLURM_RESTART_COUNT:-0}}"
eval "${{commands[SLURM_ARRAY_TASK_ID]}} &"
run=$!
time_is_up=
# Comes to this shell alone, before the end of the job's time; told twice, a run would not wait to save.
trap 'trap : USR1; time_is_up=yes; kill -USR1 "$run"' USR1
trap : TERM # comes to the run by itself
while kill -0 "$run" 2>/dev/null; do wait "$run"; done
wait "$run"
code=$?
# Stopped by hand (scancel) or for want of room, a run ends with this code too, and is not to come back.
if [ "$code" = {resumable} ] && [ "$time_is_up" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
"""


def _name(folder: Path) -> str:
    return f"flatpatch-{folder.name}"


def _ask(words: Sequence[str]) -> str:
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode:
        said = (asked.stderr or asked.stdout).strip() or f"exit code {asked.returncode}"
        raise UserError(f"SLURM refused: {shlex.join(words)}: {said}. Check the slurm.<name>= settings.")
    return asked.stdout

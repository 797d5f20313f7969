"""Carry out a study's runs: those that are missing, one after another or two side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from flatpatch.errors import DiskFull, FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Plan
from flatpatch.progress import Progress
from flatpatch.runner.execute import SIGNALS, execute
from flatpatch.runner.record import check_continues
from flatpatch.runner.supervise import end_with_parent
from flatpatch.studies.planning import Cell
from flatpatch.terminal import say

SIDE_BY_SIDE = 2
LOGS = "logs"
AGAIN = "The same command goes on; finished runs are kept."


def missing_runs(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose runs are not finished.

    Raises:
        UserError: With every folder that holds something else.
    """
    found, problems = [], []
    for cell in cells:
        try:
            old = check_continues(cell.plan.folder, cell.plan)
        except UserError as error:
            problems.append(str(error))
            continue
        if old is None or old["status"] != "finished":
            found.append(cell)
    if problems:
        raise UserError.collect(problems)
    return found


def side_by_side(asked: int, cells: Sequence[Cell]) -> int:
    """Return how many runs go at once.

    Args:
        asked: How many were asked for; 0 leaves it to the machine.
        cells: The runs.

    Raises:
        UserError: If more are asked for than can be had.
    """
    unsafe = next((why for cell in cells if (why := _why_alone(cell.plan))), "")
    if asked > 1 and unsafe:
        raise UserError(f"parallel={asked}: {unsafe}. Leave parallel= out, and the runs go one after another.")
    if asked:
        return min(asked, max(len(cells), 1))
    return 1 if unsafe else max(1, min(SIDE_BY_SIDE, os.cpu_count() or 1, len(cells)))


def _why_alone(plan: Plan) -> str:
    """Say why a run wants the machine for itself, or return an empty string."""
    if plan.device != "cpu":
        return f"{plan.folder.name} runs on a GPU, whose memory two runs may not share"
    if plan.threads != 1 or plan.world_size != 1:
        return f"{plan.folder.name} takes more than one thread"
    return ""


def carry_out(title: str, cells: Sequence[Cell], *, parallel: int, logs: Path) -> list[str]:
    """Make every run that is missing.

    Args:
        title: What they are the runs of.
        cells: Their plans; none is finished.
        parallel: How many go at once.
        logs: The folder for what runs say that go side by side.

    Returns:
        A sentence for each run that failed.

    Raises:
        Interrupted: If a signal asks to stop, or a disk is full.
    """
    if parallel > 1:
        return _side_by_side(title, [cell.plan for cell in cells], parallel, logs)
    failures = []
    began = time.monotonic()
    for number, plan in enumerate([cell.plan for cell in cells], 1):
        left = _time_left(began, number - 1, len(cells))
        say(f"\n{title}: run {number} of {len(cells)}{f', {left}' if left else ''}: {plan.folder.name}")
        try:
            execute(plan, show=False)
        except FlatpatchError as error:
            if error.exit_code != 1:
                raise
            print(f"flatpatch: {error}")
            failures.append(f"{plan.folder.name}: {_first_line(str(error))}")
    return failures


def _time_left(began: float, done: int, total: int) -> str:
    """Return how long the rest will take if it takes what each run has taken so far; empty before the first."""
    if not done:
        return ""
    seconds = (time.monotonic() - began) / done * (total - done)
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


@dataclass
class _Worker:
    plan: Plan
    log: Path
    process: BaseProcess
    began: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Ask it to end, which ends its training too."""
        self.process.terminate()
        self.process.join()


def _side_by_side(title: str, plans: Sequence[Plan], parallel: int, logs: Path) -> list[str]:
    logs.mkdir(parents=True, exist_ok=True)
    waiting, working, failures = list(plans), list[_Worker](), list[str]()
    began, done = time.monotonic(), 0
    with _asked_to_stop() as asked, Progress(title, "run", leave=True) as bar:
        try:
            while waiting or working:
                if asked:
                    raise Interrupted(f"stopped by {asked[0]} during {title}. {AGAIN}")
                while waiting and len(working) < parallel:
                    working.append(_start(waiting.pop(0), logs))
                for worker in [each for each in working if each.process.exitcode is not None]:
                    working.remove(worker)
                    done += 1
                    failures += _ended(worker)
                    bar.tell(
                        f"{title}: run {done} of {len(plans)}: {worker.plan.folder.name}, "
                        f"{time.monotonic() - worker.began:.0f} s"
                    )
                bar.update("", done, len(plans), _time_left(began, done, len(plans)))
                time.sleep(0.2)
        finally:
            for worker in working:
                worker.end()
        bar.end()
    return failures


def _start(plan: Plan, logs: Path) -> _Worker:
    """Start a run in a copy of this process, which has loaded and planned what the run needs."""
    log = logs / f"{plan.folder.name}.txt"
    process = multiprocessing.get_context("fork").Process(target=_run, args=(plan, log, os.getpid()))
    process.start()
    return _Worker(plan, log, process)


def _run(plan: Plan, log: Path, parent: int) -> None:
    """Carry out a run whose words go into a file; a FlatpatchError becomes its message and its exit code."""
    end_with_parent(signal.SIGTERM)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if os.getppid() != parent:  # it ended before it could be asked
        sys.exit(Interrupted.exit_code)
    with log.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    try:
        execute(plan, show=False)
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _ended(worker: _Worker) -> list[str]:
    """Return why a run failed, if it did.

    Raises:
        Interrupted: If it was stopped, or had no room.
        UserError: If it could not start, though its plan was sound.
    """
    code = worker.process.exitcode
    if code == 0:
        return []
    said = _last_words(worker.log)
    name = worker.plan.folder.name
    if code == Interrupted.exit_code:
        raise (DiskFull if "disk is full" in said else Interrupted)(f"{name}: {said} {AGAIN}")
    if code == UserError.exit_code:
        raise UserError(f"{name}: {said}")
    return [f"{name}: {_first_line(said)} See {worker.log}"]


def _last_words(log: Path) -> str:
    """Return the message with which a run ended."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    _, mark, message = text.rpartition("flatpatch: ")
    if mark:
        return message
    return text.splitlines()[-1] if text else "it ended without a word."  # a traceback's last line is its error


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


@contextmanager
def _asked_to_stop() -> Iterator[list[str]]:
    """Collect the names of the signals that ask to stop, and put the old handlers back."""
    asked: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)

    old: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

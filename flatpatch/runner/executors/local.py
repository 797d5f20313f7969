"""Carry out runs on this machine: one after another, or several side by side."""

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

import psutil

from flatpatch.errors import DiskFull, FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Plan
from flatpatch.families.choices import visible_devices
from flatpatch.files import locked
from flatpatch.runner.execute import SIGNALS, execute
from flatpatch.runner.executors.board import Board, in_time
from flatpatch.runner.jobs import Planned
from flatpatch.runner.record import LOCK
from flatpatch.runner.resolve import cuda_devices, make_plan, parse
from flatpatch.runner.supervise import end_with_parent
from flatpatch.terminal import say

LOGS = "logs"
AGAIN = "The same command goes on; finished runs are kept."
# Room in the memory for each of the runs that go side by side on a CPU, when the machine chooses how many.
BYTES_OF_A_RUN = 2 * 2**30
# How long a run that a killed call has left has to save and end.
PATIENCE = 30.0


@dataclass(frozen=True)
class Room:
    """How many runs go at once, and on which GPUs, where each has one for itself."""

    at_once: int
    gpus: tuple[str, ...] = ()


def room_for(asked: int, jobs: Sequence[Planned]) -> Room:
    """Say how many runs go at once.

    Args:
        asked: How many were asked for; 0 leaves it to the machine.
        jobs: The runs.

    Raises:
        UserError: If more are asked for than can be had.
    """
    plans = [job.plan for job in jobs]
    gpus = _one_gpu_each(plans)
    cores = os.cpu_count() or 1
    width, widest = max(((_cores(plan, cores), plan.folder.name) for plan in plans), default=(1, ""))
    limit = ""
    if gpus:
        fit, limit = len(gpus), f"each run takes a GPU, and {len(gpus)} are here"
    elif on_gpu := [plan.folder.name for plan in plans if plan.device != "cpu"]:
        fit, limit = 1, f"{on_gpu[0]} runs on a GPU, whose memory two runs may not share"
    else:
        fit = max(1, min(cores // width, psutil.virtual_memory().available // BYTES_OF_A_RUN))
        limit = f"{widest} takes {width} of {cores} cores" if width > 1 else ""
    if asked > fit and limit:
        raise UserError(f"parallel={asked}: {limit}. Leave parallel= out, and as many go at once as fit ({fit}).")
    return Room(max(1, min(asked or fit, len(plans))), gpus)


def _cores(plan: Plan, cores: int) -> int:
    """Return how many cores a run takes; one that is told no number takes them all."""
    return (plan.threads or cores) * plan.world_size


def _one_gpu_each(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Return the GPUs that runs can be spread over: those here, where each run takes one and none was told which."""
    spread = all(
        plan.device == "cuda" and plan.world_size == 1 and plan.request.settings.device == "auto" for plan in plans
    )
    count = cuda_devices() if plans and spread else 0
    return tuple(map(str, range(count))) if count > 1 else ()


def carry_out(
    title: str, jobs: Sequence[Planned], *, room: Room, logs: Path, show: bool = False, expected: float | None = None
) -> list[str]:
    """Make every run that is missing.

    Args:
        title: What they are the runs of.
        jobs: The runs; none is finished.
        room: How many go at once.
        logs: The folder for what runs say that go side by side.
        show: Whether each run's own table and figures are wanted.
        expected: The seconds that a run is expected to take, where that is known.

    Returns:
        A sentence for each run that failed.

    Raises:
        Interrupted: If a signal asks to stop, or a disk is full.
    """
    if room.at_once > 1:
        return _side_by_side(title, jobs, room, logs, show, expected)
    failures = []
    began = time.monotonic()
    for number, plan in enumerate([job.plan for job in jobs], 1):
        left = in_time(_seconds_left(began, number - 1, len(jobs), 1, expected))
        say(f"\n{title}: run {number} of {len(jobs)}{f', {left} left' if left else ''}: {plan.folder.name}")
        try:
            execute(plan, show=show)
        except Interrupted:
            raise
        except FlatpatchError as error:
            print(f"flatpatch: {error}")
            failures.append(f"{plan.folder.name}: {_first_line(str(error))}")
    return failures


def _seconds_left(began: float, done: int, total: int, at_once: int, expected: float | None) -> float | None:
    """Return how long the rest will take, if it takes what each run has taken so far, or is expected to."""
    spent = time.monotonic() - began
    if done:
        return spent / done * (total - done)
    return None if expected is None else max(0.0, expected * total / at_once - spent)


@dataclass
class _Worker:
    plan: Plan
    log: Path
    process: BaseProcess
    gpu: str
    began: float = field(default_factory=time.monotonic)


def _side_by_side(
    title: str, jobs: Sequence[Planned], room: Room, logs: Path, show: bool, expected: float | None
) -> list[str]:
    logs.mkdir(parents=True, exist_ok=True)
    waiting, working, failures = list(jobs), list[_Worker](), list[str]()
    free = list(room.gpus) or [""] * room.at_once
    began, done = time.monotonic(), 0
    with _asked_to_stop() as asked, Board(title, len(jobs)) as board:
        try:
            while waiting or working:
                if asked:
                    raise Interrupted(f"stopped by {asked[0]} during {title}. {AGAIN}")
                while waiting and len(working) < room.at_once:
                    working.append(_start(waiting.pop(0), logs, free.pop(), show))
                for worker in [each for each in working if each.process.exitcode is not None]:
                    working.remove(worker)
                    free.append(worker.gpu)
                    done += 1
                    failed = _failure(worker)
                    failures += failed
                    board.tell(
                        f"{title}: run {done} of {len(jobs)}: {worker.plan.folder.name}, "
                        f"{time.monotonic() - worker.began:.0f} s{', failed' if failed else ''}"
                    )
                left = _seconds_left(began, done, len(jobs), room.at_once, expected)
                board.update([(each.plan, each.began) for each in working], done, failures, left)
                time.sleep(0.2)
        finally:
            _end_all(working, asked)
    return failures


def _end_all(workers: Sequence[_Worker], asked: Sequence[str]) -> None:
    """Ask runs to end, and again at each further signal that comes meanwhile."""
    told = -1
    while any(worker.process.is_alive() for worker in workers):
        if told < len(asked):
            told = len(asked)
            for worker in workers:
                worker.process.terminate()
        time.sleep(0.05)


def _start(job: Planned, logs: Path, gpu: str, show: bool) -> _Worker:
    """Start a run in a process of its own.

    On the CPU that is a copy of this process, which has loaded and planned what the run needs. CUDA cannot be used in a
    copy, so that a run with a GPU of its own begins with its words.
    """
    log = logs / f"{job.plan.folder.name}.txt"
    process: BaseProcess
    if gpu:
        words = (*job.words, f"output={job.plan.folder.parent}", f"run={job.plan.folder.name}")
        process = multiprocessing.get_context("spawn").Process(
            target=_run_words, args=(words, visible_devices((gpu,)), log, os.getpid(), show)
        )
    else:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(job.plan, log, os.getpid(), show))
    # A signal to the new process waits until that has put its own handlers in the place of this one's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Worker(job.plan, log, process, gpu)


def _run(plan: Plan, log: Path, parent: int, show: bool) -> None:
    """Carry out a run whose words go into a file; a FlatpatchError becomes its message and its exit code."""
    with _speaking_into(log, parent):
        _wait_for_leftover(plan.folder)
        execute(plan, show=show)


def _run_words(words: Sequence[str], gpus: str, log: Path, parent: int, show: bool) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    with _speaking_into(log, parent):
        plan = make_plan(parse(words))
        _wait_for_leftover(plan.folder)
        execute(plan, show=show)


@contextmanager
def _speaking_into(log: Path, parent: int) -> Iterator[None]:
    end_with_parent(signal.SIGTERM)
    os.setpgid(0, 0)  # what is typed at the terminal comes to the parent, which asks each run once
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if os.getppid() != parent:  # it ended before it could be asked
        sys.exit(Interrupted.exit_code)
    with log.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    try:
        yield
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _wait_for_leftover(folder: Path) -> None:
    """Wait for a run that a killed call of the same command has left, and that is about to end."""
    if folder.is_dir():
        with locked(folder / LOCK, f"another process is running {folder}. Wait for it.", patience=PATIENCE):
            pass


def _failure(worker: _Worker) -> list[str]:
    """Return why a run failed, if it did.

    Raises:
        Interrupted: If it was stopped, or had no room.
    """
    code = worker.process.exitcode or 0
    if code == 0:
        return []
    said = _last_words(worker.log)
    name = worker.plan.folder.name
    if code == Interrupted.exit_code:
        raise (DiskFull if "disk is full" in said else Interrupted)(f"{name}: {said} {AGAIN}")
    reason = f"killed by {signal.Signals(-code).name}." if code < 0 else _first_line(said)
    return [f"{name}: {reason} See {worker.log}"]


def _last_words(log: Path) -> str:
    """Return the message with which a run ended."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
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

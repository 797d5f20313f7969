"""Run a command so that it, and all that it started, ends when the process that wanted it ends, however that ends.

Between the two stands this file as a process of its own, which reads from a pipe. Only the one who wants the command
holds the pipe's other end, so the system closes it even after ``kill -9``. Orphans of the command become this
process's children (Linux), so that launchers' workers are found in whatever session they live.

Run as ``python -I -S supervise.py FD COMMAND...``; loads nothing but the standard library, so that it starts at once
and no module of the run's folder can take the place of one of its own. So it reads ``/proc`` itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

# How long what is to end has before it is killed. Launchers use it to end their workers.
PATIENCE = 2.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# What schedulers send to all processes of a job to announce its end. They are meant for the one who wants the command;
# here and, since it is inherited, in the command they would end everything at once.
_ANNOUNCING = (signal.SIGUSR1, signal.SIGUSR2)


class Supervised:
    """A command, started in a session of its own, that does not outlive this process.

    Args:
        command: Its words.
        folder: The folder to run it in.
        variables: Its environment.
        output: The file that takes what it prints.
    """

    def __init__(
        self, command: Sequence[str], *, folder: Path, variables: Mapping[str, str], output: IO[bytes]
    ) -> None:
        reading, self._held = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(reading), *command],
                cwd=folder,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(reading,),
            )
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(reading)
        self._open = True

    @property
    def pid(self) -> int:
        """The process that stands between; also its session and process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the command's exit code as ``Popen`` gives it, None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the command and all that it started; does nothing where it has ended."""
        if self._open:
            self._open = False
            os.close(self._held)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5 * PATIENCE)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main(words: Sequence[str]) -> int:
    """Run a command until it ends or the pipe closes; end whatever is left of it, and pass its exit code on."""
    pipe, command = int(words[0]), words[1:]
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in _ENDING:
        signal.signal(number, note)
    for number in _ANNOUNCING:
        signal.signal(number, signal.SIG_IGN)
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    # Should this process be killed too, the command is; what the command started is then found by the next call.
    child = subprocess.Popen(command, preexec_fn=lambda: _control(_PR_SET_PDEATHSIG, signal.SIGKILL))
    while child.poll() is None and not asked:
        if select.select([pipe], [], [], 0.1)[0]:  # closed: nobody ever writes to it
            break
    code = child.poll()
    _end_all(child)
    if code is None:
        return 128 + signal.SIGTERM
    if code < 0:
        _end_likewise(-code)
    return code


def _control(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process a signal when the process that started it ends, however that ends (Linux)."""
    _control(_PR_SET_PDEATHSIG, number)


def _end_all(child: subprocess.Popen[bytes]) -> None:
    """End the child and all its descendants: ask once, then kill until none is left."""
    for process in _descendants():
        _send(process, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while _descendants():
        if time.monotonic() > deadline:
            for process in _descendants():
                _send(process, signal.SIGKILL)
        time.sleep(0.02)
    child.poll()


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _descendants() -> list[int]:
    """Return all processes that stem from this one and still run (Linux; elsewhere none are found)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name stands in brackets and may hold anything; behind it: state, parent.
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.parent.name)] = int(parent)
    found: list[int] = []
    for process in parents:
        ancestor, seen = process, set()
        while ancestor in parents and ancestor not in seen:
            seen.add(ancestor)
            ancestor = parents[ancestor]
            if ancestor == os.getpid():
                found.append(process)
                break
    return found


def _end_likewise(number: int) -> None:
    """End by the signal that ended the command, so that the caller sees it too."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler to put back
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

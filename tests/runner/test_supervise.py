"""What a run started ends with the run, however that ends: in other sessions, below launchers, and without a word."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatpatch.files import ROOT
from flatpatch.runner import execute
from flatpatch.runner.supervise import Supervised

pytestmark = pytest.mark.timeout(120)
SECONDS = 30.0  # an idle machine takes two; what nobody ends would stay for ten minutes

# A worker that outlives its starter where nobody ends it: another session, and deaf to what can be ignored.
WORKER = """
import signal, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep(600)
"""
# A launcher in the manner of torchrun's: its workers live in sessions of their own; one is left by its starter.
LAUNCHER = f"""
import subprocess, sys, time
worker = {WORKER!r}
subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {{worker!r}}], start_new_session=True)"
subprocess.run([sys.executable, "-c", code], check=True)
subprocess.Popen([sys.executable, "-c", worker])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """Give a variable by which all that a test starts is known, and end what is left of it."""
    name = f"SUPERVISED_BY_TEST={tmp_path}"
    yield name
    for process in alive(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def alive(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            running = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if running and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until_none_is_left(mark: str) -> float:
    started = time.monotonic()
    while alive(mark):
        assert time.monotonic() - started < SECONDS, f"still running: {alive(mark)}"
        time.sleep(0.05)
    return time.monotonic() - started


def runner(tmp_path: Path, mark: str, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process that runs a command under supervision, as the runner does, and wait until it is at work."""
    name, _, value = mark.partition("=")
    code = f"""
        import os, signal, time
        from pathlib import Path
        from flatpatch.runner.supervise import Supervised
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background jobs ignore it
        variables = dict(os.environ) | {{{name!r}: {value!r}}}
        with open({str(tmp_path / "log")!r}, "wb") as log:
            process = Supervised({command!r}, folder=Path({str(tmp_path)!r}), variables=variables, output=log)
            while process.poll() is None:
                time.sleep(0.05)
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=variables)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").is_file() or b"ready" not in (tmp_path / "log").read_bytes():
        assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    return started


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV])
def test_everything_ends_with_the_one_who_wanted_it(number: signal.Signals, tmp_path: Path, mark: str) -> None:
    started = runner(tmp_path, mark, [sys.executable, "-c", LAUNCHER])
    assert len(alive(mark)) == 5, "the supervisor, the launcher and three workers"
    started.send_signal(number)
    assert started.wait(30) == -number
    wait_until_none_is_left(mark)


def test_workers_of_torchs_launcher_end_with_the_one_who_wanted_them(tmp_path: Path, mark: str) -> None:
    (tmp_path / "worker.py").write_text("import time\nprint('at work', flush=True)\ntime.sleep(600)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "worker.py"]
    launcher = f"import subprocess; print('ready', flush=True); subprocess.run({launch!r})"
    started = runner(tmp_path, mark, [sys.executable, "-c", launcher])
    deadline = time.monotonic() + 60
    while (tmp_path / "log").read_text().count("at work") < 2:
        assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    started.kill()
    started.wait(30)
    wait_until_none_is_left(mark)


def test_command_ends_where_its_supervisor_is_killed_too(tmp_path: Path, mark: str) -> None:
    started = runner(tmp_path, mark, [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"])
    for process in (started.pid, *alive(mark)[:1]):  # the supervisor is the eldest
        os.kill(process, signal.SIGKILL)
    started.wait(30)
    wait_until_none_is_left(mark)


def supervised(tmp_path: Path, mark: str, code: str) -> Supervised:
    name, _, value = mark.partition("=")
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", code]
        return Supervised(command, folder=tmp_path, variables={**os.environ, name: value}, output=log)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('done')", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_exit_code_is_the_commands_own(code: str, expected: int, tmp_path: Path, mark: str) -> None:
    process = supervised(tmp_path, mark, code)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() == expected
    process.end()
    assert process.poll() == expected
    assert (tmp_path / "log").read_text() == ("done\n" if expected == 0 else "")


def test_ending_a_command_ends_its_workers_in_other_sessions(tmp_path: Path, mark: str) -> None:
    process = supervised(tmp_path, mark, LAUNCHER)
    while "ready" not in (tmp_path / "log").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    started = time.monotonic()
    process.end()
    assert process.poll() is not None
    assert alive(mark) == []
    assert time.monotonic() - started < SECONDS


def test_workers_that_a_command_leaves_behind_end_with_it(tmp_path: Path, mark: str) -> None:
    process = supervised(tmp_path, mark, LAUNCHER.removesuffix("time.sleep(600)\n"))
    while process.poll() is None:
        time.sleep(0.05)
    assert alive(mark) == []


def test_command_that_cannot_be_started_raises_and_leaves_nothing(tmp_path: Path, mark: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError), (tmp_path / "log").open("wb") as log:
        Supervised(["true"], folder=tmp_path / "nowhere", variables=dict(os.environ), output=log)
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_that_a_killed_run_left_are_ended_and_no_others(tmp_path: Path, mark: str) -> None:
    name, _, value = mark.partition("=")
    code = "import time; print('ready', flush=True); time.sleep(600)"
    started = []
    for hook in ("mine", "mine", "another's"):
        variables = {**os.environ, name: value, "FLATPATCH_RUN": str(tmp_path / hook)}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE))
        stdout = started[-1].stdout
        assert stdout is not None and stdout.readline() == b"ready\n"
        stdout.close()
    execute._end_leftovers(tmp_path / "mine")
    assert alive(mark) == [started[-1].pid]
    started[-1].kill()
    for process in started:
        process.wait(10)

"""Runs that are killed, stopped or asked to stop within a task, and go on from the step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.report.records import validate_record
from flatpatch.runner import execute
from tests.kills import killed_at_random_moments
from tests.runner.test_execute import assert_nothing_runs_on, results, start, wait_until, words
from tests.text_benchmark import small_benchmark

pytestmark = pytest.mark.timeout(1800)
LONG = ("upstream.num_train_epochs=6", "checkpoint_every=3")

# Stands in for a training: says that it can be asked, writes a checkpoint when it is asked to, and exits with 85.
ASKABLE = """
import json, os, pathlib, signal, sys, time
from flatpatch.checkpoints import write_checkpoint
run = json.loads(pathlib.Path(os.environ["FLATPATCH_RUN"]).read_text())
print("begins", flush=True)
kept = run["checkpoints"]
progress = {"phase": "train", "step": 1, "total": 9, "loss": 0.5, "heeds_stop": HEEDS}
pathlib.Path(run["progress"]).write_text(json.dumps(progress))
while not (HEEDS and pathlib.Path(kept["stop"]).exists()):
    time.sleep(0.02)
if ANSWERS:
    write = lambda folder: (folder / "state").write_text("kept")
    write_checkpoint(pathlib.Path(kept["folder"]), 4, write, made_by=kept["made_by"], facts={})
    sys.exit(85)
time.sleep(60)
"""
FAILING = "print('begins again'); raise SystemExit(3)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_benchmark(tmp_path_factory.mktemp("benchmark") / "data")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a script in the place of each training."""

    def put(script: str, **values: object) -> None:
        for name, value in values.items():
            script = script.replace(name, str(value))
        monkeypatch.setattr(execute, "command_of", lambda *_: [sys.executable, "-c", script])

    return put


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(capsys.readouterr())


def send_when(folder: Path, *numbers: signal.Signals, seconds: float = 0.5) -> None:
    """Send this process signals, one after the other, once the first training of a run has said how far it is."""

    def send() -> None:
        while not list((folder / "tasks").glob("1-*/progress.json")):
            time.sleep(0.02)
        for number in numbers:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_run_stops_after_a_step_and_the_same_command_goes_on_from_it(
    number: signal.Signals,
    data: Path,
    tmp_path: Path,
    stand_in: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(data, tmp_path, "asked")
    stand_in(ASKABLE, HEEDS=True, ANSWERS=True)
    send_when(tmp_path / "asked", number)
    assert main(command) == 85
    said = told(capsys)
    assert f"{number.name}: waiting for the end of a step and its checkpoint, at most 60 s" in said
    assert f"stopped by {number.name} during task 1/2 dbpedia" in said
    assert "The same command continues the run from step 4 of task 1/2 dbpedia." in said
    own = tmp_path / "asked" / "tasks" / "1-dbpedia"
    (own / "metrics.jsonl").write_text("kept")

    stand_in(FAILING)
    assert main(command) == 1
    said = told(capsys)
    assert "task 1/2 dbpedia: goes on from step 4" in said
    assert "The same command continues the run from step 4" in said
    assert (own / "metrics.jsonl").read_text() == "kept"
    assert not (own / "stop").exists()
    assert (own / "log.txt").read_text().splitlines() == ["begins", "begins again"]
    record = json.loads((tmp_path / "asked" / "record.json").read_text())
    validate_record(record)
    assert record["restarts"] == 1
    assert [row["after_step"] for row in record["resumed"]] == [4]

    # What made the checkpoint is what goes on from it: with other settings it is another run, in its own folder, and
    # with another flatpatch it would not begin. An altered checkpoint is named, and the task starts anew.
    (own / "checkpoints" / "000000004" / "state").write_text("altered")
    assert main(command) == 1
    said = told(capsys)
    assert "WARNING: the checkpoint" in said
    assert "state was altered" in said
    assert (own / "log.txt").read_text().splitlines() == ["begins again"]
    assert not (own / "metrics.jsonl").exists()


def test_second_signal_ends_a_run_at_once(
    data: Path, tmp_path: Path, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(ASKABLE, HEEDS=True, ANSWERS=False)
    send_when(tmp_path / "twice", signal.SIGINT, signal.SIGINT, seconds=1.0)
    began = time.monotonic()
    assert main(words(data, tmp_path, "twice")) == 85
    assert time.monotonic() - began < 40
    assert "stopped by SIGINT during task 1/2 dbpedia" in capsys.readouterr().err
    assert_nothing_runs_on(tmp_path / "twice")


def test_run_that_does_not_answer_is_ended_after_a_while(
    data: Path, tmp_path: Path, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PATIENCE", 1.0)
    stand_in(ASKABLE, HEEDS=True, ANSWERS=False)
    send_when(tmp_path / "deaf", signal.SIGTERM)
    assert main(words(data, tmp_path, "deaf")) == 85
    assert_nothing_runs_on(tmp_path / "deaf")


def test_process_that_cannot_be_asked_is_ended_at_once(
    data: Path, tmp_path: Path, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(ASKABLE, HEEDS=False, ANSWERS=False)
    send_when(tmp_path / "busy", signal.SIGTERM)
    assert main(words(data, tmp_path, "busy")) == 85
    said = told(capsys)
    assert "waiting for" not in said
    assert "The same command continues the run; finished tasks are kept." in said


def test_signals_that_announce_an_end_do_not_end_a_training() -> None:
    code = "import time; print('lives', flush=True); time.sleep(1); print('still')"
    supervise = Path(execute.__file__).with_name("supervise.py")
    reading, held = os.pipe()
    command = [sys.executable, "-I", "-S", str(supervise), str(reading), sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, pass_fds=(reading,)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "lives\n"
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # as a scheduler does: to all of them
            os.killpg(process.pid, number)
        assert process.stdout.read() == "still\n"
    assert process.returncode == 0
    os.close(held)
    os.close(reading)


def test_run_without_checkpoints_tells_its_processes_of_none(
    data: Path, tmp_path: Path, stand_in: Callable[..., None]
) -> None:
    stand_in(FAILING)
    for pace, expected in (("0", None), ("7", (None, 7)), ("90s", (90.0, None)), ("auto", (None, None))):
        assert main(words(data, tmp_path, "paced", f"checkpoint_every={pace}")) == 1, "pace makes no other run"
        part = json.loads((tmp_path / "paced" / "tasks" / "1-dbpedia" / "hook.json").read_text())["checkpoints"]
        assert (part and (part["every_seconds"], part["every_steps"])) == expected


@pytest.mark.parametrize("pace", ["-1", "s", "5m", "0s", "1.5", "1e3s", "²", "Auto"])
def test_pace_that_is_none_is_refused(pace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"output={tmp_path}", f"checkpoint_every={pace}"]) == 2
    assert f"checkpoint_every={pace} is no pace (expected auto, " in capsys.readouterr().err


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    steps = killed_at_random_moments(
        lambda run: words(data, tmp_path, run, *LONG),
        tmp_path,
        results,
        seed=3,
    )
    assert any(steps), "one of the kills should have come behind a checkpoint"


@pytest.mark.slow
def test_terminated_run_goes_on_from_its_step(data: Path, tmp_path: Path) -> None:
    command = words(data, tmp_path, "stopped", "tasks=dbpedia", "upstream.num_train_epochs=20")
    assert main([*command, "run=undisturbed"]) == 0
    process = start(command)
    progress = tmp_path / "stopped" / "tasks" / "1-dbpedia" / "progress.json"

    def training() -> bool:
        try:
            return bool(json.loads(progress.read_text())["step"] >= 5)
        except (OSError, ValueError):
            return False

    wait_until(training, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 85, output
    assert_nothing_runs_on(tmp_path / "stopped")
    (place,) = (tmp_path / "stopped" / "tasks" / "1-dbpedia" / "checkpoints").iterdir()
    assert f"The same command continues the run from step {int(place.name)} of task" in output
    again = start(command)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert f"goes on from step {int(place.name)}" in output
    assert results(tmp_path / "stopped") == results(tmp_path / "undisturbed")
    assert not place.exists()

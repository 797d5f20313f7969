"""Long work says how far it is, where nobody sees a bar too."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch import progress
from flatpatch.families.reference import StepRecorder
from flatpatch.progress import Progress
from flatpatch.runner import execute
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.runner.tracking import Tracking
from flatpatch.terminal import quietly
from tests.report_records import make_quick_record

# As the hooks in an image repository, the reference engine on images, and both on text write it.
STATES = [
    (
        "inflora",
        {"phase": "train", "step": 3, "total": 40, "loss": 0.5, "task": "4-7"},
        "training task 2/5 4-7, step 3/40",
    ),
    (
        "inflora",
        {"phase": "predict", "step": 1, "total": 2, "loss": None, "task": "4-7"},
        "predicting task 2/5 4-7, step 1/2",
    ),
    ("nlora", {"phase": "train", "step": 3, "total": 40, "loss": 0.5}, "training, step 3/40"),
    ("nlora", {"phase": "predict", "step": 9, "total": None, "loss": None, "task": ""}, "predicting"),
    ("nlora", {"phase": "measure before", "step": 2, "total": 9, "loss": None}, "measuring before, step 2/9"),
]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_plain_lines_are_ten_seconds_apart_and_a_minute_in_long_work(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    with Progress("tasks 1-5", "step") as shown:
        for second in range(3600):
            clock.now = float(second)
            shown.update("train task 1/5 0-3", second, 4000, "loss 0.500")
            if capsys.readouterr().err:
                said.append(second)
    gaps = [after - before for before, after in zip([0, *said], said, strict=False)]
    assert said[0] == gaps[0] == 10
    assert min(gaps) == 10
    assert sorted(gaps) == gaps
    assert gaps[-1] == 60


def test_work_that_has_not_begun_to_count_is_told_too(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tasks 1-5", "step") as shown:
        clock.now = 12.0
        shown.update("starting")
    assert capsys.readouterr() == ("", "tasks 1-5: starting, 12 s\n")


@pytest.mark.parametrize(("method", "state", "expected"), STATES)
def test_lines_of_every_engine_have_one_style(
    method: str,
    state: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(parse([f"method={method}", "profile=quick", "engine=reference"]))
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    (tmp_path / "progress.json").write_text(json.dumps(state))
    names = execute._shown_names(plan)
    sleep = [sys.executable, "-c", "import time; time.sleep(1)"]
    with subprocess.Popen(sleep) as process, Tracking(tmp_path, make_quick_record()) as tracking:
        execute._watch(process, "the title", tmp_path, execute._Stop(), names, tracking)
    loss = "" if state["loss"] is None else ", loss 0.500"
    lines = capsys.readouterr().err.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(rf"the title: {expected}{loss}, \d+ s", line)


class Terminal(io.StringIO):
    """Takes what a terminal would show."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        """What stood in the line, one after the other, without colours."""
        return re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.getvalue()))


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let standard error be a terminal; not a fixture, as pytest puts its own stream there before each test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Progress("tasks 1-5", "step") as shown:
        for step in range(1, 5):
            shown.update("train task 1/5 0-3", step, 4, "loss 0.500")
    last = terminal.shown[-2]
    assert last.startswith("tasks 1-5: train task 1/5 0-3: 100% ") and last.endswith(" loss 0.500")
    assert "step 4/4" not in last and " 4/4 step " in last


def test_part_of_unknown_length_shows_no_share_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with Progress("[1] tasks", "step", leave=True) as shown:
        shown.update("training", 4, 4)
        shown.update("predicting", 3, None)
        shown.end()
    last = terminal.shown[-2]
    assert last.startswith("[1] tasks: ended: ") and " 3/? step " in last
    assert "%" not in last


def test_bar_that_is_not_to_stay_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    for leave in (False, True):
        terminal.truncate(terminal.seek(0))
        with Progress("page", "figure", leave=leave) as shown:
            shown.update("", 1, 1)
        assert terminal.getvalue().endswith("\x1b[1A\x1b[2K") != leave


def test_line_that_is_told_beside_a_bar_goes_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = make_terminal(monkeypatch)
    with Progress("tasks 1-5", "step", leave=True) as shown:
        shown.update("training", 1, 4)
        shown.tell("a note")
        assert "\x1b[1A\x1b[2K" in terminal.getvalue(), "the bar has made room for it"
        shown.update("training", 4, 4)
    assert capsys.readouterr().out == "a note\n"
    assert terminal.shown[-2].startswith("tasks 1-5: training: 100% ")


def test_terminal_that_can_draw_nothing_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with Progress("tasks 1-5", "step") as shown:
        shown.update("training", 1, 4)
        shown.tell("a note")
    assert terminal.getvalue() == "tasks 1-5: training, step 1/4, 0 s\n"


def test_quiet_terminal_gets_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal(monkeypatch)
    with quietly(True), Progress("tasks 1-5", "step") as shown:
        shown.update("training", 1, 4)
        shown.tell("a note")
    assert (terminal.getvalue(), capsys.readouterr().out) == ("", "")


@pytest.mark.parametrize("task", ["", "4-7"])
def test_reference_engine_tells_training_prediction_and_training_again(task: str, tmp_path: Path) -> None:
    """Both families: what a measuring point or the last step left must not stand while something else is done."""
    files = {name: str(tmp_path / f"{name}.json") for name in ("metrics", "summary", "progress")}
    run = {**files, "task": "amazon", "task_index": 0, "sam": {"kind": "off"}, "measure": None}
    step = {"loss": 0.5, "learning_rate": 0.1, "seconds": 0.1}

    def told() -> tuple[str, int, int | None, str]:
        state = json.loads((tmp_path / "progress.json").read_text())
        return state["phase"], state["step"], state["total"], state["task"]

    with StepRecorder(run) as recorder:
        recorder.on_step({"step": 1, "total": 3, **step}, task)
        assert told() == ("train", 1, 3, task)
        recorder.on_step({"step": 3, "total": 3, **step}, task)
        assert told() == ("predict", 0, None, task)
        recorder.on_predict({"step": 2, "total": 2}, task)
        assert told() == ("predict", 2, 2, task)
        recorder.measure("before", torch.nn.Linear(1, 1), list, 0, task)
        assert told() == ("train", 0, None, task)
        recorder.measure("after", torch.nn.Linear(1, 1), list, 0, task)
        assert told() == ("predict", 0, None, task)

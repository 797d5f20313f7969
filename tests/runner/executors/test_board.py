"""How far several runs are, on a terminal and in a file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flatpatch.families.base import Plan
from flatpatch.runner.executors import board
from flatpatch.runner.executors.board import Board, State, state_of, table
from tests.study_cases import planned, write_study


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(write_study(tmp_path), tmp_path)[2][0].plan


def begin(plan: Plan, stage: int, **told: object) -> None:
    folder = plan.folder / "tasks" / plan.stages[stage].folder
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(told))


def test_a_run_is_where_its_last_stage_that_began_says(plan: Plan) -> None:
    assert state_of(plan) == State()
    begin(plan, 0, phase="train", task="amazon", step=9, total=9, loss=0.25)
    assert state_of(plan) == State("training amazon 9/9", "0.250")
    begin(plan, 1, phase="predict", step=3, total=None, loss=None)
    assert state_of(plan) == State("predicting")


def test_progress_that_is_being_written_is_passed_over(plan: Plan) -> None:
    begin(plan, 0, phase="train", step=1, total=2)
    path = plan.folder / "tasks" / plan.stages[0].folder / "progress.json"
    path.write_text(path.read_text()[:-3])
    assert state_of(plan) == State()


def test_the_table_has_a_line_for_each_run_at_work_and_each_that_failed() -> None:
    output = io.StringIO()
    running = [("a-seed0", State("training amazon 3/9", "0.512"), "12 s"), ("a-seed1", State(), "0 s")]
    shown = table("sweep: 1 done", running, ["a-seed2: [Errno 28] no room"])
    Console(file=output, width=120).print(shown)
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert lines == [
        "sweep: 1 done",
        "run at loss for",
        "a-seed0 training amazon 3/9 0.512 12 s",
        "a-seed1 starting 0 s",
        "a-seed2 failed: [Errno 28] no room",
    ]


def test_on_a_terminal_the_table_says_what_is_left(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    monkeypatch.setattr(board, "drawing_console", lambda: console)
    begin(plan, 0, phase="train", task="amazon", step=3, total=9, loss=0.5)
    with Board("sweep", 4) as shown:
        shown.update([(plan, 0.0)], 2, ["x: it broke"], 300.0)
        shown.tell("run 2 of 4")
    said = output.getvalue()
    assert "sweep: 1 done, 1 running, 1 failed of 4, about 5 min left" in said
    assert "training amazon 3/9" in said and "it broke" in said and "run 2 of 4" in said


def test_in_a_file_there_is_a_line_now_and_then(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(board, "SECONDS_OF_A_DRAWING", 0.0)
    monkeypatch.setattr("flatpatch.progress.SECONDS", 0.0)
    begin(plan, 0, phase="train", task="amazon", step=3, total=9, loss=0.5)
    with Board("sweep", 4) as shown:
        shown.update([(plan, 0.0)], 2, ["x: it broke"], 300.0)
    assert capsys.readouterr().err.startswith("sweep: run 2/4, 1 running (loss 0.500), 1 failed, about 5 min left, ")

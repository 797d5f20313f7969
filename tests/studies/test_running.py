"""A study's runs: which are missing, how many go at once, and what becomes of one that fails or is stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch.errors import FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Plan
from flatpatch.studies import running
from flatpatch.studies.planning import Cell
from flatpatch.studies.running import carry_out, missing_runs, side_by_side
from tests.study_cases import leave, planned, write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return planned(write_study(tmp_path), tmp_path, seeds=("0", "1"))[2]


def run_with(monkeypatch: pytest.MonkeyPatch, execute: Callable[[Plan], Any]) -> None:
    """Replace the training; processes that stand beside this one are its copies, and have it too."""
    monkeypatch.setattr(running, "execute", lambda plan, show: execute(plan))


def mark(plan: Plan) -> None:
    plan.folder.mkdir(parents=True)
    (plan.folder / "by").write_text(str(os.getpid()))


def test_finished_runs_are_not_made_again(cells: list[Cell]) -> None:
    leave(cells[0])
    leave(cells[1], status="interrupted")
    assert missing_runs(cells) == cells[1:]


def test_every_folder_that_holds_something_else_is_told(cells: list[Cell]) -> None:
    for cell in cells[:2]:
        cell.plan.folder.mkdir(parents=True)
        (cell.plan.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"2 problems, nothing was started(.|\n)*occupied(.|\n)*occupied"):
        missing_runs(cells)


def test_two_runs_go_at_once_where_each_takes_one_thread(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert (side_by_side(0, cells), side_by_side(0, cells[:1]), side_by_side(1, cells)) == (2, 1, 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert side_by_side(0, cells) == 1


@pytest.mark.parametrize(
    ("change", "why"), [({"device": "cuda"}, "on a GPU, whose memory"), ({"threads": 2}, "more than one thread")]
)
def test_runs_that_want_the_machine_for_themselves_go_alone(
    cells: list[Cell], change: dict[str, Any], why: str
) -> None:
    unsafe = [*cells[1:], Cell("main", 0, dataclasses.replace(cells[0].plan, **change), cells[0].words)]
    assert side_by_side(0, unsafe) == 1
    with pytest.raises(UserError, match=f"parallel=2: .*{why}"):
        side_by_side(2, unsafe)


@pytest.mark.parametrize("parallel", [1, 2])
def test_every_run_is_made_and_a_failure_stops_no_other(
    parallel: int, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def execute(plan: Plan) -> None:
        if plan is cells[1].plan:
            raise FlatpatchError("task 1/2 amazon failed.\nThe end of its log")
        mark(plan)
        print("much to tell")

    run_with(monkeypatch, execute)
    failures = carry_out("study small", cells, parallel=parallel, logs=tmp_path / "logs")
    assert len(failures) == 1
    assert failures[0].startswith(f"{cells[1].plan.folder.name}: task 1/2 amazon failed.")
    processes = {(cell.plan.folder / "by").read_text() for cell in (cells[0], *cells[2:])}
    said = capfd.readouterr().out
    if parallel == 1:
        assert processes == {str(os.getpid())} and "much to tell" in said
        assert "study small: run 4 of 4, about " in said
    else:
        assert len(processes) == 3 and "much to tell" not in said
        assert (tmp_path / "logs" / f"{cells[0].plan.folder.name}.txt").read_text() == "much to tell\n"
        assert said.count(" of 4: ") == 4


def test_an_error_of_our_own_is_told_by_its_last_line(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(plan: Plan) -> None:
        print("the headline of the run", flush=True)
        raise RuntimeError("the real reason")

    run_with(monkeypatch, execute)
    failures = carry_out("study small", cells[:2], parallel=2, logs=tmp_path / "logs")
    assert all("RuntimeError: the real reason" in failure for failure in failures) and len(failures) == 2


def test_a_run_that_was_stopped_ends_the_study_and_the_runs_beside_it(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(plan: Plan) -> None:
        if plan is cells[0].plan:
            raise Interrupted("stopped by SIGTERM during task 1/2 amazon.")
        mark(plan)
        time.sleep(60)

    run_with(monkeypatch, execute)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM during task 1/2 amazon. The same command goes on"):
        carry_out("study small", cells, parallel=2, logs=tmp_path / "logs")
    assert time.monotonic() - began < 30
    assert not (cells[2].plan.folder / "by").exists()


def test_a_signal_ends_the_runs_and_says_how_to_go_on(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = os.getpid()

    def execute(plan: Plan) -> None:
        mark(plan)
        if plan is cells[1].plan:
            os.kill(study, signal.SIGTERM)
        time.sleep(60)

    run_with(monkeypatch, execute)
    old = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM during study small. The same command goes on"):
        carry_out("study small", cells, parallel=2, logs=tmp_path / "logs")
    assert signal.getsignal(signal.SIGTERM) is old
    for cell in cells[:2]:
        if (by := cell.plan.folder / "by").exists():
            with pytest.raises(ProcessLookupError):
                os.kill(int(by.read_text()), 0)

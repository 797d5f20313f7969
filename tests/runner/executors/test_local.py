"""Runs on this machine: how many go at once, and what becomes of one that fails or is stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatpatch.errors import FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Plan
from flatpatch.files import locked
from flatpatch.runner.executors import local
from flatpatch.runner.executors.local import Room, carry_out, room_for
from flatpatch.runner.record import LOCK
from flatpatch.studies.planning import Cell
from tests.study_cases import planned, write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return planned(write_study(tmp_path), tmp_path, seeds=("0", "1"))[2]


def run_with(monkeypatch: pytest.MonkeyPatch, execute: Callable[[Plan], Any]) -> None:
    """Replace the training; processes that stand beside this one are its copies, and have it too."""
    monkeypatch.setattr(local, "execute", lambda plan, show: execute(plan))


def mark(plan: Plan) -> None:
    plan.folder.mkdir(parents=True)
    (plan.folder / "by").write_text(str(os.getpid()))


def changed(cells: list[Cell], **change: Any) -> list[Cell]:
    """Return the cells with their plans changed."""
    return [Cell(cell.name, cell.seed, dataclasses.replace(cell.plan, **change), cell.words) for cell in cells]


def machine(monkeypatch: pytest.MonkeyPatch, *, cores: int = 2, gpus: int = 0, gibibytes: float = 64) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(local, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(local.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gibibytes * 2**30)))


def test_as_many_runs_go_at_once_as_cores_and_memory_have_room_for(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    assert [room_for(0, cells).at_once, room_for(0, cells[:1]).at_once, room_for(1, cells).at_once] == [2, 1, 1]
    assert room_for(3, cells).at_once == 3, "of one thread each, and asked for"
    machine(monkeypatch, cores=64)
    assert room_for(0, cells).at_once == 4 == len(cells)
    machine(monkeypatch, cores=64, gibibytes=6.5)
    assert room_for(0, cells).at_once == 3
    machine(monkeypatch, cores=1)
    assert room_for(0, cells).at_once == 1
    assert room_for(0, []).at_once == 1


def test_threads_are_shared_out(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cores=6)
    assert room_for(0, changed(cells, threads=3)).at_once == 2
    assert room_for(0, changed(cells, threads=1, world_size=2)).at_once == 3
    assert room_for(0, changed(cells, threads=None)).at_once == 1
    with pytest.raises(UserError, match=r"parallel=3: .* takes 3 of 6 cores. Leave parallel= out.*\(2\)"):
        room_for(3, changed(cells, threads=3))


def test_each_run_gets_a_gpu_of_its_own_where_there_are_several(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus=3)
    on_gpu = changed(cells, device="cuda", devices=("0",))
    assert room_for(0, on_gpu) == Room(3, ("0", "1", "2"))
    with pytest.raises(UserError, match="parallel=4: each run takes a GPU, and 3 are here"):
        room_for(4, on_gpu)
    machine(monkeypatch, gpus=1)
    assert room_for(0, on_gpu) == Room(1)
    with pytest.raises(UserError, match="parallel=2: .*whose memory two runs may not share"):
        room_for(2, [*cells[1:], on_gpu[0]])


def test_a_run_with_a_gpu_of_its_own_begins_with_its_words(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[tuple[Any, ...]] = []

    class Process:
        exitcode = 0

        def __init__(self, *, target: Any, args: tuple[Any, ...]) -> None:
            began.append(args)

        def start(self) -> None: ...

        def is_alive(self) -> bool:
            return False

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=Process))
    assert carry_out("sweep", cells[:2], room=Room(2, ("0", "1")), logs=tmp_path / "logs") == []
    assert sorted(args[1] for args in began) == ["4", "7"]
    words = began[0][0]
    assert words[:-2] == cells[0].words
    assert words[-2:] == (f"output={cells[0].plan.folder.parent}", f"run={cells[0].plan.folder.name}")


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
    failures = carry_out("study small", cells, room=Room(parallel), logs=tmp_path / "logs")
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
    failures = carry_out("study small", cells[:2], room=Room(2), logs=tmp_path / "logs")
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
        carry_out("study small", cells, room=Room(2), logs=tmp_path / "logs")
    assert time.monotonic() - began < 30
    assert not (cells[2].plan.folder / "by").exists()


def test_signal_that_comes_before_a_run_has_its_own_handlers_is_not_lost(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(monkeypatch, lambda plan: time.sleep(60))
    monkeypatch.setattr(local, "end_with_parent", lambda number: time.sleep(1))
    with local._asked_to_stop():
        worker = local._start(cells[0], tmp_path, "", False)
        worker.process.terminate()
        worker.process.join(30)
    assert worker.process.exitcode == -signal.SIGTERM


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
        carry_out("study small", cells, room=Room(2), logs=tmp_path / "logs")
    assert signal.getsignal(signal.SIGTERM) is old
    for cell in cells[:2]:
        if (by := cell.plan.folder / "by").exists():
            with pytest.raises(ProcessLookupError):
                os.kill(int(by.read_text()), 0)


def test_a_run_that_was_killed_is_a_failure_of_its_own(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(plan: Plan) -> None:
        if plan is cells[0].plan:
            os.kill(os.getpid(), signal.SIGKILL)
        mark(plan)

    run_with(monkeypatch, execute)
    (failure,) = carry_out("study small", cells[:3], room=Room(2), logs=tmp_path / "logs")
    assert failure.startswith(f"{cells[0].plan.folder.name}: killed by SIGKILL. See ")
    assert all((cell.plan.folder / "by").exists() for cell in cells[1:3])


def test_a_run_waits_for_what_a_killed_call_has_left_of_it(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leftover of the first is about to end, and that of the second is not."""
    folders = [cell.plan.folder for cell in cells[:2]]
    run_with(monkeypatch, lambda plan: (plan.folder / "by").write_text(""))
    monkeypatch.setattr(local, "PATIENCE", 1.0)
    for folder in folders:
        folder.mkdir(parents=True)
    with locked(folders[1] / LOCK), ThreadPoolExecutor() as others:

        def leave() -> None:
            with locked(folders[0] / LOCK):
                time.sleep(0.5)

        others.submit(leave)
        time.sleep(0.1)
        (failure,) = carry_out("study small", cells[:2], room=Room(2), logs=tmp_path / "logs")
    assert failure.startswith(f"{folders[1].name}: another process is running")
    assert (folders[0] / "by").exists() and not (folders[1] / "by").exists()


def test_a_second_signal_is_passed_on_too(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first asks a run to save and end, the second to end at once."""
    sweep = os.getpid()

    def execute(plan: Plan) -> None:
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
        os.kill(sweep, signal.SIGINT)
        while len(told) < 2:
            if told:
                os.kill(sweep, signal.SIGINT)
            time.sleep(0.05)
        mark(plan)

    run_with(monkeypatch, execute)
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        carry_out("study small", cells[:2], room=Room(2), logs=tmp_path / "logs")
    assert all((cell.plan.folder / "by").exists() for cell in cells[:2])

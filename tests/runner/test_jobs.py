"""The runs of a sweep as a file: the same again is the same list, and another one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.runner.jobs import Job, command_of, folder_of, make_job, missing, write_list
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.studies.planning import Cell
from tests.study_cases import leave, planned, write_study


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return planned(write_study(tmp_path), tmp_path, seeds=("0", "1"))[2]


def job(output: Path, *words: str) -> Job:
    own = ["method=seqlora", "profile=quick", "engine=reference", f"output={output}", *words]
    return make_job(make_plan(parse(own)), own)


def test_finished_runs_are_not_made_again(cells: list[Cell]) -> None:
    leave(cells[0])
    leave(cells[1], status="interrupted")
    assert missing(cells) == cells[1:]


def test_every_folder_that_holds_something_else_is_told(cells: list[Cell]) -> None:
    for cell in cells[:2]:
        cell.plan.folder.mkdir(parents=True)
        (cell.plan.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"2 problems, nothing was started(.|\n)*occupied(.|\n)*occupied"):
        missing(cells)


def test_the_id_of_a_run_says_what_makes_it(tmp_path: Path) -> None:
    first = job(tmp_path, "seed=1")
    assert job(tmp_path, "seed=1", "rho=0.3").id == first.id, "without SAM a radius makes no other run"
    assert job(tmp_path, "engine=auto", "seed=1").id == first.id, "a method without a repository has one engine"
    others = [("seed=2",), ("seed=1", "sam=sam"), ("seed=1", "measure=trace")]
    assert len({first.id, *(job(tmp_path, *words).id for words in others), job(tmp_path / "b", "seed=1").id}) == 5


def test_the_command_of_a_run_says_what_auto_came_to(tmp_path: Path) -> None:
    """Another machine, with a GPU, would choose otherwise."""
    words = ["method=seqlora", "profile=auto", "device=cpu", f"output={tmp_path}/a b"]
    command = command_of(make_job(make_plan(parse(words)), words))
    assert command.endswith(
        f" -m flatpatch run method=seqlora device=cpu 'output={tmp_path}/a b' profile=quick engine=reference"
    )


def test_the_same_runs_are_the_same_sweep_in_whatever_order(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"seed={seed}") for seed in (0, 1)]
    assert folder_of(jobs) == folder_of(jobs[::-1]) != folder_of(jobs[:1])
    assert folder_of(jobs).parent == tmp_path / "sweeps"


def test_the_list_has_a_line_for_each_run_and_is_written_once(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"seed={seed}") for seed in (0, 1)]
    folder = folder_of(jobs)
    write_list(folder, jobs)
    path = folder / "jobs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"schema": 1, "id": each.id, "words": list(each.words), "folder": str(each.plan.folder)} for each in jobs
    ]
    before = path.stat()
    write_list(folder, jobs[::-1])
    assert path.stat() == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda text: text.replace('"schema": 1', '"schema": 2'),
            "is of version 2, and this flatpatch writes version 1",
        ),
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: text.splitlines()[0], "lists other runs than this sweep has"),
    ],
)
def test_another_list_is_refused_and_left_as_it_is(change, expected: str, tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"seed={seed}") for seed in (0, 1)]
    folder = folder_of(jobs)
    write_list(folder, jobs)
    path = folder / "jobs.jsonl"
    path.write_text(text := change(path.read_text()))
    with pytest.raises(UserError, match=f"{expected}.*Remove it and run the same command again"):
        write_list(folder, jobs)
    assert path.read_text() == text

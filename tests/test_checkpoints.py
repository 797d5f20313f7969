"""A checkpoint is whole or not used, and the one before it is kept for that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flatpatch.checkpoints import KEPT, MANIFEST, MOST_LOST, SHARE, Pace, newest_checkpoint, write_checkpoint

MADE_BY = {"method": "some", "rho": 0.05}


def write(place: Path, step: int, text: str = "weights", **made_by: Any) -> None:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights.bin").write_text(text * 100)
        (folder / "random.bin").write_text("random")

    write_checkpoint(place, step, fill, made_by={**MADE_BY, **made_by}, facts={"at": step})


def newest(place: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = newest_checkpoint(place, made_by=MADE_BY, tell=said.append)
    return (None if found is None else found.step), said


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    for step in (5, 10, 1000):
        write(tmp_path, step)
    found = newest_checkpoint(tmp_path, made_by=MADE_BY, tell=pytest.fail)
    assert found is not None
    assert (found.step, found.facts) == (1000, {"at": 1000})
    assert (found.folder / "inner" / "weights.bin").read_text() == "weights" * 100
    assert len(list(tmp_path.iterdir())) == KEPT


def alter(folder: Path) -> None:
    (folder / "inner" / "weights.bin").write_text("other")


def tear(folder: Path) -> None:
    path = folder / "inner" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder: Path) -> None:
    (folder / "random.bin").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def tear_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:-9])


def other_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[1]")


def later_schema(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (alter, "inner/weights.bin was altered"),
        (tear, "inner/weights.bin was altered"),
        (lose, "random.bin is missing"),
        (lose_manifest, "manifest.json is missing or damaged"),
        (tear_manifest, "manifest.json is missing or damaged"),
        (other_manifest, "manifest.json is missing or damaged"),
        (later_schema, "it has schema 2, expected 1"),
    ],
)
def test_spoilt_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, spoil: Any, said: str) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    spoil(tmp_path / "000000010")
    step, lines = newest(tmp_path)
    assert step == 5
    assert len(lines) == 1 and said in lines[0] and "000000010" in lines[0]
    spoil(tmp_path / "000000005")
    assert newest(tmp_path)[0] is None


def test_two_usable_ones_are_kept_and_no_leftover_stays(tmp_path: Path) -> None:
    for step in (5, 10):
        write(tmp_path, step)
    alter(tmp_path / "000000010")
    (tmp_path / ".000000007.x.tmp").mkdir()
    write(tmp_path, 8)  # it went on from 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000005", "000000008"]
    assert newest(tmp_path) == (8, [])


def test_disk_that_is_full_at_the_manifest_is_an_oserror_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flatpatch.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 10)
    assert newest(tmp_path) == (5, [])


def test_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, 5, rho=0.1)
    step, lines = newest(tmp_path)
    assert step is None
    assert "made by another training (different: rho)" in lines[0]


def test_checkpoint_that_fails_leaves_those_before_it(tmp_path: Path) -> None:
    write(tmp_path, 5)

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 10, fill, made_by=MADE_BY, facts={})
    assert [path.name for path in tmp_path.iterdir()] == ["000000005"]
    assert newest(tmp_path) == (5, [])


def test_same_step_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, 5, "one")
    write(tmp_path, 5, "two")
    assert newest(tmp_path) == (5, [])
    assert (tmp_path / "000000005" / "inner" / "weights.bin").read_text() == "two" * 100


WRITER = """
import itertools, sys
from pathlib import Path
from flatpatch.checkpoints import write_checkpoint
def fill(folder):
    for number in range(20):
        (folder / str(number)).write_bytes(bytes(20_000))
for step in itertools.count(1):
    write_checkpoint(Path(sys.argv[1]), step, fill, made_by={"rho": 1}, facts={})
    print(step, flush=True)
"""


def test_process_killed_at_any_moment_leaves_a_whole_one(tmp_path: Path) -> None:
    for wait in (0.0, 0.003, 0.007, 0.011, 0.02):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [int(writer.stdout.readline()) for _ in range(3)]
            time.sleep(wait)
            os.kill(writer.pid, signal.SIGKILL)
            told += [int(line) for line in writer.stdout.read().split()]
        found = newest_checkpoint(tmp_path, made_by={"rho": 1}, tell=pytest.fail)
        assert found is not None
        assert found.step >= told[-1]
        for path in tmp_path.glob("0*"):
            path.rename(tmp_path / f"old-{wait}-{path.name}")


def test_pace_counts_steps_or_seconds_and_what_a_checkpoint_costs() -> None:
    now = [0.0]
    by_steps = Pace(every_steps=3, clock=lambda: now[0])
    assert [by_steps.due(step) for step in (1, 2, 3)] == [False, False, True]
    by_steps.wrote(3, 100.0)
    assert [by_steps.due(step) for step in (5, 6)] == [False, True]
    by_seconds = Pace(every_seconds=10.0, clock=lambda: now[0])
    now[0] = 9.0
    assert not by_seconds.due(1)
    now[0] = 10.0
    assert by_seconds.due(1)
    by_itself = Pace(clock=lambda: now[0])
    now[0] += MOST_LOST
    assert by_itself.due(1)
    cost = 2 * MOST_LOST * SHARE
    by_itself.wrote(1, cost)
    now[0] += MOST_LOST
    assert not by_itself.due(2)
    now[0] += MOST_LOST
    assert by_itself.due(2)

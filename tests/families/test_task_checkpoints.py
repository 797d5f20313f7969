"""Checkpoints at the ends of tasks: what comes back, and what happens where one cannot be written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatpatch.families.resuming import set_random_state
from flatpatch.families.task_checkpoints import TaskCheckpoints


def description(folder: Path) -> dict[str, Any]:
    return {
        "metrics": str(folder / "metrics.jsonl"),
        "summary": str(folder / "summary.json"),
        "checkpoints": {
            "folder": str(folder / "checkpoints"),
            "every_seconds": None,
            "every_steps": None,
            "made_by": {"rho": 0.1},
            "stop": str(folder / "stop"),
        },
    }


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_state_files_and_random_numbers_come_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    (tmp_path / "metrics.jsonl").write_text("one\n")
    memory = tmp_path / "memory" / "0.pt"
    memory.parent.mkdir()
    memory.write_text("memory of the task")
    TaskCheckpoints(description(tmp_path)).write(1, {"weight": weight, "alias": [weight]}, [memory])
    then = draw()

    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write("of the task that was cut off\n")
    (tmp_path / "summary.json").write_text("{}")  # was not there, and is not touched
    memory.unlink()
    memory.parent.rmdir()
    state = TaskCheckpoints(description(tmp_path)).restore()
    assert state is not None
    assert torch.equal(state["weight"], weight) and state["alias"][0] is state["weight"]
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    assert memory.read_text() == "memory of the task"
    draw()
    set_random_state(state["random"])
    assert draw() == then


def test_writing_draws_no_random_numbers(tmp_path: Path) -> None:
    for place in (random.seed, np.random.seed, torch.manual_seed):
        place(5)
    undisturbed = draw()
    for place in (random.seed, np.random.seed, torch.manual_seed):
        place(5)
    TaskCheckpoints(description(tmp_path)).write(1, {})
    assert draw() == undisturbed


def test_nothing_is_kept_or_stopped_where_nothing_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    checkpoints = TaskCheckpoints(description(tmp_path) | {"checkpoints": None})
    checkpoints.write(1, {})
    assert checkpoints.restore() is None
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


def test_a_checkpoint_of_another_training_is_named_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TaskCheckpoints(description(tmp_path)).write(1, {})
    other = description(tmp_path)
    other["checkpoints"]["made_by"] = {"rho": 0.2}
    assert TaskCheckpoints(other).restore() is None
    assert "was made by another training (different: rho)" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("unexpected pos 128 vs 64")])
def test_a_checkpoint_that_cannot_be_written_is_said_and_the_one_before_stays(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = TaskCheckpoints(description(tmp_path))
    checkpoints.write(1, {"task": 1})

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    checkpoints.write(2, {"task": 2})
    assert f"FAILED to write the checkpoint after task 2: {error} (the training goes on)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    state = checkpoints.restore()
    assert state is not None and state["task"] == 1


def test_the_process_ends_with_85_after_the_checkpoint_where_it_is_asked_to_stop(tmp_path: Path) -> None:
    checkpoints = TaskCheckpoints(description(tmp_path))
    checkpoints.write(1, {})
    (tmp_path / "stop").touch()
    with pytest.raises(SystemExit) as ended:
        checkpoints.write(2, {"task": 2})
    assert ended.value.code == 85
    state = checkpoints.restore()
    assert state is not None and state["task"] == 2

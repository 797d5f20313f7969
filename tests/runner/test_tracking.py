"""What TensorBoard and the other trackers are given: a run's own numbers, once each."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from flatpatch.errors import UserError
from flatpatch.runner import execute, tracking
from flatpatch.runner.tracking import EVENTS, STEP, TASK, Tracking, check_tracker
from tests.report_records import make_quick_record


def events(folder: Path) -> list[Any]:
    """Return the events of a run's one event file, read by the format's own rules."""
    (path,) = (folder / EVENTS).iterdir()
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def write_steps(path: Path, losses: list[float], *, cut: str = "") -> None:
    rows = [{"task": "a", "step": number, "loss": loss, "grad_norm": None} for number, loss in enumerate(losses, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)


def test_steps_are_taken_as_they_are_written_and_counted_over_all_tasks(tmp_path: Path) -> None:
    record = make_quick_record()
    track = Tracking(tmp_path, record)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    track.follow(first)  # not there yet
    write_steps(first, [3.0], cut='{"task": "a", "st')
    track.follow(first)
    write_steps(first, [3.0, 2.0])
    track.follow(first)
    track.follow(first)
    write_steps(second, [1.5])
    track.follow(second)
    track.end()
    losses = {place: value for (name, place), value in scalars(tmp_path).items() if name == f"{STEP}/loss"}
    assert losses == {1: 3.0, 2: 2.0, 3: 1.5}
    assert not any("grad_norm" in name for name, _ in scalars(tmp_path))


def test_tasks_metrics_flatness_and_figures_are_there_at_the_end(tmp_path: Path) -> None:
    record = make_quick_record()
    record["flatness"] = [
        {"task_index": 1, "when": "after", "scope": "adapter", "values": {"top_eigenvalue": 4.5, "trace": None}},
    ]
    Image.new("RGB", (5, 3), "white").save(tmp_path / "matrix.png")
    track = Tracking(tmp_path, record)
    track.tasks()
    track.tasks()
    track.figures = [tmp_path / "matrix.png", tmp_path / "matrix.pdf"]
    track.end()
    found = scalars(tmp_path)
    for index, row in enumerate(record["accuracy_matrix"]):
        assert found[f"{TASK}/accuracy/{record['tasks'][index]}", index + 1] == pytest.approx(row[index], rel=1e-6)
        learned = row[: index + 1]
        mean = sum(learned) / len(learned)
        assert found[f"{TASK}/accuracy_over_learned_tasks", index + 1] == pytest.approx(mean, rel=1e-6)
    assert found[f"{TASK}/flatness/after/adapter/top_eigenvalue", 2] == 4.5
    last = len(record["tasks"])
    assert found[f"{TASK}/metrics/forgetting", last] == pytest.approx(record["metrics"]["forgetting"], rel=1e-6)
    pictures = [value for event in events(tmp_path) for value in event.summary.value if value.HasField("image")]
    assert [(value.tag, value.image.width, value.image.height) for value in pictures] == [("figures/matrix", 5, 3)]


@pytest.mark.parametrize("begun", [False, True])
def test_steps_of_an_earlier_process_are_not_taken_before_the_new_one_has_cut_them_off(
    begun: bool, tmp_path: Path
) -> None:
    """It cuts them off before it first writes its progress."""
    write_steps(tmp_path / "metrics.jsonl", [3.0, 2.0])
    if begun:
        state = {"phase": "train", "step": 2, "total": 9, "loss": 2.0}
        (tmp_path / "progress.json").write_text(json.dumps(state))
    sleep = [sys.executable, "-c", "import time; time.sleep(0.6)"]
    with Tracking(tmp_path, make_quick_record()) as track, subprocess.Popen(sleep) as process:
        execute._watch(process, "the title", tmp_path, execute._Stop(), {}, track)
    losses = [name for name, _ in scalars(tmp_path) if name == f"{STEP}/loss"]
    assert len(losses) == (2 if begun else 0)


def test_run_that_goes_on_begins_its_event_file_anew(tmp_path: Path) -> None:
    for _ in range(2):
        track = Tracking(tmp_path, make_quick_record())
        write_steps(tmp_path / "steps.jsonl", [3.0])
        track.follow(tmp_path / "steps.jsonl")
        track.end()
    assert len([name for name, _ in scalars(tmp_path) if name == f"{STEP}/loss"]) == 1


def test_full_disk_ends_the_event_file_and_neither_fails_nor_holds_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    track = Tracking(tmp_path, make_quick_record())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    write_steps(tmp_path / "steps.jsonl", [3.0] * 50)
    track.follow(tmp_path / "steps.jsonl")
    track.end()
    assert capsys.readouterr().out.count("WARNING: tensorboard takes no more of this run: OSError") == 1


def test_tracker_that_fails_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
            pass

        def scalars(self, *_: Any) -> None:
            raise ConnectionError("no way there")

        figure = end = scalars

    monkeypatch.setattr(tracking, "_MADE", {EVENTS: tracking.TensorBoard, "wandb": Failing})
    record = make_quick_record()
    track = Tracking(tmp_path, record, "wandb")
    track.tasks()
    track.end()
    said = capsys.readouterr().out
    assert said.count("WARNING: wandb takes no more of this run: ConnectionError: no way there") == 1
    assert scalars(tmp_path)


def test_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="track=wandb needs the package wandb: .venv/bin/python -m pip install wandb"):
        check_tracker("wandb")


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_other_trackers_take_a_whole_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip(name, reason=f"not installed: {name}")  # trackio reads its place when it is imported
    record = make_quick_record()
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (5, 3), "white").save(run / "matrix.png")
    track = Tracking(run, record, name)
    write_steps(run / "steps.jsonl", [3.0, 2.0])
    track.follow(run / "steps.jsonl")
    track.tasks()
    track.figures = [run / "matrix.png"]
    track.end()
    assert "WARNING" not in capsys.readouterr().out
    left = [path for place in ("run/wandb", "trackio", "mlruns") for path in (tmp_path / place).rglob("*")]
    assert any(path.is_file() and path.stat().st_size for path in left)

"""Whole runs of the image methods: what they leave, and that neither kill nor repetition changes it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.families.vision import planning
from flatpatch.families.vision.logs import read_log
from flatpatch.files import ROOT
from flatpatch.report.records import validate_record
from flatpatch.runner.record import new_record
from flatpatch.runner.resolve import make_plan, parse

pytestmark = pytest.mark.timeout(600)
NAMES = ["0-9", "10-19"]


def words(output: Path, run: str, *more: str) -> list[str]:
    tasks = ["upstream.init_cls=10", "upstream.increment=10", "upstream.batch_size=128"]
    return [
        "run",
        "method=inflora",
        "profile=quick",
        "engine=reference",
        "device=cpu",
        f"output={output}",
        f"run={run}",
        "sam=sam",
        "rho=0.05",
        *tasks,
        "upstream.epochs=2",
        *more,
    ]


def results(folder: Path) -> dict[str, Any]:
    """Return all that a run measured, without its times."""
    record = json.loads((folder / "record.json").read_text())
    validate_record(record)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        del step["seconds"]
    weights = {path.name: path.read_bytes() for path in sorted((folder / "work/logs").rglob("*.safetensors"))}
    kept = {key: record[key] for key in ("status", "accuracy_matrix", "metrics", "inputs", "tasks")}
    return {**kept, "steps": steps, "weights": weights}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(words(output, "undisturbed")) == 0
    return output / "undisturbed"


def test_run_leaves_a_valid_record_steps_and_figures(undisturbed: Path) -> None:
    record = json.loads((undisturbed / "record.json").read_text())
    validate_record(record)
    assert record["status"] == "finished"
    assert record["tasks"] == NAMES
    assert record["labels"] == ["quick", "reference", "off-protocol"]
    assert record["seeds"] == [0]
    assert "order" not in record["settings"]
    assert (
        hashlib.sha256((undisturbed / "record.json").read_bytes()).hexdigest()[:16]
        in (undisturbed / "report.html").read_text()
    )
    assert record["settings"]["sam_on"] == {"value": "both", "source": "default"}
    matrix = record["accuracy_matrix"]
    assert matrix[0][1] is None
    # 400 test images a task: an accuracy is a whole number of quarters of a percent.
    assert all(4 * matrix[i][j] == round(4 * matrix[i][j]) for i in range(2) for j in range(i + 1))
    curve = json.loads((undisturbed / "work/logs/results.json").read_text())["top1_curve"]
    assert record["metrics"]["averaged_accuracy_inflora"] == pytest.approx(sum(curve) / 2)
    assert record["metrics"]["sample_weighted_accuracy"] == curve[-1]
    noted = json.loads((undisturbed / "tasks/all/done.json").read_text())["files"]
    checkpoints = sorted((undisturbed / "work/logs/tasks").iterdir())
    assert [path.name for path in checkpoints] == ["0.safetensors", "1.safetensors"]
    for path in checkpoints:
        assert noted[str(path.relative_to(undisturbed))] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_mode == (undisturbed / "metrics.jsonl").stat().st_mode
    assert list(record["inputs"]) == ["model.safetensors"]
    steps = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [step["task"] for step in steps] == [NAMES[0]] * 14 + [NAMES[1]] * 14  # 2 epochs of 800 / 128 images
    for step in steps:
        assert step["perturbation_norm"] == pytest.approx(0.05, rel=1e-4)
        assert step["perturbed_loss"] > step["loss"]
    assert record["training"][0]["steps"] == 28
    # Scope lora is B of keys and values alone, 2 x 6 layers x 64 x 10; the classifier of 10 classes is not in it.
    assert record["training"][0]["perturbed_parameters"] == 7680
    assert record["training"][0]["trainable_parameters"] == 7680 + 10 * 64 + 10
    names = {path.name for path in (undisturbed / "figures").iterdir()}
    assert {"accuracy_matrix.png", "accuracy_over_tasks.png", "loss.png", "perturbation.png"} <= names


def test_same_command_on_a_finished_run_does_nothing(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (undisturbed / "record.json").stat().st_mtime_ns
    assert main(words(undisturbed.parent, "undisturbed")) == 0
    shown = capsys.readouterr().out
    assert "is finished; nothing to do" in shown
    assert "final accuracy (all test images; the papers' A_T)" in shown
    assert (undisturbed / "record.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(undisturbed: Path, tmp_path: Path) -> None:
    assert main(words(tmp_path, "measured", "measure=eigenvalues", "measure_samples=6", "measure_batch=4")) == 0
    assert results(tmp_path / "measured") == results(undisturbed)
    flatness = json.loads((tmp_path / "measured/record.json").read_text())["flatness"]
    times = [(entry["task_index"], entry["when"], entry["scope"]) for entry in flatness]
    assert times == [
        (i, when, scope) for i in (0, 1) for when in ("before", "after") for scope in ("adapter", "merged")
    ]
    for entry in flatness:
        assert entry["samples"] == 6
        assert entry["values"]["top_eigenvalue"] is not None


def started(folder: Path, task: str) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        progress = json.loads((folder / "tasks/all/progress.json").read_text())
        return bool(progress["task"] == task and progress["step"] >= 1)
    return False


def kill_during(command: list[str], condition: Callable[[], bool], later: float = 0.0) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flatpatch", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_run_killed_in_its_second_task_goes_on_after_the_first(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(tmp_path, "killed")
    folder = tmp_path / "killed"
    kill_during(command, lambda: started(folder, NAMES[1]), 0.3)
    assert json.loads((folder / "record.json").read_text())["status"] == "running"
    assert main(command) == 0
    assert "tasks 1-2: goes on after task 1" in capsys.readouterr().out
    assert results(folder) == results(undisturbed)
    record = json.loads((folder / "record.json").read_text())
    assert [(row["tasks_kept"], row["after_step"]) for row in record["resumed"]] == [(1, 0)]
    assert not (folder / "tasks/all/checkpoints").exists()


@pytest.mark.slow
def test_run_killed_in_its_first_task_starts_anew_and_says_so(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(tmp_path, "killed")
    folder = tmp_path / "killed"
    kill_during(command, lambda: started(folder, NAMES[0]))
    (folder / "work/logs").mkdir(exist_ok=True)
    (folder / "work/logs/left.log").write_text("of the first attempt")
    assert main(command) == 0
    assert "it has kept no checkpoint: the run starts anew" in capsys.readouterr().out
    assert results(folder) == results(undisturbed)
    assert not (folder / "work/logs/left.log").exists()
    assert json.loads((folder / "record.json").read_text())["restarts"] == 1


@pytest.mark.slow
def test_stopped_run_says_that_it_starts_over(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    command = [sys.executable, "-m", "flatpatch", *words(tmp_path, "stopped")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not started(folder, NAMES[0]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 85
    assert "stopped by SIGTERM" in said and "kept no checkpoint: the same command starts the run anew" in said
    assert "continues" not in said


def test_new_record_is_valid_before_anything_ran(tmp_path: Path) -> None:
    request = parse([word for word in words(tmp_path, "planned") if word != "run"])
    record = new_record(make_plan(request))
    validate_record(record)
    assert record["accuracy_matrix"] == [[None, None], [None, None]]
    assert not (tmp_path / "planned").exists()


def test_other_seed_in_the_same_folder_is_refused(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(undisturbed.parent, "undisturbed", "seed=1")) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.usefixtures("warm_image_runs")
def test_overrides_reach_the_authors_code_and_its_log_becomes_the_record(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("InfLoRA")
    more = ("engine=upstream", "upstream.init_epoch=2", "upstream.lamb=0.9", "upstream.rank=3", "seed=4")
    assert main(words(tmp_path, "real", *more)) == 0
    record = json.loads((tmp_path / "real/record.json").read_text())
    validate_record(record)
    assert (record["status"], record["tasks"], record["seeds"]) == ("finished", NAMES, [4])
    [log] = (tmp_path / "real/work/logs").rglob("*.log")
    [run] = read_log(log)
    # What upstream itself printed as its settings: the overrides, and the shipped file for everything else.
    shipped = json.loads((upstream("InfLoRA") / "configs/cifar100_inflora.json").read_text())
    assert (run.settings["lamb"], run.settings["rank"], run.settings["epochs"], run.settings["seed"]) == (
        "0.9",
        "3",
        "2",
        "4",
    )
    for key in ("EPSILON", "lame", "net_type", "optim", "weight_decay", "memory_size"):
        assert run.settings[key] == str(shipped[key])
    assert record["accuracy_matrix"] == run.accuracy_matrix()
    assert record["metrics"]["sample_weighted_accuracy"] == run.top1_curve[-1]
    assert len(record["timing"]["train_seconds"]) == len(record["timing"]["predict_seconds"]) == 2
    changed = {row["what"]: (row["upstream"], row["here"]) for row in record["deviations"]}
    assert changed["lamb"] == ("0.95", "0.9")
    assert changed["total_sessions"] == ("10", "2")
    steps = [json.loads(line) for line in (tmp_path / "real/metrics.jsonl").read_text().splitlines()]
    assert [step["task"] for step in steps] == [NAMES[0]] * 14 + [NAMES[1]] * 14
    assert all(step["perturbed_loss"] > step["loss"] for step in steps)
    assert record["upstream"]["pin"] == "e08b00edd54f2f10cf2f9826eae7d44fdcb6354b"


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.usefixtures("warm_image_runs")
def test_model_that_could_not_be_kept_is_told(
    upstream: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream("InfLoRA")
    monkeypatch.setattr(planning, "MODELS", "log.txt")  # a file where the folder should be
    assert main(words(tmp_path, "lost", "engine=upstream", "upstream.init_epoch=2")) == 0
    record = json.loads((tmp_path / "lost/record.json").read_text())
    notes = [note for note in record["notes"] if "was not kept" in note]
    assert [note.split(" was not")[0] for note in notes] == [f"the model after task {n + 1} {NAMES[n]}" for n in (0, 1)]
    said = capsys.readouterr().out
    assert all(f"WARNING: {note}" in said and "tasks/all/log.txt" in note for note in notes)
    assert main(["measure", f"run={tmp_path / 'lost'}"]) == 2
    text = capsys.readouterr().err
    assert "kept no model of task 1. " in text  # InfLoRA: the model after task 2 has the adapters of both
    assert "log.txt says: flatpatch: FAILED to keep the model after task 1: [Errno 17] File exists" in text


@pytest.mark.third_party
@pytest.mark.slow
def test_killed_run_of_the_authors_code_ends_as_an_undisturbed_one(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("CL-LoRA")

    def command(run: str) -> list[str]:
        given = ["method=cllora", "profile=quick", "engine=upstream", "device=cpu", "sam=sam", "sam_on=task"]
        tasks = ["upstream.init_cls=10", "upstream.increment=10", "upstream.batch_size=128"]
        epochs = ["upstream.init_epochs=1"]
        return ["run", *given, *tasks, *epochs, f"output={tmp_path}", f"run={run}"]

    assert main(command("undisturbed")) == 0
    steps = tmp_path / "killed/tasks/all/metrics.jsonl"
    kill_during(command("killed"), lambda: steps.is_file() and NAMES[1] in steps.read_text())
    assert main(command("killed")) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    record = json.loads((tmp_path / "killed/record.json").read_text())
    assert record["restarts"] == 1
    assert [row["tasks_kept"] for row in record["resumed"]] == [1]
    losses = [step["loss_name"] for step in results(tmp_path / "killed")["steps"]]
    # One step a batch in the first task, two in the second; seven batches each.
    assert losses == ["task"] * 7 + ["distillation", "task"] * 7
    perturbed = [step["loss_name"] for step in results(tmp_path / "killed")["steps"] if step["perturbation_norm"]]
    assert set(perturbed) == {"task"}

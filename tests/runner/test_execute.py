"""Whole runs with the reference engine: what they leave, and that neither kill nor repetition changes it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.__main__ import main
from flatpatch.errors import FlatpatchError
from flatpatch.families.text import quick
from flatpatch.files import ROOT
from flatpatch.report.records import validate_record
from flatpatch.runner import execute
from flatpatch.runner.record import check_continues, new_record, write_record
from flatpatch.runner.resolve import make_plan, parse
from tests.text_benchmark import small_benchmark
from tests.warm import TEXT, runs_by

pytestmark = pytest.mark.timeout(300)
TASKS = ("dbpedia", "amazon")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_benchmark(tmp_path_factory.mktemp("benchmark") / "data")


def words(data: Path, output: Path, run: str, *more: str) -> list[str]:
    return [
        "run",
        "profile=quick",
        "engine=reference",
        "device=cpu",
        f"tasks={','.join(TASKS)}",
        f"data={data}",
        f"output={output}",
        f"run={run}",
        "upstream.num_train_epochs=1",
        "upstream.per_device_train_batch_size=8",
        "sam=sam",
        "rho=0.05",
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flatpatch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_training(folder: Path, task: str) -> Callable[[], bool]:
    def check() -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            progress = next((folder / "tasks").glob(f"*-{task}/progress.json"))
            return bool(json.loads(progress.read_text())["step"] >= 1)
        return False

    def safe() -> bool:
        try:
            return check()
        except StopIteration:
            return False

    return safe


def assert_nothing_runs_on(folder: Path, seconds: float = 30) -> None:
    """Each process of a run has the path of its settings in its environment."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"FLATPATCH_RUN={folder}/".encode() in (entry / "environ").read_bytes():
                    left.append(entry.name)
        if not left:
            return
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


def results(folder: Path) -> dict[str, Any]:
    """Return all that a run measured, without its times."""
    record = json.loads((folder / "record.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        del step["seconds"]
    adapters = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "work").rglob("adapter/*"))
        if path.suffix in (".safetensors", ".bin", ".pt")
    }
    assert adapters
    return {
        "status": record["status"],
        "matrix": record["accuracy_matrix"],
        "metrics": record["metrics"],
        "steps": steps,
        "adapters": adapters,
    }


def assert_page_tells_of(page: Path, *folders: Path) -> None:
    """The page names each run's record by its hash, so one drawn earlier would not do."""
    text = page.read_text().replace("<wbr>", "")  # where a long name may go on in the next line
    for folder in folders:
        assert hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()[:16] in text
        assert folder.name in text


@pytest.fixture(scope="module")
def undisturbed(data: Path, warm: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("runs")
    with runs_by(warm(TEXT)):
        assert main(words(data, output, "undisturbed")) == 0
    yield output / "undisturbed"


def test_run_leaves_a_valid_record_steps_and_figures(undisturbed: Path) -> None:
    record = json.loads((undisturbed / "record.json").read_text())
    validate_record(record)
    assert record["status"] == "finished"
    assert record["tasks"] == list(TASKS)
    assert record["labels"] == ["quick", "reference", "off-protocol"]
    assert record["settings"]["rho"] == {"value": 0.05, "source": "command line"}
    assert record["restarts"] == 0
    matrix = record["accuracy_matrix"]
    assert matrix[0][1] is None
    assert all(0 <= matrix[i][j] <= 100 for i in range(2) for j in range(i + 1))
    steps = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [step["task"] for step in steps] == ["dbpedia"] * 6 + ["amazon"] * 6
    for step in steps:
        assert step["perturbation_norm"] == pytest.approx(0.05, rel=1e-4)
        assert step["perturbed_loss"] > step["loss"]
    names = {path.name for path in (undisturbed / "figures").iterdir()}
    assert {"accuracy_matrix.png", "accuracy_over_tasks.png", "loss.png", "perturbation.png"} <= names
    assert_page_tells_of(undisturbed / "report.html", undisturbed)


def test_same_command_on_a_finished_run_does_nothing(
    undisturbed: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "record.json").stat().st_mtime_ns
    assert main(words(data, undisturbed.parent, "undisturbed")) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert (undisturbed / "record.json").stat().st_mtime_ns == before


def test_page_that_cannot_be_drawn_is_one_warning_and_no_failure(
    undisturbed: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    page = undisturbed / "report.html"
    before = page.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr("flatpatch.runner.pages.make_page", fail)
        assert main(words(data, undisturbed.parent, "undisturbed")) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err  # how far the page is may stand there where the machine is slow
    (warning,) = [line for line in shown.out.splitlines() if "WARNING" in line]
    assert f"{page} was not written" in warning
    assert "No space left on device" in warning
    assert f"python -m flatpatch report run={undisturbed}" in warning
    assert page.read_bytes() == before

    page.write_text("of an earlier time")
    assert main(words(data, undisturbed.parent, "undisturbed")) == 0
    assert page.read_bytes() == before


@pytest.mark.parametrize("part", ["draw_run", "draw_flatness", "read_step_metrics"])
def test_figures_that_cannot_be_drawn_are_one_warning_and_no_failure(
    part: str, undisturbed: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[Path]:
        raise PermissionError(13, "Permission denied")

    page = undisturbed / "report.html"
    page.write_text("of an earlier time")
    monkeypatch.setattr(f"flatpatch.runner.figures.{part}", fail)
    assert main(words(data, undisturbed.parent, "undisturbed")) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err  # how far the page is may stand there where the machine is slow
    (warning,) = [line for line in shown.out.splitlines() if "WARNING" in line]
    assert f"not every figure in {undisturbed / 'figures'} was drawn, the run is whole" in warning
    assert "Permission denied" in warning
    assert f"python -m flatpatch report run={undisturbed}" in warning
    assert f"record   {undisturbed / 'record.json'}" in shown.out
    assert_page_tells_of(page, undisturbed)

    page.write_text("of an earlier time")
    assert main(["report", f"run={undisturbed}"]) == 0
    assert capsys.readouterr().out.count("WARNING") == 1
    assert_page_tells_of(page, undisturbed)


def test_finished_run_is_the_one_asked_for_whatever_has_no_effect(
    undisturbed: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(undisturbed)
    command = [word for word in words(data, undisturbed.parent, "undisturbed") if word != "profile=quick"]
    more = ["profile=auto"] if not torch.cuda.is_available() else ["profile=quick"]
    assert (
        main(
            [
                *command,
                *more,
                "eta=0.5",
                "scope=lora",
                "measure_rho=0.1",
                "measure_scope=model",
                "upstream.per_device_eval_batch_size=512",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "nothing to do" in shown
    assert results(undisturbed) == before
    assert main([*command, *more, "ascent_loss=task"]) == 2, "what has an effect makes another run"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_run_ends_as_an_undisturbed_one(task: str, undisturbed: Path, data: Path, tmp_path: Path) -> None:
    command = words(data, tmp_path, "killed")
    process = start(command)
    wait_until(in_training(tmp_path / "killed", task), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert json.loads((tmp_path / "killed" / "record.json").read_text())["status"] == "running"
    assert_nothing_runs_on(tmp_path / "killed")
    again = start(command)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    page = tmp_path / "killed" / "report.html"
    assert output.rstrip().endswith(f"page     {page}")
    assert_page_tells_of(page, page.parent)
    assert results(tmp_path / "killed") == results(undisturbed)
    assert json.loads((tmp_path / "killed" / "record.json").read_text())["restarts"] == 1
    assert ("finished before, kept" in output) == (task == "amazon")


def test_training_ends_within_seconds_of_a_killed_runner(data: Path, tmp_path: Path) -> None:
    process = start(words(data, tmp_path, "killed", "tasks=dbpedia", "upstream.num_train_epochs=5000"))
    wait_until(in_training(tmp_path / "killed", "dbpedia"), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert_nothing_runs_on(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_terminated_run_says_it_can_go_on(
    number: signal.Signals, undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    command = words(data, tmp_path, "stopped")
    process = start(command)
    wait_until(in_training(tmp_path / "stopped", "amazon"), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 85
    assert f"stopped by {number.name}" in output
    assert_nothing_runs_on(tmp_path / "stopped")
    assert "The same command continues the run" in output
    record = json.loads((tmp_path / "stopped" / "record.json").read_text())
    validate_record(record)
    assert record["status"] == "interrupted"
    assert record["accuracy_matrix"][0][0] is not None
    assert main(command) == 0
    assert results(tmp_path / "stopped") == results(undisturbed)


@pytest.mark.slow
def test_record_tells_the_threads_that_each_task_was_trained_with(
    undisturbed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(words(data, tmp_path, "two", "threads=2", "tasks=dbpedia")) == 0
    (trained,) = json.loads((tmp_path / "two" / "record.json").read_text())["training"]
    assert trained["threads"] == 2
    assert [row["threads"] for row in json.loads((undisturbed / "record.json").read_text())["training"]] == [1, 1]


def begun_elsewhere(undisturbed: Path, folder: Path, **machine: object) -> Path:
    """Copy a run as if it had been stopped in its second task on another machine."""
    shutil.copytree(undisturbed, folder, symlinks=True)
    (folder / "tasks" / "2-amazon" / "done.json").unlink()
    record = json.loads((folder / "record.json").read_text())
    record["status"] = "interrupted"
    record["environment"] |= machine
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_run_resumed_on_another_machine_says_and_records_it(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun_elsewhere(undisturbed, tmp_path / "undisturbed", processor="another", threads=9)
    assert main(words(data, tmp_path, "undisturbed")) == 0
    said = capsys.readouterr().out
    assert "WARNING: since task 2 the run is on another machine or set-up: processor" in said
    record = json.loads((folder / "record.json").read_text())
    validate_record(record)
    (resumed,) = record["resumed"]
    assert resumed["tasks_kept"] == 1
    assert resumed["machine_changed"] == {
        "processor": ["another", record["environment"]["processor"]],
        "threads": [9, 1],
    }
    assert any("(before: another), threads 1 (before: 9)" in note for note in record["notes"])


def test_run_is_not_continued_with_another_number_of_threads(
    undisturbed: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, undisturbed.parent, "undisturbed", "threads=2")) == 2
    assert "threads is 0 there and 2 here" in capsys.readouterr().err


@pytest.mark.slow
def test_same_settings_give_the_same_numbers_in_another_folder(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    assert main(words(data, tmp_path, "repeated")) == 0
    assert results(tmp_path / "repeated") == results(undisturbed)


@pytest.mark.slow
def test_damaged_weights_of_a_finished_task_are_made_again(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    command = words(data, tmp_path, "damaged")
    process = start(command)
    wait_until(in_training(tmp_path / "damaged", "amazon"), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    weights = next(path for path in (tmp_path / "damaged" / "work").rglob("1-dbpedia/adapter/*") if path.is_file())
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(command) == 0
    assert results(tmp_path / "damaged") == results(undisturbed)


def test_memory_that_deepspeed_leaves_is_freed_for_this_user_and_port_alone(tmp_path: Path) -> None:
    """Named as DeepSpeed 0.15's csrc/cpu/comm/shm.cpp does: user, address, port, rank."""
    own = [f"{os.getuid()}_127.0.0.1_29517_0", f"{os.getuid()}_10.0.0.1_29517_1"]
    others = [f"{os.getuid()}_127.0.0.1_29518_0", f"{os.getuid() + 1}_127.0.0.1_29517_0"]
    for name in own + others:
        (tmp_path / f"deepspeed_allreduce_buffer_{name}").touch()
    (tmp_path / f"deepspeed_allreduce_buffer_{own[0]}").chmod(0o400)
    execute._free_shared_memory(29517, tmp_path)
    assert sorted(path.name.removeprefix("deepspeed_allreduce_buffer_") for path in tmp_path.iterdir()) == others
    execute._free_shared_memory(29517, tmp_path / "missing")  # there is none on a Mac


def test_second_runner_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(data, tmp_path, "shared")
    process = start(command)
    try:
        wait_until((tmp_path / "shared" / "record.json").is_file, process)
        assert main(command) == 2
        assert "another process is running" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.mark.slow
def test_half_written_results_of_a_later_task_do_not_block_the_run(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    command = words(data, tmp_path, "torn")
    process = start(command)
    wait_until(in_training(tmp_path / "torn", "amazon"), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    output = next((tmp_path / "torn" / "work").rglob("1-dbpedia/all_results.json")).parent.parent / "2-amazon"
    output.mkdir(exist_ok=True)
    (output / "all_results.json").write_text('{"predict_exact')
    assert main(command) == 0
    assert results(tmp_path / "torn") == results(undisturbed)


def test_run_made_with_other_libraries_is_not_continued(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "undisturbed"
    copy.mkdir()
    record = json.loads((undisturbed / "record.json").read_text())
    record["environment"]["libraries"]["torch"] = "1.0"
    (copy / "record.json").write_text(json.dumps(record))
    assert main(words(data, tmp_path, "undisturbed")) == 2
    assert "libraries is " in capsys.readouterr().err


@pytest.mark.slow
def test_disk_that_fills_up_in_training_leaves_a_resumable_run_and_a_record_that_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from pathlib import Path; Path('/dev/full').write_text('x')"
    with monkeypatch.context() as full:
        full.setattr(execute, "command_of", lambda *_: [sys.executable, "-c", code])
        assert main(words(data, tmp_path, "full", "tasks=dbpedia")) == 85
    said = capsys.readouterr().err
    assert "flatpatch: the disk is full: task 1/1 dbpedia failed" in said
    assert f"Free are: {tmp_path / 'full'} " in said
    assert "The same command continues the run" in said
    record = json.loads((tmp_path / "full" / "record.json").read_text())
    validate_record(record)
    assert record["status"] == "interrupted"
    assert "the disk is full" in record["error"]
    assert not (tmp_path / "full" / ".room").exists()
    assert main(words(data, tmp_path, "full", "tasks=dbpedia")) == 0
    record = json.loads((tmp_path / "full" / "record.json").read_text())
    assert (record["status"], record["restarts"], "error" in record) == ("finished", 1, False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_record_is_written_in_the_room_that_was_kept_for_it(
    number: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = []

    def fail(*_: object) -> None:
        full.append(True)
        raise OSError(number, os.strerror(number), "somewhere")

    def sync(_: int) -> None:
        if full and (tmp_path / "full" / ".room").exists():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(execute, "_run_stage", fail)
    monkeypatch.setattr(os, "fsync", sync)
    assert main(words(data, tmp_path, "full")) == 85
    assert f"the disk is full: [Errno {number}]" in capsys.readouterr().err
    record = json.loads((tmp_path / "full" / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert "'somewhere'" in record["error"]


def test_record_that_cannot_be_written_any_more_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        def sync(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", sync)
        raise FlatpatchError("the task failed")

    monkeypatch.setattr(execute, "_run_stage", fail)
    assert main(words(data, tmp_path, "full")) == 85
    said = capsys.readouterr().err
    assert "the task failed" in said
    assert f"{tmp_path / 'full' / 'record.json'} could not be written" in said
    assert json.loads((tmp_path / "full" / "record.json").read_text())["status"] == "running"


def test_sweep_stops_where_the_disk_is_full(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(execute, "_run_stage", fail)
    command = [word for word in words(data, tmp_path, "x")[1:] if not word.startswith(("run=", "tasks="))]
    assert main(["sweep", *command, "tasks=dbpedia", "seed=0,1", "parallel=1"]) == 85
    assert len(list(tmp_path.glob("*/record.json"))) == 1


def test_run_begun_at_another_commit_is_refused_with_the_commit_to_check_out(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun_elsewhere(undisturbed, tmp_path / "undisturbed")
    record = json.loads((folder / "record.json").read_text())
    assert set(record["environment"]["flatpatch"]) == {"version", "commit", "code"}
    record["environment"]["flatpatch"]["commit"] = "c" * 40
    (folder / "record.json").write_text(json.dumps(record))
    before = sorted(folder.rglob("*"))
    assert main(words(data, tmp_path, "undisturbed")) == 2
    said = capsys.readouterr().err
    assert f"git -C {ROOT} checkout {'c' * 40}; then the same command" in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("warm_text_runs")
def test_failed_task_shows_the_end_of_its_log(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "t5-broken"
    model.mkdir()
    for path in quick.MODEL_FOLDER.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(words(data, tmp_path, "failing", f"model={model}")) == 1
    said = capsys.readouterr().err
    assert "task 1/2 dbpedia failed with exit code" in said
    assert "  | " in said
    assert "safetensors" in said.lower()  # the cause
    assert "finished tasks are kept" in said
    record = json.loads((tmp_path / "failing" / "record.json").read_text())
    validate_record(record)
    assert record["status"] == "failed"
    assert "dbpedia" in record["error"]


@pytest.mark.usefixtures("warm_text_runs")
def test_a_stage_whose_results_cannot_be_read_is_not_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise FlatpatchError("holds 2 logs")

    monkeypatch.setattr("flatpatch.families.text.results.collect", unreadable)
    assert main(words(data, tmp_path, "two-logs", "tasks=amazon")) == 1
    assert not list((tmp_path / "two-logs").rglob("done.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("warm_text_runs")
def test_sweep_runs_every_combination_and_averages_over_seeds(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [word for word in words(data, tmp_path, "x") if not word.startswith(("run", "tasks="))]
    assert main(["sweep", *command, "tasks=dbpedia", "seed=0..1", "parallel=2"]) == 0
    shown = capsys.readouterr().out
    assert "sweep: run 2 of 2: " in shown
    assert " ±" in shown
    folders = [path.parent for path in tmp_path.glob("*/record.json")]
    assert len(folders) == 2
    assert shown.rstrip().endswith(f"page     {tmp_path / 'report.html'}")
    assert_page_tells_of(tmp_path / "report.html", *folders)
    assert not list(tmp_path.glob("*/report.html"))


@pytest.mark.slow
@pytest.mark.usefixtures("warm_text_runs")
def test_sweep_goes_on_where_the_figures_of_a_run_cannot_be_drawn(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flatpatch.runner.figures.draw_run", fail)
    command = [word for word in words(data, tmp_path, "x")[1:] if not word.startswith(("run=", "tasks="))]
    assert main(["sweep", *command, "tasks=dbpedia", "seed=0,1", "parallel=1"]) == 0
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")]
    assert [record["status"] for record in records] == ["finished", "finished"]
    shown = capsys.readouterr().out
    assert shown.count("WARNING: not every figure") == 2
    assert "failed" not in shown


def test_sweep_runs_once_without_sam_whatever_the_radius(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["profile=quick", "engine=reference", f"output={tmp_path}", "sam=off,sam", "rho=0.01,0.05", "--dry-run"]
    assert main(["sweep", *words]) == 0
    assert capsys.readouterr().out.count("N-LoRA, order 1") == 3
    assert main(["sweep", *words, "rho=0.05", "scope=lora,A", "sync=local,global", "eta=0.01,1"]) == 0
    shown = capsys.readouterr().out
    assert "note: rho= is given more than once (0.01,0.05, 0.05): rho=0.05 holds\n" in shown
    assert "note: rho=0.05 has no effect where sam=off. Add sam=sam.\n" in shown
    assert shown.count("N-LoRA, order 1") == 3, "one without SAM, two with it: eta is ASAM's, one process has no sync"


def test_sweep_of_settings_without_effect_says_which(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["profile=quick", "engine=reference", f"output={tmp_path}", "rho=0.01,0.05", "--dry-run"]
    assert main(["sweep", *words]) == 0
    expected = "2 combinations\nnote: rho=0.01,0.05 has no effect where sam=off. Add sam=sam.\n1 run\n\n"
    assert capsys.readouterr().out.startswith(expected)


def test_sweep_runs_once_what_comes_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    monkeypatch.setattr("flatpatch.patches.is_available", lambda _: (False, "nothing there"))
    words = ["sweep", "method=nlora", f"output={tmp_path}", "--dry-run"]
    assert main([*words, "sam=off", "profile=auto,quick", "engine=reference"]) == 0
    assert capsys.readouterr().out.count("N-LoRA, order 1") == 1
    assert main([*words, "sam=off,sam", "profile=auto,quick", "engine=auto,reference", "rho=0.1,0.2"]) == 0
    assert capsys.readouterr().out.count("N-LoRA, order 1") == 3
    assert main([*words, "run=one", "profile=auto,quick", "engine=reference"]) == 0
    assert capsys.readouterr().out.count("N-LoRA, order 1") == 1
    assert main([*words, "profile=quick", "engine=reference", "measure=all", "measure_samples=8,16"]) == 2
    assert "two runs of this sweep would use" in capsys.readouterr().err


def test_same_run_continues_whatever_led_to_its_engine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.patches.is_available", lambda _: (False, "nothing there"))
    plain = [word for word in words(data, tmp_path, "planned")[1:] if not word.startswith("engine=")]
    auto = make_plan(parse([*plain, "engine=auto"]))
    auto.folder.mkdir()
    write_record(auto.folder, new_record(auto))
    named = make_plan(parse([*plain, "engine=reference"]))
    assert check_continues(named.folder, named) is not None


def test_new_record_is_valid_before_anything_ran(data: Path, tmp_path: Path) -> None:
    request = parse(words(data, tmp_path, "planned")[1:])
    validate_record(new_record(make_plan(request)))
    assert not (tmp_path / "planned").exists()


def test_report_draws_a_finished_run_again(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (undisturbed / "figures" / "loss.png").unlink()
    assert main(["report", f"run={undisturbed}"]) == 0
    assert (undisturbed / "figures" / "loss.png").is_file()
    assert "accuracy in percent" in capsys.readouterr().out

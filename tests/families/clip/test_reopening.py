"""Whole CLIP runs from the command line, and their models rebuilt afterwards: measured, compared, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.report.records import read_record
from flatpatch.runner.measure import find_run
from tests.clip_cases import make_clip

SMALL = (
    *("profile=quick", "device=cpu", "upstream.datasets=shapes,colours", "upstream.iterations=4", "upstream.warmup=1"),
    *("upstream.batch_size=4", "upstream.rank=2", "upstream.learning_rate=0.1"),
)
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # three whole runs, each with its figures and page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that runs once what its words say, on a tiny model, and gives the run's folder."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_clip(folder / "model")

    def make(name: str, *words: str) -> Path:
        if not (folder / name).exists():
            assert main(["run", *SMALL, f"model={model}", f"output={folder}", f"run={name}", *words, "--quiet"]) == 0
        return folder / name

    return make


def test_run_ends_with_record_figures_page_and_a_full_matrix(made: Callable[..., Path]) -> None:
    folder = made("sequential", "method=seqlora_clip", "sam=sam", "rho=0.05")
    record = read_record(folder)
    assert (record["status"], record["family"], record["method"]) == ("finished", "clip", "seqlora_clip")
    matrix = np.array(record["accuracy_matrix"], dtype=float)
    assert matrix.shape == (2, 2) and not np.isnan(matrix).any()
    assert len(record["accuracy_before_training"]) == 2
    assert record["metrics"]["transfer"] == pytest.approx(matrix[0, 1])
    assert record["metrics"]["average"] == pytest.approx(matrix.mean())
    assert record["metrics"]["last"] == pytest.approx(matrix[1].mean())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(step["task"], step["step"]) for step in steps] == [
        (task, step) for task in ("shapes", "colours") for step in (1, 2, 3, 4)
    ]
    assert all(step["effective_perturbation_norm"] == pytest.approx(0.05, rel=1e-4) for step in steps)
    assert (folder / "report.html").is_file() and list((folder / "figures").glob("accuracy_matrix.*"))


@pytest.mark.parametrize("method", ["seqlora_clip", "inflora_clip"])
def test_finished_run_is_measured_with_the_loss_it_had_inside(method: str, made: Callable[..., Path]) -> None:
    name = "off" if method == "seqlora_clip" else method
    folder = made(name, f"method={method}", "sam=off", "measure=loss")
    inside = {e["task_index"]: e["loss"] for e in read_record(folder)["flatness"] if e["when"] == "after"}
    words = ("measure_scope=adapter,merged", "measure=loss,eigenvalues")
    assert main(["measure", f"run={folder}", "task=colours", *words, "--quiet"]) == 0
    found = [e for e in read_record(folder)["flatness"] if e["when"] == "finished"]
    assert {e["scope"] for e in found} == {"adapter", "merged"}
    assert all(e["loss"] == pytest.approx(inside[1], rel=1e-5) for e in found)
    assert all(e["values"]["top_eigenvalue"] is not None for e in found)
    run = find_run(str(folder))
    sample = run.draw_sample(0, measure_request())
    assert sample.size == 16
    from flatpatch.flatness import Problem

    assert Problem(run.rebuild(0), sample.batches, run.loss, scope="adapter").loss() == pytest.approx(
        inside[0], rel=1e-5
    )


def measure_request() -> Any:
    from flatpatch.measuring import make_request

    return make_request("loss", "adapter", samples=16, batch=8, rho=0.05, effort="brief")


def test_runs_that_differ_in_their_training_have_a_line_between_them(made: Callable[..., Path], tmp_path: Path) -> None:
    off, sam = (
        made("off", "method=seqlora_clip", "sam=off", "measure=loss"),
        made("sequential", "method=seqlora_clip", "sam=sam", "rho=0.05"),
    )
    words = ("measure=loss", "measure_scope=adapter", "measure_samples=16", f"output={tmp_path / 'both'}")
    assert main(["measure", f"run={off},{sam}", *words, "--quiet"]) == 0
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert found["task"] == "colours" and "barrier" in found["scopes"]["adapter"]


def test_runs_of_other_methods_or_shapes_are_refused(made: Callable[..., Path]) -> None:
    off = find_run(str(made("off", "method=seqlora_clip", "sam=off", "measure=loss")))
    other = find_run(str(made("inflora_clip", "method=inflora_clip", "sam=off", "measure=loss")))
    with pytest.raises(UserError, match=r"between which nothing lies: design is sequential and inflora"):
        off.check_companion(other)


def test_run_whose_model_is_another_now_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("off", "method=seqlora_clip", "sam=off", "measure=loss")
    link = folder / "work" / "model"
    target = link.resolve()
    link.unlink()
    try:
        link.symlink_to(make_clip(tmp_path / "other", seed=5), target_is_directory=True)
        with pytest.raises(UserError, match="holds other files now, so its adapters fit no model"):
            find_run(str(folder))
        link.unlink()
        link.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="is gone, so its adapters fit no model"):
            find_run(str(folder))
    finally:
        link.unlink()
        link.symlink_to(target, target_is_directory=True)

"""Whole runs of the authors' code: to a finished record, on their own data, and through a kill."""

from __future__ import annotations

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
from flatpatch.families.text import quick
from flatpatch.files import ROOT
from flatpatch.report.records import validate_record

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(900)]


def cut_copy(source: Path, target: Path, datasets: dict[str, str], train: int, test: int) -> Path:
    """Copy some datasets with their first instances only."""
    for name, kind in datasets.items():
        folder = target / kind / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_bytes((source / kind / name / "labels.json").read_bytes())
        for split, count in (("train", train), ("dev", test), ("test", test)):
            rows = json.loads((source / kind / name / f"{split}.json").read_text(encoding="utf-8"))
            (folder / f"{split}.json").write_text(json.dumps(rows[:count]))
    return target


def words(data: Path, output: Path, run: str, *more: str) -> list[str]:
    return [
        "run",
        "profile=quick",
        "engine=upstream",
        "device=cpu",
        f"data={data}",
        f"output={output}",
        f"run={run}",
        "upstream.num_train_epochs=1",
        "upstream.per_device_train_batch_size=8",
        "sam=sam",
        "rho=0.05",
        *more,
    ]


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    validate_record(record)
    return record


@pytest.mark.usefixtures("warm_text_runs")
def test_authors_own_data_goes_through_their_code_with_sam(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    benchmark = upstream("N-LoRA") / "CL_Benchmark"
    data = cut_copy(benchmark, tmp_path / "data", {"amazon": "SC", "agnews": "TC"}, train=32, test=8)
    command = words(data, tmp_path, "real", "tasks=amazon,agnews", "upstream.max_source_length=512")
    assert main(command) == 0
    record = record_of(tmp_path / "real")
    assert record["status"] == "finished"
    assert record["tasks"] == ["amazon", "agnews"]
    assert record["upstream"]["pin"] == "7301afe5f0e3ef68461fda4b0d103dd83b2b6277"
    assert record["labels"] == ["quick", "off-protocol"]
    assert [summary["steps"] for summary in record["training"]] == [4, 4]
    assert all(summary["perturbed_parameters"] > 0 for summary in record["training"])
    steps = [json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    assert [step["perturbation_norm"] for step in steps] == pytest.approx([0.05] * 8, rel=1e-4)
    assert all(step["perturbed_loss"] > step["loss"] for step in steps)


def test_killed_run_of_the_authors_code_ends_as_an_undisturbed_one(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("N-LoRA")
    quick.write_benchmark(tmp_path / "whole")
    data = cut_copy(tmp_path / "whole", tmp_path / "data", {"amazon": "SC", "dbpedia": "TC"}, train=32, test=8)
    undisturbed = words(data, tmp_path, "undisturbed", "tasks=dbpedia,amazon")
    assert main(undisturbed) == 0

    killed = words(data, tmp_path, "killed", "tasks=dbpedia,amazon")
    process = subprocess.Popen(
        [sys.executable, "-m", "flatpatch", *killed],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "tasks" / "2-amazon" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(killed) == 0

    def measured(name: str) -> tuple[Any, ...]:
        folder = tmp_path / name
        record = record_of(folder)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [(step["task"], step["step"], step["loss"], step["perturbed_loss"]) for step in steps]
        adapters = [path.read_bytes() for path in sorted((folder / "work").rglob("adapter_model.bin"))]
        assert len(adapters) == 2
        return record["accuracy_matrix"], record["metrics"], losses, adapters

    assert measured("killed") == measured("undisturbed")
    assert record_of(tmp_path / "killed")["restarts"] == 1

"""Whole runs of the authors' code: to a finished record, on their own data, and through a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.families.text import quick
from flatpatch.report.records import validate_record
from tests.kills import killed_at_random_moments

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


@pytest.mark.parametrize(("repository", "method"), [("N-LoRA", "nlora"), ("O-LoRA", "olora")])
def test_killed_run_of_the_authors_code_ends_as_an_undisturbed_one(
    repository: str, method: str, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream(repository)
    quick.write_benchmark(tmp_path / "whole")
    data = cut_copy(tmp_path / "whole", tmp_path / "data", {"amazon": "SC", "dbpedia": "TC"}, train=96, test=8)

    def measured(folder: Path) -> tuple[Any, ...]:
        record = record_of(folder)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [{name: value for name, value in step.items() if name != "seconds"} for step in steps]
        adapters = [path.read_bytes() for path in sorted((folder / "work").rglob("adapter_model.bin"))]
        trained = [json.loads(path.read_text()) for path in sorted((folder / "work").rglob("train_results.json"))]
        assert len(adapters) == len(trained) == 2
        return record["accuracy_matrix"], record["metrics"], losses, adapters, [row["train_loss"] for row in trained]

    steps = killed_at_random_moments(
        lambda run: words(data, tmp_path, run, f"method={method}", "tasks=dbpedia,amazon", "checkpoint_every=3"),
        tmp_path,
        measured,
        seed=5,
    )
    assert any(steps), "one of the kills should have come behind a checkpoint"

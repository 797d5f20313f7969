"""Continuations of a run begin with its state, bit for bit, and end paired by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.report.records import read_record, read_step_metrics
from flatpatch.settings import DEFAULTS
from tests.report_records import make_quick_record, make_record
from tests.text_benchmark import small_benchmark

TWO_TASKS = [
    *("method=seqlora", "profile=quick", "engine=reference", "tasks=dbpedia,amazon", "device=cpu", "seed=3"),
    "upstream.per_device_train_batch_size=8",
]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=1", "sam=sam"], "fork needs run="),
        (["run=parent", "sam=sam"], "fork needs task="),
        (["run=parent", "task=1"], "fork needs what the continuations do otherwise, e.g. sam=off,sam"),
        (["run=parent", "task=1", "order=2", "sam=sam"], "unknown setting 'order' of fork"),
        (["run=parent", "task=1", "sam=sam", "parallel=some"], "parallel='some' is not a whole number"),
        (["run=parent", "task=0", "sam=sam"], "(expected a number from 1 to 3, so that one is left)"),
        (["run=parent", "task=4", "sam=sam"], "(expected a number from 1 to 3, so that one is left)"),
        (["run=parent", "task=x", "sam=sam"], "(expected a number from 1 to 3, so that one is left)"),
        (["run=nowhere", "task=1", "sam=sam"], "run=nowhere: there is no run"),
        (["run=broken-off", "task=1", "sam=sam"], "is interrupted, not finished"),
        (["run=parent", "task=1", "sam=of"], "unknown sam 'of'"),
        (["run=parent", "task=1", "sam=sam"], "no longer holds"),
    ],
)
def test_what_cannot_be_forked_is_refused_and_nothing_is_left(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    records = {"parent": make_quick_record(method="seqlora"), "broken-off": make_record(done=2)}
    for name, record in records.items():
        record["settings"]["method"] = {"value": record["method"], "source": "command line"}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "record.json").write_text(json.dumps(record))
    assert main(["fork", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["broken-off", "parent"]


def test_forks_take_settings_of_sam_measuring_and_machine_alone() -> None:
    from flatpatch.runner.fork import _OTHERS, VARIED

    assert {"sam", "rho", "scope"} <= set(VARIED)
    assert {*VARIED, *_OTHERS} <= DEFAULTS.keys()
    assert not {"method", "order", "seed", "tasks", "fraction", "run", "output"} & {*VARIED, *_OTHERS}


@pytest.mark.slow
def test_fork_with_the_runs_own_settings_is_that_run_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = small_benchmark(tmp_path / "data")
    assert main(["run", *TWO_TASKS, f"data={data}", "run=parent"]) == 0
    capsys.readouterr()
    words = ["fork", "run=parent", "task=1", "sam=off,sam", "rho=0.1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "paired by seed" in text and "WARNING" not in text
    runs = {path.name: path for path in Path("runs").iterdir() if (path / "record.json").is_file()}
    assert set(runs) == {"parent", "parent-after1-off", "parent-after1-sam-rho0.1"}
    parent, off, on = (runs[name] for name in sorted(runs))

    losses = {run: [row["loss"] for row in read_step_metrics(run / "metrics.jsonl")] for run in (parent, off, on)}
    first = [row["task"] for row in read_step_metrics(parent / "metrics.jsonl")].count("dbpedia")
    assert losses[off] == losses[parent]
    assert losses[on][: first + 1] == losses[parent][: first + 1]  # SAM's first loss is before its step
    assert losses[on] != losses[parent]
    records = {run: read_record(run) for run in (parent, off, on)}
    assert records[off]["accuracy_matrix"] == records[parent]["accuracy_matrix"]
    for run in (off, on):
        forked = records[run]["forked"]
        assert (forked["run"], forked["tasks"], forked["begun"]) == ("parent", 1, True)
        assert records[run]["restarts"] == 0 and "resumed" not in records[run]
        assert "off-protocol" in records[run]["labels"]
    assert records[on]["forked"]["changed"]["sam"] == ["off", "sam"]
    assert any("task 1 was learned by the run parent" in note for note in records[on]["notes"])

    assert main(words) == 0  # again: nothing is computed
    assert "2 continuations, 2 of them finished" in capsys.readouterr().out
    assert read_record(on) == records[on]

    (weights,) = (parent / "work").rglob("1-dbpedia/adapter/adapter.safetensors")
    weights.write_bytes(b"other")
    # What is there is kept; another continuation would begin with other weights.
    assert main(["fork", "run=parent", "task=1", "sam=random"]) == 2
    assert "no longer holds" in capsys.readouterr().err

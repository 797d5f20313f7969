"""Runs with one accuracy matrix: named where their settings or seeds should have given another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.report.copies import copied_records, is_telling
from tests.report_page import seeded, write_run
from tests.report_records import make_record


def changed(record: dict[str, Any], **settings: Any) -> dict[str, Any]:
    for key, value in settings.items():
        record["settings"][key] = {"value": value, "source": "command line"}
    return record


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (seeded(1), "seed 0 and 1"),
        (changed(seeded(0), rho=0.1), "rho 0.05 and 0.1"),
        (changed(seeded(0), sam="off"), "rho 0.05 and -, sam sam and off"),
        (changed(seeded(0, sam="recorded"), rho=0.0), "rho 0.05 and 0.0, sam sam and recorded"),
        (changed(seeded(0), order="2"), "order 1 and 2"),
        (changed(seeded(0), model="models/t5-small"), "model - and models/t5-small"),
        (seeded(0, engine="reference", upstream=None), "engine upstream and reference"),
        (changed(seeded(0), **{"upstream.lamda_1": "1"}), "upstream.lamda_1 - and 1"),
    ],
)
def test_equal_accuracies_of_runs_that_were_trained_differently_are_named(other: dict[str, Any], what: str) -> None:
    [text] = copied_records(["one", "other"], [seeded(0), other])
    assert text.startswith("WARNING: one and other have the same 4 x 4 accuracy matrix, though they differ in ")
    assert all(part in text for part in what.split(", "))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (seeded(0), seeded(0)),
        (seeded(0), changed(seeded(0), run="again", output="elsewhere", device="cpu", port=7)),
        (seeded(0), changed(seeded(0), measure="all", measure_samples=8)),
        (seeded(0, sam="off"), changed(seeded(0, sam="sam"), rho=0.0)),
        (seeded(0, sam="off"), changed(seeded(0, sam="asam"), rho=0, eta=0.5, scope="A")),
        (seeded(0, sam="off"), changed(seeded(0, sam="off"), rho=0.3)),
        (changed(seeded(0), model=""), seeded(0)),
        (changed(seeded(0), sam_radius="factors", ascent_batch=1.0, tuning="lora"), seeded(0)),
    ],
    ids=[
        "a copy",
        "other places",
        "measured",
        "rho=0 is off",
        "so with asam",
        "idle",
        "nothing said",
        "earlier version",
    ],
)
def test_equal_accuracies_of_runs_that_must_be_equal_are_not_named(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert copied_records(["one", "other"], [one, other]) == []


def test_accuracies_that_may_be_equal_by_chance_are_not_named() -> None:
    assert not is_telling([[91.0]])
    assert not is_telling([[100.0, None], [100.0, 100.0]])
    assert not is_telling([[0.0, None], [None, 1.0]])
    assert is_telling([[90.0, None], [70.0, 80.0]])
    for matrix in ([[91.0]], [[100.0, None], [100.0, 100.0]]):
        tasks = tuple("ab"[: len(matrix)])
        pair = [seeded(seed, tasks=tasks, accuracy_matrix=matrix) for seed in (0, 1)]
        assert copied_records(["one", "other"], pair) == []


def test_report_names_copied_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / f"seed{seed}", seeded(seed)) for seed in (0, 1)]
    assert main(["report", f"run={','.join(map(str, folders))}"]) == 0
    assert "WARNING: seed0 and seed1 have the same 4 x 4 accuracy matrix" in capsys.readouterr().out
    record = make_record(accuracy_matrix=[[50.0 + i - j if j <= i else None for j in range(4)] for i in range(4)])
    (folders[1] / "record.json").write_text(json.dumps(record))
    assert main(["report", f"run={','.join(map(str, folders))}"]) == 0
    assert "was one copied?" not in capsys.readouterr().out

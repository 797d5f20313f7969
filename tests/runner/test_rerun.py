"""A record's run once more: the same words, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.report.records import read_record
from flatpatch.runner.rerun import words_of
from tests.report_records import make_quick_record, make_record

SMALL = ["method=seqlora_vit", "profile=quick", "device=cpu", "tasks=2", "fraction=0.1", "upstream.epochs=2", "seed=3"]


def test_words_are_those_that_were_given_then() -> None:
    record = make_record()
    record["settings"]["upstream.lora_r"] = {"value": 4, "source": "command line"}
    record["settings"]["output"] = {"value": "/elsewhere", "source": "command line"}
    words = words_of(record, {"device": "0"})
    assert set(words) == {
        "method=nlora",
        "sam=sam",
        "upstream.lora_r=4",
        "profile=upstream",
        "engine=upstream",
        "seed=42",
        "output=runs/again",
        "device=0",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=x"], "rerun needs record=FILE"),
        (["record=nowhere"], "record=nowhere: there is no run"),
        (["record=x", "rho=0.1"], "unknown setting 'rho' of rerun"),
    ],
)
def test_bad_words_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", *words]) == 2
    assert said in capsys.readouterr().err


def test_damaged_record_and_unknown_method_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "record.json").write_text('{"schema": 1')
    assert main(["rerun", f"record={tmp_path}"]) == 2
    assert "record.json" in capsys.readouterr().err
    (tmp_path / "record.json").write_text(json.dumps(make_quick_record(method="gone")))
    assert main(["rerun", f"record={tmp_path}"]) == 2
    assert "method gone, which is not here" in capsys.readouterr().err


def test_continuation_is_not_run_again_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_quick_record()
    record["forked"] = {"run": "parent", "tasks": 2, "changed": {}, "begun": True}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert main(["rerun", f"record={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "continues another run's state" in said and "fork run=runs/parent task=2" in said and "rho=0.05" in said


@pytest.mark.slow
def test_rerun_gives_the_same_numbers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *SMALL, "sam=sam", "rho=0.1"]) == 0
    (folder,) = (path.parent for path in Path("runs").glob("*/record.json"))
    own: list[str] = [f"record={folder / 'record.json'}"]
    assert main(["rerun", *own, "output=runs"]) == 2
    assert "is the record's own run" in capsys.readouterr().err
    assert main(["rerun", *own]) == 0
    said: Any = capsys.readouterr().out
    assert "differ in nothing" in said and "losses are the same numbers" in said
    assert read_record(Path("runs/again") / folder.name)["metrics"] == read_record(folder)["metrics"]

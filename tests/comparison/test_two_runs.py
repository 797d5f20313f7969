"""What two runs differ in: only what a number could depend on, and the step at which their losses part."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.comparison.two_runs import Row, differences, parting
from tests.report_records import make_quick_record


def steps(path: Path, losses: list[float | None], **changes: Any) -> Path:
    lines = [
        {"task": "dbpedia", "step": number, "loss": loss, "learning_rate": 0.1, "seconds": 0.5 + number} | changes
        for number, loss in enumerate(losses, 1)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_same_run_twice_differs_in_nothing() -> None:
    record = make_quick_record()
    again = copy.deepcopy(record)
    again["timing"]["total_seconds"] += 5
    again["restarts"] = 3
    again["settings"]["run"] = {"value": "other", "source": "command line"}
    assert differences(record, again) == []


def test_each_difference_is_a_row_of_its_section() -> None:
    here = make_quick_record()
    there = copy.deepcopy(here)
    there["settings"]["rho"]["value"] = 0.1
    there["upstream"] = {"repo": "N-LoRA", "pin": "8" * 40}
    there["deviations"] = [*here["deviations"], {"what": "optim", "upstream": "adamw", "here": "sgd", "why": "asked"}]
    there["environment"]["libraries"] = {"torch": "2.9.0"}
    there["accuracy_matrix"][0][0] = 12.5
    rows = {(row.section, row.what): (row.here, row.there) for row in differences(here, there)}
    assert rows[("settings", "rho")] == ("0.05", "0.1")
    assert rows[("upstream's code", "pin")][1] == "8" * 40
    assert rows[("deviations", "optim")] == ("-", "adamw -> sgd")
    assert rows[("environment", "libraries.torch")][1] == "2.9.0"
    assert rows[("results", "accuracy_matrix, row 1")][1].startswith("[12.5")
    back = {(row.section, row.what): (row.there, row.here) for row in differences(there, here)}
    assert back == rows
    assert all(isinstance(row, Row) for row in differences(here, there))


def test_numbers_that_differ_in_late_digits_differ() -> None:
    here = make_quick_record()
    there = copy.deepcopy(here)
    here["settings"]["rho"]["value"], there["settings"]["rho"]["value"] = 0.0123456789, 0.0123457
    assert [(row.what, row.here, row.there) for row in differences(here, there)] == [
        ("rho", "0.0123456789", "0.0123457")
    ]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([1.0, 0.5], [1.0, 0.5], "all 2 losses are the same numbers"),
        ([1.0, 0.5], [1.0, 0.25], "up to line 1; then, at task dbpedia step 2: 0.5 | 0.25 (a difference of 0.25)"),
        ([1.0, None], [1.0, 0.25], "step 2: None | 0.25"),
        ([1.0], [1.0, 0.25], "the first 1 steps are the same; then one ends: 1 | 2 steps"),
    ],
)
def test_first_step_at_which_losses_part_is_named(tmp_path: Path, one: Any, other: Any, said: str) -> None:
    assert said in parting(steps(tmp_path / "a.jsonl", one), steps(tmp_path / "b.jsonl", other))


def test_steps_of_other_tasks_part_at_once(tmp_path: Path) -> None:
    said = parting(steps(tmp_path / "a.jsonl", [1.0]), steps(tmp_path / "b.jsonl", [1.0], task="amazon"))
    assert said == "line 1: task dbpedia step 1 | task amazon step 1"
    assert "there is no" in parting(tmp_path / "a.jsonl", tmp_path / "none.jsonl")


def test_verb_prints_what_differs_and_takes_a_record_for_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rho in (("a", 0.05), ("b", 0.1)):
        record = make_quick_record()
        record["settings"]["rho"]["value"] = rho
        steps(tmp_path / name / "metrics.jsonl", [1.0, rho])
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    assert main(["diff", f"run={tmp_path / 'a'}", f"with={tmp_path / 'b' / 'record.json'}"]) == 0
    text = capsys.readouterr().out
    assert "  rho: 0.05 | 0.1" in text and "step 2: 0.05 | 0.1" in text
    assert main(["diff", f"run={tmp_path / 'a'}", f"with={tmp_path / 'a'}"]) == 0
    assert "differ in nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=a"], "diff needs with=FOLDER too"),
        (["run=a", "wiht=b"], "unknown setting 'wiht' of diff. Did you mean 'with'?"),
        (["run=a", "with=b"], "run=a: there is no run"),
    ],
)
def test_bad_words_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *words]) == 2
    assert said in capsys.readouterr().err

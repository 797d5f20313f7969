"""The verdicts of several folders as tables for a document."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.studies.__main__ import tables
from flatpatch.studies.result import folder_of, write_result
from tests.study_cases import judged, last_row, leave, planned, write_study


def study_with(folder: Path, gain: float) -> Path:
    """Leave the verdicts of a study in which SAM raises the average accuracy by about ``gain``."""
    folder.mkdir()
    asked = planned(write_study(folder, conclusions="conclusions: [{text: a | b, hypotheses: [accuracy]}]"), folder)
    for cell in asked[2]:
        more = (2 * gain + 0.02 * cell.seed) * (cell.value("sam") == "sam")
        leave(cell, accuracy=last_row(50 + more, 50))
    result = judged(folder, folder, asked)
    write_result(folder_of(folder, result.study, result.form), result)
    return folder


def test_each_hypothesis_and_conclusion_is_a_row_and_the_later_folder_counts(tmp_path: Path) -> None:
    text = tables([study_with(tmp_path / "first", 2.0), study_with(tmp_path / "second", -2.0)])
    hypotheses, conclusions = text.strip().split("\n\n")
    assert len({line.count(" | ") for line in hypotheses.splitlines()[::2]}) == 1
    (row,) = hypotheses.splitlines()[2:]
    assert row.startswith("| small | quick | SAM raises the average accuracy | 3 | -1.99 (")
    assert row.endswith(" points | contradicted | - | - |")
    (row,) = conclusions.splitlines()[2:]
    assert row == "| small | quick | a \\| b | does not survive | - |"


def test_what_has_no_number_says_so(tmp_path: Path) -> None:
    asked = planned(write_study(tmp_path), tmp_path)
    result = judged(tmp_path, tmp_path, asked)
    write_result(folder_of(tmp_path, result.study, result.form), result)
    assert "| 0 | no number | undecided | - | - |" in tables([tmp_path])


def test_folder_without_verdicts_and_damaged_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no verdicts of studies"):
        tables([tmp_path])
    damaged = folder_of(tmp_path, "mine", "quick") / "verdicts.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.raises(UserError, match=r"verdicts\.json cannot be read"):
        tables([tmp_path])

"""The verb report: what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.runner import pages, report
from tests.report_page import make_four


def test_report_of_several_runs_tells_the_means_first_and_stays_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        report, "leave_figures", lambda folder, record: [folder / "figures" / f"{k}" for k in range(12)]
    )
    monkeypatch.setattr(pages, "make_page", lambda *_, **__: "the page")
    folders = make_four(tmp_path)
    assert report.show([f"run={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mean and standard deviation over seeds")
    assert len(lines) < 25
    finished = [folder for folder in folders if folder.name != "nlora-sam-seed2"]
    for folder in finished:
        assert lines.count(f"figures  {folder}/figures/ (12 files)") == 1
    assert lines[-1] == f"page     {tmp_path / 'report.html'}"


def test_report_of_one_run_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "leave_figures", lambda *_: [])
    monkeypatch.setattr(pages, "make_page", lambda *_, **__: "the page")
    folder = make_four(tmp_path)[0]
    assert report.show([f"run={folder}"]) == 0
    out = capsys.readouterr().out
    assert "accuracy in percent, after training a task (row) on a task (column)" in out

"""Several runs on one screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.report.overview import overview
from flatpatch.runner import pages, sweep
from flatpatch.runner.sweep import seeds_table, show
from tests.report_page import make_four, seeded
from tests.report_records import make_quick_record, make_record


def test_each_run_has_one_line_with_its_numbers_and_what_is_missing() -> None:
    text = overview([("one", make_record()), ("the-other-run", make_record(done=2))]).splitlines()
    assert text[0].split() == ["run", "average", "accuracy", "forgetting"]
    assert text[1].split() == ["one", "82.69", "8.03"]
    assert text[2].split(None, 3) == ["the-other-run", "-", "-", "INTERRUPTED: results of 2 of 4 tasks"]
    assert len(text) == 3
    ends = [line.index(cell) + len(cell) for line, cell in ((text[0], "accuracy"), (text[1], "82.69"))]
    assert ends[0] == ends[1]


def test_label_stands_once_above_all_runs_that_need_it() -> None:
    text = overview([("a", make_quick_record()), ("b", make_quick_record())])
    assert text.count("QUICK AND REFERENCE RUN, not comparable with the paper's numbers") == 1
    assert text.startswith("QUICK")


def test_report_of_several_runs_tells_the_means_first_and_stays_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "leave_figures", lambda folder, record: [folder / "figures" / f"{k}" for k in range(12)])
    monkeypatch.setattr(pages, "make_page", lambda *_, **__: "the page")
    folders = make_four(tmp_path)
    assert show([f"run={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mean and standard deviation over seeds")
    assert len(lines) < 25
    finished = [folder for folder in folders if folder.name != "nlora-sam-seed2"]
    for folder in finished:
        assert lines.count(f"figures  {folder}/figures/ (12 files)") == 1
    assert lines[-1] == f"page     {tmp_path / 'report.html'}"


def test_means_join_measured_runs_and_keep_their_columns_beside_long_names() -> None:
    records = [seeded(seed) for seed in (0, 1, 1)]
    for record in records[1:]:
        record["settings"] |= {
            "measure": {"value": "loss", "source": "command line"},
            "measure_samples": {"value": 16, "source": "command line"},
        }
    longer = seeded(0)
    longer["settings"]["data"] = {"value": "a-folder/with/a-long-name/" * 4, "source": "command line"}
    heading, short, *long = seeds_table([*records, longer]).splitlines()
    assert short.split()[-1] == "2" and "measure" not in short  # a seed that was run twice counts once
    assert long[0].split()[-1] == "1" and len(long) > 1
    assert len(heading) == len(short) == len(long[0]) >= max(map(len, long))


def test_report_of_one_run_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "leave_figures", lambda *_: [])
    monkeypatch.setattr(pages, "make_page", lambda *_, **__: "the page")
    folder = make_four(tmp_path)[0]
    assert show([f"run={folder}"]) == 0
    out = capsys.readouterr().out
    assert "accuracy in percent, after training a task (row) on a task (column)" in out

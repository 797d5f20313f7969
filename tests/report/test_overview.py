"""Several runs on one screen."""

from __future__ import annotations

from flatpatch.report.overview import overview, seeds_table
from tests.report_page import seeded
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

"""The results as the terminal shows them."""

from __future__ import annotations

import pytest

from flatpatch.report.table import summary_table
from tests.report_records import LONG, make_quick_record, make_record


def lines(record, **options):
    return summary_table(record, **options).splitlines()


def row(record, start):
    """Return the words of the one line that begins so."""
    found = [line for line in lines(record) if line.startswith(start)]
    assert len(found) == 1, found
    return found[0].removeprefix(start).split()


def test_matrix_has_two_decimals_and_a_dash_where_not_evaluated():
    record = make_record(accuracy_matrix=[[98.7105, None, None, None], [100.0, 57.7632, None, None]] + [[None] * 4] * 2)
    assert row(record, "1 dbpedia") == ["98.71", "-", "-", "-"]
    assert row(record, "2 amazon") == ["100.00", "57.76", "-", "-"]
    assert row(record, "4 agnews") == ["-", "-", "-", "-"]


def test_columns_stand_under_their_tasks():
    text = lines(make_record())
    head = next(line for line in text if line.split() == ["dbpedia", "amazon", "yahoo", "agnews"])
    last = next(line for line in text if line.startswith("4 agnews"))
    ends = [head.index(task) + len(task) for task in ("dbpedia", "amazon", "yahoo", "agnews")]
    assert all(last[end - 1].isdigit() and last[end : end + 1] in ("", " ") for end in ends)


def test_both_averages_are_named_as_the_paper_and_upstream_name_them():
    record = make_record(("a", "b"), accuracy_matrix=[[90.0, None], [70.0, 80.0]])
    record["metrics"]["sample_weighted_accuracy"] = 73.8813
    assert row(record, "average accuracy (mean over tasks; the papers' AA)") == ["75.00"]
    assert row(record, "sample-weighted accuracy (upstream's predict_exact_match)") == ["73.88"]


def test_forgetting_and_backward_transfer_are_shown():
    record = make_record(("a", "b", "c"), accuracy_matrix=[[80.0, None, None], [90.0, 70.0, None], [93.0, 60.0, 50.0]])
    assert row(record, "forgetting")[-1] == "3.50"
    assert row(record, "backward transfer")[-1] == "1.50"


def test_missing_metrics_are_dashes():
    record = make_record(metrics={"forgetting": None})
    assert row(record, "forgetting")[-1] == "-"
    assert row(record, "backward transfer")[-1] == "-"


@pytest.mark.parametrize("width", [72, 80, 120])
@pytest.mark.parametrize(
    "record",
    [make_record(), make_record(LONG), make_record(LONG, done=11), make_quick_record(), make_record(("dbpedia",))],
    ids=["four tasks", "fifteen tasks", "eleven of fifteen", "quick", "one task"],
)
def test_no_line_is_wider_than_asked(record, width):
    assert max(map(len, lines(record, width=width))) <= width


def test_all_entries_of_fifteen_tasks_are_shown_once_at_eighty_columns():
    record = make_record(LONG)
    text = lines(record)
    begin = next(i for i, line in enumerate(text) if line.startswith("accuracy in percent"))
    end = next(i for i, line in enumerate(text) if line.startswith("average accuracy"))
    shown = [word for line in text[begin:end] for word in line.split() if "." in word]
    expected = [f"{x:.2f}" for rows in record["accuracy_matrix"] for x in rows if x is not None]
    assert sorted(shown) == sorted(expected)


def test_evaluations_of_tasks_to_come_are_shown():
    matrix = make_record(LONG)["accuracy_matrix"]
    matrix[0][14] = 12.34
    assert "12.34" in summary_table(make_record(LONG, accuracy_matrix=matrix))


def test_quick_reference_run_opens_with_a_loud_label():
    text = lines(make_quick_record())
    assert text[0] == "*" * 80
    assert text[1].startswith("* QUICK AND REFERENCE RUN")
    assert "Not comparable with the paper's numbers." in " ".join(" ".join(text[:4]).replace("*", "").split())


def test_full_upstream_run_has_no_label():
    assert "*" not in summary_table(make_record())
    assert "comparable" not in summary_table(make_record())


def test_the_reason_for_the_engine_is_left_to_the_run_and_the_page():
    """Who has seen the run begin has read it."""
    assert "could not be cloned" not in summary_table(make_quick_record())


def test_deviations_are_counted_and_named():
    assert "1 deviation from upstream's own run: library torch (record.json)" in summary_table(make_record())
    assert "no deviations from upstream's own run" in summary_table(make_record(deviations=[]))
    assert "deviation" not in summary_table(make_quick_record(deviations=[]))


def test_times_are_sums_over_the_tasks_that_have_one():
    timing = {"train_seconds": [10.0, 20.0, None, None], "predict_seconds": [], "total_seconds": 45.2}
    assert "training 30 s, in all 45 s" in summary_table(make_record(timing=timing))
    assert "no times recorded" in summary_table(make_record(timing={}))


def test_unfinished_run_says_how_far_it_came():
    text = summary_table(make_record(LONG, done=11, restarts=2))
    assert "INTERRUPTED: results of 11 of 15 tasks" in text
    assert "resumed 2 times" in text


def test_text_is_plain_ascii():
    assert summary_table(make_quick_record()).isascii()


def test_accuracy_before_training_is_the_first_row_and_metrics_of_every_task_are_shown_where_they_exist():
    record = make_record(
        ("a", "b"), accuracy_matrix=[[90.0, 40.0], [70.0, 80.0]], accuracy_before_training=[30.0, 35.5]
    )
    record["metrics"] |= {"transfer": 40.0, "average": 70.0, "last": 75.0}
    text = lines(record)
    first = next(number for number, line in enumerate(text) if line.startswith("0 before"))
    assert text[first].split()[2:] == ["30.00", "35.50"]
    assert text[first + 1].split() == ["1", "a", "90.00", "40.00"]
    assert row(record, "transfer (tasks before they are learned)") == ["40.00"]
    assert row(record, "average (all steps and all tasks)") == ["70.00"]
    assert not any(line.startswith(("0 before", "transfer", "average (all")) for line in lines(make_record()))

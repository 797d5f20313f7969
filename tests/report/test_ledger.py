"""The ledger's figure: the file's own sums, and what is damaged left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatpatch.report.flatness_run import draw_flatness
from flatpatch.report.groups import group_runs, read_run
from flatpatch.report.ledger import CHANGE, ledger_rows, ledger_table, make_ledger_figure, read_ledgers
from flatpatch.report.page import make_page
from flatpatch.report.table import summary_table
from tests.report_page import Reader, small_print, write_run
from tests.report_records import ORDER_1, make_quick_record


def ledger_content(trained: int, scale: float = 1.0, every: int = 2) -> dict[str, Any]:
    """Return a ledger's file of four steps in two entries: the change of task i in task t is 3 (i + 1) t ``scale``."""
    rows = []
    for index in range(trained):
        gradient, curvature, rest = (scale * (index + 1) * trained * part for part in (-1.0, 3.5, 0.5))
        change = gradient + curvature + rest
        rows.append(
            {
                **{"task": ORDER_1[index], "task_index": index, "samples": 64, "steps": [2, 4]},
                "losses": [1.0, 1.0 + change / 2, 1.0 + change],
                "gradients": [gradient / 2] * 2,
                "curvatures": [curvature / 2] * 2,
                **{"change": change, "gradient": gradient, "curvature": curvature, "remainder": rest},
                **{"absolute_change": abs(change), "absolute_remainder": abs(rest)},
            }
        )
    return {
        **{"task": ORDER_1[trained], "task_index": trained, "when": "ledger", "error": None, "scopes": {}},
        "ledger": {"every": every, "steps": 4, "num_parameters": 9, "earlier": rows},
    }


def write_ledgers(folder: Path, tasks: int = 4, scale: float = 1.0) -> None:
    (folder / "flatness").mkdir(parents=True, exist_ok=True)
    for trained in range(1, tasks):
        path = folder / "flatness" / f"{trained + 1}-{ORDER_1[trained]}-ledger.json"
        path.write_text(json.dumps(ledger_content(trained, scale)))


def test_figure_shows_the_sums_of_each_pair_and_how_they_add_up(tmp_path: Path) -> None:
    write_ledgers(tmp_path)
    figure = make_ledger_figure(read_ledgers(tmp_path), make_quick_record())
    assert figure is not None
    bars, *panels = figure.axes
    assert [label.get_text() for label in bars.get_xticklabels()] == [
        *("1 in 2", "1 in 3", "1 in 4", "2 in 3", "2 in 4", "3 in 4")
    ]
    changes = [3.0 * i * t for i, t in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3))]
    (line,) = [line for line in bars.get_lines() if line.get_label() == CHANGE]
    assert list(line.get_ydata()) == pytest.approx(changes)
    # Negative terms hang below, so that positive ones begin at zero and end at curvature and remainder together.
    ends = [[bar.get_y() + end for bar in bars.patches[k::6] for end in (0, bar.get_height())] for k in range(6)]
    assert [max(own) for own in ends] == pytest.approx([4 / 3 * change for change in changes])
    assert [min(own) for own in ends] == pytest.approx([-change / 3 for change in changes])
    assert [axes.get_title() for axes in panels] == [f"task {k + 1} {ORDER_1[k]}" for k in range(3)]
    whole = panels[0].get_lines()[3]
    assert list(whole.get_xdata()) == [0, 2, 4, 6, 8, 10, 12]
    assert list(whole.get_ydata()) == pytest.approx([0, 1.5, 3, 6, 9, 13.5, 18])


def test_lines_break_where_a_ledger_is_missing_and_the_figure_names_it(tmp_path: Path) -> None:
    write_ledgers(tmp_path)
    (tmp_path / "flatness" / "3-yahoo-ledger.json").unlink()
    figure = make_ledger_figure(read_ledgers(tmp_path), make_quick_record())
    assert figure is not None
    _, first, second, third = figure.axes
    whole = first.get_lines()[3]
    # Task 1 through task 2, no numbers for task 3, and through task 4 from 0 on.
    np.testing.assert_allclose(whole.get_xdata(), [0, 2, 4, np.nan, 8, 10, 12])
    np.testing.assert_allclose(whole.get_ydata(), [0, 1.5, 3, np.nan, 0, 4.5, 9])
    assert [[patch.get_x() for patch in axes.patches] for axes in (first, second, third)] == [[4], [0], []]
    assert "no whole ledger of task 3 yahoo" in small_print(figure)


def test_sums_over_all_later_tasks_are_in_the_tables_of_terminal_and_page(tmp_path: Path) -> None:
    """Task i's change in task t is 3 (i + 1) t, in parts of -1, 3.5 and 0.5: 18 for the first, as t is 1, 2 and 3."""
    folder, record = tmp_path / "run", make_quick_record()
    write_run(folder, record)
    assert "ledger of forgetting" not in summary_table(record, folder)
    write_ledgers(folder)
    head, first, second, third = ledger_table(folder, record["tasks"])
    assert " ".join(head.split()) == "ledger of forgetting gradient term curvature term remainder change of the loss"
    assert first.split() == ["1", "dbpedia", "-6.0000", "21.0000", "3.0000", "18.0000"]
    assert second.split()[2:] == ["-10.0000", "35.0000", "5.0000", "30.0000"]
    assert third.split()[2:] == ["-9.0000", "31.5000", "4.5000", "27.0000"]
    assert first in summary_table(record, folder) and "ledger of forgetting" not in summary_table(record)
    groups = group_runs([read_run(folder)])
    reader = Reader(make_page(groups))
    assert reader.row("What the change of each earlier task's loss", "1 dbpedia")[1:] == ["A", "-6", "21", "3", "18"]
    (folder / "flatness" / f"3-{ORDER_1[2]}-ledger.json").unlink()
    assert [row["task"] for row in ledger_rows(groups)] == [f"3 {ORDER_1[2]}"]
    assert len(ledger_table(folder, record["tasks"])) == 2


def test_damaged_and_failed_ledgers_are_left_out(tmp_path: Path) -> None:
    assert read_ledgers(tmp_path) == [] and make_ledger_figure([], make_quick_record()) is None
    write_ledgers(tmp_path)
    (tmp_path / "flatness" / "2-amazon-ledger.json").write_text('{"error": null, "ledg')
    failed = ledger_content(2) | {"error": "OSError: no"}
    (tmp_path / "flatness" / "3-yahoo-ledger.json").write_text(json.dumps(failed))
    assert [content["task_index"] for content in read_ledgers(tmp_path)] == [3]


def test_run_with_a_ledger_has_its_figure(tmp_path: Path) -> None:
    write_ledgers(tmp_path, tasks=2)
    written = draw_flatness(make_quick_record(flatness=[]), tmp_path)
    assert [path.name for path in written] == ["flatness_ledger.png", "flatness_ledger.pdf"]
    assert draw_flatness(make_quick_record(flatness=[]), tmp_path / "none") == []

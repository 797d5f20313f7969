"""What was followed live, drawn: the file's own numbers, and what is damaged left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatpatch.report.flatness_run import draw_flatness
from flatpatch.report.live import live_sentence, make_live_figure, read_live
from tests.report_page import small_print
from tests.report_records import ORDER_1, make_quick_record


def live_content(index: int) -> dict[str, Any]:
    """Return a task's file: measured after steps 5, 10 and 40 of 50, with a new vector at the first."""
    return {
        **{"task": ORDER_1[index], "task_index": index, "when": "live", "error": None, "scopes": {}, "samples": 8},
        "live": {
            **{"scope": "adapter", "every": 0, "rho": 0.05, "num_parameters": 9, "steps": 50},
            **{"measured": [5, 10, 40], "losses": [1.0, 0.9, 0.5], "gradient_norms": [1.0, 1.0, 1.0]},
            **{"gaps": [0.2, 0.1, 0.05 * (index + 1)], "eigenvalues": [8.0, -9.0, 10.0 + index]},
            **{"residuals": [6.0, 2.0, 1.0], "restarted": [5], "training_seconds": 100.0},
            **{"preparing_seconds": 1.0, "measuring_seconds": 3.0, "share": 0.04 + 0.001 * index},
        },
    }


def write_live(folder: Path, tasks: int = 4) -> None:
    (folder / "flatness").mkdir(parents=True, exist_ok=True)
    for index in range(tasks):
        path = folder / "flatness" / f"{index + 1}-{ORDER_1[index]}-live.json"
        path.write_text(json.dumps(live_content(index)))


def lines_of(axes: Any) -> list[Any]:
    """Return the series that were drawn, without lines of one place."""
    return [line for line in axes.get_lines() if len(line.get_xdata()) == 3]


def test_figure_shows_every_tasks_numbers_over_the_steps_of_all(tmp_path: Path) -> None:
    write_live(tmp_path)
    figure = make_live_figure(read_live(tmp_path), make_quick_record())
    assert figure is not None
    top, bottom = figure.axes
    for axes, name in ((top, "eigenvalues"), (bottom, "gaps")):
        drawn = lines_of(axes)
        assert [list(line.get_xdata()) for line in drawn] == [[50 * k + s for s in (5, 10, 40)] for k in range(4)]
        assert [list(line.get_ydata()) for line in drawn] == [live_content(k)["live"][name] for k in range(4)]
        ends = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert ends == [50, 100, 150]
    hollow = [line for line in top.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[5], [55], [105], [155]]
    band = top.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(5.0, 2.0), (5.0, 14.0), (10.0, -11.0), (40.0, 11.0)}
    assert [text.get_text() for text in top.texts] == [f"{k + 1} {ORDER_1[k]}" for k in range(4)]
    print_below = small_print(figure)
    assert "over adapter" in print_below and "rho=0.05" in print_below and "at most 4.3 %" in print_below


def test_task_that_was_not_followed_to_its_end_is_grey_and_named(tmp_path: Path) -> None:
    write_live(tmp_path)
    failed = live_content(2) | {"error": "OSError: no"}
    (tmp_path / "flatness" / f"3-{ORDER_1[2]}-live.json").write_text(json.dumps(failed))
    (tmp_path / "flatness" / f"2-{ORDER_1[1]}-live.json").write_text('{"error": null, "liv')
    figure = make_live_figure(read_live(tmp_path), make_quick_record())
    assert figure is not None
    for axes in figure.axes:
        assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(50, 50), (100, 50)]
        assert [line.get_xdata()[0] for line in lines_of(axes)] == [5, 155]
    assert "grey: task 2, 3" in small_print(figure)


def test_nothing_is_drawn_of_trainings_in_which_no_step_was_measured(tmp_path: Path) -> None:
    assert read_live(tmp_path) == [] and make_live_figure([], make_quick_record()) is None
    assert live_sentence([tmp_path]) == ""
    content = live_content(0)
    content["live"] |= {"measured": [], "eigenvalues": [], "residuals": [], "gaps": [], "share": None}
    (tmp_path / "flatness").mkdir()
    (tmp_path / "flatness" / "1-dbpedia-live.json").write_text(json.dumps(content))
    assert make_live_figure(read_live(tmp_path), make_quick_record()) is None
    assert live_sentence([tmp_path]) == "1 run followed over adapter: measured after 0 of 50 steps."


def test_sentence_says_how_closely_and_how_well_runs_were_followed(tmp_path: Path) -> None:
    write_live(tmp_path / "one", 2)
    write_live(tmp_path / "two", 4)
    assert live_sentence([tmp_path / "one", tmp_path / "two", tmp_path / "none"]) == (
        "2 runs followed over adapter: measured after 18 of 300 steps, in at most 4.3 % of a task's training time; at "
        "a task's end the residual was up to 10 % of the eigenvalue."
    )


def test_run_that_was_followed_has_its_figure(tmp_path: Path) -> None:
    write_live(tmp_path, tasks=2)
    written = draw_flatness(make_quick_record(flatness=[]), tmp_path)
    assert [path.name for path in written] == ["flatness_live.png", "flatness_live.pdf"]


@pytest.mark.parametrize("name", ["eigenvalues", "share"])
def test_file_without_a_number_that_is_drawn_is_left_out(tmp_path: Path, name: str) -> None:
    write_live(tmp_path, tasks=2)
    content = live_content(0)
    del content["live"][name]
    (tmp_path / "flatness" / f"1-{ORDER_1[0]}-live.json").write_text(json.dumps(content))
    assert [content["task_index"] for content in read_live(tmp_path)] == [1]

"""The figures: what they hold is checked on the Figure objects, the files only for being pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from flatpatch.report.figures import (
    draw_run,
    make_accuracy_figure,
    make_loss_figure,
    make_matrix_figure,
    make_perturbation_figure,
)
from tests.report_page import small_print
from tests.report_records import LONG, ORDER_1, make_quick_record, make_record, make_steps

MAKERS = [
    lambda record, steps: make_matrix_figure(record),
    lambda record, steps: make_accuracy_figure(record),
    make_loss_figure,
    make_perturbation_figure,
]


def sam_off():
    record = make_record()
    record["settings"]["sam"]["value"] = "off"
    return record


def named_lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


@pytest.mark.parametrize("make", MAKERS)
def test_every_figure_names_the_run_in_small_print(make):
    below = small_print(make(make_record(), make_steps()))
    for part in ("nlora", "order 1", "SAM rho=0.05", "seed 42", "profile upstream", "engine upstream"):
        assert part in below
    assert "comparable" not in below


@pytest.mark.parametrize("make", MAKERS)
def test_every_figure_of_a_quick_or_reference_run_says_so(make):
    below = small_print(make(make_quick_record(), make_steps()))
    assert "QUICK AND REFERENCE RUN, not comparable with the paper's numbers" in below


@pytest.mark.parametrize("make", MAKERS)
def test_every_title_is_short_black_and_of_nine_points(make):
    title = make(make_quick_record(), make_steps())._suptitle
    assert "\n" not in title.get_text() and len(title.get_text()) < 50
    assert (title.get_fontsize(), title.get_color()) == (9, "black")


def texts_that_overlap(figure):
    """Return each pair of shown texts that cover each other by more than a point."""
    figure.draw_without_rendering()
    axes = [each for each in figure.axes]
    texts = [text for each in axes for text in (each.xaxis.label, each.yaxis.label, each.title, *each.texts)]
    texts += [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    texts += [label for each in axes for label in each.get_xticklabels() if each.xaxis.get_visible()]
    # The box of a text that is turned says little of where its letters are; of an arrow's text the arrow is no part.
    shown = [text for text in texts if text.get_text() and text.get_visible() and text.get_rotation() in (0, 90)]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in shown]
    return [
        (name, other)
        for k, (name, box) in enumerate(boxes)
        for other, second in boxes[k + 1 :]
        if min(box.x1, second.x1) - max(box.x0, second.x0) > 1 and min(box.y1, second.y1) - max(box.y0, second.y0) > 1
    ]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("tasks", [ORDER_1, LONG])
def test_no_two_texts_of_a_figure_overlap(make, tasks):
    assert texts_that_overlap(make(make_quick_record(tasks=tasks), make_steps(tasks, steps=20))) == []


@pytest.mark.parametrize("tasks", [ORDER_1, LONG])
def test_matrix_is_annotated_where_evaluated_and_only_there(tasks):
    record = make_record(tasks)
    axes = make_matrix_figure(record).axes[0]
    decimals = 2 if len(tasks) == 4 else 1
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    expected = {
        (j, i): f"{x:.{decimals}f}"
        for i, row in enumerate(record["accuracy_matrix"])
        for j, x in enumerate(row)
        if x is not None
    }
    assert shown == expected
    assert [label.get_text() for label in axes.get_xticklabels()] == list(tasks)
    assert axes.images[0].get_clim() == (0, 100)


@pytest.mark.parametrize("tasks", [ORDER_1, LONG])
def test_matrix_annotations_stay_inside_their_cells(tasks):
    figure = make_matrix_figure(make_record(tasks))
    figure.canvas.draw()
    axes = figure.axes[0]
    cell = axes.get_window_extent().width / len(tasks)
    assert max(text.get_window_extent().width for text in axes.texts) < cell


def test_matrix_of_a_run_without_results_is_not_drawn():
    assert make_matrix_figure(make_record(done=0)) is None


@pytest.mark.parametrize("tasks", [ORDER_1, LONG])
def test_accuracy_has_one_line_per_task_and_the_mean_of_tasks_seen(tasks):
    record = make_record(tasks)
    lines = named_lines(make_accuracy_figure(record).axes[0])
    assert set(lines) == {*tasks, "mean of tasks seen"}
    matrix = record["accuracy_matrix"]
    assert list(lines[tasks[1]].get_ydata()) == [row[1] for row in matrix[1:]]
    assert list(lines[tasks[1]].get_xdata()) == list(range(1, len(tasks)))
    means = [np.mean(row[: i + 1]) for i, row in enumerate(matrix)]
    assert lines["mean of tasks seen"].get_ydata() == pytest.approx(means)


def test_no_two_lines_of_fifteen_tasks_look_the_same():
    lines = named_lines(make_accuracy_figure(make_record(LONG)).axes[0]).values()
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 16


@pytest.mark.parametrize("spread", [True, False])
def test_names_at_the_ends_of_fifteen_lines_do_not_overlap(spread):
    record = make_record(LONG)
    if not spread:
        record["accuracy_matrix"][-1] = [60.0] * 15
    figure = make_accuracy_figure(record)
    figure.canvas.draw()
    axes = figure.axes[0]
    heights = sorted(axes.transData.transform(text.xyann)[1] for text in axes.texts)
    assert len(heights) == 16
    letters = axes.texts[0].get_fontsize() * figure.dpi / 72
    assert min(np.diff(heights)) > letters


def test_accuracy_of_a_single_step_is_not_drawn():
    assert make_accuracy_figure(make_record(done=1)) is None
    assert make_accuracy_figure(make_record(("dbpedia",))) is None


def test_a_missing_step_leaves_the_mean_open_there():
    record = make_record()
    record["accuracy_matrix"][2] = [None] * 4
    lines = named_lines(make_accuracy_figure(record).axes[0])
    assert list(lines["dbpedia"].get_xdata()) == [0, 1, 3]


def test_loss_shows_both_losses_with_task_boundaries_under_sam():
    axes = make_loss_figure(make_record(), make_steps(steps=60)).axes[0]
    assert set(named_lines(axes)) == {"loss", "perturbed loss (at the ascent step)"}
    boundaries = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert boundaries == [60, 120, 180]
    assert [text.get_text() for text in axes.texts] == list(ORDER_1)
    assert "mean of 3 steps" in axes.get_xlabel()


def test_no_legend_covers_a_curve():
    """It stands below the axes, or above those of a panel."""
    for figure in (
        make_loss_figure(make_record(), make_steps()),
        make_perturbation_figure(make_record(), make_steps()),
    ):
        figure.draw_without_rendering()
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        assert legends
        for legend in legends:
            assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_loss_without_sam_shows_the_loss_alone():
    axes = make_loss_figure(sam_off(), make_steps(sam=False)).axes[0]
    assert set(named_lines(axes)) == {"loss"}


def test_short_runs_are_not_smoothed():
    axes = make_loss_figure(make_record(), make_steps(steps=8)).axes[0]
    line = named_lines(axes)["loss"]
    assert list(line.get_ydata()) == [row["loss"] for row in make_steps(steps=8)[:8]]
    assert "each step" in axes.get_xlabel()
    assert "mean" not in axes.get_xlabel()


def test_smoothing_is_the_mean_around_a_step_within_its_task():
    steps = make_steps(steps=60)
    line = named_lines(make_loss_figure(make_record(), steps).axes[0])["loss"]
    losses = [row["loss"] for row in steps[:60]]
    assert line.get_ydata()[10] == pytest.approx(np.mean(losses[9:12]))
    assert line.get_ydata()[59] == pytest.approx(np.mean(losses[58:60]))


def test_loss_of_wide_range_is_on_a_logarithmic_axis():
    steps = make_steps()
    assert make_loss_figure(make_record(), steps).axes[0].get_yscale() == "linear"
    for row in steps[60:120]:
        row["loss"] *= 60
    assert make_loss_figure(make_record(), steps).axes[0].get_yscale() == "log"


def test_diverged_loss_leaves_a_gap():
    steps = make_steps(steps=8)
    steps[3]["loss"] = math.nan
    steps[4]["loss"] = math.inf
    figure = make_loss_figure(make_record(), steps)
    figure.canvas.draw()
    assert math.isnan(named_lines(figure.axes[0])["loss"].get_ydata()[3])


def test_a_step_logged_again_after_a_restart_counts_once():
    steps = make_steps(steps=8)
    again = {**steps[2], "loss": 99.0}
    line = named_lines(make_loss_figure(make_record(), [*steps, again]).axes[0])["loss"]
    assert len(line.get_xdata()) == 8
    assert line.get_ydata()[2] == 99


def test_tasks_may_be_logged_by_number():
    by_name = make_steps(steps=8)
    by_number = [{**row, "task": ORDER_1.index(row["task"])} for row in by_name]
    lines = [make_loss_figure(make_record(), steps).axes[0].get_lines() for steps in (by_name, by_number)]
    for one, other in zip(*lines, strict=True):
        assert np.array_equal(one.get_xydata(), other.get_xydata())


def test_steps_counted_from_zero_lose_none():
    steps = [{**row, "step": row["step"] - 1} for row in make_steps(steps=1)]
    lines = [line for line in make_loss_figure(make_record(), steps).axes[0].get_lines() if line.get_linestyle() == "-"]
    assert [list(line.get_ydata()) for line in lines] == [[row["loss"]] for row in steps]


def test_no_loss_no_figure():
    assert make_loss_figure(make_record(), []) is None
    assert make_perturbation_figure(make_record(), []) is None


def test_perturbation_has_three_panels_under_sam():
    figure = make_perturbation_figure(make_record(), make_steps())
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
    assert labels == ["gradient norm", "perturbation norm", "cosine, after to before rounding"]
    assert set(named_lines(figure.axes[1])) == {"before rounding", "after rounding"}


def test_norms_are_said_to_be_of_the_factors_where_the_radius_is_of_the_weights():
    record = make_record()
    assert "sam_radius" not in small_print(make_perturbation_figure(record, make_steps()))
    record["settings"]["sam_radius"] = {"value": "effective"}
    assert "are those of the factors' own step" in small_print(make_perturbation_figure(record, make_steps()))


def test_perturbation_is_not_drawn_with_sam_off():
    assert make_perturbation_figure(sam_off(), make_steps(sam=False)) is None


def test_perturbation_leaves_out_panels_without_data():
    steps = [{**row, "perturbation_cosine": None, "effective_perturbation_norm": None} for row in make_steps()]
    figure = make_perturbation_figure(make_record(), steps)
    assert [axes.get_ylabel() for axes in figure.axes] == ["gradient norm"]
    assert "perturbation norm = 0.05" in small_print(figure)


def test_panels_without_change_are_not_drawn_and_their_value_is_said():
    exact = {"perturbation_norm": 0.05, "effective_perturbation_norm": 0.05 + 1e-9, "perturbation_cosine": 1 - 1e-12}
    figure = make_perturbation_figure(make_record(), [{**row, **exact} for row in make_steps()])
    assert [axes.get_ylabel() for axes in figure.axes] == ["gradient norm"]
    assert "constant to a thousandth: perturbation norm = 0.05; cosine, after to before rounding = 1." in (
        small_print(figure)
    )

    assert figure.get_suptitle() == "Gradient norm under SAM"


def test_an_effective_perturbation_beside_the_intended_one_is_drawn_even_where_neither_changes():
    shifted = {"perturbation_norm": 0.05, "effective_perturbation_norm": 0.048, "perturbation_cosine": 1.0}
    figure = make_perturbation_figure(make_record(), [{**row, **shifted} for row in make_steps()])
    assert [axes.get_ylabel() for axes in figure.axes] == ["gradient norm", "perturbation\nnorm"]


def test_perturbation_that_never_changes_is_no_figure():
    flat = {"grad_norm": 2.0, "perturbation_norm": 0.0, "effective_perturbation_norm": 0.0, "perturbation_cosine": None}
    assert make_perturbation_figure(make_record(), [{**row, **flat} for row in make_steps()]) is None


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("tasks", [ORDER_1, LONG])
def test_draw_run_writes_all_four_pictures(tmp_path, tasks):
    written = draw_run(make_record(tasks), make_steps(tasks, steps=20), tmp_path / "figures")
    stems = ["accuracy_matrix", "accuracy_over_tasks", "loss", "perturbation"]
    assert names(written) == [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".pdf")]
    for path in written[1::2]:
        assert path.read_bytes().startswith(b"%PDF-")
    for path in written[::2]:
        assert path.stat().st_size > 10_000
        picture = imread(path)
        assert min(picture.shape[:2]) >= 450
        assert picture[..., :3].std() > 0.02


def test_draw_run_with_sam_off_writes_no_perturbation(tmp_path):
    written = draw_run(sam_off(), make_steps(sam=False), tmp_path)
    assert {path.stem for path in written} == {"accuracy_matrix", "accuracy_over_tasks", "loss"}


def test_draw_run_removes_figures_that_no_longer_hold(tmp_path):
    draw_run(make_record(), make_steps(steps=8), tmp_path)
    assert draw_run(make_record(done=0), [], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_records_and_metrics_as_they_were(tmp_path):
    record, steps = make_record(), make_steps(steps=8)
    draw_run(record, steps, tmp_path)
    assert record == make_record()
    assert steps == make_steps(steps=8)


def test_the_same_run_gives_the_same_files(tmp_path):
    for folder in ("one", "other"):
        draw_run(make_record(), make_steps(steps=8), tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()

"""Figures of a study: what stands where, on which scale, and that nothing is drawn over something else."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flatpatch.report.study_figures import (
    CONTROL,
    Row,
    Strip,
    make_forest_figure,
    make_matrices_figure,
    make_slope_figure,
    make_values_figure,
)
from flatpatch.report.verdicts import AS_RECORDED, CORRECT

LONG = "the model is sharper after training than before it, whatever the data set and the seed are"


def row(effect: float | None, half: float | None = 0.5, **changes) -> Row:
    low, high = (None, None) if effect is None or half is None else (effect - half, effect + half)
    given = {"label": "a statement", "kind": CORRECT, "unit": "points", "n": 3, "verdict": "supported"}
    given |= {"direction": "higher", "smallest": 0.25, **changes}
    return Row(effect=effect, low=low, high=high, **given)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in (*axes.get_yticklabels(), *axes.texts)]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Return the texts of a figure that lie on one another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for axes in figure.axes for text in (*axes.get_yticklabels(), *axes.texts)]
    texts += [text for axes in figure.axes if axes.xaxis.get_visible() for text in axes.get_xticklabels()]
    texts += [axes.xaxis.label for axes in figure.axes] + [axes.title for axes in figure.axes]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    return [
        (one, other)
        for k, (one, first) in enumerate(boxes)
        for other, second in boxes[k + 1 :]
        if first.shrunk(0.9, 0.8).overlaps(second.shrunk(0.9, 0.8))
    ]


def test_effects_of_one_unit_share_a_panel_with_their_intervals() -> None:
    figure = make_forest_figure([row(1.0), row(-2.0, 1.0, kind=AS_RECORDED), row(0.1, unit="%", kind=CONTROL)])
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in panels] == ["effect (points)", "effect (%)"]
    bars = [
        line.get_xdata() for line in panels[0].get_lines() if len(line.get_xdata()) == 2 and line.get_linewidth() > 1
    ]
    np.testing.assert_allclose(bars[:2], [[0.5, 1.5], [-3.0, -1.0]])
    low, high = panels[0].get_xlim()
    assert low == -high and high > 3.0
    assert {"+ supported\n+1, n = 3", "+ supported\n−2, n = 3"} <= set(words(figure))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [CORRECT, AS_RECORDED, CONTROL]


def test_an_interval_of_two_seeds_does_not_squash_the_others_and_its_cut_is_said() -> None:
    figure = make_forest_figure([row(1.0), row(1.2), row(1.1), row(1.0, 500.0)])
    assert figure.axes[0].get_xlim()[1] < 20
    assert any("arrows: the interval reaches beyond the edge" in text.get_text() for text in figure.texts)
    whole = make_forest_figure([row(1.0), row(1.2)])
    assert not any("arrows" in text.get_text() for text in whole.texts)


def test_an_effect_without_interval_is_hollow_and_one_without_number_is_said() -> None:
    figure = make_forest_figure([row(1.0, None, n=1, verdict="undecided"), row(None, n=0, verdict="undecided")])
    marks = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() for mark in marks] == ["white"]
    assert "no number" in words(figure) and "undecided\nn = 0" in words(figure)


def test_names_of_any_length_do_not_overlap() -> None:
    rows = [row(0.3 * k, label=LONG if k % 2 else "short", verdict="too small to matter") for k in range(-3, 4)]
    assert overlaps(make_forest_figure([*rows, row(None, label=LONG, unit="eigenvalues")])) == []


def test_matrices_have_one_scale_and_gaps_stay_empty() -> None:
    matrix = np.array([[90.0, np.nan], [80.0, 95.0]])
    figure = make_matrices_figure({"off": matrix, "on": matrix - 10}, ["first", "a-task-with-a-long-name"], title="t")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images[:2]] == [(0, 100), (0, 100)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "80", "95"]
    assert overlaps(figure) == []
    large = make_matrices_figure({"setting": np.eye(11)}, ["t"] * 11, title="t")
    assert len(large.axes[0].texts) == 0  # numbers would be too small to read


def test_values_are_marks_of_seeds_and_scales_are_shared() -> None:
    strips = [
        Strip("before", {"off": [(0, 1.0), (1, 3.0)], "on": [(0, 2.0)]}, scale="eigenvalue"),
        Strip("after", {"off": [(0, 10.0), (1, 20.0)], "on": [(0, 5.0)]}, scale="eigenvalue"),
        Strip("as recorded", {"off": [(0, 700.0)]}, recorded=True, scale="other"),
    ]
    figure = make_values_figure(strips, title="t")
    before, after, recorded = figure.axes[:3]
    assert before.get_xlim() == after.get_xlim() != recorded.get_xlim()
    means = [line.get_xdata()[0] for line in before.get_lines() if len(line.get_xdata()) == 2]
    assert means == [2.0]  # one seed has no mean of its own
    assert before.get_xlim()[0] < 1 and before.get_xlim()[1] > 20


def test_slopes_are_those_of_each_seed() -> None:
    points = [
        {"label": f"seed {seed}", "seed": seed, "x": x, "y": 2.0 * x + seed} for seed in (0, 3) for x in (0, 1, 4)
    ]
    figure = make_slope_figure({CORRECT: points, AS_RECORDED: []}, x_label="log2 rank", y_label="trace", title="t")
    (axes,) = figure.axes
    lines = [line.get_ydata() for line in axes.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(lines, [[0.0, 8.0], [3.0, 11.0]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seed 0", "seed 3"]


@pytest.mark.parametrize("seeds", [1, 5, 12])
def test_legend_of_the_seeds_lies_within_the_figure(seeds: int) -> None:
    points = [{"label": f"seed {seed}", "seed": seed, "x": x, "y": x} for seed in range(seeds) for x in (0, 1)]
    figure = make_slope_figure({CORRECT: points}, x_label="x", y_label="y", title="t")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_arrow_stays_with_the_last_word_of_its_name() -> None:
    for letters in range(1, 40):
        figure = make_forest_figure([row(1.0, label="the name of something " + "s" * letters)])
        (label,) = figure.axes[0].get_yticklabels()
        assert label.get_text().split("\n")[-1].strip() != "▶"


def test_tasks_of_a_seed_have_lines_of_their_own_as_they_are_tested() -> None:
    """Each task rises by 1; of all four points together the line would fall."""
    points = [
        {"label": f"seed 0, {task}", "seed": 0, "x": x, "y": level + x}
        for task, level, places in (("a", 0.0, (3, 4)), ("b", 9.0, (0, 1)))
        for x in places
    ]
    (axes,) = make_slope_figure({CORRECT: points}, x_label="x", y_label="y", title="t").axes
    lines = [line.get_ydata() for line in axes.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(lines, [[3.0, 4.0], [9.0, 10.0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_forest_figure([]),
        lambda: make_matrices_figure({}, [], title="t"),
        lambda: make_values_figure([], title="t"),
        lambda: make_slope_figure({CORRECT: []}, x_label="x", y_label="y", title="t"),
    ],
)
def test_a_figure_of_nothing_is_refused(make) -> None:
    with pytest.raises(ValueError, match="at least one"):
        make()

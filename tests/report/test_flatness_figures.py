"""Figures of flatness: what they hold is checked on the Figure objects, and that landscapes' files are read."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from flatpatch.errors import UserError
from flatpatch.report import flatness_figures
from flatpatch.report.flatness_figures import (
    Grid,
    describe_variation,
    make_connectivity_figure,
    make_contour_figure,
    make_density_figure,
    make_eigenvalues_figure,
    make_landscapes_figure,
    make_layers_figure,
    make_slices_figure,
    make_surface_figure,
    read_grid,
)
from tests.report_page import small_print
from tests.report_records import make_quick_record, make_record


def about(kind="landscape", *, scope="adapter", normalisation="filter", dims=2, **more):
    axes = [
        {
            "label": f"random direction, seed {k}",
            "normalisation": normalisation,
            "seed": k,
            "zero_units": {},
            "skipped": [],
        }
        for k in range(dims)
    ]
    return {"schema": 1, "kind": kind, "scope": scope, "num_parameters": 16384, "axes": axes, "marks": [], **more}


def surface(losses=None, **more):
    x, y = np.linspace(-1, 1, 9), np.linspace(-0.5, 0.5, 7)
    losses = 1 + x[:, None] ** 2 + 2 * y**2 if losses is None else losses
    return Grid(losses, np.ones_like(losses, dtype=bool), (x, y), np.zeros((0, 2)), np.zeros(0), 1.0, about(**more))


def plane():
    grid = surface(normalisation="l2")
    marks = np.array([[-0.8, -0.3], [0.9, -0.3], [0.1, 0.4]])
    return replace(
        grid, marks=marks, mark_losses=np.array([1.0, 2.0, 3.5]), about={**grid.about, "marks": ["a", "b", "c"]}
    )


def line(losses=None, **more):
    x = np.linspace(-1, 1, 11)
    losses = 1 + x**2 if losses is None else losses
    return Grid(
        losses, np.ones_like(losses, dtype=bool), (x,), np.zeros((0, 1)), np.zeros(0), 1.0, about(dims=1, **more)
    )


def connection(space="factor space (A and B)", height=2.0):
    alphas = np.linspace(0, 1, 5)
    grid = line(np.sin(math.pi * alphas) * height + alphas, kind="connectivity", normalisation="", space=space)
    return replace(grid, axes=(alphas,))


SPECTRUM = {"nodes": [[-1.0, 0.0, 3.0], [-1.0, 0.1, 4.0]], "weights": [[0.1, 0.8, 0.1], [0.2, 0.7, 0.1]], "size": 1000}
_BLOCK = {"top_eigenvalue": 2.0, "residual": 0.1, "trace": 3.0, "trace_standard_error": None}
LAYERS = {"layers": {"block.0": _BLOCK, "block.1": {**_BLOCK, "trace": None}}, "factors": {"A": _BLOCK, "B": _BLOCK}}
EIGENVALUES = {"values": [4.0, 2.0, -1.0], "residuals": [0.1, 0.2, 0.3], "converged": [True, True, False]}

MAKERS = {
    "contour": lambda record=None: make_contour_figure(surface(), record=record),
    "plane": lambda record=None: make_contour_figure(plane(), record=record),
    "surface": lambda record=None: make_surface_figure(surface(), record=record),
    "slices": lambda record=None: make_slices_figure({"after task 1": line()}, record=record),
    "connectivity": lambda record=None: make_connectivity_figure({"1 to 2": connection()}, record=record),
    "layers": lambda record=None: make_layers_figure({"after": LAYERS}, scope="adapter", record=record),
    "density": lambda record=None: make_density_figure({"after": SPECTRUM}, scope="adapter", record=record),
    "eigenvalues": lambda record=None: make_eigenvalues_figure({"after": EIGENVALUES}, scope="adapter", record=record),
}


def named_models(axes):
    """Return the texts beside the models; a contour's number has no colon."""
    return [text.get_text() for text in axes.texts if ":" in text.get_text()]


def legend(figure):
    owners = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [" ".join(text.get_text().split()) for owner in owners for text in owner.get_texts()]


@pytest.mark.parametrize("name", set(MAKERS) - {"connectivity"})
def test_every_figure_says_what_was_varied(name):
    assert "LoRA factors A and B" in small_print(MAKERS[name]())


@pytest.mark.parametrize("name", MAKERS)
def test_every_figure_of_a_run_names_it_and_warns(name):
    below = small_print(MAKERS[name](make_record()))
    assert "nlora, order 1, SAM rho=0.05" in below
    assert "comparable" not in below
    assert "QUICK AND REFERENCE RUN, not comparable" in small_print(MAKERS[name](make_quick_record()))


@pytest.mark.parametrize("name", MAKERS)
def test_every_figure_is_written_and_nothing_is_cut_off(name, tmp_path):
    figure = MAKERS[name](make_quick_record())
    figure.savefig(tmp_path / "figure.png", dpi=100)
    picture = imread(tmp_path / "figure.png")[..., :3]
    assert np.ptp(picture) > 0.5
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 1).all()


# Landscapes


def test_contours_have_the_first_direction_across():
    figure = make_contour_figure(surface())
    axes = figure.axes[0]
    assert axes.get_xlim() == (-1, 1)
    assert axes.get_ylim() == (-0.5, 0.5)
    assert axes.get_xlabel() == "random direction, seed 0"
    assert axes.get_ylabel() == "random direction, seed 1"
    assert axes.get_title() == "1 to 2.5; at the weights (+) 1"


def test_models_are_drawn_at_their_coordinates_with_their_losses():
    figure = make_contour_figure(plane())
    axes = figure.axes[0]
    drawn = {tuple(map(float, drawn.get_xydata()[0])) for drawn in axes.get_lines()}
    assert {(-0.8, -0.3), (0.9, -0.3), (0.1, 0.4)} <= drawn
    assert named_models(axes) == ["a: 1", "b: 2", "c: 3.5"]
    assert axes.get_aspect() == 1
    assert "plane through a, b, c" in small_print(figure)
    assert axes.get_xlabel().endswith("(weight units)")


def test_names_of_models_stay_inside_the_axes():
    figure = make_contour_figure(plane())
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 <= extent.x1 <= box.x1


def test_levels_are_logarithmic_where_losses_span_orders_of_magnitude():
    x = np.linspace(-1, 1, 9)
    wide = make_contour_figure(surface(10.0 ** (3 * x[:, None] ** 2 + 0 * np.zeros(7))))
    levels = wide.axes[0].collections[0].levels
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    levels = make_contour_figure(surface()).axes[0].collections[0].levels
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0])


def filled(axes):
    return axes.collections[0]


def test_landscapes_side_by_side_have_the_same_levels_and_colours():
    low, high = surface(), surface(3 * surface().losses)
    figure = make_landscapes_figure({"before": high, "after": low})
    before, after, bar = figure.axes
    np.testing.assert_array_equal(filled(before).levels, filled(after).levels)
    assert filled(before).get_clim() == filled(after).get_clim() == (1, 7.5)
    assert after.get_title() == "after\n1 to 2.5; at the weights (+) 1"
    assert before.get_title().startswith("before\n3 to 7.5")
    assert bar.get_label() == "<colorbar>"


def test_a_panel_that_few_common_levels_cross_has_labelled_contours_of_its_own():
    x, y = np.linspace(-1, 1, 9), np.linspace(-0.5, 0.5, 7)
    flat = surface(1.2 + 0.34 * (x[:, None] ** 2 + 4 * y**2) / 2)
    steep = surface(0.5 + 20 * (x[:, None] ** 2 + 4 * y**2))
    figure = make_landscapes_figure({"before": flat, "after": steep})
    before, after, _ = figure.axes
    np.testing.assert_array_equal(filled(before).levels, filled(after).levels)
    (own,) = [each for each in before.collections if each.get_linestyle() and len(each.levels) < 10]
    np.testing.assert_allclose(own.levels, [1.25, 1.3, 1.35, 1.4, 1.45, 1.5])
    numbers = {float(text.get_text()) for text in before.texts}
    assert len(numbers) >= 3 and numbers <= set(own.levels.round(10))
    assert "dashed: levels of that panel alone" in small_print(figure)
    assert all(len(each.levels) == len(filled(after).levels) for each in after.collections)


@pytest.mark.parametrize("flat", [surface(np.full((9, 7), 1.2)), surface()])
def test_a_panel_without_slope_or_with_levels_enough_has_none_of_its_own(flat):
    figure = make_landscapes_figure({"before": flat, "after": surface(2 * surface().losses)})
    assert "dashed" not in small_print(figure)


def test_headings_of_three_landscapes_side_by_side_do_not_meet():
    whens = ("before", "after", "measured afterwards")
    figure = make_landscapes_figure({when: surface(1.2345 * surface().losses) for when in whens})
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes[:3]]
    for left, right in zip(boxes, boxes[1:], strict=False):
        assert left.x1 + 5 < right.x0


def test_contour_lines_have_their_numbers():
    axes = make_contour_figure(surface()).axes[0]
    numbers = [float(text.get_text()) for text in axes.texts]
    assert len(numbers) >= 4
    assert all(any(math.isclose(number, level, rel_tol=6e-3) for level in filled(axes).levels) for number in numbers)


def test_a_coarse_grid_is_drawn_finely_and_says_what_was_measured(monkeypatch):
    """A cubic is its own interpolation, between the points too."""
    drawn = {}
    x, y = np.linspace(-1, 1, 9), np.linspace(-0.5, 0.5, 7)
    grid = surface(3 + x[:, None] ** 3 + y**2)
    monkeypatch.setattr(
        "matplotlib.axes.Axes.contour", lambda axes, *data, **_: drawn.update(zip("xyz", data, strict=True))
    )
    monkeypatch.setattr("matplotlib.axes.Axes.clabel", lambda *_, **__: None)
    figure = make_contour_figure(grid)
    assert min(drawn["z"].shape) >= 25
    np.testing.assert_allclose(drawn["z"].T, 3 + drawn["x"][:, None] ** 3 + drawn["y"] ** 2, atol=1e-9)
    assert "9 x 7 points measured (dots), cubic interpolation between them" in small_print(figure)
    dots = next(each for each in figure.axes[0].get_lines() if each.get_marker() == ".")
    assert len(dots.get_xdata()) == 63


def test_interpolation_never_leaves_the_range_of_what_was_measured():
    losses = np.ones((9, 7))
    losses[4, 3] = 2.0  # around a single peak a cubic swings below its neighbours
    grid = surface(losses)
    _, _, fine = flatness_figures._refined(grid, logarithmic=False)
    assert (fine.min(), fine.max()) == (1, 2)
    assert fine.shape == (51, 51)


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_grid_with_missing_cells_is_not_interpolated(missing):
    losses = surface().losses.copy()
    losses[2, 2] = missing
    figure = make_contour_figure(surface(losses))
    assert "interpolation" not in small_print(figure)
    assert "9 x 7 points measured" in small_print(figure)


def test_a_grid_of_25_points_a_side_is_drawn_as_it_is():
    axis = np.linspace(-1, 1, 25)
    grid = replace(surface(1 + axis[:, None] ** 2 + axis**2), axes=(axis, axis))
    assert flatness_figures._refined(grid, logarithmic=False)[2].shape == (25, 25)
    assert "interpolation" not in small_print(make_contour_figure(grid))


def test_no_legend_covers_a_spectrum():
    for figure in (
        make_density_figure({"after": SPECTRUM, "b": SPECTRUM}),
        make_eigenvalues_figure({"a": EIGENVALUES}),
    ):
        figure.draw_without_rendering()
        (box,) = [each.get_window_extent() for each in figure.legends]
        assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


@pytest.mark.parametrize("name", MAKERS)
def test_every_title_is_short_black_and_of_nine_points(name):
    title = MAKERS[name](make_quick_record())._suptitle
    assert "\n" not in title.get_text() and len(title.get_text()) < 50
    assert (title.get_fontsize(), title.get_color()) == (9, "black")


def test_cells_that_are_not_finite_are_counted_and_not_filled_in():
    losses = surface().losses.copy()
    losses[0, 0], losses[1, 1], losses[1, 2], losses[4, 4] = math.nan, math.inf, math.inf, math.nan
    grid = surface(losses)
    grid.done[4, 4] = False
    figure = make_contour_figure(grid)
    assert legend(figure) == ["cells: 1 NaN, 2 infinite, 1 not evaluated"]
    symbols = [drawn.get_marker() for drawn in figure.axes[0].get_lines()]
    assert (symbols.count("x"), symbols.count("^")) == (1, 2)
    np.testing.assert_array_equal(grid.losses, losses)
    make_surface_figure(grid).canvas.draw()


@pytest.mark.parametrize("value", [0.0, 2.5, math.nan, math.inf])
def test_a_landscape_of_one_value_can_be_drawn(value):
    for make in (make_contour_figure, make_surface_figure):
        make(surface(np.full((9, 7), value))).canvas.draw()


def test_slices_mark_infinite_and_nan_cells():
    losses = line().losses.copy()
    losses[0], losses[3] = math.inf, math.nan
    figure = make_slices_figure({"after task 1": line(losses)})
    assert legend(figure) == ["after task 1", "infinite (1)", "NaN (1)"]
    assert np.isnan(figure.axes[0].get_lines()[0].get_ydata()[[0, 3]]).all()


def test_slices_of_different_things_say_so_line_by_line():
    figure = make_slices_figure({"one": line(), "other": line(normalisation="l2")})
    assert legend(figure) == [
        "one: LoRA factors A and B (16,384 weights); filter-normalised (rows of A, columns of B)",
        "other: LoRA factors A and B (16,384 weights); direction of unit length",
    ]


def test_directions_that_are_zero_by_construction_are_named():
    varied = about(dims=1)
    varied["axes"][0]["zero_units"] = {"q.lora_B": 8, "v.lora_B": 8}
    varied["axes"][0]["skipped"] = ["bias"]
    words = describe_variation(varied)
    assert "16 units have zero weights and do not move along random direction, seed 0" in words
    assert "1 biases and norm weights held fixed" in words


def test_connectivity_names_the_space_and_the_barrier_of_each_line():
    figure = make_connectivity_figure({"a": connection(), "b": connection("merged space (W + s B A)", 0.5)})
    assert legend(figure) == [
        "a: factor space (A and B), 16,384 weights, barrier 2",
        "b: merged space (W + s B A), 16,384 weights, barrier 0.5",
    ]


def test_connectivity_of_a_line_with_a_nan_has_no_barrier():
    grid = connection()
    grid.losses[2] = math.nan
    assert "barrier not finite" in legend(make_connectivity_figure({"a": grid}))[0]


# Spectra


def test_density_integrates_to_one_and_states_its_kernel():
    figure = make_density_figure({"after": SPECTRUM}, kernel=0.02)
    (drawn,) = [each for each in figure.axes[0].get_lines() if each.get_label().startswith("after")]
    x, y = drawn.get_data()
    assert float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x))) == pytest.approx(1, abs=1e-3)
    assert "standard deviation 0.1 (above)" in small_print(figure)  # 0.02 times 4 - (-1)
    assert "2 probes x 3 steps" in small_print(figure)
    assert legend(figure) == ["after (1,000 eigenvalues)"]


def test_counts_beyond_a_value_are_the_quadratures_own():
    figure = make_density_figure({"after": SPECTRUM})
    x, y = next(each for each in figure.axes[1].get_lines() if each.get_label() == "_after").get_data()
    for value, count in ((-0.5, 150), (1.0, 100), (3.5, 50), (0.05, 450)):
        assert y[np.argmin(np.abs(x - value))] == pytest.approx(count)


def test_eigenvalues_that_did_not_converge_are_crossed_out():
    figure = make_eigenvalues_figure({"after": EIGENVALUES, "none": {**EIGENVALUES, "converged": [False] * 3}})
    crosses = [each for each in figure.axes[0].get_lines() if each.get_marker() == "x"]
    assert [len(each.get_xdata()) for each in crosses] == [1, 3]
    assert legend(figure) == ["after", "none"]
    assert "crossed out: not converged" in small_print(figure)


def around_tasks(count):
    """Return a place for each measurement before and after some tasks."""
    return {f"{k + 1} task, {when}": (k, when) for k in range(count) for when in ("before", "after")}


def series(make, count):
    """Return a figure of measurements around some tasks, and its line for each by name."""
    places = around_tasks(count)
    content = EIGENVALUES if make is make_eigenvalues_figure else line()
    figure = make(dict.fromkeys(places, content), places=places)
    return figure, {each.get_label(): each for each in figure.axes[0].get_lines() if each.get_label() in places}


@pytest.mark.parametrize("make", [make_eigenvalues_figure, make_slices_figure])
def test_a_task_keeps_its_colour_and_marker_and_shares_them_with_no_other(make):
    _, lines = series(make, 20)
    looks = [[(lines[f"{k + 1} task, {when}"]) for when in ("before", "after")] for k in range(20)]
    pairs = [{(each.get_color(), each.get_marker()) for each in own} for own in looks]
    assert all(len(own) == 1 for own in pairs)
    assert len(set.union(*pairs)) == 20
    for before, after in looks:
        assert before.get_markerfacecolor() == "white" != after.get_markerfacecolor()


def test_the_legend_of_slices_shows_which_line_is_dashed():
    figure, lines = series(make_slices_figure, 5)
    (drawn,) = figure.legends
    handles = dict(zip(legend(figure), drawn.get_lines(), strict=True))
    for name, each in lines.items():
        assert handles[name].get_linestyle() == each.get_linestyle() == ("--" if "before" in name else "-")
        pattern = sum(each._dash_pattern[1] or [0])
        assert drawn.handlelength * 8 >= 1.5 * pattern  # two dashes and the gap between them


@pytest.mark.parametrize("make", [make_eigenvalues_figure, make_slices_figure])
def test_the_name_of_an_axis_stands_clear_of_the_legend(make):
    figure, _ = series(make, 5)
    figure.draw_without_rendering()
    (box,) = [each.get_window_extent() for each in figure.legends]
    assert figure.axes[0].xaxis.label.get_window_extent().y0 - box.y1 >= 4 * figure.dpi / 72


def test_negative_eigenvalues_are_shown():
    axes = make_eigenvalues_figure({"after": EIGENVALUES}).axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] < -1.3


# Files and bad arguments


def write(path, grid, **changes):
    arrays = {
        "losses": grid.losses,
        "done": grid.done,
        "marks": grid.marks,
        "mark_losses": grid.mark_losses,
        "origin_loss": np.array(grid.origin_loss),
        "about": np.array(json.dumps(grid.about)),
        **{f"axis_{k}": axis for k, axis in enumerate(grid.axes)},
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})


def test_a_measured_landscape_is_read_and_drawn(tmp_path):
    torch = pytest.importorskip("torch")
    from flatpatch.flatness.connectivity import linear_connectivity
    from flatpatch.flatness.directions import random_direction
    from flatpatch.flatness.landscape import landscape, plane_landscape
    from tests.flatness_lora import make_model, make_problem

    problem = make_problem(make_model())
    points = [torch.randn(problem.size).double() for _ in range(3)]
    axes = [np.linspace(-1, 1, 3)] * 2
    landscape(problem, [random_direction(problem, seed=k) for k in (0, 1)], axes, path=tmp_path / "grid.npz")
    plane_landscape(problem, dict(zip("abc", points, strict=True)), points=3, path=tmp_path / "plane.npz")
    result = linear_connectivity(problem, *points[:2], points=5, path=tmp_path / "line.npz")
    make_contour_figure(read_grid(tmp_path / "grid.npz")).canvas.draw()
    drawn = make_contour_figure(read_grid(tmp_path / "plane.npz")).axes[0]
    assert [text[:2] for text in named_models(drawn)] == ["a:", "b:", "c:"]
    figure = make_connectivity_figure({"line": read_grid(tmp_path / "line.npz")})
    assert f"barrier {result.barrier:.3g}" in legend(figure)[0]


def test_a_file_that_is_no_landscape_is_refused(tmp_path):
    path = tmp_path / "grid.npz"
    with pytest.raises(UserError, match="is not a landscape's file"):
        read_grid(path)
    path.write_bytes(b"PK\x03\x04cut off")
    with pytest.raises(UserError, match="is not a landscape's file"):
        read_grid(path)
    write(path, surface(), done=None)
    with pytest.raises(UserError, match="is not a landscape's file"):
        read_grid(path)
    write(path, surface(), about=np.array(json.dumps({"schema": 99})))
    with pytest.raises(UserError, match="has schema 99, this version reads 1"):
        read_grid(path)


def test_bad_arguments_are_refused():
    for call, message in [
        (lambda: make_contour_figure(line()), "at least 2 x 2"),
        (lambda: make_surface_figure(line()), "at least 2 x 2"),
        (lambda: make_slices_figure({"a": surface()}), "a is not one-dimensional"),
        (lambda: make_slices_figure({}), "at least one"),
        (lambda: make_connectivity_figure({}), "at least one"),
        (lambda: make_density_figure({}), "at least one"),
        (lambda: make_eigenvalues_figure({}), "at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_layers_are_named_without_the_modules_that_they_all_lie_in():
    layers = {"model.encoder.block.0": _BLOCK, "model.encoder.block.1": _BLOCK, "model.decoder.block.0": _BLOCK}
    axes = make_layers_figure({"after": {"layers": layers, "factors": {"A": _BLOCK}}}).axes
    labels = [label.get_text() for label in axes[1].get_xticklabels()]
    assert labels == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "all A"]


def test_layers_stand_beside_the_factors_with_their_errors_and_gaps_where_nothing_was_found():
    axes = make_layers_figure({"after": LAYERS, "before": {**LAYERS, "factors": {}}}).axes
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["block.0", "block.1", "all A", "all B"]
    shown = {line.get_label(): line.get_ydata() for line in axes[1].get_lines()}
    np.testing.assert_array_equal(shown["after"], [3.0, np.nan, 3.0, 3.0])
    np.testing.assert_array_equal(shown["before"], [3.0, np.nan, np.nan, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        make_layers_figure({})

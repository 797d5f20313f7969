"""What all figures share: nothing covers anything else, and nothing is cut."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from flatpatch.report.drawing import BELOW, constant, finish, printed, remove, save
from tests.report_page import small_print
from tests.report_records import make_quick_record, make_record

LONG_NOTE = "QUICK AND REFERENCE AND OFF-PROTOCOL RUN, not comparable with the paper's numbers. " * 3


def make_figure(width: float = 5.0) -> Figure:
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    for k in range(4):
        axes.plot([0, 1], [k, k + 1], label=f"line {k}")
    axes.set_xlabel("a label below the axes")
    figure.legend(**BELOW, ncols=2)
    return finish(figure, "A title", [LONG_NOTE, ""], record=make_quick_record())


@pytest.mark.parametrize("width", [3.2, 5.0, 9.0])
def test_title_axes_legend_and_small_print_stand_below_one_another_inside_the_figure(width: float) -> None:
    figure = make_figure(width)
    figure.draw_without_rendering()
    title, note = (next(t for t in figure.texts if (t.get_text() == "A title") == first) for first in (True, False))
    boxes = [
        title.get_window_extent(),
        figure.axes[0].get_tightbbox(),
        figure.legends[0].get_window_extent(),
        note.get_window_extent(),
    ]
    for box in boxes:
        assert box is not None
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    for above, below in zip(boxes, boxes[1:], strict=False):
        assert above is not None and below is not None and above.y0 >= below.y1 - 0.5


def test_small_print_has_all_notes_and_names_the_run_and_no_title() -> None:
    text = small_print(make_figure())
    assert text.startswith(LONG_NOTE.strip())
    assert "nlora, order 1" in text and text.endswith(
        "QUICK AND REFERENCE RUN, not comparable with the paper's numbers"
    )
    assert "A title" not in text


def test_run_that_may_be_compared_has_no_warning() -> None:
    figure = finish(Figure(layout="constrained"), "", record=make_record())
    assert "comparable" not in small_print(figure)
    assert figure.get_suptitle() == ""


def test_files_are_a_picture_and_vectors_the_same_each_time_and_can_be_removed(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        written = save(make_figure(), tmp_path / folder / "v1.5", dpi=80)
        assert [path.name for path in written] == ["v1.5.png", "v1.5.pdf"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert written[0].read_bytes().startswith(b"\x89PNG") and written[1].read_bytes().startswith(b"%PDF-")
    remove(tmp_path / "one" / "v1.5")
    remove(tmp_path / "one" / "v1.5")
    assert list((tmp_path / "one").iterdir()) == []


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_figure_drawn_once_has_the_bytes_that_savefig_writes(kind: str) -> None:
    with rc_context({"svg.hashsalt": "figure"}):
        ours, theirs = io.BytesIO(), io.BytesIO()
        metadata = {"CreationDate": None} if kind == "pdf" else {"Date": None} if kind == "svg" else {}
        printed(make_figure(), ours, kind, dpi=123, metadata=metadata)
        make_figure().savefig(theirs, format=kind, dpi=123, metadata=metadata)
    assert ours.getvalue() == theirs.getvalue()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.05, 0.05 + 1e-9], 0.05),
        ([0.05, math.nan, 0.05], 0.05),
        ([-2.0, -2.001], -2.0005),
        ([0.0, 0.0], 0.0),
        ([1.0, 1.01], None),
        ([0.0, 1e-12], None),
        ([math.nan], None),
        ([], None),
    ],
)
def test_constant_is_what_varies_by_less_than_a_thousandth(values: list[float], expected: float | None) -> None:
    assert constant(values) == (expected if expected is None else pytest.approx(expected))

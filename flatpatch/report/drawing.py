"""What all figures share: colours, a short title, small print below, and how they are saved.

Colours are Okabe and Ito's, told apart by most colour-blind readers, and never the only difference between two lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from flatpatch.report.titles import describe, short_warning

FloatArray = NDArray[np.float64]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A5C00")
# Of accuracies, from 0 to 100: light enough for dark letters at every level.
HEAT = LinearSegmentedColormap.from_list("heat", ["#fffaf0", "#6eaee0"])
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TITLE_SIZE = 9.0
NOTE_SIZE = 7.0
# A figure's legend, below the axes, where no line runs; ``finish`` makes room for it.
# Its lines are long enough to show two dashes.
BELOW: Mapping[str, Any] = {"loc": "lower center", "fontsize": 8, "frameon": False, "handlelength": 3.4}
# Around what was drawn: before a task its marks are hollow and its lines dashed.
_LINES = {"before": "--", "at_loss": "-.", "finished": ":"}
# Beside each PNG a file whose lines stay lines.
SUFFIXES = (".png", ".pdf")
# What varies by less than this share of its largest value would be drawn as a straight line.
CONSTANT = 1e-3
_CANVASES = {"png": FigureCanvasAgg, "pdf": FigureCanvasPdf, "svg": FigureCanvasSVG}
# Between a legend and what stands above it, in points.
_GAP = 8


def finish(figure: Figure, title: str, notes: Iterable[str] = (), *, record: Mapping[str, Any] | None = None) -> Figure:
    """Head a figure with a short title, and say below it in small print what was drawn and of which run.

    To be called last: a legend of the figure's own is put between the axes and the small print.

    Args:
        figure: With the constrained layout.
        title: A few words; empty for none.
        notes: Sentences for below; empty ones are left out.
        record: Of the run that is shown: named, with the reason why it must not be compared with a paper's numbers.

    Returns:
        The figure.
    """
    width, height = figure.get_size_inches()
    texts = [note for note in notes if note]
    if record is not None:
        texts += [text for text in (describe(record), short_warning(record)) if text]
    if title:
        figure.suptitle(title, fontsize=TITLE_SIZE, color="black")
    columns = int(width * 72 / (0.62 * NOTE_SIZE))  # the width of a character where many are capitals
    lines = [line for text in texts for line in textwrap.wrap(text, columns)]
    share = 0.0
    if lines:
        share = (1.35 * NOTE_SIZE * len(lines) + 6) / (72 * height)
        place = 4 / (72 * width), 3 / (72 * height)
        figure.text(*place, "\n".join(lines), fontsize=NOTE_SIZE, color="0.3", va="bottom")
    if figure.legends:
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, share, 1, 1 - share), figure.transFigure)
        renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        heights = [legend.get_window_extent(renderer).height for legend in figure.legends]
        share += max(heights) / figure.bbox.height + _GAP / (72 * height)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, share, 1, 1 - share))
    for axes in figure.axes:
        if axes.name != "3d" and axes.get_label() != "<colorbar>":
            axes.spines[["top", "right"]].set_visible(False)
    _freeze(figure)
    return figure


def look(number: int, when: str = "") -> dict[str, Any]:
    """Return how to draw one of many series, so that no two of 49 have both colour and marker in common.

    Args:
        number: Which series, or which task.
        when: When it was measured: ``before`` is hollow and dashed, ``at_loss`` and ``finished`` half filled.
    """
    colour, turn = COLOURS[number % len(COLOURS)], number // len(COLOURS)
    half = {"markerfacecoloralt": "white"}
    fill = {
        "before": {"markerfacecolor": "white"},
        "at_loss": {**half, "fillstyle": "bottom"},
        "finished": {**half, "fillstyle": "left"},
    }
    return {
        "color": colour,
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": _LINES.get(when, "-"),
        **fill.get(when, {}),
    }


def _freeze(figure: Figure) -> None:
    """Lay the figure out for good: each time anew, the places of its axes would differ in their last bits."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(part, 6) for part in axes.get_position(original=True).bounds)
        axes.set_position((left, bottom, width, height), which="original")


def save(figure: Figure, path: Path, *, dpi: int) -> list[Path]:
    """Write a figure as PNG and as PDF.

    Args:
        figure: What to write.
        path: Without suffix.
        dpi: Of the PNG.

    Returns:
        The files. The same figure gives the same bytes.
    """
    written = [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    printed(figure, written[0], "png", dpi=dpi)
    with rc_context({"pdf.fonttype": 42}):  # letters stay letters
        printed(figure, written[1], "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return written


def printed(figure: Figure, target: Path | IO[bytes], kind: str, *, dpi: int | None = None, **options: Any) -> None:
    """Write a figure that ``finish`` laid out: what ``savefig`` writes, drawn once where that draws it twice.

    Args:
        figure: What to write.
        target: Where to.
        kind: ``png``, ``pdf`` or ``svg``.
        dpi: None: the figure's own.
        options: Of matplotlib's canvas for the kind.
    """
    before = figure.dpi
    canvas = _CANVASES[kind](figure)
    try:
        figure.dpi = dpi or before
        getattr(canvas, f"print_{kind}")(target, **options)
    finally:
        figure.dpi = before


def remove(path: Path) -> None:
    """Remove a figure that ``save`` wrote, where it is there."""
    for suffix in SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def not_drawn(values: Mapping[str, float]) -> str:
    """Return a sentence on measurements without a panel of their own, by their names in words; empty for none."""
    said = "; ".join(f"{name} = {value:.4g}" for name, value in values.items())
    return f"Not drawn, since constant to a thousandth: {said}." if said else ""


def constant(values: Sequence[float] | FloatArray) -> float | None:
    """Return the one value that all finite numbers are, but for a thousandth; None where they vary or are none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    return (low + high) / 2 if high - low <= CONSTANT * max(abs(low), abs(high)) else None

"""A run's figures: what they show is in its record already, so one that cannot be drawn costs nothing but a warning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.report.figures import draw_run
from flatpatch.report.flatness_run import draw_flatness
from flatpatch.report.records import read_step_metrics
from flatpatch.terminal import say


def leave_figures(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Draw all figures of a finished run; where that fails, say so and let the run count.

    Returns:
        The files; none where the drawing failed.
    """

    def draw() -> list[Path]:
        drawn = draw_run(record, read_step_metrics(folder / "metrics.jsonl"), folder / "figures")
        return [*drawn, *draw_flatness(record, folder)]

    return or_warn(folder, draw)


def or_warn(folder: Path, draw: Callable[[], Sequence[Path]]) -> list[Path]:
    """Return the files of a run that ``draw`` makes; none, and one warning, where it fails."""
    try:
        return list(draw())
    except Exception as error:
        print(
            f"WARNING: not every figure in {folder / 'figures'} was drawn, the run is whole: "
            f"{type(error).__name__}: {error}. To try again: python -m flatpatch report run={folder}",
            flush=True,
        )
        return []


def tell_figures(written: Sequence[Path]) -> None:
    """Say where figures are, folder by folder: a list of all of them would hide what else was said."""
    for folder in dict.fromkeys(path.parent for path in written):
        count = sum(path.parent == folder for path in written)
        say(f"figures  {folder}/ ({count} file{'s' if count > 1 else ''})")

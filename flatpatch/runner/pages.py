"""The HTML page about runs: written when ``report`` asks for it, and left by ``run`` and ``sweep`` when they end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatpatch.comparison import compare_runs
from flatpatch.errors import UserError
from flatpatch.files import write_atomically
from flatpatch.progress import Progress
from flatpatch.report.groups import Group, Run, group_runs, read_run
from flatpatch.report.page import make_page, work
from flatpatch.terminal import say

PAGE = "report.html"


def place_of(folders: Sequence[Path]) -> Path:
    """Return where a page goes: into the run's folder, or into the one that holds the first of several runs."""
    return (folders[0] if len(folders) == 1 else folders[0].parent) / PAGE


def write_page(folders: Sequence[Path], page: Path, unreadable: Sequence[str] = ()) -> None:
    """Write one page about some runs.

    Args:
        folders: The runs' folders, at least one.
        page: The file to write.
        unreadable: A sentence for each other run that could not be read.

    Raises:
        UserError: If none of the runs can be read.
        DiskFull: If the disk is full.
    """
    runs: list[Run] = []
    problems = list(unreadable)
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            problems.append(str(error))
    if not runs:
        raise UserError.collect(problems)
    groups = group_runs(runs)
    total, done = work(groups), 0
    with Progress("page", "figure") as shown:

        def advance() -> None:
            nonlocal done
            done += 1
            shown.update("", done, total)

        text = make_page(groups, comparisons=_comparisons(groups), unreadable=problems, advance=advance)
    replaces = page.exists()
    write_atomically(page, text)
    say(f"page     {page}" + (" (in place of the one that was there)" if replaces else ""))


def leave_page(folders: Sequence[Path]) -> None:
    """Write the page of runs that have ended; where that fails, say so and let the runs count."""
    page = place_of(folders)
    try:
        write_page(folders, page)
    except Exception as error:
        again = f"python -m flatpatch report run={','.join(map(str, folders))}"
        print(
            f"WARNING: the page {page} was not written, the runs are whole: {type(error).__name__}: {error}. "
            f"To try again: {again}",
            flush=True,
        )


def _comparisons(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Compare each finished group with what upstream published of such runs; by the group's letter."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        if not group.is_finished:
            found[group.letter] = {"refused": "no run of this setting is finished."}
            continue
        try:
            found[group.letter] = compare_runs(
                [run.record for run in group.counted], names=[run.name for run in group.counted]
            )
        except UserError as error:
            found[group.letter] = {"refused": str(error)}
    return found

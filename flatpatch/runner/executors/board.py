"""How far several runs are: a table on a terminal, and a plain line now and then where the words go into a file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.live import Live
from rich.table import Table
from rich.text import Text

from flatpatch.families.base import Plan
from flatpatch.progress import Progress, drawing_console, in_words
from flatpatch.terminal import say

SECONDS_OF_A_DRAWING = 1.0


def in_time(seconds: float | None) -> str:
    """Return a duration as one says it; empty where it is not known.

    >>> in_time(40), in_time(400), in_time(40_000)
    ('about 40 s', 'about 7 min', 'about 11.1 h')
    """
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 2 * 3600 else f"about {seconds / 3600:.1f} h"


@dataclass(frozen=True)
class State:
    """Where a run is; empty words where it has not said so yet."""

    doing: str = ""
    loss: str = ""


def state_of(plan: Plan) -> State:
    """Return where a run is, as the process of its last stage that has begun tells it."""
    for stage in reversed(plan.stages):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            path = plan.folder / "tasks" / stage.folder / "progress.json"
            told = json.loads(path.read_text(encoding="utf-8"))
            steps = f"{told['step']}/{told['total']}" if told.get("total") else ""
            words = (in_words(told["phase"]), str(told.get("task") or ""), steps)
            loss = "" if told.get("loss") is None else f"{told['loss']:.3f}"
            return State(" ".join(filter(None, words)), loss)
    return State()


class Board:
    """Shows on stderr how far several runs are.

    Args:
        title: What they are the runs of.
        total: How many they are.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        console = drawing_console()
        # No thread that draws by itself: it would be there when a process forks.
        self._live = None if console is None else Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._lines = Progress(title, "run", draws=False)
        self._drawn = 0.0

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self, running: Sequence[tuple[Plan, float]], done: int, failures: Sequence[str], left: float | None
    ) -> None:
        """Say how far they are; to be called often.

        Args:
            running: The runs at work, and when each began on the monotonic clock.
            done: How many have ended, well or not.
            failures: A sentence for each that failed.
            left: The seconds that the whole still takes, where that is known.
        """
        now = time.monotonic()
        if now - self._drawn < SECONDS_OF_A_DRAWING and (done < self._total or self._live is None):
            return
        self._drawn = now
        states = [state_of(plan) for plan, _ in running]
        waiting = f"{in_time(left)} left" if left is not None and done < self._total else ""
        if self._live is None:
            losses = ", ".join(state.loss for state in states if state.loss)
            count = f"{len(running)} running" + (f" (loss {losses})" if losses else "")
            failed = f"{len(failures)} failed" if failures else ""
            self._lines.update("", done, self._total, ", ".join(filter(None, (count, failed, waiting))))
            return
        rows = [
            (plan.folder.name, state, f"{now - began:.0f} s")
            for (plan, began), state in zip(running, states, strict=True)
        ]
        counts = f"{done - len(failures)} done, {len(running)} running, {len(failures)} failed of {self._total}"
        self._live.update(table(", ".join(filter(None, (f"{self._title}: {counts}", waiting))), rows, failures))
        self._live.refresh()

    def tell(self, text: str) -> None:
        """Print a line that is no result, above the table."""
        if self._live is None:
            say(text)
        else:
            self._live.console.print(text, markup=False, highlight=False)


def table(title: str, running: Sequence[tuple[str, State, str]], failures: Sequence[str]) -> Table:
    """Return the table: a line for each run at work, and one for each that failed."""
    shown = Table(title=Text(title), title_justify="left", show_edge=False, box=None)
    for heading in ("run", "at", "loss", "for"):
        shown.add_column(heading, overflow="fold")
    for name, state, seconds in running:
        shown.add_row(Text(name), Text(state.doing or "starting"), state.loss, seconds)
    for failure in failures:
        name, _, reason = failure.partition(": ")
        shown.add_row(Text(name), Text(f"failed: {reason}"), "", "")
    return shown

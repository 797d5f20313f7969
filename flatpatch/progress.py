"""How far long work is: a bar on a terminal, and a plain line now and then where the words go into a file."""

from __future__ import annotations

import sys
import time

from rich import progress as rich
from rich.console import Console

from flatpatch.terminal import is_quiet, say

# The parts of a run as the processes that do them write it, and as they are shown. What comes after the first word,
# such as "before" of "measure before", stays.
_PHASES = {"train": "training", "predict": "predicting", "measure": "measuring"}
# Between two plain lines: at first, and once the work has taken long.
SECONDS = 10.0
MOST_SECONDS = 60.0
# Between two drawings of a bar, unless there is more to say than another count.
SECONDS_OF_A_DRAWING = 0.1


def in_words(phase: str) -> str:
    """Return how a part of a run is shown.

    >>> in_words("predict"), in_words("measure before")
    ('predicting', 'measuring before')
    """
    first, space, rest = phase.partition(" ")
    return f"{_PHASES.get(first, first)}{space}{rest}"


def drawing_console() -> Console | None:
    """Return the terminal to draw on; None where nobody looks, or where it cannot draw."""
    if is_quiet() or not sys.stderr.isatty():
        return None
    console = Console(file=sys.stderr)
    return console if console.is_interactive else None


class Progress:
    """Shows one piece of work on stderr.

    Args:
        title: What the work is.
        unit: What is counted.
        leave: Whether the bar stays when the work has ended.
        draws: Whether there is a bar on a terminal; without it there are plain lines there too.
    """

    def __init__(self, title: str, unit: str, *, leave: bool = False, draws: bool = True) -> None:
        self._title, self._unit = title, unit
        self._part: tuple[str, int | None] = ("starting", None)  # of the work, and how many units it has
        self._began = self._said = time.monotonic()
        self._drawn = 0.0
        self._bar = self._make_bar(leave) if draws else None

    def _make_bar(self, leave: bool) -> rich.Progress | None:
        """Return the bar; None where nothing can be drawn."""
        if (console := drawing_console()) is None:
            return None
        return rich.Progress(
            rich.TextColumn("{task.description}:", markup=False),
            rich.TaskProgressColumn(),
            rich.BarColumn(20),
            rich.MofNCompleteColumn(),
            rich.TextColumn(self._unit, markup=False),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[text]}", markup=False),
            console=console,
            auto_refresh=False,  # a thread more would be there when a process forks
            transient=not leave,
            redirect_stdout=False,  # what is printed for a file must come into it
            redirect_stderr=False,
        )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._begin_part(self._bar)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, doing: str = "", done: int = 0, total: int | None = None, text: str = "") -> None:
        """Say how far it is; to be called often.

        Args:
            doing: Which part of the work; empty where it has none.
            done: Units done of this part.
            total: Units there are; None where that is unknown.
            text: What else to tell.
        """
        if self._bar is None:
            self._say(doing, done, total, text)
            return
        now = time.monotonic()
        if (doing, total) != self._part:
            self._bar.remove_task(self._task)
            self._part = (doing, total)
            self._begin_part(self._bar)
        elif now - self._drawn < SECONDS_OF_A_DRAWING and done != total:
            return
        self._drawn = now
        self._bar.update(self._task, completed=done, text=text, refresh=True)

    def _begin_part(self, bar: rich.Progress) -> None:
        doing, total = self._part
        self._task = bar.add_task(f"{self._title}: {doing}" if doing else self._title, total=total, text="")

    def tell(self, text: str) -> None:
        """Print a line that is no result, above the bar."""
        if self._bar is None or not self._bar.live.is_started:
            say(text)
            return
        leave, self._bar.live.transient = self._bar.live.transient, True
        self._bar.stop()
        say(text)
        self._bar.live.transient = leave
        self._bar.start()

    def end(self) -> None:
        """Say on the bar that the work has ended."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: ended", refresh=True)

    def _say(self, doing: str, done: int, total: int | None, text: str) -> None:
        now = time.monotonic()
        if is_quiet() or now - self._said < min(MOST_SECONDS, max(SECONDS, (now - self._began) / 20)):
            return
        self._said = now
        count = f"{self._unit} {done}/{total}" if total else ""
        parts = ", ".join(filter(None, (doing, count, text, f"{now - self._began:.0f} s")))
        print(f"{self._title}: {parts}", file=sys.stderr, flush=True)

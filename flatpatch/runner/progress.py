"""How far long work is: a bar on a terminal, and a plain line now and then where the words go into a file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from flatpatch.terminal import is_quiet

# The parts of a run as the processes that do them write it, and as they are shown. What comes after the first word,
# such as "before" of "measure before", stays.
_PHASES = {"train": "training", "predict": "predicting", "measure": "measuring"}
# Between two plain lines: at first, and once the work has taken long.
SECONDS = 10.0
MOST_SECONDS = 60.0


def in_words(phase: str) -> str:
    """Return how a part of a run is shown.

    >>> in_words("predict"), in_words("measure before")
    ('predicting', 'measuring before')
    """
    first, space, rest = phase.partition(" ")
    return f"{_PHASES.get(first, first)}{space}{rest}"


class Progress:
    """Shows one piece of work on stderr.

    Args:
        title: What the work is.
        unit: What is counted.
        leave: Whether the bar stays when the work has ended.
    """

    def __init__(self, title: str, unit: str, *, leave: bool = False) -> None:
        self._title, self._unit = title, unit
        self._doing = "starting"
        disable = True if is_quiet() else None  # None: where nobody looks, lines take the bar's place
        self._bar = tqdm(desc=f"{title}: {self._doing}", unit=unit, file=sys.stderr, disable=disable, leave=leave)
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, doing: str = "", done: int = 0, total: int | None = None, text: str = "") -> None:
        """Say how far it is; to be called often.

        Args:
            doing: Which part of the work; empty where it has none.
            done: Units done of this part.
            total: Units there are; None where that is unknown.
            text: What else to tell.
        """
        if self._bar.disable:
            self._say(doing, done, total, text)
            return
        if doing != self._doing:
            self._doing = doing
            self._bar.reset(total=total)
            self._bar.set_description(f"{self._title}: {doing}" if doing else self._title)
        self._bar.total, self._bar.n = total, done
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.refresh()

    def end(self) -> None:
        """Say on the bar that the work has ended."""
        self._bar.set_description(f"{self._title}: ended")

    def _say(self, doing: str, done: int, total: int | None, text: str) -> None:
        now = time.monotonic()
        if is_quiet() or now - self._said < min(MOST_SECONDS, max(SECONDS, (now - self._began) / 20)):
            return
        self._said = now
        count = f"{self._unit} {done}/{total}" if total else ""
        parts = ", ".join(filter(None, (doing, count, text, f"{now - self._began:.0f} s")))
        print(f"{self._title}: {parts}", file=sys.stderr, flush=True)

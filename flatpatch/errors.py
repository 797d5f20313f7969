"""What flatpatch raises: one message a person can act on, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FlatpatchError(Exception):
    """A run or a patch failed. The message is shown as it is, without a traceback."""

    exit_code = 1


class UserError(FlatpatchError):
    """The user's mistake: what, where, expected and got, next step. Nothing was started or written."""

    exit_code = 2

    @classmethod
    def collect(cls, problems: Sequence[str]) -> UserError:
        """Make one error of all the problems found."""
        if len(problems) == 1:
            return cls(problems[0])
        lines = "\n".join(f"  - {problem}" for problem in problems)
        return cls(f"{len(problems)} problems, nothing was started:\n{lines}")


class Interrupted(FlatpatchError):
    """The run was stopped from outside; the same command continues it."""

    exit_code = 85


class DiskFull(Interrupted):
    """The disk filled up at work; the same command goes on once there is room."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[near[0]]}'?" if near else ""

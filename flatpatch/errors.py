"""What flatpatch raises: one message a person can act on, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

# Control characters, halves of characters (bytes that are not UTF-8), separators of lines and paragraphs.
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


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


def no_room(error: OSError) -> str:
    """Say where nothing can be written; an error that names no file is of the folder of temporary ones."""
    place = error.filename or f"the folder of temporary files, {os.environ.get('TMPDIR') or '/tmp'}"
    return (
        f"nothing can be written into {place}: {error.strerror or error}. Free some space there, or name another "
        "folder for temporary files with TMPDIR=FOLDER, and run the same command again."
    )


def unprintable(word: str) -> str:
    """Return the first character of a word that no name, path or value here may hold, as Python writes it; or ``""``.

    A line break would forge lines in logs, and a byte that is not UTF-8 cannot be printed at all.
    """
    bad = next((character for character in word if unicodedata.category(character) in _UNPRINTABLE), "")
    return ascii(bad) if bad else ""


def named_path(key: str, word: str) -> Path:
    """Return the path that a setting names, with ``~`` for a home folder.

    Raises:
        UserError: If there can be no such path, or it may not be looked at.
    """
    try:
        path = Path(word).expanduser()
        path.stat()
    except RuntimeError:
        raise UserError(f"{key}={word}: there is no home folder of that user here. Write the path in full.") from None
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it there says so
    except OSError as error:  # too long a name, links in a circle, a folder that is closed to us
        raise UserError(f"{key}={word} cannot be used: {error.strerror}. Name another place.") from None
    return path


def in_one_line(reason: str) -> str:
    r"""Return a reason; of one with several lines its first sentence, and where the rest is told.

    >>> in_one_line("O-LoRA is not here. Looked in\n    third_party/: empty")
    'O-LoRA is not here (details: python -m flatpatch doctor)'
    """
    first, *more = reason.strip().splitlines() or [""]
    return f"{first.split('. ')[0].rstrip('.:')} (details: python -m flatpatch doctor)" if more else first

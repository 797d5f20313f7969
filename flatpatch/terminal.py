"""What this program prints, and what it prints to.

Results, warnings and errors are printed whatever the user asked for. How the work goes on, and where its files are, is
said by ``say``, and with ``--quiet`` not at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from flatpatch.errors import DiskFull

QUIET_WORDS = ("--quiet", "-q")
_quiet = False


def is_quiet() -> bool:
    """Tell whether the result alone is asked for."""
    return _quiet


def say(text: str = "") -> None:
    """Print a line beside the result, at once, unless the result alone is asked for."""
    if not _quiet:
        print(text, flush=True)


def without_quiet(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return a verb's words without the one that asks for quiet, and whether it was among them."""
    kept = [word for word in words if word not in QUIET_WORDS]
    return kept, len(kept) < len(words)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Inside the block say nothing beside the result, if so asked."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


class Lasting:
    """A text stream that falls silent, instead of failing, once its reader has gone.

    So ``--help | head -1`` ends quietly, and a run whose first lines ``head`` has read trains to its end.

    Args:
        stream: The stream.
        name: How it is called where nothing more can be written to it, as on a full disk; without a name it falls
            silent then as well.
    """

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as long as somebody reads."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, as long as somebody reads."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Send the stream's file, and with it what is still in its buffer, nowhere.

        Raises:
            DiskFull: If the reader is a file that is full.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._name and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = str(error.strerror)
            raise DiskFull(f"cannot write to {self._name}: {reason[0].lower()}{reason[1:]}.") from error
        if self._name and not isinstance(error, BrokenPipeError):
            raise error

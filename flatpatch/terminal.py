"""What this program prints to: it goes on when nobody reads any more, and says when nothing can be written."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO

from flatpatch.errors import DiskFull


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

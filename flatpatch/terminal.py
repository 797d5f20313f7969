"""What this program prints to: it goes on when nobody reads any more."""

from __future__ import annotations

import os
from typing import Any, TextIO


class Lasting:
    """A text stream that falls silent, instead of failing, once its reader has gone.

    So ``--help | head -1`` ends quietly, and a run whose first lines ``head`` has read trains to its end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as long as somebody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        """Flush, as long as somebody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        """Send the stream's file, and with it what is still in its buffer, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

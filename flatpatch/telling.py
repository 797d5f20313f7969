"""What a verb says beside its result: how it goes on, and where its files are. With ``--quiet`` nothing of it is said.

Results, warnings and errors are printed whatever the user asked for; they do not come through here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WORDS = ("--quiet", "-q")
_quiet = False


def is_quiet() -> bool:
    """Tell whether the result alone is asked for."""
    return _quiet


def say(text: str = "") -> None:
    """Print a line beside the result, at once, unless the result alone is asked for."""
    if not _quiet:
        print(text, flush=True)


def without_word(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return a verb's words without the one that asks for quiet, and whether it was among them."""
    kept = [word for word in words if word not in WORDS]
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

"""The settings of every benchmark: ``key=value`` words over defaults, which say what kind each value is."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

CLOCKS = ("wall", "cpu")
DEVICES = ("cpu", "cuda")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_settings(
    words: Sequence[str], defaults: Mapping[str, Any], usage: str | None, choices: Mapping[str, Collection[str]]
) -> SimpleNamespace:
    """Return the defaults with what the words say instead; ends the program where it cannot, or is asked for help.

    Args:
        words: As they are typed.
        defaults: Value of each setting; a word is taken as its kind.
        usage: What ``--help`` shows.
        choices: For some settings, all that they may be.
    """
    if {"-h", "--help"} & {*words}:
        print(usage)
        sys.exit(0)
    settings = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if key not in defaults or not equals:
            sys.exit(f"{word!r} is not one of the settings {', '.join(defaults)} as key=value. See --help.")
        if key in choices and value not in choices[key]:
            sys.exit(f"{word} is not one of {', '.join(choices[key])}.")
        kind = type(defaults[key])
        try:
            settings[key] = _TRUTHS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            sys.exit(f"{word} is not {_KINDS[kind]}.")
    return SimpleNamespace(**settings)

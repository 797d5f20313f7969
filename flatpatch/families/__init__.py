"""What a kind of upstream repository needs: a family turns settings into data, and what a run left into data."""

from __future__ import annotations

import importlib
from typing import cast

from flatpatch.families.base import Family


def load(name: str) -> Family:
    """Return the functions of a family, such as that of an upstream's row."""
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))

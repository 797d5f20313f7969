"""What a kind of upstream repository needs: a family turns settings into data, and what a run left into data."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from flatpatch.families.base import Family

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))


def family_of(record: Mapping[str, Any]) -> str:
    """Return the family of a recorded run; records of earlier versions do not name it."""
    return record.get("family") or ("vision" if "benchmark" in record["settings"] else "text")


def of_record(record: Mapping[str, Any]) -> Family:
    """Return a recorded run's family."""
    return Family(family_of(record))

"""The supported methods: one file each, found here by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from flatpatch.families.base import Upstream

UPSTREAMS: Mapping[str, Upstream]
"""By name, those with a repository first; the first of all is what ``method=`` means where it is left out.

Loaded on first use, so that a patch that needs one method's file does not load the others.
"""


def _rows() -> Iterator[Upstream]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            row: Upstream = importlib.import_module(f"{__name__}.{module.name}").UPSTREAM
            yield row


def __getattr__(name: str) -> Any:
    if name != "UPSTREAMS":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    rows = sorted(_rows(), key=lambda row: (not row.default, row.repository is None, row.family, row.name))
    found = globals()[name] = {row.name: row for row in rows}
    return found

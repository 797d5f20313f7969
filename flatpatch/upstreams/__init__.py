"""The supported methods: one file each, found here by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from flatpatch.families.base import Upstream


def _rows() -> Iterator[Upstream]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            row: Upstream = importlib.import_module(f"{__name__}.{module.name}").UPSTREAM
            yield row


# Those with a repository first; the first one is what ``method=`` means where it is left out.
UPSTREAMS: Mapping[str, Upstream] = {
    row.name: row for row in sorted(_rows(), key=lambda row: (row.repository is None, row.family, row.name))
}

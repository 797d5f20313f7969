"""What a run of a text method is a run of, for comparisons with published numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.families.base import LoggedRun
from flatpatch.families.text.upstream import TextUpstream

LEARNS_CLASSES = False


def subject(record: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`flatpatch.families.base.Family`."""
    found = {"method": record["method"]}
    order = record["settings"].get("order")
    return found if order is None else found | {"order": str(order["value"])}


def knows_data(record: Mapping[str, Any]) -> bool:
    """See :class:`flatpatch.families.base.Family`; each task's data are upstream's own."""
    return False


def compare_data(
    upstream: TextUpstream,
    subject: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    kind: str,
) -> tuple[str, list[str]]:
    """See :class:`flatpatch.families.base.Family`."""
    return "", []


def read_log(path: Path, upstreams: Iterable[TextUpstream]) -> list[LoggedRun]:
    """See :class:`flatpatch.families.base.Family`; these repositories leave result files instead."""
    return []

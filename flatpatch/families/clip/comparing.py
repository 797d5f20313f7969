"""What a CLIP run is a run of, and whether two runs had the same images, for comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from flatpatch.families.base import LoggedRun
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.upstream import ClipUpstream

LEARNS_CLASSES = False


def subject(record: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`flatpatch.families.base.Family`: method and data sets in their order."""
    return {"method": record["method"], "order": ", ".join(record["tasks"])}


def knows_data(record: Mapping[str, Any]) -> bool:
    """See :class:`flatpatch.families.base.Family`; drawn images are the same everywhere."""
    return bool(_hashes(record)) or record["profile"] == "quick"


def compare_data(
    upstream: ClipUpstream,
    subject: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    kind: str,
) -> tuple[str, list[str]]:
    """See :class:`flatpatch.families.base.Family`."""
    found = [_hashes(record) for record in records]
    for (one, first), (other, second) in combinations(zip(names, found, strict=True), 2):
        for key in sorted(first.keys() & second.keys()):
            if first[key] != second[key]:
                return f"{one} and {other} had other images: their {key} differ", []
    return "", []


def _hashes(record: Mapping[str, Any]) -> dict[str, Any]:
    folders = [known.folder for known in DATASETS.values()]
    inputs = record.get("inputs", {})
    return {key: value for key, value in inputs.items() if any(key.startswith(f"{folder}/") for folder in folders)}


def read_log(path: Path, upstreams: Iterable[ClipUpstream]) -> list[LoggedRun]:
    """See :class:`flatpatch.families.base.Family`; there is no repository whose code left any."""
    return []

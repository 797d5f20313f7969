"""Whether runs had the images that the other side had: what stands in the way, and what nobody can check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.report.splits import FOLDER, LISTED, LOGGED, OTHER, list_hashes, split_of

_OF_PILOT = ("imagenet_r", "imagenet_a", "vtab")  # CL-LoRA takes them as LAMDA-PILOT splits them


def obstacle_of_images(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], subject: Mapping[str, Any], kind: str
) -> str:
    """Say which difference of images forbids a comparison.

    Args:
        records: The runs' records.
        names: What to call the runs.
        subject: What they are runs of.
        kind: The baseline's, such as ``paper``; empty where there is none.

    Returns:
        A reason; empty if none is known.
    """
    first = list_hashes(records[0].get("inputs", {}))
    for name, record in zip(names, records, strict=True):
        other = list_hashes(record.get("inputs", {}))
        for key in sorted(first.keys() & other.keys()):
            if first[key] != other[key]:
                hashes = f"{first[key][:12]} and {other[key][:12]}"
                return f"{names[0]} and {name} had other images: their lists of {key} have the hashes {hashes}"
    split = _inflora_split(records, subject)
    if split == OTHER:
        return f"its split of {FOLDER} is {OTHER}"
    if split == LISTED and kind == "shipped run":
        return f"its split of {FOLDER} is {LISTED}, not {LOGGED}"
    return ""


def unchecked_images(records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any], kind: str) -> list[str]:
    """Return, as sentences, what cannot be known of the images; arguments as for ``obstacle_of_images``."""
    dataset = subject.get("dataset")
    if subject["method"] == "cllora" and dataset in _OF_PILOT:
        split = split_of(records[0].get("inputs", {}))
        here = f"; here it is {split}" if split else ""
        return [
            f"the split of {dataset} could not be checked: CL-LoRA takes LAMDA-PILOT's, of which no list is "
            f"published{here}"
        ]
    if subject["method"] == "cllora" or dataset != "imagenet_r":
        return []
    split = _inflora_split(records, subject)
    if split is None:
        return [f"the split of {FOLDER} could not be checked: a record has no hash of it"]
    return [f"the split of {FOLDER} is {split}; which one the paper's runs had is not said"] if kind == "paper" else []


def _inflora_split(records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any]) -> str | None:
    """Return which split InfLoRA's runs had, None where one of them does not say."""
    if subject["method"] == "cllora" or subject.get("dataset") != "imagenet_r":
        return None
    found = [split_of(record.get("inputs", {})) for record in records]
    return next((split for split in (OTHER, None, LISTED) if split in found), LOGGED)

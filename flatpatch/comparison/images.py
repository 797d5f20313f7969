"""Whether runs had the images that the other side had: what stands in the way, and what nobody can check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from flatpatch.families.vision.splits import FOLDER, LISTED, LOGGED, list_hashes, split_of

_OF_PILOT = ("imagenet_r", "imagenet_a", "vtab")  # CL-LoRA takes them as LAMDA-PILOT splits them
_OF_THE_PAPER = "which one the paper's runs had is not known"


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
    lists = [list_hashes(record.get("inputs", {})) for record in records]
    for (one, first), (other, second) in combinations(zip(names, lists, strict=True), 2):
        for key in sorted(first.keys() & second.keys()):
            if first[key] != second[key]:
                hashes = f"{first[key][:12]} and {second[key][:12]}"
                return f"{one} and {other} had other images: their lists of {key} have the hashes {hashes}"
    if kind == "shipped run":
        for split in _inflora_splits(records, subject):
            if split not in (None, LOGGED):
                return f"its split of {FOLDER} is {split}" + (f", not {LOGGED}" if split == LISTED else "")
    return ""


def unchecked_images(records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any], kind: str) -> list[str]:
    """Return, as sentences, what cannot be known of the images; arguments as for ``obstacle_of_images``."""
    dataset = subject.get("dataset")
    if subject["method"] == "cllora" and dataset in _OF_PILOT:
        found = filter(None, (split_of(record.get("inputs", {})) for record in records))
        here = "".join(f"; here it is {split}" for split in dict.fromkeys(found))
        return [
            f"the split of {dataset} could not be checked: CL-LoRA takes LAMDA-PILOT's, of which no list is "
            f"published{here}"
        ]
    notes = []
    for split in dict.fromkeys(_inflora_splits(records, subject)):
        if split is None:
            notes.append(f"the split of {FOLDER} could not be checked: a record has no hash of it")
        elif kind == "paper":
            notes.append(f"the split of {FOLDER} is {split}; {_OF_THE_PAPER}")
    return notes


def unchecked_images_of_log(shipped: bool, subject: Mapping[str, Any], kind: str) -> list[str]:
    """Return, as sentences, what cannot be known of the images of runs in a log of InfLoRA's.

    Args:
        shipped: Whether these are the runs of the logs that InfLoRA ships.
        subject: What they are runs of.
        kind: The baseline's, such as ``paper``; empty where there is none.
    """
    if subject["method"] == "cllora" or subject.get("dataset") != "imagenet_r":
        return []
    if not shipped:
        return [f"the split of {FOLDER} cannot be known: a log does not say which images a run had"]
    return [f"the split of {FOLDER} is {LOGGED}; {_OF_THE_PAPER}"] if kind == "paper" else []


def _inflora_splits(records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any]) -> list[str | None]:
    """Return which split each of InfLoRA's runs had, None where its record does not say; nothing of other runs."""
    if subject["method"] == "cllora" or subject.get("dataset") != "imagenet_r":
        return []
    return [split_of(record.get("inputs", {})) for record in records]

"""Which of ImageNet-R's splits into training and test images a run had, by the hashes of its lists of files.

Two are known for InfLoRA, and they are not the same:

- ``LOGGED``, what InfLoRA's code draws where torch's seed is 40. The logs of its ImageNet-R runs, whose classes come in
  two different orders, show how many test images the groups of classes had: all 330 accuracies and 60 totals are whole
  numbers of this split's test images, and of those of no other seed below 3000
  (``tests/families/vision/test_splits.py`` counts). They show counts, not files: that those runs had each file of this
  split is concluded from the seed. Which split the paper's runs had is not known.
- ``LISTED``, the lists in its ``utils/splits/``, which its code does not read. Most of the logs' accuracies cannot come
  from it: the counts of its groups are others.

No split is wrong: a run on another one is a run of the same code on other data, which its record says.

A list's hash is the SHA-256 of the sorted relative paths, each followed by a newline; it stands in a record's
``inputs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FOLDER = "imagenet-r"
SEED = 40  # of the draw that gives LOGGED
LOGGED = "the one that InfLoRA's shipped logs had"
LISTED = "the one listed in InfLoRA's utils/splits/"
OTHER = "neither the one that InfLoRA's shipped logs had nor the one listed in its utils/splits/"
HASHES: Mapping[str, Mapping[str, str]] = {
    LOGGED: {
        "train": "fc8d1d8a69c9f9548de5a3825625c953ecb6e461000dc28632c732801ba3417c",
        "test": "524afde876563993d1e8ce5e38b638a0b394adb503ce7d09b0576ac5522dd3dd",
    },
    LISTED: {
        "train": "250e65c32642c05f08da6a1121505df2d00a5ebcbd0fe48714ef7f2ad9f13be3",
        "test": "524a3ebf6dac30228a30387443c2c30a21c483b6d0d3c57768f74edd60cfecc3",
    },
}


def list_key(name: str) -> str:
    """Return the key in a record's ``inputs`` of the hash of a list of files, such as ``imagenet-r/train``."""
    return f"{name}: list of files"


def list_hashes(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of the lists of files among a record's ``inputs``, by the name of the list."""
    end = list_key("")
    return {key.removesuffix(end): value for key, value in inputs.items() if key.endswith(end) and value}


def split_of(inputs: Mapping[str, Any]) -> str | None:
    """Return which split of ImageNet-R a run had: ``LOGGED``, ``LISTED`` or ``OTHER``.

    Args:
        inputs: The record's.

    Returns:
        None where the record has no hash of both halves.
    """
    found = list_hashes(inputs)
    halves = {half: found.get(f"{FOLDER}/{half}") for half in ("train", "test")}
    if None in halves.values():
        return None
    return next((name for name, hashes in HASHES.items() if hashes == halves), OTHER)

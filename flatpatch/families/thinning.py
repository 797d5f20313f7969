"""A share of a task's training examples, for ``fraction=``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def thinned(labels: Sequence[Hashable], fraction: float, seed: int) -> list[int]:
    """Choose a share of examples in which each label has its share too.

    The examples of each label are put in a random order, and these orders are merged evenly; a share is the beginning
    of what comes out. So with one seed a smaller share is part of a larger one.

    Args:
        labels: Of each example.
        fraction: The share, over 0 and at most 1.
        seed: Draws the orders.

    Returns:
        Indices in increasing order: the share of all, rounded, but one at least; each label's are in its proportion, to
        within rounding.
    """
    drawn = np.random.RandomState(seed).permutation(len(labels))
    sizes: dict[Hashable, int] = {}
    for label in labels:
        sizes[label] = sizes.get(label, 0) + 1
    seen = dict.fromkeys(sizes, 0)
    places: list[tuple[float, int, int]] = []
    for index in drawn:
        label = labels[index]
        places.append(((seen[label] + 0.5) / sizes[label], len(places), int(index)))
        seen[label] += 1
    count = max(1, round(fraction * len(labels)))
    return sorted(index for _, _, index in sorted(places)[:count])

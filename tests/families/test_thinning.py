"""The share of a task's training examples that ``fraction=`` leaves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatpatch.families.thinning import thinned


def test_labels_keep_their_proportions() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for fraction, counts in ((0.1, (6, 3, 1)), (0.5, (30, 15, 5)), (1.0, (60, 30, 10))):
        kept = Counter(labels[index] for index in thinned(labels, fraction, 3))
        assert (kept["a"], kept["b"], kept["c"]) == counts


def test_seed_decides_which_and_a_smaller_share_is_part_of_a_larger_one() -> None:
    labels = [index % 4 for index in range(80)]
    small, large = thinned(labels, 0.1, 5), thinned(labels, 0.6, 5)
    assert set(small) < set(large)
    assert thinned(labels, 0.1, 5) == small
    assert thinned(labels, 0.1, 6) != small


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(1e-6, 1), st.integers(0, 2**32 - 1))
def test_share_is_rounded_and_one_example_at_least(labels: list[int], fraction: float, seed: int) -> None:
    kept = thinned(labels, fraction, seed)
    assert len(kept) == max(1, round(fraction * len(labels)))
    assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < len(labels)


def test_every_example_is_as_likely_as_another() -> None:
    """Of 8 examples with one label 2 are drawn: each one in a quarter of 4,000 draws, standard deviation 0.7 %."""
    drawn = Counter(index for seed in range(4000) for index in thinned(["x"] * 8, 0.25, seed))
    for index in range(8):
        assert drawn[index] / 4000 == pytest.approx(0.25, abs=0.028)

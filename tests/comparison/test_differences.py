"""Intervals and detectable differences: closed forms, scipy, and how often they hold in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flatpatch.comparison.differences import Side, detectable_difference, paired_difference, unpaired_difference

# The final accuracies of InfLoRA's five CIFAR-100 seeds.
SEEDS = [86.34, 84.92, 86.88, 86.82, 86.67]


def test_side_has_mean_and_sample_deviation():
    side = Side.of([1.0, 2.0, 3.0, 6.0])
    # Squares about the mean 3: 4 + 1 + 0 + 9 = 14, over n - 1 = 3.
    assert (side.mean, side.standard_deviation, side.n) == (3.0, math.sqrt(14 / 3), 4)
    assert Side.of([2.5]) == Side(2.5, None, 1)


def test_paired_interval_matches_the_closed_form():
    # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653 (printed tables).
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert found.difference == 2.0
    assert found.interval == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert found.test == "paired"


def test_intervals_equal_scipys():
    generator = np.random.default_rng(0)
    here, there = generator.normal(80, 2, 4), generator.normal(81, 0.5, 6)
    expected = stats.ttest_ind(here, there, equal_var=False).confidence_interval(0.95)
    found = unpaired_difference(Side.of(here.tolist()), Side.of(there.tolist()))
    assert found.interval == pytest.approx(tuple(expected), rel=1e-9)
    assert found.test == "welch"
    expected = stats.ttest_rel(here, there[:4]).confidence_interval(0.95)
    found = paired_difference(here.tolist(), there[:4].tolist())
    assert found.interval == pytest.approx(tuple(expected), rel=1e-9)


def test_prediction_interval_matches_the_closed_form_from_either_side():
    one, many = Side(85.0, None, 1), Side.of(SEEDS)
    assert many.standard_deviation is not None
    half = stats.t.ppf(0.975, 4) * many.standard_deviation * math.sqrt(1 + 1 / 5)
    difference = 85.0 - many.mean
    found = unpaired_difference(one, many)
    assert found.interval == pytest.approx((difference - half, difference + half), rel=1e-9)
    assert found.test == "prediction interval"
    turned = unpaired_difference(many, one)
    assert turned.interval == pytest.approx((-difference - half, -difference + half), rel=1e-9)


def test_one_number_on_either_side_gives_the_difference_alone():
    found = unpaired_difference(Side(2.0, None, 1), Side(3.0, None, 1))
    assert (found.difference, found.interval, found.detectable, found.test) == (-1.0, None, None, "difference only")
    assert paired_difference([2.0], [3.0]).interval is None


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_differences_that_do_not_spread_give_no_interval(shift):
    """Equal differences of rounded numbers spread by their floats' rounding alone, which is no evidence of anything."""
    found = paired_difference([x + shift for x in SEEDS], SEEDS)
    assert found.difference == pytest.approx(shift, abs=1e-12)
    assert (found.interval, found.detectable, found.test) == (None, None, "paired")
    assert unpaired_difference(Side.of([1.0, 1.0]), Side.of([2.0, 2.0])).interval is None


def test_pairs_must_match_in_number():
    with pytest.raises(ValueError, match="as many values here as there; got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])


def test_detectable_difference_of_many_runs_is_the_normal_one():
    # z(0.975) + z(0.8) = 1.959964 + 0.841621; the other tail adds less than 1e-6 of power.
    assert detectable_difference(1.0, 1e6) == pytest.approx(1.959964 + 0.841621, abs=1e-4)


def test_detectable_difference_of_five_against_five_seeds():
    """Standard tables of sample size have 2.02 standard deviations for n = 5 per group, 5 % two-sided, power 80 %."""
    assert detectable_difference(math.sqrt(2 / 5), 8) == pytest.approx(2.02, abs=5e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 8, 40])
def test_detectable_difference_has_the_stated_power(freedom):
    """Power by numerical integration over the chi-square distribution, without the noncentral t."""
    noncentrality = detectable_difference(1.0, freedom)
    critical = stats.t.ppf(0.975, freedom)
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    scale = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)
    power = np.mean(stats.norm.sf(critical * scale - noncentrality) + stats.norm.cdf(-critical * scale - noncentrality))
    assert power == pytest.approx(0.8, abs=2e-4)


def test_detectable_difference_needs_positive_arguments():
    for error, freedom in ((0.0, 4.0), (1.0, 0.0), (-1.0, 4.0)):
        with pytest.raises(ValueError, match="both must be positive"):
            detectable_difference(error, freedom)


@given(
    values=st.lists(st.floats(0, 100, allow_nan=False), min_size=2, max_size=6),
    other=st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=6),
)
def test_swapping_the_sides_turns_the_interval_over(values, other):
    here, there = Side.of(values), Side.of(other)
    found, turned = unpaired_difference(here, there), unpaired_difference(there, here)
    assert turned.difference == -found.difference
    assert (found.interval is None) == (turned.interval is None)
    if found.interval is not None and turned.interval is not None:
        assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))
        assert turned.detectable == pytest.approx(found.detectable)
        # What 80 % power needs is more than what a 95 % interval leaves undecided.
        assert found.detectable > (found.interval[1] - found.interval[0]) / 2


@pytest.mark.parametrize("kind", ["paired", "welch", "prediction interval"])
def test_interval_covers_the_true_difference_in_95_of_100_cases(kind):
    """2000 draws: the share covered has a standard deviation of 0.5 points; 4 of them are allowed.

    Welch's degrees of freedom are an approximation, good to about a point here (Wang 1971).
    """
    generator = np.random.default_rng(1)
    draws, covered = 2000, 0
    for _ in range(draws):
        if kind == "paired":  # pairs share much of their noise
            common = generator.normal(0, 3, 3)
            found = paired_difference((common + generator.normal(1, 1, 3)).tolist(), common.tolist())
        elif kind == "welch":
            here, there = generator.normal(1, 2, 4).tolist(), generator.normal(0, 1, 5).tolist()
            found = unpaired_difference(Side.of(here), Side.of(there))
        else:
            here, there = generator.normal(1, 1, 1).tolist(), generator.normal(0, 1, 5).tolist()
            found = unpaired_difference(Side.of(here), Side.of(there))
        assert found.test == kind
        assert found.interval is not None
        covered += found.interval[0] <= 1 <= found.interval[1]
    tolerance = 0.02 + (0.01 if kind == "welch" else 0)
    assert covered / draws == pytest.approx(0.95, abs=tolerance)


def test_true_difference_of_the_detectable_size_is_found_in_80_of_100_cases():
    generator = np.random.default_rng(2)
    true = detectable_difference(1 / math.sqrt(5), 4)  # five pairs whose differences have deviation 1
    draws, found = 2000, 0
    for _ in range(draws):
        interval = paired_difference(generator.normal(true, 1, 5).tolist(), [0.0] * 5).interval
        assert interval is not None
        found += not interval[0] <= 0 <= interval[1]
    assert found / draws == pytest.approx(0.8, abs=0.036)  # 4 standard deviations of a share of 2000

"""How far two sets of runs differ, how sure that is, and the smallest difference so few runs can show.

Every interval is a two-sided 95 % t-interval of the difference of the means, which presumes that seeds are independent
and their numbers roughly normal. Which one fits depends on what is known of the two sides:

- runs in pairs that share seed and order: Student's t on their differences;
- two sets of runs with a spread each: Welch's t (Welch 1947, doi:10.1093/biomet/34.1-2.28);
- a spread on one side alone: the prediction interval for the mean of the other side's runs, as if both spread alike;
- no spread at all: the bare difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from flatpatch.statistics import POWER, deviation, half_width

# Differences of accuracies printed with two decimals are whole hundredths; what is below this is rounding of floats.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Side:
    """Mean and sample standard deviation (divisor n - 1) of n numbers; None where there is no spread to know."""

    mean: float
    standard_deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Side:
        """Summarise at least one number."""
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        return cls(mean, deviation(values), len(values))


@dataclass(frozen=True)
class MeanDifference:
    """Here minus there, in the unit of the values, with what is known of its error.

    ``interval`` and ``detectable`` are None where there is no spread to judge by.
    """

    difference: float
    interval: tuple[float, float] | None
    detectable: float | None
    test: str  # "paired", "welch", "prediction interval" or "difference only"


def paired_difference(here: Sequence[float], there: Sequence[float]) -> MeanDifference:
    """Compare runs that share seed and order, pair by pair.

    Args:
        here: (n,) one value per pair.
        there: (n,) the partners, in the same order.

    Returns:
        The mean difference; with one pair, or differences that do not spread, no interval.

    Raises:
        ValueError: If the lengths differ or there is no pair.
    """
    if len(here) != len(there) or not here:
        raise ValueError(f"pairs need as many values here as there; got {len(here)} and {len(there)}.")
    side = Side.of([a - b for a, b in zip(here, there, strict=True)])
    if side.standard_deviation is None:
        return MeanDifference(side.mean, None, None, "difference only")
    return _interval(side.mean, side.standard_deviation / math.sqrt(side.n), side.n - 1, "paired")


def unpaired_difference(here: Side, there: Side) -> MeanDifference:
    """Compare two independent sides by what is known of their spread.

    Args:
        here: Our side.
        there: The other.

    Returns:
        The difference of the means, by Welch's t, a prediction interval, or alone.
    """
    difference = here.mean - there.mean
    first, second = here.standard_deviation, there.standard_deviation
    if first is not None and second is not None:
        variances = (first**2 / here.n, second**2 / there.n)
        error = math.sqrt(sum(variances))
        if error < _NO_SPREAD:
            return MeanDifference(difference, None, None, "welch")
        freedom = sum(variances) ** 2 / (variances[0] ** 2 / (here.n - 1) + variances[1] ** 2 / (there.n - 1))
        return _interval(difference, error, freedom, "welch")
    if first is None and second is None:
        return MeanDifference(difference, None, None, "difference only")
    spread, n = (first, here.n) if first is not None else (second, there.n)
    assert spread is not None
    error = spread * math.sqrt(1 / here.n + 1 / there.n)
    return _interval(difference, error, n - 1, "prediction interval")


def detectable_difference(standard_error: float, degrees_of_freedom: float) -> float:
    """Return the smallest true difference that a two-sided t-test at 5 % finds in 80 % of cases.

    The power is that of the noncentral t distribution with noncentrality difference / standard_error.

    Args:
        standard_error: Of the difference of the means.
        degrees_of_freedom: Of its estimate, positive.

    Returns:
        A positive difference, in the unit of ``standard_error``.

    Raises:
        ValueError: If an argument is not positive.
    """
    if standard_error <= 0 or degrees_of_freedom <= 0:
        raise ValueError(f"both must be positive; got {standard_error} and {degrees_of_freedom}.")
    critical = half_width(1.0, degrees_of_freedom)
    # The tail on the wrong side is left out: at 80 % power it holds less than one case in a million.
    return float(special.nctdtrinc(degrees_of_freedom, 1 - POWER, critical)) * standard_error


def _interval(difference: float, error: float, freedom: float, test: str) -> MeanDifference:
    if error < _NO_SPREAD:
        return MeanDifference(difference, None, None, test)
    half = half_width(error, freedom)
    return MeanDifference(
        difference,
        (difference - half, difference + half),
        detectable_difference(error, freedom),
        test,
    )

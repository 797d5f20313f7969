"""Paired differences: how large an effect is, how sure that is, and what may be said of a hypothesis.

A hypothesis says that one side is *higher* or *lower* than the other. Its runs come in pairs that share a seed; the
effect is the mean of the n differences d, its interval Student's

    mean(d) -+ t(0.975, n - 1) s / sqrt(n),        s the sample deviation of d (divisor n - 1),

and p the two-sided p-value of the same test. Two-sided, so that p < 0.05 where the interval leaves out 0, and so that
an effect that is not there is called supported in at most 2.5 % of studies, and contradicted in as many.

- ``supported``: the interval lies beyond 0 in the stated direction;
- ``contradicted``: it lies beyond 0 in the other;
- ``too small to matter``: it lies within the smallest effect of interest on either side of 0, wherever it stands to 0
  (equivalence by two one-sided tests at 2.5 %, Schuirmann 1987, doi:10.1007/BF01068419);
- ``undecided``: none of these, with the number of seeds that would decide: at the spread and effect seen, a two-sided
  test at 5 % then finds the effect, or the two one-sided ones find it too small, in 80 % of studies.

Of several hypotheses one or the other would be found by chance alone, so ``corrected`` asks of those found that p by
Holm (1979, Scand. J. Statist. 6) is below 0.05 too; intervals stay those of one hypothesis.

One seed has no spread: no interval, undecided. Several equal differences would make Student's interval a point, however
few; there the sign test is used instead, and the interval of the median, which is that point from 6 differences on
(the chance that all of n lie on one side of the median is 2 / 2^n); with fewer there is none.

``rank_correlation`` is of another kind: how well one number orders the runs by another, within each task.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from flatpatch.errors import UserError, did_you_mean

DIRECTIONS = ("higher", "lower")
SUPPORTED, CONTRADICTED, TOO_SMALL, UNDECIDED = "supported", "contradicted", "too small to matter", "undecided"
VERDICTS = (SUPPORTED, CONTRADICTED, TOO_SMALL, UNDECIDED)
CONFIDENCE, POWER = 0.95, 0.8
MOST_SEEDS = 1_000  # beyond which nobody would train
FEW = 3  # with 95 % the true deviation is 0.5 to 6 times that of three, and the seeds needed go by its square
_EQUAL = 1e-12  # differences that differ by less than this share of the numbers they are of differ by rounding


@dataclass(frozen=True)
class Difference:
    """The effect that pairs of runs show, and what it says of a hypothesis."""

    effect: float  # mean of the differences, in the unit of the values
    low: float | None  # of the interval; None where there is no spread to judge by
    high: float | None
    n: int  # pairs
    p: float | None  # two-sided; None for one pair
    verdict: str
    more_seeds: int | None  # in all, that would decide; None where decided, or where no number can be said
    direction: str  # that the hypothesis states
    smallest: float = 0.0  # effect of interest
    spread: float | None = None  # sample deviation of the differences
    confidence: float = CONFIDENCE
    adjusted_p: float | None = None  # by Holm, over the hypotheses of a study

    def sentence(self, unit: str = "", about: str = "") -> str:
        """Say the verdict and what it rests on in one sentence.

        Args:
            unit: Of the effect, e.g. ``points``.
            about: What the verdict is about, behind its name: ``in the miniature``.

        Returns:
            E.g. ``supported in the miniature: +1.2 points (95 % interval +0.4 to +2; 5 seeds; p = 0.013)``.
        """
        verdict = f"{self.verdict} {about}".rstrip()
        effect = f"{_signed(self.effect)} {unit}".rstrip()
        if self.n == 1:
            return f"{verdict}: {effect} from one seed, which shows no spread to judge by"
        if self.low is None or self.high is None:
            return f"{verdict}: {effect} at each of {self.n} seeds, with no spread to judge by{self._more(', ')}"
        p = "" if self.p is None else f"; p = {self.p:.2g}"
        p += "" if self.adjusted_p is None else f", {self.adjusted_p:.2g} after Holm's correction"
        interval = f"{100 * self.confidence:g} % interval {_signed(self.low)} to {_signed(self.high)}"
        return f"{verdict}: {effect} ({interval}; {self.n} seeds{p}){self._more('; ')}"

    def _more(self, mark: str) -> str:
        if self.verdict != UNDECIDED:
            return ""
        if self.more_seeds is None:
            return f"{mark}no number of seeds up to {MOST_SEEDS} can be said to decide" if self.spread else ""
        rough = f", a rough guess from {self.n}" if self.spread and self.n <= FEW else ""
        return f"{mark}about {self.more_seeds} seeds in all would decide{rough}"


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    direction: str,
    smallest: float = 0.0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Judge the hypothesis that ``a`` is higher, or lower, than ``b``.

    Args:
        a: (n,) one number per pair. Pairs are taken as independent: several numbers of one seed, as those of its
            tasks, are to be averaged first.
        b: (n,) the other side of each pair, in the same order.
        direction: ``higher`` or ``lower``: what the hypothesis says of ``a``.
        smallest: The smallest effect of interest, in the unit of the values; 0 for any.
        confidence: Of the interval.

    Returns:
        The effect ``mean(a - b)`` with its verdict.

    Raises:
        UserError: If there is no pair, the sides are unequally long, a number is not finite, or an option is out of
            range.
    """
    _check(a, b, direction, smallest, confidence)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    effect = math.fsum(differences) / n
    low = high = p = spread = None
    if n > 1:
        spread = deviation(differences)
        if max(differences) - min(differences) <= _EQUAL * max(map(abs, [*a, *b])):
            spread, p = 0.0, min(1.0, 2 * 0.5**n) if effect else 1.0
            low, high = (effect, effect) if 1 - 2 * 0.5**n >= confidence else (None, None)
        else:
            low, high, p = _student(effect, spread, n, confidence)
    found = Difference(effect, low, high, n, p, UNDECIDED, None, direction, smallest, spread, confidence)
    return _judged(found, 1 - confidence)


def least_squares(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the straight line through some points that is nearest to them by least squares.

    Args:
        x: (m,) where they stand.
        y: (m,) their values.

    Raises:
        UserError: If there are less than two, or they stand at one place.
    """
    if len(x) != len(y) or len(x) < 2:
        raise UserError(f"a slope needs at least two values and a place for each; got {len(y)} at {len(x)} places.")
    middle = math.fsum(x) / len(x)
    squares = math.fsum((place - middle) ** 2 for place in x)
    if not squares:
        raise UserError(f"a slope needs values at different places; all {len(x)} stand at {x[0]:g}.")
    return math.fsum((place - middle) * value for place, value in zip(x, y, strict=True)) / squares


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm: the k-th smallest of m times m - k + 1, never falling.

    Args:
        p: (m,) in any order.

    Returns:
        (m,) in the same order, none above 1.

    Raises:
        UserError: If one is no probability.
    """
    if bad := [value for value in p if not 0 <= value <= 1]:
        raise UserError(f"p-values lie between 0 and 1; got {bad[0]:g}.")
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = highest
    return adjusted


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Return the hypotheses of one study with Holm's p-values, and the verdicts that hold with these.

    One that cannot be tested, None among them, counts with p = 1. The seeds that would decide are those for the level
    at which Holm's method would next be asked: 5 % over the hypotheses that it has not found yet.
    """
    adjusted = holm([1.0 if found is None or found.p is None else found.p for found in differences])
    left = sum(p >= 1 - CONFIDENCE for p in adjusted)
    return [
        found
        and _judged(replace(found, adjusted_p=None if found.p is None else p), (1 - found.confidence) / max(left, 1))
        for found, p in zip(differences, adjusted, strict=True)
    ]


def seeds_that_decide(
    effect: float, spread: float, *, beyond: int, smallest: float = 0.0, level: float = 0.05
) -> int | None:
    """Return how many pairs find an effect, or find it too small to matter, in 80 % of studies.

    Args:
        effect: The true mean of the differences.
        spread: Their true deviation, positive.
        beyond: A number of pairs that does not.
        smallest: The smallest effect of interest.
        level: Of the two-sided test.

    Returns:
        The smallest number above ``beyond``; None if ``MOST_SEEDS`` do not.
    """
    first, last = max(beyond + 1, 2), MOST_SEEDS
    if first > last or _power(last, effect, spread, smallest, level) < POWER:
        return None
    while first < last:  # more pairs never have less power
        middle = (first + last) // 2
        if _power(middle, effect, spread, smallest, level) >= POWER:
            last = middle
        else:
            first = middle + 1
    return first


def _power(n: int, effect: float, spread: float, smallest: float, level: float) -> float:
    """Return the chance that n pairs decide, one way or the other: the larger of the two.

    The tail on the wrong side is left out. Both one-sided tests of equivalence fail at once only where the interval is
    wider than the range it should lie in; elsewhere their chances to fail add up.
    """
    from scipy import special

    def found(distance: float, level: float) -> float:
        critical = float(special.stdtrit(n - 1, 1 - level / 2))
        missed = float(special.nctdtr(n - 1, distance * math.sqrt(n) / spread, critical))
        return 1.0 if math.isnan(missed) else 1 - missed  # scipy's is NaN where it should be next to 0

    size = abs(effect)
    own = 1 - CONFIDENCE  # equivalence is read off the interval, which is not corrected
    too_small = found(smallest - size, own) + found(smallest + size, own) - 1 if size < smallest else 0.0
    return max(found(size, level), too_small)


def _signed(value: float) -> str:
    return f"{value:+.4g}" if value else "0"


def _judged(found: Difference, level: float) -> Difference:
    """Return a difference with the verdict that its interval and its p-values give."""
    verdict = _verdict(found)
    more = None
    if verdict == UNDECIDED and found.spread:
        more = seeds_that_decide(found.effect, found.spread, beyond=found.n, smallest=found.smallest, level=level)
    elif verdict == UNDECIDED and found.spread == 0 and (found.effect or found.smallest):
        within = abs(found.effect) <= found.smallest
        # From which the sign test can say something.
        more = math.ceil(1 - math.log2(1 - found.confidence if within else level))
    return replace(found, verdict=verdict, more_seeds=more)


def _verdict(found: Difference) -> str:
    if found.low is None or found.high is None:
        return UNDECIDED
    if -found.smallest <= found.low and found.high <= found.smallest and found.smallest:
        return TOO_SMALL
    above, below = found.low > 0, found.high < 0
    by_chance = found.adjusted_p is not None and found.adjusted_p >= 1 - found.confidence
    if not (above or below) or by_chance:
        return UNDECIDED
    return SUPPORTED if above == (found.direction == "higher") else CONTRADICTED


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (divisor n - 1) of two numbers or more."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def half_width(error: float, freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return half of Student's two-sided interval.

    Args:
        error: Standard error of the estimate.
        freedom: Degrees of freedom of the error; may be broken.
        confidence: Of the interval.
    """
    from scipy import special

    return float(special.stdtrit(freedom, (1 + confidence) / 2)) * error


@dataclass(frozen=True)
class Pairing:
    """What pairing does to the interval of a difference of means."""

    paired: float  # half of the interval
    unpaired: float  # half of Welch's, of the same numbers taken as two groups
    seeds: int | None  # a side, from which on the unpaired interval is as narrow; None if ``MOST_SEEDS`` are too few

    def sentence(self, unit: str = "") -> str:
        """Say it in one sentence."""
        share = f", {self.paired / self.unpaired:.2f} of it" if self.unpaired else ""
        seeds = "more than 1000" if self.seeds is None else str(self.seeds)
        return (
            f"paired -+{self.paired:.3g} {unit}, unpaired -+{self.unpaired:.3g}{share}; unpaired, {seeds} seeds a side "
            "would be as narrow"
        )


def pairing(a: Sequence[float], b: Sequence[float]) -> Pairing | None:
    """Set the interval of paired differences beside the one of two groups of the same numbers.

    Args:
        a: (n,) one number per pair.
        b: (n,) the other of each pair.

    Returns:
        Both; None for fewer than two pairs, or where neither side varies.
    """
    n = len(a)
    variances = [deviation(side) ** 2 for side in (a, b)] if n > 1 else [0.0, 0.0]
    total = math.fsum(variances)
    if not total:
        return None
    # Welch's degrees of freedom for groups of one size.
    freedom = (n - 1) * total**2 / math.fsum(variance**2 for variance in variances)
    paired = half_width(deviation([x - y for x, y in zip(a, b, strict=True)]) / math.sqrt(n), n - 1)
    needed = next(
        (
            seeds
            for seeds in range(2, MOST_SEEDS + 1)
            if half_width(math.sqrt(total / seeds), freedom * (seeds - 1) / (n - 1)) <= paired
        ),
        None,
    )
    return Pairing(paired, half_width(math.sqrt(total / n), freedom), needed)


def _student(effect: float, spread: float, n: int, confidence: float) -> tuple[float, float, float]:
    from scipy import special

    error = spread / math.sqrt(n)
    half = half_width(error, n - 1, confidence)
    return effect - half, effect + half, 2 * float(special.stdtr(n - 1, -abs(effect) / error))


def _check(a: Sequence[float], b: Sequence[float], direction: str, smallest: float, confidence: float) -> None:
    problems = []
    if direction not in DIRECTIONS:
        hint = did_you_mean(direction, DIRECTIONS)
        problems.append(f"unknown direction '{direction}'.{hint} Expected: {', '.join(DIRECTIONS)}.")
    if not (math.isfinite(smallest) and smallest >= 0):
        problems.append(f"the smallest effect of interest is a finite number from 0 on; got {smallest:g}.")
    if not 0 < confidence < 1:
        problems.append(f"the confidence of an interval lies between 0 and 1, e.g. 0.95; got {confidence:g}.")
    if len(a) != len(b) or not len(a):
        problems.append(
            f"a paired difference needs as many numbers on both sides, at least one; got {len(a)} and {len(b)}."
        )
    for name, side in (("first", a), ("second", b)):
        if bad := [(k, value) for k, value in enumerate(side) if not math.isfinite(value)]:
            where = f"number {bad[0][0] + 1} of the {name} side is {bad[0][1]}"
            problems.append(f"a paired difference needs finite numbers: {where}. Leave that pair out, and say so.")
    if problems:
        raise UserError.collect(problems)


FEWEST_RUNS = 5
"""With fewer runs a bootstrap of them says little: of four there are 35 samples in all."""
FEWEST_PAIRS = 4


@dataclass(frozen=True)
class RankCorrelation:
    """How well one number orders runs by another, within each task."""

    rho: float  # Spearman's, of ranks within each task
    low: float | None  # of the interval, by resampling whole runs; None with fewer than FEWEST_RUNS
    high: float | None
    least: float | None  # rho's range when each run in turn is left out; None where that leaves too little
    most: float | None
    n: int  # pairs, of tasks that two runs or more have
    runs: int


def rank_correlation(
    runs: Sequence[Mapping[Hashable, tuple[float, float]]],
    *,
    resamples: int = 2_000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> RankCorrelation | None:
    """Return the rank correlation of two numbers over runs, each task's mean rank taken out, with its interval.

    Both numbers are ranked over the runs within each task and the ranks correlated over all tasks together: do the runs
    that are high in the one tend to be high in the other? That one task is high in both says nothing here. With one
    task it is Spearman's. Pairs of one run share its training, so runs are resampled whole (percentiles of the cluster
    bootstrap, Davison and Hinkley 1997, section 3.8) and ranked anew, and one run at a time is left out. The tasks are
    taken as fixed: the interval is of other runs of these tasks.

    Args:
        runs: The pair of each task of each run; runs without one do not count, nor do tasks that one run alone has.
        resamples: Of the bootstrap; those in which one side does not vary are left out.
        confidence: Of the interval.
        seed: Of the resampling.

    Returns:
        None with fewer than ``FEWEST_PAIRS`` pairs, or where one side does not vary.

    Example:
        >>> found = rank_correlation([{"a": (1.0, 20.0), "b": (5.0, 2.0)}, {"a": (3.0, 40.0), "b": (6.0, 3.0)}])
        >>> found.rho, found.n, found.runs, found.low
        (1.0, 4, 2, None)
    """
    holders = Counter(task for pairs in runs for task in pairs)
    shared = ({task: pair for task, pair in pairs.items() if holders[task] > 1} for pairs in runs)
    own = [pairs for pairs in shared if pairs]
    rho = _within_tasks(own)
    if rho is None:
        return None
    left_out = [_within_tasks([*own[:out], *own[out + 1 :]]) for out in range(len(own))]
    known = [value for value in left_out if value is not None]
    least, most = (min(known), max(known)) if len(known) == len(own) > 1 else (None, None)
    low = high = None
    if len(own) >= FEWEST_RUNS:
        draw = random.Random(seed)
        drawn = (_within_tasks(draw.choices(own, k=len(own))) for _ in range(resamples))
        values = sorted(value for value in drawn if value is not None)
        tail = (1 - confidence) / 2
        low, high = (values[round(share * (len(values) - 1))] for share in (tail, 1 - tail))
    return RankCorrelation(rho, low, high, least, most, sum(map(len, own)), len(own))


def _within_tasks(runs: Sequence[Mapping[Hashable, tuple[float, float]]]) -> float | None:
    """Return the correlation of the ranks within each task, equal values sharing their mean rank."""
    tasks: dict[Hashable, list[tuple[float, float]]] = {}
    for own in runs:
        for task, pair in own.items():
            tasks.setdefault(task, []).append(pair)
    if sum(map(len, tasks.values())) < FEWEST_PAIRS:
        return None
    x, y = (
        [rank for pairs in tasks.values() for rank in _centred_ranks([pair[side] for pair in pairs])] for side in (0, 1)
    )
    scale = math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))
    return None if scale == 0 else math.fsum(a * b for a, b in zip(x, y, strict=True)) / scale


def _centred_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    places: dict[float, list[int]] = {}
    for place, value in enumerate(order):
        places.setdefault(value, []).append(place)
    middle = (len(values) - 1) / 2
    return [math.fsum(places[value]) / len(places[value]) - middle for value in values]

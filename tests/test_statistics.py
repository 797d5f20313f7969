"""Paired differences and their verdicts: closed forms, printed tables, scipy, and how often they hold in simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flatpatch.errors import UserError
from flatpatch.statistics import (
    CONTRADICTED,
    FEWEST_RUNS,
    MOST_SEEDS,
    SUPPORTED,
    TOO_SMALL,
    UNDECIDED,
    corrected,
    holm,
    least_squares,
    paired_difference,
    pairing,
    rank_correlation,
    seeds_that_decide,
)

STUDIES = 1_000
# The 97.5 % point of Student's t: with 2 degrees of freedom in closed form, with 4 as printed in tables.
T2, T4 = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), 2.7764451051977987


def simulated(effect: float, n: int, *, seed: int, smallest: float = 0.0) -> list[str]:
    """Return the verdicts of many studies whose differences are normal with deviation 1."""
    draws = np.random.default_rng(seed).normal(effect, 1.0, (STUDIES, n))
    return [paired_difference(row, [0.0] * n, direction="higher", smallest=smallest).verdict for row in draws]


def test_interval_and_p_match_the_closed_form():
    # Differences 1, 2, 3: mean 2, deviation 1. With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], direction="higher")
    half, t = T2 / math.sqrt(3), 2 * math.sqrt(3)
    assert (found.effect, found.n, found.spread) == (2.0, 3, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-12)
    assert found.verdict == UNDECIDED


@settings(deadline=None)  # scipy is loaded by the first example
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=3, max_size=8))
def test_interval_and_p_match_scipys(pairs: list[tuple[float, float]]):
    a, b = map(list, zip(*pairs, strict=True))
    differences = [x - y for x, y in pairs]
    if np.std(differences) < 1e-6:
        return
    found = paired_difference(a, b, direction="lower")
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    scale = max(map(abs, differences))
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-8 * scale)


@pytest.mark.parametrize(
    ("differences", "direction", "smallest", "verdict"),
    [
        # Mean 2, deviation 1, five pairs: interval 2 -+ 2.776 / sqrt(5) = 0.758 to 3.242.
        ([1.0, 1.0, 2.0, 3.0, 3.0], "higher", 0.0, SUPPORTED),
        ([1.0, 1.0, 2.0, 3.0, 3.0], "lower", 0.0, CONTRADICTED),
        ([-1.0, -1.0, -2.0, -3.0, -3.0], "lower", 0.0, SUPPORTED),
        ([-1.0, -1.0, -2.0, -3.0, -3.0], "higher", 0.0, CONTRADICTED),
        # The interval reaches beyond the smallest effect, so that it is not shown to be smaller.
        ([1.0, 1.0, 2.0, 3.0, 3.0], "higher", 3.2, SUPPORTED),
        ([1.0, 1.0, 2.0, 3.0, 3.0], "higher", 3.3, TOO_SMALL),
        ([1.0, 1.0, 2.0, 3.0, 3.0], "lower", 3.3, TOO_SMALL),
        ([-1.0, -1.0, 0.0, 1.0, 1.0], "higher", 1.2, UNDECIDED),
        ([-1.0, -1.0, 0.0, 1.0, 1.0], "higher", 1.3, TOO_SMALL),
        ([-1.0, -1.0, 0.0, 1.0, 1.0], "higher", 0.0, UNDECIDED),
    ],
)
def test_verdict_is_read_off_the_interval(differences: list[float], direction: str, smallest: float, verdict: str):
    found = paired_difference(differences, [0.0] * 5, direction=direction, smallest=smallest)
    assert found.high - found.low == pytest.approx(2 * T4 / math.sqrt(5), rel=1e-9)
    assert found.verdict == verdict
    assert (found.more_seeds is not None) == (verdict == UNDECIDED and smallest > 0)


def test_one_seed_is_undecided_without_interval_and_says_so():
    found = paired_difference([80.0], [70.0], direction="higher")
    assert (found.effect, found.low, found.high, found.p, found.verdict) == (10.0, None, None, None, UNDECIDED)
    assert found.more_seeds is None
    assert found.sentence("points") == "undecided: +10 points from one seed, which shows no spread to judge by"


def test_few_equal_differences_are_no_certainty():
    # 60.1 - 60 and 50.1 - 50 are equal but for rounding.
    found = paired_difference([60.1, 50.1, 40.1], [60.0, 50.0, 40.0], direction="higher")
    assert (found.low, found.high, found.verdict, found.p) == (None, None, UNDECIDED, 0.25)
    assert found.more_seeds == 6
    assert found.sentence("points").endswith("with no spread to judge by, about 6 seeds in all would decide")


def test_six_equal_differences_are_judged_by_their_signs():
    found = paired_difference([3.0] * 6, [2.0] * 6, direction="higher")
    assert (found.low, found.high, found.verdict, found.p) == (1.0, 1.0, SUPPORTED, 2 / 64)
    assert paired_difference([3.0] * 6, [2.0] * 6, direction="higher", smallest=1.5).verdict == TOO_SMALL


def test_runs_that_never_differ_show_no_effect_and_at_six_one_too_small():
    few = paired_difference([2.0] * 3, [2.0] * 3, direction="lower", smallest=0.5)
    assert (few.verdict, few.p, few.more_seeds) == (UNDECIDED, 1.0, 6)
    many = paired_difference([2.0] * 6, [2.0] * 6, direction="lower", smallest=0.5)
    assert many.verdict == TOO_SMALL
    assert paired_difference([2.0] * 6, [2.0] * 6, direction="lower").more_seeds is None


@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_effect_that_is_not_there_is_called_supported_in_at_most_2_5_percent_of_studies(n: int):
    verdicts = simulated(0.0, n, seed=n)
    noise = 3 * math.sqrt(0.025 * 0.975 / STUDIES)  # three standard deviations of such a count's share
    for verdict in (SUPPORTED, CONTRADICTED):
        assert verdicts.count(verdict) / STUDIES == pytest.approx(0.025, abs=noise)


def test_several_absent_effects_of_a_study_are_found_in_at_most_2_5_percent_of_studies():
    draws = np.random.default_rng(1).normal(size=(STUDIES, 4, 3))
    found = [
        [found.verdict for found in corrected([paired_difference(d, [0.0] * 3, direction="lower") for d in study])]
        for study in draws
    ]
    noise = 3 * math.sqrt(0.025 * 0.975 / STUDIES)
    assert sum(SUPPORTED in verdicts for verdicts in found) / STUDIES < 0.025 + noise


def test_an_effect_at_the_margin_is_called_too_small_in_at_most_2_5_percent_of_studies():
    verdicts = simulated(1.5, 12, seed=2, smallest=1.5)
    assert verdicts.count(TOO_SMALL) / STUDIES < 0.025 + 3 * math.sqrt(0.025 * 0.975 / STUDIES)


@pytest.mark.parametrize(("effect", "smallest", "expected"), [(1.0, 0.0, SUPPORTED), (0.1, 0.8, TOO_SMALL)])
def test_an_effect_is_found_at_the_promised_power(effect: float, smallest: float, expected: str):
    n = seeds_that_decide(effect, 1.0, beyond=2, smallest=smallest)
    verdicts = simulated(effect, n, seed=3, smallest=smallest)
    power = sum(verdict != UNDECIDED for verdict in verdicts) / STUDIES
    assert power > 0.8 - 3 * math.sqrt(0.8 * 0.2 / STUDIES)
    assert max(set(verdicts), key=verdicts.count) == expected
    fewer = simulated(effect, n - 4, seed=4, smallest=smallest)
    assert sum(verdict != UNDECIDED for verdict in fewer) / STUDIES < 0.8


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 1.0, 2.0])
def test_seeds_that_decide_is_the_first_number_with_that_power(ratio: float):
    """Against the power of the two-sided test, both tails, straight from the noncentral t distribution."""

    def power(n: int) -> float:
        critical = stats.t.ppf(0.975, n - 1)
        off = ratio * math.sqrt(n)
        return stats.nct.sf(critical, n - 1, off) + stats.nct.cdf(-critical, n - 1, off)

    assert seeds_that_decide(ratio, 1.0, beyond=1) == next(n for n in range(2, 1000) if power(n) >= 0.8)


@pytest.mark.parametrize("spread", [round(0.02 * k, 2) for k in range(1, 61)])
def test_a_clearer_effect_never_needs_more_seeds(spread: float):
    """Where the effect is many deviations, scipy's distribution is NaN for some numbers of pairs among others."""
    clear, less = (seeds_that_decide(1.0, s, beyond=5, smallest=0.2, level=0.05 / 6) for s in (spread, spread + 0.02))
    assert clear is not None and less is not None and 6 <= clear <= less < 30


def test_seeds_that_decide_knows_the_textbook_number():
    # Cohen 1988 and every table since: a paired difference of half its deviation needs 34 pairs for 80 % at 5 %.
    assert seeds_that_decide(0.5, 1.0, beyond=3) == 34
    assert seeds_that_decide(-0.5, 1.0, beyond=40) == 41
    assert seeds_that_decide(0.05, 1.0, beyond=3) is None  # more than MOST_SEEDS
    assert seeds_that_decide(0.0, 1.0, beyond=MOST_SEEDS) is None


def test_seeds_that_would_decide_are_called_rough_where_few_show_the_spread():
    found = paired_difference([1.0, 2.0, 3.0, 2.0], [0.0, 2.0, 1.0, 3.0], direction="higher")
    assert found.sentence().endswith(f"about {found.more_seeds} seeds in all would decide")


def test_an_undecided_effect_says_how_many_seeds_would_decide():
    found = paired_difference([1.0, 2.0, 3.0], [0.0] * 3, direction="higher")
    assert found.more_seeds == seeds_that_decide(2.0, 1.0, beyond=3)
    assert found.sentence("points", "in the miniature") == (
        "undecided in the miniature: +2 points (95 % interval -0.4841 to +4.484; 3 seeds; p = 0.074); "
        f"about {found.more_seeds} seeds in all would decide, a rough guess from 3"
    )


def test_holm_matches_a_worked_example():
    # 0.01, 0.04, 0.03, 0.005: times 3, 1, 2, 4, and none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.4]) == [0.4]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@settings(deadline=None)  # scipy is loaded by the first example
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_rule_rejects(p: list[float]):
    """Holm's own words: stop at the first k of the sorted p-values above alpha / (m - k + 1)."""
    alpha, rejected = 0.05, set()
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        if p[k] > alpha / (len(p) - rank):
            break
        rejected.add(k)
    assert {k for k, value in enumerate(holm(p)) if value <= alpha} == rejected


def test_under_holm_a_hypothesis_must_hold_after_correction_too():
    sure = paired_difference([1.0, 1.01, 1.02], [0.0] * 3, direction="higher")
    barely = paired_difference([1.0, 1.0, 2.0, 3.0, 3.0], [0.0] * 5, direction="higher")
    alone = paired_difference([5.0], [0.0], direction="higher")
    assert (sure.verdict, barely.verdict) == (SUPPORTED, SUPPORTED)
    first, second, third = corrected([sure, barely, alone])
    assert (first.verdict, second.verdict, third.verdict) == (SUPPORTED, SUPPORTED, UNDECIDED)
    assert second.adjusted_p == pytest.approx(2 * barely.p)
    others = [replace(barely, p=0.5, low=-1.0, verdict=UNDECIDED)] * 4
    first, second, *_ = corrected([sure, barely, *others])
    assert (first.verdict, second.verdict) == (SUPPORTED, UNDECIDED)
    # Of six hypotheses one is found: the next is asked at a fifth of 5 %.
    assert second.more_seeds == seeds_that_decide(2.0, 1.0, beyond=5, level=0.05 / 5)
    assert third.adjusted_p is None
    assert "0.033 after Holm's correction" in corrected([barely] * 3)[0].sentence()


def test_slope_is_that_of_the_nearest_line():
    assert least_squares([0.0, 1.0, 2.0], [-3.0, 0.0, 3.0]) == 3.0
    at, noisy = [0.0, 1.0, 3.0, 4.0], [1.0, 5.0, 2.0, 7.0]
    assert least_squares(at, noisy) == pytest.approx(np.polyfit(at, noisy, 1)[0], rel=1e-12)


def test_seeds_that_decide_are_those_of_the_level_that_the_verdict_is_read_at():
    # Equivalence is read off the interval, whatever the number of hypotheses.
    small = paired_difference([0.6, -0.6, 0.6, -0.6], [0.0] * 4, direction="higher", smallest=0.5)
    assert small.verdict == UNDECIDED and small.effect == pytest.approx(0)
    assert [each and each.more_seeds for each in corrected([small] * 10)] == [small.more_seeds] * 10
    # Six equal differences are enough for one hypothesis, and one too few for two.
    alike = paired_difference([2.0] * 6, [0.0] * 6, direction="higher")
    assert alike.verdict == SUPPORTED
    first, second = corrected([alike, alike])
    assert first is not None and (first.verdict, first.more_seeds) == (UNDECIDED, 7)
    assert first == second


def test_hypothesis_without_a_number_counts_among_the_others():
    found = paired_difference([1.0, 1.2, 1.1], [0.0] * 3, direction="higher")
    first, nothing = corrected([found, None])
    assert nothing is None
    assert first is not None and first.adjusted_p == pytest.approx(2 * found.p)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0], [], {}, "as many numbers on both sides, at least one; got 1 and 0"),
        ([], [], {}, "got 0 and 0"),
        ([1.0, math.nan], [1.0, 2.0], {}, "number 2 of the first side is nan"),
        ([1.0, 2.0], [math.inf, 2.0], {}, "number 1 of the second side is inf"),
        ([1.0], [1.0], {"direction": "hihger"}, "unknown direction 'hihger'. Did you mean 'higher'?"),
        ([1.0], [1.0], {"smallest": -1.0}, "got -1"),
        ([1.0], [1.0], {"confidence": 95.0}, "e.g. 0.95; got 95"),
    ],
)
def test_wrong_numbers_are_refused_in_one_message(a: list[float], b: list[float], options: dict, message: str):
    with pytest.raises(UserError) as raised:
        paired_difference(a, b, **{"direction": "higher", **options})
    assert message in str(raised.value)


def test_wrong_slopes_and_p_values_are_refused():
    with pytest.raises(UserError, match="all 2 stand at 3"):
        least_squares([3.0, 3.0], [1.0, 2.0])
    with pytest.raises(UserError, match="got 1 at 1 places"):
        least_squares([3.0], [1.0])
    with pytest.raises(UserError, match=r"between 0 and 1; got 1\.5"):
        holm([0.5, 1.5])


def test_unpaired_interval_is_welchs_and_the_seeds_are_the_fewest_that_match() -> None:
    generator = random.Random(3)
    state = [generator.gauss(0, 2) for _ in range(6)]
    a = [value + 1 + generator.gauss(0, 0.5) for value in state]
    b = [value + generator.gauss(0, 0.5) for value in state]
    found = pairing(a, b)
    assert found is not None
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found.unpaired == pytest.approx((welch.high - welch.low) / 2, rel=1e-12)
    student = stats.ttest_rel(a, b).confidence_interval()
    assert found.paired == pytest.approx((student.high - student.low) / 2, rel=1e-12)
    assert found.paired < found.unpaired / 3
    assert found.seeds is not None and found.seeds > 6
    # Without a common state pairing saves nothing.
    apart = pairing(a, [generator.gauss(0, 2) for _ in range(6)])
    assert apart is not None and apart.paired > apart.unpaired / 2
    assert f"{found.seeds} seeds a side" in found.sentence("points")


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_pairing_of_one_pair_or_of_equal_numbers_says_nothing(a: list[float], b: list[float]) -> None:
    assert pairing(a, b) is None


Pairs = dict[Hashable, tuple[float, float]]


def noisy_runs(count: int, noise: float, seed: int = 0) -> list[Pairs]:
    draw = random.Random(seed)
    return [{task: (x := draw.gauss(0, 1), x + noise * draw.gauss(0, 1)) for task in range(3)} for _ in range(count)]


def within_tasks(runs: list[Pairs]) -> float:
    """Return what scipy makes of the ranks, each task's mean taken out."""
    sides: tuple[list[float], list[float]] = ([], [])
    for task in dict.fromkeys(task for own in runs for task in own):
        for side, all_ranks in enumerate(sides):
            ranks = stats.rankdata([own[task][side] for own in runs if task in own])
            all_ranks += (ranks - ranks.mean()).tolist()
    return float(stats.pearsonr(*sides).statistic)


def test_rank_correlation_within_one_task_is_scipys_with_ties_too() -> None:
    tied = [(1.0, 2.0), (1.0, 3.0), (2.0, 3.0), (5.0, 0.0), (5.0, 7.0)]
    for pairs in ([own[0] for own in noisy_runs(7, 1.0)], tied):
        found = rank_correlation([{"a": pair} for pair in pairs])
        expected = stats.spearmanr(*zip(*pairs, strict=True)).statistic
        assert found is not None and found.rho == pytest.approx(expected, rel=1e-12)
        assert (found.n, found.runs) == (len(pairs), len(pairs))


def test_ranks_of_several_tasks_are_correlated_with_each_tasks_mean_taken_out() -> None:
    runs = [*noisy_runs(6, 1.0), {0: (0.3, -1.0)}, {7: (9.0, 9.0)}]  # task 7 has no other run to be ranked with
    found = rank_correlation(runs)
    assert found is not None and found.rho == pytest.approx(within_tasks(runs), rel=1e-12)
    assert (found.n, found.runs) == (19, 7)
    moved = [{task: (x + 100 * task, y - 7 * task) for task, (x, y) in own.items()} for own in runs]  # type: ignore[operator]
    assert rank_correlation(moved) == found


def test_tasks_that_differ_are_no_relation_between_runs() -> None:
    """Two unrelated numbers, each with effects of the tasks that are three times as large as those of the runs."""
    beyond = 0
    for trial in range(60):
        draw = random.Random(trial)
        effects = [(3 * draw.gauss(0, 1), 3 * draw.gauss(0, 1)) for _ in range(3)]
        runs: list[Pairs] = [
            {task: (x + draw.gauss(0, 1), y + draw.gauss(0, 1)) for task, (x, y) in enumerate(effects)}
            for _ in range(8)
        ]
        found = rank_correlation(runs, resamples=200)
        assert found is not None and found.low is not None and found.high is not None
        beyond += not found.low <= 0 <= found.high
    assert beyond <= 0.15 * 60


def test_range_is_that_of_leaving_each_run_out_and_the_interval_holds_the_correlation() -> None:
    runs = noisy_runs(8, 1.0)
    found = rank_correlation(runs)
    left_out = [within_tasks([own for k, own in enumerate(runs) if k != out]) for out in range(8)]
    assert found is not None and found.low is not None and found.high is not None
    assert (found.least, found.most) == pytest.approx((min(left_out), max(left_out)), rel=1e-12)
    assert -1 <= found.low < found.rho < found.high <= 1
    assert rank_correlation(runs) == found  # the same numbers, the same interval


def test_runs_are_resampled_whole() -> None:
    """Three equal tasks in each run say no more than one of them: the interval is as wide."""
    single = [own[0] for own in noisy_runs(12, 1.0, seed=4)]
    one, three = (rank_correlation([dict.fromkeys(range(count), pair) for pair in single]) for count in (1, 3))
    assert one is not None and three is not None
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=1e-12)


def test_too_few_runs_have_no_interval_and_too_few_pairs_or_equal_ones_no_correlation() -> None:
    few, enough = (rank_correlation(noisy_runs(count, 0.5)) for count in (FEWEST_RUNS - 1, FEWEST_RUNS))
    assert few is not None and few.low is few.high is None and few.least is not None
    assert enough is not None and enough.low is not None
    assert rank_correlation([{0: (1.0, 2.0)}, {0: (2.0, 1.0), 1: (3.0, 4.0)}, {}]) is None
    assert rank_correlation([{0: (1.0, 2.0), 1: (2.0, 3.0)}, {0: (1.0, 4.0), 1: (2.0, 5.0)}]) is None
    assert rank_correlation([{k: (float(k), float(k * k)) for k in range(4)}]) is None  # one run is above no other
    two = rank_correlation(noisy_runs(2, 0.5))
    assert two is not None and two.least is None

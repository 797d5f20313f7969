"""The metrics of an accuracy matrix.

Three rungs: a matrix worked out by hand, slow loops written straight from the formulas, and
properties that hold for every matrix.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatpatch import metrics as m

NAN = math.nan
# Best earlier: 90 and 70; last: 93 and 60. So forgetting (-3 + 10) / 2, and BWT (13 - 10) / 2.
HAND = [[80, NAN, NAN], [90, 70, NAN], [93, 60, 50]]

MATRIX_METRICS = [
    m.average_accuracy,
    m.learning_accuracy,
    m.average_over_steps,
    m.forgetting,
    m.forgetting_lower_bound,
    m.backward_transfer,
    m.forgetting_mehta,
    m.forgetting_cllora,
]


@st.composite
def matrices(draw, min_tasks=2, max_tasks=6):
    size = draw(st.integers(min_tasks, max_tasks))
    percent = st.floats(0, 100, allow_nan=False, width=32)
    rows = [[draw(percent) if j <= i else NAN for j in range(size)] for i in range(size)]
    return np.array(rows)


@st.composite
def full_matrices(draw):
    size = draw(st.integers(2, 5))
    percent = st.floats(0, 100, allow_nan=False, width=32)
    return np.array([[draw(percent) for _ in range(size)] for _ in range(size)])


def test_forgetting_of_the_hand_worked_matrix():
    assert m.forgetting(HAND) == 3.5


def test_backward_transfer_of_the_hand_worked_matrix():
    assert m.backward_transfer(HAND) == 1.5


def test_other_metrics_of_the_hand_worked_matrix():
    assert m.average_accuracy(HAND) == pytest.approx(203 / 3)
    assert m.learning_accuracy(HAND) == pytest.approx(200 / 3)
    assert m.average_over_steps(HAND) == pytest.approx((80 + 80 + 203 / 3) / 3)
    # With the last step in the maximum only the second task lost anything: 10 points.
    assert m.forgetting_mehta(HAND) == pytest.approx(10 / 3)
    assert m.forgetting_cllora(HAND) == 5.0


def test_forward_transfer_of_a_hand_worked_matrix():
    accuracy = [[80, 30, 10], [90, 70, 20], [93, 60, 50]]
    # (30 - 25 + 20 - 5) / 2; the first task and its random accuracy play no part.
    assert m.forward_transfer(accuracy, [99, 25, 5]) == 10.0


def test_forward_transfer_is_none_without_evaluations_of_future_tasks():
    assert m.forward_transfer(HAND, [0, 0, 0]) is None


FULL = [[80, 40, 30], [70, 90, 50], [60, 80, 95]]


def test_metrics_of_runs_that_test_every_task_after_each_of_a_hand_worked_matrix():
    assert m.transfer(FULL) == 40.0  # the mean of 40 and of (30 + 50) / 2
    assert m.average_of_all(FULL) == pytest.approx(595 / 9)
    assert m.last(FULL) == m.average_accuracy(FULL) == pytest.approx(235 / 3)
    assert m.accuracy_elsewhere(FULL) == pytest.approx(330 / 6)


@given(full_matrices())
def test_metrics_of_every_task_equal_loops_written_from_the_formulas(a):
    size = len(a)
    columns = [sum(a[i][j] for i in range(j)) / j for j in range(1, size)]
    assert m.transfer(a) == pytest.approx(sum(columns) / (size - 1))
    assert m.average_of_all(a) == pytest.approx(sum(sum(row) / size for row in a) / size)
    assert m.last(a) == pytest.approx(sum(a[-1]) / size)
    pairs = [a[i][j] for i in range(size) for j in range(size) if i != j]
    assert m.accuracy_elsewhere(a) == pytest.approx(sum(pairs) / len(pairs))


@given(matrices())
def test_metrics_of_every_task_are_none_where_tasks_not_yet_learned_were_not_tested(a):
    names = [metric.name for metric in m.METRICS.values() if metric.every_task]
    assert names == ["transfer", "average", "last", "accuracy_elsewhere"]
    summary = m.summarise(a)
    assert [summary[name] for name in names] == [None] * 4


def test_forgetting_is_negative_when_old_tasks_improve_at_the_last_step():
    assert m.forgetting([[50, NAN], [60, 70]]) == -10
    assert m.forgetting_mehta([[50, NAN], [60, 70]]) == 0


@given(matrices())
def test_metrics_equal_loops_written_from_the_formulas(a):
    size = len(a)
    old = range(size - 1)
    expected = {
        m.average_accuracy: sum(a[-1][j] for j in range(size)) / size,
        m.learning_accuracy: sum(a[j][j] for j in range(size)) / size,
        m.average_over_steps: sum(sum(a[t][j] for j in range(t + 1)) / (t + 1) for t in range(size)) / size,
        m.forgetting: sum(max(a[t][j] for t in range(j, size - 1)) - a[-1][j] for j in old) / (size - 1),
        m.backward_transfer: sum(a[-1][j] - a[j][j] for j in old) / (size - 1),
        m.forgetting_mehta: sum(max(a[t][j] for t in range(j, size)) - a[-1][j] for j in range(size)) / size,
        m.forgetting_cllora: sum(max(a[t][j] for t in range(j, size)) - a[-1][j] for j in old) / (size - 1),
    }
    for metric, value in expected.items():
        assert metric(a) == pytest.approx(value, abs=1e-9), metric.__name__


@given(matrices())
def test_forgetting_is_at_least_minus_backward_transfer(a):
    assert m.forgetting(a) >= -m.backward_transfer(a) - 1e-9


@given(matrices(min_tasks=2, max_tasks=2))
def test_forgetting_is_minus_backward_transfer_for_two_tasks(a):
    assert m.forgetting(a) == pytest.approx(-m.backward_transfer(a), abs=1e-9)


@given(matrices())
def test_paper_variants_of_forgetting_are_ordered(a):
    size = len(a)
    assert m.forgetting_cllora(a) >= max(0.0, m.forgetting(a)) - 1e-9
    assert m.forgetting_mehta(a) == pytest.approx(m.forgetting_cllora(a) * (size - 1) / size, abs=1e-9)


@given(st.floats(0, 100), st.integers(2, 6))
def test_a_constant_matrix_has_no_forgetting_and_no_transfer(value, size):
    a = np.where(np.tri(size, dtype=bool), value, NAN)
    assert m.forgetting(a) == m.backward_transfer(a) == m.forgetting_mehta(a) == 0
    assert m.average_accuracy(a) == pytest.approx(value)
    assert m.average_over_steps(a) == pytest.approx(value)


@given(matrices(), st.data())
def test_a_missing_entry_gives_none_or_the_same_value(a, data):
    size = len(a)
    i = data.draw(st.integers(0, size - 1))
    j = data.draw(st.integers(0, i))
    gap = a.copy()
    gap[i, j] = NAN
    for metric in MATRIX_METRICS:
        if metric is not m.forgetting_lower_bound:
            assert metric(gap) in (None, metric(a)), metric.__name__
    bound = m.forgetting_lower_bound(gap)
    assert bound is None or bound <= m.forgetting(a) + 1e-9


@given(matrices())
def test_forgetting_lower_bound_equals_forgetting_when_nothing_is_missing(a):
    assert m.forgetting_lower_bound(a) == pytest.approx(m.forgetting(a), abs=1e-9)


@given(matrices())
def test_metrics_leave_their_input_as_it_was(a):
    before = a.copy()
    for metric in MATRIX_METRICS:
        metric(a)
    m.forgetting_per_task(a)
    m.forward_transfer(a, np.zeros(len(a)))
    m.summarise(a)
    assert np.array_equal(a, before, equal_nan=True)


@given(matrices(min_tasks=1))
def test_lists_round_trip_through_json(a):
    rows = json.loads(json.dumps(m.to_lists(a), allow_nan=False))
    assert np.array_equal(m.from_lists(rows), a, equal_nan=True)


def test_one_task_has_no_forgetting_and_no_transfer():
    one = [[70.0]]
    assert m.average_accuracy(one) == m.learning_accuracy(one) == m.average_over_steps(one) == 70
    assert m.forgetting(one) is None
    assert m.forgetting_lower_bound(one) is None
    assert m.forgetting_cllora(one) is None
    assert m.backward_transfer(one) is None
    assert m.transfer(one) is m.accuracy_elsewhere(one) is None
    assert m.average_of_all(one) == m.last(one) == 70
    assert m.forward_transfer(one, [0]) is None
    assert m.forgetting_mehta(one) == 0
    assert m.forgetting_per_task(one).shape == (0,)


def test_metrics_of_a_run_stopped_half_way_are_none_where_the_last_row_is_needed():
    half = [[80, NAN, NAN], [90, 70, NAN], [NAN, NAN, NAN]]
    assert [metric(half) for metric in MATRIX_METRICS] == [None] * len(MATRIX_METRICS)


def test_a_missing_earlier_step_leaves_a_lower_bound_of_forgetting():
    gap = [[80, NAN, NAN], [NAN, 70, NAN], [60, 60, 50]]
    assert m.forgetting(gap) is None
    assert m.forgetting_lower_bound(gap) == 15
    assert m.backward_transfer(gap) == -15


def test_forgetting_per_task_is_nan_for_a_task_never_evaluated_before_the_last_step():
    gap = [[80, NAN, NAN], [NAN, NAN, NAN], [60, 60, 50]]
    assert np.array_equal(m.forgetting_per_task(gap), [20, NAN], equal_nan=True)
    assert m.forgetting_lower_bound(gap) is None


def test_summary_names_both_averages():
    summary = m.summarise(HAND, sample_weighted=[80, 81, 66])
    assert summary["average_accuracy"] == pytest.approx(203 / 3)
    assert summary["sample_weighted_accuracy"] == 66
    assert summary["averaged_accuracy_inflora"] == pytest.approx(227 / 3)
    assert summary["forgetting"] == 3.5
    assert summary["forward_transfer"] is None
    json.dumps(summary, allow_nan=False)


def test_summary_of_an_unfinished_run_holds_none_and_no_nan():
    summary = m.summarise(np.full((3, 3), NAN), sample_weighted=[None, NAN, NAN])
    assert set(summary.values()) == {None}


def test_averaged_accuracy_inflora_is_none_when_a_step_is_missing():
    assert m.averaged_accuracy_inflora([80, None, 60]) is None


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([], "non-empty T x T matrix; got shape"),
        ([[1, 2]], r"got shape \(1, 2\)"),
        ([1, 2], r"got shape \(2,\)"),
        ([[1, 2], [3]], "matrix of numbers"),
        ([[101.0]], "0 to 100; got values from 101 to 101"),
        ([[-0.5]], "0 to 100; got values from -0.5"),
        ([[math.inf]], "0 to 100; got values from inf"),
        ([["many"]], "matrix of numbers"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(accuracy, message):
    with pytest.raises(ValueError, match=message):
        m.average_accuracy(accuracy)


def test_random_accuracy_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\), one per task; got \(2,\)"):
        m.forward_transfer(HAND, [0, 0])


def test_sample_weighted_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="must have 3 entries, one per step; got 1"):
        m.summarise(HAND, sample_weighted=[80])


@pytest.mark.parametrize("classes", [False, True])
def test_each_metric_has_a_title_of_its_own_and_says_what_it_means(classes):
    words = {name: metric.say(classes) for name, metric in m.METRICS.items()}
    assert len({said.title for said in words.values()}) == len(words)
    assert all(said.meaning for said in words.values())
    assert {metric.better for metric in m.METRICS.values()} == {"higher", "lower"}
    assert {metric.unit for metric in m.METRICS.values()} == {"%", "points"}
    # The first numbers of a page stand in the run's own table too, learning accuracy excepted.
    shown = {name for name, said in words.items() if said.headline}
    assert len(shown) == 4 and shown - {"learning_accuracy"} <= {name for name, said in words.items() if said.brief}


def test_metrics_of_a_curve_alone_are_those_that_need_no_more():
    known = {name for name, value in m.summarise(None, sample_weighted=[80, 60]).items() if value is not None}
    assert known == {name for name, metric in m.METRICS.items() if metric.needs == ("sample_weighted",)}

"""Numbers made from an accuracy matrix.

``accuracy[i, j]`` is the accuracy in percent on task j after training task i, both counted
from 0; NaN where it was not evaluated, never 0. T is the number of tasks.

The rule for gaps: a metric that needs an entry which is missing is None, never a number over
fewer entries. ``forgetting_per_task`` and ``forgetting_lower_bound`` are the two exceptions,
and say in their names what they are instead. Metrics that compare an old task with itself do
not exist for one task, and are None there too.

Papers disagree on the meaning of "forgetting" and "average accuracy"; where a paper's own
formula differs from the one here it has its own function, named for the paper. ``METRICS`` holds
for each one its title, its direction and its meaning, which nothing else says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def average_accuracy(accuracy: ArrayLike) -> float | None:
    """Return the mean over tasks after the last one: ``(1/T) sum_j A[T-1, j]``.

    GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840) calls it ACC, the O-LoRA and N-LoRA papers
    call it average accuracy (AA). Each task counts the same, however many test samples it has.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent, or None if an entry of the last row is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    return _mean(_checked(accuracy)[-1])


def learning_accuracy(accuracy: ArrayLike) -> float | None:
    """Return the mean accuracy on each task right after training it: ``(1/T) sum_j A[j, j]``.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent, or None if an entry of the diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    return _mean(np.diagonal(_checked(accuracy)))


def average_over_steps(accuracy: ArrayLike) -> float | None:
    """Return the mean over steps of the mean over the tasks seen: ``(1/T) sum_t mean_{j<=t} A[t, j]``.

    InfLoRA's paper calls it averaged accuracy; its code, and CL-LoRA, average over all classes seen instead:
    ``averaged_accuracy_inflora``.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent, or None if an entry on or below the diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return _mean(np.array([a[t, : t + 1].mean() for t in range(len(a))]))


def forgetting(accuracy: ArrayLike) -> float | None:
    """Return how much was lost since each old task was at its best, on average.

    ``(1/(T-1)) sum_{j<T-1} ( max_{j<=t<T-1} A[t, j] - A[T-1, j] )``: the best *earlier* accuracy
    minus the last (Chaudhry et al. 2018, arXiv:1801.10112), so it is negative when old tasks
    improve at the last step.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percentage points. None for one task, or if an entry of an old task on or below the
        diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.

    Example:
        >>> nan = float("nan")
        >>> forgetting([[80, nan, nan], [90, 70, nan], [93, 60, 50]])
        3.5
    """
    a = _checked(accuracy)
    # np.max, unlike np.nanmax, lets a missing entry through to the mean.
    return _mean(np.array([a[j:-1, j].max() - a[-1, j] for j in range(len(a) - 1)]))


def forgetting_per_task(accuracy: ArrayLike) -> FloatArray:
    """Return each old task's best accuracy among the earlier evaluations there are, minus its last.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        (T-1,) percentage points; NaN for a task never evaluated before the last step, or not at it.
        A task with some earlier evaluations missing has a lower bound here.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    losses = np.full(len(a) - 1, np.nan)
    for j in range(len(a) - 1):
        earlier = a[j:-1, j]
        if not np.isnan(earlier).all():
            losses[j] = np.nanmax(earlier) - a[-1, j]
    return losses


def forgetting_lower_bound(accuracy: ArrayLike) -> float | None:
    """Return ``forgetting`` with missing earlier evaluations left out of the maximum.

    A maximum over fewer entries cannot be larger, so the true value is at least this. Equal to
    ``forgetting`` when nothing is missing.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percentage points. None for one task, or if a task has no earlier evaluation at all.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    return _mean(forgetting_per_task(accuracy))


def backward_transfer(accuracy: ArrayLike) -> float | None:
    """Return how old tasks changed since each was trained: ``(1/(T-1)) sum_{j<T-1} A[T-1, j] - A[j, j]``.

    BWT of GEM (arXiv:1706.08840); negative when tasks are forgotten.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percentage points. None for one task, or if an entry needed is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return _mean(a[-1, :-1] - np.diagonal(a)[:-1])


def transfer(accuracy: ArrayLike) -> float | None:
    """Return how well tasks are done before they are learned: ``(1/(T-1)) sum_{j>0} (1/j) sum_{i<j} A[i, j]``.

    Transfer of ZSCL (Zheng et al. 2023, arXiv:2303.06628), for models that can do tasks that they never learned.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent. None for one task, or if an entry above the diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.

    Example:
        >>> transfer([[80, 40, 30], [70, 90, 50], [60, 80, 95]])
        40.0
    """
    a = _checked(accuracy)
    return _mean(np.array([a[:j, j].mean() for j in range(1, len(a))]))


def average_of_all(accuracy: ArrayLike) -> float | None:
    """Return the mean over all steps and all tasks, learned or not: ``(1/T^2) sum_{i, j} A[i, j]``.

    ZSCL's "average" (arXiv:2303.06628): the mean over tasks of each one's mean over the steps.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent, or None if any entry is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    return _mean(_checked(accuracy))


def last(accuracy: ArrayLike) -> float | None:
    """Return ``average_accuracy`` of a run that tested every task after each: ZSCL's "last" (arXiv:2303.06628).

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent, or None if any entry is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return None if np.isnan(a).any() else _mean(a[-1])


def accuracy_elsewhere(accuracy: ArrayLike) -> float | None:
    """Return the mean accuracy on every task but the one just trained: ``(1/(T(T-1))) sum_{i != j} A[i, j]``.

    With one adapter per task, how well the adapters do on each other's tasks.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percent. None for one task, or if an entry off the diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return _mean(a[~np.eye(len(a), dtype=bool)])


def forward_transfer(accuracy: ArrayLike, random_accuracy: ArrayLike) -> float | None:
    """Return the head start earlier tasks gave: ``(1/(T-1)) sum_{j>0} A[j-1, j] - b[j]``.

    FWT of GEM (arXiv:1706.08840). It needs evaluations of tasks not trained yet, which the
    upstream runs do not make.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.
        random_accuracy: (T,) percent on each task of the untrained model.

    Returns:
        Percentage points. None for one task, or if an entry needed is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages, or
            ``random_accuracy`` does not have one percentage per task.
    """
    a = _checked(accuracy)
    b = np.array(random_accuracy, dtype=np.float64)
    if b.shape != (len(a),):
        raise ValueError(f"random_accuracy must have shape ({len(a)},), one per task; got {b.shape}.")
    _check_percent(b, "random_accuracy")
    return _mean(np.diagonal(a, offset=1) - b[1:])


def forgetting_mehta(accuracy: ArrayLike) -> float | None:
    """Return forgetting as in the code of Mehta et al. (JMLR 2023, arXiv:2112.09153).

    ``(1/T) sum_{j<T} ( max_t A[t, j] - A[T-1, j] )``: the maximum includes the last step and the
    divisor counts the last task, whose term is 0. Never negative.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percentage points; None if an entry on or below the diagonal is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return _mean(np.array([a[j:, j].max() - a[-1, j] for j in range(len(a))]))


def forgetting_cllora(accuracy: ArrayLike) -> float | None:
    """Return forgetting as CL-LoRA's code prints it.

    ``(1/(T-1)) sum_{j<T-1} ( max_t A[t, j] - A[T-1, j] )``: the maximum includes the last step, so it is
    never negative; the divisor leaves the last task out.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated.

    Returns:
        Percentage points. None for one task, or if an entry of an old task is missing.

    Raises:
        ValueError: If ``accuracy`` is not a non-empty square matrix of percentages.
    """
    a = _checked(accuracy)
    return _mean(np.array([a[j:, j].max() - a[-1, j] for j in range(len(a) - 1)]))


def averaged_accuracy_inflora(sample_weighted: Sequence[float | None]) -> float | None:
    """Return the mean over steps of the sample-weighted accuracy, as InfLoRA's code prints it.

    It is CL-LoRA's average accuracy too, whose paper takes the accuracy on all classes seen so far. InfLoRA's paper
    defines ``average_over_steps``; the two differ when tasks have unequal test sets.

    Args:
        sample_weighted: (T,) percent of all test samples seen so far answered correctly after each
            task; None or NaN where not evaluated.

    Returns:
        Percent, or None if a step is missing.

    Raises:
        ValueError: If it is empty or holds something other than percentages.
    """
    values = np.array([np.nan if value is None else value for value in sample_weighted], dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("sample_weighted must hold one number per step; got none.")
    _check_percent(values, "sample_weighted")
    return _mean(values)


def sample_weighted_accuracy(sample_weighted: Sequence[float | None]) -> float | None:
    """Return the accuracy over all test samples after the last task, as upstream prints it.

    Args:
        sample_weighted: (T,) percent, as for ``averaged_accuracy_inflora``.

    Returns:
        Percent, or None if it was not evaluated.
    """
    last = sample_weighted[-1]
    return None if last is None or np.isnan(last) else float(last)


@dataclass(frozen=True)
class Words:
    """What readers are told of a metric.

    Attributes:
        title: Its name, without its unit.
        meaning: How it is made, in a line.
        brief: Likewise in the few words that a table on the terminal has room for; empty keeps it off that table.
        headline: Whether it is among the first numbers of a page.
    """

    title: str
    meaning: str
    brief: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Metric:
    """One metric: all that is said of it anywhere.

    Attributes:
        name: In the record.
        formula: Makes it of what it needs.
        unit: ``%`` or ``points``.
        better: Whether ``higher`` or ``lower`` is better.
        words: For runs whose tasks are data sets.
        of_classes: For runs whose tasks are groups of one data set's classes; None where the words are the same.
        needs: The arguments of ``summarise`` that the formula takes.
        compared: Whether runs are compared by it without being asked to.
        every_task: Whether it needs runs that test every task after each, those not yet learned too.
    """

    name: str
    formula: Callable[..., float | None]
    unit: str
    better: str
    words: Words
    of_classes: Words | None = None
    needs: tuple[str, ...] = ("accuracy",)
    compared: bool = False
    every_task: bool = False

    def say(self, classes: bool) -> Words:
        """Return its words for runs of a kind; ``classes`` where their tasks are groups of classes."""
        return self.of_classes if classes and self.of_classes else self.words


# In the order in which tables have them.
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "average_accuracy",
            average_accuracy,
            "%",
            "higher",
            Words(
                "average accuracy",
                "mean over tasks after the last one; the papers' AA",
                "mean over tasks; the papers' AA",
                headline=True,
            ),
            Words(
                "average accuracy",
                "mean over tasks after the last one; no paper's number",
                "mean over tasks after the last",
            ),
            compared=True,
        ),
        Metric(
            "sample_weighted_accuracy",
            sample_weighted_accuracy,
            "%",
            "higher",
            Words(
                "sample-weighted accuracy",
                "over all test samples after the last task",
                "upstream's predict_exact_match",
            ),
            Words(
                "final accuracy",
                "over all test images after the last task; the papers' A_T",
                "all test images; the papers' A_T",
                headline=True,
            ),
            needs=("sample_weighted",),
            compared=True,
        ),
        Metric(
            "averaged_accuracy_inflora",
            averaged_accuracy_inflora,
            "%",
            "higher",
            Words("averaged accuracy", "over all test samples seen, averaged over the training"),
            Words(
                "averaged accuracy",
                "over all test images seen, averaged over the training",
                "mean of that over the tasks",
                headline=True,
            ),
            needs=("sample_weighted",),
            compared=True,
        ),
        Metric(
            "forgetting",
            forgetting,
            "points",
            "lower",
            Words(
                "forgetting",
                "best earlier accuracy minus the last, mean over old tasks",
                "best earlier minus last, old tasks",
                headline=True,
            ),
            compared=True,
        ),
        Metric(
            "backward_transfer",
            backward_transfer,
            "points",
            "higher",
            Words(
                "backward transfer",
                "last accuracy minus that right after training, mean over old tasks (GEM)",
                "last minus just trained, old tasks",
                headline=True,
            ),
        ),
        Metric(
            "forward_transfer",
            forward_transfer,
            "points",
            "higher",
            Words("forward transfer", "accuracy before training minus chance (GEM)"),
            needs=("accuracy", "random_accuracy"),
        ),
        Metric(
            "transfer",
            transfer,
            "%",
            "higher",
            Words(
                "transfer",
                "accuracy on a task before it is learned, mean over steps, then over tasks (ZSCL)",
                "tasks before they are learned",
            ),
            every_task=True,
        ),
        Metric(
            "average",
            average_of_all,
            "%",
            "higher",
            Words("average", "over all steps and all tasks, learned or not (ZSCL)", "all steps and all tasks"),
            every_task=True,
        ),
        Metric(
            "last",
            last,
            "%",
            "higher",
            Words("last", "mean over tasks after the last one, of runs that test every task after each (ZSCL)"),
            every_task=True,
        ),
        Metric(
            "accuracy_elsewhere",
            accuracy_elsewhere,
            "%",
            "higher",
            Words(
                "accuracy elsewhere",
                "on every task but the one just trained, mean over steps and tasks",
                "tasks other than the one just trained",
            ),
            every_task=True,
        ),
        Metric(
            "learning_accuracy",
            learning_accuracy,
            "%",
            "higher",
            Words("learning accuracy", "accuracy right after training a task, mean over tasks", headline=True),
            Words("learning accuracy", "accuracy right after training a task, mean over tasks"),
        ),
        Metric(
            "average_over_steps",
            average_over_steps,
            "%",
            "higher",
            Words("average over steps", "mean accuracy of the tasks seen, averaged over the training"),
        ),
        Metric(
            "forgetting_lower_bound",
            forgetting_lower_bound,
            "points",
            "lower",
            Words("forgetting, lower bound", "forgetting from the evaluations there are, where some are missing"),
        ),
        Metric(
            "forgetting_mehta",
            forgetting_mehta,
            "points",
            "lower",
            Words("forgetting, Mehta's", "Mehta et al.'s own formula"),
        ),
        Metric(
            "forgetting_cllora",
            forgetting_cllora,
            "points",
            "lower",
            Words("forgetting, never negative", "best accuracy, the last one too, minus the last, mean over old tasks"),
        ),
    )
}
# What one line for a run, or for a set of runs, has room for.
IN_A_LINE = ("average_accuracy", "forgetting")
MARGIN = 1.0  # points: a smaller difference does not count, unless somebody says otherwise


def summarise(
    accuracy: ArrayLike | None,
    *,
    sample_weighted: Sequence[float | None] | None = None,
    random_accuracy: ArrayLike | None = None,
) -> dict[str, float | None]:
    """Return every metric under its own name, as a run's record keeps them.

    Args:
        accuracy: (T, T) percent, NaN where not evaluated; None if it is not known.
        sample_weighted: (T,) percent over all test samples after each task (upstream's printed
            ``predict_exact_match``), if known.
        random_accuracy: (T,) percent of the untrained model, if known.

    Returns:
        Metric name to value; None where the metric does not exist or needs a missing entry.

    Raises:
        ValueError: If a shape or a value does not fit.
    """
    a = None if accuracy is None else _checked(accuracy)
    if a is not None and sample_weighted is not None and len(sample_weighted) != len(a):
        raise ValueError(f"sample_weighted must have {len(a)} entries, one per step; got {len(sample_weighted)}.")
    given = {"accuracy": a, "sample_weighted": sample_weighted, "random_accuracy": random_accuracy}
    return {
        metric.name: None
        if any(given[name] is None for name in metric.needs)
        else metric.formula(*(given[name] for name in metric.needs))
        for metric in METRICS.values()
    }


def to_lists(accuracy: ArrayLike) -> list[list[float | None]]:
    """Return the matrix as nested lists with None for NaN, the form JSON can hold."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in _checked(accuracy)]


def from_lists(rows: Sequence[Sequence[float | None]]) -> FloatArray:
    """Return the matrix of nested lists, with NaN for None; the inverse of ``to_lists``.

    Args:
        rows: T lists of T percentages or None.

    Returns:
        (T, T) percent, NaN where not evaluated.

    Raises:
        ValueError: If it is not a non-empty square matrix of percentages.
    """
    return _checked([[np.nan if x is None else x for x in row] for row in rows])


def _mean(values: Any) -> float | None:
    """Mean, or None for nothing or a gap."""
    if not values.size or np.isnan(values).any():
        return None
    return float(values.mean())


def _checked(accuracy: ArrayLike) -> FloatArray:
    """Return a float64 copy after checking shape and range."""
    try:
        a = np.array(accuracy, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"accuracy must be a T x T matrix of numbers: {error}") from None
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size:
        raise ValueError(f"accuracy must be a non-empty T x T matrix; got shape {a.shape}.")
    _check_percent(a, "accuracy")
    return a


def _check_percent(values: FloatArray, name: str) -> None:
    known = values[~np.isnan(values)]
    if known.size and (known.min() < 0 or known.max() > 100):
        raise ValueError(f"{name} is in percent, 0 to 100; got values from {known.min():g} to {known.max():g}.")

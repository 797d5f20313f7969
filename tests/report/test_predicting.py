"""What predicts forgetting: pairs of runs and earlier tasks, and what is said of few runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from flatpatch.report.groups import Group, Run, forgetting_per_task, group_runs, read_run
from flatpatch.report.page import make_page
from flatpatch.report.predicting import make_predictors_figure, predictors
from tests.report.test_ledger import write_ledgers
from tests.report_page import flatness_entry, seeded, write_run
from tests.report_records import ORDER_1


def lost_points(seed: int) -> list[float]:
    """Return by how much each task is forgotten: more the later it comes, and for each by another order of the runs."""
    return [(index + 1) * (1.0 + (index + 1) * seed % 5) for index in range(3)]


def make_runs(folder: Path, count: int) -> list[Run]:
    """Write runs in which tasks are forgotten by ``lost_points`` and the top eigenvalue is minus it."""
    runs = []
    for seed in range(count):
        losses = lost_points(seed)
        matrix = [
            [None if j > i else 90.0 - (losses[j] if i == 3 and j < 3 else 0.0) for j in range(4)] for i in range(4)
        ]
        entries = [
            flatness_entry(index, "after", "adapter", {"top_eigenvalue": -losses[index], "trace": None})
            for index in range(3)
        ]
        record = seeded(seed, tasks=ORDER_1, accuracy_matrix=matrix, flatness=entries)
        place = write_run(folder / str(seed), record)
        write_ledgers(place, scale=seed + 1.0)
        runs.append(read_run(place))
        assert forgetting_per_task(runs[-1]) == pytest.approx(losses)
    return runs


def groups_of(folder: Path, count: int) -> list[Group]:
    return group_runs(make_runs(folder, count))


def test_each_number_is_correlated_with_the_forgetting_of_its_task_and_run(tmp_path: Path) -> None:
    found = {each.title: each for each in predictors(groups_of(tmp_path, 5))}
    top = found["largest eigenvalue after learning it, adapter (depends on writing)"]
    assert (top.n, top.runs, top.note) == (15, 5, "") and top.found is not None
    assert top.found.rho == pytest.approx(-1.0) and top.found.least == pytest.approx(-1.0)
    # The ledger's sums of every task rise with the seed; as many runs of each task, so the correlation is the mean.
    lost = [lost_points(seed) for seed in range(5)]
    expected = sum(stats.spearmanr(range(5), [own[task] for own in lost]).statistic for task in range(3)) / 3
    assert 0.1 < expected < 0.9
    for title in ("change of its loss by the ledger", "curvature term of the ledger"):
        each = found[title]
        assert each.found is not None and each.found.rho == pytest.approx(expected, rel=1e-9) and each.n == 15
    assert found["gradient term of the ledger"].found.rho == pytest.approx(-found[title].found.rho)  # type: ignore[union-attr]
    assert not any(title.startswith("trace") for title in found)  # no run has it
    figure = make_predictors_figure(list(found.values()))
    assert figure is not None and len(figure.axes[0].get_yticks()) == 4


def test_few_runs_have_no_interval_and_the_page_says_so(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, 2)
    assert {each.note for each in predictors(groups)} == {"too few runs for an interval: 2 of at least 5"}
    page = make_page(groups)
    assert "What predicts forgetting" in page and "too few runs for an interval: 2 of at least 5" in page


def test_one_run_predicts_nothing(tmp_path: Path) -> None:
    groups = groups_of(tmp_path, 1)
    assert predictors(groups) == [] and make_predictors_figure([]) is None
    assert "What predicts forgetting" not in make_page(groups)

"""The reference numbers in the package: complete, consistent with themselves, each with a source."""

from __future__ import annotations

import numpy as np
import pytest

from flatpatch.errors import UserError
from flatpatch.report.baselines import list_baselines, load_baseline

OLORA = [name for name in list_baselines() if name.startswith("olora_")]
PAPERS = [name for name in list_baselines() if name.startswith("paper_")]


def test_the_t5_baselines_are_there():
    assert len(OLORA) == 7
    assert {"paper_nlora", "paper_olora"} <= set(PAPERS)


@pytest.mark.parametrize("name", OLORA)
def test_shipped_runs_name_their_source_and_agree_with_their_matrix(name):
    baseline = load_baseline(name)
    assert len(baseline["source"]["commit"]) == 40
    numbers = baseline["metrics"]
    last = numbers["accuracy_matrix"][-1]
    assert len(last) == len(baseline["setting"]["task_order"])
    # The matrix has four decimals, so its mean is known to half of the last one.
    assert np.mean(last) == pytest.approx(numbers["final_accuracy"]["mean"], abs=5.1e-5)


@pytest.mark.parametrize("name", PAPERS)
def test_paper_rows_have_a_number_a_known_verification_level_and_a_source(name):
    baseline = load_baseline(name)
    assert baseline["arxiv"]
    for table in baseline["tables"]:
        assert table["sources"] or table.get("note")
        for row in table["rows"]:
            assert set(row["verification"].split(", ")) <= set(baseline["verification_levels"])
            assert isinstance(row["mean"], int | float)


def test_the_numbers_quoted_most_are_as_printed():
    rows = {(r["method"], r["benchmark"]): r["mean"] for r in load_baseline("paper_nlora")["tables"][0]["rows"]}
    assert rows["N-LoRA", "T5-large, order-1"] == 79.2
    assert load_baseline("olora_order1")["metrics"]["final_accuracy"]["mean"] == 78.3651


def test_unknown_baseline_is_a_users_error():
    with pytest.raises(UserError, match=r"unknown baseline 'olora_order_1'\. Did you mean 'olora_order1'\?"):
        load_baseline("olora_order_1")

"""The reference numbers in the package: complete, consistent with themselves, each with a source."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

from flatpatch.errors import UserError
from flatpatch.metrics import summarise
from flatpatch.report.baselines import find_baselines, list_baselines, load_baseline, paper_rows, validate_baseline

NAMES = list_baselines()
OLORA = [name for name in NAMES if name.startswith("olora_")]
VISION = [name for name in NAMES if name.startswith(("inflora_", "cllora_", "sdlora_"))]
PAPERS = [name for name in NAMES if name.startswith("paper_")]


def test_all_baselines_are_there():
    assert (len(OLORA), len(VISION)) == (7, 11)
    assert PAPERS == ["paper_cllora", "paper_inflora", "paper_nlora", "paper_olora"]
    assert len(NAMES) == 22


@pytest.mark.parametrize("name", NAMES)
def test_baseline_follows_its_schema(name):
    validate_baseline(load_baseline(name))


@pytest.mark.parametrize("name", NAMES)
def test_kind_is_that_of_the_name(name):
    """Runs and papers are different experiments; what is compared with them depends on the kind."""
    expected = "paper" if name in PAPERS else "quoted run" if name == "cllora_imagenet_r_40" else "shipped run"
    assert load_baseline(name)["kind"] == expected


@pytest.mark.parametrize("name", OLORA)
def test_shipped_text_runs_name_their_source_and_agree_with_their_matrix(name):
    baseline = load_baseline(name)
    assert re.fullmatch("[0-9a-f]{40}", baseline["source"]["commit"])
    numbers = baseline["metrics"]
    last = numbers["accuracy_matrix"][-1]
    assert len(last) == len(baseline["setting"]["task_order"])
    # The matrix has four decimals, so its mean is known to half of the last one.
    assert np.mean(last) == pytest.approx(numbers["final_accuracy"]["mean"], abs=5.1e-5)


@pytest.mark.parametrize("name", [name for name in VISION if name != "cllora_imagenet_r_40"])
def test_shipped_vision_runs_agree_with_their_matrices(name):
    """Every stored summary is what our own formulas make of the stored matrix; they were derived by another program."""
    baseline = load_baseline(name)
    assert re.fullmatch("[0-9a-f]{40}", baseline["source"]["commit"])
    names = {
        "final_accuracy": "sample_weighted_accuracy",
        "average_accuracy": "averaged_accuracy_inflora",
        "macro_final": "average_accuracy",
        "forgetting": "forgetting",
        "bwt": "backward_transfer",
        "learning_accuracy": "learning_accuracy",
    }
    found = [
        summarise(np.array(run["accuracy_matrix"], dtype=float), sample_weighted=run["top1_curve"])
        for run in baseline["per_seed"]
    ]
    for stored, ours in names.items():
        values = [metrics[ours] for metrics in found]
        # Stored with four decimals.
        assert values == pytest.approx(baseline["metrics"][stored]["values"], abs=5.1e-5)
        assert np.mean(values) == pytest.approx(baseline["metrics"][stored]["mean"], abs=5.1e-5)
        if len(values) > 1:
            assert np.std(values, ddof=1) == pytest.approx(baseline["metrics"][stored]["std"], abs=5.1e-5)


@pytest.mark.parametrize("name", PAPERS)
def test_paper_rows_have_a_number_a_known_verification_level_and_a_source(name):
    baseline = load_baseline(name)
    assert baseline["arxiv"]
    rows = [row for table in baseline["tables"] for row in table["rows"]]
    assert any("applies_to" in row for row in rows)
    for table in baseline["tables"]:
        assert table["sources"]
    for row in rows:
        assert set(row["verification"].split(", ")) <= set(baseline["verification_levels"])
        # Orthogonality overlaps and transfers are not accuracies.
        assert 0 <= row["mean"] <= 100 or "record_metric" not in row


def test_the_numbers_quoted_most_are_as_printed():
    rows = {(r["method"], r["benchmark"]): r["mean"] for r in load_baseline("paper_nlora")["tables"][0]["rows"]}
    assert rows["N-LoRA", "T5-large, order-1"] == 79.2
    assert load_baseline("olora_order1")["metrics"]["final_accuracy"]["mean"] == 78.3651
    inflora = {"method": "inflora", "dataset": "cifar100", "tasks": 10}
    assert [
        (r["record_metric"], r["mean"], r["std"]) for _, r in paper_rows(load_baseline("paper_inflora"), inflora)
    ] == [
        ("sample_weighted_accuracy", 86.51, 0.73),
        ("averaged_accuracy_inflora", 91.7, 0.32),
    ]


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ({"method": "olora", "order": "1"}, ["olora_order1", "paper_olora"]),
        ({"method": "olora", "order": "6"}, ["olora_long", "paper_olora"]),
        ({"method": "nlora", "order": "4"}, ["paper_nlora"]),
        ({"method": "nlora", "order": "llama3"}, ["paper_nlora"]),
        ({"method": "inclora", "order": "1"}, ["olora_order1_icrlora", "paper_olora"]),
        ({"method": "inflora", "dataset": "cifar100", "tasks": 10}, ["inflora_cifar100", "paper_inflora"]),
        ({"method": "inflora", "dataset": "imagenet_r", "tasks": 20}, ["paper_inflora"]),
        (
            {"method": "inflora", "dataset": "cifar100", "tasks": 10, "shuffled": True},
            ["inflora_cifar100_shuffled_seed1993"],
        ),
        ({"method": "cllora", "dataset": "imagenet_r", "tasks": 40}, ["cllora_imagenet_r_40", "paper_cllora"]),
        ({"method": "sdlora", "dataset": "cifar100", "tasks": 10}, ["sdlora_cifar100"]),
        ({"method": "sdlora", "dataset": "imagenet_r", "tasks": 20}, ["sdlora_imagenet_r_20"]),
        ({"method": "inflorab5", "dataset": "cifar100", "tasks": 10}, []),
        ({"method": "cllora", "dataset": "cifar100", "tasks": 10}, []),
    ],
)
def test_baselines_are_found_by_what_they_apply_to(subject, names):
    assert find_baselines(subject) == names


def test_loading_gives_a_copy_of_its_own():
    load_baseline("olora_order1")["metrics"].clear()
    assert load_baseline("olora_order1")["metrics"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inflora_cifar100", lambda b: b.pop("source"), "lacks source"),
        ("inflora_cifar100", lambda b: b.update(kind="log"), "kind is 'log'"),
        ("inflora_cifar100", lambda b: b["per_seed"][0].update(seed=7), "seeds are not those of per_seed"),
        ("inflora_cifar100", lambda b: b["per_seed"][1]["top1_curve"].pop(), "seed 1: top1_curve has 9 entries"),
        ("inflora_cifar100", lambda b: b["per_seed"][1]["accuracy_matrix"].pop(), "is not 10 x 10"),
        ("inflora_cifar100", lambda b: b["applies_to"].update(data="x"), "unknown key 'data'"),
        (
            "olora_order1",
            lambda b: b["metrics"]["accuracy_matrix"][0].__setitem__(0, 110.0),
            "is 110.0, expected 0 to 100",
        ),
        ("paper_inflora", lambda b: b["tables"][0]["rows"][0].update(mean=None), "mean is None, expected number"),
        (
            "paper_inflora",
            lambda b: b["tables"][0]["rows"][0].update(verification="sure"),
            "verification sure is not among",
        ),
        ("paper_inflora", lambda b: b.update(runs=None), "a standard deviation of None runs"),
        ("paper_inflora", lambda b: b["tables"][0]["rows"][30].pop("record_metric"), "belong together"),
        ("paper_inflora", lambda b: b["tables"][0]["rows"].append(b["tables"][0]["rows"][30]), "a second row for"),
    ],
)
def test_faulty_baseline_is_found(name, change, message):
    baseline = copy.deepcopy(load_baseline(name))
    change(baseline)
    with pytest.raises(ValueError, match=message):
        validate_baseline(baseline)


def test_unknown_baseline_is_a_users_error():
    with pytest.raises(UserError, match=r"unknown baseline 'olora_order_1'\. Did you mean 'olora_order1'\?"):
        load_baseline("olora_order_1")

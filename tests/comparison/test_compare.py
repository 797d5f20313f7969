"""Verdicts of comparison: each rule on runs made to meet it, and everything that must not be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from flatpatch.comparison import compare_logged, compare_runs
from flatpatch.comparison.compare import differing
from flatpatch.comparison.sides import runs_of_baseline
from flatpatch.errors import UserError
from flatpatch.families.vision.splits import LISTED, LOGGED, OTHER, list_key
from flatpatch.report.baselines import list_baselines, load_baseline
from tests.comparison_cases import imagenet_r_record, inflora_record, logged_runs, olora_record, shifted, with_setting
from tests.report_records import make_quick_record, make_record

FIELDS = {"metric", "here", "there", "difference", "interval", "detectable", "test", "verdict", "why"}
FINAL = "sample_weighted_accuracy"


def entry(result, metric):
    (found,) = [entry for entry in result["metrics"] if entry["metric"] == metric]
    return found


def test_result_has_its_fields_and_can_be_written_as_json():
    for result in (
        compare_runs([inflora_record(0)]),
        compare_runs([inflora_record(0)], "paper_inflora", metrics=["forgetting"]),
        compare_runs([make_quick_record()]),
    ):
        assert set(result) == {"baseline", "runs", "verdict", "why", "notes", "metrics"}
        assert set(result["baseline"]) == {"name", "source", "kind", "verification"}
        for found in result["metrics"]:
            assert set(found) == FIELDS
            for side in ("here", "there"):
                assert set(found[side]) == {"mean", "standard_deviation", "n", "values"}
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_shipped_log_against_its_baseline_has_difference_zero():
    result = compare_logged(logged_runs())
    assert result["baseline"]["name"] == "inflora_cifar100"
    assert result["verdict"] == "reproduced"
    assert [found["metric"] for found in result["metrics"]] == [
        "average_accuracy",
        "sample_weighted_accuracy",
        "averaged_accuracy_inflora",
        "forgetting",
    ]
    for found in result["metrics"]:
        assert found["difference"] == 0.0
        assert found["test"] == "paired"
        assert found["here"]["n"] == found["there"]["n"] == 5


def test_three_points_off_one_seed_are_flagged():
    result = compare_logged(logged_runs(lambda seed, matrix: shifted(matrix, -3) if seed == 2 else matrix))
    # 0.6 times 3.77, the noncentrality at which Student's t with 4 degrees of freedom has 80 % power.
    assert result["verdict"] == "undecided: these seeds can only show differences of 2.26"
    found = entry(result, "average_accuracy")
    # Differences 0, 0, -3, 0, 0: mean -0.6, deviation 3/sqrt(5), standard error 0.6; t(0.975, 4) = 2.776445.
    assert found["difference"] == pytest.approx(-0.6)
    assert found["interval"] == pytest.approx([-0.6 - 2.776445 * 0.6, -0.6 + 2.776445 * 0.6], abs=1e-5)
    assert "seed 2 by -3.00, while the other 4 of the 5 equal their partners exactly" in found["why"]


def test_all_seeds_off_alike_are_off():
    """Every seed three points lower, but for a little noise: paired, the spread over seeds plays no part."""
    noise = {0: 0.1, 1: -0.1, 2: 0.0, 3: 0.05, 4: -0.05}
    result = compare_logged(logged_runs(lambda seed, matrix: shifted(matrix, -3 + noise[seed])))
    assert entry(result, "average_accuracy")["verdict"] == "off by -3.00"
    assert entry(result, "forgetting")["verdict"] != "off by -3.00"
    assert result["verdict"].startswith("off by -3.0")


def test_paired_runs_within_the_margin_are_reproduced_and_a_narrower_margin_undoes_it():
    changes = (0.2, -0.1, 0.1, -0.2, 0.05)
    records = [inflora_record(seed, points) for seed, points in enumerate(changes)]
    found = entry(compare_runs(records, metrics=[FINAL]), FINAL)
    assert found["test"] == "paired"
    assert found["difference"] == pytest.approx(sum(changes) / 5)
    assert found["verdict"] == "reproduced"
    narrow = compare_runs(records, metrics=[FINAL], margin=0.1)
    assert narrow["verdict"].startswith("undecided: these seeds can only show differences of 0.")
    assert f"{found['detectable']:.2f}" in narrow["verdict"]


def test_a_sure_difference_inside_the_margin_is_reproduced_all_the_same():
    records = [inflora_record(seed, points) for seed, points in enumerate((-0.5, -0.51, -0.49, -0.5, -0.52))]
    found = entry(compare_runs(records, metrics=[FINAL]), FINAL)
    assert found["interval"][1] < 0
    assert found["verdict"] == "reproduced"


def test_not_significant_is_not_reproduced():
    """Three unpaired seeds of the same runs: no difference at all, and nothing shown."""
    records = [inflora_record(seed, source=seed - 10) for seed in (10, 11, 12)]
    found = entry(compare_runs(records, metrics=[FINAL]), FINAL)
    assert found["test"] == "welch"
    low, high = found["interval"]
    assert low < -1 and high > 1
    assert found["detectable"] > 2
    assert found["verdict"] == f"undecided: these seeds can only show differences of {found['detectable']:.2f}"


def test_pairs_need_a_partner_each():
    same_seeds = compare_runs([inflora_record(seed, 0.1 * seed) for seed in (1, 3)], metrics=[FINAL])
    assert entry(same_seeds, FINAL)["test"] == "paired"
    assert entry(same_seeds, FINAL)["there"]["values"] == [84.92, 86.82]
    assert "compared with the 2 of their 5 runs that have the same seeds" in entry(same_seeds, FINAL)["why"]
    one_more = [inflora_record(1), inflora_record(7, 0.1, source=3)]
    assert entry(compare_runs(one_more, metrics=[FINAL]), FINAL)["test"] == "welch"


def test_one_run_against_five_has_a_prediction_interval():
    found = entry(compare_runs([inflora_record(0, 0.5)], metrics=[FINAL]), FINAL)
    # 86.84 against mean 86.326, deviation 0.81337: half width 2.776445 * 0.81337 * sqrt(6/5) = 2.4738.
    assert found["test"] == "prediction interval"
    assert found["difference"] == pytest.approx(0.514, abs=1e-9)
    assert found["interval"] == pytest.approx([0.514 - 2.4738, 0.514 + 2.4738], abs=1e-3)
    assert found["verdict"].startswith("undecided")
    assert entry(compare_runs([inflora_record(0, -4)], metrics=[FINAL]), FINAL)["verdict"] == "off by -3.99"


def test_one_run_against_one_says_that_there_is_no_test():
    found = entry(compare_runs([olora_record(1.0, seed=1)]), "average_accuracy")
    assert (found["test"], found["interval"], found["detectable"]) == ("difference only", None, None)
    assert found["difference"] == pytest.approx(1.0, abs=1e-4)
    assert found["verdict"] == "undecided"
    assert "no test" in found["why"]


def test_one_run_that_equals_its_partner_in_everything_is_reproduced():
    result = compare_runs([olora_record()])
    assert result["baseline"]["name"] == "olora_order1"
    assert result["verdict"] == "reproduced"


def test_equal_metric_of_an_unequal_run_is_not_reproduced():
    """One number may agree by chance: the whole matrix must."""
    record = olora_record()
    record["accuracy_matrix"][1][0] -= 1
    found = entry(compare_runs([record]), "average_accuracy")
    assert found["difference"] == 0
    assert found["verdict"] == "undecided"


def test_unequal_runs_whose_metric_does_not_spread_prove_nothing():
    records = [inflora_record(seed, 0.25) for seed in (0, 1, 2)]
    found = entry(compare_runs(records, metrics=[FINAL]), FINAL)
    assert found["interval"] is None
    assert found["verdict"] == "undecided"
    assert "do not spread" in found["why"]


def test_paper_row_is_compared_with_its_printed_spread():
    result = compare_runs([inflora_record(seed) for seed in range(5)], "paper_inflora")
    assert result["baseline"] == {
        "name": "paper_inflora",
        "source": "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning, arXiv:2404.00228, Table 2",
        "kind": "paper",
        "verification": "same value in >=2 independent secondary sources",
    }
    found = entry(result, FINAL)
    assert found["there"] == {"mean": 86.51, "standard_deviation": 0.73, "n": 5, "values": None}
    # 86.326 - 86.51, within 0.73.
    assert found["difference"] == pytest.approx(-0.184)
    assert (found["test"], found["verdict"]) == ("welch", "within the paper's spread")
    # 91.1836 - 91.70 is more than the printed 0.32.
    assert entry(result, "averaged_accuracy_inflora")["verdict"].startswith("undecided")
    assert result["verdict"].startswith("undecided")


def test_reproduced_says_more_than_within_the_papers_spread():
    result = compare_runs([inflora_record(seed) for seed in range(5)], "paper_inflora", metrics=[FINAL], margin=2)
    assert result["verdict"] == "reproduced"


def test_paper_row_far_away_is_off():
    result = compare_runs([inflora_record(seed, -4) for seed in range(5)], "paper_inflora")
    assert entry(result, FINAL)["verdict"] == "off by -4.18"


def test_paper_without_a_spread_is_judged_by_ours_alone():
    """O-LoRA's paper prints 75.4, a mean of 3 runs; ours are 78.37 + 0, 0.2, -0.2."""
    records = [olora_record(points, seed=seed) for seed, points in enumerate((0.0, 0.2, -0.2))]
    found = entry(compare_runs(records, "paper_olora"), "average_accuracy")
    assert found["there"] == {"mean": 75.4, "standard_deviation": None, "n": 3, "values": None}
    half = 4.302653 * 0.2 * math.sqrt(1 / 3 + 1 / 3)
    assert found["test"] == "prediction interval"
    assert found["interval"] == pytest.approx([2.9651 - half, 2.9651 + half], abs=5e-3)
    assert found["verdict"] == "off by +2.97"
    assert "the paper prints no spread" in found["why"]
    alone = entry(compare_runs(records[:1], "paper_olora"), "average_accuracy")
    assert (alone["test"], alone["verdict"]) == ("difference only", "undecided")


def test_paper_that_does_not_say_how_many_runs_counts_as_one():
    record = olora_record(method="nlora")
    found = entry(compare_runs([record]), "average_accuracy")
    assert (found["there"]["mean"], found["there"]["n"]) == (79.2, None)


def test_metric_is_compared_with_the_same_definition_only():
    """InfLoRA's paper has no forgetting, and a text run no InfLoRA-style average."""
    result = compare_runs([inflora_record(0)], "paper_inflora", metrics=["forgetting"])
    assert result["verdict"] == "not comparable because paper_inflora has no forgetting"
    assert entry(result, "forgetting")["difference"] is None
    missing = compare_runs([olora_record()], metrics=["averaged_accuracy_inflora"])
    assert missing["verdict"].startswith("not comparable because")
    assert {found["metric"] for found in compare_runs([inflora_record(0)], "paper_inflora")["metrics"]} == {
        "sample_weighted_accuracy",
        "averaged_accuracy_inflora",
    }


def test_a_run_with_sam_is_at_best_equivalent():
    changes = (0.2, -0.1, 0.1, -0.2, 0.05)
    records = [with_setting(inflora_record(seed, points), sam="sam") for seed, points in enumerate(changes)]
    result = compare_runs(records, metrics=[FINAL])
    assert result["verdict"] == "equivalent"
    assert "not a reproduction" in entry(result, FINAL)["why"]
    without = [with_setting(record, rho=0.0) for record in records]
    assert compare_runs(without, metrics=[FINAL])["verdict"] == "reproduced"


@pytest.mark.parametrize(
    ("record", "label"),
    [
        (make_quick_record(method="olora"), "quick, reference"),
        (make_quick_record(method="olora", labels=[]), "quick, reference"),  # whatever the record's labels say
        (olora_record(labels=["off-protocol"]), "off-protocol"),
        (inflora_record(0, labels=["off-protocol"]), "off-protocol"),
    ],
)
def test_labelled_runs_are_not_compared(record, label):
    result = compare_runs([record])
    assert result["verdict"] == f"not comparable because it is labelled {label}"
    assert result["baseline"] is not None
    assert result["metrics"] == []


def test_one_labelled_run_among_others_stops_the_comparison():
    result = compare_runs([inflora_record(0), inflora_record(1, labels=["off-protocol"])])
    assert result["verdict"] == "not comparable because it is labelled off-protocol"


@pytest.mark.parametrize(
    ("record", "baseline", "why"),
    [
        (
            olora_record(),
            "olora_long",
            "this is olora, order 1, of which olora_long says nothing: that is olora, order 6",
        ),
        (olora_record(), "inflora_cifar100", "that is inflora, cifar100 in 10 tasks"),
        (olora_record(), "paper_cllora", "this is olora, order 1, of which paper_cllora says nothing"),
        (olora_record(labels=["quick"]), "paper_cllora", "(baseline of another method: cllora)"),
        (inflora_record(0), "paper_nlora", "paper_nlora says nothing (baseline of another method: "),
        (inflora_record(0), "inflora_cifar100_shuffled_seed1993", "classes shuffled"),
        (with_setting(inflora_record(0), variant="inflorab5"), None, "no published number of inflorab5, cifar100"),
        (
            olora_record(tasks=["dbpedia", "amazon", "agnews", "yahoo"]),
            None,
            "its order is another: dbpedia, amazon, agn",
        ),
        (
            olora_record(tasks=["dbpedia", "amazon", "yahoo", "yelp"]),
            None,
            "its tasks are others: dbpedia, amazon, yahoo",
        ),
    ],
)
def test_other_benchmarks_tasks_and_orders_are_not_compared(record, baseline, why):
    result = compare_runs([record], baseline)
    assert result["verdict"].startswith("not comparable because ")
    assert why in result["why"]
    assert result["metrics"] == []


def test_run_on_the_split_of_the_shipped_logs_is_compared_with_them_and_with_the_paper():
    result = compare_runs([imagenet_r_record(0)])
    assert (result["baseline"]["name"], result["verdict"]) == ("inflora_imagenet_r_10", "reproduced")
    assert result["notes"] == []
    paper = compare_runs([imagenet_r_record(0)], "paper_inflora")
    assert paper["metrics"]
    assert paper["notes"] == [f"the split of imagenet-r is {LOGGED}; which one the paper's runs had is not known"]


@pytest.mark.parametrize(("split", "said"), [(LISTED, f"{LISTED}, not {LOGGED}"), ("mine", OTHER)])
def test_run_on_another_split_is_compared_with_the_paper_alone(split, said):
    result = compare_runs([imagenet_r_record(0, split)])
    assert result["verdict"] == f"not comparable because its split of imagenet-r is {said}"
    assert result["metrics"] == []
    paper = compare_runs([imagenet_r_record(0, split)], "paper_inflora")
    assert paper["metrics"]
    [note] = paper["notes"]
    assert note == f"the split of imagenet-r is {said.split(',')[0]}; which one the paper's runs had is not known"


def test_runs_of_different_splits_are_not_compared():
    moved = with_setting(imagenet_r_record(1, LISTED), data="/elsewhere")
    result = compare_runs([imagenet_r_record(0), moved], names=["a", "b"])
    assert result["why"].startswith(
        "a and b had other images: their lists of imagenet-r/test have the hashes 524afde87656"
    )
    assert result["metrics"] == []
    same = with_setting(imagenet_r_record(1), data="/elsewhere")
    assert compare_runs([imagenet_r_record(0), same])["verdict"] == "reproduced"
    with pytest.raises(UserError, match="differ in more than their seed: data"):
        compare_runs([inflora_record(0), with_setting(inflora_record(1), data="/elsewhere")])


@pytest.mark.parametrize("splits", [(None, LISTED, LOGGED), (LISTED, None, LOGGED), (LOGGED, None, "mine")])
def test_every_two_runs_are_held_against_each_other(splits):
    records = [imagenet_r_record(seed, split) for seed, split in enumerate(splits)]
    result = compare_runs(records, names=["a", "b", "c"])
    known = [name for name, split in zip("abc", splits, strict=True) if split]
    assert result["why"].startswith(f"{known[0]} and {known[1]} had other images: their lists of imagenet-r/test")


@pytest.mark.parametrize("splits", [(None, LISTED), ("mine", None), (None, "mine", "mine")])
def test_run_without_a_split_hides_no_other_split(splits):
    records = [imagenet_r_record(seed, split) for seed, split in enumerate(splits)]
    result = compare_runs(records)
    assert result["verdict"].startswith("not comparable because its split of imagenet-r is ")
    assert "the split of imagenet-r could not be checked: a record has no hash of it" in result["notes"]
    paper = compare_runs(records, "paper_inflora")
    assert paper["metrics"]
    assert [note.split("imagenet-r ")[1][:12] for note in paper["notes"]] == list(
        dict.fromkeys({None: "could not be", LISTED: "is the one l", "mine": "is neither t"}[split] for split in splits)
    )


def test_record_without_a_split_says_that_it_could_not_be_checked():
    result = compare_runs([imagenet_r_record(0, None)])
    assert result["verdict"] == "reproduced"
    assert result["notes"] == ["the split of imagenet-r could not be checked: a record has no hash of it"]


@pytest.mark.parametrize(
    ("benchmark", "dataset", "split", "here"),
    [
        ("imagenet_r", "imagenet_r", "mine", f"; here it is {OTHER}"),
        ("imagenet_r", "imagenet_r", LISTED, f"; here it is {LISTED}"),
        ("vtab", "vtab", None, ""),
    ],
)
def test_split_of_cllora_is_said_to_be_unchecked(benchmark, dataset, split, here):
    record = imagenet_r_record(0, split, method="cllora", benchmark=benchmark)
    notes = compare_runs([record])["notes"]
    assert notes == [
        f"the split of {dataset} could not be checked: CL-LoRA takes LAMDA-PILOT's, of which no list is published{here}"
    ]
    other = record | {"seeds": [1], "inputs": {list_key("vtab/test"): "b"}}
    one = record | {"inputs": {list_key("vtab/test"): "a"}}
    assert "had other images: their lists of vtab/test have the hashes a and b" in compare_runs([one, other])["why"]


def test_without_a_shipped_run_the_papers_row_is_taken():
    result = compare_runs([olora_record(order="4")])
    assert result["baseline"]["name"] == "paper_olora"
    assert entry(result, "average_accuracy")["there"]["mean"] == 72.3


def test_profile_paper_is_not_compared_with_runs_of_the_code():
    change = {"what": "lamb", "upstream": "0.98", "here": "0.99", "why": "profile paper: the paper has 0.99"}
    records = [inflora_record(0, profile="paper", deviations=[change])]
    assert "profile=paper changed lamb" in compare_runs(records, "inflora_cifar100")["why"]
    assert compare_runs(records)["baseline"]["name"] == "paper_inflora"
    assert compare_runs(records)["metrics"]
    assert compare_runs([inflora_record(0, profile="paper")])["baseline"]["name"] == "inflora_cifar100"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no run to compare"),
        ([make_record(done=2)], "is interrupted, not finished"),
        ([olora_record(), olora_record(method="nlora", seed=1)], "several methods: olora, nlora"),
        ([olora_record(), olora_record(order="2", seed=1)], "differ in more than their seed: order"),
        ([inflora_record(0), with_setting(inflora_record(1), sam="sam")], "more than their seed: sam"),
        ([inflora_record(0), inflora_record(1, benchmark="imagenet_r_10")], "more than their seed: benchmark"),
        ([inflora_record(3), inflora_record(3)], "have the same seed, 3"),
    ],
)
def test_sets_of_runs_that_make_no_sense_are_users_errors(records, message):
    with pytest.raises(UserError, match=message):
        compare_runs(records)


@pytest.mark.parametrize(
    "values",
    [{"rho": 0.1}, {"sam_on": "task"}, {"sync": "global"}, {"ascent_loss": "task"}, {"measure": "loss,trace"}],
    ids=lambda values: next(iter(values)),
)
def test_what_leaves_training_without_sam_as_it_is_does_not_set_runs_apart(values):
    records = [inflora_record(0), with_setting(inflora_record(1), **values)]
    assert compare_runs(records, metrics=[FINAL])["verdict"] == "reproduced"


def test_a_setting_that_an_earlier_version_lacks_is_at_its_default():
    new, early = (with_setting(inflora_record(seed), sam="sam") for seed in (0, 1))
    new = with_setting(new, sam_radius="factors", ascent_batch=1.0)
    early["settings"].pop("sam_radius", None)
    assert differing(new, early) == []
    assert differing(with_setting(new, ascent_batch=0.5), early) == ["ascent_batch"]


def test_with_sam_the_step_that_it_perturbs_sets_runs_apart():
    records = [with_setting(inflora_record(0), sam="sam"), with_setting(inflora_record(1), sam="sam", sam_on="task")]
    with pytest.raises(UserError, match="more than their seed: sam_on"):
        compare_runs(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "inflora_cifar10"}, "unknown baseline 'inflora_cifar10'. Did you mean 'inflora_cifar100'"),
        ({"metrics": ["forgeting"]}, "unknown metric 'forgeting'. Did you mean 'forgetting'"),
        ({"margin": 0.0}, "margin=0 is out of range"),
        ({"margin": math.nan}, "margin=nan is out of range"),
    ],
)
def test_wrong_requests_are_users_errors(arguments, message):
    with pytest.raises(UserError) as caught:
        compare_runs([inflora_record(0)], **arguments)
    assert message in str(caught.value)


def test_log_with_other_settings_is_not_compared():
    result = compare_logged(logged_runs(rank="16"))
    assert result["verdict"] == "not comparable because it ran with other settings: rank is 16, 10 there"
    assert compare_logged(logged_runs(device="[1]"))["verdict"] == "reproduced"
    assert compare_logged(logged_runs(rank="16"), "paper_inflora")["metrics"]


def test_log_of_another_class_order_is_not_compared():
    runs = [replace(run, order=tuple(range(99, -1, -1))) for run in logged_runs()]
    assert compare_logged(runs)["why"].startswith("its order is another: 99, 98, 97")


def test_log_without_a_complete_run_is_a_users_error():
    runs = [replace(run, complete=False) for run in logged_runs()]
    with pytest.raises(UserError, match=r"no complete run \(5 begun\)"):
        compare_logged(runs)
    with pytest.raises(UserError, match="have the same seed, 0"):
        compare_logged([*logged_runs(), logged_runs()[0]])


def test_clloras_shuffled_classes_are_its_own_default():
    """Its configurations of CIFAR-100 and ImageNet shuffle, InfLoRA's do not: there, shuffled is another benchmark."""
    settings = {"dataset": "cifar224", "model_name": "cllora", "shuffle": "True"}
    result = compare_logged(logged_runs(**settings)[:1], "paper_cllora")
    assert "this is cllora, cifar100 in 10 tasks, of which" in result["why"]
    assert compare_logged(logged_runs(shuffle="True")[:1])["baseline"]["name"] == "inflora_cifar100_shuffled_seed1993"


def test_quoted_run_is_compared_by_its_curve():
    """The author quoted the curve alone: final and averaged accuracy, no forgetting."""
    quoted = load_baseline("cllora_imagenet_r_40")
    curve = quoted["metrics"]["top1_curve_mean"]
    values = {
        "sample_weighted_accuracy": curve[-1] + 0.5,
        "averaged_accuracy_inflora": sum(curve) / 40,
        "forgetting": 3.0,
    }
    record = inflora_record(1993, source=0, method="cllora", benchmark="imagenet_r", tasks=[str(i) for i in range(40)])
    record["metrics"] = values
    result = compare_runs([record], "cllora_imagenet_r_40")
    assert [found["metric"] for found in result["metrics"]] == ["sample_weighted_accuracy", "averaged_accuracy_inflora"]
    assert entry(result, "sample_weighted_accuracy")["difference"] == pytest.approx(0.5)
    assert result["verdict"] == "undecided"
    assert result["baseline"]["kind"] == "quoted run"


TEXT_NAMES = {
    "final_accuracy": "average_accuracy",
    "micro_final": "sample_weighted_accuracy",
    "average_accuracy": "average_over_steps",
    "learning_accuracy": "learning_accuracy",
    "forgetting": "forgetting",
    "bwt": "backward_transfer",
}
VISION_NAMES = {"final_accuracy": FINAL, "average_accuracy": "averaged_accuracy_inflora"}


@pytest.mark.parametrize("name", [name for name in list_baselines() if load_baseline(name)["kind"] != "paper"])
def test_every_baselines_runs_have_its_stored_numbers_under_our_names(name):
    baseline = load_baseline(name)
    runs = runs_of_baseline(name, baseline)
    for stored, ours in (TEXT_NAMES if "order" in baseline["applies_to"] else VISION_NAMES).items():
        values = [run.metrics.get(ours) for run in runs]
        expected = baseline["metrics"].get(stored)
        if expected is None or expected["mean"] is None or (stored, name) == ("forgetting", "olora_order1_seqlora"):
            assert values == [None] * len(runs)
        else:
            assert sum(values) / len(values) == pytest.approx(expected["mean"], abs=5.1e-5)  # four decimals


def test_a_run_like_the_long_shipped_one_is_compared_in_both_averages():
    """On 15 tasks with unequal test sets, the mean over tasks and over samples differ by 1.7 points."""
    (shipped,) = runs_of_baseline("olora_long", load_baseline("olora_long"))
    record = olora_record(order="6", seed=1)
    record |= {"tasks": list(shipped.order), "metrics": dict(shipped.metrics), "accuracy_matrix": shipped.accuracy}
    result = compare_runs([record])
    assert result["baseline"]["name"] == "olora_long"
    assert entry(result, "average_accuracy")["there"]["mean"] == pytest.approx(72.175, abs=1e-3)
    assert entry(result, "sample_weighted_accuracy")["there"]["mean"] == pytest.approx(73.881, abs=1e-3)
    assert [found["difference"] for found in result["metrics"]] == [0.0] * 3
    assert result["verdict"] == "undecided"  # another seed that happens to agree: one run shows nothing

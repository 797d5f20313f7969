"""Groups of runs paired by seed: which groups, which runs, and what is said of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from flatpatch.report.effects import Runs, contrasts, effects_of_sam, effects_text, sentences
from flatpatch.report.groups import Run, group_runs
from flatpatch.statistics import SUPPORTED, TOO_SMALL, UNDECIDED, holm, paired_difference
from tests.report_page import seeded, with_average
from tests.report_records import make_quick_record

OFF = (70.0, 72.0, 77.0)


def record(sam: str, seed: int, average: float, rho: float = 0.05, **settings: Any) -> dict[str, Any]:
    """Return a finished run's record with this average accuracy."""
    made = with_average(seeded(seed, sam=sam), average)
    for key, value in {"rho": rho, **settings}.items():
        made["settings"][key] = {"value": value, "source": "command line"}
    return made


def effects(records: list[dict[str, Any]]) -> list[Any]:
    return effects_of_sam(group_runs([Run(Path(f"run-{k}"), one) for k, one in enumerate(records)]))


def test_sam_is_paired_with_off_by_seed_whatever_the_order_of_the_runs() -> None:
    records = [record("off", seed, value) for seed, value in enumerate(OFF)]
    records += [record("sam", seed, OFF[seed] + gain) for seed, gain in ((2, 3.0), (0, 1.0), (1, 2.0))]
    (found,) = effects(records)
    average, forgetting = found.effects
    # Gains 1, 2 and 3: mean 2, deviation 1; forgetting falls by as much, as only the last accuracies moved.
    half = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3)
    assert average.seeds == ("2", "0", "1")
    assert (average.difference.effect, average.difference.n) == (pytest.approx(2.0), 3)
    assert average.difference.high == pytest.approx(2 + half)
    assert forgetting.difference.effect == pytest.approx(-2.0)
    assert (average.difference.direction, forgetting.difference.direction) == ("higher", "lower")
    assert average.difference.adjusted_p is None
    assert found.unpaired == []


def test_seeds_without_a_partner_are_left_out_and_named() -> None:
    records = [record("off", seed, value) for seed, value in enumerate(OFF)] + [record("sam", 1, 75.0)]
    (found,) = effects(records)
    assert found.seeds == ("1",)
    assert found.effects[0].difference.verdict == UNDECIDED
    assert sentences(found)[0] == (
        "average accuracy is higher: undecided: +3 points from one seed, which shows no spread to judge by"
    )
    assert sentences(found)[-1] == "seed 0, 2 of SAM off has no partner and is left out"
    (apart,) = effects([*records[:1], record("sam", 1, 75.0)])
    assert sentences(apart) == ["they share no seed, so that no run has a partner"]


def test_groups_that_differ_in_more_than_sam_are_no_pair() -> None:
    off = [record("off", 0, 70.0), record("off", 0, 71.0, **{"upstream.lora_r": "4"})]
    assert effects(off) == []
    found = effects([*off, record("sam", 0, 75.0, **{"upstream.lora_r": "4"})])
    assert [(one.there.title, one.effects[0].difference.effect) for one in found] == [
        ("SAM off, upstream.lora_r=4", pytest.approx(4.0))
    ]


def test_several_radii_are_corrected_together_for_each_metric() -> None:
    records = [record("off", seed, value) for seed, value in enumerate(OFF)]
    for rho, gains in ((0.05, (1.0, 1.1, 1.2)), (0.1, (1.0, 2.0, 3.0))):
        records += [record("sam", seed, OFF[seed] + gain, rho) for seed, gain in enumerate(gains)]
    found = effects(records)
    alone = [
        paired_difference([1.0, 1.1, 1.2], [0.0] * 3, direction="higher").p,
        paired_difference([1.0, 2.0, 3.0], [0.0] * 3, direction="higher").p,
    ]
    for k in range(2):
        assert [one.effects[k].difference.adjusted_p for one in found] == pytest.approx(holm(alone), rel=1e-9)
    assert [one.effects[0].difference.verdict for one in found] == [SUPPORTED, UNDECIDED]
    assert "p-values of a metric are corrected for 2 hypotheses" in " ".join(effects_text(found).split())


def test_what_lies_within_the_margin_is_too_small() -> None:
    records = [record("off", seed, value) for seed, value in enumerate(OFF)]
    records += [
        record("sam", seed, value + gain) for seed, (value, gain) in enumerate(zip(OFF, (0.2, 0.3, 0.1), strict=True))
    ]
    assert [effect.difference.verdict for effect in effects(records)[0].effects] == [TOO_SMALL] * 2


def test_a_quick_verdict_says_that_it_is_about_the_miniature_in_its_sentence() -> None:
    quick = [seeded(seed, sam=sam) for sam in ("off", "sam") for seed in (0, 1)]
    quick = [make_quick_record(settings=one["settings"], seeds=one["seeds"]) for one in quick]
    said = sentences(effects(quick)[0])
    assert len(said) == 2 and all(" in the miniature: " in sentence for sentence in said)


def test_a_number_that_one_side_lacks_is_left_out_and_said() -> None:
    here = [record("sam", seed, value) for seed, value in enumerate(OFF)]
    there = [record("off", seed, value) for seed, value in enumerate(OFF)]
    there[1]["metrics"]["forgetting"] = None
    (found,) = contrasts([(Runs("on", here), Runs("off", there))], metrics=("forgetting", "forward_transfer"))
    assert found.effects[0].seeds == ("0", "2")
    assert sentences(found)[0].endswith("; seed 1 lacks it and is left out")
    assert sentences(found)[1] == "forward transfer: no pair of runs has it on both sides"


def test_a_seed_that_was_run_twice_is_one_observation() -> None:
    here = [record("sam", 0, 75.0), record("sam", 0, 79.0)]
    (found,) = contrasts([(Runs("on", here), Runs("off", [record("off", 0, 70.0)]))])
    assert (found.effects[0].difference.effect, found.effects[0].difference.n) == (pytest.approx(5.0), 1)


def test_no_pair_has_no_text() -> None:
    assert effects_text([]) == ""
    assert effects([record("sam", 0, 70.0)]) == []

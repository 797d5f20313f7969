"""Verdicts of records that are written by hand: every expected number follows from them on paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.statistics import holm, paired_difference
from flatpatch.studies.planning import Cell
from flatpatch.studies.verdict_table import verdict_table
from tests.study_cases import HYPOTHESIS, as_json, judged, last_row, leave, only, planned, write_study

SHARP = HYPOTHESIS.replace(
    "{metric: average_accuracy}", "{value: top_eigenvalue, scope: adapter, when: after}"
).replace("higher", "lower")


def leave_each(cells: list[Cell], accuracy: Callable[[Cell], tuple[float, float]]) -> None:
    for cell in cells:
        leave(cell, accuracy=last_row(*accuracy(cell)))


def sharpness(**tasks: float) -> dict[tuple[str, str], dict[str, float]]:
    return {("after", task): {"top_eigenvalue": value} for task, value in tasks.items()}


def test_a_paired_difference_is_that_of_the_runs_of_each_seed(tmp_path: Path) -> None:
    """Seeds lie far apart, and SAM adds 1, 2 and 3 points to the average: 2 on average, spread 1."""
    three = planned(write_study(tmp_path), tmp_path)
    leave_each(three[2], lambda cell: (20 * cell.seed + (2 * (cell.seed + 1) if cell.value("sam") == "sam" else 0), 50))
    found = only(judged(tmp_path, tmp_path, three))
    expected = paired_difference([1, 2, 3], [0, 0, 0], direction="higher", smallest=0.5)
    assert (found.tested.effect, found.tested.n, found.tested.verdict) == (pytest.approx(2), 3, expected.verdict)
    assert (found.tested.low, found.tested.high) == pytest.approx((expected.low, expected.high))
    assert [pair.label for pair in found.tested.pairs] == ["seed 0", "seed 1", "seed 2"]
    assert [pair.side - (pair.against or 0) for pair in found.tested.pairs] == pytest.approx([1, 2, 3])
    assert found.tested.sentence.startswith("SAM raises the average accuracy: undecided in the miniature: +2 points")
    assert (found.side, found.tested.against, found.writing) == ("sam=sam", "sam=off", "")


def test_pairs_of_one_seed_are_averaged_so_that_n_counts_seeds(tmp_path: Path) -> None:
    three = planned(write_study(tmp_path, hypotheses=SHARP), tmp_path)
    for cell in three[2]:
        if cell.value("sam") == "sam":
            leave(cell, values=sharpness(amazon=8 - cell.seed, yahoo=16 - cell.seed))
        else:
            leave(cell, values=sharpness(amazon=10, yahoo=20))
    result = judged(tmp_path, tmp_path, three)
    assert only(result).writing == "depends on writing"
    assert "over adapter after training (depends on writing);" in " ".join(verdict_table(result).split())
    found = only(result).tested
    assert found.n == 3 and len(found.pairs) == 6
    assert found.effect == pytest.approx(-(2 + 4) / 2 - 1)  # seeds subtract 0, 1 and 2 more
    assert found.pairs[1].label == "seed 0, yahoo"
    assert (found.pairs[1].side, found.pairs[1].against) == (16, 20)


def test_a_run_without_sam_is_the_partner_of_every_radius(tmp_path: Path) -> None:
    three = planned(write_study(tmp_path, grid="{sam: [off, sam], rho: [0.05, 0.1]}"), tmp_path)
    gain = {0.05: 2.0, 0.1: 6.0}
    leave_each(three[2], lambda cell: (50 + (gain[cell.settings["rho"]] if cell.value("sam") == "sam" else 0), 50))
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert [pair.label for pair in found.pairs[:2]] == ["seed 0, rho=0.05", "seed 1, rho=0.05"]
    assert found.effect == pytest.approx((1 + 3) / 2)
    # Equal differences at three seeds: there is no spread to judge by.
    assert (found.verdict, found.low) == ("undecided", None)


def test_a_slope_over_a_setting_is_that_of_the_line_through_each_seed(tmp_path: Path) -> None:
    """Accuracy rises by 2, 3 and 4 points with each doubling of rho; the seeds start elsewhere."""
    slope = HYPOTHESIS.replace("    against: {settings: {sam: off}}\n", "    slope: {over: rho, scale: log2}\n")
    three = planned(write_study(tmp_path, grid="{sam: [sam], rho: [0.05, 0.1, 0.2]}", hypotheses=slope), tmp_path)
    step = {0.05: 0, 0.1: 1, 0.2: 2}
    leave_each(three[2], lambda cell: (10 * cell.seed + 2 * (2 + cell.seed) * step[cell.settings["rho"]], 50))
    found = only(judged(tmp_path, tmp_path, three))
    assert found.tested.effect == pytest.approx(3)
    assert [pair.side for pair in found.tested.pairs] == pytest.approx([2, 3, 4])
    assert len(found.points) == 9 and found.x_label == "log2 of rho"
    assert found.points[0].x == pytest.approx(-4.321928)


def test_a_slope_of_a_difference_says_where_sam_helps_most(tmp_path: Path) -> None:
    """SAM adds 4 points at 1 epoch and 1 at 10, the number that the quick form has anyway: -3 for ten times as many."""
    slope = HYPOTHESIS.replace("    unit:", "    slope: {over: upstream.num_train_epochs, scale: log10}\n    unit:")
    path = write_study(
        tmp_path,
        grid="{sam: [off, sam], upstream.num_train_epochs: [1, 10]}",
        hypotheses=slope.replace("higher", "lower"),
    )
    three = planned(path, tmp_path)

    def accuracy(cell: Cell) -> tuple[float, float]:
        gain = 8 + 0.2 * cell.seed if cell.value("upstream.num_train_epochs") == 1 else 2
        return (30 + (gain if cell.value("sam") == "sam" else 0), 50)

    leave_each(three[2], accuracy)
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert found.effect == pytest.approx(-(3 + 0.1))
    assert found.verdict == "supported"


def over(quantity: str) -> str:
    slope = SHARP.replace("    against: {settings: {sam: off}}\n", "").replace("lower", "higher")
    slope = slope.replace("    side: {settings: {sam: sam}}\n", "")
    return slope + f"    slope: {{over_quantity: {{value: {quantity}, scope: adapter, when: before}}}}\n"


def test_a_slope_over_another_quantity_goes_through_all_runs_of_a_seed(tmp_path: Path) -> None:
    slope = over("top_eigenvalue")
    three = planned(write_study(tmp_path, grid="{sam: [off, sam]}", hypotheses=slope), tmp_path)
    for cell in three[2]:
        x = 1.0 + (cell.value("sam") == "sam")
        after = sharpness(amazon=(3 + cell.seed) * x, yahoo=(3 + cell.seed) * x)
        leave(cell, values=after | {("before", task): {"top_eigenvalue": x} for task in ("amazon", "yahoo")})
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert (found.effect, found.n) == (pytest.approx(4.0), 3)
    assert [pair.label for pair in found.pairs[:2]] == ["seed 0, amazon", "seed 0, yahoo"]
    assert [pair.side for pair in found.pairs] == pytest.approx([3, 3, 4, 4, 5, 5])


def test_a_value_of_a_sides_own_is_not_compared_with_itself_as_recorded(tmp_path: Path) -> None:
    """The quantity's ``as_recorded`` stands for its own value, not for the one that a side has instead."""
    own = SHARP.replace("{settings: {sam: off}}", "{settings: {sam: off}, value: loss}")
    own = own.replace("when: after}", "when: after, as_recorded: top_eigenvalue}")
    three = planned(write_study(tmp_path, hypotheses=own), tmp_path)
    for cell in three[2]:
        leave(cell, values=sharpness(amazon=3, yahoo=3))
    assert only(judged(tmp_path, tmp_path, three)).arm == "correct"


def test_a_slope_over_what_is_equal_everywhere_has_no_number(tmp_path: Path) -> None:
    slope = over("loss")
    three = planned(write_study(tmp_path, grid="{sam: [off, sam]}", hypotheses=slope), tmp_path)
    for cell in three[2]:
        x = 1.0 + (cell.value("sam") == "sam")
        after = sharpness(amazon=(3 + cell.seed) * x, yahoo=(3 + cell.seed) * x)
        leave(cell, values=after | {("before", task): {"top_eigenvalue": 0.0} for task in ("amazon", "yahoo")})
    assert only(judged(tmp_path, tmp_path, three)).tested.n == 0, "all losses are equal: no two places"


def test_one_task_is_compared_with_the_mean_of_the_others(tmp_path: Path) -> None:
    yahoo = SHARP.replace("{settings: {sam: sam}}", "{task: yahoo}").replace("{settings: {sam: off}}", "{task: others}")
    three = planned(write_study(tmp_path, grid="{sam: [off]}", hypotheses=yahoo), tmp_path)
    for cell in three[2]:
        leave(cell, values=sharpness(amazon=3 + cell.seed, yahoo=10))
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert found.effect == pytest.approx(10 - 4)
    assert [pair.against for pair in found.pairs] == [3, 4, 5]


def test_the_spread_over_tasks_is_compared_with_the_spread_over_seeds(tmp_path: Path) -> None:
    """Tasks 8 apart have spread 8 / sqrt(2); a task at 1, 2, 3 over the seeds has spread 1."""
    spread = SHARP.replace("{settings: {sam: sam}}", "{reduce: spread}").replace("lower", "higher")
    spread = spread.replace("{settings: {sam: off}}", "{reduce: seed_spread}")
    three = planned(write_study(tmp_path, grid="{sam: [off]}", hypotheses=spread), tmp_path)
    for cell in three[2]:
        leave(cell, values=sharpness(amazon=1 + cell.seed, yahoo=9 + cell.seed))
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert [pair.side for pair in found.pairs] == pytest.approx([8 / 2**0.5] * 3)
    shares = [pair.against for pair in found.pairs if pair.against is not None]
    assert sum(share**2 for share in shares) / 3 == pytest.approx(1)


def test_a_number_is_compared_with_a_constant(tmp_path: Path) -> None:
    constant = SHARP.replace("{settings: {sam: off}}", "{constant: 5}")
    three = planned(write_study(tmp_path, hypotheses=constant), tmp_path)
    for cell in three[2]:
        leave(cell, values=sharpness(amazon=3 + 0.1 * cell.seed, yahoo=3))
    found = only(judged(tmp_path, tmp_path, three)).tested
    assert (found.effect, found.verdict, found.against) == (pytest.approx(-1.95), "supported", "5")


def test_doublings_are_differences_of_logarithms(tmp_path: Path) -> None:
    log = SHARP.replace("when: after}", "when: after, scale: log2}")
    three = planned(write_study(tmp_path, hypotheses=log), tmp_path)
    for cell in three[2]:
        leave(cell, values=sharpness(amazon=8, yahoo=4) if cell.value("sam") == "off" else sharpness(amazon=2, yahoo=2))
    assert only(judged(tmp_path, tmp_path, three)).tested.effect == pytest.approx(-(2 + 1) / 2)


CONTROLS = HYPOTHESIS.replace(
    "    direction", "    controls: {longer: {settings: {sam: off, upstream.num_train_epochs: 20}}}\n    direction"
)


def test_a_hypothesis_is_told_against_its_controls_too(tmp_path: Path) -> None:
    """Against no SAM the gain is 6, 6.2 and 6.4 points; against the longer training none."""
    longer = "  - {name: longer, settings: {sam: off, upstream.num_train_epochs: 20}}"
    ends = "conclusions: [{text: SAM helps, hypotheses: [accuracy]}]"
    path = write_study(tmp_path, hypotheses=CONTROLS, more_runs=longer, conclusions=ends)
    three = planned(path, tmp_path)

    def accuracy(cell: Cell) -> tuple[float, float]:
        if cell.name == "longer":
            return (62 + (-1) ** cell.seed * 0.1, 50)
        return (62 + 0.4 * cell.seed if cell.value("sam") == "sam" else 50, 50)

    leave_each(three[2], accuracy)
    result = judged(tmp_path, tmp_path, three)
    found = only(result)
    assert (found.tested.verdict, found.tested.effect) == ("supported", pytest.approx(6.2))
    control = found.controls["longer"]
    assert control.verdict == "undecided" and control.adjusted_p is None
    assert control.against == "sam=off upstream.num_train_epochs=20"
    (conclusion,) = result.conclusions
    assert conclusion.outcome == "survives"
    assert conclusion.sentence.endswith(
        '"SAM helps" survives in the miniature; against the control longer it is not supported.'
    )
    assert "control longer" in verdict_table(result)


def test_each_value_of_a_setting_is_a_hypothesis_of_its_own_and_corrected_for_their_number(tmp_path: Path) -> None:
    each = HYPOTHESIS.replace("    unit:", "    for_each: [order]\n    unit:")
    three = planned(write_study(tmp_path, grid="{sam: [off, sam], order: [1, 2]}", hypotheses=each), tmp_path)
    gain = {"1": 6.0, "2": 1.0}

    def accuracy(cell: Cell) -> tuple[float, float]:
        return (50 + (gain[str(cell.value("order"))] + 0.1 * cell.seed) * (cell.value("sam") == "sam"), 50)

    leave_each(three[2], accuracy)
    found = judged(tmp_path, tmp_path, three).hypotheses
    assert [each.hypothesis for each in found] == ["accuracy[order=1]", "accuracy[order=2]"]
    assert [each.tested.effect for each in found] == pytest.approx([3.05, 0.55])
    p = [each.tested.p for each in found]
    assert [each.tested.adjusted_p for each in found] == pytest.approx(
        holm([value for value in p if value is not None])
    )


def test_both_ways_of_measuring_are_told_side_by_side(tmp_path: Path) -> None:
    both = SHARP.replace("value: top_eigenvalue", "value: top_eigenvalue, as_recorded: trace")
    path = write_study(
        tmp_path, hypotheses=both, conclusions="conclusions: [{text: SAM is flatter, hypotheses: [accuracy]}]"
    )
    path.write_text(path.read_text().replace("kinds: [eigenvalues]", "kinds: [eigenvalues, trace]"))
    three = planned(path, tmp_path)
    for cell in three[2]:
        own = {"top_eigenvalue": 5.0 + 0.1 * cell.seed, "trace": 2.0}
        if cell.value("sam") == "sam":
            own = {"top_eigenvalue": 9.0, "trace": 1.0 + 0.01 * cell.seed}
        leave(cell, values={("after", task): own for task in ("amazon", "yahoo")})
    result = judged(tmp_path, tmp_path, three)
    assert [(each.arm, each.tested.verdict) for each in result.hypotheses] == [
        ("correct", "contradicted"),
        ("as recorded", "supported"),
    ]
    (conclusion,) = result.conclusions
    assert (conclusion.outcome, conclusion.as_recorded) == ("does not survive", "survives")
    assert conclusion.sentence.endswith("does not survive in the miniature, and measured as recorded it survives.")
    assert "as recorded: supported in the miniature, measured as recorded" in " ".join(verdict_table(result).split())


@pytest.mark.parametrize(
    ("gain", "open_", "outcome"),
    [(2.0, "false", "survives"), (-2.0, "false", "does not survive"), (2.0, "true", "yes"), (0.0, "true", "no")],
)
def test_a_conclusion_follows_from_its_hypotheses(gain: float, open_: str, outcome: str, tmp_path: Path) -> None:
    ends = f"conclusions: [{{text: SAM helps, hypotheses: [accuracy], open: {open_}}}]"
    three = planned(write_study(tmp_path, conclusions=ends), tmp_path)
    leave_each(three[2], lambda cell: (50 + (2 * gain + 0.02 * cell.seed) * (cell.value("sam") == "sam"), 50))
    (conclusion,) = judged(tmp_path, tmp_path, three).conclusions
    assert conclusion.outcome == outcome


def test_what_is_missing_is_said_and_decides_nothing(tmp_path: Path) -> None:
    ends = "conclusions: [{text: SAM helps, hypotheses: [accuracy]}]"
    three = planned(write_study(tmp_path, conclusions=ends), tmp_path)
    found = only(judged(tmp_path, tmp_path, three))
    assert (found.tested.effect, found.tested.n, found.tested.verdict) == (None, 0, "undecided")
    assert len(found.tested.missing) == 6 and found.tested.missing[0].endswith(": not there")
    leave(three[2][0], status="interrupted")
    for cell in three[2][1:]:
        leave(cell)
    result = judged(tmp_path, tmp_path, three)
    assert only(result).tested.n == 2
    assert any(text.endswith(": interrupted") for text in only(result).tested.missing)
    assert [run.status for run in result.runs].count("finished") == 5
    assert result.conclusions[0].outcome == "cannot be told here"
    assert "1 of 6 runs are not finished." in verdict_table(result)
    assert as_json(result)["hypotheses"][0]["tested"]["n"] == 2


def test_the_result_names_every_run_by_what_sets_it_apart(tmp_path: Path) -> None:
    three = planned(write_study(tmp_path, grid="{sam: [off, sam], rho: [0.05, 0.1]}"), tmp_path, seeds=("4",))
    result = judged(tmp_path, tmp_path, three)
    told = [dict(run.settings) for run in result.runs]
    assert told == [{"sam": "off"}, {"sam": "sam", "rho": "0.05"}, {"sam": "sam", "rho": "0.1"}]
    assert {run.seed for run in result.runs} == {4}
    assert all((tmp_path / run.folder).name == run.folder for run in result.runs)
    assert dataclasses.asdict(result)["measure"]["measure_when"] == "before,after"

"""From the records of a study's runs to its verdicts.

Pairs share a seed, a task and every other setting that varies. Those of one seed are averaged first, so that n counts
seeds: the tasks of a seed were learned with the same random numbers, and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatpatch.measuring import writing_mark
from flatpatch.report.titles import about
from flatpatch.report.verdicts import AS_RECORDED, CORRECT
from flatpatch.settings import shown
from flatpatch.statistics import (
    CONTRADICTED,
    SUPPORTED,
    TOO_SMALL,
    UNDECIDED,
    Difference,
    corrected,
    least_squares,
    paired_difference,
)
from flatpatch.studies.checks import arms_of, hypotheses_of
from flatpatch.studies.pairing import Comparison, as_pairs, each_of, side_words
from flatpatch.studies.planning import Asked, Cell, folders_of, measure_words, varying
from flatpatch.studies.quantities import Recorded, Records, in_words
from flatpatch.studies.result import ConclusionResult, HypothesisResult, Pair, Point, RunResult, StudyResult, Tested
from flatpatch.studies.schema import Conclusion, Hypothesis, Side, Slope, Study

SURVIVES, FALLS, UNTOLD = "survives", "does not survive", "cannot be told here"
YES, NO = "yes", "no"


@dataclass(frozen=True)
class _Test:
    """One comparison with its numbers, before it is known how many others there are."""

    comparison: Comparison
    pairs: tuple[Pair, ...]
    points: tuple[Point, ...]
    difference: Difference | None
    missing: tuple[str, ...]


def evaluate(study: Study, asked: Asked, cells: Sequence[Cell], output: Path) -> StudyResult:
    """Judge a study's hypotheses by what its runs left.

    Args:
        study: The study.
        asked: What of it was asked for.
        cells: Its runs; those that are missing or unfinished are said.
        output: The folder that holds the runs.
    """
    form = study.forms[asked.form]
    where = about(asked.form)
    tested = hypotheses_of(study, asked, cells)
    hypotheses = [one for each in tested for one in each_of(each, cells)]
    records = Records()
    results: list[HypothesisResult] = []
    for arm in (CORRECT, AS_RECORDED):
        own = [each for each in hypotheses if arm in arms_of(each)]
        results += _judged(own, _Tests(cells, records, arm), where)
    runs = folders_of(cells)
    left_out = [
        f"{each.id}: {each.statement} ({form.why_without})" for each in study.hypotheses if each.id in form.without
    ]
    why = "its runs are made with grid=full" if form.full_alone and not asked.full else form.why_without
    with_controls = {each.id: each.controls for each in study.hypotheses}
    for each in tested:
        left_out += [
            f"{each.id} against its control {name} ({why})"
            for name in with_controls[each.id]
            if name not in each.controls
        ]
    return StudyResult(
        study=study.name,
        title=study.title,
        question=study.question,
        record=study.record,
        form=asked.form,
        where=where,
        seeds=tuple(int(seed) for seed in asked.seeds),
        ours=form.ours,
        measure=measure_words(study, form, cells),
        runs=tuple(_run_result(cell, cells, records, output) for cell in runs),
        hypotheses=tuple(results),
        conclusions=tuple(_conclude(each, results, where) for each in study.conclusions),
        left_out=tuple(left_out),
        figures=tuple(figure.model_dump(mode="json") for figure in study.figures),
        seconds=round(math.fsum((records.of(cell) or _NO_TIME)["timing"]["total_seconds"] for cell in runs), 1),
    )


_NO_TIME: Mapping[str, Mapping[str, float]] = {"timing": {"total_seconds": 0.0}}


@dataclass(frozen=True)
class _Tests:
    """Makes the tests of one arm."""

    cells: Sequence[Cell]
    records: Records
    arm: str

    def of(self, hypothesis: Hypothesis, against: Side | None) -> _Test:
        """Compare a hypothesis's side with another."""
        return _test(Comparison(self.cells, hypothesis, against, self.arm), Recorded(self.records))


def _test(comparison: Comparison, reader: Recorded) -> _Test:
    hypothesis = comparison.hypothesis
    couples = comparison.couples(reader)
    pairs = as_pairs(comparison, couples)
    points: tuple[Point, ...] = ()
    if hypothesis.slope is not None:
        lines = comparison.points(reader, hypothesis.slope)
        points = tuple(point for line in lines.values() for point in line)
        pairs = tuple(
            Pair(label, line[0].seed, least_squares([point.x for point in line], [point.y for point in line]), None)
            for label, line in lines.items()
        )
    here, there = _by_seed(pairs)
    difference = None
    if here:
        difference = paired_difference(here, there, direction=hypothesis.direction, smallest=hypothesis.smallest)
    return _Test(comparison, pairs, points, difference, tuple(reader.missing))


def _by_seed(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the means over each seed's pairs, of both sides; what stands alone is compared with 0."""
    seeds: dict[int, list[Pair]] = {}
    for pair in pairs:
        seeds.setdefault(pair.seed, []).append(pair)
    here = [math.fsum(pair.side for pair in own) / len(own) for own in seeds.values()]
    there = [math.fsum(pair.against or 0.0 for pair in own) / len(own) for own in seeds.values()]
    return here, there


def _judged(hypotheses: Sequence[Hypothesis], tests: _Tests, where: str) -> list[HypothesisResult]:
    """Test an arm's hypotheses, correct them for their number, and put each together with its controls."""
    tested = [tests.of(each, each.against) for each in hypotheses]
    judged = corrected([test.difference for test in tested])
    place = ", ".join(filter(None, (where, "measured as recorded" if tests.arm == AS_RECORDED else "")))
    found = []
    for hypothesis, test, difference in zip(hypotheses, tested, judged, strict=True):
        controls = {name: tests.of(hypothesis, side) for name, side in hypothesis.controls.items()}
        found.append(
            HypothesisResult(
                hypothesis=hypothesis.id,
                statement=hypothesis.statement,
                quantity=in_words(hypothesis.quantity),
                unit=hypothesis.unit,
                direction=hypothesis.direction,
                smallest=hypothesis.smallest,
                side=side_words(hypothesis.side, hypothesis.quantity),
                arm=tests.arm,
                tested=_told(hypothesis.statement, test, difference, place),
                controls={
                    name: _told(f"{hypothesis.statement} (against the control {name})", each, each.difference, place)
                    for name, each in controls.items()
                },
                points=test.points,
                x_label=_x_label(hypothesis.slope) if hypothesis.slope else "",
                writing=writing_mark(scope, {}) if (scope := hypothesis.quantity.scope) else "",
            )
        )
    return found


def _x_label(slope: Slope) -> str:
    name = str(slope.over) if slope.over_quantity is None else in_words(slope.over_quantity)
    return name if slope.scale == "plain" else f"{slope.scale} of {name}"


def _told(statement: str, test: _Test, difference: Difference | None, place: str) -> Tested:
    hypothesis, against = test.comparison.hypothesis, test.comparison.against
    words = "no slope" if against is None else side_words(against, hypothesis.quantity)
    if difference is None:
        finding = f"{f'{UNDECIDED} {place}'.strip()}: no pair of finished runs tells it"
        return Tested(
            *(words, None, None, None, 0, None, None, UNDECIDED, None, finding, f"{statement}: {finding}", ()),
            missing=test.missing,
        )
    finding = difference.sentence(hypothesis.unit, place)
    return Tested(
        against=words,
        effect=difference.effect,
        low=difference.low,
        high=difference.high,
        n=difference.n,
        p=difference.p,
        adjusted_p=difference.adjusted_p,
        verdict=difference.verdict,
        more_seeds=difference.more_seeds,
        finding=finding,
        sentence=f"{statement}: {finding}",
        pairs=test.pairs,
        missing=test.missing,
    )


def _conclude(conclusion: Conclusion, results: Sequence[HypothesisResult], where: str) -> ConclusionResult:
    outcome = _outcome(conclusion, results, CORRECT) or UNTOLD
    recorded = _outcome(conclusion, results, AS_RECORDED)
    subject = "The record's question" if conclusion.open else "The record's conclusion"
    sentence = f'{subject} "{conclusion.text}" {_VERBS[outcome]}{f" {where}" if where else ""}'
    if recorded is not None:
        sentence += f", and measured as recorded it {_VERBS[recorded]}"
    if outcome in (SURVIVES, YES) and (short := _short_of_controls(conclusion, results)):
        sentence += f"; against {', '.join(short)} it is not supported"
    return ConclusionResult(
        text=conclusion.text,
        open=conclusion.open,
        hypotheses=conclusion.hypotheses,
        outcome=outcome,
        as_recorded=recorded,
        sentence=f"{sentence}.",
    )


_VERBS = {
    SURVIVES: "survives",
    FALLS: "does not survive",
    UNTOLD: "cannot be told here",
    YES: "is answered with yes",
    NO: "is answered with no",
}


def _of(conclusion: Conclusion, results: Sequence[HypothesisResult], arm: str) -> list[HypothesisResult]:
    return [each for each in results if each.arm == arm and each.hypothesis.partition("[")[0] in conclusion.hypotheses]


def _short_of_controls(conclusion: Conclusion, results: Sequence[HypothesisResult]) -> list[str]:
    """Return the controls against which one of a conclusion's hypotheses is not supported."""
    own = _of(conclusion, results, CORRECT)
    names = [name for each in own for name, test in each.controls.items() if test.verdict != SUPPORTED]
    return list(dict.fromkeys(f"the control {name}" for name in names))


def _outcome(conclusion: Conclusion, results: Sequence[HypothesisResult], arm: str) -> str | None:
    """Return what the hypotheses of an arm say of a conclusion; None where the arm has none of them."""
    own = _of(conclusion, results, arm)
    if not own:
        return None
    verdicts = [each.tested.verdict for each in own]
    if any(verdict in (CONTRADICTED, TOO_SMALL) for verdict in verdicts):
        return NO if conclusion.open else FALLS
    whole = {each.hypothesis.partition("[")[0] for each in own} >= set(conclusion.hypotheses)
    if whole and all(verdict == SUPPORTED for verdict in verdicts):
        return YES if conclusion.open else SURVIVES
    return UNTOLD


def _run_result(cell: Cell, cells: Sequence[Cell], records: Records, output: Path) -> RunResult:
    record = records.of(cell)
    keys = [key for key in varying(cells) if key not in cell.idle and cell.value(key) != ""]
    folder = cell.plan.folder
    return RunResult(
        name=cell.name,
        folder=str(folder.relative_to(output.absolute())) if folder.is_relative_to(output.absolute()) else str(folder),
        settings={key: shown(cell.value(key)) for key in keys},
        seed=cell.seed,
        status="missing" if record is None else str(record["status"]),
    )

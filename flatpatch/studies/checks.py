"""What a study's file names that its runs do not have: said before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flatpatch.errors import UserError
from flatpatch.report.verdicts import AS_RECORDED, CORRECT
from flatpatch.studies.pairing import Comparison, each_of, side_words
from flatpatch.studies.planning import Asked, Cell, could_stand, wrong_settings
from flatpatch.studies.quantities import Planned, of_side, wrong_names
from flatpatch.studies.schema import Hypothesis, Side, Study, left_out_runs


def check_names(study: Study) -> None:
    """Refuse a study that names settings, metrics or measured values which nothing has.

    Raises:
        UserError: With every mistake.
    """
    problems = wrong_settings(study)
    for hypothesis in study.hypotheses:
        problems += [f"hypothesis {hypothesis.id!r}: {problem}" for problem in _wrong_names(hypothesis)]
    if problems:
        raise UserError.collect(problems)


def check_hypotheses(study: Study, asked: Asked, cells: Sequence[Cell]) -> None:
    """Refuse a study whose hypotheses its runs cannot answer.

    Args:
        study: The study.
        asked: What of it is run.
        cells: Its planned runs.

    Raises:
        UserError: With every mistake.
    """
    problems = []
    for hypothesis in hypotheses_of(study, asked, cells):
        found = list(dict.fromkeys(_wrong(hypothesis, cells)))
        problems += [f"hypothesis {hypothesis.id!r}: {problem}" for problem in found]
    if problems:
        raise UserError.collect(problems)


def hypotheses_of(study: Study, asked: Asked, cells: Sequence[Cell]) -> list[Hypothesis]:
    """Return the hypotheses that a form tests, without the controls of which it leaves out the runs."""
    form = study.forms[asked.form]
    found = []
    for hypothesis in study.hypotheses:
        if hypothesis.id not in form.without:
            controls = hypothesis.controls
            if left_out_runs(form, full=asked.full):
                controls = {
                    name: side
                    for name, side in controls.items()
                    if Comparison(cells, hypothesis, side, CORRECT).fitting(side) or not _left_out(study, asked, side)
                }
            found.append(hypothesis.model_copy(update={"controls": controls}))
    return found


def _left_out(study: Study, asked: Asked, side: Side) -> bool:
    """Return whether runs that a form leaves out would stand on a side."""
    form = study.forms[asked.form]
    names = left_out_runs(form, full=asked.full)
    return any(runs.name in names and could_stand(study, form, runs, side) for runs in study.runs)


def arms_of(hypothesis: Hypothesis) -> tuple[str, ...]:
    """Return the ways of measuring by which a hypothesis is tested."""
    quantities = [of_side(hypothesis.quantity, side, "") for side in (hypothesis.side, hypothesis.against) if side]
    recorded = all(quantity.as_recorded is not None for quantity in quantities)
    return (CORRECT, AS_RECORDED) if recorded else (CORRECT,)


def _wrong_names(hypothesis: Hypothesis) -> list[str]:
    sides = [side for side in (hypothesis.side, hypothesis.against, *hypothesis.controls.values()) if side is not None]
    quantities = [of_side(hypothesis.quantity, side, "") for side in sides if side.constant is None]
    if hypothesis.slope and hypothesis.slope.over_quantity:
        quantities.append(hypothesis.slope.over_quantity)
    return list(dict.fromkeys(problem for quantity in quantities for problem in wrong_names(quantity)))


def _wrong(hypothesis: Hypothesis, cells: Sequence[Cell]) -> Iterator[str]:
    try:
        each = each_of(hypothesis, cells)
        for one in each:
            for against in (one.against, *one.controls.values()):
                yield from _without_pairs(one, against, cells)
    except UserError as error:
        yield str(error)


def _without_pairs(hypothesis: Hypothesis, against: Side | None, cells: Sequence[Cell]) -> Iterator[str]:
    # One seed has no spread, which makes a hypothesis undecided and no mistake.
    hypothesis = hypothesis.model_copy(update={"side": _with_a_spread(hypothesis.side)})
    against = against and _with_a_spread(against)
    for arm in arms_of(hypothesis):
        reader = Planned()
        comparison = Comparison(cells, hypothesis, against, arm)
        couples = comparison.couples(reader)
        slope = hypothesis.slope
        points = comparison.points(reader, slope) if slope else {}
        places = [comparison.place(reader, slope, couple) for couple in couples] if slope else []
        yield from reader.problems
        if not couples:
            yield from _why_no_couples(comparison)
        # Of plans every number is 1, so that a slope over another quantity has no two places yet.
        elif slope and not slope.over and not any(place is not None for place in places):
            yield "its over_quantity has no number where its quantity has one."
        elif slope and slope.over and not points:
            yield f"its slope over {slope.over!r} has no two values of it in the grid. Add them to runs."


def _with_a_spread(side: Side) -> Side:
    return side.model_copy(update={"reduce": "spread"}) if side.reduce == "seed_spread" else side


def _why_no_couples(comparison: Comparison) -> Iterator[str]:
    hypothesis, against = comparison.hypothesis, comparison.against
    sides = [side for side in (hypothesis.side, against) if side is not None and side.constant is None]
    lacking = [side_words(side, hypothesis.quantity) for side in sides if not comparison.fitting(side)]
    if lacking:
        yield f"its runs are not in the grid: none fits {' and none fits '.join(lacking)}. Add them to runs."
    else:
        here, *there = (side_words(side, hypothesis.quantity) for side in sides)
        yield (
            f"no run of {here} has a partner in {' '.join(there)} that is equal in everything else. Add it to runs, or "
            "name in ignore the settings in which they may differ."
        )

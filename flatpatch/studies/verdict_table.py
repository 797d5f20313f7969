"""A study's verdicts as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from flatpatch.report.verdicts import AS_RECORDED, CORRECT
from flatpatch.studies.result import HypothesisResult, StudyResult

WIDTH = 100


def verdict_table(result: StudyResult) -> str:
    """Return the verdicts in lines: one for each hypothesis, its controls and its other way of measuring below it."""
    title = f"{result.study}, form {result.form}, seeds {', '.join(map(str, result.seeds))}"
    lines = [f"Verdicts of {title}{f': {result.where}' if result.where else ''}", "=" * WIDTH]
    recorded = {each.hypothesis: each for each in result.hypotheses if each.arm == AS_RECORDED}
    for each in result.hypotheses:
        if each.arm == CORRECT:
            lines += _lines(each, recorded.get(each.hypothesis))
    for text in result.left_out:
        lines += _wrapped(f"not tested here: {text}")
    if result.conclusions:
        lines += ["", "What the record concluded"]
        for conclusion in result.conclusions:
            lines += _wrapped(f"- {conclusion.sentence}", "  ")
    unfinished = [run for run in result.runs if run.status != "finished"]
    lines += [f"{len(unfinished)} of {len(result.runs)} runs are not finished."] if unfinished else []
    return "\n".join(lines)


def _lines(each: HypothesisResult, recorded: HypothesisResult | None) -> Iterator[str]:
    yield from _wrapped(f"{each.hypothesis}: {each.statement}")
    mark = f" ({each.writing})" if each.writing else ""
    yield from _wrapped(f"{each.quantity}{mark}; {each.side} against {each.tested.against}", "    ")
    yield from _wrapped(f"=> {each.tested.finding}", "    ")
    for name, test in each.controls.items():
        yield from _wrapped(f"control {name} ({test.against}): {test.finding}", "    ")
    if recorded is not None:
        yield from _wrapped(f"as recorded: {recorded.tested.finding}", "    ")
    for text in each.tested.missing[:3]:
        yield from _wrapped(f"missing: {text}", "    ")
    if len(each.tested.missing) > 3:
        yield f"    missing: {len(each.tested.missing) - 3} more (verdicts.json)"


def _wrapped(text: str, start: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=f"{start}  ")

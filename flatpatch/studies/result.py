"""An evaluated study: plain data, and the file that it is kept in.

``studies/<name>/<form>/verdicts.json`` below the output folder holds a :class:`StudyResult` as JSON, key by key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.files import write_atomically
from flatpatch.report.verdicts import SCHEMA, STUDIES, VERDICTS


@dataclass(frozen=True)
class Pair:
    """One observation: two numbers that belong together, or a slope with nothing beside it.

    Attributes:
        label: What they share, such as ``seed 0, yahoo``.
        seed: The seed.
        side: The number of the side that the hypothesis is about.
        against: The other; None where a slope of the side alone is tested.
    """

    label: str
    seed: int
    side: float
    against: float | None


@dataclass(frozen=True)
class Point:
    """One point of those through which a slope was laid."""

    label: str
    seed: int
    x: float
    y: float


@dataclass(frozen=True)
class Tested:
    """What the runs say of one comparison.

    Attributes:
        against: What the side was compared with, in words.
        effect: Mean over the seeds of side minus against, or of the slope; None where no run tells it.
        low: Lower end of its 95 % interval; None with fewer than two seeds.
        high: Upper end.
        n: Seeds.
        p: Two-sided.
        adjusted_p: By Holm over the study's hypotheses of one arm; None for a control.
        verdict: What follows.
        more_seeds: How many seeds in all would decide it at this spread; None where it is decided or cannot be said.
        finding: The verdict and its numbers in words, with where it holds.
        sentence: The same behind the statement.
        pairs: What it was made of.
        missing: Why it has no numbers, or fewer than planned; empty where it has all.
    """

    against: str
    effect: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    adjusted_p: float | None
    verdict: str
    more_seeds: int | None
    finding: str
    sentence: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class HypothesisResult:
    """A hypothesis, by one way of measuring.

    Attributes:
        hypothesis: Its short name, with the values of ``for_each`` in brackets.
        statement: The sentence.
        quantity: What was compared, in words.
        unit: Of the effect.
        direction: ``higher`` or ``lower``: which sign supports it.
        smallest: The smallest effect that would matter.
        side: The runs that it is about, in words.
        arm: ``correct``, or ``as recorded``: the record's own way of measuring.
        tested: Against what it is about.
        controls: Against its controls, by name.
        points: For slopes: what they were laid through; ``x_label`` says over what.
        writing: Whether the quantity depends on how LoRA's factors are written; empty for a metric.
    """

    hypothesis: str
    statement: str
    quantity: str
    unit: str
    direction: str
    smallest: float
    side: str
    arm: str
    tested: Tested
    controls: Mapping[str, Tested]
    points: tuple[Point, ...] = ()
    x_label: str = ""
    writing: str = ""


@dataclass(frozen=True)
class ConclusionResult:
    """What the record concluded, judged by the hypotheses of this study.

    Attributes:
        text: The conclusion.
        open: Whether the record left it open.
        hypotheses: Their short names.
        outcome: ``survives``, ``does not survive`` or ``cannot be told here``; of an open one ``yes``, ``no`` or the
            last.
        as_recorded: The same by the record's own way of measuring; None where nothing of it was measured that way.
        sentence: All of it in words.
    """

    text: str
    open: bool
    hypotheses: tuple[str, ...]
    outcome: str
    as_recorded: str | None
    sentence: str


@dataclass(frozen=True)
class RunResult:
    """One run of the study.

    Attributes:
        name: What the study calls the runs that it is one of.
        folder: The run's folder, relative to the folder that holds ``studies``.
        settings: Those in which the study's runs differ.
        seed: Its seed.
        status: The record's status, or ``missing``.
    """

    name: str
    folder: str
    settings: Mapping[str, str]
    seed: int
    status: str


@dataclass(frozen=True)
class StudyResult:
    """All that a study found.

    Attributes:
        study: Its name.
        title: In a line.
        question: What it asks.
        record: The part of the record that it belongs to.
        form: ``quick``, ``small`` or ``record``.
        where: ``in the miniature`` and the like, as the sentences say it; empty for the record's own size.
        seeds: Those asked for.
        ours: This project's own choices in this form.
        measure: How was measured: the settings ``measure``, ``measure_scope``, ... by name.
        runs: The runs.
        hypotheses: Each by the correct way of measuring, and where there is one by the record's too.
        conclusions: Those of the record.
        left_out: What this form does not test, and why.
        figures: What the page draws, as the study's file says it.
        seconds: What the runs took, summed.
    """

    study: str
    title: str
    question: str
    record: str
    form: str
    where: str
    seeds: tuple[int, ...]
    ours: tuple[str, ...]
    measure: Mapping[str, str]
    runs: tuple[RunResult, ...]
    hypotheses: tuple[HypothesisResult, ...]
    conclusions: tuple[ConclusionResult, ...]
    left_out: tuple[str, ...] = ()
    figures: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def folder_of(output: Path, study: str, form: str) -> Path:
    """Return where a study's verdicts, page and logs are."""
    return output / STUDIES / study / form


def write_result(folder: Path, result: StudyResult) -> Path:
    """Write a study's verdicts into its folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / VERDICTS
    write_atomically(path, json.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n")
    return path

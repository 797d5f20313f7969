"""A small study, and what finished runs of it would have left, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.metrics import from_lists, summarise
from flatpatch.runner.record import new_record, write_record
from flatpatch.studies.checks import check_names
from flatpatch.studies.evaluate import evaluate
from flatpatch.studies.planning import Asked, Cell, plan_study
from flatpatch.studies.result import HypothesisResult, StudyResult
from flatpatch.studies.schema import Study, read_study

HYPOTHESIS = """
  - id: accuracy
    statement: SAM raises the average accuracy
    quantity: {metric: average_accuracy}
    side: {settings: {sam: sam}}
    against: {settings: {sam: off}}
    direction: higher
    smallest: 0.5
    unit: points
"""
STUDY = """
name: small
title: A study for tests
question: Does it work?
settings: {{method: seqlora, tasks: "amazon,yahoo"}}
measure: {{kinds: [eigenvalues], scope: [adapter], when: [before, after]}}
runs:
  - name: main
    grid: {grid}
{more_runs}
forms:
  quick:
    settings: {{profile: quick}}
    seeds: 0..2
hypotheses:{hypotheses}
{conclusions}
"""


def write_study(
    folder: Path,
    *,
    grid: str = "{sam: [off, sam]}",
    hypotheses: str = HYPOTHESIS,
    more_runs: str = "",
    conclusions: str = "",
) -> Path:
    """Write a study's file."""
    path = folder / "study.yaml"
    text = STUDY.format(grid=grid, hypotheses=hypotheses, more_runs=more_runs, conclusions=conclusions)
    path.write_text(text, encoding="utf-8")
    return path


def planned(path: Path, output: Path, seeds: Sequence[str] = ("0", "1", "2")) -> tuple[Study, Asked, list[Cell]]:
    """Read a study and plan its quick form."""
    study = read_study(path)
    check_names(study)
    asked = Asked("quick", tuple(seeds), passed=(f"output={output}",))
    return study, asked, plan_study(study, asked)


def leave(
    cell: Cell,
    *,
    accuracy: Sequence[Sequence[float | None]] | None = None,
    values: Mapping[tuple[str, str], Mapping[str, float]] | None = None,
    status: str = "finished",
) -> None:
    """Leave a run's record, as if it had run.

    Args:
        cell: The run.
        accuracy: After each task, on each task.
        values: By time and task: the values measured over the adapter.
        status: The record's.
    """
    record = new_record(cell.plan) | {"status": status}
    tasks = record["tasks"]
    record["accuracy_matrix"] = accuracy or [
        [50.0 if j <= i else None for j in range(len(tasks))] for i in range(len(tasks))
    ]
    record["metrics"] = summarise(from_lists(record["accuracy_matrix"]))
    record["flatness"] = [
        {
            **{
                "task": task,
                "task_index": tasks.index(task),
                "when": when,
                "scope": "adapter",
                "samples": 8,
                "loss": 0.5,
            },
            **{"values": dict(found), "file": f"flatness/{when}-{task}.json", "arrays": None, "seconds": 1.0},
        }
        for (when, task), found in (values or {}).items()
    ]
    cell.plan.folder.mkdir(parents=True, exist_ok=True)
    write_record(cell.plan.folder, record)


def last_row(*row: float) -> list[list[float | None]]:
    """Return an accuracy matrix of two tasks with this last row."""
    return [[80.0, None], list(row)]


def judged(path: Path, output: Path, asked: tuple[Study, Asked, list[Cell]]) -> StudyResult:
    """Evaluate a study that was planned."""
    study, what, cells = asked
    return evaluate(study, what, cells, output)


def only(result: StudyResult) -> HypothesisResult:
    """Return the one hypothesis that a study tests."""
    (found,) = result.hypotheses
    return found


def as_json(result: StudyResult) -> Any:
    """Return a study's result as a file would hold it."""
    return json.loads(json.dumps(result.as_dict(), allow_nan=False))

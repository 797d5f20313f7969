"""Reference numbers that ship with the package, each with its source.

Three kinds, told apart by ``kind`` and never mixed in one comparison, because they are different experiments:

- ``shipped run``: derived from the logs and result files an upstream repository ships (``inflora_*``,
  ``cllora_vtab_5``, ``sdlora_*``, ``olora_*``);
- ``quoted run``: a run of which an author quoted the curve (``cllora_imagenet_r_40``);
- ``paper``: rows of a paper's tables (``paper_*``), each with a ``verification`` mark that says how far it was checked.

``applies_to`` says which runs a baseline, or a row of a paper's table, speaks of: ``method`` and ``order`` (text) or
``method``, ``dataset``, ``tasks`` and, where it is not upstream's default, ``shuffled`` (images). A row's
``record_metric`` is the name under which a run's record holds the same quantity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from flatpatch.errors import UserError, did_you_mean
from flatpatch.report.records import schema_violations

_FOLDER = files("flatpatch") / "baselines"
KINDS = ("shipped run", "quoted run", "paper")

_TEXT = {"type": "string"}
_NUMBER_OR_NONE = {"type": ["number", "null"]}
_APPLIES_TO = {
    "type": "object",
    "additionalProperties": False,
    "required": ["method"],
    "properties": {
        "method": _TEXT,
        "order": _TEXT,
        "dataset": _TEXT,
        "tasks": {"type": "integer", "minimum": 2},
        "shuffled": {"enum": [True]},
    },
}
_PERCENTAGES = {"type": ["array", "null"], "items": {"type": ["number", "null"], "minimum": 0, "maximum": 100}}
_MATRIX = {"type": ["array", "null"], "items": _PERCENTAGES}  # a row is null where a step's results are missing
_SUMMARY = {
    "type": ["object", "null", "array"],
    "properties": {"mean": _NUMBER_OR_NONE, "std": _NUMBER_OR_NONE, "n": {"type": "integer", "minimum": 0}},
}

RUN_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": [
        *("kind", "verification", "applies_to", "upstream", "benchmark", "setting", "source", "seeds", "metrics"),
        *("definitions", "notes"),
    ],
    "properties": {
        "kind": {"enum": list(KINDS[:2])},
        "verification": _TEXT,
        "applies_to": _APPLIES_TO,
        "upstream": _TEXT,
        "benchmark": _TEXT,
        "setting": {"type": "object"},
        "source": {
            "type": "object",
            "required": ["repo", "commit", "path"],
            # The hash of the one file that all numbers were read from, where there is one.
            "properties": {"repo": _TEXT, "commit": {"type": ["string", "null"]}, "path": _TEXT, "sha256": _TEXT},
        },
        # A text where the seed was not said.
        "seeds": {"type": "array", "minItems": 1, "items": {"type": ["integer", "string"]}},
        "metrics": {
            "type": "object",
            "required": ["final_accuracy", "average_accuracy", "accuracy_matrix"],
            "properties": {
                "final_accuracy": _SUMMARY,
                "average_accuracy": _SUMMARY,
                "accuracy_matrix": _MATRIX,
                "top1_curve_mean": _PERCENTAGES,
            },
        },
        "definitions": {"type": "object", "additionalProperties": _TEXT},
        "notes": {"type": "array", "items": _TEXT},
        # Settings that had an effect on the run and that upstream's configuration has otherwise.
        "differs_from_configuration": {"type": "array", "minItems": 1, "items": _TEXT},
        "per_seed": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["seed", "class_order", "top1_curve", "accuracy_matrix"],
                "properties": {
                    "seed": {"type": "integer"},
                    "class_order": {"type": ["string", "array"]},
                    "top1_curve": _PERCENTAGES,
                    "accuracy_matrix": _MATRIX,
                },
            },
        },
    },
}

PAPER_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["kind", "runs", "runs_source", "verification_levels", "paper", "arxiv", "metric_wording", "tables"],
    "properties": {
        "kind": {"enum": [KINDS[2]]},
        # How many runs stand behind a number; null where the paper does not say, or not where it was read.
        "runs": {"type": ["integer", "null"], "minimum": 1},
        "runs_source": _TEXT,
        "verification_levels": {"type": "object", "additionalProperties": _TEXT},
        "paper": _TEXT,
        "arxiv": _TEXT,
        "metric_wording": _TEXT,
        "tables": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["table", "rows", "sources"],
                "properties": {
                    "table": _TEXT,
                    "sources": {"type": "array", "minItems": 1, "items": _TEXT},
                    "rows": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["method", "benchmark", "metric", "mean", "std", "verification"],
                            "properties": {
                                "method": _TEXT,
                                "benchmark": _TEXT,
                                "metric": _TEXT,
                                "mean": {"type": "number"},
                                "std": {"type": ["number", "null"], "minimum": 0},
                                "verification": _TEXT,
                                "note": _TEXT,
                                "applies_to": _APPLIES_TO,
                                "record_metric": _TEXT,
                            },
                        },
                    },
                },
            },
        },
    },
}


def list_baselines() -> list[str]:
    """Return the names ``load_baseline`` knows, sorted."""
    return sorted(item.name.removesuffix(".json") for item in _FOLDER.iterdir() if item.name.endswith(".json"))


def load_baseline(name: str) -> dict[str, Any]:
    """Return one set of reference numbers.

    Args:
        name: One of ``list_baselines()``, e.g. ``"olora_order1"``.

    Returns:
        The file's object. ``kind`` says what it is; runs hold ``setting``, ``source``, ``metrics`` and
        ``definitions``, papers ``verification_levels`` and ``tables`` of rows.

    Raises:
        UserError: If there is no such baseline.
    """
    known = list_baselines()
    if name not in known:
        raise UserError(f"unknown baseline '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    baseline: dict[str, Any] = json.loads(_text(name))
    return baseline


def find_baselines(subject: Mapping[str, Any]) -> list[str]:
    """Return the baselines that speak of the same runs, runs before papers.

    Args:
        subject: What ``applies_to`` must equal, e.g. ``{"method": "olora", "order": "1"}``.

    Returns:
        Names for ``load_baseline``; for a paper, at least one row of it applies.
    """
    found = []
    for name in list_baselines():
        baseline = load_baseline(name)
        if baseline["kind"] != "paper":
            applies = baseline["applies_to"] == subject
        else:
            applies = any(paper_rows(baseline, subject))
        if applies:
            found.append((KINDS.index(baseline["kind"]), name))
    return [name for _, name in sorted(found)]


def paper_rows(baseline: Mapping[str, Any], subject: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield table name and row of each of a paper's rows that speaks of these runs."""
    for table in baseline["tables"]:
        for row in table["rows"]:
            if row.get("applies_to") == subject:
                yield table["table"], row


def validate_baseline(baseline: Any) -> None:
    """Check a baseline against the schema of its kind and for what a schema cannot say.

    Args:
        baseline: What ``load_baseline`` returns.

    Raises:
        ValueError: With every problem found, one per line, each with its place.
    """
    paper = isinstance(baseline, dict) and baseline.get("kind") == "paper"
    problems = list(schema_violations(baseline, PAPER_SCHEMA if paper else RUN_SCHEMA, ""))
    if not problems:
        problems = list(_paper_problems(baseline) if paper else _run_problems(baseline))
    if problems:
        raise ValueError("\n".join(problems))


def _paper_problems(baseline: Mapping[str, Any]) -> Iterator[str]:
    seen = set()
    for table in baseline["tables"]:
        for i, row in enumerate(table["rows"]):
            where = f"{table['table']}, row {i}"
            unknown = set(row["verification"].split(", ")) - set(baseline["verification_levels"])
            if unknown:
                yield f"{where}: verification {', '.join(sorted(unknown))} is not among verification_levels"
            if row["std"] is not None and baseline["runs"] in (None, 1):
                yield f"{where}: a standard deviation of {baseline['runs']} runs"
            if ("applies_to" in row) != ("record_metric" in row):
                yield f"{where}: applies_to and record_metric belong together"
            elif "applies_to" in row:
                key = (json.dumps(row["applies_to"], sort_keys=True), row["record_metric"])
                if key in seen:
                    yield f"{where}: a second row for {key[0]} {key[1]}"
                seen.add(key)


def _run_problems(baseline: Mapping[str, Any]) -> Iterator[str]:
    runs = baseline.get("per_seed", ())
    if runs and [run["seed"] for run in runs] != baseline["seeds"]:
        yield "seeds are not those of per_seed"
    matrices = [baseline["metrics"]["accuracy_matrix"], *(run["accuracy_matrix"] for run in runs)]
    tasks = baseline["applies_to"].get("tasks") or len(baseline["setting"].get("task_order", ()))
    for matrix in matrices:
        if matrix is not None and [tasks if row is None else len(row) for row in matrix] != [tasks] * tasks:
            yield f"an accuracy_matrix is not {tasks} x {tasks}"
    for run in runs:
        if len(run["top1_curve"]) != tasks:
            yield f"seed {run['seed']}: top1_curve has {len(run['top1_curve'])} entries, expected {tasks}"


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.json").read_text(encoding="utf-8")

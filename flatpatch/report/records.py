"""A run's record: what it must hold, and how to read it.

``RECORD_SCHEMA`` is plain JSON Schema (draft 2020-12), of which only ``type``, ``enum``, ``required``,
``properties``, ``additionalProperties``, ``items``, ``minItems``, ``minimum`` and ``maximum`` are used, so that
the few lines here can check it without another dependency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, did_you_mean

RECORD_FILE = "record.json"
SCHEMA_VERSION = 1
# Once "off-reference", which sounded like the reference engine and has nothing to do with it.
_EARLIER_LABELS = {"off-reference": "off-protocol"}

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_MAYBE_TEXT = {"type": ["string", "null"]}
_MAYBE_NUMBER = {"type": ["number", "null"]}
_PERCENT = {"type": ["number", "null"], "minimum": 0, "maximum": 100}
_SECONDS = {"type": ["number", "null"], "minimum": 0}

RECORD_SCHEMA: Mapping[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "flatpatch run record",
    "type": "object",
    "additionalProperties": False,
    "required": [
        "schema",
        "status",
        "method",
        "benchmark",
        "profile",
        "engine",
        "settings",
        "upstream",
        "deviations",
        "environment",
        "seeds",
        "tasks",
        "accuracy_matrix",
        "metrics",
        "flatness",
        "timing",
        "restarts",
    ],
    "properties": {
        "schema": {"enum": [SCHEMA_VERSION]},
        "status": {"enum": ["running", "finished", "failed", "interrupted"]},
        "method": _TEXT,
        "benchmark": _TEXT,
        "profile": {"enum": ["upstream", "paper", "quick"]},
        "profile_reason": _TEXT,
        "engine": {"enum": ["upstream", "reference"]},
        "engine_reason": _TEXT,
        # Why the numbers must not stand beside a paper's; empty if they may.
        "labels": {"type": "array", "items": {"enum": ["quick", "reference", "off-protocol"]}},
        "notes": _TEXTS,
        "error": _TEXT,
        "settings": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["value", "source"],
                "properties": {"value": {}, "source": _TEXT},
            },
        },
        # null where no upstream code runs (engine reference).
        "upstream": {
            "type": ["object", "null"],
            "required": ["repo", "pin", "base_tree", "patched_tree"],
            "properties": {"repo": _TEXT, "pin": _TEXT, "base_tree": _TEXT, "patched_tree": _TEXT},
        },
        "deviations": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["what", "upstream", "here", "why"],
                # "tasks" is left out where the deviation holds for all of them.
                "properties": {
                    "what": _TEXT,
                    "upstream": _MAYBE_TEXT,
                    "here": _MAYBE_TEXT,
                    "why": _TEXT,
                    "tasks": _TEXTS,
                },
            },
        },
        "environment": {"type": "object"},
        "seeds": {"type": "array", "items": {"type": "integer"}},
        "tasks": {"type": "array", "items": _TEXT, "minItems": 1},
        # Hashes of the folders the run read: model and data.
        "inputs": {"type": "object", "additionalProperties": _MAYBE_TEXT},
        # [after task i][on task j], percent, null where not evaluated.
        "accuracy_matrix": {"type": "array", "items": {"type": "array", "items": _PERCENT}},
        "metrics": {"type": "object", "additionalProperties": _MAYBE_NUMBER},
        # What was measured, by task, time and scope; flatpatch/measurement/files.py says what the names mean. The loss
        # is null, and values are missing or null, where the file tells why they could not be measured.
        "flatness": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [
                    "task",
                    "task_index",
                    "when",
                    "scope",
                    "samples",
                    "loss",
                    "values",
                    "file",
                    "arrays",
                    "seconds",
                ],
                "properties": {
                    "task": _TEXT,
                    "task_index": {"type": "integer", "minimum": 0},
                    "when": {"enum": ["before", "after", "finished"]},
                    "scope": {"enum": ["adapter", "merged", "trainable", "model"]},
                    "samples": {"type": "integer", "minimum": 0},
                    "loss": _MAYBE_NUMBER,
                    "values": {"type": "object", "additionalProperties": _MAYBE_NUMBER},
                    "file": _TEXT,
                    "arrays": _MAYBE_TEXT,
                    "seconds": {"type": "number", "minimum": 0},
                },
            },
        },
        # What each finished task's training counted: steps, perturbed parameters and the like.
        "training": {"type": "array", "items": {"type": "object"}},
        "timing": {
            "type": "object",
            "properties": {
                "started": _TEXT,
                "finished": _MAYBE_TEXT,
                "total_seconds": _SECONDS,
                "train_seconds": {"type": "array", "items": _SECONDS},
                "predict_seconds": {"type": "array", "items": _SECONDS},
            },
        },
        "restarts": {"type": "integer", "minimum": 0},
        # One entry for each restart: when, how many tasks were kept, and what changed between the two calls' machines,
        # as {name: [before, now]}; only where tasks were kept.
        "taken_up": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["at", "tasks_kept", "machine_changed"],
                "properties": {
                    "at": _TEXT,
                    "tasks_kept": {"type": "integer", "minimum": 0},
                    "machine_changed": {"type": "object", "additionalProperties": {"type": "array"}},
                },
            },
        },
    },
}

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def validate_record(record: Any) -> None:
    """Check a record against ``RECORD_SCHEMA`` and for what a schema cannot say.

    Args:
        record: A record, as read from or about to be written to ``record.json``.

    Raises:
        ValueError: With every problem found, one per line, each with its place in the record.
    """
    problems = list(schema_violations(record, RECORD_SCHEMA, ""))
    if not problems:
        problems = list(_inconsistencies(record))
    if problems:
        raise ValueError("\n".join(problems))


def run_folder(name: str) -> Path:
    """Return the place that a word names: a path, or one inside ``runs/``.

    Raises:
        UserError: If nothing is at either, with the path that was meant.
    """
    place, inside = Path(name).expanduser(), Path("runs") / name
    if not place.exists() and (inside.exists() or place.name == name):
        place = inside
    if not place.exists():
        raise UserError(f"run={name}: there is no run {place.absolute()}. Name a run's folder, e.g. run=runs/NAME.")
    return place


def read_record(path: Path) -> dict[str, Any]:
    """Read and check a run's record.

    Args:
        path: A ``record.json``, or the run's folder.

    Returns:
        The record.

    Raises:
        UserError: If it is missing, cut short, from another version, or does not hold what a record must.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no record {path}. Expected a run's folder or its {RECORD_FILE}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the record {path}: {error}.") from None
    remedy = "Run the same command again to make it anew, or restore the file."
    if not text.strip():
        raise UserError(f"the record {path} is empty. {remedy}")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"the record {path} is cut short or not JSON ({error}). {remedy}") from None
    if isinstance(record, dict) and record.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise UserError(
            f"the record {path} has schema {record['schema']}; this version of flatpatch reads "
            f"{SCHEMA_VERSION}. Read it with the version that wrote it."
        )
    _use_todays_words(record)
    try:
        validate_record(record)
    except ValueError as error:
        raise UserError(f"{path} is not a run's record:\n{error}") from None
    checked: dict[str, Any] = record
    return checked


def _use_todays_words(record: Any) -> None:
    """Rename in a record what earlier versions called otherwise."""
    labels = record.get("labels") if isinstance(record, dict) else None
    if isinstance(labels, list):
        record["labels"] = [_EARLIER_LABELS.get(label, label) if isinstance(label, str) else label for label in labels]


def read_step_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the measurements a run logged at each step.

    A kill can cut a line short, and the resumed run writes on behind it; such a line is left out.

    Args:
        path: A ``metrics.jsonl``; a run that has logged nothing yet has none.

    Returns:
        One object per sound line, in the file's order.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def setting(record: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return one setting's value, or ``default`` if the record does not hold it."""
    return record["settings"].get(key, {}).get("value", default)


def schema_violations(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what in a value breaks a schema of the kind used here, each with its place below ``where``."""
    name = where or "the record"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{name} is {_short(value)}, expected {' or '.join(map(repr, schema['enum']))}"
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{name} is {_short(value)}, expected {' or '.join(kinds)}"
        return
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", {})
        missing = [key for key in schema.get("required", ()) if key not in value]
        if missing:
            yield f"{name} lacks {', '.join(missing)}"
        for key, item in value.items():
            place = f"{where}.{key}" if where else key
            if key in properties:
                yield from schema_violations(item, properties[key], place)
            elif others is False:
                yield f"{name} has the unknown key '{key}'.{did_you_mean(key, properties)}"
            else:
                yield from schema_violations(item, others, place)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{name} has {len(value)} items, expected at least {schema['minItems']}"
        for i, item in enumerate(value):
            yield from schema_violations(item, schema.get("items", {}), f"{where}[{i}]")
    elif isinstance(value, int | float):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:
            yield f"{name} is {value!r}, expected {low:g} to {high:g}"


def _inconsistencies(record: Mapping[str, Any]) -> Iterator[str]:
    size = len(record["tasks"])
    widths = [len(row) for row in record["accuracy_matrix"]]
    if widths != [size] * size:
        yield f"accuracy_matrix has rows of {widths} entries, expected {size} rows of {size}, one per task"
    seen = [(entry["task_index"], entry["when"], entry["scope"]) for entry in record["flatness"]]
    for place in sorted({each for each in seen if seen.count(each) > 1}):
        yield f"flatness has several entries for task {place[0]}, {place[1]}, {place[2]}, expected one"
    for entry in record["flatness"]:
        index = entry["task_index"]
        if index >= size or record["tasks"][index] != entry["task"]:
            yield f"flatness has an entry for task {index} {entry['task']}, which is not one of the run's"
    for key in ("train_seconds", "predict_seconds"):
        length = len(record["timing"].get(key, ()))
        if length not in (0, size):
            yield f"timing.{key} has {length} entries, expected {size}, one per task"


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False  # JSON has no NaN; a missing number is null
    return isinstance(value, _TYPES[kind])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

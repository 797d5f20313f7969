"""A run's record: what it must hold, and how to read it.

``RECORD_SCHEMA`` is plain JSON Schema (draft 2020-12), of which only ``type``, ``enum``, ``required``,
``properties``, ``additionalProperties``, ``items``, ``minItems``, ``minimum`` and ``maximum`` are used, so that
the few lines here can check it without another dependency.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatpatch import families
from flatpatch.errors import UserError, did_you_mean, named_path
from flatpatch.settings import DEFAULTS, foreign, shown, with_role

RECORD_FILE = "record.json"
# One answer of all verbs: to run the command again alone would not do, as it continues what the record says.
_REMEDY = "Restore the file, or remove the run's folder and run its command again."
_PRINTED = 0.005  # percent: accuracies are printed with two decimals
SCHEMA_VERSION = 1
# Once "off-reference", which sounded like the reference engine and has nothing to do with it.
_EARLIER_LABELS = {"off-reference": "off-protocol"}

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_MAYBE_TEXT = {"type": ["string", "null"]}
_MAYBE_NUMBER = {"type": ["number", "null"]}
_PERCENT = {"type": ["number", "null"], "minimum": 0, "maximum": 100}
_SECONDS = {"type": ["number", "null"], "minimum": 0}


def _setting(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["value", "source"],
        "properties": {"value": value, "source": _TEXT},
    }


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
        # Left out by earlier versions (families.family_of).
        "family": {"enum": list(families.NAMES)},
        "profile": {"enum": ["upstream", "paper", "record", "quick", "small"]},
        "profile_reason": _TEXT,
        "engine": {"enum": ["upstream", "reference"]},
        "engine_reason": _TEXT,
        # Why the numbers must not stand beside a paper's; empty if they may.
        "labels": {
            "type": "array",
            "items": {"enum": ["quick", "small", "reference", "reconstruction", "off-protocol"]},
        },
        "notes": _TEXTS,
        "error": _TEXT,
        "settings": {
            "type": "object",
            # Those that are reckoned with here; the others are only shown.
            "properties": {
                **{key: _setting(_TEXT) for key in ("method", "order", "benchmark", "variant", "sam", "measure")},
                **{key: _setting({"type": "number", "minimum": 0}) for key in ("rho", "eta", "measure_rho")},
                "seed": _setting({"type": "integer", "minimum": 0}),
            },
            "additionalProperties": _setting({}),
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
        "environment": {
            "type": "object",
            "properties": {
                **{key: {"type": "object"} for key in ("libraries", "flatpatch", "variables")},
                "gpus": {"type": "array"},
            },
        },
        "seeds": {"type": "array", "items": {"type": "integer"}},
        "tasks": {"type": "array", "items": _TEXT, "minItems": 1},
        # Hashes of the folders the run read: model and data.
        "inputs": {"type": "object", "additionalProperties": _MAYBE_TEXT},
        # [after task i][on task j], percent, null where not evaluated.
        "accuracy_matrix": {"type": "array", "items": {"type": "array", "items": _PERCENT}},
        # [on task j], percent, before the first one is learned; left out where not evaluated.
        "accuracy_before_training": {"type": "array", "items": _PERCENT},
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
                    "when": {"enum": ["before", "after", "at_loss", "finished"]},
                    "scope": {"enum": ["adapter", "merged", "tangent", "trainable", "model"]},
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
        # Of a run whose first tasks are another run's: which, how many, and the settings that changed then, as
        # {name: [before, after]}; begun: whether it has been started.
        "forked": {
            "type": "object",
            "additionalProperties": False,
            "required": ["run", "tasks", "changed", "begun"],
            "properties": {
                "run": _TEXT,
                "tasks": {"type": "integer", "minimum": 1},
                "changed": {"type": "object", "additionalProperties": {"type": "array"}},
                "begun": {"enum": [True, False]},
            },
        },
        # One entry for each restart: when, how many tasks were kept, after which step of the next process it went on
        # (0: from its start), and what changed between the two calls' machines, as {name: [before, now]}; only where
        # something was kept.
        "resumed": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["at", "tasks_kept", "machine_changed"],
                "properties": {
                    "at": _TEXT,
                    "tasks_kept": {"type": "integer", "minimum": 0},
                    "after_step": {"type": "integer", "minimum": 0},
                    "machine_changed": {"type": "object", "additionalProperties": {"type": "array"}},
                },
            },
        },
    },
}

# One line of metrics.jsonl, as far as anything is drawn from it.
STEP_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["step"],
    "properties": {
        "task": _MAYBE_TEXT,
        "step": {"type": "integer", "minimum": 0},
        **{
            key: {"type": ["number", "null", "not finite"]}
            for key in (
                *("loss", "perturbed_loss", "grad_norm", "perturbation_norm", "effective_perturbation_norm"),
                *("perturbation_cosine", "learning_rate", "seconds"),
            )
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
    "not finite": (float,),  # a diverged step's loss; no JSON, but written and read by Python
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


def run_folder(name: str, word: str = "run") -> Path:
    """Return the place that a word names: a path, or one inside ``runs/``.

    Args:
        name: What stands behind the word.
        word: Which word it is, for messages.

    Raises:
        UserError: If nothing is at either, with the path that was meant.
    """
    place, inside = named_path(word, name), Path("runs") / name
    if not os.path.exists(place) and (os.path.exists(inside) or place.name == name):
        place = inside
    if not os.path.exists(place):  # False, too, for a name that is too long
        raise UserError(f"{word}={name}: there is no run {place.absolute()}. Name a run's folder, e.g. run=runs/NAME.")
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
    except IsADirectoryError:
        raise UserError(f"the record {path} is a folder, not a file. {_REMEDY}") from None
    except UnicodeDecodeError:
        raise UserError(f"the record {path} is not text in UTF-8. {_REMEDY}") from None
    except OSError as error:
        raise UserError(f"the record {path} cannot be read: {error.strerror}. {_REMEDY}") from None
    if not text.strip():
        raise UserError(f"the record {path} is empty. {_REMEDY}")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or lists in lists in lists
        raise UserError(f"the record {path} is cut short or not JSON ({error}). {_REMEDY}") from None
    if isinstance(record, dict) and record.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise UserError(
            f"the record {path} has schema {record['schema']}; this version of flatpatch reads "
            f"{SCHEMA_VERSION}. Use the version that wrote it, or another folder for another run."
        )
    _use_todays_words(record)
    try:
        validate_record(record)
    except ValueError as error:
        raise UserError(f"{path} is not a run's record:\n{error}\n{_REMEDY}") from None
    checked: dict[str, Any] = record
    return checked


def _use_todays_words(record: Any) -> None:
    """Rename in a record what earlier versions called otherwise."""
    labels = record.get("labels") if isinstance(record, dict) else None
    if isinstance(labels, list):
        record["labels"] = [_EARLIER_LABELS.get(label, label) if isinstance(label, str) else label for label in labels]


def fork_command(record: Mapping[str, Any]) -> list[str]:
    """Return the words of the command that makes a run again whose first tasks are another run's."""
    fork = record["forked"]
    changed = [
        f"{key}={shown(setting(record, key))}" for key in ("sam", *with_role("sam")) if key in record["settings"]
    ]
    return ["bash", "run_scripts/run.sh", "fork", f"run=runs/{fork['run']}", f"task={fork['tasks']}", *changed]


def read_step_metrics(path: Path, said: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the measurements a run logged at each step.

    A kill can cut a line short, and the resumed run writes on behind it; such a line is left out.

    Args:
        path: A ``metrics.jsonl``; a run that has logged nothing yet has none.
        said: Gets a sentence about what is left out, if anything is.

    Returns:
        One object per sound line, in the file's order.
    """
    path = Path(path)
    said = [] if said is None else said
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        said.append(f"the steps in {path}: it cannot be read ({error.strerror})")
        return []
    rows, lost = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if any(schema_violations(row, STEP_SCHEMA, "")):
            lost.append(number)
        else:
            rows.append(row)
    if lost:
        said.append(f"{len(lost)} of {len(lines)} lines of {path}, cut short or of another kind, first line {lost[0]}")
    return rows


def lacking_steps(record: Mapping[str, Any], steps: int) -> str:
    """Say that a finished run's measurements are fewer than the steps it counted, or return an empty string."""
    counted = [entry.get("steps") for entry in record.get("training", ())]
    total = sum(count for count in counted if isinstance(count, int))
    if record["status"] != "finished" or steps >= total:
        return ""
    return f"{total - steps} of the run's {total} steps, which metrics.jsonl lacks"


def setting(record: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return one setting's value, or ``default`` if the record does not hold it."""
    return record["settings"].get(key, {}).get("value", default)


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings by name; those that its version did not have yet stand at their defaults."""
    recorded = {key: entry["value"] for key, entry in record["settings"].items()}
    without = {*recorded, *foreign(families.family_of(record))}
    return recorded | {key: default for key, default in DEFAULTS.items() if key not in without}


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
    elif isinstance(value, int | float) and _is_finite(value):
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
    if widths == [size] * size:
        yield from _wrong_metrics(record)
    for key in ("train_seconds", "predict_seconds"):
        length = len(record["timing"].get(key, ()))
        if length not in (0, size):
            yield f"timing.{key} has {length} entries, expected {size}, one per task"


def _wrong_metrics(record: Mapping[str, Any]) -> Iterator[str]:
    """Say which numbers are not those of the accuracy matrix; what needs more than that cannot be checked here."""
    from flatpatch.metrics import from_lists, summarise  # numpy, which a mere look at --help needs not load

    of_the_matrix = summarise(from_lists(record["accuracy_matrix"]))
    for name, value in record["metrics"].items():
        right = of_the_matrix.get(name)
        if value is not None and right is not None and abs(value - right) > _PRINTED:
            yield f"metrics.{name} is {value:g}, and the accuracy matrix gives {right:g}: one of them was edited"


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float) and not _is_finite(value):
        return kind == "not finite" and isinstance(value, float)  # JSON has no NaN; a missing number is null
    return isinstance(value, _TYPES[kind])


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # isfinite() fails on whole numbers beyond it


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

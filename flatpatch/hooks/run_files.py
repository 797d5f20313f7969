"""The files that a hook shares with the run that started its process: the description it reads, what it writes.

``FLATPATCH_RUN`` names a JSON file::

    {"schema": 1, "task_index": 0, "task": "dbpedia",
     "metrics": "/.../metrics.jsonl", "progress": "/.../progress.json", "summary": "/.../summary.json",
     "sam": {"kind": "off" | "sam" | "asam", "rho": 0.05, "eta": 0.01, "scope": "lora" | "A" | "B" | "head" | "all",
             "sync": "local" | "global", "ascent_loss": "total" | "task"},
     "adapters": "upstream" | "fp32",
     "measure": null | {"request": {...}, "folder": "/.../flatness"}}

What ``measure`` holds, flatpatch.measurement.in_run says.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, did_you_mean

VARIABLE = "FLATPATCH_RUN"
SCHEMA = 1

_CHOICES = {
    "kind": ("off", "sam", "asam"),
    "scope": ("lora", "A", "B", "head", "all"),
    "sync": ("local", "global"),
    "ascent_loss": ("total", "task"),
}
_RADII = ("rho", "eta")
_TOP = ("schema", "task_index", "task", "metrics", "progress", "summary", "sam", "adapters", "measure")


def read_description(path: Path) -> dict[str, Any]:
    """Read and check a run's description, reporting all its mistakes at once."""
    where = f"{VARIABLE}={path}"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} cannot be read as JSON: {error}. Unset {VARIABLE} to train without flatpatch."
        ) from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        found = run.get("schema") if isinstance(run, dict) else type(run).__name__
        raise UserError(f"{where} has schema {found!r}, expected {SCHEMA}. Start the run again with this flatpatch.")
    problems = _differences(run, _TOP, where)
    settings = run.get("sam")
    if isinstance(settings, dict):
        problems += _differences(settings, (*_CHOICES, *_RADII), f"{where}: sam")
        for name, allowed in _CHOICES.items():
            if name in settings and settings[name] not in allowed:
                problems.append(f"{where}: sam.{name}={settings[name]!r} is not one of {', '.join(allowed)}")
        for name in _RADII:
            value = settings.get(name, 0.0)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                problems.append(f"{where}: sam.{name}={value!r} is not a number >= 0")
    elif "sam" in run:
        problems.append(f"{where}: sam is not an object")
    if run.get("adapters", "upstream") not in ("upstream", "fp32"):
        problems.append(f"{where}: adapters={run['adapters']!r} is not one of upstream, fp32")
    if problems:
        raise UserError.collect(problems)
    return run


def _differences(given: Mapping[str, Any], expected: tuple[str, ...], where: str) -> list[str]:
    unknown = [
        f"{where} has an unknown key {key!r}.{did_you_mean(key, expected)}" for key in given if key not in expected
    ]
    return unknown + [f"{where} has no {key!r}" for key in expected if key not in given]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once, so that no reader ever sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

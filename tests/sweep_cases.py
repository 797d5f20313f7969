"""Sweeps of the shortest real runs that there are."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path


def short_words(data: Path, output: Path, *more: str) -> list[str]:
    """Return the words of a sweep of runs with one short task each."""
    return [
        "sweep",
        "profile=quick",
        "engine=reference",
        "device=cpu",
        "tasks=amazon",
        f"data={data}",
        f"output={output}",
        "upstream.per_device_train_batch_size=8",
        *more,
    ]


def in_training(folder: Path) -> bool:
    """Tell whether a run has taken a step."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return any(json.loads(path.read_text())["step"] >= 1 for path in folder.glob("tasks/*/progress.json"))
    return False


def status(folder: Path) -> str:
    """Return what a run's record says; empty where there is none yet."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((folder / "record.json").read_text())["status"])
    return ""


def numbers(folder: Path) -> tuple[object, ...]:
    """Return what a run computed: its accuracies, and the losses of its steps."""
    record = json.loads((folder / "record.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return record["accuracy_matrix"], [(step["step"], step["loss"]) for step in steps]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Wait for something, and fail where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)

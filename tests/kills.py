"""Runs that are killed at random moments, beside the same run left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatpatch.files import ROOT

KILLS = int(os.environ.get("FLATPATCH_KILLS", "2"))
"""How often each run is killed; more of them find rarer moments, and take their time."""


def killed_at_random_moments(
    command: Callable[[str], list[str]], output: Path, results: Callable[[Path], Any], *, seed: int
) -> list[int]:
    """Run a command through kills and once without, and compare what both measured.

    Args:
        command: From a run's name to the words of its command.
        output: Where its folder is made.
        results: Reads what must not differ from a run's folder.
        seed: Of the moments. Every other one is anywhere in the time that the undisturbed run takes, of which a small
            training is a small part; the others are within a training, behind a checkpoint.

    Returns:
        After which step of its process each restart went on.
    """
    began = time.monotonic()
    whole = _start(command("undisturbed"))
    assert whole.wait() == 0
    seconds = time.monotonic() - began
    draw = random.Random(seed)
    for number in range(KILLS):
        process = _start(command("killed"))
        if number % 2:
            _wait(process, draw.uniform(0, seconds))
        else:
            step = draw.randint(3, 12)
            while process.poll() is None and not _has_reached(output / "killed", step):
                time.sleep(0.01)
            _wait(process, draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
    last = _start(command("killed"))
    assert last.wait() == 0
    assert results(output / "killed") == results(output / "undisturbed")
    record = json.loads((output / "killed" / "record.json").read_text())
    return [row["after_step"] for row in record.get("resumed", [])]


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flatpatch", "--quiet", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=None,
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _has_reached(folder: Path, step: int) -> bool:
    """Tell whether a task that is not finished has a checkpoint of this step or a later one."""
    return any(int(path.name) >= step for path in folder.glob("tasks/*/checkpoints/*") if path.name.isdigit())

"""Runs that are killed at random moments, beside the same run left alone."""

from __future__ import annotations

import json
import os
import random
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
        seed: Of the moments, which are anywhere in the time that the undisturbed run takes.

    Returns:
        After which step of its process each restart went on.
    """
    began = time.monotonic()
    whole = _start(command("undisturbed"))
    assert whole.wait() == 0
    seconds = time.monotonic() - began
    draw = random.Random(seed)
    for _ in range(KILLS):
        process = _start(command("killed"))
        try:
            process.wait(draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            assert process.returncode == 0
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

"""The benchmark runs, prints its table and saves what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "sam_step.py"


def run(*words):
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, env=environment())


def environment():
    return os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent), "DS_ACCELERATOR": "cpu"}


def test_benchmark_measures_and_saves(tmp_path):
    out = tmp_path / "deeper" / "result.json"
    result = run("rounds=2", "warmup=1", "batch=1", "length=8", "device=cpu", f"out={out}")
    assert result.returncode == 0, result.stderr[-2000:]
    saved = json.loads(out.read_text())
    assert {"base", "two passes", "flatpatch SAM"} <= saved["results"].keys()
    assert "ratio to base" in result.stdout


@pytest.mark.parametrize("words", [["roun=2"], ["rounds"], ["size=huge"]])
def test_unknown_settings_are_refused(words):
    result = run(*words)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert words[0].split("=")[0] in result.stderr


def test_help_lists_the_settings():
    assert "rounds=30" in run("--help").stdout

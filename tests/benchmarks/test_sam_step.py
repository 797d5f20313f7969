"""The benchmarks run, print their tables and save what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sam_step.py"


def run(*words, script="sam_step.py"):
    command = [sys.executable, str(SCRIPT.with_name(script)), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, env=environment())


def environment():
    return os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent), "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
def test_benchmark_measures_and_saves(tmp_path):
    out = tmp_path / "deeper" / "result.json"
    result = run("rounds=2", "warmup=1", "batch=1", "length=8", "device=cpu", f"out={out}")
    assert result.returncode == 0, result.stderr[-2000:]
    saved = json.loads(out.read_text())
    assert {"base", "two passes", "flatpatch SAM"} <= saved["results"].keys()
    assert "ratio to base" in result.stdout


@pytest.mark.slow
def test_parts_of_the_trainers_step_add_up_to_the_whole_without_sam_and_with_it(tmp_path):
    out = tmp_path / "result.json"
    words = ("steps=4", "warmup=2", "batch=1", "length=8", "device=cpu", "trainer=transformers", f"out={out}")
    result = run(*words, script="trainer_step.py")
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(out.read_text())["results"]
    assert found.keys() == {"base", "SAM"}
    for kind, entry in found.items():
        assert len(entry["whole"]) == 2
        for step, whole in enumerate(entry["whole"]):
            parts = {part: times[step] for part, times in entry["host"].items()}
            assert sum(parts.values()) == pytest.approx(whole)
            assert all(parts[part] > 0 for part in ("data", "forward", "backward", "optimizer", "the rest of the loop"))
            for part in ("random state", "ascent step", "restore"):
                assert (parts[part] > 0) == (kind == "SAM")
    assert "two passes and the rest of a base step" in result.stdout


@pytest.mark.parametrize("words", [["size=huge"], ["steps=1"], ["trainer=mine"], ["clock=sun"]])
def test_settings_of_the_trainers_step_out_of_range_are_refused(words):
    result = run(*words, script="trainer_step.py")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert words[0].split("=")[0] in result.stderr


@pytest.mark.parametrize("words", [["roun=2"], ["rounds"], ["size=huge"]])
def test_unknown_settings_are_refused(words):
    result = run(*words)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert words[0].split("=")[0] in result.stderr


def test_help_lists_the_settings():
    assert "rounds=30" in run("--help").stdout

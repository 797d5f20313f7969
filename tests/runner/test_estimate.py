"""How long runs will take, by those that are finished."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flatpatch.families.base import Plan
from flatpatch.runner.estimate import QUICK_SECONDS, estimate
from flatpatch.runner.resolve import make_plan, parse


def plan(output: Path, *words: str) -> Plan:
    return make_plan(parse(["method=seqlora", "profile=quick", f"output={output}", *words]))


def leave(output: Path, name: str, seconds: float, **change: str) -> None:
    row = {"method": "seqlora", "profile": "quick", "engine": "reference", "status": "finished", **change}
    (output / name).mkdir()
    (output / name / "record.json").write_text(json.dumps({"restarts": 0, **row, "timing": {"total_seconds": seconds}}))


def test_finished_runs_of_the_same_kind_are_what_is_judged_by(tmp_path: Path) -> None:
    leave(tmp_path, "a", 10.0)
    leave(tmp_path, "b", 30.0)
    leave(tmp_path, "c", 900.0, status="interrupted")
    leave(tmp_path, "d", 900.0, profile="small")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "record.json").write_text("{")
    found = estimate([plan(tmp_path, f"seed={seed}") for seed in range(3)], tmp_path)
    assert found.seconds == pytest.approx(3 * (10 + 30) / 2)
    assert found.sentence(2) == (
        f"about 30 s with 2 at once, by the mean time of 2 finished runs of the same kind in {tmp_path}"
    )


def test_a_quick_run_of_which_none_is_finished_takes_the_minutes_of_the_readme(tmp_path: Path) -> None:
    leave(tmp_path, "a", 10.0)
    found = estimate([plan(tmp_path), plan(tmp_path, "method=inclora")], tmp_path)
    assert found.seconds == 10 + QUICK_SECONDS
    assert "of 1 finished run of the same kind" in found.source and "and the README's minutes" in found.source


def test_what_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    quick = plan(tmp_path)
    found = estimate([quick, dataclasses.replace(quick, profile="small")], tmp_path)
    assert found.seconds is None
    assert found.sentence() == f"no estimate of the time: no run of seqlora small reference is finished in {tmp_path}"

"""What a sweep says when its runs have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import FlatpatchError
from flatpatch.families.base import Plan
from tests.report_page import with_average
from tests.report_records import make_quick_record

GAINS = (1.0, 2.0, 3.0)


def record_of(plan: Plan) -> dict:
    """Return what a finished run of a plan leaves: the average is the seed's, and SAM's gain with it."""
    settings, seed = plan.request.as_record(), plan.request.settings.seed
    record = make_quick_record(settings=settings, seeds=[seed])
    gain = GAINS[seed] if settings["sam"]["value"] == "sam" else 0.0
    return with_average(record, 70.0 + 3 * seed + gain)


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def sweep(*words: str, fails: str = "no run") -> int:
        def execute(plan: Plan) -> dict:
            if fails in plan.folder.name:
                raise FlatpatchError("it broke")
            return record_of(plan)

        monkeypatch.setattr("flatpatch.runner.sweep.execute", execute)
        monkeypatch.setattr("flatpatch.runner.sweep.leave_page", lambda folders: None)
        return main(["sweep", "method=nlora", "profile=quick", "engine=reference", f"output={tmp_path}", *words])

    return sweep


def test_a_sweep_with_and_without_sam_ends_with_the_paired_difference(swept, capsys):
    assert swept("sam=off,sam", "seed=0..2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "paired by seed: is the first better? What lies within 1 point is too small to matter." in said
    assert "SAM rho=0.05 minus SAM off average accuracy is higher: undecided in the miniature: +2 points (95 %" in said
    assert "forgetting is lower: undecided in the miniature: -2 points" in said


def test_a_sweep_without_both_has_no_paired_difference(swept, capsys):
    assert swept("sam=sam", "seed=0..1") == 0
    assert "paired by seed" not in capsys.readouterr().out


def test_a_failed_run_leaves_its_seed_out_and_the_others_count(swept, capsys):
    assert swept("sam=off,sam", "seed=0..2", fails="sam-rho0.05-seed1") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "2 seeds; p =" in said
    assert "seed 1 of SAM off has no partner and is left out" in said
    assert "failed: " in said


def test_a_sweep_in_which_all_fails_says_so(swept, capsys):
    assert swept("sam=off,sam", "seed=0", fails="seed0") == 1
    assert "failed: " in capsys.readouterr().out

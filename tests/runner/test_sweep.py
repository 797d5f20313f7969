"""A sweep from its words to its end: how it is carried out, what is said before, and what when its runs have ended."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Plan
from flatpatch.files import digest
from flatpatch.runner.record import new_record, write_record
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.runner.sweep import Options, read_options
from tests.report_page import with_average
from tests.report_records import make_quick_record
from tests.sweep_cases import in_training, numbers, short_words, status, wait_until
from tests.text_benchmark import small_benchmark

GAINS = (1.0, 2.0, 3.0)


def leave_record(plan: Plan) -> None:
    """Leave what a finished run of a plan does: the average is the seed's, and SAM's gain with it."""
    settings, seed = plan.request.as_record(), plan.request.settings.seed
    own = new_record(plan)
    kept = {key: own[key] for key in ("method", "profile", "engine", "environment", "deviations", "inputs", "upstream")}
    record = make_quick_record(settings=settings, seeds=[seed], **kept)
    gain = GAINS[seed] if settings["sam"]["value"] == "sam" else 0.0
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_record(plan.folder, with_average(record, 70.0 + 3 * seed + gain))


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def sweep(*words: str, fails: str = "no run", stops: str = "no run") -> int:
        def execute(plan: Plan, *, show: bool) -> None:
            with (tmp_path / "trained").open("a") as file:
                file.write(f"{plan.folder.name}\n")
            if fails in plan.folder.name:
                raise FlatpatchError("it broke")
            if stops in plan.folder.name:
                raise Interrupted("stopped by SIGTERM.")
            leave_record(plan)

        monkeypatch.setattr("flatpatch.runner.executors.local.execute", execute)
        monkeypatch.setattr("flatpatch.runner.sweep.leave_page", lambda folders: None)
        return main(["sweep", "method=nlora", "profile=quick", "engine=reference", f"output={tmp_path}/runs", *words])

    return sweep


def trained(folder: Path) -> list[str]:
    """Return the names of the runs that were carried out, in order."""
    path = folder / "trained"
    return path.read_text().splitlines() if path.exists() else []


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


def test_the_same_sweep_again_does_what_is_missing(swept, tmp_path: Path, capsys) -> None:
    assert swept("sam=off,sam", "seed=0..1", "parallel=1", fails="sam-rho0.05-seed1") == 1
    assert "failed: nlora-order1-quick-reference-sam-rho0.05-seed1: it broke\n" in capsys.readouterr().out
    assert swept("seed=1,0", "sam=sam,off", "parallel=1") == 0
    said = capsys.readouterr().out
    assert "4 runs, 3 of them finished\n1 to do: about " in said
    assert "by the mean time of 3 finished runs of the same kind in" in said
    assert len(trained(tmp_path)) == 5 and trained(tmp_path)[-1].endswith("sam-rho0.05-seed1")
    assert len(list((tmp_path / "runs" / "sweeps").iterdir())) == 1
    assert swept("sam=off,sam", "seed=0..1") == 0
    assert len(trained(tmp_path)) == 5
    assert "SAM rho=0.05 minus SAM off" in capsys.readouterr().out, "what they gave is said each time"


def test_the_list_is_there_before_the_first_run(swept, tmp_path: Path) -> None:
    assert swept("seed=0..2", "parallel=1", stops="seed0") == 85
    (path,) = (tmp_path / "runs" / "sweeps").glob("*/jobs.jsonl")
    assert len(path.read_text().splitlines()) == 3
    assert len(trained(tmp_path)) == 1


def test_runs_go_side_by_side_unless_asked_otherwise(swept, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert swept("seed=0..2", fails="seed1") == 1
    said = capsys.readouterr().out
    assert "3 to do: about 4 min with 2 at once, by the README's minutes for a quick run, taken as 3" in said
    (logs,) = (tmp_path / "runs" / "sweeps").glob("*/logs")
    assert f"failed: nlora-order1-quick-reference-off-seed1: it broke See {logs}/" in said
    assert len(list(logs.iterdir())) == 3


def test_commands_are_printed_for_another_scheduler_and_nothing_is_started(swept, tmp_path: Path, capsys) -> None:
    assert swept("seed=0", "parallel=1") == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert swept("seed=0..2", "rho=0.1,0.2", "executor=print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "one run is finished, and without SAM a radius makes no other"
    for line, seed in zip(lines, (1, 2), strict=True):
        place, _, command = line.partition(" && ")
        assert place == f"cd {Path.cwd()}"
        python, *words = shlex.split(command)
        assert (python, words[:3]) == (sys.executable, ["-m", "flatpatch", "run"])
        assert f"seed={seed}" in words and "profile=quick" in words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sweep_of_more_than_a_day_needs_a_word_more(swept, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("flatpatch.runner.estimate.QUICK_SECONDS", 50_000.0)
    assert swept("seed=0..2", "parallel=1") == 2
    assert "these 3 runs take about 41.7 h of computing, by the README's" in (said := capsys.readouterr().err)
    assert "If you mean it, add yes=true." in said
    assert not (tmp_path / "runs").exists()
    assert swept("seed=0..2", "parallel=1", "yes=true") == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["executor=slrum"], "unknown executor 'slrum'. Did you mean 'slurm'? Expected: local, slurm, print."),
        (["parallel=x"], "parallel='x' is not a whole number (expected e.g. parallel=2)."),
        (["executor=print", "parallel=2"], "parallel= has no meaning with executor=print"),
        (["slurm.partition=gpu"], "slurm.partition= has no meaning with executor=local. Add executor=slurm."),
        (["yes=maybe"], "yes='maybe' is neither true nor false."),
        (["executor=slurm", "slurm.array=1-3"], "slurm.array= cannot be chosen"),
        (["executor=slurm", "slurm.time="], "slurm.time= is empty"),
        (["executor=slurm", "slurm.a;b=1"], "slurm.a;b= is no option of sbatch"),
        (["executor=x", "parallel=y"], "2 problems, nothing was started"),
        (["seed=0..200"], "these are 201 runs, 201 values of seed alone. If you mean it, add yes=true."),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words: list[str], expected: str, swept, tmp_path: Path, capsys) -> None:
    assert swept("seed=0..1", *words) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_how_a_sweep_is_carried_out_is_no_setting_of_its_runs() -> None:
    words = ["method=nlora", "executor=slurm", "parallel=3", "slurm.gpus_per_node=1", "seed=0..1", "yes=true"]
    assert read_options(words) == (
        Options("slurm", 3, True, {"gpus_per_node": "1"}),
        ["method=nlora", "seed=0..1"],
    )
    with pytest.raises(UserError, match="unknown executor"):
        read_options(["executor="])


def test_a_machine_without_slurm_is_told(swept, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert swept("seed=0..1", "executor=slurm") == 2
    assert "no SLURM on this machine: sbatch and squeue cannot be found." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_that_is_killed_three_times_computes_no_run_twice(tmp_path: Path) -> None:
    data = small_benchmark(tmp_path / "data")
    words = short_words(data, tmp_path / "runs", "method=nlora", "upstream.num_train_epochs=4", "parallel=2")
    folders = [
        make_plan(parse([*(word for word in words[1:] if word != "parallel=2"), f"seed={seed}"])).folder
        for seed in range(3)
    ]
    kept: dict[Path, str] = {}

    def swept_until(condition) -> None:
        with (tmp_path / "said").open("ab") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "flatpatch", *words, "seed=0..2"], stdout=said, stderr=said, cwd=tmp_path
            )
        try:
            wait_until(lambda: condition() or process.poll() is not None, "the moment to kill")
            assert process.poll() is None, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
        kept.update({folder: digest(folder / "record.json") for folder in folders if status(folder) == "finished"})

    swept_until(lambda: sum(map(in_training, folders)) == 1)
    swept_until(lambda: sum(status(folder) == "running" for folder in folders) == 2)
    swept_until(lambda: any(status(folder) == "finished" for folder in folders))
    assert 1 <= len(kept) < 3
    assert main([*words, "seed=0..2"]) == 0
    assert [status(folder) for folder in folders] == ["finished"] * 3
    assert {folder: digest(folder / "record.json") for folder in kept} == kept
    restarts = [json.loads((folder / "record.json").read_text())["restarts"] for folder in folders]
    assert sum(restarts) >= 2
    assert (
        main(short_words(data, tmp_path / "undisturbed", *words[-3:-1], f"seed={restarts.index(max(restarts))}")) == 0
    )
    worst = folders[restarts.index(max(restarts))]
    assert numbers(worst) == numbers(tmp_path / "undisturbed" / worst.name)

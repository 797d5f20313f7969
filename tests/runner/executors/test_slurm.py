"""Runs by SLURM: the script by itself, with programs that stand in for SLURM's, and on a real one of one node."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.runner.executors import slurm
from flatpatch.runner.executors.slurm import Slurm, script
from flatpatch.runner.jobs import Job, folder_of, make_job
from flatpatch.runner.resolve import make_plan, parse
from tests.slurm_cluster import ask, cluster
from tests.sweep_cases import in_training, numbers, short_words, status, wait_until
from tests.text_benchmark import small_benchmark

WORDS = ["method=seqlora", "profile=quick", "engine=reference"]


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    found = []
    for seed in (0, 1):
        own = [*WORDS, f"output={tmp_path}/my runs", f"seed={seed}"]
        found.append(make_job(make_plan(parse(own)), own))
    return found


def stand_in(folder: Path, name: str, body: str) -> None:
    """Put a program into a folder that says with which words it was called, and then does something."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >>{shlex.quote(str(folder / name))}.calls\n{body}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with programs that stand in for SLURM's, first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    stand_in(folder, "sbatch", "echo '7;cluster'")
    stand_in(folder, "squeue", "")
    stand_in(folder, "scontrol", "")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_script_tells_slurm_what_was_asked(jobs: list[Job]) -> None:
    folder = folder_of(jobs)
    text = script(folder, jobs, Slurm({"gpus_per_node": "1", "comment": "a b", "exclusive": "true"}, at_once=4))
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert told["array"] == "0-1%4"
    assert (told["gpus-per-node"], told["comment"], told["exclusive"], told["requeue"]) == ("1", "'a b'", "", "")
    assert told["job-name"] == f"flatpatch-{folder.name}"
    assert told["signal"] == "B:USR1@120"
    assert told["output"] == shlex.quote(f"{folder}/slurm-%a.txt")


def over(nodes: int, job: Job) -> Job:
    """Return a job whose run is spread over several machines."""
    settings = dataclasses.replace(job.plan.request.settings, nodes=nodes)
    request = dataclasses.replace(job.plan.request, settings=settings)
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, request=request))


def test_each_run_gets_the_nodes_it_wants(jobs: list[Job]) -> None:
    folder = folder_of(jobs)
    assert "--nodes" not in script(folder, jobs, Slurm({}))
    text = script(folder, [over(2, job) for job in jobs], Slurm({"partition": "gpu"}))
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --partition=gpu\n" in text
    with pytest.raises(UserError, match="nodes=1,2: all runs of an array get as many nodes"):
        script(folder, [jobs[0], over(2, jobs[1])], Slurm({}))


def test_a_sweep_is_submitted_once(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", *WORDS, f"output={tmp_path}/runs", "seed=0..2", "executor=slurm", "slurm.partition=gpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "submitted: SLURM's job 7, 3 elements, one for each run that is not finished" in said
    (call,) = calls(programs, "sbatch")
    path = Path(call.removeprefix("--parsable "))
    assert path.name == "array.sbatch" and "#SBATCH --partition=gpu\n" in path.read_text()
    assert (path.parent / "jobs.jsonl").exists()
    stand_in(programs, "squeue", "printf '7_0\\n7_1\\n'")
    assert main(words) == 0
    assert "SLURM has this sweep: 2 elements, 7_0 is the first. Nothing was submitted." in capsys.readouterr().out
    assert len(calls(programs, "sbatch")) == 1
    assert calls(programs, "squeue")[0].split()[3] == f"--name=flatpatch-{path.parent.name}"


def test_what_slurm_refuses_is_told_as_it_says_it(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1")
    words = ["sweep", *WORDS, f"output={tmp_path}/runs", "seed=0", "executor=slurm", "slurm.partition=gqu"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "sbatch: error: invalid partition specified: gqu. Check the slurm.<name>= settings." in said


def element(jobs: list[Job], tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a script whose runs are a program of a test, and return it."""
    program = tmp_path / "program.py"
    program.write_text(body)
    monkeypatch.setattr(slurm, "command_of", lambda job: shlex.join([sys.executable, str(program), *job.words]))
    path = tmp_path / "array.sbatch"
    path.write_text(script(folder_of(jobs), jobs, Slurm({})))
    return path


def started(path: Path, **variables: str) -> subprocess.Popen[bytes]:
    own = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "42", **variables}
    return subprocess.Popen(["bash", str(path)], env={**os.environ, **own}, start_new_session=True)


WAITS = """\
import signal, sys, time
def stop(number, frame):
    print("told", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    sys.exit(85)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
print("at work", sys.argv[1:], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("code", [0, 1, 2, 85])
def test_an_element_ends_as_its_run_does(
    code: int, jobs: list[Job], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = element(jobs, tmp_path, f"import sys; print(sys.argv[-3:]); sys.exit({code})", monkeypatch)
    assert started(path).wait(30) == code
    assert calls(programs, "scontrol") == [], "85 alone is no reason: a full disk gives it too"
    said = (jobs[1].plan.folder / "slurm.txt").read_text()
    assert "element 1, restart 0" in said and "'seed=1', 'profile=quick', 'engine=reference'" in said


@pytest.mark.parametrize(
    ("number", "variables", "comes_back"),
    [
        (signal.SIGUSR1, {}, True),
        (signal.SIGUSR1, {"SLURM_RESTART_COUNT": "50"}, False),
        (signal.SIGTERM, {}, False),
    ],
)
def test_an_element_whose_time_is_up_comes_back_and_one_that_is_cancelled_does_not(
    number: signal.Signals,
    variables: dict[str, str],
    comes_back: bool,
    jobs: list[Job],
    programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(programs, "sleep", "")  # the one that waits to be ended by SLURM
    process = started(element(jobs, tmp_path, WAITS, monkeypatch), **variables)
    log = jobs[1].plan.folder / "slurm.txt"
    wait_until(lambda: log.exists() and "at work" in log.read_text(), "the run begins", 30)
    if number is signal.SIGUSR1:
        os.kill(process.pid, number)  # to the shell alone, as --signal=B: does
        time.sleep(0.1)
        os.kill(process.pid, number)
    else:
        os.killpg(process.pid, number)  # to all, as SLURM ends a job
    assert process.wait(30) == 85
    assert log.read_text().count(f"told {number.name}") == 1
    assert calls(programs, "scontrol") == (["requeue 42"] if comes_back else [])


@pytest.fixture
def real_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with cluster(monkeypatch):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("real_slurm")
def test_an_array_ends_with_the_results_of_undisturbed_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four runs one's time is up in its task, one is put back into the queue, and one is cancelled."""
    data = small_benchmark(tmp_path / "data")
    more = ("seed=0..3", "sam=sam", "upstream.num_train_epochs=4")
    words = short_words(data, tmp_path / "runs", *more, "executor=slurm")
    assert main(words) == 0
    said = capsys.readouterr().out
    job = re.search(r"submitted: SLURM's job (\d+), 4 elements", said)
    assert job, said
    folders = [folder_with(words, seed) for seed in range(4)]
    disturb = (
        lambda: os.kill(shell_of(0), signal.SIGUSR1),  # as SLURM does before the time is up; that takes minutes
        lambda: ask("scancel", f"{job[1]}_1"),
        lambda: ask("scontrol", "requeue", f"{job[1]}_2"),
    )
    for folder, act in zip(folders, disturb, strict=False):
        wait_until(lambda folder=folder: in_training(folder), f"{folder.name} trains")
        act()
        assert status(folder) != "finished", "it was to be disturbed in its task"
    deadline = time.monotonic() + 300
    while waiting := ask("squeue", "--noheader", "--array", "--states=PD,R,CG", "--format=%i"):
        assert time.monotonic() < deadline, ask("squeue")
        for name in waiting.split():  # SLURM would let two minutes pass before what was put back
            subprocess.run(["scontrol", "update", f"JobId={name}", "StartTime=now"], capture_output=True, check=False)
        time.sleep(0.5)
    assert [status(folder) for folder in folders[:1] + folders[2:]] == ["finished"] * 3
    assert status(folders[1]) != "finished"
    for disturbed in (0, 2):
        assert "restart 1" in (folders[disturbed] / "slurm.txt").read_text()
    assert "restart 1" not in (folders[1] / "slurm.txt").read_text()

    assert main(words) == 0
    assert re.search(
        r"4 runs, 3 of them finished\n(.*\n)*submitted: SLURM's job \d+, 1 elements", capsys.readouterr().out
    )
    wait_until(lambda: status(folders[1]) == "finished", "the cancelled run, submitted again")
    assert main(words) == 0
    assert " ±" in capsys.readouterr().out
    assert main(short_words(data, tmp_path / "undisturbed", *more[1:], "seed=0..1")) == 0
    for folder in folders[:2]:
        assert numbers(folder) == numbers(tmp_path / "undisturbed" / folder.name)


def shell_of(element: int) -> int:
    """Return the process of an element's script."""
    (found,) = [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if any("slurm_script" in word for word in process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get("SLURM_ARRAY_TASK_ID") == str(element)
    ]
    return found


def folder_with(words: list[str], seed: int) -> Path:
    own = [word for word in words[1:] if not word.startswith(("seed=", "executor="))]
    return make_plan(parse([*own, f"seed={seed}"])).folder

"""The authors' code on several machines of a SLURM job; here two tasks on one node, each with a launcher of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.runner.resolve import make_plan, parse
from tests.slurm_cluster import ask, cluster
from tests.sweep_cases import numbers, status, wait_until
from tests.text_benchmark import small_benchmark

pytestmark = [pytest.mark.third_party, pytest.mark.timeout(900)]
SHORT = (
    "method=nlora",
    "profile=quick",
    "engine=upstream",
    "device=cpu",
    "tasks=amazon",
    "upstream.num_train_epochs=1",
    "upstream.per_device_train_batch_size=8",
    "sam=sam",
)


def test_the_processes_of_all_machines_share_upstreams_batch(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    upstream("N-LoRA")
    words = [word for word in SHORT if "batch_size" not in word] + [f"output={tmp_path}"]
    plan = make_plan(parse([*words, "nodes=2", "processes=2"]), dry_run=True)
    one = make_plan(parse([*words, "processes=4"]), dry_run=True)
    assert plan.world_size == one.world_size == 4
    assert plan.stages[0].command[:6] == (
        *("-m", "flatpatch.families.text.across_nodes", "2", "<port>"),
        *("torch.distributed.run", "--nproc_per_node=2"),
    )
    assert plan.stages[0].command[6:] == one.stages[0].command[4:], "beside the launcher nothing differs"
    assert ("machines", "1", "2") in [(each.what, each.upstream, each.here) for each in plan.deviations]


def test_several_machines_without_slurm_are_refused(
    upstream: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream("N-LoRA")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["run", *SHORT, f"output={tmp_path}/runs", "nodes=2"]) == 2
    assert "nodes=2 needs a job of SLURM on as many: python -m flatpatch sweep" in capsys.readouterr().err
    assert main(["run", *SHORT, f"output={tmp_path}/runs", "nodes=2", "engine=reference"]) == 2
    assert "nodes=2: the reference engine runs in one process." in capsys.readouterr().err
    assert main(["run", *SHORT, f"output={tmp_path}/runs", "nodes=0"]) == 2
    assert "nodes=0 is out of range" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_machines_compute_what_two_processes_of_one_do(
    upstream: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream("N-LoRA")
    words = [*SHORT, f"data={small_benchmark(tmp_path / 'data')}"]
    with cluster(monkeypatch):
        as_two_tasks = ("slurm.nodes=1", "slurm.ntasks_per_node=2")  # there is but one node
        assert main(["sweep", *words, f"output={tmp_path}/runs", "nodes=2", "executor=slurm", *as_two_tasks]) == 0
        wait_until(lambda: not ask("squeue", "--noheader"), "the run", 400)
    (apart,) = (path.parent for path in (tmp_path / "runs").glob("*/record.json"))
    assert status(apart) == "finished", (apart / "slurm.txt").read_text()
    assert main(["run", *words, f"output={tmp_path}/runs", "run=together", "processes=2"]) == 0
    together = tmp_path / "runs" / "together"
    for folder in (apart, together):
        assert json.loads((folder / "record.json").read_text())["environment"]["world_size"] == 2
    assert numbers(apart) == numbers(together)

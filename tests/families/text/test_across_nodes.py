"""A launcher on each node of a SLURM job."""

from __future__ import annotations

import sys

from flatpatch.families.text.across_nodes import command

WORDS = ["2", "29512", "torch.distributed.run", "--nproc_per_node=4", "src/run.py", "--seed", "1"]


def test_srun_starts_one_launcher_on_each_node_and_they_meet_here() -> None:
    words = command(WORDS, "node7", "")
    assert words[:3] == ["srun", "--ntasks=2", "--kill-on-bad-exit=1"]
    assert words[3:6] == [sys.executable, "-m", "torch.distributed.run"]
    meet = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=node7:29512", "--rdzv_id=29512"]
    assert words[6:] == [*meet, "--nproc_per_node=4", "src/run.py", "--seed", "1"]


def test_a_launcher_gets_the_cores_that_the_job_asked_for() -> None:
    """Without the option, later versions of srun would give it one."""
    assert command(WORDS, "node7", "16")[3] == "--cpus-per-task=16"

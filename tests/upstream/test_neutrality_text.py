"""Promise P1: with SAM off, and with rho=0, a patched run of the authors' code equals the unpatched one bit for bit.

Losses at every step, adapter weights, predictions and metrics are compared, with dropout on: of two consecutive tasks
in plain python and under DeepSpeed ZeRO-2 with CPU offload on one process, and of one task on two gloo processes. All
processes start warm (tests/warm.py), the authors' and ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.families.base import Plan
from flatpatch.runner import execute as execute_module
from flatpatch.runner.execute import execute, prepare_work
from flatpatch.runner.resolve import command_of, make_plan, parse
from flatpatch.upstreams import UPSTREAMS
from tests.text_benchmark import small_benchmark
from tests.warm import TEXT, runs_by

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(1500)]
TASKS = ("dbpedia", "amazon")


Warm = Callable[[tuple[str, ...]], Path]


@dataclass
class Outcome:
    """What one run of two tasks left."""

    losses: list[list[float]]
    weights: list[dict[str, torch.Tensor]]
    predictions: list[str]
    metrics: list[dict[str, Any]]


def plan(folder: Path, data: Path, tasks: tuple[str, ...], *words: str) -> Plan:
    return make_plan(
        parse(
            [
                "profile=quick",
                "engine=upstream",
                "device=cpu",
                f"tasks={','.join(tasks)}",
                f"data={data}",
                f"output={folder.parent}",
                f"run={folder.name}",
                "upstream.logging_steps=1",
                "upstream.num_train_epochs=1",
                "upstream.per_device_train_batch_size=16",
                *words,
            ]
        )
    )


def outcome(plan: Plan, work: Path) -> Outcome:
    found = Outcome([], [], [], [])
    for stage in plan.stages:
        output = work / stage.output
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        found.losses.append([row["loss"] for row in history if "loss" in row])
        found.weights.append(torch.load(output / "adapter" / "adapter_model.bin"))
        found.predictions.append((output / "predict_eval_predictions.jsonl").read_text())
        results = json.loads((output / "all_results.json").read_text())
        found.metrics.append({k: v for k, v in results.items() if "runtime" not in k and "per_second" not in k})
    return found


class Runs:
    """Runs of a method with the same data and words: the authors' own, and with the hooks."""

    def __init__(self, warm: Warm, folder: Path, *words: str, tasks: tuple[str, ...] = TASKS) -> None:
        self.warm = warm
        self.tasks = tasks
        self.folder = folder
        self.data = small_benchmark(folder / "data")
        self.words = words

    def patched(self, name: str, *words: str) -> Outcome:
        planned = plan(self.folder / name, self.data, self.tasks, *self.words, *words)
        with runs_by(self.warm(TEXT)):
            execute(planned, show=False)
        return outcome(planned, planned.folder / "work")

    def unpatched(self) -> Outcome:
        """Run upstream's own code, as its authors wrote it, with the same arguments and no hook."""
        planned = plan(self.folder / "unpatched", self.data, self.tasks, *self.words)
        work = planned.folder / "work"
        prepare_work(planned, work, patched=False)
        variables = {**os.environ, **planned.environment}
        variables.pop("FLATPATCH_RUN", None)
        for stage in planned.stages:
            command = command_of(stage, str(self.warm(TEXT)), 29517)
            done = subprocess.run(
                command, cwd=work, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, done.stderr[-2000:]
        return outcome(planned, work)


def assert_same(here: Outcome, there: Outcome) -> None:
    assert len(here.losses[0]) >= 2  # something was trained
    assert here.losses == there.losses
    for mine, theirs in zip(here.weights, there.weights, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert here.predictions == there.predictions
    assert here.metrics == there.metrics


@pytest.fixture
def ready(upstream: Callable[[str], Path]) -> Callable[[str], None]:
    def check(method: str) -> None:
        repository = UPSTREAMS[method].repository
        assert repository is not None
        upstream(repository)

    return check


@pytest.fixture(params=["nlora", "olora"])
def runs(
    request: pytest.FixtureRequest, ready: Callable[[str], None], warm: Warm, tmp_path: Path
) -> Callable[..., Runs]:
    ready(request.param)
    return lambda *words, **tasks: Runs(warm, tmp_path, f"method={request.param}", *words, **tasks)


def test_patched_run_equals_unpatched_run_bit_for_bit(runs: Callable[..., Runs]) -> None:
    plain = runs()
    unpatched = plain.unpatched()
    assert_same(plain.patched("off", "sam=off"), unpatched)
    assert_same(plain.patched("zero", "sam=sam", "rho=0"), unpatched)
    perturbed = plain.patched("sam", "sam=sam", "rho=0.05")
    assert perturbed.losses != unpatched.losses  # the comparison can fail


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU optimizer with g++")
def test_patched_run_equals_unpatched_run_under_zero_2_with_cpu_offload(runs: Callable[..., Runs]) -> None:
    under_zero = runs("launcher=deepspeed")
    unpatched = under_zero.unpatched()
    port = execute_module._free_port()
    assert_same(under_zero.patched("off", "sam=off", f"port={port}"), unpatched)
    assert not [*Path("/dev/shm").glob(f"deepspeed*_{port}_*")]  # as DeepSpeed leaves it
    assert_same(under_zero.patched("zero", "sam=sam", "rho=0"), unpatched)


def test_rho_zero_equals_sam_off_on_two_gloo_processes(runs: Callable[..., Runs]) -> None:
    on_two = runs("processes=2", "upstream.per_device_train_batch_size=8", tasks=TASKS[:1])
    off = on_two.patched("off", "sam=off")
    assert_same(on_two.patched("zero", "sam=sam", "rho=0"), off)

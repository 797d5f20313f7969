"""Promise P1: with SAM off, and with rho=0, a patched run of the authors' code equals the unpatched one bit for bit.

Losses at every step, adapter weights, predictions and metrics of two consecutive tasks are compared, with dropout on:
in plain python, under DeepSpeed ZeRO-2 with CPU offload on one process, and on two gloo processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.families.base import Plan
from flatpatch.families.text import quick
from flatpatch.runner.execute import execute, prepare_work
from flatpatch.runner.resolve import command_of, make_plan, parse
from flatpatch.upstreams import UPSTREAMS

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(1500)]
TASKS = ("dbpedia", "amazon")


@dataclass
class Outcome:
    """What one run of two tasks left."""

    losses: list[list[float]]
    weights: list[dict[str, torch.Tensor]]
    predictions: list[str]
    metrics: list[dict[str, Any]]


def small_benchmark(folder: Path, train: int = 48, test: int = 8) -> Path:
    """Write the quick benchmark, cut to a few steps."""
    quick.write_benchmark(folder)
    for path in folder.rglob("*.json"):
        if path.name != "labels.json":
            rows = json.loads(path.read_text())
            path.write_text(json.dumps(rows[: train if path.name == "train.json" else test]))
    return folder


def plan(folder: Path, data: Path, *words: str) -> Plan:
    return make_plan(
        parse(
            [
                "profile=quick",
                "engine=upstream",
                "device=cpu",
                f"tasks={','.join(TASKS)}",
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


def run_patched(folder: Path, data: Path, *words: str) -> Outcome:
    planned = plan(folder, data, *words)
    execute(planned)
    return outcome(planned, folder / "work")


def run_unpatched(folder: Path, data: Path, *words: str) -> Outcome:
    """Run upstream's own code, as its authors wrote it, with the same arguments and no hook."""
    planned = plan(folder, data, *words)
    prepare_work(planned, folder / "work", patched=False)
    variables = {**os.environ, **planned.environment}
    variables.pop("FLATPATCH_RUN", None)
    for stage in planned.stages:
        command = command_of(stage, sys.executable, 29517)
        done = subprocess.run(
            command, cwd=folder / "work", env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return outcome(planned, folder / "work")


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


@pytest.mark.parametrize("method", ["nlora", "olora"])
def test_patched_run_equals_unpatched_run_bit_for_bit(
    method: str, ready: Callable[[str], None], tmp_path: Path
) -> None:
    ready(method)
    data = small_benchmark(tmp_path / "data")
    words = (f"method={method}",)
    unpatched = run_unpatched(tmp_path / "unpatched", data, *words)
    assert_same(run_patched(tmp_path / "off", data, *words, "sam=off"), unpatched)
    assert_same(run_patched(tmp_path / "zero", data, *words, "sam=sam", "rho=0"), unpatched)
    perturbed = run_patched(tmp_path / "sam", data, *words, "sam=sam", "rho=0.05")
    assert perturbed.losses != unpatched.losses  # the comparison can fail


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU optimizer with g++")
@pytest.mark.parametrize("method", ["nlora", "olora"])
def test_patched_run_equals_unpatched_run_under_zero_2_with_cpu_offload(
    method: str, ready: Callable[[str], None], tmp_path: Path
) -> None:
    ready(method)
    data = small_benchmark(tmp_path / "data")
    words = (f"method={method}", "launcher=deepspeed")
    unpatched = run_unpatched(tmp_path / "unpatched", data, *words)
    assert_same(run_patched(tmp_path / "off", data, *words, "sam=off"), unpatched)
    assert_same(run_patched(tmp_path / "zero", data, *words, "sam=sam", "rho=0"), unpatched)


@pytest.mark.parametrize("method", ["nlora", "olora"])
def test_rho_zero_equals_sam_off_on_two_gloo_processes(
    method: str, ready: Callable[[str], None], tmp_path: Path
) -> None:
    ready(method)
    data = small_benchmark(tmp_path / "data")
    words = (f"method={method}", "processes=2", "upstream.per_device_train_batch_size=8")
    off = run_patched(tmp_path / "off", data, *words, "sam=off")
    assert_same(run_patched(tmp_path / "zero", data, *words, "sam=sam", "rho=0"), off)

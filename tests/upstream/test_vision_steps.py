"""One step in the authors' own loops, patched, is SAM's step: equal to the formulas worked out beside it in float64."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flatpatch.patches import build
from tests import vision_upstream
from tests.upstream import test_neutrality_vision
from tests.warm import IMAGES

pytestmark = [pytest.mark.third_party, pytest.mark.slow]
TESTS = Path(__file__).resolve().parents[1]
# One full batch, one epoch, no weight decay: the first step of SGD with momentum is one of plain SGD.
COMMON = {"init_cls": 5, "increment": 5, "batch_size": 1000, "weight_decay": 0.0, "init_lr": 0.3}
CHANGES = {
    "InfLoRA": {"optim": "sgd", "init_epoch": 1, "epochs": 1, "lrate": 0.3, "init_weight_decay": 0.0}
    | {"total_sessions": 2},
    "CL-LoRA": {"init_epochs": 1, "later_epochs": 1, "later_lr": 0.3},
    "SD-LoRA": {"init_epoch": 1, "epochs": 1, "lrate": 0.3},
}


# The first step of these kinds is SAM's, in the second task too if nothing of the first one is remembered.
@pytest.mark.parametrize(
    ("repo", "kind"),
    [
        *(("InfLoRA", "sam"), ("CL-LoRA", "sam"), ("SD-LoRA", "sam")),
        *(("InfLoRA", "fsam"), ("CL-LoRA", "looksam")),
    ],
)
def test_one_step_of_each_of_two_tasks_is_that_of_the_formulas(
    repo: str, kind: str, warm: Callable[..., Path], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream(repo)
    tree = build(repo, into=tmp_path).path
    config = vision_upstream.CONFIGS[repo] | COMMON | CHANGES[repo]
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = test_neutrality_vision.description(repo, kind=kind, rho=0.3)
    run["vision"]["dataset"] = {"class": "vision_steps:TenImages", "seed": 0}
    (tmp_path / "hook.json").write_text(json.dumps(run))
    done = subprocess.run(
        [warm(IMAGES), str(TESTS / "vision_steps.py"), str(tree), "config.json", "results.pt"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "FLATPATCH_RUN": str(tmp_path / "hook.json")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    tasks = torch.load(tmp_path / "results.pt")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {"CL-LoRA": ["task", "distillation", "task"]}.get(repo, ["task", "task"])
    assert [line["loss_name"] for line in lines] == names
    assert all(line["perturbation_norm"] == pytest.approx(0.3) for line in lines)
    assert len(tasks) == 2
    for task in tasks:
        changed = 0
        for name, after in task["after"].items():
            # The step itself is some 1e-3 and larger.
            torch.testing.assert_close(after, task["expected"][name], rtol=1e-9, atol=1e-11)
            changed += not torch.equal(after, task["before"][name])
        assert changed > 4

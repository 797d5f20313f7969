"""What the reference engines' processes share: SAM, or a control in its place, around each step, and what they tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.reference import StepRecorder


def trained(folder: Path, *, task_index: int | None = 0, groups: tuple[str, ...] = ("A", "B"), **sam: Any) -> Tensor:
    """Two trainings of three steps on a quadratic; returns the point that each first reached."""
    files = {name: str(folder / name) for name in ("metrics", "progress", "summary")}
    settings = {"rho": 0.3, "eta": 0.01, "scope": "all", "ascent_loss": "total", "seed": 5, **sam}
    run = {**files, "task": "a", "task_index": task_index, "sam": settings, "measure": None}
    ends = []
    with StepRecorder(run) as recorder:
        for _ in range(2):
            weights = [nn.Parameter(torch.full((20,), 1.0, dtype=torch.float64)) for _ in groups]
            named = [{"params": [w], "name": name} for w, name in zip(weights, groups, strict=True)]
            optimizer = torch.optim.SGD(named, lr=0.1)
            gradients = recorder.make_gradients(optimizer)

            def closure(*, penalised: bool = True, share: float = 1.0, weights: list[nn.Parameter] = weights) -> Tensor:
                for weight in weights:
                    weight.grad = None
                loss: Tensor = sum((w**4).sum() for w in weights)  # type: ignore[assignment]
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.detach()

            for _ in range(3):
                gradients(closure)
                optimizer.step()
            ends.append(torch.cat([w.detach() for w in weights]))
    return torch.stack(ends)


def test_random_directions_repeat_and_differ_by_seed_and_by_task(tmp_path: Path) -> None:
    first = trained(tmp_path, kind="random")
    assert torch.equal(trained(tmp_path, kind="random"), first)
    assert not torch.equal(trained(tmp_path, kind="random", seed=6), first)
    assert not torch.equal(trained(tmp_path, kind="random", task_index=1), first)
    # A process that learns all tasks counts them itself.
    every = trained(tmp_path, kind="random", task_index=None)
    assert torch.equal(every[0], first[0])
    assert not torch.equal(every[1], every[0])


def test_random_directions_of_radius_zero_are_the_plain_training_bit_for_bit(tmp_path: Path) -> None:
    assert torch.equal(trained(tmp_path, kind="random", rho=0.0), trained(tmp_path, kind="off"))


def test_scope_of_weights_that_are_not_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scope=head: this model trains no such weights. It has: lora, A, B, all."):
        trained(tmp_path, kind="sam", scope="head")


def test_what_is_told_stays_in_the_progress_until_it_has_been_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner looks now and then: a line that the next step overwrites would be lost."""
    files = {name: str(tmp_path / name) for name in ("metrics", "progress", "summary")}
    recorder = StepRecorder({**files, "task": None, "sam": {"kind": "off"}, "measure": None})
    recorder.tell("zero-shot accuracy 24.0")
    recorder.on_predict({"step": 2, "total": 2}, "dtd")
    progress = json.loads((tmp_path / "progress").read_text())
    assert (progress["note"], progress["task"], progress["step"]) == ("zero-shot accuracy 24.0", "dtd", 2)
    assert "flatpatch: zero-shot accuracy 24.0" in capsys.readouterr().out

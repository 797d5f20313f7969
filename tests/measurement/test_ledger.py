"""The ledger of forgetting: closed forms, resuming at any step, and no trace in the training."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatpatch.families.sample import Sample
from flatpatch.flatness import supervised_loss
from flatpatch.measurement import files
from flatpatch.measurement.in_run import Measurer
from flatpatch.measuring import Request

MSE = supervised_loss(nn.functional.mse_loss)
TASKS = ("first", "second", "third")


def measurer(folder: Path, every: int = 2) -> Measurer:
    request = Request(("loss", "ledger"), ("trainable",), samples=6, batch=4, ledger_every=every)
    return Measurer({"measure": {"request": request.as_dict(), "folder": str(folder)}})


def sample_of_task(index: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    draw = torch.Generator().manual_seed(index)
    x, y = torch.randn(6, 4, generator=draw).double(), torch.randn(6, 1, generator=draw).double()
    return [(x[:4], y[:4]), (x[4:], y[4:])], x, y


class Power(nn.Module):
    """A linear model whose output is raised to a power; with 1 the mean squared error is quadratic."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.power = nn.Linear(4, 1, bias=False).double(), power

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) ** self.power


def train(folder: Path, model: nn.Module, *, steps: int = 5, every: int = 2, tasks: int = 3) -> list[list[Tensor]]:
    """Learn tasks by plain gradient descent, each in a measurer of its own; return the weights along the way."""
    paths = []
    for index in range(tasks):
        batches, x, y = sample_of_task(index)
        made = measurer(folder, every)
        made.begin(task_index=index, task=TASKS[index], model=model, sample=Sample(batches, 6), loss=MSE)
        (weight,) = model.parameters()
        path = [weight.detach().clone()]
        for step in range(1, steps + 1):
            (gradient,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), weight)
            with torch.no_grad():
                weight -= 0.05 * gradient
            path.append(weight.detach().clone())
            made.step(step)
        made.end()
        paths.append(path)
    return paths


def ledger(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}-ledger.json").read_text())


def test_terms_of_a_quadratic_loss_are_its_whole_change_at_every_entry(tmp_path: Path) -> None:
    """The loss of task i is |Xw - y|^2 / n: g = 2 X'(Xw - y) / n and H = 2 X'X / n."""
    paths = train(tmp_path, Power())
    assert not (tmp_path / "1-first-ledger.json").exists()  # there was nothing to forget
    for trained, name in ((1, "2-second"), (2, "3-third")):
        content = ledger(tmp_path, name)
        assert content["error"] is None and content["scopes"] == {} and content["ledger"]["every"] == 2
        assert content["ledger"]["num_parameters"] == 4 and content["ledger"]["steps"] == 5
        assert [row["task"] for row in content["ledger"]["earlier"]] == list(TASKS[:trained])
        for row in content["ledger"]["earlier"]:
            _, x, y = sample_of_task(row["task_index"])
            assert row["steps"] == [2, 4, 5] and row["samples"] == 6
            points = [paths[trained][step].T for step in (0, *row["steps"])]
            losses = [float(((x @ w - y) ** 2).mean()) for w in points]
            assert row["losses"] == pytest.approx(losses, rel=1e-12)
            for k, (w, after) in enumerate(zip(points, points[1:], strict=False)):
                d = after - w
                assert row["gradients"][k] == pytest.approx(float((2 * x.T @ (x @ w - y) / 6).T @ d), rel=1e-9)
                assert row["curvatures"][k] == pytest.approx(float(d.T @ x.T @ x @ d) / 6, rel=1e-9)
            assert row["change"] == pytest.approx(losses[-1] - losses[0], rel=1e-12)
            assert row["gradient"] + row["curvature"] == pytest.approx(row["change"], abs=1e-12)
            assert abs(row["remainder"]) < 1e-12 and row["absolute_remainder"] < 1e-12
            changes = [abs(b - a) for a, b in zip(losses, losses[1:], strict=False)]
            assert row["absolute_change"] == pytest.approx(sum(changes), rel=1e-12)


def test_remainder_is_what_the_two_terms_leave_and_grows_with_the_steps_of_an_entry(tmp_path: Path) -> None:
    shares = []
    for every in (1, 5):
        train(tmp_path / str(every), Power(2), every=every, tasks=2)
        (row,) = ledger(tmp_path / str(every), "2-second")["ledger"]["earlier"]
        assert row["change"] == pytest.approx(row["gradient"] + row["curvature"] + row["remainder"], rel=1e-12)
        assert len(row["steps"]) == 5 // every
        shares.append(row["absolute_remainder"] / row["absolute_change"])
    assert 0 < 1.5 * shares[0] < shares[1] and shares[0] < 0.03


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_ledger_goes_on_from_the_state_of_another_process(tmp_path: Path, cut: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path = train(whole, Power(2), tasks=2)[1]
    train(parts, Power(2), tasks=1)
    model = Power(2)
    batches, _, _ = sample_of_task(1)
    begin = {"task_index": 1, "task": "second", "model": model, "sample": Sample(batches, 6), "loss": MSE}

    def go(made: Measurer, steps: range) -> None:
        for step in steps:
            with torch.no_grad():
                model.linear.weight.copy_(path[step])
            made.step(step)

    with torch.no_grad():
        model.linear.weight.copy_(path[0])
    first = measurer(parts)
    first.begin(**begin)
    go(first, range(1, cut + 1))
    kept = io.BytesIO()
    torch.save(first.state(), kept)
    kept.seek(0)
    with torch.no_grad():  # a process that goes on begins where the task began
        model.linear.weight.copy_(path[0])
    second = measurer(parts)
    second.begin(**begin)
    second.put_back(torch.load(kept, weights_only=True))
    with torch.no_grad():
        model.linear.weight.copy_(path[cut])
    go(second, range(cut + 1, 6))
    second.end()
    found = [ledger(folder, "2-second") | {"seconds": 0} for folder in (whole, parts)]
    assert found[0] == found[1]


def test_model_and_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    """With dropout, batch normalisation and its buffers, which the ledger follows too, and a sample that is drawn."""

    def drawn(_: Request) -> Sample:
        torch.rand(1)
        return Sample(batches, 6)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1)).double()
    for index in range(2):
        batches, x, _ = sample_of_task(index)
        made = measurer(tmp_path)
        held = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        made.begin(task_index=index, task=TASKS[index], model=model, sample=drawn, loss=MSE)
        made.step(1)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
        assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
        model(x)  # moves the running statistics alone
        made.step(2)
        made.end()
    (row,) = ledger(tmp_path, "2-second")["ledger"]["earlier"]
    assert row["gradient"] == row["curvature"] == 0.0
    assert row["remainder"] == row["change"] == row["losses"][1] - row["losses"][0] != 0.0


def test_entries_before_a_number_that_is_not_finite_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(tmp_path, Power(), every=1, tasks=2)[1]
    whole = ledger(tmp_path, "2-second")["ledger"]["earlier"][0]
    model = Power()
    made = measurer(tmp_path, every=1)
    with torch.no_grad():
        model.linear.weight.copy_(path[0])
    batches, _, _ = sample_of_task(1)
    made.begin(task_index=1, task="second", model=model, sample=Sample(batches, 6), loss=MSE)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.linear.weight.copy_(path[step] if step < 3 else torch.tensor(torch.nan))
        made.step(step)
    made.end()
    reason = "the loss of task 1 is nan at step 3"
    assert f"FAILED ledger: FlatpatchError: {reason} (the training goes on)" in capsys.readouterr().err
    content = ledger(tmp_path, "2-second")
    assert content["error"] == f"FlatpatchError: {reason}"
    (row,) = content["ledger"]["earlier"]
    assert row["steps"] == [1, 2] and row["losses"] == whole["losses"][:3]
    assert row["gradients"] == whole["gradients"][:2] and row["curvatures"] == whole["curvatures"][:2]
    assert row["change"] == pytest.approx(row["losses"][2] - row["losses"][0], rel=1e-12)


def test_what_fails_is_said_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Power()
    batches, _, _ = sample_of_task(1)
    made = measurer(tmp_path)
    made.begin(task_index=1, task="second", model=model, sample=Sample(batches, 6), loss=MSE)
    made.step(2)
    made.end()
    assert "FAILED ledger: FileNotFoundError: the sample of task 1 is not in" in capsys.readouterr().err
    content = ledger(tmp_path, "2-second")
    assert "the sample of task 1" in content["error"] and content["ledger"]["earlier"] == []
    assert files.failures(content) == [content["error"]] and files.shortage(content) == []

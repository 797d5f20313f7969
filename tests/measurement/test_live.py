"""Following a training: closed forms, the share of its time, going on in another process, and no trace in it."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatpatch.families.sample import Sample
from flatpatch.flatness import HessianOperator, ball_sharpness, supervised_loss
from flatpatch.measurement import files, in_run, live
from flatpatch.measurement.in_run import Measurer
from flatpatch.measuring import Request
from tests import flatness_lora

MSE = supervised_loss(nn.functional.mse_loss)
TASKS = ("first", "second")


def measurer(folder: Path, *, scope: str = "trainable", **more: Any) -> Measurer:
    request = Request(("loss", "live"), (scope,), samples=60, batch=4, **{"rho": 0.3, "live_samples": 6, **more})
    return Measurer({"measure": {"request": request.as_dict(), "folder": str(folder)}})


def data_of_task(index: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Return six examples of a task, as batches and as a whole: 2 X'X / 6 has the eigenvalues 9, 4, 1 and 1/4."""
    draw = torch.Generator().manual_seed(index)
    columns, _ = torch.linalg.qr(torch.randn(6, 4, generator=draw, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64))
    x = columns @ torch.diag((3 * torch.tensor([9.0, 4.0, 1.0, 0.25]).double()).sqrt()) @ turn
    y = torch.randn(6, 1, generator=draw).double()
    return [(x[:4], y[:4]), (x[4:], y[4:])], x, y


def begin(made: Measurer, model: nn.Module, index: int = 0) -> None:
    batches = data_of_task(index)[0]
    made.begin(task_index=index, task=TASKS[index], model=model, sample=Sample(batches, 6), loss=MSE)


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False).double()


def descend(model: nn.Linear, index: int = 0) -> None:
    """Take a step on the task's mean squared error."""
    _, x, y = data_of_task(index)
    (gradient,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)
    with torch.no_grad():
        model.weight -= 0.02 * gradient


def content_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}-live.json").read_text())


def test_quadratic_trainings_have_their_known_eigenvalues_and_gaps(tmp_path: Path) -> None:
    """The loss of a task is |Xw - y|^2 / n: g = 2 X'(Xw - y) / n and H = 2 X'X / n."""
    model, made = line(), measurer(tmp_path, live_every=2)
    for index in range(2):
        _, x, y = data_of_task(index)
        hessian, rho = 2 * x.T @ x / 6, 0.3
        begin(made, model, index)
        losses, gaps = [], []
        for step in range(1, 42):
            descend(model, index)
            made.step(step)
            w = model.weight.detach().T
            g = 2 * x.T @ (x @ w - y) / 6
            losses.append(float(((x @ w - y) ** 2).mean()))
            gaps.append(float(rho * g.norm() + rho**2 / 2 * (g.T @ hessian @ g) / g.norm() ** 2))
        made.end()
        content = content_of(tmp_path, f"{index + 1}-{TASKS[index]}")
        found = content["live"]
        assert content["error"] is None and content["when"] == "live" and content["samples"] == 6
        assert files.shortage(content) == []  # of 60 examples for the rest
        assert found["every"] == 2 and found["steps"] == 41 and found["num_parameters"] == 4
        assert found["measured"] == list(range(2, 42, 2)) and found["restarted"] == [2]
        assert found["losses"] == pytest.approx(losses[1::2], rel=1e-9)
        assert found["gaps"] == pytest.approx(gaps[1::2], rel=1e-6)
        for value, residual in zip(found["eigenvalues"], found["residuals"], strict=True):
            assert min(abs(value - known) for known in (9, 4, 1, 0.25)) <= residual + 1e-9
        assert found["eigenvalues"][-1] == pytest.approx(9, rel=1e-6)
        assert found["residuals"][-1] < 1e-3 < 0.1 < found["residuals"][0]


@pytest.mark.parametrize("scope", ["adapter", "merged", "tangent"])
def test_lora_is_followed_over_the_first_scope_asked_for(tmp_path: Path, scope: str) -> None:
    """The factors move slowly, and with them the merged matrices and the tangent spaces."""
    model = flatness_lora.make_model()
    problem = flatness_lora.make_problem(model)
    loss = supervised_loss(nn.functional.cross_entropy)
    made = measurer(tmp_path, scope=scope, live_every=1)
    made.begin(task_index=0, task="first", model=model, sample=Sample(problem.batches, 10), loss=loss)
    for step in range(1, 21):
        _, gradient = problem.loss_and_gradient()
        with torch.no_grad():
            for factor, piece in zip(problem.variables, problem.unflatten(gradient), strict=True):
                factor -= 0.001 * piece
        made.step(step)
    made.end()
    found = content_of(tmp_path, "1-first")["live"]
    now = flatness_lora.make_problem(model, scope)
    assert found["scope"] == scope and found["num_parameters"] == now.size and found["restarted"] == [1]
    known = torch.linalg.eigvalsh(HessianOperator(now).matmat(torch.eye(now.size).double()))
    value, residual = found["eigenvalues"][-1], found["residuals"][-1]
    assert float((known - value).abs().min()) <= residual < 0.2 * float(known[-1])
    assert value == pytest.approx(float(known[known.abs().argmax()]), rel=0.03)
    assert found["gaps"][-1] == pytest.approx(ball_sharpness(now, 0.3, ascent_steps=1).one_step, rel=1e-9)


class Clock:
    """Seconds that pass where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("costs", [(0.5,) * 99, (0.5, 0.5, 3.0, *(0.5,) * 96)], ids=["even", "one slow"])
def test_steps_are_those_that_keep_measuring_under_a_twentieth_of_the_trainings_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, costs: tuple[float, ...]
) -> None:
    clock, spent = Clock(), list(costs)
    follow, prepare = live.follow, live.working_copy

    def slow(*given: Any) -> Any:
        clock.now += spent.pop(0)
        return follow(*given)

    def slowly(model: nn.Module) -> Any:
        clock.now += 1.0
        return prepare(model)

    monkeypatch.setattr(live, "follow", slow)
    monkeypatch.setattr(live, "working_copy", slowly)
    monkeypatch.setattr(in_run, "time", SimpleNamespace(perf_counter=clock))
    model, made = line(), measurer(tmp_path)
    begin(made, model)
    for step in range(1, 201):
        clock.now += 1.0
        descend(model)
        if step == 7:  # other measuring is no time of the training
            with made._apart():
                clock.now += 1000.0
        made.step(step)
    made.end()
    found = content_of(tmp_path, "1-first")["live"]
    assert found["training_seconds"] == 200.0 and found["preparing_seconds"] == 1.0
    # Until the first has told its time it is taken to be as long as its preparation: 1 + 1 s of 40 s. The next are
    # half a second each, of 10 s. One that takes 3 s is over the bound, and is paid for before there is another.
    even = [40, 41, *range(50, 201, 10)]
    slow_one = [40, 41, 50, *range(160, 166), *range(170, 201, 10)]
    assert found["measured"] == (even if costs[2] == 0.5 else slow_one)
    assert found["measuring_seconds"] == sum(costs[: len(found["measured"])])
    assert found["share"] == (1.0 + found["measuring_seconds"]) / 200 == 0.05


def test_training_too_short_for_a_look_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = line(), measurer(tmp_path)
    begin(made, model)
    made.step(1)
    made.end()
    found = content_of(tmp_path, "1-first")["live"]
    assert found["measured"] == found["eigenvalues"] == [] and found["steps"] == 1
    assert "live: followed 0 of 1 steps of task 1 first" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 4])
def test_another_process_goes_on_with_a_new_vector_and_says_where(tmp_path: Path, cut: int) -> None:
    def go(made: Measurer, model: nn.Linear, steps: range) -> None:
        for step in steps:
            descend(model)
            made.step(step)

    model, whole = line(), measurer(tmp_path / "whole", live_every=1)
    begin(whole, model)
    go(whole, model, range(1, 9))
    whole.end()
    again, first = line(), measurer(tmp_path / "parts", live_every=1)
    begin(first, again)
    go(first, again, range(1, cut + 1))
    kept = io.BytesIO()
    torch.save(first.state(), kept)
    kept.seek(0)
    second = measurer(tmp_path / "parts", live_every=1)
    begin(second, again)
    second.put_back(torch.load(kept, weights_only=True))
    go(second, again, range(cut + 1, 9))
    second.end()
    assert torch.equal(again.weight, model.weight)
    one, other = (content_of(tmp_path / name, "1-first")["live"] for name in ("whole", "parts"))
    assert other["restarted"] == [1, cut + 1] and one["restarted"] == [1]
    for name in ("measured", "losses", "gaps", "gradient_norms", "steps"):
        assert other[name] == one[name]  # which no vector is in
    assert other["eigenvalues"][:cut] == one["eigenvalues"][:cut]
    assert other["residuals"][cut] > one["residuals"][cut]
    assert other["preparing_seconds"] >= 0 and other["training_seconds"] > 0


def test_state_of_a_version_that_followed_nothing_is_taken(tmp_path: Path) -> None:
    made = measurer(tmp_path)
    begin(made, line())
    kept = made.state()
    del kept["live"]
    made.put_back(kept)
    made.step(1)
    made.end()
    assert not list(tmp_path.glob("*-live.json"))


def test_model_and_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    """With dropout, batch normalisation, whose buffers are followed too, and a sample that is drawn."""
    batches, x, y = data_of_task(0)
    asked = []

    def drawn(request: Request) -> Sample:
        torch.rand(1)
        asked.append((request.samples, request.batch))
        return Sample(batches, 6)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    made = measurer(tmp_path, live_every=1)
    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.Adam(plain.parameters(), 0.1)
    before = torch.get_rng_state()
    made.begin(task_index=0, task="first", model=model, sample=drawn, loss=MSE)
    assert torch.equal(torch.get_rng_state(), before)
    for step in range(1, 4):
        state = torch.get_rng_state()
        for each, its in ((plain, plain_optimizer), (model, optimizer)):
            torch.set_rng_state(state)
            its.zero_grad()
            nn.functional.mse_loss(each(x), y).backward()
            its.step()
        after = torch.get_rng_state()
        made.step(step)
        assert torch.equal(torch.get_rng_state(), after)
        held = plain.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
        moments = [[m for each in its.state.values() for m in each.values()] for its in (plain_optimizer, optimizer)]
        assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))
        gradients = [[p.grad for p in each.parameters()] for each in (plain, model)]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
        assert model.training and all(p.requires_grad for p in model.parameters())
        evaluated = copy.deepcopy(model).eval()
        assert made._live is not None
        expected = nn.functional.mse_loss(evaluated(x), y).item()
        assert made._live._values["losses"][-1] == pytest.approx(expected, rel=1e-9)
    made.end()
    assert asked == [(6, 4)]


def test_steps_before_a_number_that_is_not_finite_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = line(), measurer(tmp_path, live_every=1)
    begin(made, model)
    for step in (1, 2, 3):
        descend(model)
        if step == 3:
            with torch.no_grad():
                model.weight.fill_(torch.nan)
        made.step(step)
    made.end()
    reason = "FlatpatchError: the loss is nan at step 3"
    assert f"FAILED live: {reason} (the training goes on)" in capsys.readouterr().err
    content = content_of(tmp_path, "1-first")
    assert content["error"] == reason and files.failures(content) == [reason]
    assert content["live"]["measured"] == [1, 2] and all(map(math.isfinite, content["live"]["eigenvalues"]))


def test_loss_that_cannot_be_measured_is_said_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = measurer(tmp_path, scope="adapter")
    begin(made, line())
    made.step(1)
    made.end()
    assert "FAILED live: UserError: scope=adapter chooses no weight" in capsys.readouterr().err
    content = content_of(tmp_path, "1-first")
    assert "chooses no weight" in content["error"] and content["live"]["measured"] == []

"""The training loop with the step as recorded, which is not SAM, against the formula of its two faults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.families.reference import StepRecorder
from flatpatch.families.training import Gradients, descend, train_task
from tests.reference_cases import make_task

RHO, RATE, CLIP, WEIGHT = 0.3, 0.5, 0.2, 0.7


def micro_batches(count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(3, 4, generator=draw, dtype=torch.float64),
            "y": torch.randn(3, 2, generator=draw, dtype=torch.float64),
        }
        for _ in range(count)
    ]


class Model(nn.Module):
    """A bilinear model of two matrices, and a penalty on its first."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.A = nn.Parameter(torch.randn(3, 4, generator=draw, dtype=torch.float64))
        self.B = nn.Parameter(torch.randn(2, 3, generator=draw, dtype=torch.float64))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.tanh(batch["x"] @ self.A.T) @ self.B.T, batch["y"])

    def penalty(self) -> Tensor:
        return WEIGHT * self.A.abs().sum()


def gradient_of(model: Model, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [model.A, model.B])
    return torch.cat([g.flatten() for g in found])


def flat(model: Model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def place(model: Model, values: Tensor) -> None:
    with torch.no_grad():
        model.A.copy_(values[:12].reshape(3, 4))
        model.B.copy_(values[12:].reshape(2, 3))


def one_step(folder: Path, batches: list[dict[str, Tensor]], *, penalised: bool, **sam: Any) -> tuple[Model, Any, Any]:
    """Take one step over all of the batches; return the model, what was reported of the step, and the recorder."""
    model, states = Model(), []
    files = {name: str(folder / name) for name in ("metrics", "progress", "summary")}
    settings = {"rho": RHO, "eta": 0.01, "scope": "lora", "ascent_loss": "total", "seed": 0, **sam}
    run = {**files, "task": "a", "task_index": 0, "sam": settings, "measure": None}
    optimizer = torch.optim.SGD(
        [{"params": [model.A], "name": "A"}, {"params": [model.B], "name": "B"}],
        lr=RATE,
    )
    with StepRecorder(run) as recorder:
        descend(
            model,
            optimizer,
            iter(batches),
            lambda batch: (model.loss(batch), model.penalty() if penalised else None),
            total=1,
            accumulated=len(batches),
            max_grad_norm=CLIP,
            make_gradients=recorder.make_gradients,
            on_step=states.append,
        )
    return model, states[0], recorder


@pytest.mark.parametrize("penalised", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_recorded_step_climbs_along_all_micro_batches_and_descends_along_the_last(
    tmp_path: Path, count: int, penalised: bool
) -> None:
    batches = micro_batches(count)
    reference = Model()
    start = flat(reference)

    def penalty() -> Tensor:
        return reference.penalty() if penalised else torch.zeros((), dtype=torch.float64)

    total = sum(reference.loss(batch) for batch in batches) / count + count * penalty()
    up = gradient_of(reference, total)  # type: ignore[arg-type]
    clipped = up * min(1.0, CLIP / float(up.norm()))
    place(reference, start + RHO * clipped / clipped.norm())
    last = reference.loss(batches[-1])
    down = gradient_of(reference, last / count + penalty())
    expected = start - RATE * down * min(1.0, CLIP / float(down.norm()))
    at_perturbed = float(last.detach() + penalty().detach())

    model, state, recorder = one_step(tmp_path, batches, penalised=penalised, kind="recorded")
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-8)  # torch clips to CLIP / (norm + 1e-6)
    assert float(recorder.sam.perturbed_loss) == pytest.approx(at_perturbed, rel=1e-10)
    place(reference, start)
    mean = sum(float(reference.loss(batch).detach()) for batch in batches) / count + float(penalty().detach())
    assert state["loss"] == pytest.approx(mean, rel=1e-12)


def test_recorded_step_is_another_than_sams_and_the_same_where_there_is_one_micro_batch(tmp_path: Path) -> None:
    ends = {
        (kind, count): flat(one_step(tmp_path, micro_batches(count), penalised=True, kind=kind)[0])
        for kind in ("recorded", "sam")
        for count in (1, 4)
    }
    assert torch.equal(ends["recorded", 1], ends["sam", 1])
    assert float((ends["recorded", 4] - ends["sam", 4]).norm()) > 1e-2


def test_ascent_is_on_the_first_examples_of_each_batch_and_the_descent_on_all(tmp_path: Path) -> None:
    batches = micro_batches(2)
    reference = Model()
    start, examples = flat(reference), len(batches[0]["x"])
    count = -(-examples * 2 // 5)  # rounded up
    assert count < examples
    up = gradient_of(reference, sum(reference.loss({k: v[:count] for k, v in batch.items()}) for batch in batches))  # type: ignore[arg-type]
    place(reference, start + RHO * up / up.norm())
    down = gradient_of(reference, sum(reference.loss(batch) for batch in batches) / 2)
    expected = start - RATE * down * min(1.0, CLIP / float(down.norm()))
    model, _, _ = one_step(tmp_path, batches, penalised=False, kind="sam", ascent_batch=0.4)
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-8)


class Answering(nn.Module):
    """A model without LoRA that answers through heads, of which the present task's alone learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({"old": nn.Linear(2, 2).requires_grad_(False), "new": nn.Linear(2, 2)})

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.heads["new"](self.body(x)).square().mean())


def test_head_of_a_model_without_lora_is_a_group_of_its_own(tmp_path: Path) -> None:
    model, groups = Answering(), dict[str, list[nn.Parameter]]()

    def make_gradients(optimizer: torch.optim.Optimizer) -> Gradients:
        groups.update({group["name"]: group["params"] for group in optimizer.param_groups})
        return lambda closure: closure()

    task = make_task(tmp_path, tmp_path, tmp_path, num_train_epochs=1)
    examples = [torch.ones(2), torch.zeros(2)]
    train_task(model, examples, lambda few: {"x": torch.stack(few)}, task, lambda: None, make_gradients=make_gradients)
    assert list(groups) == ["body", "head"]
    assert {id(each) for each in groups["body"]} == {id(each) for each in model.body.parameters()}
    assert {id(each) for each in groups["head"]} == {id(each) for each in model.heads["new"].parameters()}

"""What every implementation is held to: one function a check, against a closed form or a property.

The problem is a quadratic, ``L(w) = (w - c)' H (w - c) / 2``, so that the gradient ``g = H (w - c)`` and SAM's
``H (w + rho g / |g| - c)`` are known (Foret et al. 2021, arXiv:2010.01412, Eq. 2).
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.audit.rows import NotOfferedError, Order, Row, Stepper

CLOSE = 1e-6  # relative: some take the norm in float32, whatever the weights are


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        verdict: "pass", "fail", "by design" or "not offered".
        number: What was measured, in few characters; for a failure, by how much.
        text: What that means, in a sentence.
    """

    verdict: str
    number: str = ""
    text: str = ""


@dataclass(frozen=True)
class Check:
    """A check: its title in the matrix, what it demands, and the function that runs it."""

    name: str
    demand: str
    run: Callable[[Maker], Finding]


@dataclass(frozen=True)
class Maker:
    """Makes steppers of one implementation."""

    row: Row
    module: Any

    def __call__(self, order: Order) -> Stepper:
        """Make one."""
        return self.row.make(self.module, order)


class Quadratic(nn.Module):
    """Weights in two tensors, of one strictly convex quadratic."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        """Draw the Hessian, the minimum and the start."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
        start = torch.randn(10, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        self.hessian = (root @ root.T / 10 + torch.eye(10, dtype=torch.float64)).to(dtype)
        self.minimum = torch.randn(10, generator=generator, dtype=torch.float64).to(dtype)
        self.first_weight = nn.Parameter(start[:6].view(2, 3).to(dtype))
        self.second_weight = nn.Parameter(start[6:].clone().to(dtype))

    def flat(self) -> Tensor:
        """Return all weights in one vector."""
        return torch.cat([self.first_weight.flatten(), self.second_weight])

    def forward(self) -> Tensor:
        """Return the loss, plus 1, so that it is never zero."""
        away = self.flat() - self.minimum
        return away @ self.hessian @ away / 2 + 1

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient in closed form."""
        return self.hessian @ (weights - self.minimum)

    def order(self, **more: Any) -> Order:
        """Order SAM over both tensors."""
        return Order(self, [{"params": [self.first_weight, self.second_weight]}], **more)

    def passes(self) -> Tensor:
        """Run forward and backward."""
        loss = self()
        loss.backward()
        return loss


def sam_gradient(problem: Quadratic, weights: Tensor, rho: float, eta: float | None = None) -> Tensor:
    """The gradient at ``w + epsilon``; with eta, ASAM's epsilon (Kwon et al. 2021, arXiv:2102.11600, Eq. 11)."""
    gradient = problem.gradient(weights)
    scale = torch.ones_like(weights) if eta is None else weights.abs() + eta
    return problem.gradient(weights + rho * scale**2 * gradient / (scale * gradient).norm())


def judged(error: float, text: str = "", bound: float = CLOSE) -> Finding:
    """Pass where an error is within its bound; else fail with it."""
    verdict = "pass" if error <= bound else "fail"  # NaN fails
    return Finding(verdict, "" if verdict == "pass" else short(error), text if verdict == "fail" else "")


def short(number: float) -> str:
    return "NaN" if math.isnan(number) else f"{number:.2g}"


def furthest(found: Tensor, expected: Tensor | float) -> float:
    """The largest distance of any entry."""
    return float((found - expected).detach().abs().max())


def relative(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """The distance from where a step should have ended, in lengths of that step."""
    return float((found - expected).norm() / (expected - start).norm())


def off_the_closed_form(problem: Quadratic, stepper: Stepper, expected: Callable[[Tensor], Tensor]) -> float:
    start = problem.flat().detach().clone()
    stepper.step(problem.passes)
    return relative(problem.flat().detach(), expected(start), start)


def one_step(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    error = off_the_closed_form(problem, stepper, lambda w: w - 0.1 * sam_gradient(problem, w, 0.1))
    return judged(error, "of the step's length away from where it should end")


def groups(make: Maker) -> Finding:
    problem = Quadratic()
    pairs = [{"params": [problem.first_weight], "lr": 0.2}, {"params": [problem.second_weight], "lr": 0.02}]
    rates = torch.tensor([0.2] * 6 + [0.02] * 4, dtype=torch.float64)
    stepper = make(Order(problem, pairs))
    error = off_the_closed_form(problem, stepper, lambda w: w - rates * sam_gradient(problem, w, 0.1))
    return judged(error, "of the step's length away: one norm over all groups, each group its own rate")


def adaptive(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order(adaptive=True, rho=0.5))
    eta = make.row.eta
    if eta is None:
        raise NotOfferedError("no ASAM")
    error = off_the_closed_form(problem, stepper, lambda w: w - 0.1 * sam_gradient(problem, w, 0.5, eta))
    return judged(error, "of the step's length away from Kwon's Eq. 11")


def base_optimizer(make: Maker, base: type[torch.optim.Optimizer], options: dict[str, Any]) -> Finding:
    problem, twin = Quadratic(), Quadratic()
    stepper = make(problem.order(base=base, options=options))
    optimizer = base([twin.first_weight, twin.second_weight], **options)
    start = twin.flat().detach().clone()
    for _ in range(4):
        stepper.step(problem.passes)
        gradient = sam_gradient(twin, twin.flat().detach(), 0.1)
        twin.first_weight.grad, twin.second_weight.grad = gradient[:6].view(2, 3).clone(), gradient[6:].clone()
        optimizer.step()
    error = relative(problem.flat().detach(), twin.flat().detach(), start)
    return judged(error, "of the way of four steps away from torch's own optimizer with SAM's gradients", 1e-5)


def momentum(make: Maker) -> Finding:
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    return base_optimizer(make, torch.optim.SGD, options)


def adamw(make: Maker) -> Finding:
    return base_optimizer(make, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1})


def scheduler(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    if not isinstance(stepper.scheduled, torch.optim.Optimizer):
        raise NotOfferedError("no optimizer to give to a scheduler")
    schedule = torch.optim.lr_scheduler.StepLR(stepper.scheduled, step_size=1, gamma=0.1)
    stepper.step(problem.passes)
    schedule.step()
    error = off_the_closed_form(problem, stepper, lambda w: w - 0.01 * sam_gradient(problem, w, 0.1))
    return judged(error, "of the second step's length away, which should have a tenth of the rate")


def accumulation(make: Maker) -> Finding:
    first, second = Quadratic(1), Quadratic(2)
    second.first_weight, second.second_weight = first.first_weight, first.second_weight
    stepper = make(first.order())

    def passes() -> Tensor:
        losses = []
        for part in (first, second):
            loss = part() / 2
            loss.backward()
            losses.append(loss.detach())
        return sum(losses, torch.zeros((), dtype=torch.float64))

    start = first.flat().detach().clone()
    gradient = (first.gradient(start) + second.gradient(start)) / 2
    moved = start + 0.1 * gradient / gradient.norm()
    expected = start - 0.1 * (first.gradient(moved) + second.gradient(moved)) / 2
    stepper.step(passes)
    return judged(relative(first.flat().detach(), expected, start), "of the step's length away from the whole batch")


def clipping(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    start = problem.flat().detach().clone()
    gradient = sam_gradient(problem, start, 0.1)
    stepper.step(problem.passes, lambda: nn.utils.clip_grad_norm_(problem.parameters(), 0.5))
    expected = start - 0.1 * 0.5 * gradient / gradient.norm()
    return judged(relative(problem.flat().detach(), expected, start), "of the step's length away", 1e-5)


def clipping_by_value(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    start = problem.flat().detach().clone()
    gradient = sam_gradient(problem, start, 0.1)
    bound = float(gradient.abs().median())
    times = 0

    def clip() -> None:
        nonlocal times
        times += 1
        nn.utils.clip_grad_value_(problem.parameters(), bound)

    stepper.step(problem.passes, clip)
    finding = judged(
        relative(problem.flat().detach(), start - 0.1 * gradient.clamp(-bound, bound), start),
        "of the step's length away: the closure is the one place to clip, so the ascent gradient is clipped and turned",
    )
    if finding.verdict == "fail" and times > 1:
        return Finding("not offered", finding.number, finding.text)
    return finding


class Parts(nn.Module):
    """A weight that every pass uses, one that some passes use, one that none does, and one that is frozen."""

    def __init__(self) -> None:
        """Start all at one."""
        super().__init__()
        for name in ("used_weight", "other_weight", "unused_weight", "frozen_weight"):
            self.register_parameter(name, nn.Parameter(torch.ones(3, dtype=torch.float64)))
        self.frozen_weight.requires_grad_(False)

    def order(self) -> Order:
        """Order SAM over all."""
        return Order(self, [{"params": list(self.parameters())}])

    def passes(self, *with_other: bool) -> Callable[[], Tensor]:
        """Return passes that use the other weight in some of the calls to come."""
        calls = iter(with_other)

        def run() -> Tensor:
            loss = (self.used_weight + self.frozen_weight).square().sum()
            if next(calls):
                loss = loss + self.other_weight.square().sum()
            loss.backward()
            return loss

        return run


def no_gradient(make: Maker) -> Finding:
    problem = Parts()
    make(problem.order()).step(problem.passes(*[True] * 4))
    moved = max(furthest(p, 1) for p in (problem.unused_weight, problem.frozen_weight))
    return judged(moved, "is how far a weight without a gradient moved", 0.0)


def gradient_in_first_pass(make: Maker) -> Finding:
    problem = Parts()
    make(problem.order()).step(problem.passes(True, *[False] * 3))
    moved = furthest(problem.other_weight, 1)
    return judged(moved, "is left of the perturbation, on a weight that the second pass does not use", 0.0)


def gradient_in_second_pass(make: Maker) -> Finding:
    problem = Parts()
    make(problem.order()).step(problem.passes(False, *[True] * 3))
    error = furthest(problem.other_weight, 0.8)  # 1 - lr * 2, unperturbed
    return judged(error, "away from a plain step of a weight that the second pass alone uses")


def gradient_in_one_step(make: Maker) -> Finding:
    problem = Parts()
    stepper = make(problem.order())
    stepper.step(problem.passes(*[True] * 4))
    before = problem.other_weight.detach().clone()
    stepper.step(problem.passes(*[False] * 4))
    moved = furthest(problem.other_weight, before)
    return judged(moved, "is how far a weight moved in a step that does not use it, after one that does", 0.0)


def zero_gradient(make: Maker) -> Finding:
    problem = Parts()

    moved = []

    def passes() -> Tensor:
        moved.append(furthest(problem.used_weight, 1))
        loss = 0 * (problem.used_weight.sum() + problem.other_weight.sum()) + 1
        loss.backward()
        return loss

    make(problem.order()).step(passes)
    moved.append(furthest(problem.used_weight, 1))
    wrong = next((step for step in moved if step != 0), 0.0)  # NaN is not 0 either
    return judged(wrong, "is what the weights become or move by, in the second pass or after it", 0.0)


def tiny_gradient(make: Maker) -> Finding:
    weight = nn.Parameter(torch.zeros(4))
    model = nn.Module()
    model.register_parameter("weight", weight)
    seen: list[Tensor] = []

    def passes() -> Tensor:
        seen.append(weight.detach().clone())
        loss = weight.sum() * 5e-13 + 1  # a gradient of norm 1e-12
        loss.backward()
        return loss

    make(Order(model, [{"params": [weight]}])).step(passes)
    ratio = float(seen[1].norm() / 0.1)
    text = "of rho is the radius where the gradient's norm is 1e-12, in float32"
    return Finding("pass") if abs(ratio - 1) < 1e-3 else Finding("fail", short(ratio), text)


def restored(make: Maker) -> Finding:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    inputs = torch.randn(8, 64)
    before = [p.detach().clone() for p in model.parameters()]

    def passes() -> Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    stepper = make(Order(model, [{"params": list(model.parameters())}], options={"lr": 0.0}))
    for _ in range(10):
        stepper.step(passes)
    changed = sum(int((p != q).sum()) for p, q in zip(model.parameters(), before, strict=True))
    share = changed / sum(p.numel() for p in before)
    finding = judged(share, "of float32 weights are not the same bits after ten steps with learning rate 0", 0.0)
    return finding if finding.verdict == "pass" else Finding("fail", f"{share:.0%}", finding.text)


def in_place(make: Maker) -> Finding:
    problem = Quadratic()
    buffer = problem.flat().detach().clone()
    problem.first_weight.data = buffer[:6].view(2, 3)
    problem.second_weight.data = buffer[6:]
    make(problem.order()).step(problem.passes)
    apart = furthest(problem.flat(), buffer)
    return judged(apart, "is how far a flat buffer and the weights that are views of it are apart", 0.0)


def second_pass_raises(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    start = problem.flat().detach().clone()

    def passes() -> Tensor:
        if not torch.equal(problem.flat(), start):
            raise FloatingPointError
        return problem.passes()

    with suppress(FloatingPointError):
        stepper.call(passes)
    away = float((problem.flat().detach() - start).norm())
    return judged(away, "is how far the weights stay from where they were, rho being 0.1", 1e-12)


def returned_loss(make: Maker) -> Finding:
    problem = Quadratic()
    stepper = make(problem.order())
    expected = float(problem().detach())
    found = stepper.call(problem.passes)
    if found is None:
        return Finding("fail", "None", "is what step(closure) returns")
    away = abs(float(torch.as_tensor(found).detach()) - expected) / expected
    return judged(away, "relative, away from the loss at the unperturbed weights")


def radius_zero(make: Maker) -> Finding:
    problem, plain = Quadratic(dtype=torch.float32), Quadratic(dtype=torch.float32)
    options = {"lr": 0.05, "momentum": 0.9}
    try:
        stepper = make(problem.order(rho=0.0, options=options))
    except (ValueError, AssertionError):
        return Finding("by design", "refused", "as rho must be positive")
    optimizer = torch.optim.SGD(plain.parameters(), **options)
    for _ in range(4):
        stepper.step(problem.passes)
        optimizer.zero_grad()
        plain.passes()
        optimizer.step()
    apart = furthest(problem.flat(), plain.flat())
    return judged(apart, "away from the base optimizer after four steps with rho = 0", 0.0)


def dropout(make: Maker) -> Finding:
    problem = Quadratic()
    masks: list[Tensor] = []

    def passes() -> Tensor:
        masks.append(torch.rand(5))
        return problem.passes()

    make(problem.order()).step(passes)
    if all(torch.equal(masks[0], mask) for mask in masks):
        return Finding("pass")
    return Finding("not offered", "new mask", "in the second pass: it draws other random numbers than the first")


def batch_norm(make: Maker) -> Finding:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    inputs = torch.randn(16, 4, dtype=torch.float64)
    once = copy.deepcopy(model)
    once(inputs)

    def passes() -> Tensor:
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    make(Order(model, [{"params": list(model.parameters())}], rho=0.5)).step(passes)
    away = float((model[1].running_mean - once[1].running_mean).norm() / once[1].running_mean.norm())
    text = "relative, is how far the running mean is from that of one pass: the second pass counts as well"
    finding = judged(away, text, 1e-12)
    return finding if finding.verdict == "pass" else Finding("not offered", finding.number, text)


def resume(make: Maker) -> Finding:
    options = {"lr": 0.05, "momentum": 0.9}
    problem = Quadratic()
    stepper = make(problem.order(options=options))
    for _ in range(3):
        stepper.step(problem.passes)
    saved = io.BytesIO()
    torch.save({"model": problem.state_dict(), "optimizer": stepper.state_dict()}, saved)
    start = problem.flat().detach().clone()
    for _ in range(2):
        stepper.step(problem.passes)
    saved.seek(0)
    again = Quadratic()
    resumed = make(again.order(options=options))
    found = torch.load(saved, weights_only=False)
    again.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    for _ in range(2):
        resumed.step(again.passes)
    error = relative(again.flat().detach(), problem.flat().detach(), start)
    return judged(error, "of the way of two more steps away from a run that was not stopped (SGD with momentum)", 0.0)


CHECKS = (
    Check("step", "One step with SGD is the closed form, over several tensors", one_step),
    Check("groups", "One norm over all parameter groups, each with its own learning rate", groups),
    Check("ASAM", "One step of ASAM is the closed form", adaptive),
    Check("momentum", "Four steps around SGD with momentum and weight decay", momentum),
    Check("AdamW", "Four steps around AdamW", adamw),
    Check("scheduler", "A scheduler on the object that the pages name changes the rate", scheduler),
    Check("accumulation", "Two micro-batches in each pass equal the whole batch", accumulation),
    Check("clip norm", "The final gradient can be clipped by its norm", clipping),
    Check("clip value", "The final gradient alone can be clipped by value", clipping_by_value),
    Check("no gradient", "Unused and frozen weights stay where they are", no_gradient),
    Check("first pass", "A weight that the first pass alone uses is back where it was", gradient_in_first_pass),
    Check("second pass", "A weight that the second pass alone uses takes a plain step", gradient_in_second_pass),
    Check("one step", "A weight with a gradient in one step and none in the next", gradient_in_one_step),
    Check("zero", "A gradient of zeros moves nothing and gives no NaN", zero_gradient),
    Check("tiny", "The radius is rho for a gradient of norm 1e-12", tiny_gradient),
    Check("restore", "After ten steps with learning rate 0 the weights are the same bits", restored),
    Check("in place", "Weights that are views of a flat buffer stay so", in_place),
    Check("raise", "The weights are restored when the closure raises in the second pass", second_pass_raises),
    Check("loss", "step(closure) returns the loss of the unperturbed weights", returned_loss),
    Check("radius 0", "With rho = 0 it is the base optimizer, bit for bit", radius_zero),
    Check("dropout", "Both passes draw the same random numbers", dropout),
    Check("BatchNorm", "Running statistics count the first pass alone", batch_norm),
    Check("resume", "A checkpoint of the object that is stepped resumes bit for bit", resume),
)


def run_check(check: Check, make: Maker) -> Finding:
    """Run a check on one implementation; whatever it raises is an outcome."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return by_design(check.run(make), check.name, make.row)
        except NotOfferedError as error:
            return Finding("not offered", "", str(error))
        except Exception as error:
            return raised(error)


def raised(error: Exception) -> Finding:
    """Say which error an implementation ended with."""
    return Finding("fail", type(error).__name__, f"is raised: {str(error).strip().splitlines()[0][:120]}")


def by_design(finding: Finding, check: str, row: Row) -> Finding:
    """Take an outcome for the documented choice that it is."""
    reason = row.by_design.get(check)
    if reason is None or finding.verdict == "pass":
        return finding
    return Finding("by design", finding.number, f"{finding.text}; {reason}")

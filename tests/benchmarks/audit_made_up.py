"""Made-up implementations of SAM for the audit's own tests: a right one, and the same with one fault."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.audit.implementations import Closure
from benchmarks.audit.rows import Order, Passes, Row, Source

# Each fault, and the checks that it fails; all others pass.
FAULTS: dict[str, set[str]] = {
    "adds 1e-12 to the norm": {"tiny"},
    "restores by subtraction": {"restore"},
    "restores what has a second gradient": {"first pass", "raise"},
    "expects what has a second gradient": {"second pass"},
    "keeps old perturbations": {"one step"},
    "divides by zero": {"zero"},
    "swaps pointers": {"in place"},
    "trusts the closure": {"raise"},
    "returns nothing": {"loss"},
    "returns the perturbed loss": {"loss"},
    "saves no momentum": {"resume"},
    "draws new masks": {"dropout"},
    "counts statistics twice": {"BatchNorm"},
    "has rates of its own": {"scheduler"},
    "takes a norm for each group": {"groups"},
    "scales once by the weights": {"ASAM"},
    "has a least radius": {"radius 0"},
    "clips both gradients": {"clip value"},
    "writes into the base optimizer's state": {"AdamW"},
    "steps before it restores": {"momentum", "AdamW", "restore"},
    "pulls unused weights": {"no gradient", "first pass", "one step", "raise"},
    "averages micro-batches again": {"accumulation"},
    "clips nothing": {"clip norm", "clip value"},
    "doubles the radius": {
        *("step", "groups", "ASAM", "momentum", "AdamW", "scheduler", "accumulation", "clip norm", "clip value", "tiny")
    },
}


class MadeUp:
    """SAM as its paper says, by saved copies, with one fault or none."""

    def __init__(self, order: Order, fault: str) -> None:
        self.fault = fault
        self.order = order
        self.base_optimizer = order.make_base()
        self.rates = [group["lr"] for group in self.base_optimizer.param_groups]
        self.rho = max(order.rho, 1e-3) if fault == "has a least radius" else order.rho
        self.moved: dict[Tensor, Tensor] = {}

    def zero_grad(self) -> None:
        self.base_optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.fault == "saves no momentum" else self.base_optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.base_optimizer.load_state_dict(state)

    def step(self, closure: Callable[[], Tensor], before_descent: Callable[[], None] | None = None) -> Tensor | None:
        model, random_state = self.order.model, torch.get_rng_state()
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            loss = closure()
        if before_descent and self.fault == "clips both gradients":
            before_descent()
        if self.fault != "draws new masks":
            torch.set_rng_state(random_state)
        saved = {p: p.detach().clone() for p in self.order.parameters}
        self.ascend()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        for layer in norms:
            layer.track_running_stats = self.fault == "counts statistics twice"
        try:
            perturbed_loss = closure()
        except FloatingPointError:
            if self.fault != "trusts the closure":
                self.restore(saved)
            raise
        for layer in norms:
            layer.track_running_stats = True
        if self.fault == "expects what has a second gradient":
            _ = [self.moved[p] for p in saved if p.grad is not None]
        if self.fault != "steps before it restores":
            self.restore(saved)
        if before_descent and self.fault != "clips nothing":
            before_descent()
        self.descend()
        if self.fault == "steps before it restores":
            with torch.no_grad():
                for p, moved in self.moved.items():
                    p.sub_(moved)
        return None if self.fault == "returns nothing" else perturbed_loss if "perturbed" in self.fault else loss

    @torch.no_grad()
    def ascend(self) -> None:
        if self.fault != "keeps old perturbations":
            self.moved = {}
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.base_optimizer.param_groups]
        if self.fault != "takes a norm for each group":
            groups = [[p for group in groups for p in group]]
        for group in groups:
            scales = {p: p.abs() + 0.01 if self.order.adaptive else torch.ones_like(p) for p in group}
            norm = torch.stack([(scales[p] * p.grad).norm() for p in group]).norm()
            if self.fault == "adds 1e-12 to the norm":
                norm = norm + 1e-12
            power = 1 if self.fault == "scales once by the weights" else 2
            for p in group:
                step = scales[p] ** power * p.grad * (self.rho / norm) * (2 if "doubles" in self.fault else 1)
                if self.fault != "divides by zero":
                    step = step.nan_to_num(0.0)
                self.moved[p] = step
                p.add_(step)
                if self.fault == "writes into the base optimizer's state":
                    self.base_optimizer.state[p]["perturbation"] = step

    @torch.no_grad()
    def restore(self, saved: dict[Tensor, Tensor]) -> None:
        for p, weights in saved.items():
            if self.fault == "restores what has a second gradient" and p.grad is None:
                continue
            if self.fault == "keeps old perturbations":
                if p in self.moved:
                    p.copy_(weights if p.grad is not None else p - self.moved[p])
            elif self.fault == "restores by subtraction" and p in self.moved:
                p.sub_(self.moved[p])
            elif self.fault == "swaps pointers":
                p.data = weights
            else:
                p.copy_(weights)
            if self.fault == "pulls unused weights" and p.grad is None:
                p.mul_(0.99)

    def descend(self) -> None:
        if self.fault == "has rates of its own":
            for group, rate in zip(self.base_optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
        self.base_optimizer.step()


class MadeUpStepper(Closure):
    """Clears no gradient where micro-batches are to add up; one fault is a closure that divides them again."""

    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        optimizer: MadeUp = self.optimizer
        calls: list[Tensor] = []

        def hook(gradient: Tensor) -> None:
            calls.append(gradient)

        def closure() -> Tensor:
            calls.clear()
            optimizer.zero_grad()
            first = optimizer.order.parameters[0]
            handle = first.register_hook(hook)
            loss = passes()
            handle.remove()
            if optimizer.fault == "averages micro-batches again" and len(calls) > 1:
                for p in optimizer.order.parameters:
                    p.grad /= len(calls)
            return loss

        optimizer.step(closure, before_descent)


def make(_: ModuleType, order: Order, *, fault: str = "") -> MadeUpStepper:
    optimizer = MadeUp(order, fault)
    return MadeUpStepper(optimizer, scheduled=optimizer.base_optimizer)


def row(fault: str = "") -> Row:
    """A row of the audit: the right implementation, or the one with a fault."""
    return Row(fault or "right", Source("torch"), partial(make, fault=fault), eta=0.01)

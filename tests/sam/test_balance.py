"""nBAR and oBAR: the factors rescaled before the update, in the closure's optimizer and in a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.kinds import make_kind
from flatpatch.sam import SAM, LoraPair, SAMTrainingStep
from tests import sam_training
from tests.sam_training import assert_same


class Layers(nn.Module):
    """Two layers of factors with a head; the second pair's B is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        shapes = {"A": (2, 5), "B": (6, 2), "A2": (2, 6), "B2": (3, 2), "head": (3,)}
        self.weights = nn.ParameterDict({k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()})
        self.weights["B2"].requires_grad_(False)
        self.data = torch.randn(4, 8, 5, dtype=torch.float64)

    def loss(self, step):
        w = self.weights
        hidden = torch.tanh(self.data[step] @ (w["B"] @ w["A"]).T)
        return (hidden @ (w["B2"] @ w["A2"]).T + w["head"]).square().mean()

    def trained(self):
        return [weight for weight in self.weights.values() if weight.requires_grad]


def trained_by_sam(kind, strength, *, momentum=0.9, steps=4):
    model = Layers()
    w = model.weights
    pairs = [LoraPair(w["A"], w["B"]), LoraPair(w["A2"], w["B2"])]
    base = torch.optim.SGD(model.trained(), lr=0.1, momentum=momentum)
    sam = SAM(base, rho=strength, kind=make_kind({"kind": kind}), pairs=pairs)
    calls = 0
    for step in range(steps):
        sam.progress = step / steps

        def closure(step=step):
            nonlocal calls
            calls += 1
            sam.zero_grad()
            loss = model.loss(step)
            loss.backward()
            return loss

        sam.step(closure)
    assert calls == steps, "one pass a step"
    assert sam.last_step is None
    return w


def trained_by_formula(kind, strength, steps=4):
    """A few lines from the papers' formulas: SGD with momentum 0.9."""
    model, rate, momenta = Layers(), 0.1, {}
    w = model.weights
    for step in range(steps):
        names = [name for name, weight in w.items() if weight.requires_grad]
        g = dict(zip(names, torch.autograd.grad(model.loss(step), [w[name] for name in names]), strict=True))
        alpha = strength * (1 - step / steps)
        with torch.no_grad():
            A_grows = g["A"].norm() >= g["B"].norm() if kind == "nbar" else w["A"].norm() < w["B"].norm()
            up, down = 1 + alpha * rate, 1 - alpha * rate
            w["A"] *= up if A_grows else down
            w["B"] *= down if A_grows else up
            for name in names:
                momenta[name] = 0.9 * momenta.get(name, 0) + g[name]
                w[name] -= rate * momenta[name]
    return w


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_training_equals_the_formula_and_strength_zero_the_plain_one_bit_for_bit(kind):
    found, expected = trained_by_sam(kind, 0.7), trained_by_formula(kind, 0.7)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    plain, none = trained_by_formula(kind, 0.0), trained_by_sam(kind, 0.0)
    assert (found["A"] - plain["A"]).norm() > 1e-3
    model = Layers()
    sgd = torch.optim.SGD(model.trained(), lr=0.1, momentum=0.9)
    for step in range(4):
        sgd.zero_grad()
        model.loss(step).backward()
        sgd.step()
    assert all(torch.equal(none[name], model.weights[name]) for name in none)


def test_kinds_differ_and_pull_the_norms_together():
    """oBAR alone, with no gradient step to speak of: the difference of the squared norms shrinks."""
    pair = [torch.randn(2, 5), 5 * torch.randn(6, 2)]
    before = abs(pair[0].norm() ** 2 - pair[1].norm() ** 2)
    A, B = (nn.Parameter(factor) for factor in pair)
    sam = SAM(torch.optim.SGD([A, B], lr=1e-3), rho=100.0, kind=make_kind({"kind": "obar"}), pairs=[LoraPair(A, B)])

    def closure():
        loss = 1e-9 * (B @ A).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        sam.step(closure)
    assert abs(A.norm() ** 2 - B.norm() ** 2) < 0.7 * before
    assert not torch.equal(trained_by_sam("nbar", 0.7)["A"], trained_by_sam("obar", 0.7)["A"])


def test_gradient_that_is_not_finite_rescales_nothing():
    A, B = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1))
    sam = SAM(torch.optim.SGD([A, B], lr=0.0), rho=1.0, kind=make_kind({"kind": "nbar"}), pairs=[LoraPair(A, B)])

    def closure():
        loss = (B @ A).sum() * float("inf")
        loss.backward()
        return loss

    sam.gradients(closure)
    sam.base_optimizer.param_groups[0]["lr"] = 0.5
    A.grad, B.grad = torch.full_like(A, float("nan")), torch.zeros_like(B)
    next(iter(sam.base_optimizer._optimizer_step_pre_hooks.values()))(sam.base_optimizer, (), {})
    assert torch.equal(A, torch.ones(1, 2))
    assert torch.equal(B, torch.ones(2, 1))


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_nothing_to_balance_is_refused(kind):
    A, B = nn.Parameter(torch.ones(1, 2), requires_grad=False), nn.Parameter(torch.ones(2, 1))
    sam = SAM(torch.optim.SGD([B], lr=0.1), kind=make_kind({"kind": kind}), pairs=[LoraPair(A, B)])

    def closure():
        loss = (B @ A).sum()
        loss.backward()
        return loss

    with pytest.raises(UserError, match="here no pair has both trained and in the scope"):
        sam.step(closure)


@pytest.mark.parametrize("gas", [1, 4])
def test_trainer_with_strength_zero_equals_the_plain_one_bit_for_bit_with_dropout(tmp_path, gas):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0, "kind": "nbar"}), plain)


def test_trainer_balances_once_an_update_however_many_micro_batches(tmp_path, monkeypatch):
    from flatpatch.sam import balance

    calls = []
    plain = balance.balance
    monkeypatch.setattr(balance, "balance", lambda *a, **k: calls.append(k["by"]) or plain(*a, **k))
    trainer = sam_training.make_trainer(tmp_path, gas=4, steps=3)
    step = SAMTrainingStep(trainer, rho=1.0, kind=make_kind({"kind": "nbar"}))
    trainer.training_step = step
    trainer.train()
    assert calls == ["gradient"] * 3
    assert step.perturbed_loss is None


def test_optimizer_of_copies_is_refused():
    A, B = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 1))
    copies = [nn.Parameter(torch.cat([A.detach().flatten(), B.detach().flatten()]))]
    sam = SAM(
        torch.optim.SGD(copies, lr=0.1), kind=make_kind({"kind": "nbar"}), parameters=[A, B], pairs=[LoraPair(A, B)]
    )

    def closure():
        loss = (B @ A).sum()
        loss.backward()
        return loss

    with pytest.raises(UserError, match="this optimizer updates copies of them"):
        sam.step(closure)

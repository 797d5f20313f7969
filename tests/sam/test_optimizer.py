"""The SAM optimizer: closed forms, the promises of its checkpoints and restores, and another library's SAM."""

from __future__ import annotations

import copy
import doctest
import math
import random

import numpy
import pytest
import torch
from torch import nn

import flatpatch.sam.optimizer
from flatpatch.errors import UserError
from flatpatch.sam import SAM


def quadratic(H, start):
    """A weight, and a closure factory for 1/2 w'Hw, whose gradient is Hw."""
    weight = nn.Parameter(start.clone())

    def closure_for(optimizer):
        def closure():
            optimizer.zero_grad()
            loss = weight @ H @ weight / 2
            loss.backward()
            return loss

        return closure

    return weight, closure_for


def positive_definite(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + torch.eye(size, dtype=torch.float64)


class Network(nn.Module):
    """Two layers with dropout; ``unused`` takes part in no loss."""

    def __init__(self, dropout=0.3, dtype=torch.float64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, inputs):
        return self.body(inputs)


def batch(size=6, dtype=torch.float64):
    return torch.randn(size, 5, dtype=dtype), torch.randint(3, (size,))


def closure_of(model, optimizer, inputs, targets):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return closure


def test_step_matches_closed_form_on_a_quadratic():
    """w - lr H (w + rho H w / |H w|), for g = H w and the SAM gradient H (w + e)."""
    H, start = positive_definite(6), torch.randn(6, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    sam.step(closure_for(sam))
    g = H @ start
    torch.testing.assert_close(weight.detach(), start - 0.03 * H @ (start + 0.4 * g / g.norm()), rtol=1e-12, atol=1e-12)


def test_adaptive_step_matches_closed_form_on_a_quadratic():
    """w - lr H (w + rho T^2 g / |T g|), with g = H w and T = diag(|w| + eta)."""
    H, start = positive_definite(6), torch.randn(6, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4, adaptive=True, eta=0.2)
    sam.step(closure_for(sam))
    g, T = H @ start, torch.diag(start.abs() + 0.2)
    e = 0.4 * T @ T @ g / (T @ g).norm()
    torch.testing.assert_close(weight.detach(), start - 0.03 * H @ (start + e), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_norm_runs_over_all_parameter_groups_together(adaptive):
    H, start = positive_definite(6), torch.randn(6, dtype=torch.float64)
    joined, joined_closure = quadratic(H, start)
    one = SAM(torch.optim.SGD([joined], lr=0.03), rho=0.4, adaptive=adaptive)
    one.step(joined_closure(one))
    parts = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
    two = SAM(torch.optim.SGD([{"params": parts[:1]}, {"params": parts[1:]}], lr=0.03), rho=0.4, adaptive=adaptive)

    def closure():
        two.zero_grad()
        weight = torch.cat(parts)
        loss = weight @ H @ weight / 2
        loss.backward()
        return loss

    two.step(closure)
    torch.testing.assert_close(torch.cat(parts).detach(), joined.detach(), rtol=1e-12, atol=1e-12)


def test_step_returns_unperturbed_loss():
    H, start = positive_definite(4), torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    loss = sam.step(closure_for(sam))
    assert loss.item() == pytest.approx((start @ H @ start / 2).item(), rel=1e-12)
    assert not loss.requires_grad
    # Ascending g by rho raises 1/2 w'Hw by rho |g| + rho^2 g'Hg / (2 |g|^2).
    g = H @ start
    rise = 0.4 * g.norm() + 0.08 * g @ H @ g / g.square().sum()
    assert (sam.perturbed_loss - loss).item() == pytest.approx(rise.item(), rel=1e-10)


@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_equals_base_optimizer_bit_for_bit_with_dropout(adaptive):
    model = Network(dtype=torch.float32)
    twin = copy.deepcopy(model)
    base = torch.optim.AdamW(twin.parameters(), lr=0.05)
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.0, adaptive=adaptive)
    batches = [batch(dtype=torch.float32) for _ in range(5)]
    states = []
    for optimizer, trained in ((base, twin), (sam, model)):
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        losses = [optimizer.step(closure_of(trained, optimizer, *each)).item() for each in batches]
        states.append((losses, torch.get_rng_state(), random.random(), numpy.random.rand()))
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2:] == states[1][2:]
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters(), strict=True))
    for ours, theirs in zip(sam.state.values(), base.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_both_passes_draw_the_same_random_numbers():
    model = Network()
    drawn = []

    def closure():
        drawn.append((torch.rand(3).tolist(), random.random(), numpy.random.rand()))
        return closure_of(model, sam, *batch())()

    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    sam.step(closure)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_weights_are_restored_when_a_closure_raises(failing_pass):
    H, start = positive_definite(4), torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == failing_pass:
            raise RuntimeError("out of memory")
        return closure_for(sam)()

    with pytest.raises(RuntimeError, match="out of memory"):
        sam.step(closure)
    assert len(calls) == failing_pass
    assert torch.equal(weight.detach(), start)


def test_weights_are_restored_when_the_second_closure_raises():
    test_weights_are_restored_when_a_closure_raises(2)


def test_weights_without_a_second_gradient_are_restored():
    weights = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    sam = SAM(torch.optim.SGD(weights, lr=0.0), rho=0.4)
    passes = []

    def closure():
        passes.append(1)
        sam.zero_grad()
        loss = weights[0].square() + (weights[1].square() if len(passes) == 1 else 0)
        loss.sum().backward()
        return loss

    sam.step(closure)
    assert [weight.item() for weight in weights] == [1.0, 1.0]
    assert weights[1].grad is None


def test_unused_parameters_are_left_to_the_base_optimizer():
    model = Network()
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.1), rho=0.1)
    sam.step(closure_of(model, sam, *batch()))
    assert model.unused.tolist() == [1.0, 1.0]


def test_checkpoint_resumes_bitwise():
    batches = [batch() for _ in range(6)]

    def trained(model, optimizer, steps):
        for each in steps:
            optimizer.step(closure_of(model, optimizer, *each))
            optimizer.scheduler.step()
        return model

    def fresh(seed):
        torch.manual_seed(seed)
        model = Network()
        sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.2)
        sam.scheduler = torch.optim.lr_scheduler.ExponentialLR(sam, 0.9)
        return model, sam

    model, sam = fresh(0)
    torch.manual_seed(7)
    trained(model, sam, batches[:3])
    checkpoint = copy.deepcopy(
        (model.state_dict(), sam.state_dict(), sam.scheduler.state_dict(), torch.get_rng_state())
    )
    whole = trained(model, sam, batches[3:])

    resumed, other = fresh(99)
    resumed.load_state_dict(checkpoint[0])
    other.load_state_dict(checkpoint[1])
    other.scheduler.load_state_dict(checkpoint[2])
    torch.set_rng_state(checkpoint[3])
    trained(resumed, other, batches[3:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_checkpoint_is_that_of_the_base_optimizer():
    model = Network()
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.2)
    sam.step(closure_of(model, sam, *batch()))
    checkpoint = sam.state_dict()
    assert checkpoint.keys() == {"state", "param_groups"}
    assert all(entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for entry in checkpoint["state"].values())
    torch.optim.AdamW(model.parameters(), lr=1.0).load_state_dict(checkpoint)


def test_groups_and_state_follow_the_base_optimizer_through_loading():
    # A wrapper that kept references would go on showing (and scheduling) the groups from before.
    model = Network()
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.2)
    sam.load_state_dict(sam.state_dict())
    assert sam.param_groups is sam.base_optimizer.param_groups
    assert sam.state is sam.base_optimizer.state


def test_schedulers_change_the_rate_that_the_base_optimizer_uses():
    H, start = torch.eye(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.5), rho=0.0)
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(sam, lambda epoch: 0.0)
    sam.step(closure_for(sam))
    scheduler.step()
    sam.step(closure_for(sam))
    assert weight.item() == 0.5
    assert scheduler.get_last_lr() == [0.0]


def test_added_groups_are_perturbed_and_trained():
    weights = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    sam = SAM(torch.optim.SGD(weights[:1], lr=0.1), rho=math.sqrt(2))
    sam.add_param_group({"params": weights[1:]})

    def closure():
        sam.zero_grad()
        loss = (weights[0] * weights[1]).sum()
        loss.backward()
        return loss

    sam.step(closure)  # g = (1, 1), e = (1, 1), SAM gradient (2, 2)
    assert [weight.item() for weight in weights] == pytest.approx([0.8, 0.8])


def test_only_the_given_parameters_are_perturbed():
    weights = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    sam = SAM(torch.optim.SGD(weights, lr=0.1), rho=1.0, parameters=weights[1:])

    def closure():
        sam.zero_grad()
        loss = (weights[0] * weights[1]).sum()
        loss.backward()
        return loss

    sam.step(closure)  # e = (0, 1), so the gradient is (2, 1)
    assert [weight.item() for weight in weights] == pytest.approx([0.8, 0.9])


def test_clipping_sees_only_the_final_gradient():
    H, start = positive_definite(4) * 10, torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=1.0), rho=0.4)
    sam.gradients(closure_for(sam))
    g = H @ start
    sam_gradient = H @ (start + 0.4 * g / g.norm())
    torch.testing.assert_close(weight.grad, sam_gradient, rtol=1e-12, atol=0)
    torch.nn.utils.clip_grad_norm_([weight], 0.5)
    sam.base_optimizer.step()
    expected = start - 0.5 * sam_gradient / sam_gradient.norm()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_gradient_accumulation_in_the_closure_equals_the_full_batch():
    model = Network(dropout=0.0)
    twin = copy.deepcopy(model)
    inputs, targets = batch(8)
    whole = SAM(torch.optim.SGD(twin.parameters(), lr=0.5), rho=0.3)
    whole.step(closure_of(twin, whole, inputs, targets))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3)

    def closure():
        sam.zero_grad()
        losses = []
        for part in range(4):
            chosen = slice(2 * part, 2 * part + 2)
            loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]) / 4
            loss.backward()
            losses.append(loss.detach())
        return sum(losses)

    sam.step(closure)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_grad_scaler_changes_nothing_but_the_scale_of_the_passes():
    model = Network(dropout=0.0)
    twin = copy.deepcopy(model)
    inputs, targets = batch()
    plain = SAM(torch.optim.SGD(twin.parameters(), lr=0.5), rho=0.3)
    plain.step(closure_of(twin, plain, inputs, targets))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def closure():
        sam.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward()
        return loss

    sam.gradients(closure)
    scaler.unscale_(sam.base_optimizer)
    scaler.step(sam.base_optimizer)
    scaler.update()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_recipe_clips_the_unscaled_gradient_and_steps_as_without_a_scaler(fused):
    model = Network(dropout=0.0, dtype=torch.float32)
    twin = copy.deepcopy(model)
    inputs, targets = batch(dtype=torch.float32)
    plain = SAM(torch.optim.SGD(twin.parameters(), lr=0.5, fused=fused), rho=0.3)
    plain.gradients(closure_of(twin, plain, inputs, targets))
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    plain.base_optimizer.step()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.5, fused=fused), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    sam.gradients(scaled_closure(model, sam, scaler, inputs, targets))
    scaler.unscale_(sam.base_optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(sam.base_optimizer)
    scaler.update()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def scaled_closure(model, sam, scaler, inputs, targets, explode=()):
    """Its passes whose numbers are in ``explode`` have infinite gradients."""
    passes = []

    def closure():
        passes.append(1)
        sam.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss * (math.inf if len(passes) in explode else 1.0)).backward()
        return loss

    return closure


@pytest.mark.parametrize("explode", [(1,), (2,), (1, 2)])
def test_grad_scaler_recipe_leaves_out_a_step_whose_gradient_is_not_finite(explode):
    model = Network(dropout=0.0)
    before = copy.deepcopy(list(model.parameters()))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    data = batch()
    sam.gradients(scaled_closure(model, sam, scaler, *data, explode=explode))
    scaler.step(sam.base_optimizer)
    scaler.update()
    moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    # An infinite ascent gradient alone gives a plain step along the second pass's, which is finite.
    assert moved == (2 not in explode)
    assert bool(sam.last_step.finite) == (1 not in explode)
    assert scaler.get_scale() == (2.0 if 2 in explode else 4.0)
    sam.gradients(scaled_closure(model, sam, scaler, *data))
    scaler.step(sam.base_optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("base", [torch.optim.SGD, lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True)])
@pytest.mark.parametrize("misuse", ["step", "unscale_"])
def test_grad_scaler_on_sam_itself_is_refused_with_the_recipe(base, misuse):
    model = Network(dropout=0.0)
    before = copy.deepcopy(list(model.parameters()))
    sam = SAM(base(model.parameters(), lr=0.5), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    closure = scaled_closure(model, sam, scaler, *batch())
    sam.gradients(closure)
    with pytest.raises(UserError, match=r"scaler.step\(sam.base_optimizer\); scaler.update\(\)"):
        scaler.step(sam, closure) if misuse == "step" else scaler.unscale_(sam)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_disabled_grad_scaler_steps_sam_itself():
    model = Network(dropout=0.0)
    twin = copy.deepcopy(model)
    data = batch()
    plain = SAM(torch.optim.SGD(twin.parameters(), lr=0.5), rho=0.3)
    plain.step(closure_of(twin, plain, *data))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(sam, scaled_closure(model, sam, scaler, *data))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("clears", ["before the step", "never"])
def test_closure_that_does_not_clear_gradients_makes_the_same_steps(clears):
    H, start = positive_definite(5), torch.randn(5, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    expected = start

    def closure():
        loss = weight @ H @ weight / 2
        loss.backward()
        return loss

    for _ in range(3):
        if clears == "before the step":
            sam.zero_grad()
        sam.step(closure)
        g = H @ expected
        expected = expected - 0.03 * H @ (expected + 0.4 * g / g.norm())
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradients_from_before_the_step_are_dropped_with_a_warning():
    H, start = positive_definite(5), torch.randn(5, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    (weight @ H @ weight).backward()
    with pytest.warns(UserWarning, match="let the closure run all the micro-batches"):
        sam.step(closure_for(sam))
    g = H @ start
    torch.testing.assert_close(weight.detach(), start - 0.03 * H @ (start + 0.4 * g / g.norm()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_closure_without_a_backward_pass_is_refused_although_gradients_are_left(set_to_none):
    H, start = positive_definite(5), torch.randn(5, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    sam.step(closure_for(sam))
    after = weight.detach().clone()

    def closure():
        if set_to_none:
            sam.zero_grad()
        return weight @ H @ weight / 2

    with pytest.raises(ValueError, match="left no gradient on any of the 1 perturbed"):
        sam.step(closure)
    assert torch.equal(weight, after)


def test_second_pass_without_a_backward_pass_is_refused():
    H, start = positive_definite(5), torch.randn(5, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)
    passes = []

    def closure():
        passes.append(1)
        return closure_for(sam)() if len(passes) == 1 else torch.zeros(())

    with pytest.raises(ValueError, match="left no gradient"):
        sam.step(closure)
    assert torch.equal(weight, start)


def test_closure_that_keeps_zeros_keeps_them_as_with_the_base_optimizer():
    """A weight whose gradient is a kept zero still decays; one without a gradient does not."""

    def trained(make):
        weights = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
        optimizer = make(torch.optim.SGD(weights, lr=0.1, weight_decay=0.5))
        for step in range(2):

            def closure(used=2 - step):
                optimizer.zero_grad(set_to_none=False)
                loss = sum(weight.square().sum() for weight in weights[:used])
                loss.backward()
                return loss

            optimizer.step(closure)
        return [weight.item() for weight in weights]

    assert trained(lambda base: SAM(base, rho=0.0)) == trained(lambda base: base)


@pytest.mark.parametrize("returned", [None, 1.5, math.nan])
def test_whatever_the_closure_returns_is_returned(returned):
    H, start = positive_definite(4), torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4)

    def closure():
        closure_for(sam)()
        return returned

    loss = sam.step(closure)
    assert loss is returned
    g = H @ start
    torch.testing.assert_close(weight.detach(), start - 0.03 * H @ (start + 0.4 * g / g.norm()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_own_rho_scales_its_part_of_one_perturbation(adaptive):
    """Group k moves by rho_k T^2 g_k / |T g|, with the norm over both groups."""
    H, start = positive_definite(6), torch.randn(6, dtype=torch.float64)
    parts = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
    groups = [{"params": parts[:1], "rho": 0.7}, {"params": parts[1:]}]
    sam = SAM(torch.optim.SGD(groups, lr=0.03), rho=0.4, adaptive=adaptive, eta=0.05)

    def closure():
        sam.zero_grad()
        weight = torch.cat(parts)
        loss = weight @ H @ weight / 2
        loss.backward()
        return loss

    sam.step(closure)
    T = start.abs() + 0.05 if adaptive else torch.ones(6, dtype=torch.float64)
    g, rho = H @ start, torch.tensor([0.7] * 2 + [0.4] * 4, dtype=torch.float64)
    e = rho * T * T * g / (T * g).norm()
    torch.testing.assert_close(torch.cat(parts).detach(), start - 0.03 * H @ (start + e), rtol=1e-12, atol=1e-12)
    assert sam.last_step.perturbation_norm.item() == pytest.approx(e.norm().item(), rel=1e-12)


def test_groups_own_rho_survives_a_checkpoint_and_is_checked():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    sam = SAM(torch.optim.AdamW([{"params": weights[:1], "rho": 0.7}, {"params": weights[1:2]}], lr=0.1))
    checkpoint = copy.deepcopy(sam.state_dict())
    other = SAM(torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:2]}], lr=0.1))
    other.load_state_dict(checkpoint)
    assert other.param_groups[0]["rho"] == 0.7
    assert "rho" not in other.param_groups[1]
    with pytest.raises(ValueError, match="rho must be finite"):
        SAM(torch.optim.SGD([{"params": weights, "rho": -1.0}], lr=0.1))
    with pytest.raises(ValueError, match="rho must be finite"):
        sam.add_param_group({"params": weights[2:], "rho": math.nan})
    assert len(sam.param_groups) == 2


def test_base_optimizers_own_option_named_rho_is_not_taken_for_a_radius():
    H, start = positive_definite(4), torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(torch.optim.Adadelta([weight], lr=0.03, rho=0.9), rho=0.4)
    sam.step(closure_for(sam))
    assert sam.last_step.perturbation_norm.item() == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("option", [{"adaptive": True}, {"eta": 0.1}])
def test_option_of_a_whole_step_in_a_group_is_refused(option):
    with pytest.raises(UserError, match=f"parameter group 0 has {next(iter(option))} of its own"):
        SAM(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **option}], lr=0.1))


def test_optimizer_that_already_has_a_scheduler_is_wrapped():
    H, start = positive_definite(4), torch.randn(4, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    base = torch.optim.SGD([weight], lr=0.03)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    sam = SAM(base, rho=0.4)
    sam.step(closure_for(sam))
    scheduler.step()
    assert sam.param_groups[0]["lr"] == 0.015


@pytest.mark.parametrize("base", [torch.optim.LBFGS, lambda p: SAM(torch.optim.SGD(p, lr=0.1))])
def test_base_optimizer_that_needs_a_closure_is_refused_when_made(base):
    with pytest.raises(UserError, match="step needs a closure"):
        SAM(base([nn.Parameter(torch.ones(1))]))


def test_differentiable_base_optimizer_is_refused_when_made():
    with pytest.raises(UserError, match="differentiable=False"):
        SAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, differentiable=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
    ],
)
def test_step_equals_the_base_optimizers_along_the_sam_gradient(kind, options):
    H, start = positive_definite(5), torch.randn(5, dtype=torch.float64)
    weight, closure_for = quadratic(H, start)
    sam = SAM(kind([weight], lr=0.05, **options), rho=0.4)
    twin = nn.Parameter(start.clone())
    base = kind([twin], lr=0.05, **options)
    for _ in range(3):
        sam.step(closure_for(sam))
        g = H @ twin.detach()
        twin.grad = H @ (twin.detach() + 0.4 * g / g.norm())
        base.step()
    torch.testing.assert_close(weight, twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("on", ["sam", "base"])
def test_every_kind_of_scheduler_schedules_the_base_optimizer(on):
    schedulers = torch.optim.lr_scheduler
    for make in (
        lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=4),
        lambda o: schedulers.CosineAnnealingLR(o, T_max=3),
        lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o), schedulers.LinearLR(o)], milestones=[1]),
    ):
        rates = []
        for wrapped in (True, False):
            weight, closure_for = quadratic(torch.eye(2).double(), torch.ones(2).double())
            base = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
            optimizer = SAM(base, rho=0.1) if wrapped else base
            scheduler = make(optimizer if on == "sam" else base)
            rates.append([])
            for _ in range(3):
                optimizer.step(closure_for(optimizer))
                scheduler.step()
                rates[-1].append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        assert rates[0] == rates[1]


def test_plateau_scheduler_takes_sam():
    weight, closure_for = quadratic(torch.eye(2).double(), torch.ones(2).double())
    sam = SAM(torch.optim.SGD([weight], lr=0.5), rho=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sam, patience=0, factor=0.5)
    for _ in range(2):
        sam.step(closure_for(sam))
        scheduler.step(1.0)
    assert sam.base_optimizer.param_groups[0]["lr"] == 0.25


def test_compiled_model_steps_as_the_plain_one():
    model = Network(dropout=0.0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    data = batch()
    plain = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3)
    plain.step(closure_of(model, plain, *data))
    sam = SAM(torch.optim.SGD(twin.parameters(), lr=0.5), rho=0.3, model=compiled)
    sam.step(closure_of(compiled, sam, *data))
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_leave_the_sam_gradient_of_dense_ones(base):
    tokens = torch.tensor([1, 3, 3, 4])
    steps = {}
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(6, 3, sparse=sparse).double(), nn.Linear(3, 1).double()
        makes = base if sparse else torch.optim.SGD
        sam = SAM(makes(embedding.parameters(), lr=0.1), rho=0.5, parameters=[*embedding.parameters(), head.weight])

        def closure(sam=sam, embedding=embedding, head=head):
            sam.zero_grad()
            loss = head(embedding(tokens)).pow(3).sum()
            loss.backward()
            return loss

        sam.step(closure)
        assert embedding.weight.grad.is_sparse == sparse
        gradient = embedding.weight.grad
        steps[sparse] = gradient.to_dense() if sparse else gradient, sam.perturbed_loss
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("diagnostics", [False, True])
def test_complex_parameters_step_matches_closed_form(adaptive, diagnostics):
    """L = sum h |z - t|^2 / 2 has torch's gradient h (z - t); T is |z| + eta with the modulus."""
    z, t = torch.randn(5, dtype=torch.complex128), torch.randn(5, dtype=torch.complex128)
    h = torch.rand(5, dtype=torch.float64) + 0.5
    weight = nn.Parameter(z.clone())
    sam = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.4, adaptive=adaptive, eta=0.1, diagnostics=diagnostics)

    def closure():
        sam.zero_grad()
        loss = (h * (weight - t).abs().square()).sum() / 2
        loss.backward()
        return loss

    sam.step(closure)
    T = z.abs() + 0.1 if adaptive else torch.ones(5, dtype=torch.float64)
    g = h * (z - t)
    e = 0.4 * T * T * g / (T * g).norm()
    torch.testing.assert_close(weight.detach(), z - 0.1 * h * (z + e - t), rtol=1e-12, atol=1e-12)
    assert sam.last_step.grad_norm.item() == pytest.approx(g.norm().item(), rel=1e-12)
    if diagnostics:
        assert sam.last_step.perturbation_norm.item() == pytest.approx(e.norm().item(), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_statistics_come_from_the_unperturbed_pass_alone(momentum):
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=momentum)).double()
    inputs, _ = batch()
    twin = copy.deepcopy(model)
    twin(inputs)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)

    def closure():
        sam.zero_grad()
        loss = model(inputs).pow(3).sum()
        loss.backward()
        return loss

    loss = sam.step(closure)
    assert sam.perturbed_loss > loss
    for ours, theirs in zip(model[1].buffers(), twin[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert model[1].track_running_stats


def test_first_pass_without_any_gradient_is_refused():
    weight = nn.Parameter(torch.ones(1))
    sam = SAM(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match="left no gradient on any of the 1 perturbed parameters"):
        sam.step(lambda: torch.zeros(()))


def test_step_without_a_closure_is_refused():
    sam = SAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="needs a closure"):
        sam.step()


def test_optimizer_class_instead_of_an_instance_is_refused():
    with pytest.raises(TypeError, match="must be an optimizer instance"):
        SAM(torch.optim.SGD)


@pytest.mark.parametrize("setting", [{"rho": -1.0}, {"eta": math.inf}, {"sync": "all"}])
def test_settings_out_of_range_are_refused_when_made(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SAM(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), **setting)


def test_copies_and_hooks_work_as_on_any_optimizer():
    model = Network()
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.2)
    seen = []
    sam.register_step_post_hook(lambda *_: seen.append("stepped"))
    sam.step(closure_of(model, sam, *batch()))
    assert seen == ["stepped"]
    twin = copy.deepcopy(sam)
    assert twin.rho == 0.2
    assert twin.base_optimizer is not sam.base_optimizer
    assert "SAM(rho=0.2) around AdamW" in repr(sam)


@pytest.mark.oracle
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_update_equals_that_of_pytorch_optimizer(base):
    # Its norm is a float32, so agreement ends near 6e-8; its ASAM is ours with eta = 0.
    library = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    for adaptive in (False, True):
        model = Network(dropout=0.0)
        twin = copy.deepcopy(model)
        del model.unused, twin.unused
        ours = SAM(base(model.parameters(), lr=0.05), rho=0.3, adaptive=adaptive, eta=0.0)
        theirs = library.SAM(twin.parameters(), base, rho=0.3, adaptive=adaptive, lr=0.05)
        for _ in range(4):
            each = batch()
            ours.step(closure_of(model, ours, *each))
            closure = closure_of(twin, theirs, *each)
            closure()
            theirs.step(closure)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.gpu
def test_dropout_masks_agree_on_a_gpu():
    model, masks = Network().cuda(), []
    model.body[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    inputs, targets = (tensor.cuda() for tensor in batch(64))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1e-6)
    sam.step(closure_of(model, sam, inputs, targets))
    assert torch.equal(masks[0], masks[1])
    sam.step(closure_of(model, sam, inputs, targets))
    assert not torch.equal(masks[0], masks[2])


def test_example_of_the_docstring_runs():
    results = doctest.testmod(flatpatch.sam.optimizer)
    assert results.attempted > 0
    assert results.failed == 0


def test_call_with_parameters_and_a_class_says_how_to_write_it_here() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"Write: SAM\(torch.optim.SGD\(parameters, lr=...\), rho=0.05\)"):
        SAM([weight], torch.optim.SGD, lr=0.1, rho=0.05)


@pytest.mark.parametrize(("knows", "passes"), [(True, 1), (False, 2)])
def test_batch_norm_counts_the_unperturbed_pass_alone_where_the_model_is_known(knows: bool, passes: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model if knows else None)
    inputs = torch.randn(5, 3)

    def closure() -> torch.Tensor:
        sam.zero_grad()
        loss: torch.Tensor = model(inputs).square().sum()
        loss.backward()
        return loss

    sam.step(closure)
    assert int(model[1].num_batches_tracked) == passes

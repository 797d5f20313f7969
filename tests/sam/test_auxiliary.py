"""Bi-LoRA: auxiliary pairs that climb in the one pass, by the formula, in a Trainer and on two ranks' gradients."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.families.vision.passes import LoopPasses
from flatpatch.families.vision.reference.vit import LoRALinear
from flatpatch.kinds import make_kind, mixed_seed
from flatpatch.sam import SAM, RandomState, SAMTrainingStep, lora_pairs
from flatpatch.sam.auxiliary import added, climbed, heard, new_pairs, norm
from flatpatch.sam.frozen import FrozenWeight, frozen_weights
from tests import sam_training
from tests.sam.test_pairs import Peft, PerTask
from tests.sam_training import assert_same, tiny_t5

STEPS, RATE, ASCENT, RANK, RHO = 7, 0.05, 1.0, 3, 0.4


def drawn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """Two layers with factors on fixed data, a batch for each step."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.one = LoRALinear(drawn(generator, 4, 5), None, rank=2).double()
        self.two = LoRALinear(drawn(generator, 3, 4), None, rank=2).double()
        self.requires_grad_(False)
        for layer in (self.one, self.two):
            for factor in "AB":
                weight = layer.factor(factor).requires_grad_(True)
                weight.data.copy_(0.5 * drawn(generator, *weight.shape))
        self.data = drawn(generator, STEPS, 8, 5)

    def loss(self, step):
        return torch.tanh(self.two(torch.tanh(self.one(self.data[step])))).pow(2).sum(1).mean()

    def factors(self):
        return [layer.factor(which) for layer in (self.one, self.two) for which in "AB"]


def sam_around(net, *, rho=RHO, rate=ASCENT, momentum=0.9, seed=9):
    kind = make_kind({"kind": "bilora", "options": {"bilora_rank": RANK, "bilora_lr": rate}}, seed=seed)
    base = torch.optim.SGD(net.factors(), lr=RATE, momentum=momentum)
    return SAM(base, rho=rho, kind=kind, pairs=lora_pairs(net))


def step(sam, net, number):
    def closure():
        loss = net.loss(number)
        loss.backward()
        return loss

    sam.zero_grad()
    return sam.step(closure)


def by_formula(rate=ASCENT, rho=RHO, momentum=0.9):
    """The training written out, with dense products; returns the weights, the losses and the radii."""
    net = Net()
    frozen = [net.one.weight, net.two.weight]
    learning = [[net.one.factor("B"), net.one.factor("A")], [net.two.factor("B"), net.two.factor("A")]]
    moving = [torch.zeros_like(weight) for pair in learning for weight in pair]
    climbing = []
    for place, W in enumerate(frozen):
        A2 = torch.empty(RANK, W.shape[1], dtype=torch.float64)
        generator = torch.Generator().manual_seed(mixed_seed(mixed_seed(9, 0), place))
        A2.uniform_(-1 / math.sqrt(W.shape[1]), 1 / math.sqrt(W.shape[1]), generator=generator)
        climbing.append([torch.zeros(W.shape[0], RANK, dtype=torch.float64), A2])
    losses, radii, before = [], [], []
    for data in net.data:
        radii.append(math.sqrt(sum(float((B @ A).square().sum()) for B, A in climbing)))
        for pair in climbing:
            for factor in pair:
                factor.requires_grad_(True)
        one, two = (W + B @ A + B2 @ A2 for W, (B, A), (B2, A2) in zip(frozen, learning, climbing, strict=True))
        loss = torch.tanh(torch.tanh(data @ one.T) @ two.T).pow(2).sum(1).mean()
        losses.append(loss.item())
        down = [weight for pair in learning for weight in pair]
        up = [weight for pair in climbing for weight in pair]
        gradients = torch.autograd.grad(loss, down + up)
        with torch.no_grad():
            for weight, velocity, gradient in zip(down, moving, gradients, strict=False):
                velocity.mul_(momentum).add_(gradient)
                weight -= RATE * velocity
            climbing = [[factor.detach() for factor in pair] for pair in climbing]
            for factor, gradient in zip([f for pair in climbing for f in pair], gradients[len(down) :], strict=True):
                factor += rate * gradient
            c = math.sqrt(sum(float((B @ A).square().sum()) for B, A in climbing))
            before.append(c)
            if c > rho:
                climbing = [[factor * math.sqrt(rho / c) for factor in pair] for pair in climbing]
    return net, losses, radii, before


def test_training_equals_the_formula():
    net = Net()
    sam, losses, radii = sam_around(net), [], []
    for number in range(STEPS):
        losses.append(step(sam, net, number).item())
        assert sam.perturbed_loss is None, "there is no other loss to hold it against"
        radii.append(sam.last_step.perturbation_norm.item())
    twin, their_losses, their_radii, unclipped = by_formula()
    for ours, theirs in zip(net.factors(), twin.factors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert losses == pytest.approx(their_losses, rel=1e-12)
    assert radii == pytest.approx(their_radii, rel=1e-12)
    # Steps inside the ball and steps out of it were among these.
    assert radii[0] == 0
    assert any(0 < c < RHO for c in unclipped) and any(c > 1.01 * RHO for c in unclipped)
    assert radii[-1] == pytest.approx(RHO)


def test_ascent_takes_the_learning_rate_of_lora_where_none_is_given():
    net, twin = Net(), Net()
    head = nn.Parameter(torch.zeros(1))
    kind = make_kind({"kind": "bilora", "options": {"bilora_rank": RANK}}, seed=9)
    groups = [{"params": [head], "lr": 7.0}, {"params": net.factors(), "lr": RATE}]
    sam = SAM(torch.optim.SGD(groups, lr=1.0), rho=RHO, kind=kind, pairs=lora_pairs(net))
    other = sam_around(twin, rate=RATE, momentum=0)
    for number in range(3):
        step(sam, net, number)
        step(other, twin, number)
    for ours, theirs in zip(net.factors(), twin.factors(), strict=True):
        assert torch.equal(ours, theirs)


def test_radius_is_of_all_weights_together_and_the_scale_counts():
    generator = torch.Generator().manual_seed(1)
    weights = [FrozenWeight(torch.zeros(4, 6), [], scale=0.5), FrozenWeight(torch.zeros(3, 7), [], scale=2.0)]
    pairs = [
        [drawn(generator, 2, n), drawn(generator, m, 2), 0.1 * drawn(generator, 2, n), 0.1 * drawn(generator, m, 2)]
        for m, n in ((4, 6), (3, 7))
    ]

    def dense(pairs):
        return torch.cat([(each.scale * B @ A).flatten() for each, (A, B, *_) in zip(weights, pairs, strict=True)])

    torch.testing.assert_close(norm(weights, pairs), dense(pairs).norm())
    moved = [[A + of_A, B + of_B] for A, B, of_A, of_B in pairs]
    found, length = climbed(weights, pairs, rho=0.3)
    torch.testing.assert_close(dense(found), 0.3 * dense(moved) / dense(moved).norm())
    assert length == pytest.approx(0.3)
    assert all(torch.equal(torch.zeros_like(part), part) for pair in found for part in pair[2:])
    for (A, B, *_), (before_A, before_B) in zip(found, moved, strict=True):
        torch.testing.assert_close(A.norm() / before_A.norm(), B.norm() / before_B.norm())
    found, length = climbed(weights, pairs, rho=1e3)
    assert all(torch.equal(a, b) for a, b in zip(found[1][:2], moved[1], strict=True))
    assert length == pytest.approx(dense(moved).norm().item())


def test_layers_compute_with_the_pairs_inside_the_block_alone():
    model = tiny_t5(dropout=0.0)
    weights = frozen_weights(lora_pairs(model))
    pairs = new_pairs(weights, rank=3, seed=2)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    for pair in pairs:
        pair[1].normal_(generator=torch.Generator().manual_seed(4))
    layers = [each.layer for each in weights]
    units = [torch.eye(layer.in_features) for layer in layers]
    plain = [layer(unit) for layer, unit in zip(layers, units, strict=True)]
    with added(weights, pairs):
        held = [layer(unit) for layer, unit in zip(layers, units, strict=True)]
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_parameters()] == names
    for each, (A, B, *_), before, after in zip(weights, pairs, plain, held, strict=True):
        assert each.scale == 2
        torch.testing.assert_close((after - before).T, 2 * B @ A)
    for layer, unit, before in zip(layers, units, plain, strict=True):
        assert torch.equal(layer(unit), before)
    with pytest.raises(RuntimeError, match="out of memory"), added(weights, pairs):
        raise RuntimeError("out of memory")
    assert torch.equal(layers[0](units[0]), plain[0])


def test_pair_of_a_part_of_a_joint_projection_changes_that_part_alone():
    attention = PerTask()
    attention.qkv = nn.Linear(6, 18).requires_grad_(False)
    weights = frozen_weights(lora_pairs(attention))
    ((A, B, *_),) = pairs = new_pairs(weights, rank=2, seed=0)
    B.normal_()
    x = torch.randn(2, 5, 6)
    before = attention.qkv(x)
    with added(weights, pairs):
        change = attention.qkv(x) - before
    assert not change[..., :12].any()
    torch.testing.assert_close(change[..., 12:], x @ (B @ A).T)


def test_beginning_is_zero_and_draws_no_global_number():
    state = torch.get_rng_state()
    weights = [FrozenWeight(torch.zeros(4, 25, dtype=dtype), []) for dtype in (torch.float64, torch.bfloat16)]
    pairs = new_pairs(weights, rank=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert norm(weights[:1], pairs[:1]) == 0
    assert [pair[0].dtype for pair in pairs] == [torch.float64, torch.float32]
    assert 0.15 < pairs[0][0].abs().max() <= 0.2
    assert not torch.equal(pairs[0][0].float(), pairs[1][0])
    assert torch.equal(new_pairs(weights, rank=3, seed=5)[1][0], pairs[1][0])
    assert not torch.equal(new_pairs(weights, rank=3, seed=6)[1][0], pairs[1][0])


def test_gradient_that_is_not_finite_is_climbed_by_no_pair_and_a_loss_scale_cancels():
    pairs = [[torch.ones(2, 3), torch.ones(4, 2), torch.full((2, 3), 0.5), torch.zeros(4, 2)]]
    leaves = [part.clone().requires_grad_() for part in pairs[0][:2]]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 64.0)
    (found,), finite = heard(pairs, leaves, rate=0.5, scale=32.0)
    assert finite
    assert torch.equal(found[2], torch.full((2, 3), 1.5))
    assert torch.equal(found[3], torch.ones(4, 2))
    leaves[1].grad[0, 0] = torch.inf
    (found,), finite = heard(pairs, leaves, rate=0.5, scale=32.0)
    assert not finite
    assert all(torch.equal(a, b) for a, b in zip(found, pairs[0], strict=True))


def test_layers_that_the_loss_does_not_depend_on_are_refused():
    net = Net()
    sam = sam_around(net)
    factors = net.factors()

    def closure():
        loss = sum(factor.sum() for factor in factors)
        loss.backward()
        return loss

    with pytest.raises(UserError, match=r"^sam=bilora adds its pairs to the outputs of the layers .* none of these 2"):
        sam.step(closure)
    model = Peft()
    model.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    model.fan_in_fan_out = True
    sam = SAM(torch.optim.SGD(model.parameters(), lr=1.0), kind=make_kind({"kind": "bilora"}), pairs=lora_pairs(model))
    with pytest.raises(UserError, match=r"^the weight that loranew_\*.default.weight adds to is not where"):
        sam.step(lambda: None)


def test_training_that_goes_on_has_the_pairs_that_it_would_have_had():
    def halves(remembers):
        net = Net()
        sam = sam_around(net)
        for number in range(STEPS):
            if number == 3:
                content = io.BytesIO()
                torch.save((sam.state_dict(), sam.kind.state()), content)
                content.seek(0)
                base, kept = torch.load(content, weights_only=True)
                sam = sam_around(net)
                sam.load_state_dict(base)
                sam.steps = number
                if remembers:
                    sam.kind.put_back(kept)
            step(sam, net, number)
        return net.factors()

    net = Net()
    sam = sam_around(net)
    for number in range(STEPS):
        step(sam, net, number)
    assert all(torch.equal(a, b) for a, b in zip(halves(True), net.factors(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(halves(False), net.factors(), strict=True))


def test_loop_written_by_hand_trains_as_the_closure_does():
    net, twin = Net(), Net()
    sam, kind = sam_around(net), sam_around(twin).kind
    optimizer = torch.optim.SGD(twin.factors(), lr=RATE, momentum=0.9)
    for number in range(STEPS):
        step(sam, net, number)
        random_state, loss = RandomState(), twin.loss(number)
        optimizer.zero_grad()
        loss.backward()
        passes = LoopPasses(
            twin.factors(),
            twin.factors(),
            loss=loss,
            again=lambda number=number: twin.loss(number),
            at=torch.enable_grad,
            radii=[RHO] * 4,
            place=(number,),
            optimizer=optimizer,
            random_state=random_state,
            pairs=lora_pairs(twin),
        )
        kind.step(passes)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.factors(), twin.factors(), strict=True))


@pytest.mark.parametrize("gas", [1, 4])
def test_trainer_with_radius_zero_equals_the_plain_one_bit_for_bit_with_dropout(tmp_path, gas):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0, "kind": "bilora"}), plain)


def test_trainer_takes_one_pass_a_micro_batch_and_the_global_random_numbers_of_the_plain_one(tmp_path):
    plain = sam_training.train(tmp_path, gas=2)
    found = sam_training.train(tmp_path, gas=2, sam={"rho": 0.5, "kind": "bilora"})
    assert len(found["passes"]) == len(plain["passes"])
    assert torch.equal(found["random"], plain["random"])
    assert found["losses"] != plain["losses"]


def test_micro_batches_of_an_update_are_one_batch(tmp_path):
    settings = {"dropout": 0.0, "penalty": 0.0, "shuffled": False, "steps": 4, "learning_rate": 0.05}
    whole = sam_training.train(tmp_path, batch=8, sam={"rho": 0.3, "kind": "bilora"}, **settings)
    parts = sam_training.train(tmp_path, batch=4, gas=2, sam={"rho": 0.3, "kind": "bilora"}, **settings)
    assert 0 < whole["report"]["perturbation_norm"] == pytest.approx(parts["report"]["perturbation_norm"], rel=1e-4)
    summed = [sum(parts["losses"][place : place + 2]) for place in range(0, 8, 2)]
    assert whole["losses"] == pytest.approx(summed, rel=1e-5)


def test_loss_scale_of_a_trainer_changes_no_ascent():
    norms = []
    for scale in (None, 4096.0):
        net = Net()
        optimizer = torch.optim.SGD(net.factors(), lr=RATE)
        scaler = SimpleNamespace(scale=lambda loss, scale=scale: loss * scale)
        trainer = SimpleNamespace(model=net, optimizer=optimizer, do_grad_scaling=scale is not None, scaler=scaler)
        trainer.state = SimpleNamespace(global_step=0, max_steps=3)

        def training_step(model, inputs, scale=scale):
            loss = model.loss(inputs["step"])
            (loss * (scale or 1.0)).backward()
            return loss.detach()

        trainer.training_step = training_step
        kind = make_kind({"kind": "bilora", "options": {"bilora_lr": 0.1}})
        taken = SAMTrainingStep(trainer, rho=10.0, kind=kind)
        for number in range(3):
            trainer.state.global_step = number
            taken(net, {"step": number})
            optimizer.zero_grad()
        norms.append(taken.last_step.perturbation_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert norms[0] > 0

"""Flat-LoRA: noise on the merged weights during the one pass, by the formula and in a Trainer."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from flatpatch.families.vision.reference.vit import LoRALinear
from flatpatch.kinds import make_kind, mixed_seed
from flatpatch.sam import SAM, SAMTrainingStep, lora_pairs
from flatpatch.sam.frozen import FrozenWeight, frozen_weights
from flatpatch.sam.noise import noised
from tests import sam_training
from tests.sam.test_pairs import PerTask
from tests.sam_training import assert_same


def test_noise_has_the_formulas_spread_in_each_row_and_goes_without_a_trace():
    torch.manual_seed(1)
    scales = torch.tensor([0.0, 0.1, 1.0, 10.0], dtype=torch.float64)
    W = torch.randn(4, 20_000, dtype=torch.float64) * scales[:, None]
    A, B = torch.randn(2, 20_000, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64) * scales[:, None]
    merged, before, state = W + 0.5 * B @ A, W.clone(), torch.get_rng_state()
    with noised([FrozenWeight(W, [(0.5, B, A)])], sigma=0.2, seed=3):
        noise = W - before
    assert torch.equal(W, before)
    assert torch.equal(torch.get_rng_state(), state)
    expected = 0.2 * merged.norm(dim=1) / math.sqrt(20_000)
    # The standard deviation of a sample's standard deviation is about 1/sqrt(2 n) of it.
    torch.testing.assert_close(noise.std(dim=1), expected, rtol=4 / math.sqrt(40_000), atol=0)
    assert noise.norm().item() == pytest.approx(0.2 * merged.norm().item(), rel=0.02)
    with noised([FrozenWeight(W, [(0.5, B, A)])], sigma=0.2, seed=3):
        torch.testing.assert_close(W - before, noise)
    with noised([FrozenWeight(W, [(0.5, B, A)])], sigma=0.2, seed=4):
        assert not torch.allclose(W - before, noise)


def test_weights_come_back_when_the_pass_raises():
    W = torch.randn(3, 4)
    before = W.clone()
    with pytest.raises(RuntimeError, match="out of memory"), noised([FrozenWeight(W, [])], sigma=1.0, seed=0):
        raise RuntimeError("out of memory")
    assert torch.equal(W, before)


def test_noise_is_on_the_weights_rows_alone():
    attention = PerTask()
    attention.qkv = nn.Linear(6, 18).requires_grad_(False)
    before = attention.qkv.weight.clone()
    with noised(frozen_weights(lora_pairs(attention)), sigma=1.0, seed=0):
        assert torch.equal(attention.qkv.weight[:12], before[:12])
        assert not torch.isclose(attention.qkv.weight[12:], before[12:]).any()


class Layer(nn.Module):
    """One layer with factors on fixed data, a batch for each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.linear = LoRALinear(torch.randn(3, 4).double(), None, rank=2).double()
        self.linear.requires_grad_(False)
        for factor in "AB":
            self.linear.factor(factor).requires_grad_(True).data.normal_()
        self.data = torch.randn(5, 8, 4).double()

    def loss(self, step):
        return torch.tanh(self.linear(self.data[step])).pow(4).sum()


def test_training_equals_the_formula():
    model, twin, steps, sigma = Layer(), Layer(), 5, 0.8
    factors = [model.linear.factor(name) for name in "AB"]
    sam = SAM(
        torch.optim.SGD(factors, lr=0.02),
        rho=sigma,
        kind=make_kind({"kind": "flatlora"}, seed=9),
        pairs=lora_pairs(model),
    )
    A, B, W = (twin.linear.factor("A"), twin.linear.factor("B"), twin.linear.weight)
    for step in range(steps):
        sam.progress = step / steps

        def closure(step=step):
            loss = model.loss(step)
            loss.backward()
            return loss

        sam.step(closure)
        merged = W + B @ A
        z = torch.empty(3, 4, dtype=torch.float64)
        z.normal_(generator=torch.Generator().manual_seed(mixed_seed(mixed_seed(9, step), 0)))
        sigma_t = sigma / 2 * (1 - math.cos(math.pi * step / steps))
        noise = (sigma_t / math.sqrt(4) * merged.norm(dim=1, keepdim=True) * z).detach()
        loss = torch.tanh(twin.data[step] @ (merged + noise).T).pow(4).sum()
        assert sam.perturbed_loss is None, "there is no other loss to hold it against"
        gradients = torch.autograd.grad(loss, (A, B))
        with torch.no_grad():
            for factor, gradient in zip((A, B), gradients, strict=True):
                factor -= 0.02 * gradient
    for ours, theirs in zip(factors, (A, B), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.linear.weight, twin.linear.weight)


@pytest.mark.parametrize("gas", [1, 4])
def test_trainer_with_sigma_zero_equals_the_plain_one_bit_for_bit_with_dropout(tmp_path, gas):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0, "kind": "flatlora"}), plain)


def test_trainer_takes_one_pass_with_other_noise_each_micro_batch(tmp_path):
    trainer = sam_training.make_trainer(tmp_path, gas=2, steps=4)
    step = SAMTrainingStep(trainer, rho=0.5, kind=make_kind({"kind": "flatlora"}, seed=1))
    trainer.training_step = step
    (weight, *_) = (each.weight for each in frozen_weights(lora_pairs(trainer.model)))
    before, met = weight.clone(), []
    trainer.model.register_forward_pre_hook(lambda *_: met.append(weight - before))
    trainer.train()
    assert len(met) == 8
    assert step.perturbed_loss is None
    assert not met[0].any()
    assert not met[1].any()
    assert all(bool(a.any()) and not torch.equal(a, b) for a, b in pairwise(met[2:]))
    assert met[-1].norm() > 2 * met[2].norm()
    assert torch.equal(weight, before)

"""The control that moves along random directions: of SAM's norm over SAM's weights, from a seed of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatpatch.sam import SAM, SAMTrainingStep, mixed_seed, perturbed
from tests import sam_training
from tests.sam_training import assert_same


def moved(weights, gradients, **settings):
    """What ``perturbed`` adds to each weight inside its block, and what it reports."""
    before = [weight.detach().clone() for weight in weights]
    with perturbed(weights, gradients, **settings) as step:
        inside = [weight.detach().clone() for weight in weights]
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight, old)
    return [new - old for new, old in zip(inside, before, strict=True)], step


def random_problem(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes], [torch.randn(s, dtype=dtype) for s in shapes]


def flat(steps):
    return torch.cat([step.flatten() for step in steps])


def test_step_on_a_quadratic_matches_its_closed_form():
    """w - lr H (w + rho z / |z|), with the normal z that a generator of that seed draws."""
    torch.manual_seed(2)
    root = torch.randn(6, 6, dtype=torch.float64)
    H, start = root @ root.T + torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    sam = SAM(torch.optim.SGD([weight], lr=0.03), rho=0.4, random_seed=11)

    def closure():
        sam.zero_grad()
        loss = weight @ H @ weight / 2
        loss.backward()
        return loss

    loss = sam.step(closure)
    # The seed of the first step, of the first and only group of weights.
    generator = torch.Generator().manual_seed(mixed_seed(mixed_seed(11, 0), 0))
    z = torch.empty(6, dtype=torch.float64).normal_(generator=generator)
    e = 0.4 * z / z.norm()
    torch.testing.assert_close(weight.detach(), start - 0.03 * H @ (start + e), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, start @ H @ start / 2)  # at the weights, as SAM's
    torch.testing.assert_close(sam.perturbed_loss, (start + e) @ H @ (start + e) / 2)
    torch.testing.assert_close(sam.last_step.grad_norm, (H @ start).norm())


def test_norm_is_rho_over_all_tensors_together_and_the_cosine_is_that_of_the_step_itself():
    weights, gradients = random_problem((40, 30), (7,), ())
    steps, report = moved(weights, gradients, rho=0.05, random_seed=3)
    assert flat(steps).norm().item() == pytest.approx(0.05, rel=1e-12)
    assert report.perturbation_norm.item() == pytest.approx(0.05, rel=1e-12)
    assert report.perturbation_cosine.item() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(report.grad_norm, flat(gradients).norm())


def test_directions_are_unrelated_to_the_gradient_and_to_each_other():
    """The cosine of independent directions in n dimensions has mean 0 and standard deviation 1/sqrt(n)."""
    n, draws = 2000, 200
    weights, gradients = random_problem((n,))
    steps = torch.stack([moved(weights, gradients, rho=1.0, random_seed=mixed_seed(5, k))[0][0] for k in range(draws)])
    with_gradient = steps @ gradients[0] / gradients[0].norm()
    among = (steps @ steps.T)[torch.triu_indices(draws, draws, 1).unbind()]
    for cosines in (with_gradient, among):
        assert abs(cosines.mean().item()) < 4 / math.sqrt(n * len(cosines))
        # The standard deviation of a sample's standard deviation is about 1/sqrt(2 m) of it; the pairs are not
        # independent of each other, but uncorrelated.
        assert cosines.std().item() * math.sqrt(n) == pytest.approx(1, abs=4 / math.sqrt(2 * draws))


def test_directions_entries_are_normal():
    """Entries of a direction of norm 1 in n dimensions, times sqrt(n), have the normal's moments."""
    entries = moved(*random_problem((200_000,)), rho=1.0, random_seed=1)[0][0] * math.sqrt(200_000)
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, math.sqrt(2)), (4, 3.0, math.sqrt(96))):
        found = entries.pow(power).mean().item()
        assert found == pytest.approx(moment, abs=4 * spread / math.sqrt(200_000))


def test_gradient_decides_only_which_weights_move_and_whether():
    weights, gradients = random_problem((5, 4), (3,))
    steps, _ = moved(weights, gradients, rho=0.1, random_seed=2)
    others, _ = moved(weights, [7 * gradient.flip(0) for gradient in gradients], rho=0.1, random_seed=2)
    assert torch.equal(flat(steps), flat(others))
    alone, _ = moved(weights, [gradients[0], None], rho=0.1, random_seed=2)
    assert not alone[1].any()
    assert alone[0].norm().item() == pytest.approx(0.1, rel=1e-12)
    still, report = moved(
        weights, [gradients[0], torch.full((3,), math.nan, dtype=torch.float64)], rho=1, random_seed=2
    )
    assert not flat(still).any()
    assert not report.finite
    still, _ = moved(weights, [torch.zeros_like(gradient) for gradient in gradients], rho=0.1, random_seed=2)
    assert not flat(still).any()


def test_radii_may_differ_and_share_one_norm():
    weights, gradients = random_problem((6,), (9,))
    (first, second), _ = moved(weights, gradients, rho=[0.2, 0.6], random_seed=4)
    # Each part is divided by the norm over both: (|a|/.2)^2 + (|b|/.6)^2 = 1.
    assert (first.norm() / 0.2) ** 2 + (second.norm() / 0.6) ** 2 == pytest.approx(1.0, rel=1e-12)


def test_seed_alone_decides_and_global_generators_stay_where_they_are():
    weights, gradients = random_problem((30,))
    before = torch.get_rng_state()
    first = moved(weights, gradients, rho=0.1, random_seed=6)[0][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(moved(weights, gradients, rho=0.1, random_seed=6)[0][0], first)
    assert not torch.equal(moved(weights, gradients, rho=0.1, random_seed=7)[0][0], first)


def test_mixed_seeds_differ_in_each_number_and_in_their_order():
    seeds = {mixed_seed(*numbers) for numbers in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (10,), (1, 0, 0)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("how", ["sam", "step", "block"])
def test_adaptive_random_direction_is_refused(how, tmp_path):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="a random direction has no adaptive form"):
        if how == "sam":
            SAM(torch.optim.SGD([weight], lr=0.1), adaptive=True, random_seed=0)
        elif how == "step":
            SAMTrainingStep(sam_training.make_trainer(tmp_path), adaptive=True, random_seed=0)
        else:
            moved([weight], [torch.ones(2)], rho=0.1, adaptive=True, random_seed=0)


def sequence(seed, start, count):
    """The perturbations of some steps of an optimizer that begins at a step; its learning rate is 0."""
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    sam = SAM(torch.optim.SGD([weight], lr=0.0), rho=0.1, random_seed=seed)
    sam.steps = start
    met = []

    def closure():
        sam.zero_grad()
        met.append(weight.detach().clone())
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(count):
        sam.step(closure)
    return met[1::2]  # of the second passes


def test_each_step_has_another_direction_and_a_resumed_training_the_ones_it_would_have_had():
    whole = sequence(3, 0, 5)
    assert all(not torch.equal(a, b) for k, a in enumerate(whole) for b in whole[:k])
    assert all(torch.equal(a, b) for a, b in zip(sequence(3, 2, 3), whole[2:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(sequence(4, 0, 5), whole, strict=True))


@pytest.mark.parametrize("gas", [1, 4])
def test_trainer_with_rho_zero_equals_the_plain_one_bit_for_bit_with_dropout(tmp_path, gas):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0, "random_seed": 1}), plain)


def test_trainer_takes_the_same_batches_and_masks_and_repeats_bit_for_bit(tmp_path):
    plain = sam_training.train(tmp_path)
    first = sam_training.train(tmp_path, sam={"rho": 0.5, "random_seed": 1})
    assert first["losses"][0] == plain["losses"][0]
    assert torch.equal(first["random"], plain["random"])
    assert_same(sam_training.train(tmp_path, sam={"rho": 0.5, "random_seed": 1}), first)
    other = sam_training.train(tmp_path, sam={"rho": 0.5, "random_seed": 2})
    assert other["losses"][0] == plain["losses"][0]
    assert other["losses"][1:] != first["losses"][1:]


def test_every_micro_batch_has_a_direction_that_its_place_decides(tmp_path):
    trainer = sam_training.make_trainer(tmp_path)
    step = SAMTrainingStep(trainer, random_seed=9)
    places = []
    for number in (0, 0, 1, 1, 1):
        trainer.state.global_step = number
        places.append(step._next_place())
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    resumed = SAMTrainingStep(trainer, random_seed=9)
    assert resumed._next_place() == (1, 0)


@pytest.mark.gpu
def test_direction_on_a_gpu_has_norm_rho_and_never_waits_for_it():
    weights, gradients = random_problem((300, 40), (7,), dtype=torch.float32)
    on_gpu = [nn.Parameter(weight.detach().cuda()) for weight in weights]
    gradients = [gradient.cuda() for gradient in gradients]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with perturbed(on_gpu, gradients, rho=0.5, random_seed=1) as report:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.perturbation_norm.item() == pytest.approx(0.5, rel=1e-5)

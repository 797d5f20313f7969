"""SAM on LoRA's factors with the radius of the merged weight: against dense pseudo-inverses, however it is factored."""

from __future__ import annotations

import functools

import pytest
import torch

from flatpatch.sam import SAM, LoraPair, SAMTrainingStep, lora_pairs, perturbed
from flatpatch.sam.effective import length, make_steepest, steepest
from tests import sam_training
from tests.sam_training import assert_same

CASES = ["full", "rank 1", "B = 0", "deficient", "wider than the layer", "one factor in 32 bits"]


def problem(case, seed=0):
    """A pair of factors and the gradients that a gradient of the merged weight gives them."""
    torch.manual_seed(seed)
    r, n, m = {"rank 1": (1, 6, 4), "wider than the layer": (6, 5, 4)}.get(case, (3, 7, 5))
    A, B = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    if case == "B = 0":
        B.zero_()
    if case == "deficient":
        A = A[:, :2] @ torch.randn(2, n, dtype=torch.float64)
        B = B[:, :1] @ torch.randn(1, r, dtype=torch.float64)
    if case == "one factor in 32 bits":
        A = A.float()
    pair = LoraPair(A, B, scale=1.7)
    G = torch.randn(m, n, dtype=torch.float64)
    return pair, G, *gradients(pair, G)


def gradients(pair, G):
    A, B = pair.A.double(), pair.B.double()
    return pair.scale * B.T @ G, pair.scale * G @ A.T


def jacobian(pair, moves="AB"):
    """The map from a flat (dA, dB) to the flat s (B dA + dB A), dense, of the factors that move."""
    A, B = pair.A.double(), pair.B.double()
    identity_out, identity_in = (torch.eye(size, dtype=torch.float64) for size in (B.shape[0], A.shape[1]))
    columns = {
        "A": torch.kron(B, identity_in),
        "B": torch.kron(identity_out, A.T.clone(memory_format=torch.contiguous_format)),
    }
    return pair.scale * torch.cat([columns[name] for name in moves], dim=1)


def flat(*tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def moved(pair, dA, dB):
    """The whole change of the merged weight, its second order too."""
    A, B = pair.A.double(), pair.B.double()
    return pair.scale * ((B + dB) @ (A + dA) - B @ A)


@pytest.mark.parametrize("case", CASES)
def test_change_of_the_weight_is_that_of_the_dense_pseudo_inverse(case):
    pair, _, g_A, g_B = problem(case)
    J, g = jacobian(pair), flat(g_A, g_B)
    dense = torch.linalg.pinv(J.T @ J, rtol=1e-10, hermitian=True) @ g
    steps = {id(pair.A): g_A.clone(), id(pair.B): g_B.clone()}
    make_steepest([pair], steps)
    d = flat(*steps.values())
    torch.testing.assert_close(J @ d, J @ dense, rtol=1e-9, atol=1e-9)
    assert length([pair], steps).item() == pytest.approx((g @ dense).sqrt().item(), rel=1e-9)
    assert length([pair], steps).item() == pytest.approx((J @ d).norm().item(), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_no_direction_of_the_same_length_climbs_more_steeply(case):
    pair, _, g_A, g_B = problem(case)
    J, g = jacobian(pair), flat(g_A, g_B)
    steps = {id(pair.A): g_A.clone(), id(pair.B): g_B.clone()}
    make_steepest([pair], steps)
    best = g @ flat(*steps.values()) / length([pair], steps)
    others = torch.randn(500, len(g), dtype=torch.float64)
    slopes = others @ g / (others @ J.T).norm(dim=1)
    assert slopes.max() < best
    # Nothing is gained by what changes no weight: (M A, -B M).
    M = torch.randn(len(pair.A), len(pair.A), dtype=torch.float64)
    null = flat(M @ pair.A.double(), -pair.B @ M)
    assert (J @ null).norm() < 1e-10 * (1 + null.norm())
    assert abs(g @ null) < 1e-10 * (1 + null.norm() * g.norm())


@pytest.mark.parametrize("moves", ["A", "B"])
@pytest.mark.parametrize("case", CASES)
def test_of_one_factor_alone_it_is_the_steepest_step_of_that_factor(case, moves):
    pair, _, g_A, g_B = problem(case)
    J, g = jacobian(pair, moves), flat(g_A if moves == "A" else g_B)
    dense = torch.linalg.pinv(J.T @ J, rtol=1e-10, hermitian=True) @ g
    factor = pair.A if moves == "A" else pair.B
    steps = {id(factor): g.reshape(factor.shape).clone()}
    make_steepest([pair], steps)
    torch.testing.assert_close(flat(steps[id(factor)]), dense, rtol=1e-8, atol=1e-8)
    assert length([pair], steps).item() == pytest.approx((J @ dense).norm().item(), rel=1e-9, abs=1e-12)


def test_it_is_the_gradient_of_the_weight_projected_onto_what_the_factors_can_do():
    """Closed form: P_B G + G P_A - P_B G P_A with the projections from an SVD."""
    pair, G, g_A, g_B = problem("full")
    dA, dB = steepest(pair.scale * pair.A, pair.scale * pair.B, g_A, g_B)
    rows = torch.linalg.svd(pair.A, full_matrices=False).Vh
    columns = torch.linalg.svd(pair.B, full_matrices=False).U
    P_A, P_B = rows.T @ rows, columns @ columns.T
    torch.testing.assert_close(pair.scale * (pair.B @ dA + dB @ pair.A), P_B @ G + G @ P_A - P_B @ G @ P_A)


def refactored(pair, how):
    """Other factors of the same product; and what takes a step of the old ones to the new ones."""
    r = len(pair.A)
    if how == "scaled":
        Q = torch.eye(r, dtype=torch.float64) / 50
    elif how == "rotated":
        Q = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    else:
        Q = torch.randn(r, r, dtype=torch.float64) + 2 * torch.eye(r, dtype=torch.float64)
    return LoraPair(Q @ pair.A, pair.B @ torch.linalg.inv(Q), pair.scale), Q


@pytest.mark.parametrize(
    ("case", "how"),
    [(case, how) for case in CASES[:-1] for how in ("scaled", "rotated")] + [("full", "any"), ("rank 1", "any")],
)
def test_whole_change_of_the_weight_is_the_same_however_it_is_factored(case, how):
    pair, G, g_A, g_B = problem(case)
    other, Q = refactored(pair, how)
    torch.testing.assert_close(other.B @ other.A, pair.B @ pair.A)
    found = []
    for each in (pair, other):
        steps = dict(zip((id(each.A), id(each.B)), gradients(each, G), strict=True))
        make_steepest([each], steps)
        size = length([each], steps)
        dA, dB = (step / size for step in steps.values())
        found.append((dA, dB, moved(each, dA, dB), size))
    (dA, dB, change, size), (dA_other, dB_other, change_other, size_other) = found
    torch.testing.assert_close(change_other, change, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(size_other, size, rtol=1e-10, atol=0)
    torch.testing.assert_close(dA_other, Q @ dA, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dB_other @ Q, dB, rtol=1e-8, atol=1e-8)
    # The gradients themselves, which SAM climbs along, change another weight.
    plain = [
        moved(each, *(1e-3 * g / flat(*gs).norm() for g in gs)) for each in (pair, other) for gs in [gradients(each, G)]
    ]
    assert how == "rotated" or (plain[1] - plain[0]).norm() > 0.1 * plain[0].norm()


def with_small_singular_values(seed=5):
    """A pair whose s B A has the singular values 2, 0.3, 1e-3 and 1e-7, as a new adapter's after a few steps."""
    torch.manual_seed(seed)
    n, m = 8, 6
    values = torch.tensor([2.0, 0.3, 1e-3, 1e-7], dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64)).Q for size in (m, n))
    mixed = torch.randn(4, 4, dtype=torch.float64)
    pair = LoraPair(mixed @ V.T, U @ torch.diag(values / 1.7) @ torch.linalg.inv(mixed), 1.7)
    G = torch.randn(m, n, dtype=torch.float64)
    return pair, G, U, V


def test_directions_that_are_shorter_than_the_step_are_treated_as_those_of_a_new_adapter():
    """Closed form with the left singular vectors above 0.05, and the whole change bounded by twice the step."""
    pair, G, U, V = with_small_singular_values()
    P_B, P_A = U[:, :2] @ U[:, :2].T, V @ V.T
    steps = dict(zip((id(pair.A), id(pair.B)), gradients(pair, G), strict=True))
    make_steepest([pair], steps, smallest=0.05)
    dA, dB = steps.values()
    change = pair.scale * (pair.B @ dA + dB @ pair.A)
    torch.testing.assert_close(change, P_B @ G + G @ P_A - P_B @ G @ P_A, rtol=1e-8, atol=1e-8)
    weights = [pair.A.clone(), pair.B.clone()]
    for rho in (0.01, 0.05, 0.5, 5.0):
        with perturbed(weights, gradients(pair, G), rho=rho, pairs=[LoraPair(*weights, pair.scale)]):
            moved_by = pair.scale * (weights[1] @ weights[0] - pair.B @ pair.A)
        assert moved_by.norm() < 2 * rho
    make_steepest([pair], steps := dict(zip((id(pair.A), id(pair.B)), gradients(pair, G), strict=True)))
    first_order_alone = moved(pair, *(0.05 * step / length([pair], steps) for step in steps.values()))
    assert first_order_alone.norm() > 3 * 0.05


@pytest.mark.parametrize("how", ["scaled", "rotated", "any"])
def test_which_directions_those_are_does_not_depend_on_the_factoring(how):
    pair, G, *_ = with_small_singular_values()
    other, _ = refactored(pair, how)
    changes = []
    for each in (pair, other):
        steps = dict(zip((id(each.A), id(each.B)), gradients(each, G), strict=True))
        make_steepest([each], steps, smallest=0.05)
        size = length([each], steps)
        changes.append(moved(each, *(0.05 * step / size for step in steps.values())))
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-7, atol=1e-9)


def test_length_is_one_over_all_pairs_and_what_is_in_no_pair_counts_as_it_is():
    first, _, *g_first = problem("full")
    second, _, *g_second = problem("B = 0", seed=1)
    third, _, *g_third = problem("full", seed=2)  # of the first one's shape
    head = torch.randn(4, 2, dtype=torch.float64)
    pairs = [first, second, third]
    given = [*g_first, *g_second, *g_third]
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    steps = {id(factor): g.clone() for factor, g in zip(factors, given, strict=True)} | {id(head): head.clone()}
    make_steepest(pairs, steps)
    assert torch.equal(steps[id(head)], head)
    squares = head.square().sum()
    for pair, g_A, g_B in ((first, *g_first), (second, *g_second), (third, *g_third)):
        alone = {id(pair.A): g_A.clone(), id(pair.B): g_B.clone()}
        make_steepest([pair], alone)
        for factor in (pair.A, pair.B):
            torch.testing.assert_close(steps[id(factor)], alone[id(factor)])
        squares = squares + (jacobian(pair) @ flat(*alone.values())).square().sum()
    torch.testing.assert_close(length(pairs, steps), squares.sqrt())


def test_learned_scale_is_read_when_the_step_is_made_and_a_scale_of_zero_moves_nothing():
    pair, G, *_ = problem("full")
    scale = torch.tensor(1.7)
    learned = LoraPair(pair.A, pair.B, scale)
    for value in (0.4, 0.0):
        scale.fill_(value)
        now = LoraPair(pair.A, pair.B, value)
        steps = dict(zip((id(pair.A), id(pair.B)), gradients(now, G), strict=True))
        make_steepest([learned], steps)
        J = jacobian(now)
        dense = torch.linalg.pinv(J.T @ J, rtol=1e-10, hermitian=True) @ flat(*gradients(now, G))
        torch.testing.assert_close(J @ flat(*steps.values()), J @ dense, rtol=1e-5, atol=1e-5)
    assert not flat(*steps.values()).any()


def test_held_weights_are_away_by_rho_and_come_back_bit_for_bit():
    pair, _, g_A, g_B = problem("full")
    head, g_head = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    weights = [pair.A.clone(), pair.B.clone(), head]
    held = LoraPair(weights[0], weights[1], pair.scale)
    before = [weight.clone() for weight in weights]
    with perturbed(weights, [g_A, g_B, g_head], rho=1e-6, pairs=[held]):
        change = pair.scale * (held.B @ held.A - pair.B @ pair.A)
        found = flat(change, head - before[2]).norm().item()
    assert found == pytest.approx(1e-6, rel=1e-4)  # to first order: the second is of 1e-6 times that
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    with perturbed(weights, [g_A * 1e-100, g_B * 1e-100, g_head * 1e-100], rho=1e-6, pairs=[held]):
        change = pair.scale * (held.B @ held.A - pair.B @ pair.A)
        assert flat(change, head - before[2]).norm().item() == pytest.approx(1e-6, rel=1e-4)
    for gradients_ in ([g_A * 0, g_B * 0, g_head * 0], [g_A * float("nan"), g_B, g_head]):
        with perturbed(weights, gradients_, rho=1.0, pairs=[held]) as report:
            assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
        assert report.finite == gradients_[0].isfinite().all()


def test_random_step_has_the_length_too_and_adaptive_one_is_refused():
    pair, _, g_A, g_B = problem("full")
    weights = [pair.A.clone(), pair.B.clone()]
    held = LoraPair(*weights, pair.scale)
    with perturbed(weights, [g_A, g_B], rho=1e-6, pairs=[held], random_seed=3):
        change = pair.scale * (held.B @ held.A - pair.B @ pair.A)
    assert change.norm().item() == pytest.approx(1e-6, rel=1e-4)
    with (
        pytest.raises(ValueError, match="radius cannot be that of the merged weight"),
        perturbed(weights, [g_A, g_B], rho=1.0, pairs=[held], adaptive=True),
    ):
        pass


class Network:
    """Two layers W + s B A with a tanh between, on fixed data; each is factored as A/c and c B."""

    s = 0.5

    def __init__(self, c):
        torch.manual_seed(4)
        self.X, self.Y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
        shapes = [(6, 5), (3, 6)]
        self.W = [torch.randn(shape, dtype=torch.float64) / 2 for shape in shapes]
        self.A = [(torch.randn(2, n, dtype=torch.float64) / c).requires_grad_() for _, n in shapes]
        self.B = [(torch.randn(m, 2, dtype=torch.float64) / 4 * c).requires_grad_() for m, _ in shapes]
        self.pairs = [LoraPair(A, B, self.s) for A, B in zip(self.A, self.B, strict=True)]
        self.factors = [*self.A, *self.B]

    def merged(self):
        return [(W + self.s * B @ A).detach() for W, A, B in zip(self.W, self.A, self.B, strict=True)]

    def loss(self):
        hidden = self.X
        for W, A, B in zip(self.W, self.A, self.B, strict=True):
            hidden = torch.tanh(hidden @ (W + self.s * B @ A).T)
        return (hidden - self.Y).square().mean()

    def gradients(self):
        loss = self.loss()
        return loss.item(), list(torch.autograd.grad(loss, self.factors))


@functools.cache
def trained(c, *, effective, rates="equal", rho=0.1, steps=15):
    """Train; return each step's losses at the weights and at the perturbed ones, and the merged weights at the end.

    ``rates``: "equal" for plain SGD, "carried over" for SGD with 1/c^2 and c^2 times the rate for A and B, which is
    SGD on the factors of c = 1 written in the others, "steepest" for the descent along the same metric's steepest step.
    """
    net, losses = Network(c), []
    for _ in range(steps):
        loss, climbed = net.gradients()
        with perturbed(net.factors, climbed, rho=rho, pairs=net.pairs if effective else None):
            perturbed_loss, descended = net.gradients()
        losses.append((loss, perturbed_loss))
        if rates == "steepest":
            make_steepest(net.pairs, {id(p): g for p, g in zip(net.factors, descended, strict=True)})
        with torch.no_grad():
            for k, (factor, gradient) in enumerate(zip(net.factors, descended, strict=True)):
                of_A = k < len(net.A)
                rate = 0.1 * ({True: c**-2, False: c**2}[of_A] if rates == "carried over" else 1)
                factor -= rate * gradient
    return torch.tensor(losses, dtype=torch.float64), torch.cat([M.flatten() for M in net.merged()])


def difference(first, second):
    """The largest relative difference of the losses, and that of the merged weights."""
    losses = ((second[0] - first[0]).abs() / first[0].abs()).max().item()
    return max(losses, ((second[1] - first[1]).norm() / first[1].norm()).item())


@pytest.mark.parametrize("c", [0.3, 4.0])
def test_first_steps_perturbed_loss_is_the_same_for_every_c(c):
    for effective in (True, False):
        losses = [trained(each, effective=effective, steps=1)[0] for each in (1.0, c)]
        gap = (losses[1] / losses[0] - 1).abs()[0]
        assert gap[0] < 1e-12
        assert gap[1] < 1e-12 if effective else gap[1] > 1e-3


@pytest.mark.parametrize("c", [0.3, 4.0])
def test_what_of_a_training_is_the_same_for_every_c(c):
    """SGD on factors is itself not the same for every c, with any SAM and with none; SGD carried over from c = 1 is.

    With that, all that is left to differ is SAM's: nothing of it with the effective radius, much with the factors' own.
    With a descent that is steepest in the same metric, the whole training is the same with no learning rate changed.
    """
    plain = {rho: difference(*(trained(k, effective=True, rho=rho) for k in (1.0, c))) for rho in (0.0, 0.1)}
    assert min(plain.values()) > 1e-2
    assert difference(*(trained(k, effective=True, rates="carried over", rho=0.0) for k in (1.0, c))) < 1e-10
    assert difference(*(trained(k, effective=True, rates="carried over") for k in (1.0, c))) < 1e-10
    assert difference(*(trained(k, effective=False, rates="carried over") for k in (1.0, c))) > 1e-3
    assert difference(*(trained(k, effective=True, rates="steepest") for k in (1.0, c))) < 1e-10


def test_sam_around_an_optimizer_takes_the_steps_of_the_formula():
    net, twin, rates = Network(2.0), Network(2.0), 0.1
    sam = SAM(torch.optim.SGD(net.factors, lr=rates), rho=0.1, pairs=net.pairs, radius="effective")

    def closure():
        loss = net.loss()
        loss.backward()
        return loss

    for _ in range(3):
        loss = sam.step(closure)
        loss_twin, climbed = twin.gradients()
        steps = {id(p): g.clone() for p, g in zip(twin.factors, climbed, strict=True)}
        make_steepest(twin.pairs, steps, smallest=0.1)
        size = length(twin.pairs, steps)
        with torch.no_grad():
            for factor in twin.factors:
                factor += 0.1 * steps[id(factor)] / size
            _, descended = 0, torch.autograd.grad(twin_loss(twin), twin.factors)
            for factor, gradient in zip(twin.factors, descended, strict=True):
                factor -= 0.1 * steps[id(factor)] / size + rates * gradient
        assert loss.item() == pytest.approx(loss_twin, rel=1e-9)
    for ours, theirs in zip(net.factors, twin.factors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def twin_loss(net):
    with torch.enable_grad():
        return net.loss()


@pytest.mark.parametrize("gas", [1, 4])
def test_trainer_with_radius_zero_equals_the_plain_one_bit_for_bit_with_dropout(tmp_path, gas):
    plain = sam_training.train(tmp_path, gas=gas)
    assert_same(sam_training.train(tmp_path, gas=gas, sam={"rho": 0.0, "radius": "effective"}), plain)


def test_trainer_moves_the_merged_weights_by_rho(tmp_path):
    trainer = sam_training.make_trainer(tmp_path, dropout=0.0)
    step = SAMTrainingStep(trainer, rho=1e-3, radius="effective")
    inputs = next(iter(trainer.get_train_dataloader()))
    pairs = lora_pairs(trainer.model)
    before = [(pair.B @ pair.A).detach() for pair in pairs]
    changes, forward = [], trainer.model.forward

    def watched(*args, **kwargs):
        changes.append(flat(*(pair.scale * (pair.B @ pair.A - old) for pair, old in zip(pairs, before, strict=True))))
        return forward(*args, **kwargs)

    trainer.model.forward = watched
    step(trainer.model, inputs)
    norms = [change.norm().item() for change in changes]
    assert norms == [0.0, pytest.approx(1e-3, rel=0.02)]


def test_radius_without_pairs_or_unknown_is_refused(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="give their pairs"):
        SAM(torch.optim.SGD([weight], lr=0.1), radius="effective")
    for make in (
        lambda: SAM(torch.optim.SGD([weight], lr=0.1), radius="merged"),
        lambda: SAMTrainingStep(sam_training.make_trainer(tmp_path), radius="merged"),
    ):
        with pytest.raises(ValueError, match="radius must be one of factors, effective, got 'merged'"):
            make()

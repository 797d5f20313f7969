"""The ascent step against formulas worked out by hand, in float64, and against what other implementations got wrong."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.sam import perturbed
from tests.sam_memory import allocations, peak_bytes


def moved(weights, gradients, **settings):
    """What ``perturbed`` adds to each weight inside its block, and what it reports."""
    before = [weight.detach().clone() for weight in weights]
    with perturbed(weights, gradients, **settings) as step:
        inside = [weight.detach().clone() for weight in weights]
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight, old)
    return [new - old for new, old in zip(inside, before, strict=True)], step


def random_problem(*shapes, dtype=torch.float64):
    weights = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return weights, [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_sam_moves_along_the_gradient_over_all_tensors_together():
    # |g| over (3,) and (4,) is 5, so rho = 0.5 moves them by 0.3 and 0.4.
    weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    gradients = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    (first, second), step = moved(weights, gradients, rho=0.5)
    torch.testing.assert_close(torch.cat([first, second]).tolist(), [0.3, 0.4])
    assert step.grad_norm == 5.0


def test_asam_scales_by_the_squared_weights_over_all_tensors_together():
    # T = |w| + eta = (2, 3); T g = (6, 12), norm sqrt(180); T^2 g = (12, 36).
    weights = [nn.Parameter(torch.tensor([entry], dtype=torch.float64)) for entry in (1.5, -2.5)]
    gradients = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    (first, second), step = moved(weights, gradients, rho=2.0, adaptive=True, eta=0.5)
    expected = [2 * 12 / math.sqrt(180), 2 * 36 / math.sqrt(180)]
    torch.testing.assert_close(torch.cat([first, second]).tolist(), expected)
    assert step.grad_norm == 5.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_perturbation_has_norm_rho(dtype):
    steps, report = moved(*random_problem((40, 30), (7,), (), dtype=dtype), rho=0.05)
    norm = torch.linalg.vector_norm(torch.cat([step.flatten() for step in steps]).double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert norm.item() == pytest.approx(0.05, rel=tolerance)
    assert report.perturbation_norm.item() == pytest.approx(0.05, rel=1e-6)
    assert report.effective_perturbation_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert report.perturbation_cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_asam_without_eta_does_not_see_a_rescaling_of_the_two_factors():
    # The product B A is the same function for (cA, B/c); so is the perturbed one, (B + e_B)(A + e_A).
    A, B, target = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 8), (6, 3), (6, 8)))

    def perturbed_product(scale, adaptive):
        factors = [nn.Parameter(A * scale), nn.Parameter(B / scale)]
        loss = (factors[1] @ factors[0] - target).square().sum()
        gradients = torch.autograd.grad(loss, factors)
        with perturbed(factors, gradients, rho=0.3, adaptive=adaptive, eta=0.0):
            return (factors[1] @ factors[0]).detach()

    torch.testing.assert_close(perturbed_product(1.0, True), perturbed_product(10.0, True), rtol=1e-10, atol=1e-12)
    assert (perturbed_product(1.0, False) - perturbed_product(10.0, False)).norm() > 0.1


@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_leaves_every_weight_as_it_is(adaptive):
    steps, report = moved(*random_problem((5, 4), dtype=torch.float32), rho=0.0, adaptive=adaptive)
    assert not steps[0].any()
    assert report.effective_perturbation_norm == 0
    assert report.perturbation_cosine.isnan()


@pytest.mark.parametrize(("adaptive", "eta"), [(False, 0.0), (True, 0.01)])
def test_zero_gradient_gives_a_zero_finite_step(adaptive, eta):
    weights, gradients = random_problem((5, 4))
    steps, report = moved(weights, [torch.zeros_like(g) for g in gradients], rho=0.05, adaptive=adaptive, eta=eta)
    assert not steps[0].any()
    assert report.finite
    assert report.perturbation_norm == 0


def test_asam_without_eta_does_not_move_when_only_zero_weights_have_gradients():
    # A LoRA B at its initialisation: |T g| = 0 although the gradient is not.
    steps, report = moved([nn.Parameter(torch.zeros(3))], [torch.ones(3)], rho=0.5, adaptive=True, eta=0.0)
    assert not steps[0].any()
    assert report.finite
    assert report.grad_norm.item() == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("magnitude", [1e-41, 1e-30, 2e-13, 1e30])
def test_no_epsilon_in_the_norm_shrinks_the_step_of_a_small_gradient(magnitude):
    steps, _ = moved([nn.Parameter(torch.zeros(2))], [torch.tensor([3.0, 4.0]) * magnitude], rho=0.5)
    tolerance = 1e-3 if magnitude == 1e-41 else 1e-6  # float32 has few digits left below 1e-38
    torch.testing.assert_close(steps[0], torch.tensor([0.3, 0.4]), rtol=tolerance, atol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**16, 3e4])
@pytest.mark.parametrize("adaptive", [False, True])
def test_step_does_not_depend_on_the_loss_scale(scale, adaptive):
    weights, gradients = random_problem((5, 4), (3,))
    plain, _ = moved(weights, gradients, rho=0.05, adaptive=adaptive)
    scaled, _ = moved(weights, [gradient * scale for gradient in gradients], rho=0.05, adaptive=adaptive)
    torch.testing.assert_close(plain, scaled, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_that_is_not_finite_moves_nothing_and_is_reported(bad, adaptive):
    weights, gradients = random_problem((5, 4), (3,))
    gradients[0][2, 1] = bad
    steps, report = moved(weights, gradients, rho=0.05, adaptive=adaptive)
    assert not any(step.any() for step in steps)
    assert not report.finite


def test_weights_are_restored_bit_for_bit_where_subtracting_would_not():
    weight = nn.Parameter(torch.randn(10_000))
    gradient = torch.randn(10_000)
    subtracted = (weight.detach() + 0.05 * gradient / gradient.norm()) - 0.05 * gradient / gradient.norm()
    assert not torch.equal(subtracted, weight)
    moved([weight], [gradient], rho=0.05)  # asserts equality


def test_weights_are_restored_when_the_block_raises():
    weights, gradients = random_problem((5, 4))
    before = weights[0].detach().clone()
    with pytest.raises(KeyError), perturbed(weights, gradients, rho=0.5):
        raise KeyError("inside")
    assert torch.equal(weights[0], before)


def test_parameters_that_are_views_stay_views_of_their_buffer():
    # DeepSpeed keeps parameters as slices of one flat buffer; swapping their storage would detach them.
    buffer = torch.randn(20)
    weight = nn.Parameter(torch.empty(0))
    weight.data = buffer[4:16].view(3, 4)
    before = buffer.clone()
    with perturbed([weight], [torch.ones(3, 4)], rho=0.5):
        assert not torch.equal(buffer[4:16], before[4:16])
        assert torch.equal(buffer[:4], before[:4])
    assert torch.equal(buffer, before)
    assert weight.data_ptr() == buffer[4:].data_ptr()


def test_weights_in_any_memory_layout_move_by_their_own_gradient():
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64).t())
    gradient = torch.randn(6, 4, dtype=torch.float64)
    (step,), _ = moved([weight], [gradient], rho=0.1)
    torch.testing.assert_close(step, 0.1 * gradient / gradient.norm())


def test_a_tensor_given_twice_counts_once():
    weight, gradient = nn.Parameter(torch.zeros(1)), torch.ones(1)
    (step, _), _ = moved([weight, weight], [gradient, gradient], rho=0.5)
    assert step.item() == 0.5


def test_missing_gradients_are_skipped():
    weights, gradients = random_problem((2,), (3,))
    (first, second), _ = moved(weights, [None, gradients[1]], rho=0.5)
    assert not first.any()
    assert second.norm().item() == pytest.approx(0.5)


def test_sparse_gradients_move_their_rows_by_the_dense_ones():
    # Row 1 is there twice: 1 + 2 = 3; with the 4 of row 3 the norm is 5.
    indices, values = torch.tensor([[1, 1, 3]]), torch.tensor([[1.0], [2.0], [4.0]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex64):
        gradient = torch.sparse_coo_tensor(indices, values.to(dtype), (5, 1), check_invariants=True)
        (step,), report = moved([nn.Parameter(torch.zeros(5, 1, dtype=dtype))], [gradient], rho=5.0)
        assert step.flatten().tolist() == pytest.approx([0, 3, 0, 4, 0], rel=1e-6)
        assert report.grad_norm.item() == pytest.approx(5.0)


def test_complex_gradients_that_are_lazily_conjugated_are_followed():
    gradient = torch.tensor([3.0 + 4.0j]).conj()
    assert gradient.is_conj()
    (step,), _ = moved([nn.Parameter(torch.zeros(1, dtype=torch.complex64))], [gradient], rho=0.5)
    assert step.item() == pytest.approx(0.3 - 0.4j)


def test_sparse_weight_is_refused_by_name():
    weight = torch.eye(3).to_sparse()
    with (
        pytest.raises(UserError, match="cannot perturb a weight that is itself sparse"),
        perturbed([weight], [weight], rho=0.1),
    ):
        pass


def test_radii_may_differ_and_share_one_norm():
    weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    gradients = [torch.tensor([entry], dtype=torch.float64) for entry in (2.0, 3.0, 6.0)]  # norm 7
    steps, report = moved(weights, gradients, rho=[7.0, 0.0, 14.0])
    assert [step.item() for step in steps] == pytest.approx([2.0, 0.0, 12.0], rel=1e-12)
    assert report.perturbation_norm.item() == pytest.approx(math.sqrt(148), rel=1e-12)
    with pytest.raises(ValueError, match="zip"), perturbed(weights, gradients, rho=[7.0]):
        pass


def test_no_gradient_at_all_moves_nothing():
    steps, report = moved(random_problem((2,))[0], [None], rho=0.5)
    assert not steps[0].any()
    assert report.perturbation_norm == 0


def test_types_may_be_mixed_and_share_one_norm():
    weights = [nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    gradients = [torch.tensor([entry], dtype=torch.float32) for entry in (2.0, 3.0, 6.0)]  # norm 7
    steps, _ = moved(weights, gradients, rho=7.0)
    assert [step.item() for step in steps] == pytest.approx([2.0, 3.0, 6.0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rho", [0.003, 0.05, 0.5])
def test_rounding_of_16_bit_weights_is_measured(dtype, rho):
    # Reference: w + e in float64, rounded once to the weights' type; then norms and a plain dot product.
    weight = nn.Parameter(torch.randn(64, 128).mul(0.02).to(dtype))
    gradient = torch.randn(64, 128).to(dtype)
    intended = rho * gradient.double() / gradient.double().norm()
    expected = (weight.detach().double() + intended).to(dtype).double() - weight.detach().double()
    with perturbed([weight], [gradient], rho=rho) as report:
        effective = weight.detach().double()
    effective -= weight.detach().double()
    # float32's own rounding can tip a rare tie the other way.
    assert (effective != expected).double().mean() < 1e-3
    norm = effective.norm()
    assert report.effective_perturbation_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    cosine = (effective * intended).sum() / (norm * intended.norm())
    assert report.perturbation_cosine.item() == pytest.approx(cosine.item(), rel=1e-5)
    if dtype == torch.bfloat16 and rho == 0.003:
        assert report.perturbation_cosine < 0.9


def test_forward_under_a_surrounding_autocast_sees_the_perturbed_weights():
    layer, inputs = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clean = layer(inputs)
        with perturbed([layer.weight], [torch.randn(4, 4)], rho=5.0):
            assert not torch.equal(layer(inputs), clean)
        assert torch.equal(layer(inputs), clean)


def test_gradients_are_enabled_inside_the_block_and_only_there_as_before():
    weights, gradients = random_problem((2,))
    with perturbed(weights, gradients, rho=0.1):
        assert (weights[0] * 2).requires_grad
    with torch.no_grad(), perturbed(weights, gradients, rho=0.1):
        assert not (weights[0] * 2).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho must be finite"),
        ({"rho": math.nan}, "rho must be finite"),
        ({"rho": 0.1, "eta": -1.0}, "eta must be finite"),
        ({"rho": 0.1, "sync": "mean"}, "sync must be one of local, global"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    weights, gradients = random_problem((2,))
    with pytest.raises(ValueError, match=message), perturbed(weights, gradients, **settings):
        pass


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_three_float32_copies_of_the_weights(adaptive, dtype):
    entries = 3_000_000
    weights = [nn.Parameter(torch.randn(entries // 3).to(dtype)) for _ in range(3)]
    gradients = [torch.randn(entries // 3).to(dtype) for _ in range(3)]

    def work():
        with perturbed(weights, gradients, rho=0.05, adaptive=adaptive):
            pass

    assert peak_bytes(lambda: torch.zeros(1000)) == 4000  # the measurement itself
    float64_work_area = 8 * 2**20
    peak = peak_bytes(work)
    assert 4 * entries < peak <= 3 * 4 * entries + float64_work_area + 100_000


def test_only_one_copy_of_the_weights_is_held_inside_the_block():
    weight, gradient = nn.Parameter(torch.randn(1_000_000)), torch.randn(1_000_000)
    gradient_alive = weakref.ref(gradient)
    context = perturbed([weight], [gradient], rho=0.05)
    del gradient
    held = sum(allocations(context.__enter__))
    context.__exit__(None, None, None)
    assert 4_000_000 <= held < 4_100_000
    assert gradient_alive() is None


@pytest.mark.gpu
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_on_a_gpu_equals_the_cpu_and_never_waits_for_it(adaptive, dtype):
    weights, gradients = random_problem((300, 40), (7,), dtype=dtype)
    on_gpu = [nn.Parameter(weight.detach().cuda()) for weight in weights]
    gradients_on_gpu = [gradient.cuda() for gradient in gradients]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with perturbed(on_gpu, gradients_on_gpu, rho=0.5, adaptive=adaptive) as report:
            inside = [weight.detach().clone() for weight in on_gpu]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with perturbed(weights, gradients, rho=0.5, adaptive=adaptive) as expected:
        for ours, theirs in zip(inside, weights, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.detach())
    assert report.perturbation_norm.item() == pytest.approx(expected.perturbation_norm.item(), rel=1e-5)
    for ours, theirs in zip(on_gpu, weights, strict=True):
        assert torch.equal(ours.cpu(), theirs)

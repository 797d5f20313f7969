"""Densities of spectra that were put in, and the numbers that sum them up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatpatch.flatness import (
    HessianOperator,
    MatrixOperator,
    Problem,
    Quadrature,
    first_to_fifth,
    kernel_width,
    lanczos,
    quadrature,
    spectral_density,
    spectral_distribution,
    spectrum_statistics,
)
from flatpatch.flatness.basis import random_vectors
from tests.flatness_cases import SPECTRA, TinyTransformer, dense_hessian, symmetric, token_batches, token_loss

BULK = [k / 100 for k in range(-20, 80)] + [8.0, 5.0, 3.0]


def rows_of(*pairs: tuple[float, float]) -> tuple[Tensor, Tensor]:
    nodes, weights = torch.tensor(pairs, dtype=torch.float64).T
    return nodes.unsqueeze(0), weights.unsqueeze(0)


# --- quadrature


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_quadrature_integrates_polynomials_of_degree_2m_minus_1_exactly(law: str) -> None:
    matrix = symmetric(BULK)
    steps = 6
    result = quadrature(MatrixOperator(matrix), num_probes=2, num_steps=steps, law=law, seed=4)
    V = random_vectors(len(BULK), [0, 1], seed=4, device=torch.device("cpu"), law=law)
    V = V / V.norm(dim=0)
    power = V
    for order in range(2 * steps):
        torch.testing.assert_close(result.moments(order), (V * power).sum(dim=0), rtol=1e-10, atol=1e-12)
        power = matrix @ power
    # One degree further it is not exact any more.
    assert not torch.allclose(result.moments(2 * steps), (V * power).sum(dim=0), rtol=1e-10)


def test_as_many_steps_as_dimensions_give_the_spectrum_itself() -> None:
    values = [-2.0, -0.5, 0.1, 1.0, 3.0, 7.0]
    result = quadrature(MatrixOperator(symmetric(values)), num_probes=3, num_steps=50)
    torch.testing.assert_close(result.nodes, torch.tensor([values] * 3, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert result.products == 18


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", ["identity", "rank two", "zero", "repeated"])
def test_probes_stop_when_there_is_nothing_new(spectrum: str, dtype: torch.dtype) -> None:
    values = SPECTRA[spectrum]
    operator = MatrixOperator(symmetric(values, dtype=dtype))
    result = quadrature(operator, num_probes=4, num_steps=11, probes_per_pass=3)
    if spectrum != "repeated":  # whose copies rounding brings in, one by one
        assert result.products <= 4 * (len(set(values)) + 1)
    torch.testing.assert_close(result.weights.sum(dim=1), torch.ones(4, dtype=torch.float64))
    close = (result.nodes.unsqueeze(2) - torch.tensor(sorted(set(values)), dtype=torch.float64)).abs() < 1e-4
    assert (close.any(dim=2) | (result.weights < 1e-10)).all()
    if spectrum == "identity":
        assert result.trace == pytest.approx(len(values), rel=1e-6)


def test_no_ghosts_appear_after_200_steps() -> None:
    """A node that is there twice would count an eigenvalue twice; the outliers here are single."""
    values = [10.0, 7.0, 5.0, 3.0, 2.0] + [k / 400 for k in range(400)]
    result = quadrature(MatrixOperator(symmetric(values, dtype=torch.float32)), num_probes=2, num_steps=200)
    assert result.nodes.shape == (2, 200)
    assert ((result.nodes > 1.5).sum(dim=1) == 5).all()


def test_negative_eigenvalues_are_kept() -> None:
    result = quadrature(MatrixOperator(symmetric([-3.0, -1.0, 0.0, 2.0])), num_probes=1, num_steps=4)
    assert result.nodes[0].tolist() == pytest.approx([-3, -1, 0, 2], abs=1e-12)


def test_mean_over_many_probes_approaches_the_true_distribution() -> None:
    matrix = symmetric(BULK)
    grid = torch.linspace(-1, 9, 300, dtype=torch.float64)
    truth = (torch.tensor(BULK, dtype=torch.float64).unsqueeze(1) <= grid).double().mean(dim=0)
    result = quadrature(MatrixOperator(matrix), num_probes=100, num_steps=103)
    error = (spectral_distribution(result.nodes, result.weights, grid).mean(dim=0) - truth).abs().max()
    # A share p varies between probes by about sqrt(2 p (1 - p) / n) = 0.07 at most; 100 of them leave 0.007.
    assert error < 4 * 0.07 / math.sqrt(100)


def test_density_of_a_transformer_agrees_with_its_dense_hessian() -> None:
    problem = Problem(TinyTransformer(lora=True), token_batches(2, 1), token_loss, scope="adapter")
    dense = dense_hessian(problem)
    result = quadrature(HessianOperator(problem), num_probes=16, num_steps=32)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert float(result.nodes.max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
    assert float(result.nodes.min()) == pytest.approx(float(eigenvalues[0]), rel=1e-8)
    assert abs(result.trace - float(dense.trace())) < 4 * result.trace_standard_error
    assert result.frobenius_norm == pytest.approx(float(dense.norm()), rel=0.5)


def test_known_values_count_once_and_the_probes_see_the_rest_alone() -> None:
    matrix = symmetric(BULK)
    n, k, steps = len(BULK), 2, 5
    known = lanczos(MatrixOperator(matrix), k, tol=1e-2)
    result = quadrature(MatrixOperator(matrix), num_probes=2, num_steps=steps, known=known, seed=4)
    P = torch.eye(n, dtype=torch.float64) - known.vectors @ known.vectors.T
    V = P @ random_vectors(n, [0, 1], seed=4, device=torch.device("cpu"), law="rademacher")
    V = V / V.norm(dim=0)
    power = V
    for order in range(2 * steps):
        expected = (known.values**order).sum() / n + (n - k) / n * (V * power).sum(dim=0)
        torch.testing.assert_close(result.moments(order), expected, rtol=1e-9, atol=1e-12)
        power = P @ matrix @ power
    assert (result.nodes.diff(dim=1) >= 0).all()
    assert result.products == 2 * steps


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_density_is_the_spectrum_itself_when_every_eigenvalue_is_known(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    operator = MatrixOperator(symmetric(values))
    known = lanczos(operator, len(values), max_products=5 * len(values))
    result = quadrature(operator, num_probes=2, known=known)
    truth = torch.tensor([sorted(values)] * 2, dtype=torch.float64)
    torch.testing.assert_close(result.nodes, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.weights, torch.full_like(truth, 1 / len(values)))
    assert result.products == 0


def distance(result: Quadrature, values: list[float]) -> float:
    """Area between two distribution functions (Wasserstein-1), over the mean magnitude: 1 if all were taken as 0."""
    truth = torch.tensor(values, dtype=torch.float64)
    grid = torch.cat([truth, result.nodes.flatten()]).sort().values
    share = spectral_distribution(result.nodes, result.weights, grid).mean(dim=0)
    right = (truth.unsqueeze(1) <= grid).double().mean(dim=0)
    return float(((share - right).abs()[:-1] * grid.diff()).sum() / truth.abs().mean())


def test_with_known_values_a_quarter_of_the_products_comes_closer_to_the_spectrum() -> None:
    values = [25.0, -24.0, 24.0, -23.0, 22.0, -20.0] + [k**3 / 1e6 for k in range(-100, 100)]
    operator = MatrixOperator(symmetric(values))
    plain, better = [], []
    for seed in range(8):
        plain.append(distance(quadrature(operator, seed=seed), values))
        known = lanczos(operator, 6, which="magnitude", tol=5e-2, seed=50 + seed)
        found = quadrature(operator, num_probes=1, num_steps=30, known=known, seed=seed)
        better.append(distance(found, values))
        assert known.products + found.products <= 50  # of 200
    assert sum(better) < 0.5 * sum(plain)


def test_known_vectors_of_another_operator_are_refused() -> None:
    known = lanczos(MatrixOperator(symmetric(BULK)), 1)
    with pytest.raises(ValueError, match="length 103, the operator's size is 4"):
        quadrature(MatrixOperator(torch.eye(4)), known=known)


@pytest.mark.parametrize("together", [1, 2, 5, 16])
def test_probes_do_not_depend_on_how_many_advance_together(together: int) -> None:
    operator = MatrixOperator(symmetric(BULK))
    one = quadrature(operator, num_probes=5, num_steps=10, probes_per_pass=1)
    other = quadrature(operator, num_probes=5, num_steps=10, probes_per_pass=together)
    torch.testing.assert_close(one.nodes, other.nodes, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-9, atol=1e-12)
    more = quadrature(operator, num_probes=7, num_steps=10, probes_per_pass=together)
    torch.testing.assert_close(more.nodes[:5], one.nodes, rtol=1e-9, atol=1e-12)


def test_an_interrupted_quadrature_is_continued_and_can_be_given_more_probes(tmp_path: Path) -> None:
    operator = MatrixOperator(symmetric(BULK))
    options: dict[str, Any] = {"num_steps": 10, "checkpoint": tmp_path / "density.pt"}
    undisturbed = quadrature(operator, num_probes=4, num_steps=10)

    def stop(done: int, total: int, line: str) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quadrature(operator, num_probes=4, progress=stop, **options)
    operator.products = 0
    resumed = quadrature(operator, num_probes=4, **options)
    assert torch.equal(resumed.nodes, undisturbed.nodes)
    assert torch.equal(resumed.weights, undisturbed.weights)
    assert resumed.products == undisturbed.products == 40
    assert operator.products == 20
    assert quadrature(operator, num_probes=6, **options).nodes.shape == (6, 10)
    with pytest.raises(ValueError, match="differing: settings"):
        quadrature(operator, num_probes=4, num_steps=9, checkpoint=tmp_path / "density.pt")


def test_trace_of_one_probe_has_no_standard_error() -> None:
    result = quadrature(MatrixOperator(symmetric(BULK)), num_probes=1, num_steps=5)
    assert math.isnan(result.trace_standard_error)
    assert json.loads(json.dumps(result.as_dict()))["trace_standard_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "uniform"}, "law must be one of rademacher, gaussian, got 'uniform'"),
        ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"probes_per_pass": 0}, "probes_per_pass must be at least 1, got 0"),
    ],
)
def test_quadrature_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quadrature(MatrixOperator(torch.eye(4)), **options)


# --- curves


def test_sigma_is_a_standard_deviation() -> None:
    nodes, weights = rows_of((1.0, 1.0))
    grid = torch.linspace(-1, 3, 4001, dtype=torch.float64)
    density = spectral_density(nodes, weights, grid, sigma=0.2)
    assert float(density.max()) == pytest.approx(1 / (0.2 * math.sqrt(2 * math.pi)), rel=1e-6)
    assert float(torch.trapezoid(density * (grid - 1) ** 2, grid)) == pytest.approx(0.2**2, rel=1e-6)


def test_density_integrates_to_one_and_gives_each_peak_its_mass() -> None:
    nodes, weights = rows_of((0.0, 0.75), (2.0, 0.2), (4.0, 0.05))
    grid = torch.linspace(-2, 6, 8001, dtype=torch.float64)
    density = spectral_density(nodes, weights, grid, sigma=0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, rel=1e-9)
    for low, high, mass in ((-1, 1, 0.75), (1, 3, 0.2), (3, 5, 0.05)):
        inside = (grid > low) & (grid < high)
        assert float(torch.trapezoid(density[inside], grid[inside])) == pytest.approx(mass, rel=1e-6)


def test_probes_are_averaged() -> None:
    nodes = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    grid = torch.linspace(-1, 4, 100, dtype=torch.float64)
    apart = [spectral_density(nodes[i : i + 1], weights[i : i + 1], grid, sigma=0.3) for i in (0, 1)]
    torch.testing.assert_close(spectral_density(nodes, weights, grid, sigma=0.3), (apart[0] + apart[1]) / 2)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e5])
def test_density_of_a_scaled_loss_is_the_same_curve_on_a_scaled_axis(scale: float) -> None:
    """An absolute least width would make one blob of every model whose eigenvalues are small."""
    grid = torch.linspace(-1, 9, 200, dtype=torch.float64)
    curves = []
    for factor in (1.0, scale):
        result = quadrature(MatrixOperator(factor * symmetric(BULK)), num_probes=2, num_steps=20)
        width = kernel_width(result.nodes)
        curves.append(factor * spectral_density(result.nodes, result.weights, factor * grid, sigma=width))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-6, atol=1e-9)


def test_kernel_width_is_a_fraction_of_the_range_and_never_zero() -> None:
    assert kernel_width(torch.tensor([[-2.0, 3.0]])) == pytest.approx(0.05)
    assert kernel_width(torch.tensor([[4.0, 4.0]]), 0.5) == pytest.approx(2)
    assert kernel_width(torch.zeros(1, 3)) > 0
    with pytest.raises(ValueError, match="fraction must be positive"):
        kernel_width(torch.ones(1, 2), 0)


def test_distribution_is_the_step_function_of_each_probe() -> None:
    nodes = torch.tensor([[0.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75], [0.6, 0.4]], dtype=torch.float64)
    grid = torch.tensor([-1.0, 0.0, 0.7, 1.0, 3.0])
    expected = [[0, 0.25, 0.25, 1, 1], [0, 0, 0.6, 0.6, 1]]
    torch.testing.assert_close(spectral_distribution(nodes, weights, grid), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        (torch.zeros(1, 2), torch.tensor([[0.5, 0.4]])),
        (torch.zeros(1, 2), torch.tensor([[1.5, -0.5]])),
        (torch.zeros(2), torch.tensor([0.5, 0.5])),
        (torch.zeros(1, 3), torch.tensor([[0.5, 0.5]])),
    ],
)
def test_weights_that_are_no_probability_vectors_are_refused(nodes: Tensor, weights: Tensor) -> None:
    grid = torch.linspace(0, 1, 3)
    with pytest.raises(ValueError, match="weights"):
        spectral_density(nodes, weights, grid, sigma=1.0)
    with pytest.raises(ValueError, match="weights"):
        spectral_distribution(nodes, weights, grid)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_width_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        spectral_density(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), sigma=sigma)


# --- statistics


def test_statistics_of_a_hand_worked_spectrum() -> None:
    found = spectrum_statistics(torch.tensor([10.0, 5.0, 0.9, 0.1, 0.0, 0.0, 0.0, -1e-9, -2.0, -2.0]))
    assert (found.largest, found.smallest) == (10, -2)
    assert found.trace == pytest.approx(12)
    assert found.negative_mass == pytest.approx(0.2)  # of ten eigenvalues two; the third is rounding
    assert found.negative_weight == pytest.approx(4 / 20)
    assert found.outliers == 2
    assert found.effective_rank == pytest.approx(20**2 / (100 + 25 + 0.81 + 0.01 + 4 + 4))
    assert found.threshold == pytest.approx(1e-5)


@pytest.mark.parametrize("equal", [1, 3, 10])
def test_effective_rank_counts_equal_eigenvalues(equal: int) -> None:
    found = spectrum_statistics(torch.tensor([2.0] * equal + [0.0] * (10 - equal)))
    assert found.effective_rank == pytest.approx(equal)
    assert found.outliers == equal


def test_statistics_of_a_zero_spectrum_are_zero() -> None:
    found = spectrum_statistics(torch.zeros(4))
    assert (found.effective_rank, found.outliers, found.negative_mass, found.negative_weight) == (0, 0, 0, 0)


def test_statistics_from_a_quadrature_agree_with_those_of_the_spectrum() -> None:
    exact = spectrum_statistics(torch.tensor(BULK))
    estimate = spectrum_statistics(quadrature(MatrixOperator(symmetric(BULK)), num_probes=100, num_steps=60))
    assert estimate.largest == pytest.approx(exact.largest)
    assert estimate.outliers == pytest.approx(3, abs=0.5)
    assert estimate.negative_mass == pytest.approx(exact.negative_mass, abs=0.03)
    # The largest eigenvalue has most of the sum of squares, and its weight varies by sqrt(2) between probes.
    assert estimate.effective_rank == pytest.approx(exact.effective_rank, rel=0.25)
    assert estimate.trace == pytest.approx(exact.trace, rel=0.1)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_statistics_of_a_scaled_spectrum_differ_in_scale_alone(scale: float) -> None:
    plain, scaled = (spectrum_statistics(s * torch.tensor(BULK, dtype=torch.float64)) for s in (1.0, scale))
    for name in ("negative_mass", "negative_weight", "outliers", "effective_rank"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name)), name
    assert scaled.trace == pytest.approx(scale * plain.trace)


def test_padding_nodes_do_not_count() -> None:
    nodes = torch.tensor([[1.0, 99.0]], dtype=torch.float64)
    found = spectrum_statistics(Quadrature(nodes, torch.tensor([[1.0, 0.0]], dtype=torch.float64), 5, 1))
    assert (found.largest, found.trace) == (1, 5)


def test_nodes_within_the_error_of_the_products_count_as_zero() -> None:
    nodes = torch.tensor([[-0.3, -0.01, 2.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    exact, rough = (spectrum_statistics(Quadrature(nodes, weights, 4, 3, error=error)) for error in (0.0, 0.05))
    assert (exact.negative_mass, rough.negative_mass) == (0.75, 0.25)
    assert rough.threshold == 0.05


@pytest.mark.parametrize("options", [{"outlier_fraction": 1.0}, {"outlier_fraction": -0.1}, {"rounding": 2.0}])
def test_shares_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and less than 1"):
        spectrum_statistics(torch.ones(3), **options)
    with pytest.raises(ValueError, match="empty"):
        spectrum_statistics(torch.zeros(0))


def test_ratio_of_first_to_fifth_sorts_and_survives_zeros() -> None:
    assert first_to_fifth(torch.tensor([2.0, 10.0, 4.0, 3.0, 5.0, 1.0])) == 5
    assert first_to_fifth(torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])) == math.inf
    assert first_to_fifth(torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0])) == -2
    assert math.isnan(first_to_fifth(torch.zeros(5)))
    with pytest.raises(ValueError, match="needs five eigenvalues, got 4"):
        first_to_fifth(torch.ones(4))

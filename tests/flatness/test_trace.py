"""Traces of known matrices, and standard errors that mean what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.flatness import (
    Eigenpairs,
    HessianOperator,
    MatrixOperator,
    Problem,
    Trace,
    hutch_plus_plus,
    hutchinson,
    lanczos,
    quadrature,
    xtrace,
)
from flatpatch.flatness.basis import random_vectors
from tests.flatness_cases import SPECTRA, TinyTransformer, dense_hessian, symmetric, token_batches, token_loss

DECAYING = [100.0 / k**2 for k in range(1, 201)]


def test_random_signs_give_the_trace_of_a_diagonal_matrix_exactly() -> None:
    operator = MatrixOperator(torch.diag(torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)))
    found = hutchinson(operator, num_probes=5)
    assert found.value == pytest.approx(4.5, rel=1e-14)
    assert found.standard_error == pytest.approx(0, abs=1e-14)


def test_standard_error_is_that_of_the_known_variance() -> None:
    matrix = symmetric(DECAYING)
    found = hutchinson(MatrixOperator(matrix), num_probes=2000)
    variance = 2 * (matrix.norm() ** 2 - matrix.diag().norm() ** 2)
    assert found.standard_error == pytest.approx(float(torch.sqrt(variance / 2000)), rel=0.1)
    assert abs(found.value - sum(DECAYING)) < 4 * found.standard_error
    assert found.products == 2000


@pytest.mark.parametrize("estimator", ["hutchinson", "hutch_plus_plus", "xtrace"])
def test_truth_lies_within_two_standard_errors_in_most_runs(estimator: str) -> None:
    operator = MatrixOperator(symmetric([k / 100 for k in range(-50, 150)]))
    truth = float(operator.matrix.trace())
    inside = 0
    for seed in range(100):
        if estimator == "hutchinson":
            found = hutchinson(operator, num_probes=30, seed=seed)
        elif estimator == "xtrace":
            found = xtrace(operator, num_products=60, seed=seed)
        else:
            found = hutch_plus_plus(operator, num_products=90, seed=seed)
        inside += abs(found.value - truth) <= 2 * found.standard_error
    assert inside >= 88  # 95 of 100 are expected, with a standard deviation of 2.2


def test_hutch_plus_plus_is_exact_for_low_rank_and_better_for_decaying_spectra() -> None:
    low = hutch_plus_plus(MatrixOperator(symmetric([5.0, -3.0, 1.0] + [0.0] * 40)), num_products=15)
    assert low.value == pytest.approx(3, rel=1e-10)
    assert low.standard_error == pytest.approx(0, abs=1e-10)
    assert low.products == 15
    operator = MatrixOperator(symmetric(DECAYING))
    errors: dict[str, list[float]] = {"plain": [], "plus": []}
    for seed in range(20):
        errors["plain"].append(hutchinson(operator, num_probes=30, seed=seed).value - sum(DECAYING))
        errors["plus"].append(hutch_plus_plus(operator, num_products=30, seed=seed).value - sum(DECAYING))
    size = {name: math.sqrt(sum(e**2 for e in found) / 20) for name, found in errors.items()}
    assert size["plus"] < 0.25 * size["plain"]


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_hutch_plus_plus_survives_every_spectrum_and_is_exact_when_it_sketches_everything(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    found = hutch_plus_plus(MatrixOperator(symmetric(values)), num_products=3 * len(values))
    assert found.value == pytest.approx(sum(values), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("count", [3, 12])
def test_xtraces_samples_are_those_of_each_vector_left_out_in_turn(count: int) -> None:
    matrix = symmetric([10.0, -6.0, 3.0] + [k / 20 for k in range(-10, 20)])
    n = len(matrix)
    V = random_vectors(n, list(range(count)), seed=5, device=torch.device("cpu"))
    samples = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        Q = torch.linalg.qr(matrix @ V[:, others])[0]
        x = V[:, i] - Q @ (Q.T @ V[:, i])
        x = x * math.sqrt(n - count + 1) / x.norm()
        samples.append(float((Q.T @ matrix @ Q).trace() + x @ matrix @ x))
    found = xtrace(MatrixOperator(matrix), num_products=2 * count + 1, seed=5)
    torch.testing.assert_close(found.samples, torch.tensor(samples, dtype=torch.float64), rtol=1e-10, atol=0)
    assert found.value == pytest.approx(sum(samples) / count, rel=1e-12)
    assert found.products == 2 * count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_xtrace_is_exact_for_a_rank_below_its_vectors(dtype: torch.dtype) -> None:
    operator = MatrixOperator(symmetric([5.0, -3.0, 1.0] + [0.0] * 40, dtype=dtype))
    for vectors in (4, 9):
        found = xtrace(operator, num_products=2 * vectors)
        exact = 1e-10 if dtype == torch.float64 else 1e-5
        assert found.value == pytest.approx(3, rel=exact)
        assert found.standard_error == pytest.approx(0, abs=exact)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_xtrace_survives_every_spectrum_and_is_exact_when_it_sketches_everything(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    found = xtrace(MatrixOperator(symmetric(values)), num_products=2 * len(values) + 4)
    assert found.value == pytest.approx(sum(values), rel=1e-9, abs=1e-9)


def test_xtrace_has_no_bias_and_of_an_indefinite_led_spectrum_a_quarter_of_the_error() -> None:
    """As of a Hessian over LoRA's factors: pairs of opposite sign lead, and the trace is what they leave over."""
    values = [25.0, -24.0, 24.0, -23.0, 22.0, -20.0] + [k / 100 for k in range(-90, 110)]
    operator = MatrixOperator(symmetric(values))
    found = torch.tensor([xtrace(operator, num_products=30, seed=seed).value for seed in range(200)]) - sum(values)
    plain = torch.tensor([hutchinson(operator, num_probes=30, seed=seed).value for seed in range(50)]) - sum(values)
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(200)
    assert float(found.square().mean().sqrt()) < 0.25 * float(plain.square().mean().sqrt())


def _pairs(matrix: torch.Tensor, vectors: torch.Tensor) -> Eigenpairs:
    """Any orthonormal vectors with their Rayleigh quotients, as a search that has not converged leaves them."""
    values = ((matrix @ vectors) * vectors).sum(dim=0)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    return Eigenpairs(values, vectors, residuals, residuals < 1e-9, 0, 1e-9)


@pytest.mark.parametrize("source", ["lanczos", "random"])
def test_known_vectors_leave_the_expectation_and_reduce_the_variance_as_they_should(source: str) -> None:
    matrix = symmetric(DECAYING)
    operator = MatrixOperator(matrix)
    if source == "lanczos":
        known = lanczos(operator, 3, tol=1e-2, seed=5)
    else:
        known = _pairs(matrix, torch.linalg.qr(torch.randn(200, 7, dtype=torch.float64))[0])
    found = hutchinson(operator, num_probes=2000, known=known, seed=1)
    P = torch.eye(200, dtype=torch.float64) - known.vectors @ known.vectors.T
    rest = P @ matrix @ P
    variance = 2 * (rest.norm() ** 2 - rest.diag().norm() ** 2)
    assert found.products == 2000
    assert found.standard_error == pytest.approx(float(torch.sqrt(variance / 2000)), rel=0.1)
    assert abs(found.value - sum(DECAYING)) < 4 * found.standard_error
    if source == "lanczos":
        assert found.standard_error < 0.2 * hutchinson(operator, num_probes=2000, seed=1).standard_error


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_trace_is_exact_when_every_eigenvalue_is_known(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    operator = MatrixOperator(symmetric(values))
    known = lanczos(operator, len(values), max_products=5 * len(values))
    found = hutchinson(operator, num_probes=3, known=known)
    assert found.value == pytest.approx(sum(values), rel=1e-9, abs=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_known_vectors_that_cannot_be_are_refused() -> None:
    matrix = symmetric(DECAYING)
    vectors = torch.linalg.qr(torch.randn(200, 2, dtype=torch.float64))[0]
    leaning = vectors.clone()
    leaning[:, 1] = (vectors[:, 0] + vectors[:, 1]) / math.sqrt(2)
    for wrong in (leaning, 2 * vectors):
        with pytest.raises(ValueError, match="not orthonormal"):
            hutchinson(MatrixOperator(matrix), known=_pairs(matrix, wrong))
    with pytest.raises(ValueError, match="length 200, the operator's size is 4"):
        hutchinson(MatrixOperator(torch.eye(4)), known=_pairs(matrix, vectors))


def test_traces_of_a_transformer_agree_with_its_dense_hessian() -> None:
    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    truth = float(dense_hessian(problem).trace())
    operator = HessianOperator(problem)
    for found in (
        hutchinson(operator, num_probes=60),
        hutch_plus_plus(operator, num_products=60),
        xtrace(operator, num_products=60),
    ):
        assert abs(found.value - truth) < 4 * found.standard_error
        assert found.standard_error < 0.5 * abs(truth)


def test_quadrature_and_hutchinson_see_the_same_trace_with_the_same_probes() -> None:
    operator = MatrixOperator(symmetric(DECAYING))
    density = quadrature(operator, num_probes=6, num_steps=3, seed=2)
    trace = hutchinson(operator, num_probes=6, seed=2)
    assert density.trace == pytest.approx(trace.value, rel=1e-12)
    assert density.trace_standard_error == pytest.approx(trace.standard_error, rel=1e-10)


@pytest.mark.parametrize("together", [1, 4, 16])
def test_samples_do_not_depend_on_how_many_are_taken_together(together: int) -> None:
    operator = MatrixOperator(symmetric(DECAYING))
    one = hutchinson(operator, num_probes=10)
    other = hutchinson(operator, num_probes=10, probes_per_pass=together)
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-12, atol=0)
    for estimator in (hutch_plus_plus, xtrace):
        pair = [estimator(operator, num_products=31, probes_per_pass=p).value for p in (1, together)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-10)


def test_it_stops_when_the_standard_error_is_small_enough_and_not_before() -> None:
    operator = MatrixOperator(symmetric([1.0 + k / 200 for k in range(200)]))
    found = hutchinson(operator, num_probes=5000, tol=0.01)
    assert 8 <= found.products < 5000
    assert found.standard_error <= 0.01 * abs(found.value)
    before = found.samples[:-1]
    assert len(before) < 8 or float(before.std()) / math.sqrt(len(before)) > 0.01 * abs(float(before.mean()))
    assert hutchinson(operator, num_probes=20, tol=1e-9).products == 20


def test_interrupted_samples_are_continued(tmp_path: Path) -> None:
    operator = MatrixOperator(symmetric(DECAYING))
    path = tmp_path / "trace.pt"

    def stop(done: int, total: int, line: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hutchinson(operator, num_probes=10, checkpoint=path, progress=stop)
    operator.products = 0
    resumed = hutchinson(operator, num_probes=10, checkpoint=path)
    assert resumed.as_dict() == hutchinson(MatrixOperator(operator.matrix), num_probes=10).as_dict()
    assert operator.products == 4
    with pytest.raises(ValueError, match="differing: settings"):
        hutchinson(operator, num_probes=10, seed=1, checkpoint=path)
    with pytest.raises(ValueError, match="differing: settings"):
        hutchinson(operator, num_probes=10, known=lanczos(operator, 2), checkpoint=path)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("stop_after", [1, 4, 8, 10, 17, 28])
@pytest.mark.parametrize("estimator", [hutch_plus_plus, xtrace])
def test_an_interrupted_sketch_ends_like_an_undisturbed_one(
    tmp_path: Path, estimator: Any, stop_after: int, together: int
) -> None:
    operator = MatrixOperator(symmetric(DECAYING))
    options: dict[str, Any] = {"num_products": 30, "probes_per_pass": together}
    undisturbed = estimator(operator, **options)
    assert operator.products == undisturbed.products == 30
    path = tmp_path / "trace.pt"

    def stop(done: int, total: int, line: str) -> None:
        if done >= stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimator(operator, checkpoint=path, save_every=0, progress=stop, **options)
    operator.products = 0
    assert estimator(operator, checkpoint=path, save_every=0, **options).as_dict() == undisturbed.as_dict()
    assert operator.products <= 30 - stop_after
    operator.products = 0
    assert estimator(operator, checkpoint=path, **options).as_dict() == undisturbed.as_dict()
    assert operator.products == 0
    with pytest.raises(ValueError, match="differing: settings"):
        estimator(operator, checkpoint=path, num_products=33)
    with pytest.raises(ValueError, match="differing: algorithm, settings"):
        hutchinson(operator, checkpoint=path)


def test_one_sample_has_no_standard_error() -> None:
    found = hutchinson(MatrixOperator(symmetric(DECAYING)), num_probes=1)
    assert math.isnan(found.standard_error)
    assert json.loads(json.dumps(found.as_dict()))["standard_error"] is None
    assert isinstance(found, Trace)


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (hutchinson, {"num_probes": 0}, "num_probes must be at least 1, got 0"),
        (hutchinson, {"probes_per_pass": 0}, "probes_per_pass must be at least 1, got 0"),
        (hutch_plus_plus, {"num_products": 2}, "num_products must be at least 3, got 2"),
        (xtrace, {"num_products": 1}, "num_products must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(estimator: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator(MatrixOperator(torch.eye(4)), **options)

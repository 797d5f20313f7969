"""Eigenvalues against spectra that were put in, with residuals that can be recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.flatness import (
    Eigenpairs,
    HessianOperator,
    MatrixOperator,
    Problem,
    batch_eigenvalues,
    best_block_size,
    lanczos,
    power_iteration,
    supervised_loss,
)
from flatpatch.flatness.basis import Basis, orthonormal_columns
from tests.flatness_cases import SPECTRA, Quadratic, TinyTransformer, dense_hessian, mlp, rows, symmetric, token_batches
from tests.flatness_cases import token_loss as tokens

CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def expected_values(values: list[float], k: int, which: str) -> list[float]:
    key = {"largest": lambda x: -x, "smallest": lambda x: x, "magnitude": lambda x: -abs(x)}[which]
    return sorted(values, key=key)[:k]


def true_residuals(matrix: Tensor, pairs: Eigenpairs) -> Tensor:
    X = pairs.vectors.double()
    return (matrix.double() @ X - X * pairs.values).norm(dim=0)


# --- Lanczos


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize(
    ("spectrum", "block_size"),
    # A block narrower than an eigenvalue is multiple need not see it as often as it occurs.
    [(name, width) for name in SPECTRA for width in (1, 2, 3) if name != "repeated" or width == 3],
)
def test_lanczos_finds_the_ends_of_any_spectrum(spectrum: str, block_size: int, which: str) -> None:
    values = SPECTRA[spectrum]
    matrix = symmetric(values)
    pairs = lanczos(MatrixOperator(matrix), 4, which=which, block_size=block_size, tol=1e-8, max_products=500)
    scale = max(abs(v) for v in values)
    assert pairs.converged.all()
    # The sign of two values of the same magnitude is left to rounding: compare what can be compared.
    found = pairs.values.abs() if which == "magnitude" else pairs.values
    expected = torch.tensor(expected_values(values, 4, which), dtype=torch.float64)
    torch.testing.assert_close(
        found, expected.abs() if which == "magnitude" else expected, rtol=1e-9, atol=1e-12 * scale
    )
    assert (true_residuals(matrix, pairs) <= pairs.residuals + 1e-12 * scale).all()
    X = pairs.vectors
    torch.testing.assert_close(X.T @ X, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("block_size", [1, 2])
def test_lanczos_stops_early_on_identity_and_low_rank(block_size: int) -> None:
    identity = MatrixOperator(torch.eye(50, dtype=torch.float64))
    assert lanczos(identity, 3, block_size=block_size).values.tolist() == pytest.approx([1, 1, 1])
    assert identity.products <= 6
    low_rank = MatrixOperator(symmetric([3.0, 1.0] + [0.0] * 48))
    assert lanczos(low_rank, 3, block_size=block_size).values.tolist() == pytest.approx([3, 1, 0], abs=1e-13)
    assert low_rank.products <= 6
    zero = MatrixOperator(torch.zeros(50, 50))
    assert lanczos(zero, 2, block_size=block_size).values.tolist() == [0, 0]
    assert zero.products <= 4


def test_no_ghosts_appear_after_200_steps() -> None:
    """Without full reorthogonalisation the largest value is back after about 20 steps, and again and again."""
    values = [10.0, 7.0, 5.0, 3.0, 2.0] + [k / 400 for k in range(400)]
    matrix = symmetric(values, dtype=torch.float32)
    operator = MatrixOperator(matrix)
    pairs = lanczos(operator, 5, tol=1e-30, max_products=200)
    assert operator.products >= 200 or pairs.converged.all()
    torch.testing.assert_close(pairs.values, torch.tensor(values[:5], dtype=torch.float64), rtol=1e-5, atol=0)
    operator = MatrixOperator(matrix)
    many = lanczos(operator, 40, tol=1e-30, max_products=200)
    assert operator.products == 200
    assert int((many.values > 1.5).sum()) == 5


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_a_block_sees_a_multiple_eigenvalue_at_least_as_often_as_it_is_wide(block_size: int) -> None:
    values = [9.0] * 3 + [5.0] * 2 + [k / 100 for k in range(200)]
    matrix = symmetric(values)
    pairs = lanczos(MatrixOperator(matrix), 5, block_size=block_size, tol=1e-3)
    copies = int((pairs.values > 8.9).sum())
    assert min(block_size, 3) <= copies <= 3  # more than three would be ghosts
    assert pairs.converged.all()
    X = pairs.vectors[:, :copies]
    torch.testing.assert_close(X.T @ X, torch.eye(copies, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix @ X, 9 * X, rtol=0, atol=9e-3)


def test_unconverged_values_are_flagged_and_lie_within_their_residual_of_the_truth() -> None:
    values = [1.0 + 0.001 * k for k in range(300)]
    matrix = symmetric(values)
    pairs = lanczos(MatrixOperator(matrix), 5, tol=1e-6, max_products=12)
    assert not pairs.converged.any()
    assert pairs.products == 12
    torch.testing.assert_close(pairs.residuals, true_residuals(matrix, pairs), rtol=1e-6, atol=1e-12)
    distance = (pairs.values.unsqueeze(1) - torch.tensor(values, dtype=torch.float64)).abs().min(dim=1).values
    assert (distance <= pairs.residuals).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_a_value_is_better_than_its_residual(tol: float) -> None:
    values = [8.0, 6.0, 4.0, 3.0, 2.0] + [k / 300 for k in range(300)]
    pairs = lanczos(MatrixOperator(symmetric(values)), 5, tol=tol)
    truth = torch.tensor(values[:5], dtype=torch.float64)
    assert pairs.converged.all()
    assert (pairs.residuals <= tol * truth).all()
    # The smallest gap is 1, so the error is at most residual^2 / gap, with room for that of the residual.
    assert ((pairs.values - truth).abs() <= 4 * pairs.residuals**2 + 1e-12).all()


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_restarts_give_what_an_unlimited_basis_gives(which: str, block_size: int) -> None:
    values = [k**1.5 / 100 for k in range(-60, 140) if k > 0] + [-(k**1.3) / 50 for k in range(60)]
    operator = MatrixOperator(symmetric(values))
    whole = lanczos(operator, 4, which=which, tol=1e-7, block_size=block_size)
    small = lanczos(operator, 4, which=which, tol=1e-7, block_size=block_size, basis_size=20, max_products=2000)
    assert small.converged.all()
    assert small.products > 20
    torch.testing.assert_close(small.values, whole.values, rtol=1e-10, atol=1e-12)
    assert (true_residuals(operator.matrix, small) <= small.residuals + 1e-10).all()


def test_negative_eigenvalues_are_kept() -> None:
    operator = MatrixOperator(symmetric([-7.0, -2.0, 0.5, 3.0, 6.0, 0.0, 0.1]))
    assert lanczos(operator, 2, which="magnitude", tol=1e-9).values.tolist() == pytest.approx([-7, 6])
    assert lanczos(operator, 2, which="smallest", tol=1e-9).values.tolist() == pytest.approx([-7, -2])
    assert lanczos(operator, 2, which="largest", tol=1e-9).values.tolist() == pytest.approx([6, 3])
    assert float(power_iteration(operator, tol=1e-9, max_products=500).values) == pytest.approx(-7)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e6])
def test_scaled_operator_has_scaled_eigenvalues_after_as_many_products(scale: float) -> None:
    matrix = symmetric([5.0, 4.0, 3.0, 2.0, 1.0] + [k / 100 for k in range(80)])
    plain, scaled = (lanczos(MatrixOperator(s * matrix), 5) for s in (1.0, scale))
    torch.testing.assert_close(scaled.values, scale * plain.values, rtol=1e-10, atol=0)
    assert scaled.products == plain.products


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_eigenvalues_of_a_transformer_match_its_dense_hessian(which: str, block_size: int) -> None:
    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), tokens)
    dense = torch.linalg.eigvalsh(dense_hessian(problem))
    pairs = lanczos(HessianOperator(problem), 5, which=which, block_size=block_size, tol=1e-8)
    expected = dense.flip(0)[:5] if which == "largest" else dense[:5]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-12)


def test_basis_may_be_kept_elsewhere() -> None:
    operator = MatrixOperator(symmetric([3.0, 2.0, 1.0, 0.5, 0.1]))
    assert torch.equal(lanczos(operator, 2, basis_device="cpu").values, lanczos(operator, 2).values)


@pytest.mark.parametrize("basis_size", [None, 16])
@pytest.mark.parametrize("stop_after", [1, 5, 17, 25])
def test_an_interrupted_search_ends_like_an_undisturbed_one(
    tmp_path: Path, stop_after: int, basis_size: int | None
) -> None:
    operator = MatrixOperator(symmetric([k**1.2 for k in range(120)]))
    options: dict[str, Any] = {"tol": 1e-6, "basis_size": basis_size, "max_products": 60}
    undisturbed = lanczos(operator, 3, **options)
    path = tmp_path / "search.pt"

    def stop(done: int, total: int, line: str) -> None:
        if done >= stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lanczos(operator, 3, checkpoint=path, save_every=0, progress=stop, **options)
    assert path.exists() or stop_after == 1
    operator.products = 0
    resumed = lanczos(operator, 3, checkpoint=path, save_every=0, **options)
    assert torch.equal(resumed.values, undisturbed.values)
    assert torch.equal(resumed.vectors, undisturbed.vectors)
    assert resumed.products == undisturbed.products
    assert operator.products <= undisturbed.products - stop_after + 1
    operator.products = 0
    assert torch.equal(lanczos(operator, 3, checkpoint=path, **options).values, undisturbed.values)
    assert operator.products == 0  # the finished search is read, not repeated
    assert [p.name for p in tmp_path.iterdir()] == ["search.pt"]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("stop_after", [1, 7, 45, 110])
def test_an_interrupted_power_iteration_ends_like_an_undisturbed_one(
    tmp_path: Path, stop_after: int, given: bool
) -> None:
    operator = MatrixOperator(symmetric([5.0, -4.0, 3.0, 2.0, *[0.1 * k for k in range(10)]]))
    options: dict[str, Any] = {"tol": 1e-8, "start": torch.ones(14, dtype=torch.float64) if given else None}
    undisturbed = power_iteration(operator, 3, **options)
    assert undisturbed.products > 110
    path = tmp_path / "search.pt"
    count = 0

    def stop(done: int, total: int, line: str) -> None:
        nonlocal count
        count += 1
        if count == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        power_iteration(operator, 3, checkpoint=path, save_every=0, progress=stop, **options)
    operator.products = 0
    resumed = power_iteration(operator, 3, checkpoint=path, **options)
    assert torch.equal(resumed.values, undisturbed.values)
    assert torch.equal(resumed.vectors, undisturbed.vectors)
    assert torch.equal(resumed.residuals, undisturbed.residuals)
    assert resumed.products == undisturbed.products
    assert operator.products <= undisturbed.products - stop_after + 1
    operator.products = 0
    assert torch.equal(power_iteration(operator, 3, checkpoint=path, **options).values, undisturbed.values)
    assert operator.products == 0
    with pytest.raises(ValueError, match=".differing: settings"):
        power_iteration(operator, 2, checkpoint=path, **options)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    operator = MatrixOperator(symmetric([3.0, 2.0, 1.0, 0.5]))
    path = tmp_path / "search.pt"
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="search.pt is not a checkpoint"):
            lanczos(operator, 2, checkpoint=path)
        assert path.read_bytes() == content
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        lanczos(operator, 2, checkpoint=path)


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    operator = MatrixOperator(symmetric([3.0, 2.0, 1.0, 0.5]))
    path = tmp_path / "search.pt"
    lanczos(operator, 2, checkpoint=path)
    with pytest.raises(ValueError, match=".differing: settings"):
        lanczos(operator, 3, checkpoint=path)
    operator.matrix[0, 0] += 1e-12
    with pytest.raises(ValueError, match=".differing: matrix"):
        lanczos(operator, 2, checkpoint=path)


def test_progress_is_reported_after_every_step() -> None:
    calls: list[tuple[int, int, str]] = []
    lanczos(
        MatrixOperator(symmetric([k**1.1 for k in range(60)])), 2, max_products=50, progress=lambda *a: calls.append(a)
    )
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total, _ in calls} == {50}
    assert calls[-1][2] == "2 of 2 converged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k must be between 1 and the dimension 4, got 5"),
        ({"k": 0}, "k must be between 1 and the dimension 4, got 0"),
        ({"k": 2, "tol": 0}, "tol must be positive"),
        ({"k": 2, "tol": float("nan")}, "tol must be positive"),
        ({"k": 2, "max_products": 0}, "max_products must be at least 1"),
    ],
)
@pytest.mark.parametrize("algorithm", [lanczos, power_iteration])
def test_settings_out_of_range_are_refused(algorithm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(MatrixOperator(torch.eye(4)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "top"}, "which must be one of largest, smallest, magnitude, got 'top'"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"basis_size": 3}, "basis_size must be at least"),
    ],
)
def test_lanczos_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(torch.eye(9)), 2, **options)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_eigenvalues_of_a_tiny_operator_are_found(n: int) -> None:
    values = [float(v) for v in range(n, 0, -1)]
    for block_size in (1, 2):
        pairs = lanczos(MatrixOperator(symmetric(values)), n, block_size=block_size)
        assert pairs.values.tolist() == pytest.approx(values)
        assert pairs.converged.all()


def test_results_can_be_written_to_a_file() -> None:
    import json

    pairs = lanczos(MatrixOperator(symmetric([3.0, 2.0, 1.0])), 2)
    assert json.loads(json.dumps(pairs.as_dict()))["converged"] == [True, True]


# --- power iteration


def test_power_iteration_finds_the_largest_magnitudes_in_order() -> None:
    matrix = symmetric([-9.0, 6.0, 4.0, 2.5, 1.0, 0.3])
    pairs = power_iteration(MatrixOperator(matrix), 4, tol=1e-9, max_products=500)
    assert pairs.values.tolist() == pytest.approx([-9, 6, 4, 2.5])
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    # Found vectors are projected out, so a residual holds on what is left of the space; all are small here.
    assert (true_residuals(matrix, pairs) < 1e-7).all()


def test_power_iteration_does_not_stop_because_the_value_changes_little() -> None:
    """With l1/l2 = 1.018 the value creeps: a change below 1e-3 comes long before an error of 1e-3."""
    operator = MatrixOperator(symmetric([1.018, 1.0] + [k / 200 for k in range(180)], seed=3))
    pairs = power_iteration(operator, tol=1e-3, max_products=2000)
    assert bool(pairs.converged)
    assert float(pairs.values) == pytest.approx(1.018, rel=1e-4)
    early = power_iteration(operator, tol=1e-3, max_products=30)
    assert not bool(early.converged)


@pytest.mark.parametrize("values", [[5.0, -5.0, 1.0, 0.5], [5.0, -4.9999, 1.0, 0.5]])
def test_power_iteration_between_two_opposite_values_says_that_it_has_not_converged(values: list[float]) -> None:
    operator = MatrixOperator(symmetric(values))
    pairs = power_iteration(operator, tol=1e-4, max_products=100)
    assert not bool(pairs.converged)
    assert float(pairs.residuals) > 1e-2
    assert lanczos(operator, 2, which="magnitude", tol=1e-9).values.abs().tolist() == pytest.approx([5, abs(values[1])])


def test_power_iteration_starts_where_it_is_told() -> None:
    operator = MatrixOperator(symmetric([3.0, 2.9, 1.0, 0.0]))
    vector = power_iteration(operator, tol=1e-8, max_products=1000).vectors[:, 0]
    assert power_iteration(operator, tol=1e-6, start=vector).products == 1
    assert power_iteration(operator, tol=1e-6, start=torch.zeros(4)).products > 1


@pytest.mark.parametrize("spectrum", ["identity", "zero", "rank two"])
def test_power_iteration_ends_on_degenerate_spectra(spectrum: str) -> None:
    pairs = power_iteration(MatrixOperator(symmetric(SPECTRA[spectrum])), 3)
    assert pairs.converged.all()
    assert pairs.values.tolist() == pytest.approx(expected_values(SPECTRA[spectrum], 3, "largest"), abs=1e-5)


# --- batch by batch


def scaled_quadratics(factors: list[float]) -> Problem:
    """One batch per factor, whose Hessian is the factor times one matrix; the n-th batch has n terms."""
    batches = [torch.full((n,), factor, dtype=torch.float64) for n, factor in enumerate(factors, start=1)]
    model = Quadratic(symmetric([3.0, 1.0, 0.5, -0.2]))
    return Problem(model, batches, lambda m, b: (b * m(b)).mean(), terms=len)


def test_batch_values_their_quartiles_and_the_full_value_are_those_of_a_quadratic() -> None:
    factors = [1.0, -2.0, 4.0, 0.5, 3.0]
    result = batch_eigenvalues(scaled_quadratics(factors), tol=1e-6, max_products=500)
    assert result.values.tolist() == pytest.approx([3 * f for f in factors])
    assert result.quartiles == pytest.approx((1.5, 3.0, 9.0))
    assert result.median == pytest.approx(3)
    assert (result.num_negative, result.num_unconverged) == (1, 0)
    mean = sum(n * f for n, f in enumerate(factors, start=1)) / 15
    assert float(result.full.values) == pytest.approx(3 * mean)
    assert result.warm_start_change < 1e-5


def test_warm_starts_save_products_and_do_not_change_the_values() -> None:
    problem = scaled_quadratics([1.0, 1.1, 1.2, 1.3])
    result = batch_eigenvalues(problem, tol=1e-6, max_products=500, restarts=0)
    alone = [power_iteration(HessianOperator(problem.subset([i])), tol=1e-6, max_products=500) for i in range(4)]
    assert result.values.tolist() == pytest.approx([float(pairs.values) for pairs in alone])
    assert result.products < sum(pairs.products for pairs in alone)


def test_median_over_batches_is_not_the_value_of_the_whole() -> None:
    problem = Problem(mlp(), rows(3, 3, 3, 3), CROSS_ENTROPY)
    result = batch_eigenvalues(problem, tol=1e-4, max_products=1000)
    for index, value in enumerate(result.values):
        dense = torch.linalg.eigvalsh(dense_hessian(problem.subset([index])))
        assert float(value) == pytest.approx(float(dense.abs().max()), rel=1e-3)
    assert result.num_terms == [3, 3, 3, 3]
    assert float(result.values.mean()) > float(result.full.values)


def test_unconverged_batches_are_counted() -> None:
    result = batch_eigenvalues(Problem(mlp(), rows(3, 3), CROSS_ENTROPY), tol=1e-9, max_products=2, restarts=0)
    assert result.num_unconverged == 2


def test_interrupted_batches_are_continued(tmp_path: Path) -> None:
    problem = Problem(mlp(), rows(3, 3, 3), CROSS_ENTROPY)
    undisturbed = batch_eigenvalues(problem, tol=1e-4)

    def stop(done: int, total: int, line: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "batches.pt"
    with pytest.raises(KeyboardInterrupt):
        batch_eigenvalues(problem, tol=1e-4, checkpoint=path, progress=stop)
    resumed = batch_eigenvalues(problem, tol=1e-4, checkpoint=path)
    assert resumed.as_dict() == undisturbed.as_dict()


def test_weights_that_change_during_a_search_are_noticed() -> None:
    model = mlp()

    def train(done: int, total: int, line: str) -> None:
        nn.init.normal_(model[0].weight)

    with pytest.raises(ValueError, match="weights have changed"):
        lanczos(HessianOperator(Problem(model, rows(4), CROSS_ENTROPY)), 3, progress=train)


# --- what a search costs


def test_a_step_reads_the_basis_six_times_however_wide_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three passes reads it twice: two over what was multiplied, one once it has length 1."""
    passes = 0
    remove_from = Basis.remove_from

    def counting(self: Basis, W: Tensor, **options: int) -> Tensor:
        nonlocal passes
        passes += options.get("passes", 2)
        return remove_from(self, W, **options)

    monkeypatch.setattr(Basis, "remove_from", counting)
    for width in (1, 8):
        passes = 0
        result = lanczos(MatrixOperator(symmetric([k**1.2 for k in range(120)])), 2, block_size=width)
        steps = result.products // width
        assert passes <= 3 * (steps + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_columns_are_replaced_and_the_others_keep_their_span(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = Basis(50, dtype, torch.device("cpu"), 10)
    basis.append(torch.linalg.qr(torch.randn(50, 4, dtype=torch.float64, generator=generator))[0])
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    W = torch.stack([a, 2 * a, torch.zeros_like(a), a + 1e-3 * b], dim=1)
    basis.remove_from(W)
    columns, lost = orthonormal_columns(W.clone(), basis, 1e-5, seed=1)
    assert (columns.shape, lost) == ((50, 4), 2)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(columns.T @ columns, eye, rtol=0, atol=1e-13)
    assert float(basis.coefficients(columns).abs().max()) < (1e-6 if dtype == torch.float32 else 1e-13)
    assert float((W - columns @ (columns.T @ W)).abs().max()) < 1e-7


def test_no_more_columns_are_returned_than_the_space_has_left() -> None:
    basis = Basis(5, torch.float64, torch.device("cpu"), 5)
    basis.append(torch.eye(5, 3, dtype=torch.float64))
    W = torch.randn(5, 4, dtype=torch.float64)
    basis.remove_from(W)
    columns, lost = orthonormal_columns(W, basis, 1e-9, seed=0)
    assert (columns.shape, lost) == ((5, 2), 2)
    torch.testing.assert_close(columns[3:] @ columns[3:].T, torch.eye(2, dtype=torch.float64))


def test_a_block_is_chosen_by_the_products_needed_and_their_times() -> None:
    assert best_block_size({8: 0.132, 1: 0.330}) == 1
    assert best_block_size({1: 1.0, 4: 0.49, 8: 0.4}) == 4
    assert best_block_size({1: 1.0, 4: 0.5}) == 1
    for wrong in ({}, {1: 0.0}, {0: 1.0}):
        with pytest.raises(ValueError, match="positive times by block size"):
            best_block_size(wrong)

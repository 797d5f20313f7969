"""DualGPM's subspaces and InfLoRA's A: known directions by hand, both representations against each other, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatpatch.families.dualgpm import Matrix, Subspace, design, protect, threshold

D = 8
Q: Matrix = np.linalg.qr(np.random.RandomState(1).randn(D, D))[0]


def along(*values: float) -> Matrix:
    """Return the covariance with these singular values along the first columns of Q."""
    return (Q[:, : len(values)] * values) @ Q[:, : len(values)].T


def protected(space: Subspace) -> Matrix:
    """Return the projection onto the protected directions, however they are kept."""
    return np.eye(len(space.basis)) - space.projection if space.of_complement else space.projection


def onto(*columns: int) -> Matrix:
    """Return the projection onto some columns of Q."""
    return Q[:, columns] @ Q[:, columns].T


def random_covariance(seed: int, d: int, decay: float) -> Matrix:
    rng = np.random.RandomState(seed)
    X = rng.randn(3 * d, d) * np.exp(-decay * np.arange(d)) @ np.linalg.qr(rng.randn(d, d))[0]
    return X.T @ X / len(X)


def assert_orthonormal(space: Subspace, tolerance: float = 1e-12) -> None:
    m = space.basis.shape[1]
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(m), atol=tolerance)


# Singular values 4, 3, 2, 1 have 16/30, 9/30, 4/30, 1/30 of the energy; sums 0.533, 0.833, 0.967, 1.


@pytest.mark.parametrize(("share", "count"), [(0.3, 1), (0.6, 1), (0.84, 2), (0.97, 3), (0.999, 3)])
def test_first_task_protects_the_most_directions_with_less_than_the_share(share: float, count: int) -> None:
    space = protect(None, along(4, 3, 2, 1), share)
    np.testing.assert_allclose(protected(space), onto(*range(count)), atol=1e-12)


# Against protected q0, the singular values 4, 3, 2, 1 along q0 to q3 leave 14/30 outside: 9/30, 4/30, 1/30.


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.54, 2), (0.8, 2), (0.84, 3), (0.96, 3), (0.97, 4)])
def test_later_task_adds_the_fewest_directions_that_reach_the_share(share: float, count: int) -> None:
    known = Subspace(Q[:, :1])
    space = protect(known, along(4, 3, 2, 1), share)
    np.testing.assert_allclose(protected(space), onto(*range(count)), atol=1e-12)
    assert (space is known) == (count == 1)


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.54, 2), (0.8, 2), (0.84, 3), (0.96, 3), (0.97, 4)])
def test_complement_loses_the_directions_that_a_basis_would_gain(share: float, count: int) -> None:
    known = Subspace(Q[:, 1:], of_complement=True)
    space = protect(known, along(4, 3, 2, 1), share)
    assert space.of_complement and space.dimension == count
    np.testing.assert_allclose(space.projection, onto(*range(count, D)), atol=1e-12)


def test_directions_protected_before_are_kept_when_the_new_task_has_others() -> None:
    covariance = (Q[:, 4:6] * [2.0, 1.0]) @ Q[:, 4:6].T
    space = protect(Subspace(Q[:, :2]), covariance, 0.9)
    np.testing.assert_allclose(protected(space), onto(0, 1, 4, 5), atol=1e-12)


@pytest.mark.parametrize(("count", "switches"), [(4, False), (5, True)])
def test_basis_becomes_its_complement_above_half_the_dimension(count: int, switches: bool) -> None:
    covariance = along(*range(count, 0, -1))
    first = protect(Subspace(Q[:, :1]), covariance, 0.9999)
    assert first.of_complement == switches and first.dimension == count
    assert first.basis.shape == (D, D - count if switches else count)
    np.testing.assert_allclose(protected(first), onto(*range(count)), atol=1e-12)
    assert protect(None, np.eye(D), count / D + 0.01).of_complement == switches  # in the first task too


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(2, 12),
    m=st.integers(1, 11),
    share=st.floats(0.05, 0.99),
    decay=st.floats(0, 1),
)
def test_both_representations_of_a_subspace_grow_alike(seed: int, d: int, m: int, share: float, decay: float) -> None:
    whole = np.linalg.qr(np.random.RandomState(seed + 1).randn(d, d))[0]
    m = min(m, d - 1)
    covariance = random_covariance(seed, d, decay)
    kept = protect(Subspace(whole[:, :m]), covariance, share)
    free = protect(Subspace(whole[:, m:], of_complement=True), covariance, share)
    np.testing.assert_allclose(protected(kept), protected(free), atol=1e-7)
    assert kept.dimension == free.dimension >= m


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 12), m=st.integers(1, 6), share=st.floats(0.05, 0.999))
def test_update_reaches_the_share_and_one_direction_less_does_not(seed: int, d: int, m: int, share: float) -> None:
    whole = np.linalg.qr(np.random.RandomState(seed + 1).randn(d, d))[0]
    covariance = random_covariance(seed, d, 0.3)
    known = Subspace(whole[:, : min(m, d // 2)])
    space = protect(known, covariance, share)

    def share_of(projection: Matrix) -> float:
        return float(np.sum((projection @ covariance) ** 2) / np.sum(covariance**2))

    assert share_of(protected(space)) >= share - 1e-12
    np.testing.assert_allclose(protected(space) @ known.basis, known.basis, atol=1e-9)
    added = np.linalg.svd((np.eye(d) - known.projection) @ covariance)[0][:, : space.dimension - known.dimension]
    if space is not known:
        assert share_of(known.projection + added[:, :-1] @ added[:, :-1].T) < share + 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_columns_stay_orthonormal_over_tasks_up_to_the_whole_space(dtype: type, decay: float) -> None:
    space, dimension = None, 0
    for task in range(12):
        covariance = random_covariance(task, 10, decay).astype(dtype)
        space = protect(space, covariance, threshold(0.6, 1.0, task, 11))  # the last share is 1
        assert space.basis.dtype == dtype and space.basis.shape[1] <= 5
        assert dimension <= space.dimension <= 10
        assert_orthonormal(space, 100 * np.finfo(dtype).eps)
        dimension = space.dimension
    assert decay > 0 or dimension == 10


@pytest.mark.parametrize("known", [None, Subspace(Q[:, :2]), Subspace(Q[:, :2], of_complement=True)])
def test_covariance_of_zeros_protects_nothing_more(known: Subspace | None) -> None:
    space = protect(known, np.zeros((D, D)), 0.95)
    assert space.dimension == (0 if known is None else known.dimension)


def test_covariance_of_rank_one_protects_its_direction_at_any_share() -> None:
    for share in (0.01, 0.5, 1.0):
        np.testing.assert_allclose(protected(protect(None, along(7), share)), onto(0), atol=1e-12)
        np.testing.assert_allclose(protected(protect(Subspace(Q[:, 1:2]), along(7), share)), onto(0, 1), atol=1e-12)


def test_rounding_errors_are_not_protected_when_the_share_is_all() -> None:
    space = protect(Subspace(Q[:, :2]), along(4, 3), 1.0)
    assert space.dimension == 2


def test_threshold_grows_linearly_and_stays_below_its_end() -> None:
    assert [threshold(0.95, 1.0, task, 10) for task in (0, 5, 9)] == pytest.approx([0.95, 0.975, 0.995])


# InfLoRA's A


def test_first_a_holds_the_leading_directions_of_the_inputs() -> None:
    A = design(torch.from_numpy(along(4, 3, 2, 1)), None, 2)
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64) / 3)
    np.testing.assert_allclose(3 * A.T @ A, onto(0, 1), atol=1e-12)


@pytest.mark.parametrize("of_complement", [False, True])
def test_a_is_zero_on_protected_inputs_and_leads_on_the_rest(of_complement: bool) -> None:
    known = Subspace(Q[:, 2:] if of_complement else Q[:, :2], of_complement)
    A = design(torch.from_numpy(along(9, 8, 1, 3, 2)), known, 3)
    assert (A @ torch.from_numpy(Q[:, :2])).abs().max() < 1e-14  # however strong they are in the new task
    np.testing.assert_allclose(3 * A.T @ A, onto(3, 4, 2), atol=1e-12)


@given(seed=st.integers(0, 10**6), m=st.integers(1, D - 1))
@settings(deadline=None)
def test_interference_is_zero_while_as_many_directions_are_free_as_a_has_rows(seed: int, m: int) -> None:
    whole = np.linalg.qr(np.random.RandomState(seed).randn(D, D))[0]
    for known in (Subspace(whole[:, :m]), Subspace(whole[:, m:], of_complement=True)):
        A = design(torch.from_numpy(random_covariance(seed, D, 0.3)), known, D - m)
        assert (A @ torch.from_numpy(whole[:, :m])).abs().max() < 1e-10
        # One row more finds no free direction: the limit that the module's docstring names.
        A = design(torch.eye(D, dtype=torch.float64), known, D - m + 1)
        assert (A @ torch.from_numpy(whole[:, :m])).abs().max() > 0.1

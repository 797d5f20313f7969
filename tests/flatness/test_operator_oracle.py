"""Other people's libraries, where they are installed; each is asked only what it is right about."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatpatch.flatness import HessianOperator, Problem, hutchinson, lanczos, supervised_loss
from tests.flatness_cases import TinyTransformer, all_products, dense_hessian, mlp, rows, token_batches, token_loss

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
CROSS_ENTROPY = supervised_loss(F.cross_entropy)


def test_products_on_uneven_batches_equal_those_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model = mlp().eval()
    batches = rows(4, 4, 2)
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    V = torch.randn(43, 4, dtype=torch.float64)
    ours = HessianOperator(Problem(model, batches, CROSS_ENTROPY))
    torch.testing.assert_close(ours.matmat(V), theirs @ V, rtol=1e-10, atol=1e-13)


def test_eigenvalues_equal_those_of_hessian_eigenthings() -> None:
    """With equal batches, which it averages without weights, and few steps, beyond which it stops reorthogonalising."""
    peer = pytest.importorskip("hessian_eigenthings")
    if not hasattr(peer, "HessianOperator"):
        pytest.skip("a release before 1.0")
    model = mlp().eval()
    batches = rows(4, 4)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    theirs = peer.lanczos(peer.HessianOperator(model, batches, loss), k=3, max_iter=40, reorthogonalize=True)
    ours = lanczos(HessianOperator(Problem(model, batches, CROSS_ENTROPY)), 3, which="magnitude", tol=1e-9)
    torch.testing.assert_close(
        ours.values.abs().sort().values, theirs.eigenvalues.double().abs().sort().values, rtol=1e-6, atol=0
    )


def test_eigenvalues_and_trace_agree_with_pyhessian() -> None:
    peer = pytest.importorskip("pyhessian")
    model = mlp().eval()
    x, y = rows(8)[0]
    theirs = peer.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    values, _ = theirs.eigenvalues(maxIter=2000, tol=1e-12, top_n=2)
    ours = HessianOperator(Problem(mlp(), [(x, y)], CROSS_ENTROPY))
    assert lanczos(ours, 2, which="magnitude", tol=1e-9).values.tolist() == pytest.approx(values, rel=1e-4)
    traces = torch.tensor(theirs.trace(maxIter=300, tol=0))
    trace = hutchinson(ours, num_probes=300)
    spread = (trace.standard_error**2 + float(traces.var()) / len(traces)) ** 0.5
    assert abs(trace.value - float(traces.mean())) < 4 * spread


def test_scipy_finds_the_same_eigenvalues() -> None:
    from scipy.sparse.linalg import LinearOperator, eigsh

    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    operator = HessianOperator(problem)
    n = operator.size
    theirs = eigsh(
        LinearOperator((n, n), matvec=lambda v: operator.matvec(torch.from_numpy(v)).numpy(), dtype="float64"),
        5,
        which="LA",
        tol=1e-9,
        return_eigenvectors=False,
    )
    ours = lanczos(operator, 5, tol=1e-6)
    assert ours.values.tolist() == pytest.approx(sorted(theirs, reverse=True), rel=1e-9)


def test_the_dense_reference_is_symmetric_where_torch_func_is_not() -> None:
    """Why the reference goes row by row: see its comment. If this fails, torch may have been repaired."""
    problem = Problem(TinyTransformer(lora=False), token_batches(2, 1), token_loss)
    H = dense_hessian(problem)
    torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(H, all_products(HessianOperator(problem)), rtol=1e-9, atol=1e-12)

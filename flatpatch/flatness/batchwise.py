"""The dominant eigenvalue of every batch's own Hessian, and their median (Kaddour et al. 2022, arXiv:2202.00661).

It is not an estimate of the full data's value: the largest eigenvalue is convex, so its mean over batches is at least
that of the mean Hessian, and the smaller the batches, the larger it is. The two belong beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatpatch.flatness.basis import Progress, load_state, save_state
from flatpatch.flatness.eigenvalues import Eigenpairs, power_iteration
from flatpatch.flatness.operator import HessianOperator, checkpoint_key
from flatpatch.flatness.problem import Problem


@dataclass(frozen=True)
class BatchEigenvalues:
    """Eigenvalues of largest magnitude, one per batch.

    Attributes:
        values: Signed.
        residuals: In eigenvalue units, by the products as the operator gave them.
        errors: How far the products may be off beyond rounding, in eigenvalue units: by autograd zero.
        converged: Whether each residual, with the error, met the tolerance.
        num_terms: Loss terms of each batch; the values depend on it.
        quartiles: First quartile, median and third quartile of ``values``, converged or not.
        full: The same for the loss over all batches.
        warm_start_change: Largest relative change of a value when a batch was started again at random instead of from
            its predecessor's vector, among those where this was tried; 0 if none was.
        products: Matrix-vector products it took, with those for ``full``; each over one batch or over all.
    """

    values: Tensor  # (num_batches,), float64
    residuals: Tensor  # (num_batches,), float64
    errors: Tensor  # (num_batches,), float64
    converged: Tensor  # (num_batches,), bool
    num_terms: list[float]
    quartiles: tuple[float, float, float]
    full: Eigenpairs
    warm_start_change: float
    products: int

    @property
    def median(self) -> float:
        """The measure of Kaddour et al."""
        return self.quartiles[1]

    @property
    def mean(self) -> float:
        """Over batches, signs included."""
        return float(self.values.mean())

    @property
    def largest(self) -> float:
        """Over batches, signs included."""
        return float(self.values.max())

    @property
    def num_negative(self) -> int:
        """Batches whose eigenvalue of largest magnitude is negative."""
        return int((self.values < 0).sum())

    @property
    def num_unconverged(self) -> int:
        """Batches whose residual and error missed the tolerance."""
        return int((~self.converged).sum())

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "values": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "errors": self.errors.tolist(),
            "converged": self.converged.tolist(),
            "num_terms": self.num_terms,
            "quartiles": list(self.quartiles),
            "full": self.full.as_dict(),
            "warm_start_change": self.warm_start_change,
            "products": self.products,
        }


def batch_eigenvalues(
    problem: Problem,
    *,
    tol: float = 1e-2,
    max_products: int = 100,
    restarts: int = 2,
    mode: str = "autograd",
    memory_budget: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> BatchEigenvalues:
    """Find the eigenvalue of largest magnitude of every batch's Hessian, and of the Hessian over all batches.

    Args:
        problem: The loss; its batches are taken one by one.
        tol: Residual to reach, relative to the value.
        max_products: The most products per batch.
        restarts: On how many batches (the second and following ones) to start again at random, to see whether the
            start from the previous batch's vector changes the value.
        mode: As for :class:`flatpatch.flatness.operator.HessianOperator`.
        memory_budget: Likewise.
        seed: Of the random starts.
        checkpoint: A file from which an interrupted run is continued, and to which finished batches are saved.
        progress: Called after each batch.

    Returns:
        All values, their quartiles, and the value over all batches.

    Raises:
        ValueError: If a setting is out of range or the checkpoint is not of this run.
        UserError: If the model has no second derivative.
    """
    count = len(problem.batches)
    # Not compiled: each batch would need code of its own, and the clock would decide how the results are rounded.
    whole = HessianOperator(problem, mode=mode, memory_budget=memory_budget, compile=False)
    key = checkpoint_key(whole, "batch_eigenvalues", [tol, max_products, restarts, seed], checkpoint)
    state = load_state(checkpoint, key)
    found: list[list[float]] = state["found"] if state else []
    vector: Tensor | None = state["vector"].to(problem.device) if state else None
    change, products = (state["change"], state["products"]) if state else (0.0, 0)
    for index in range(len(found), count):
        operator = HessianOperator(problem.subset([index]), mode=mode, memory_budget=memory_budget, compile=False)
        pair = power_iteration(operator, tol=tol, max_products=max_products, start=vector, seed=seed)
        if 1 <= index <= restarts:
            cold = power_iteration(operator, tol=tol, max_products=max_products, seed=seed + index)
            larger = max((pair, cold), key=lambda p: abs(float(p.values)))
            change = max(change, abs(float(pair.values - cold.values)) / (abs(float(larger.values)) or 1.0))
            pair = larger
        products += operator.products
        vector = pair.vectors[:, 0]
        found.append([float(each) for each in (pair.values, pair.residuals, pair.errors, pair.converged)])
        if checkpoint:
            state = {"key": key, "found": found, "vector": vector.cpu(), "change": change, "products": products}
            save_state(checkpoint, state)
        if progress:
            progress(index + 1, count + 1, f"batch {index + 1} of {count}: {found[-1][0]:.4g}")
    full = power_iteration(whole, tol=tol, max_products=max_products, start=vector, seed=seed)
    if progress:
        progress(count + 1, count + 1, f"all batches: {float(full.values):.4g}")
    columns = torch.tensor(found, dtype=torch.float64).T
    quarters = torch.quantile(columns[0], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return BatchEigenvalues(
        values=columns[0],
        residuals=columns[1],
        errors=columns[2],
        converged=columns[3].bool(),
        num_terms=list(problem.num_terms),
        quartiles=(float(quarters[0]), float(quarters[1]), float(quarters[2])),
        full=full,
        warm_start_change=change,
        products=products + full.products,
    )

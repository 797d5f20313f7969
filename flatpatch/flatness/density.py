r"""Where all the eigenvalues lie: stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv:1901.10159, section 2).

For a random unit vector v, m steps of Lanczos give a tridiagonal matrix whose eigenvalues :math:`\theta_i` (nodes) and
squared first eigenvector components :math:`w_i` (weights) integrate any function f against the spectrum as v sees it:
:math:`\langle v, f(H) v \rangle \approx \sum_i w_i f(\theta_i)`, exactly for polynomials of degree 2m - 1. The mean
over v is :math:`\frac{1}{n} \operatorname{tr} f(H)`. One eigenvalue of n has mass 1/n: plot the density's logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from flatpatch.flatness.basis import Basis, Progress, load_state, random_vectors, save_state
from flatpatch.flatness.content import digest
from flatpatch.flatness.eigenvalues import Array, Eigenpairs, known_basis
from flatpatch.flatness.operator import LinearOperator, checkpoint_key, compile_seconds, plan, product_errors

LAWS = ("rademacher", "gaussian")


@dataclass(frozen=True)
class Quadrature:
    """Nodes and weights of every probe. A probe that needed fewer nodes repeats its last one with weight 0.

    Attributes:
        nodes: In eigenvalue units, ascending in each row.
        weights: Each row sums to 1.
        size: Dimension n of the operator; n times a weight counts eigenvalues.
        products: Matrix-vector products it took.
        compile_seconds: Time that went into compiling the operator's products meanwhile.
        error: How far a node may be off because the products are, beyond rounding, in eigenvalue units: the largest
            estimate of an operator by finite differences, zero for one by autograd.
    """

    nodes: Tensor  # (num_probes, num_steps), float64
    weights: Tensor  # (num_probes, num_steps), float64
    size: int
    products: int
    compile_seconds: float = 0.0
    error: float = 0.0

    def moments(self, order: int) -> Tensor:
        """Estimate the mean of the eigenvalues' powers tr(H^order) / n, once per probe ``(num_probes,)``."""
        return (self.weights * self.nodes**order).sum(dim=1)

    @property
    def trace(self) -> float:
        """Hutchinson's estimate of the trace from the same probes."""
        return self.size * float(self.moments(1).mean())

    @property
    def trace_standard_error(self) -> float:
        """Standard error of ``trace``; NaN for one probe."""
        return self.size * _standard_error(self.moments(1))

    @property
    def frobenius_norm(self) -> float:
        """Square root of the sum of the squared eigenvalues, estimated."""
        return math.sqrt(self.size * float(self.moments(2).mean()))

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "size": self.size,
            "products": self.products,
            "compile_seconds": self.compile_seconds,
            "error": self.error,
            "trace": self.trace,
            "trace_standard_error": None if len(self.nodes) < 2 else self.trace_standard_error,
            "frobenius_norm": self.frobenius_norm,
        }


def quadrature(
    operator: LinearOperator,
    *,
    num_probes: int = 4,
    num_steps: int = 50,
    law: str = "rademacher",
    known: Eigenpairs | None = None,
    seed: int = 0,
    probes_per_pass: int | None = None,
    basis_device: torch.device | str | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Quadrature:
    """Run Lanczos from random vectors, with full reorthogonalisation, and return nodes and weights.

    Args:
        operator: A symmetric operator.
        num_probes: Random vectors. The spread over them is the estimate's uncertainty.
        num_steps: Lanczos steps, so at most that many nodes; more resolve the spectrum more finely.
        law: "rademacher" (entries plus or minus one) or "gaussian"; each vector is scaled to length 1.
        known: Eigenpairs of this operator found before. Each value counts as one eigenvalue in every row, whatever the
            probe, and the probes see the n - k others alone (Bhattacharjee et al. 2024, arXiv:2410.21690): of
            a spectrum led by a few, most of the probes' spread and most of the range that the steps must resolve is
            theirs. Pairs of any accuracy will do: of those that ``lanczos`` finds, no eigenvalue is moved by more than
            the residuals' norm, root sum of squares (Weyl).
        seed: Of the vectors; each depends on the seed and its number alone.
        probes_per_pass: Probes advanced together, each with its own basis of ``num_steps`` vectors. By default one
            on a CPU and 16 on a GPU, where products with several vectors are cheaper.
        basis_device: Where the bases are kept, such as "cpu" for a full GPU; by default the operator's device.
        checkpoint: A file from which an interrupted run is continued, and to which finished probes are saved.
        progress: Called after each step.

    Returns:
        Nodes and weights of all probes.

    Raises:
        ValueError: If a setting is out of range, the known vectors are not orthonormal vectors of the operator's size,
            or the checkpoint is not of this run.
    """
    if law not in LAWS:
        raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps), ("probes_per_pass", probes_per_pass)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    outer = known_basis(operator, known)
    values = np.array(known.values.tolist() if known else [])
    room = operator.size - len(values)
    steps = min(num_steps, room)
    together = probes_per_pass or (16 if operator.device.type == "cuda" else 1)
    settings = [steps, law, seed, together, *([digest([known.values, known.vectors])] if known else [])]
    key = checkpoint_key(operator, "quadrature", settings, checkpoint)
    state = load_state(checkpoint, key)
    done: list[list[list[float]]] = state["probes"] if state else []
    taken: list[int] = state["products"] if state else []  # by each probe
    errors: list[float] = state["errors"] if state else []  # likewise
    compiled = compile_seconds(operator)
    plan(operator, max(num_probes - len(done), 0) * steps)
    while len(done) < num_probes:
        indices = list(range(len(done), min(len(done) + together, num_probes)))
        start = random_vectors(operator.size, indices, seed=seed, device=operator.device, law=law)
        outer.remove_from(start)
        base = len(done)

        def report(step: int, base: int = base, count: int = len(indices)) -> None:
            if progress:
                line = f"probes {base + 1} to {base + count} of {num_probes}, step {step}"
                progress(base * steps + step * count, num_probes * steps, line)

        for diagonal, off_diagonal, error in _tridiagonalise(operator, start, outer, steps, basis_device, report):
            taken.append(len(diagonal))
            errors.append(error)
            nodes, weights = _nodes(diagonal, off_diagonal)
            nodes = np.concatenate([values, nodes])
            weights = np.concatenate([np.full(len(values), 1 / operator.size), weights * (room / operator.size)])
            order, missing = np.argsort(nodes, kind="stable"), steps - len(diagonal)
            done.append([[*nodes[order], *[nodes.max()] * missing], [*weights[order], *[0.0] * missing]])
        done = [[[float(x) for x in row] for row in probe] for probe in done]
        if checkpoint:
            save_state(checkpoint, {"key": key, "probes": done, "products": taken, "errors": errors})
    rows = torch.tensor(done[:num_probes], dtype=torch.float64)
    took = compile_seconds(operator) - compiled
    return Quadrature(
        rows[:, 0],
        rows[:, 1],
        size=operator.size,
        products=sum(taken[:num_probes]),
        compile_seconds=took,
        error=max([*errors[:num_probes], *(known.errors.tolist() if known else [])]),
    )


def _nodes(diagonal: list[float], off_diagonal: list[float]) -> tuple[Array, Array]:
    """Return the eigenvalues of a tridiagonal matrix and their weights."""
    if not diagonal:
        return np.zeros(0), np.zeros(0)
    theta, S = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
    return theta, S[0] ** 2


def _tridiagonalise(
    operator: LinearOperator,
    start: Tensor,
    outer: Basis,
    steps: int,
    basis_device: torch.device | str | None,
    report: Any,
) -> list[tuple[list[float], list[float], float]]:
    """Run Lanczos from every column of start at once, beside the vectors of ``outer``, to which they are orthogonal.

    Returns:
        For each its diagonal (<= steps), off-diagonal (one fewer) and the largest error of its products.
    """
    device = torch.device(basis_device or operator.device)
    count = start.shape[1]
    bases = [Basis(operator.size, operator.dtype, device, steps) for _ in range(count)]
    diagonals: list[list[float]] = [[] for _ in range(count)]
    off_diagonals: list[list[float]] = [[] for _ in range(count)]
    norms, errors = [0.0] * count, [0.0] * count
    threshold = 10 * torch.finfo(operator.dtype).eps
    current = {index: start[:, index : index + 1] / start[:, index].norm() for index in range(count)}
    for step in range(1, steps + 1):
        columns = torch.cat([bases[index].append(column) for index, column in current.items()], dim=1)
        W = operator.matmat(columns)
        if outer.count:
            outer.remove_from(W)
        off = product_errors(operator)
        following = {}
        for position, index in enumerate(current):
            w = W[:, position : position + 1].clone()
            norms[index] = max(norms[index], float(w.norm()))
            if off is not None:
                errors[index] = max(errors[index], float(off[:, position].norm()))
            removed = bases[index].remove_from(w)
            diagonals[index].append(float(removed[-1]))
            beta = float(w.norm())
            # Nothing new is left: the nodes found so far are exact for this probe.
            if step < steps and beta > threshold * norms[index]:
                off_diagonals[index].append(beta)
                following[index] = w / beta
        report(step)
        current = following
        if not current:
            break
    return list(zip(diagonals, off_diagonals, errors, strict=True))


def spectral_density(
    nodes: Tensor,  # (num_probes, num_steps)
    weights: Tensor,  # (num_probes, num_steps)
    grid: Tensor,  # (num_points,)
    *,
    sigma: float,
) -> Tensor:  # (num_points,)
    """Smooth the quadrature into a density: every node becomes a Gaussian bump with its weight as mass.

    Eigenvalues closer than about ``sigma`` merge into one peak. Rescaling the loss, the grid and ``sigma`` together
    rescales the curve and changes nothing else. For a picture without a width to choose, use
    :func:`spectral_distribution`.

    Args:
        nodes: In eigenvalue units.
        weights: Each row sums to 1.
        grid: Where to evaluate, in eigenvalue units.
        sigma: Standard deviation (not variance) of a bump, in eigenvalue units; see :func:`kernel_width`.

    Returns:
        The mean density over probes, per unit eigenvalue. It integrates to 1 over a grid that covers the spectrum.

    Raises:
        ValueError: If ``sigma`` is not positive or a row of ``weights`` is not a probability vector.

    Example:
        >>> grid = torch.linspace(-2, 4, 601)
        >>> density = spectral_density(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.75, 0.25]]), grid, sigma=0.1)
        >>> round(torch.trapezoid(density[grid < 1], grid[grid < 1]).item(), 3)
        0.75
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    _check_rows(nodes, weights)
    density = torch.zeros_like(grid, dtype=torch.float64)
    for node, weight in zip(nodes.flatten().double(), weights.flatten().double(), strict=True):
        density += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return density / (len(nodes) * sigma * math.sqrt(2 * math.pi))


def spectral_distribution(nodes: Tensor, weights: Tensor, grid: Tensor) -> Tensor:
    """Return the share of eigenvalues up to each point, by each probe, without any smoothing.

    Args:
        nodes: In eigenvalue units, ``(num_probes, num_steps)``.
        weights: Each row sums to 1, ``(num_probes, num_steps)``.
        grid: Where to evaluate, ``(num_points,)``.

    Returns:
        One distribution function per probe, ``(num_probes, num_points)``, from 0 to 1. Their mean is the estimate,
        their minimum and maximum its spread.

    Raises:
        ValueError: If a row of ``weights`` is not a probability vector.
    """
    _check_rows(nodes, weights)
    below = nodes.double().unsqueeze(2) <= grid.double()
    return (weights.double().unsqueeze(2) * below).sum(dim=1)


def kernel_width(nodes: Tensor, fraction: float = 0.01) -> float:
    """Return a width for :func:`spectral_density`: a fraction of the range of all nodes.

    Being relative, it neither blurs a flat spectrum into one bump nor leaves a steep one as spikes.

    Args:
        nodes: In eigenvalue units.
        fraction: Of the range; of the node's size where all nodes are one.

    Returns:
        A standard deviation in eigenvalue units, positive.

    Raises:
        ValueError: If ``fraction`` is not positive.
    """
    if not fraction > 0:
        raise ValueError(f"fraction must be positive, got {fraction}")
    spread = float(nodes.max() - nodes.min())
    largest = float(nodes.abs().max())
    return fraction * (spread if spread > 1e-12 * largest else largest or 1.0)


def _check_rows(nodes: Tensor, weights: Tensor) -> None:
    if nodes.ndim != 2 or nodes.shape != weights.shape:
        raise ValueError(f"nodes and weights must be (num_probes, num_steps), got {nodes.shape} and {weights.shape}")
    sums = weights.double().sum(dim=1)
    if bool((weights < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-6):
        raise ValueError("each row of weights must be a probability vector")


def _standard_error(samples: Tensor) -> float:
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan

r"""The outermost eigenvalues of an operator, each with a residual that says how far it can be trusted.

For a unit vector x and its Rayleigh quotient theta = <x, H x>, some eigenvalue of H lies within the residual
|H x - theta x| of theta (Parlett 1998, theorem 4.5.1); theta itself is off by no more than residual^2 / gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatpatch.flatness.basis import Basis, Progress, load_state, orthonormal_columns, random_vectors, save_state
from flatpatch.flatness.content import digest
from flatpatch.flatness.operator import LinearOperator, checkpoint_key, compile_seconds, plan, product_errors

Array = npt.NDArray[np.float64]

ENDS = ("largest", "smallest", "magnitude")

_PRODUCTS_A_VALUE = 6  # what separated outer eigenvalues of networks take; only a plan for the operator


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their vectors, in the order that was asked for.

    Attributes:
        values: Rayleigh quotients, signed.
        vectors: Unit vectors as columns.
        residuals: Norm of H x - theta x, in eigenvalue units, by the products as the operator gave them.
        converged: Whether residual and error together are at most the tolerance times the value's size (or rounding).
        products: Matrix-vector products it took.
        tolerance: The relative residual that was asked for.
        compile_seconds: Time that went into compiling the operator's products meanwhile.
        errors: How far H x may be off beyond rounding, in eigenvalue units: the estimate of an operator by finite
            differences, zero for one by autograd. No more products make it smaller.
    """

    values: Tensor  # (k,), float64
    vectors: Tensor  # (n, k), the operator's dtype
    residuals: Tensor  # (k,), float64
    converged: Tensor  # (k,), bool
    products: int
    tolerance: float
    compile_seconds: float = 0.0
    errors: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))  # (k,), float64

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the vectors, for a file."""
        return {
            "values": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "errors": self.errors.tolist(),
            "converged": self.converged.tolist(),
            "products": self.products,
            "tolerance": self.tolerance,
            "compile_seconds": self.compile_seconds,
        }


def power_iteration(
    operator: LinearOperator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    max_products: int = 200,
    start: Tensor | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    save_every: float = 60.0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Find the eigenvalues of largest magnitude one after the other, by multiplying again and again.

    It stops on the residual, never on the change of the value, which is small long before the value is right. Where
    the two largest magnitudes are close (in particular lambda and -lambda) it hardly converges and says so; use
    :func:`lanczos` there, which is faster in any case.

    Args:
        operator: A symmetric operator.
        k: How many. Found vectors are projected out, twice a step.
        tol: Residual to reach, relative to the value.
        max_products: The most products spent on each.
        start: First vector ``(n,)`` for the first eigenvalue, such as that of a similar operator; else random.
        seed: Of the random starts.
        checkpoint: A file from which an interrupted iteration is continued, and to which it is saved. The result is
            that of an undisturbed one.
        save_every: Least seconds between two savings; each value that is done is saved at once.
        progress: Called after each product.

    Returns:
        The eigenvalues by decreasing magnitude, converged or not.

    Raises:
        ValueError: If k is not between 1 and the dimension, a setting is out of range, or the checkpoint is not of
            this iteration.
    """
    n = operator.size
    _check(n, k, tol, max_products)
    settings = [k, tol, max_products, seed, None if start is None else digest(start)]
    key = checkpoint_key(operator, "power iteration", settings, checkpoint)
    found = Basis(n, operator.dtype, operator.device, k)
    values: list[float] = []
    residuals: list[float] = []
    errors: list[float] = []
    products, first, largest = 0, 1, 0.0
    v: Tensor | None = None
    state = load_state(checkpoint, key)
    if state is not None:
        found.append(state["found"].T)
        values, residuals, errors, products = state["values"], state["residuals"], state["errors"], state["products"]
        first, largest = state["step"], state["largest"]
        v = state["vector"].to(operator.device) if state["vector"] is not None else None
    saved, compiled = time.monotonic(), compile_seconds(operator)

    def save(step: int, vector: Tensor | None) -> None:
        nonlocal saved
        if checkpoint:
            state = {"key": key, "found": found.rows.cpu().clone(), "values": values, "residuals": residuals}
            vector = None if vector is None else vector.cpu()
            state |= {"errors": errors, "products": products, "step": step, "largest": largest, "vector": vector}
            save_state(checkpoint, state)
            saved = time.monotonic()

    for index in range(len(values), k):
        if v is None:
            v = _start(operator, found, start if index == 0 else None, index, seed)
        for step in range(first, max_products + 1):
            v = (v / v.norm()).to(operator.dtype).double()
            w = operator.matmat(v)
            error = float(_error_norms(operator, 1)[0])
            products += 1
            found.remove_from(w)
            value = float(v.T @ w)
            residual = float((w - value * v).norm())
            largest = max(largest, float(w.norm()))
            done = _is_enough(residual, error, _allowed(value, tol, largest, operator.dtype))
            if progress:
                progress(index * max_products + step, k * max_products, f"value {value:.4g}, residual {residual:.1e}")
            if done or step == max_products:
                break
            v = w
            if checkpoint and time.monotonic() - saved >= save_every:
                save(step + 1, v)
        values.append(value)
        residuals.append(residual)
        errors.append(error)
        found.append(v)
        v, first = None, 1
        save(first, v)
    order = np.argsort([-abs(value) for value in values], kind="stable")
    took = compile_seconds(operator) - compiled
    vectors = found.rows[torch.from_numpy(order)].T
    accuracy = np.array(residuals)[order], np.array(errors)[order]
    return _pairs(np.array(values)[order], *accuracy, vectors, products, tol, largest, took)


def _start(operator: LinearOperator, found: Basis, given: Tensor | None, index: int, seed: int) -> Tensor:
    """Return a vector (n, 1) with a part outside what has been found: the given one if it has one, else random."""
    if given is not None:
        v = given.to(operator.device).double().unsqueeze(1).clone()
        found.remove_from(v)
        if float(v.norm()) > 0:
            return v
    v = random_vectors(operator.size, [index], seed=seed, device=operator.device)
    found.remove_from(v)
    return v


def lanczos(
    operator: LinearOperator,
    k: int = 5,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    block_size: int = 1,
    max_products: int = 300,
    basis_size: int | None = None,
    basis_device: torch.device | str | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    save_every: float = 60.0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Find eigenvalues at one end of the spectrum by block Lanczos with thick restarts.

    Every new vector is made orthogonal to all earlier ones twice, so a converged eigenvalue never comes back as a
    ghost. A multiple eigenvalue shows as often as the block is wide; with ``block_size=1`` usually once. When a block
    loses rank - an invariant subspace has been found, as for the identity or a matrix of rank two - random
    directions take the place of the lost ones.

    Args:
        operator: A symmetric operator.
        k: How many eigenvalues.
        which: "largest" or "smallest" (with sign), or "magnitude".
        tol: Residual to reach, relative to the value. The value's own error is about its square. Where products come
            from differences, their error is a part of the residual; a tolerance below it cannot be met and is not
            said to be.
        block_size: Vectors multiplied at a time: as many as the multiplicity to be seen. Wider blocks need more
            products; see :func:`best_block_size` for where they pay all the same.
        max_products: Where to give up; what has not converged is returned and said so.
        basis_size: The most vectors kept, for large models; beyond it the best are kept and the rest dropped
            (Wu and Simon 2000). By default as many as ``max_products``: n of them take 4 n bytes each in float32.
        basis_device: Where they are kept, such as "cpu" for a full GPU; by default the operator's device.
        seed: Of the starting block.
        checkpoint: A file from which an interrupted search is continued, and to which it is saved. The result is
            that of an undisturbed search.
        save_every: Least seconds between two savings.
        progress: Called after each step.

    Returns:
        The k eigenvalues, in the order asked for.

    Raises:
        ValueError: If k is not between 1 and the dimension, a setting is out of range, or the checkpoint is not of
            this search.
    """
    n = operator.size
    _check(n, k, tol, max_products)
    if which not in ENDS:
        raise ValueError(f"which must be one of {', '.join(ENDS)}, got {which!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    block_size = min(block_size, n)
    capacity = min(n, max(max_products, k) + block_size if basis_size is None else basis_size)
    if capacity < min(n, k + 2 * block_size):
        raise ValueError(f"basis_size must be at least k + 2 block_size = {k + 2 * block_size}, got {basis_size}")
    settings = [k, which, tol, block_size, max_products, capacity, seed]
    key = checkpoint_key(operator, "lanczos", settings, checkpoint)
    compiled = compile_seconds(operator)
    plan(operator, min(_PRODUCTS_A_VALUE * k, max_products))
    search = _Search(operator, capacity, basis_device, seed)
    state = load_state(checkpoint, key)
    if state is None:
        search.begin(block_size)
    else:
        search.load_state_dict(state["search"])
    saved = time.monotonic()
    while True:
        theta, S, residuals, errors = search.ritz_pairs()
        best = np.argsort(-_rank(theta, which), kind="stable")[:k]
        allowed = np.array([_allowed(value, tol, search.norm, operator.dtype) for value in theta[best]])
        met = _is_enough(residuals[best], errors[best], allowed)
        good = len(best) == k and bool(np.all(met))
        settled = search.has_settled(theta[best], allowed) if good else False
        finished = search.is_complete or settled or (search.products >= max_products and len(best) == k)
        if progress and search.products:
            progress(search.products, max_products, f"{int(np.sum(met))} of {k} converged")
        if checkpoint and search.products and (finished or time.monotonic() - saved >= save_every):
            save_state(checkpoint, {"key": key, "search": search.state_dict()})
            saved = time.monotonic()
        if finished:
            break
        if search.basis.count + search.block.shape[1] > capacity:
            # Keep what was asked for and half of the rest: fewer would throw away what the next steps need.
            kept = min(k + (capacity - k) // 2, search.basis.count - 1, capacity - search.block.shape[1])
            search.restart(theta, S, errors, np.argsort(-_rank(theta, which), kind="stable")[:kept])
        search.step()
    vectors = search.basis.combine(torch.from_numpy(np.ascontiguousarray(S[:, best])).to(operator.device))
    vectors = (vectors / vectors.norm(dim=0)).to(operator.dtype)
    took = compile_seconds(operator) - compiled
    return _pairs(theta[best], residuals[best], errors[best], vectors, search.products, tol, search.norm, took)


def best_block_size(seconds: Mapping[int, float]) -> int:
    """Choose the width of Lanczos' blocks by what a product takes in each: the least time for a search.

    A search needs about sqrt(p) times as many products in blocks of p: for five eigenvalues over LoRA factors of T5
    45, 80 and 136 with 1, 4 and 8 (110,592 weights), and 64 and 160 with 1 and 8 (2.36 M weights). So a block of 8
    pays where batching makes a product 2.8 times as fast. The same times always give the same choice, but times differ
    from run to run, and blocks round differently: where runs are to be equal bit for bit, choose once.

    Args:
        seconds: By block size, the time of one product (of one vector), such as ``benchmarks/hessian_split.py`` prints.

    Returns:
        The block size; of equally good ones the smallest.

    Raises:
        ValueError: If there is none, or a size or a time is not positive.

    Example:
        >>> best_block_size({1: 0.330, 8: 0.132})
        1
        >>> best_block_size({1: 0.330, 8: 0.080})
        8
    """
    if not seconds or not all(size >= 1 and time > 0 for size, time in seconds.items()):
        raise ValueError(f"seconds must have positive times by block size, got {dict(seconds)}")
    return min(sorted(seconds), key=lambda size: seconds[size] * math.sqrt(size))


class _Search:
    """Rayleigh-Ritz on a growing block Krylov space.

    The projected matrix T is filled with all the coefficients that orthogonalisation removes, not only with the
    band that exact arithmetic would leave, so restarts and replaced directions need no special form.
    """

    def __init__(
        self, operator: LinearOperator, capacity: int, basis_device: torch.device | str | None, seed: int
    ) -> None:
        self.operator = operator
        self.seed = seed
        self.basis = Basis(operator.size, operator.dtype, torch.device(basis_device or operator.device), capacity)
        self.T = np.zeros((0, 0))
        self.errors = np.zeros(0)  # of the products with the basis' vectors
        self.gram = np.zeros((0, 0))  # of what the last block's products left outside the basis
        self.block = torch.empty(0, 0)
        self.products = 0
        self.norm = 0.0  # largest |H v| seen, for judging what is rounding
        self.broke_down = False
        self.values_at_breakdown: list[float] = []

    def begin(self, block_size: int) -> None:
        start = random_vectors(self.operator.size, list(range(block_size)), seed=self.seed, device=self.operator.device)
        self.block, _ = orthonormal_columns(start, self.basis, 0.0, self.seed)

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.block.shape[1] == 0

    def step(self) -> None:
        previous, p = self.basis.count, self.block.shape[1]
        block = self.basis.append(self.block)
        W = self.operator.matmat(block).clone()
        self.errors = np.concatenate([self.errors, _error_norms(self.operator, p)])
        self.products += p
        self.norm = max(self.norm, float(W.norm(dim=0).max()))
        C = self.basis.remove_from(W).cpu().numpy()
        T = np.zeros((previous + p, previous + p))
        T[:previous, :previous] = self.T
        T[:, previous:] = C
        T[previous:, :previous] = C[:previous].T
        T[previous:, previous:] = (C[previous:] + C[previous:].T) / 2
        self.T = T
        self.gram = (W.T @ W).cpu().numpy()
        threshold = 10 * torch.finfo(self.operator.dtype).eps * self.norm
        self.block, lost = orthonormal_columns(W, self.basis, threshold, self.seed + 1 + self.products)
        self.broke_down = lost == p

    def has_settled(self, values: Array, allowed: Array) -> bool:
        """Whether values that have all converged can be the final ones.

        When an invariant subspace has been found every residual is zero, though other directions may hold larger
        values: the next one must agree.
        """
        if not self.broke_down:
            return True
        before, self.values_at_breakdown = self.values_at_breakdown, values.tolist()
        return len(before) == len(values) and bool(np.all(np.abs(values - before) <= allowed))

    def ritz_pairs(self) -> tuple[Array, Array, Array, Array]:
        """Return values (m,), coefficient vectors (m, m), residuals (m,) and the products' error in them (m,).

        Errors of different products are taken to be independent, as rounding is.
        """
        theta, S = np.linalg.eigh(self.T)
        last = S[len(S) - len(self.gram) :]
        residuals = np.sqrt(np.maximum(np.einsum("ik,ij,jk->k", last, self.gram, last), 0))
        return theta, S, residuals, np.sqrt((S**2).T @ self.errors**2)

    def restart(self, theta: Array, S: Array, errors: Array, chosen: npt.NDArray[np.intp]) -> None:
        self.basis.replace(torch.from_numpy(np.ascontiguousarray(S[:, chosen])))
        self.T = np.diag(theta[chosen])
        self.errors = errors[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {
            "basis": self.basis.rows.cpu().clone(),
            "T": torch.from_numpy(self.T),
            "errors": torch.from_numpy(self.errors),
            "gram": torch.from_numpy(self.gram),
            "block": self.block.cpu(),
            "products": self.products,
            "norm": self.norm,
            "broke_down": self.broke_down,
            "values_at_breakdown": self.values_at_breakdown,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.basis.append(state["basis"].T)
        self.T, self.gram, self.errors = (state[name].numpy() for name in ("T", "gram", "errors"))
        self.block = state["block"].to(self.operator.device)
        self.products, self.norm = state["products"], state["norm"]
        self.broke_down, self.values_at_breakdown = state["broke_down"], state["values_at_breakdown"]


def known_basis(operator: LinearOperator, known: Eigenpairs | None) -> Basis:
    """Return the vectors of eigenpairs as a basis, made orthonormal beyond the rounding of the operator's precision.

    Args:
        operator: Whose they are.
        known: Its eigenpairs, or None for an empty basis.

    Raises:
        ValueError: If they are not orthonormal vectors of the operator's size.
    """
    basis = Basis(operator.size, torch.float64, operator.device, known.vectors.shape[1] if known else 0)
    if known is None:
        return basis
    if len(known.vectors) != operator.size:
        raise ValueError(f"known has vectors of length {len(known.vectors)}, the operator's size is {operator.size}")
    Q, R = torch.linalg.qr(known.vectors.double())
    error = float((R.abs() - torch.eye(len(R), dtype=R.dtype, device=R.device)).abs().max())
    if not error <= 1e-3:
        raise ValueError(f"known has vectors that are not orthonormal (by {error:.2g}): their part would be wrong.")
    basis.append(Q)
    return basis


def _rank(theta: Array, which: str) -> Array:
    """What is to be large for a value to be wanted."""
    ranks: dict[str, Array] = {"largest": theta, "smallest": -theta, "magnitude": np.abs(theta)}
    return ranks[which]


def _allowed(value: float, tol: float, norm: float, dtype: torch.dtype) -> float:
    """The residual that counts as converged. Below rounding, which for a zero eigenvalue is all there is, none can."""
    return max(tol * abs(value), 10 * torch.finfo(dtype).eps * norm)


def _is_enough(residual: Any, error: Any, allowed: Any) -> Any:
    """Whether to stop: the tolerance is met, or it is the operator's error that misses it, which no step changes."""
    return residual <= np.maximum(allowed - error, allowed / 2)


def _error_norms(operator: LinearOperator, count: int) -> Array:
    """Return the estimated lengths of the last products' errors (count,); they were products with unit vectors."""
    errors = product_errors(operator)
    return np.zeros(count) if errors is None else errors.norm(dim=0).cpu().numpy()


def _pairs(
    values: Array,
    residuals: Array,
    errors: Array,
    vectors: Tensor,
    products: int,
    tol: float,
    norm: float,
    took: float,
) -> Eigenpairs:
    allowed = np.array([_allowed(float(value), tol, norm, vectors.dtype) for value in values])
    return Eigenpairs(
        values=torch.from_numpy(np.ascontiguousarray(values)),
        vectors=vectors,
        residuals=torch.from_numpy(np.ascontiguousarray(residuals)),
        converged=torch.from_numpy(residuals + errors <= allowed),
        products=products,
        tolerance=tol,
        compile_seconds=took,
        errors=torch.from_numpy(np.ascontiguousarray(errors)),
    )


def _check(n: int, k: int, tol: float, max_products: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the dimension {n}, got {k}")
    if not tol > 0 or math.isinf(tol):
        raise ValueError(f"tol must be positive and finite, got {tol}")
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}")

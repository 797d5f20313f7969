"""The trace of an operator, the sum of its eigenvalues, with its standard error."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatpatch.flatness.basis import Basis, Progress, load_state, orthonormal_columns, random_vectors, save_state
from flatpatch.flatness.content import digest
from flatpatch.flatness.eigenvalues import Eigenpairs, known_basis
from flatpatch.flatness.operator import LinearOperator, checkpoint_key, compile_seconds, form_errors, plan


@dataclass(frozen=True)
class Trace:
    """An estimated trace.

    Attributes:
        value: The estimate, in eigenvalue units.
        standard_error: Of ``value``, from the spread of the samples; NaN for one sample, 0 if nothing is random.
        samples: The independent estimates whose mean ``value`` is.
        products: Matrix-vector products it took.
        compile_seconds: Time that went into compiling the operator's products meanwhile.
        error: How far ``value`` may be off because the products are, beyond rounding and beside ``standard_error``:
            the estimate of an operator by finite differences, zero for one by autograd.
    """

    value: float
    standard_error: float
    samples: Tensor  # (num_samples,), float64
    products: int
    compile_seconds: float = 0.0
    error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {
            "value": self.value,
            "standard_error": error,
            "samples": self.samples.tolist(),
            "products": self.products,
            "compile_seconds": self.compile_seconds,
            "error": self.error,
        }


def hutchinson(
    operator: LinearOperator,
    *,
    num_probes: int = 30,
    tol: float | None = None,
    known: Eigenpairs | None = None,
    seed: int = 0,
    probes_per_pass: int | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Estimate the trace as the mean of <v, H v> over vectors of random signs (Hutchinson 1990).

    The variance of one sample is 2 (|H|_F^2 - sum of the squared diagonal), so a few large eigenvalues make most of
    it. Where these have been found already, their part need not be estimated: for orthonormal vectors Q, of any
    accuracy, tr(H) = tr(Q^T H Q) + tr(P H P) with P = I - Q Q^T, the identity behind :func:`hutch_plus_plus`.

    Args:
        operator: A symmetric operator.
        num_probes: The most vectors.
        known: Eigenpairs of this operator found before. Their values' sum is taken as it is, and the random vectors
            are made orthogonal to theirs. No further products are needed.
        tol: Stop as soon as the standard error, with the products' own, is at most this share of the estimate, after 8
            vectors at least. It is never the change of the running mean that stops, which is small by luck sooner or
            later.
        seed: Of the vectors; each depends on the seed and its number alone.
        probes_per_pass: Vectors multiplied at a time, by default one on a CPU and 16 on a GPU.
        checkpoint: A file from which an interrupted run is continued, and to which samples are saved.
        progress: Called after each pass.

    Returns:
        The estimate.

    Raises:
        ValueError: If a setting is out of range, the known vectors are not orthonormal vectors of the operator's size,
            or the checkpoint is not of this run.
    """
    _check(num_probes, "num_probes", 1)
    together = _together(operator, probes_per_pass)
    basis = known_basis(operator, known)
    exact = math.fsum(known.values.tolist()) if known else 0.0
    settings = [seed, tol, together, digest([known.values, known.vectors]) if known else None]
    key = checkpoint_key(operator, "hutchinson", settings, checkpoint)
    state = load_state(checkpoint, key)
    samples: list[float] = state["samples"][:num_probes] if state else []
    errors: list[float] = state["errors"][:num_probes] if state else []
    known_error = math.fsum(known.errors.tolist()) if known else 0.0
    compiled = compile_seconds(operator)
    plan(operator, num_probes - len(samples))
    while len(samples) < num_probes and not _is_enough(samples, errors, known_error, tol):
        indices = list(range(len(samples), min(len(samples) + together, num_probes)))
        V = random_vectors(operator.size, indices, seed=seed, device=operator.device, law="rademacher")
        if basis.count:
            basis.remove_from(V)
        samples += ((V * operator.matmat(V)).sum(dim=0) + exact).tolist()
        errors += form_errors(operator, V)
        if checkpoint:
            save_state(checkpoint, {"key": key, "samples": samples, "errors": errors})
        if progress:
            progress(len(samples), num_probes, f"trace {sum(samples) / len(samples):.4g}")
    took = compile_seconds(operator) - compiled
    error = _mean(errors) + known_error
    return _trace(torch.tensor(samples, dtype=torch.float64), 0.0, len(samples), took, error)


def hutch_plus_plus(
    operator: LinearOperator,
    *,
    num_products: int = 30,
    seed: int = 0,
    probes_per_pass: int | None = None,
    checkpoint: Path | None = None,
    save_every: float = 60.0,
    progress: Progress | None = None,
) -> Trace:
    """Estimate the trace by Hutch++ (Meyer et al. 2021, arXiv:2010.09649, algorithm 1).

    A third of the products sketches the dominant directions, a third gives the trace over them exactly, and a third
    estimates the rest like :func:`hutchinson`. It pays where few eigenvalues dominate.

    Args:
        operator: A symmetric operator.
        num_products: Matrix-vector products in all, at least 3.
        seed: Of the random vectors.
        probes_per_pass: Vectors multiplied at a time, by default one on a CPU and 16 on a GPU.
        checkpoint: A file from which an interrupted run is continued, and to which it is saved: a third of the
            products, of 8 n bytes each. The result is that of an undisturbed run.
        save_every: Least seconds between two savings.
        progress: Called after each pass.

    Returns:
        The estimate; its standard error is that of the last third.

    Raises:
        ValueError: If a number is out of range or the checkpoint is not of this run.
    """
    _check(num_products, "num_products", 3)
    n, device = operator.size, operator.device
    together = _together(operator, probes_per_pass)
    sketches = min(num_products // 3, n)
    key = checkpoint_key(operator, "hutch++", [num_products, seed, together], checkpoint)
    state = load_state(checkpoint, key)
    W = state["sketch"].to(device) if state else torch.empty(n, 0, dtype=torch.float64, device=device)
    forms: list[float] = state["forms"] if state else []  # <q, H q> over the basis, then <g, H g> of the rest
    errors: list[float] = state["errors"] if state else []  # of these
    saved, compiled = time.monotonic(), compile_seconds(operator)
    plan(operator, num_products - W.shape[1] - len(forms))

    def step(last: bool) -> None:
        nonlocal saved
        if checkpoint and (last or time.monotonic() - saved >= save_every):
            save_state(checkpoint, {"key": key, "sketch": W.cpu(), "forms": forms, "errors": errors})
            saved = time.monotonic()
        if progress:
            progress(W.shape[1] + len(forms), num_products, "Hutch++")

    def add_forms(V: Tensor, before: int) -> None:
        """Append <v, H v> for the columns of V that are not done; ``before`` come before them."""
        while (start := len(forms) - before) < V.shape[1]:
            part = V[:, start : start + together]
            forms.extend((part * operator.matmat(part)).sum(dim=0).tolist())
            errors.extend(form_errors(operator, part))
            step(len(forms) - before == V.shape[1])

    while (start := W.shape[1]) < sketches:
        indices = list(range(start, min(start + together, sketches)))
        S = random_vectors(n, indices, seed=seed, device=device, law="rademacher")
        W = torch.cat([W, operator.matmat(S)], dim=1)
        step(W.shape[1] == sketches)
    basis = Basis(n, torch.float64, device, sketches)
    threshold = 10 * torch.finfo(operator.dtype).eps * float(W.norm(dim=0).max()) / math.sqrt(n)
    Q = basis.append(orthonormal_columns(W.clone(), basis, threshold, seed + 1)[0])
    rank = Q.shape[1]
    add_forms(Q, 0)
    exact, error = math.fsum(forms[:rank]), math.fsum(errors[:rank])
    if rank == n:
        took = compile_seconds(operator) - compiled
        return Trace(exact, 0.0, torch.tensor([exact], dtype=torch.float64), sketches + len(forms), took, error)
    G = random_vectors(n, list(range(sketches, num_products - sketches)), seed=seed, device=device, law="rademacher")
    basis.remove_from(G)
    add_forms(G, rank)
    took = compile_seconds(operator) - compiled
    samples = torch.tensor(forms[rank:], dtype=torch.float64)
    return _trace(samples, exact, sketches + len(forms), took, error + _mean(errors[rank:]))


def xtrace(
    operator: LinearOperator,
    *,
    num_products: int = 30,
    seed: int = 0,
    probes_per_pass: int | None = None,
    checkpoint: Path | None = None,
    save_every: float = 60.0,
    progress: Progress | None = None,
) -> Trace:
    """Estimate the trace by XTrace (Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 2).

    Of m random vectors each in turn is the test vector and the m - 1 others are the sketch: with Q_i an orthonormal
    basis of the products with the others, and x_i what is left of the i-th vector beside Q_i, made sqrt(n - m + 1)
    long, tr(Q_i^T H Q_i) + <x_i, H x_i> is an estimate without bias. Its samples are their m values. Two products a
    vector give all of them. It pays where few eigenvalues dominate, more than :func:`hutch_plus_plus`, and is exact
    for a rank below m.

    Args:
        operator: A symmetric operator.
        num_products: Matrix-vector products in all, at least 2; of an odd number one less is taken.
        seed: Of the random vectors.
        probes_per_pass: Vectors multiplied at a time, by default one on a CPU and 16 on a GPU.
        checkpoint: A file from which an interrupted run is continued, and to which it is saved: the products, of 8 n
            bytes each. The result is that of an undisturbed run.
        save_every: Least seconds between two savings.
        progress: Called after each pass.

    Returns:
        The estimate. Six vectors of 8 n bytes are held for each two products.

    Raises:
        ValueError: If a number is out of range or the checkpoint is not of this run.
    """
    _check(num_products, "num_products", 2)
    n, device = operator.size, operator.device
    together = _together(operator, probes_per_pass)
    count = min(num_products // 2, n)
    key = checkpoint_key(operator, "xtrace", [count, seed, together], checkpoint)
    none = torch.empty(n, 0, dtype=torch.float64, device=device)
    state = load_state(checkpoint, key)
    done: dict[str, Tensor] = {name: state[name].to(device) if state else none for name in ("sketch", "images")}
    errors: list[float] = state["errors"] if state else []  # of <v, H v>, for each product
    saved, compiled = time.monotonic(), compile_seconds(operator)
    plan(operator, 2 * count - len(errors))

    def multiply(V: Tensor, name: str) -> Tensor:
        """Return H V, of which the columns in ``done`` are there already."""
        nonlocal saved
        while (start := done[name].shape[1]) < V.shape[1]:
            part = V[:, start : start + together]
            done[name] = torch.cat([done[name], operator.matmat(part)], dim=1)
            errors.extend(form_errors(operator, part))
            if checkpoint and (done[name].shape[1] == V.shape[1] or time.monotonic() - saved >= save_every):
                save_state(checkpoint, {"key": key, "errors": errors, **{k: W.cpu() for k, W in done.items()}})
                saved = time.monotonic()
            if progress:
                progress(len(errors), 2 * count, "XTrace")
        return done[name]

    V = random_vectors(n, list(range(count)), seed=seed, device=device)
    Y = multiply(V, "sketch")
    Q, R = torch.linalg.qr(Y)
    short = R.diagonal().abs() <= 10 * torch.finfo(operator.dtype).eps * float(Y.norm(dim=0).max()) / math.sqrt(n)
    if short.any():  # all but one vector span the same as all of them: each Q_i is Q
        Q = torch.linalg.qr(Y[:, ~short])[0]
        S = torch.zeros(Q.shape[1], count, dtype=Q.dtype, device=device)
    else:  # column i of S is the direction that Q has and Q_i has not, in the coordinates of Q
        S = torch.linalg.inv(R).T
        S = S / S.norm(dim=0)
    Z = multiply(Q, "images")
    C = Q.T @ V
    C -= S * (S * C).sum(dim=0)
    X = V - Q @ C
    forms = (X * (Y - Z @ C)).sum(dim=0) * (n - Q.shape[1] + S.norm(dim=0) ** 2) / (X**2).sum(dim=0)
    H = Q.T @ Z
    samples = H.trace() - (S * (H @ S)).sum(dim=0) + forms
    took = compile_seconds(operator) - compiled
    error = _mean(errors[:count]) + math.fsum(errors[count:])
    return _trace(samples.cpu(), 0.0, len(errors), took, error)


def _trace(samples: Tensor, exact: float, products: int, took: float = 0.0, error: float = 0.0) -> Trace:
    samples = samples + exact
    spread = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Trace(float(samples.mean()), spread, samples, products, took, error)


def _is_enough(samples: list[float], errors: list[float], known_error: float, tol: float | None) -> bool:
    if tol is None or len(samples) < 8:
        return False
    estimate = _trace(torch.tensor(samples, dtype=torch.float64), 0.0, 0)
    return estimate.standard_error + _mean(errors) + known_error <= tol * abs(estimate.value)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _together(operator: LinearOperator, probes_per_pass: int | None) -> int:
    if probes_per_pass is None:
        return 16 if operator.device.type == "cuda" else 1
    _check(probes_per_pass, "probes_per_pass", 1)
    return probes_per_pass


def _check(value: int, name: str, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")

"""Diagonal blocks of an operator: a layer's own curvature, and that of all factors A or of all factors B.

A block is the matrix by some of the variables while the others stay as they are. Its largest eigenvalue is at most the
whole matrix's, and the traces of blocks that share no variable add up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flatpatch.flatness.basis import random_vectors
from flatpatch.flatness.eigenvalues import lanczos
from flatpatch.flatness.operator import LinearOperator
from flatpatch.flatness.points import plain
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.scope import adapter_factor, rank_axis

_TANGENT = {"B_dA": "A", "dB_A": "B"}
_FACTOR = re.compile(r"\.?(?:lora|linear)\w*_[abAB](?![A-Za-z])|\.?(?:tangent\.|merged$)")


@dataclass(frozen=True)
class BlockCurvature:
    """What was found of one block.

    Attributes:
        size: Number of its variables.
        top_eigenvalue: Its largest eigenvalue.
        residual: Norm of H x - theta x of it, within the block.
        converged: Whether that met the tolerance.
        trace: Mean over the probes.
        trace_standard_error: Of the trace; None of a single probe.
    """

    size: int
    top_eigenvalue: float
    residual: float
    converged: bool
    trace: float
    trace_standard_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        as_plain: dict[str, Any] = plain(asdict(self))
        return as_plain


class BlockOperator:
    """The block of an operator that belongs to some of its variables.

    Args:
        operator: The whole.
        indices: Which variables, ``(m,)``.
    """

    def __init__(self, operator: LinearOperator, indices: Tensor) -> None:
        self.size = len(indices)
        self.device = operator.device
        self.dtype = operator.dtype
        self._whole = operator
        self._indices = indices.to(operator.device)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the block is made of."""
        return {**self._whole.fingerprint(), "block": self._indices.tolist()}

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``V`` ``(m, p)``."""
        whole = torch.zeros(self._whole.size, V.shape[1], dtype=V.dtype, device=V.device)
        whole[self._indices] = V
        return self._whole.matmat(whole)[self._indices]


def layer_blocks(problem: Problem) -> dict[str, Tensor]:
    """Return each layer's variables, as indices into the flat vector, in the model's order.

    A layer is what a name says up to its first number (``encoder.block.0``); without one, all before the factor's or
    the tensor's own name.
    """
    return _grouped(problem, _layer)


def factor_blocks(problem: Problem) -> dict[str, Tensor]:
    """Return the variables of all factors "A", those next to the input, and "B", those next to the output.

    In the scope "tangent" these are the directions that A alone can move the matrices in, B dA, and the rest; elsewhere
    than in the factors there are none.
    """
    shapes = {name: parameter.shape for name, parameter in problem.model.named_parameters()}

    def factor(name: str) -> str | None:
        if problem.scope.name == "tangent":
            return _TANGENT[name.rpartition(".")[2]]
        if adapter_factor(name) is None or name not in shapes:
            return None
        return "A" if rank_axis(name, shapes) == 0 else "B"

    return _grouped(problem, factor)


def block_curvature(
    operator: LinearOperator,
    blocks: Mapping[str, Tensor],
    *,
    num_probes: int = 16,
    tol: float = 1e-2,
    max_products: int = 20,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, BlockCurvature]:
    """Find the largest eigenvalue and the trace of each block.

    Args:
        operator: The whole, symmetric.
        blocks: Indices of each block's variables, by name.
        num_probes: Random signs for the traces; one product gives a sample of every block's.
        tol: Residual of an eigenvalue to reach, relative to it.
        max_products: For each block's eigenvalue.
        seed: Of the random numbers.
        progress: Called after each probe and each block.

    Returns:
        What was found, by the blocks' names.
    """
    steps = num_probes + len(blocks)
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    for k in range(num_probes):
        V = random_vectors(operator.size, [k], seed=seed + 1, device=operator.device, law="rademacher")
        forms = (V * operator.matmat(V))[:, 0]
        for name, indices in blocks.items():
            samples[name].append(float(forms[indices.to(forms.device)].sum()))
        if progress:
            progress(k + 1, steps, "traces of blocks")
    found = {}
    for number, (name, indices) in enumerate(blocks.items()):
        block = BlockOperator(operator, indices)
        pairs = lanczos(block, 1, tol=tol, max_products=max_products, seed=seed)
        traces = torch.tensor(samples[name], dtype=torch.float64)
        error = float(traces.std() / len(traces) ** 0.5) if len(traces) > 1 else None
        found[name] = BlockCurvature(
            size=block.size,
            top_eigenvalue=float(pairs.values[0]),
            residual=float(pairs.residuals[0]),
            converged=bool(pairs.converged[0]),
            trace=float(traces.mean()),
            trace_standard_error=error,
        )
        if progress:
            progress(num_probes + number + 1, steps, f"block {name}")
    return found


def _layer(name: str) -> str:
    cut = _FACTOR.search(name)
    head = name[: cut.start()] if cut else name.rpartition(".")[0]
    parts = (head or name).split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _grouped(problem: Problem, key: Callable[[str], str | None]) -> dict[str, Tensor]:
    groups: dict[str, list[Tensor]] = {}
    start = 0
    for name, size in zip(problem.scope.names, problem.scope.sizes, strict=True):
        if (group := key(name)) is not None:
            groups.setdefault(group, []).append(torch.arange(start, start + size))
        start += size
    return {name: torch.cat(parts) for name, parts in sorted(groups.items(), key=lambda item: int(item[1][0][0]))}

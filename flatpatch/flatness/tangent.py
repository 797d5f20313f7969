r"""The directions that LoRA can move its matrices in, with the metric of the matrices.

Factors :math:`B` (out, r) and :math:`A` (r, in) change :math:`M = W + s\,B A` to first order by

.. math:: T = \{ s\,(B\,dA + dB\,A) \} = \{ U X + Y V^T \},

where the columns of U (out, p) are an orthonormal basis of B's column space and those of V (in, q) one of A's row
space. T is what the factors span, not how they are written: :math:`A \to G^{-1} A, B \to B G` leaves it, and the norm
in it is that of the matrix. (It is the tangent space of the matrices of rank r at B A; Absil, Mahony and Sepulchre
2008, "Optimization Algorithms on Matrix Manifolds".) Several pairs of one matrix, as of several tasks, span the sum of
their spaces; of a pair whose A is frozen only :math:`dB\,A` is left, and the other way round.

An element of T has one pair of coordinates, X (p, in) and N (out - p, q),

.. math:: U X + U_\perp N V^T, \qquad \lVert \cdot \rVert_F^2 = \lVert X \rVert_F^2 + \lVert N \rVert_F^2,

so that :math:`p\,in + (out - p)\,q` numbers describe it, and the Hessian by them is :math:`P^T H_M P` with the matrix's
Hessian and P orthonormal: its eigenvalues solve :math:`J^T H_M J\,x = \lambda\,J^T J\,x`, where J takes changes of the
factors to changes of the matrix. The complement of U is never formed: it is the end of a block reflector.

The columns of U are turned so that its first p rows are symmetric and positive semidefinite, and V's likewise. So
the coordinates themselves do not depend on how the factors are written, unless those rows are singular; a box in them
(Keskar's) and random numbers in them do not either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatpatch.flatness.merged import MergedLayer


@dataclass(frozen=True)
class TangentSpace:
    """Orthonormal coordinates of {U X + Y V'} in the (out, in) matrices.

    Attributes:
        U: (out, p), orthonormal columns, its first p rows symmetric and positive semidefinite.
        V: (in, q), the same.
        reflector: (out, p): the complement of U is the end of I - reflector (U + E)', with E the first p columns of I.
    """

    U: Tensor
    V: Tensor
    reflector: Tensor

    def coordinates(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Project a matrix (out, in): X (p, in) and N (out - p, q)."""
        p = self.U.shape[1]
        across = matrix @ self.V
        return self.U.T @ matrix, across[p:] - self.U[p:] @ (self.reflector.T @ across)

    def matrix(self, X: Tensor, N: Tensor) -> Tensor:
        """Return the element (out, in) with coordinates X (p, in) and N (out - p, q)."""
        p = self.U.shape[1]
        outside = torch.cat([N.new_zeros(p, N.shape[1]), N]) - self.reflector @ (self.U[p:].T @ N)
        element: Tensor = self.U @ X + outside @ self.V.T
        return element


def tangent_space(ups: Sequence[Tensor], downs: Sequence[Tensor], shape: tuple[int, int], like: Tensor) -> TangentSpace:
    """Find the coordinates of {sum of B dA + dB A}.

    Args:
        ups: The factors B (out, r) whose A varies.
        downs: The factors A (r, in) whose B varies.
        shape: (out, in).
        like: The number format and device of the coordinates; they are found in float64.

    Returns:
        The space. A singular value of the joined factors counts as zero below their number format's precision
        (float32's for 16 bits) times their longer side times the largest, so a B of zeros has no column space and
        duplicates count once.
    """
    U = _turned(_span([up.detach() for up in ups], shape[0]))
    V = _turned(_span([down.detach().T for down in downs], shape[1]))
    p = U.shape[1]
    added = U + torch.eye(len(U), p, dtype=U.dtype, device=U.device)
    reflector = torch.linalg.solve(added[:p], added, left=False)
    return TangentSpace(*(each.to(like.device, like.dtype) for each in (U, V, reflector)))


def _span(columns: Sequence[Tensor], rows: int) -> Tensor:
    """Return an orthonormal basis (rows, rank) of what some tensors' columns span, in float64."""
    if not columns:
        return torch.zeros(rows, 0, dtype=torch.float64)
    # Each by itself scaled to 1, lest a small pair beside a large one be taken for rounding.
    parts = [each.double() / (each.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)) for each in columns]
    joined = torch.cat(parts, dim=1)
    left: Tensor
    left, sizes, _ = torch.linalg.svd(joined, full_matrices=False)
    # At 16 bits' own precision a side of 128 would leave no direction.
    precision = max(min(torch.finfo(each.dtype).eps, torch.finfo(torch.float32).eps) for each in columns)
    threshold = precision * max(joined.shape) * sizes.max() if len(sizes) else 0.0
    return left[:, sizes > threshold]


def _turned(basis: Tensor) -> Tensor:
    """Turn orthonormal columns (n, p) so that their first p rows are symmetric and positive semidefinite."""
    left, _, right = torch.linalg.svd(basis[: basis.shape[1]])
    turned: Tensor = basis @ (left @ right).T
    return turned


class TangentLayer:
    """A merged layer whose matrices move in the factors' tangent spaces alone.

    Args:
        base: The layer with whole matrices.
        pairs: From each factor's ``id`` to the factor up from the rank and the one down to it.
        varied: The ``id`` of each factor that may change.

    Attributes:
        weights: The coordinates by name, leaf tensors that begin at those of the matrix's own projection.
        factors: By the same names, the factors that the matrix is made of.
    """

    def __init__(
        self,
        base: MergedLayer,
        pairs: Mapping[int, tuple[nn.Parameter, nn.Parameter]],
        varied: Collection[int],
    ) -> None:
        self.layer = base.layer
        self.scales = base.scales
        weights: dict[str, Tensor] = {}
        self.weights: Mapping[str, Tensor] = weights
        self.factors: dict[str, list[nn.Parameter]] = {}
        self._base = base
        self._moved: dict[str, _Moved] = {}
        for name, matrix in base.weights.items():
            own = {id(pair[0]): pair for factor in base.factors[name] if (pair := pairs.get(id(factor)))}
            space = tangent_space(
                [up for up, down in own.values() if id(down) in varied],
                [down for up, down in own.values() if id(up) in varied],
                (matrix.shape[0], matrix.shape[1]),
                matrix,
            )
            fixed = matrix.detach()
            start = space.coordinates(fixed)
            there = [each.clone().contiguous().requires_grad_() for each in start]
            self._moved[name] = _Moved(fixed, space, start, there)
            where = name.removesuffix("merged")
            for key, coordinate in zip(("B_dA", "dB_A"), there, strict=True):
                if coordinate.numel():
                    weights[f"{where}tangent.{key}"] = coordinate
                    self.factors[f"{where}tangent.{key}"] = list(base.factors[name])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the layer compute with the moved matrices until the block is left."""
        whole = self._base.weights
        self._base.weights = _Matrices(self._moved)
        try:
            with self._base.installed():
                yield
        finally:
            self._base.weights = whole


@dataclass(frozen=True)
class _Moved:
    """A matrix and how far its coordinates have moved; exactly the matrix where they have not."""

    matrix: Tensor
    space: TangentSpace
    start: tuple[Tensor, Tensor]
    there: list[Tensor]

    def now(self) -> Tensor:
        X, N = (there - start for there, start in zip(self.there, self.start, strict=True))
        return self.matrix + self.space.matrix(X, N)


class _Matrices(Mapping[str, Tensor]):
    """Matrices by name, each computed when it is asked for, so that it follows its coordinates."""

    def __init__(self, moved: Mapping[str, _Moved]) -> None:
        self._moved = moved

    def __getitem__(self, name: str) -> Tensor:
        return self._moved[name].now()

    def __iter__(self) -> Iterator[str]:
        return iter(self._moved)

    def __len__(self) -> int:
        return len(self._moved)

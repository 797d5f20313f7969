r"""The steepest step of LoRA's factors where a step is as long as the change of the weights that they add to.

A pair of factors A ``(r, in)`` and B ``(out, r)`` adds :math:`s\,B A` to a weight. A step :math:`d = (dA, dB)` changes
it, to first order, by :math:`J d = s\,(B\,dA + dB\,A)`. Its length is taken to be the Frobenius norm of that change,
over all pairs together; whatever else is perturbed, a head, say, counts by the Euclidean norm of its own step:

.. math:: \lVert d \rVert^2 = \sum_{\text{pairs}} \lVert J d \rVert_F^2 + \sum_{\text{others}} \lVert d \rVert_2^2 .

Of all steps of length :math:`\rho`, the one with the largest :math:`\langle g, d \rangle` is
:math:`\rho\,(J^\top J)^+ g / \sqrt{g^\top (J^\top J)^+ g}`, for the others :math:`g` itself in the numerator. With
:math:`G` the gradient of the merged weight, :math:`g = J^\top G = (s B^\top G,\; s G A^\top)`, so that
:math:`J (J^\top J)^+ J^\top` projects :math:`G` onto the tangent space :math:`\{B\,dA + dB\,A\}`: with the projections
:math:`P_B = B B^+` and :math:`P_A = A^+ A`,

.. math:: J d \propto P_B G + G P_A - P_B G P_A .

What :math:`J` takes to zero, :math:`(M A, -B M)` for any ``(r, r)`` matrix M, may be added to d, and g is orthogonal
to it: :math:`\langle B^\top G, M A \rangle = \langle G A^\top, B M \rangle`. The step here shares the common part
evenly,

.. math::
    dA = s^{-2}\,(B^\top B)^+ \, g_A \, (I - \tfrac12 P_A), \qquad
    dB = s^{-2}\,(I - \tfrac12 P_B) \, g_B \, (A A^\top)^+ ,

which has the two halves of :math:`P_B G P_A` in :math:`s B\,dA` and :math:`s\,dB\,A`. It differs from
:math:`(J^\top J)^+ g` by something that J takes to zero and, unlike it, goes along with the factors: A/c and c B, or
Q A and :math:`B Q^{-1}` for an orthogonal Q (for any invertible Q where the factors have full rank), get dA/c and c dB,
or Q dA and :math:`dB\,Q^{-1}`. Then :math:`(B + dB)(A + dA)` is the same, not to first order alone, and so is the
perturbed loss. Only Gram matrices ``(r, r)`` are inverted; nothing is as large as the weight.

At B = 0 (a new adapter) A cannot change the weight to first order: dA = 0 and
:math:`dB = s^{-2} g_B (A A^\top)^+`. Of a pair with one perturbed factor, the other frozen or out of scope, J has that
factor alone, and its step is :math:`s^{-2} (B^\top B)^+ g_A` or :math:`s^{-2} g_B (A A^\top)^+`.

The change of the weight also has :math:`s\,dB\,dA`. Where both factors move, it is of the order of
:math:`\rho^2 / \sigma` for a singular value :math:`\sigma` of :math:`s\,B A`, and a new adapter's are small: a step of
A that changes the weight by :math:`\rho` through a B of nearly zero is long beyond measure. So singular values
:math:`\sigma \le \rho` count as zero, and their directions are treated as at B = 0: :math:`P_B` is the projection onto
the left singular vectors of :math:`s\,B A` with :math:`\sigma > \rho`. Which these are does not depend on the
factoring, and the second order is at most of the size of the first; for :math:`\rho \to 0` nothing is left out.

A limit: a loss that sees the factors otherwise than by their product (a penalty on A or B) has a gradient that is no
:math:`J^\top G`; the step is then still of length :math:`\rho`, along what the formulas above make of it.

Not from a paper. The tangent space and its projection are those of matrices of fixed rank (Vandereycken 2013,
arXiv:1209.3834, sec. 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flatpatch.sam.pairs import LoraPair

# Eigenvalues of a Gram matrix below this share of its largest count as zero: singular values below 1e-6 of the largest.
SMALLEST = 1e-12


def make_steepest(pairs: Iterable[LoraPair], steps: Mapping[int, Tensor], *, smallest: float = 0.0) -> None:
    """Turn the gradients of the pairs' factors into their steepest step, in place and up to one factor for all steps.

    Args:
        pairs: The pairs; one that has neither factor in ``steps`` is passed over.
        steps: By ``id`` of the parameter, its gradient as a tensor of its shape, which is written to. What is in no
            pair stays.
        smallest: Singular values of s B A up to this count as zero where both factors move: the step's length.
    """
    for stack in _stacks(pairs, steps):
        dA, dB = steepest(*stack.factors, *stack.moves, smallest=smallest * stack.scales.abs())
        for index, pair in enumerate(stack.pairs):
            for factor, step in ((pair.A, dA), (pair.B, dB)):
                if step is not None:
                    steps[id(factor)].copy_(step[index])


def length(pairs: Iterable[LoraPair], steps: Mapping[int, Tensor]) -> Tensor:
    """Return the length of a step as defined above: of the change of the weights, to first order.

    Args:
        pairs: The pairs; one that has neither factor in ``steps`` is passed over.
        steps: By ``id`` of the parameter, its step as a tensor of its shape.

    Returns:
        A tensor without dimensions, float64.
    """
    pairs = list(pairs)
    paired = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    squares = [squared_change(*stack.factors, *stack.moves).sum() for stack in _stacks(pairs, steps)]
    squares += [torch.linalg.vector_norm(d, dtype=torch.float64).square() for k, d in steps.items() if k not in paired]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp(min=0).sqrt()


def steepest(
    A: Tensor,  # (..., r, in)
    B: Tensor,  # (..., out, r)
    g_A: Tensor | None,  # (..., r, in)
    g_B: Tensor | None,  # (..., out, r)
    *,
    smallest: Tensor | float = 0.0,  # (...)
) -> tuple[Tensor | None, Tensor | None]:
    """Return the steepest dA and dB for gradients of A and B, for both factors times s; see the module.

    A factor without a gradient is not moved, and the other's step is then the steepest of it alone. Otherwise singular
    values of B A up to ``smallest`` count as zero.
    """
    if g_B is None:
        return None if g_A is None else _power(B.mT @ B, -1.0) @ g_A, None
    if g_A is None:
        return None, g_B @ _power(A @ A.mT, -1.0)
    # A = root Q with orthonormal rows Q, and B A = (B root) Q, whose singular values are those of B root.
    root, inverse_root = _power(A @ A.mT, 0.5), _power(A @ A.mT, -0.5)
    Q, B = inverse_root @ A, B @ root
    inverse = _power(B.mT @ B, -1.0, smallest=torch.as_tensor(smallest) ** 2)
    dA, dB = inverse @ root @ g_A, g_B @ inverse_root
    dA, dB = dA - dA @ Q.mT @ Q / 2, dB - B @ inverse @ (B.mT @ dB) / 2
    return root @ dA, dB @ inverse_root


def squared_change(A: Tensor, B: Tensor, dA: Tensor | None, dB: Tensor | None) -> Tensor:
    """Return ``|B dA + dB A|^2`` of each pair, (...), through matrices (r, r) alone; arguments as for `steepest`."""
    squares = A.new_zeros(A.shape[:-2])
    if dA is not None:
        squares = squares + ((B.mT @ B) * (dA @ dA.mT)).sum((-2, -1))
    if dB is not None:
        squares = squares + ((A @ A.mT) * (dB.mT @ dB)).sum((-2, -1))
    if dA is not None and dB is not None:
        squares = squares + 2 * ((B.mT @ dB) * (dA @ A.mT)).sum((-2, -1))
    return squares


def _power(gram: Tensor, exponent: float, *, smallest: Tensor | float = 0.0) -> Tensor:
    """Return a power of positive semidefinite matrices (..., r, r) on their range; it waits for a GPU, once for all.

    Eigenvalues up to ``smallest``, (...), count as zero too.
    """
    values, vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))
    usable = (values > SMALLEST * values[..., -1:]) & (values > torch.as_tensor(smallest).to(values)[..., None])
    powers = torch.where(usable, torch.where(usable, values, 1.0) ** exponent, 0.0)
    found: Tensor = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return found


@dataclass(frozen=True)
class _Stack:
    """Pairs of one shape of which the same factors move, in float64, the factors times their scale s."""

    pairs: list[LoraPair]
    factors: tuple[Tensor, Tensor]  # (k, r, in), (k, out, r)
    moves: tuple[Tensor | None, Tensor | None]  # of the same shapes
    scales: Tensor  # (k,)


def _stacks(pairs: Iterable[LoraPair], steps: Mapping[int, Tensor]) -> Iterator[_Stack]:
    alike: dict[object, list[LoraPair]] = {}
    for pair in pairs:
        moving = id(pair.A) in steps, id(pair.B) in steps
        if any(moving):
            alike.setdefault((pair.A.shape, pair.B.shape, pair.A.device, moving), []).append(pair)
    for members in alike.values():
        by_factor = [[pair.A for pair in members], [pair.B for pair in members]]
        A, B = (
            torch.stack([factor.detach().double() * pair.scale for factor, pair in zip(factors, members, strict=True)])
            for factors in by_factor
        )
        dA, dB = (
            torch.stack([steps[id(factor)].double() for factor in factors]) if id(factors[0]) in steps else None
            for factors in by_factor
        )
        scales = torch.stack([torch.as_tensor(pair.scale, dtype=A.dtype, device=A.device) for pair in members])
        yield _Stack(members, (A, B), (dA, dB), scales)

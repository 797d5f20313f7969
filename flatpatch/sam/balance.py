r"""Balancing of LoRA's factors: what SAM's second pass does to their norms, done to them directly (BAR).

Li et al. 2024 (arXiv:2410.14802) show for LoRA that SAM pulls the norms of the two factors together, and put in its place a
rescaling before the base optimizer's update, of each pair by itself: with the learning rate :math:`\eta_t` and the
strength :math:`\alpha_t`, one factor is multiplied by :math:`1 + \alpha_t \eta_t` and the other by
:math:`1 - \alpha_t \eta_t`. nBAR lets that one grow whose gradient has the larger norm, oBAR that one whose own norm is the
smaller. The product :math:`B A` changes by :math:`(\alpha_t \eta_t)^2` of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.sam.pairs import LoraPair

CRITERIA = ("gradient", "norm")


def trained_pairs(pairs: Iterable[LoraPair]) -> list[LoraPair]:
    """Return the pairs of which both factors are trained.

    Raises:
        UserError: If there is none.
    """
    pairs = list(pairs)
    both = [pair for pair in pairs if pair.A.requires_grad and pair.B.requires_grad]
    if not both:
        raise UserError(
            "balancing weighs LoRA's A against B, and this model trains "
            f"{'one factor of each pair alone' if pairs else 'no LoRA factors'}. Choose another kind of SAM."
        )
    return both


@torch.no_grad()
def balance(pairs: Iterable[LoraPair], optimizer: Any, *, strength: float, by: str) -> None:
    """Rescale the factors of each pair, in place, before an optimizer's update.

    A pair without gradients, or with one that is not finite, stays as it is. 0 leaves every weight as it is, bit for bit.

    Args:
        pairs: The pairs, each with both factors trained.
        optimizer: Whose groups have the factors' learning rates.
        strength: The strength alpha.
        by: "gradient" (nBAR) or "norm" (oBAR).

    Raises:
        ValueError: If ``by`` is neither.
    """
    if by not in CRITERIA:
        raise ValueError(f"by must be one of {', '.join(CRITERIA)}, got {by!r}")
    rates = {id(weight): float(group["lr"]) for group in optimizer.param_groups for weight in group["params"]}
    for pair in pairs:
        if pair.A.grad is None or pair.B.grad is None:
            continue
        device = pair.A.device
        g_A, g_B = _norm(pair.A.grad), _norm(pair.B.grad).to(device)
        A_grows = g_A >= g_B if by == "gradient" else _norm(pair.A) < _norm(pair.B).to(device)
        sign = torch.where(g_A.isfinite() & g_B.isfinite(), torch.where(A_grows, 1.0, -1.0), 0.0)
        pair.A.mul_((1 + sign * strength * rates[id(pair.A)]).to(pair.A.dtype))
        pair.B.mul_((1 - sign * strength * rates[id(pair.B)]).to(pair.B.device, pair.B.dtype))


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm

r"""Balancing of LoRA's factors: what SAM's second pass does to their norms, done to them directly (BAR).

Li et al. 2024 (arXiv:2410.14802) show for LoRA that SAM pulls the norms of the two factors together, and put in its
place a rescaling before the base optimizer's update, of each pair by itself: with the learning rate :math:`\eta_t` and
the strength :math:`\alpha_t`, one factor is multiplied by :math:`1 + \alpha_t \eta_t` and the other by
:math:`1 - \alpha_t \eta_t`. nBAR lets that one grow whose gradient has the larger norm, oBAR that one whose own norm
is the smaller. The product :math:`B A` changes by :math:`(\alpha_t \eta_t)^2` of itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.sam.pairs import LoraPair

CRITERIA = ("gradient", "norm")

# Of each optimizer, what is registered to come before its next update.
_waiting: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def trained_pairs(pairs: Iterable[LoraPair]) -> list[LoraPair]:
    """Return the pairs of which both factors are trained.

    Raises:
        UserError: If there is none.
    """
    pairs = list(pairs)
    both = [pair for pair in pairs if pair.A.requires_grad and pair.B.requires_grad]
    if not both:
        raise UserError(
            "balancing weighs LoRA's A against its B, and here no pair has both trained and in the scope. Choose "
            "another kind of SAM, or scope=lora."
        )
    return both


def balance_before_update(
    pairs: Iterable[LoraPair],
    optimizer: Any,
    weights: Sequence[Tensor],
    strengths: Sequence[float],
    *,
    share: float,
    by: str,
) -> None:
    """Let an optimizer's next update begin with `balance`; what was asked for before since its latest is dropped.

    Args:
        pairs: As `lora_pairs` finds them; those with one trained factor stay as they are.
        optimizer: A torch optimizer that holds the factors themselves.
        weights: What may be rescaled.
        strengths: The strength of each of these.
        share: Times this.
        by: As for `balance`.

    Raises:
        UserError: If no pair can be balanced, or the optimizer holds others than the model's own weights.
    """
    of_weights = {id(weight): strength * share for weight, strength in zip(weights, strengths, strict=True)}
    chosen = trained_pairs(pair for pair in pairs if id(pair.A) in of_weights and id(pair.B) in of_weights)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if any(id(factor) not in held for pair in chosen for factor in (pair.A, pair.B)):
        raise UserError(
            "balancing rescales LoRA's factors before the optimizer's update, and this optimizer updates copies of "
            "them (as under DeepSpeed). Train without DeepSpeed, or choose another kind of SAM."
        )
    done = False

    def first_balance(updating: Any, *_: Any) -> None:
        nonlocal done
        if not done:
            done = True
            rates = {id(weight): group["lr"] for group in updating.param_groups for weight in group["params"]}
            balance(chosen, {key: float(rates[key]) * each for key, each in of_weights.items() if key in rates}, by=by)

    if optimizer in _waiting:
        _waiting.pop(optimizer).remove()
    _waiting[optimizer] = optimizer.register_step_pre_hook(first_balance)


@torch.no_grad()
def balance(pairs: Iterable[LoraPair], amounts: Mapping[int, float], *, by: str) -> None:
    """Rescale the factors of each pair, in place.

    A pair without gradients, or with one that is not finite, stays as it is. 0 leaves all as they are, bit for bit.

    Args:
        pairs: The pairs, each with both factors trained.
        amounts: By ``id`` of the factor, the strength times the learning rate.
        by: "gradient" (nBAR) or "norm" (oBAR).

    Raises:
        ValueError: If ``by`` is neither.
    """
    if by not in CRITERIA:
        raise ValueError(f"by must be one of {', '.join(CRITERIA)}, got {by!r}")
    for pair in pairs:
        if pair.A.grad is None or pair.B.grad is None:
            continue
        device = pair.A.device
        g_A, g_B = _norm(pair.A.grad), _norm(pair.B.grad).to(device)
        A_grows = g_A >= g_B if by == "gradient" else _norm(pair.A) < _norm(pair.B).to(device)
        sign = torch.where(g_A.isfinite() & g_B.isfinite(), torch.where(A_grows, 1.0, -1.0), 0.0).double()
        pair.A.mul_((1 + sign * amounts[id(pair.A)]).to(pair.A.dtype))
        pair.B.mul_((1 - sign * amounts[id(pair.B)]).to(pair.B.device, pair.B.dtype))


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm

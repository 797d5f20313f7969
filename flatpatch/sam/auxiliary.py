r"""Pairs of factors beside LoRA's own that climb while those descend (Bi-LoRA).

During a pass the layer of each weight :math:`W'` that LoRA adds to computes with :math:`W' + s\,B_2 A_2`, with the
scale s of LoRA's own pair, so that the same pass gives the gradients in :math:`A_2` and :math:`B_2`. No module holds
them: a hook on the layer adds their part to its output, and is there during the pass alone.

A pair is a list of four tensors: A2 ``(r, in)``, B2 ``(out, r)``, and what the batches of the optimizer's present step
have so far been adding to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, pad

from flatpatch.errors import UserError
from flatpatch.kinds import mixed_seed
from flatpatch.sam.frozen import FrozenWeight

Pair = list[Tensor]


def new_pairs(weights: Sequence[FrozenWeight], *, rank: int, seed: int) -> list[Pair]:
    """Make a pair for each weight: A2 uniform within 1 / sqrt(in), as LoRA begins, and B2 zero.

    No global random generator is touched.

    Args:
        weights: The weights, ``(out, in)``.
        rank: Of the product.
        seed: The numbers follow from this.
    """
    pairs = []
    for place, each in enumerate(weights):
        outputs, inputs = each.weight.shape
        about: dict[str, Any] = {
            "dtype": torch.promote_types(each.weight.dtype, torch.float32),
            "device": each.weight.device,
        }
        generator = torch.Generator(each.weight.device).manual_seed(mixed_seed(seed, place))
        bound = 1 / math.sqrt(inputs)
        A = torch.empty(rank, inputs, **about).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(outputs, rank, **about)
        pairs.append([A, B, torch.zeros_like(A), torch.zeros_like(B)])
    return pairs


@torch.no_grad()
def norm(weights: Sequence[FrozenWeight], pairs: Sequence[Pair]) -> Tensor:
    """Return the norm of all that the pairs add to the weights, (), float64; nothing of the weights' size is made."""
    squares = [
        (each.scale**2 * ((B.T @ B) * (A @ A.T)).sum(dtype=torch.float64)).to(pairs[0][0].device)
        for each, (A, B, *_) in zip(weights, pairs, strict=True)
    ]
    return torch.stack(squares).sum().clamp(min=0).sqrt()


@torch.no_grad()
def climbed(weights: Sequence[FrozenWeight], pairs: Sequence[Pair], *, rho: float) -> tuple[list[Pair], Tensor]:
    """Add to each pair what is due to it, and scale all alike so that what they add to the weights is within a radius.

    Args:
        weights: The weights.
        pairs: Their pairs.
        rho: Radius of the norm over all weights together.

    Returns:
        The pairs, with nothing due to them, and that norm, (), float64.
    """
    factors = torch._foreach_add([f for pair in pairs for f in pair[:2]], [due for pair in pairs for due in pair[2:]])
    length = norm(weights, _paired(factors))
    _multiply(factors, torch.where(length > rho, (rho / length).sqrt(), 1.0))
    nothing = [torch.zeros_like(factor) for factor in factors]
    return _paired(factors, nothing), length.clamp(max=rho)


def _paired(factors: Sequence[Tensor], due: Sequence[Tensor] = ()) -> list[Pair]:
    return [[*factors[place : place + 2], *due[place : place + 2]] for place in range(0, len(factors), 2)]


def _multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place; one call for all of a device, as they are small and many."""
    for device in {tensor.device for tensor in tensors}:
        there = [tensor for tensor in tensors if tensor.device == device]
        torch._foreach_mul_(there, factor.to(device))


@contextmanager
def added(weights: Sequence[FrozenWeight], pairs: Sequence[Pair]) -> Iterator[list[Tensor]]:
    """Have the weights' layers compute with the pairs too, inside the block.

    Args:
        weights: The weights, of known layers.
        pairs: Their pairs.

    Yields:
        A2 and B2 of each pair in turn, as tensors that gather a gradient.
    """
    leaves = [factor.detach().requires_grad_() for A, B, *_ in pairs for factor in (A, B)]
    hooks: list[Any] = []
    try:
        for each, A, B in zip(weights, leaves[::2], leaves[1::2], strict=True):
            assert each.layer is not None
            hooks.append(each.layer.register_forward_hook(_adding(each, A, B)))
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def _adding(weight: FrozenWeight, A: Tensor, B: Tensor) -> Any:
    def add(_: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        # Of a module copied to several devices (nn.DataParallel) each copy comes here.
        down, up = (factor.to(x.device, x.dtype) for factor in (A, weight.scale * B))
        change = linear(linear(x, down), up)
        if len(B) < output.shape[-1]:
            change = pad(change, (weight.first, output.shape[-1] - len(B) - weight.first))
        return output + change.to(output.dtype)

    return add


@torch.no_grad()
def heard(
    pairs: Sequence[Pair],
    leaves: Sequence[Tensor],
    *,
    rate: float,
    scale: Tensor | float = 1.0,
    average: bool = False,
) -> tuple[list[Pair], Tensor]:
    """Put down that the pairs are to climb along the gradient of a pass.

    Args:
        pairs: The pairs.
        leaves: Of :func:`added`, with the gradient that the pass left.
        rate: How far along their gradient they climb.
        scale: Of the loss that was differentiated.
        average: Whether to climb along the mean of all processes' gradients.

    Returns:
        The pairs, and whether the gradient was finite, (), bool; if it was not, nothing is due for it.

    Raises:
        UserError: If no pair has any gradient.
    """
    if all(leaf.grad is None for leaf in leaves):
        raise UserError(
            "sam=bilora adds its pairs to the outputs of the layers that have LoRA, and the loss depends on none of "
            f"these {len(pairs)} layers' outputs. Choose another kind of SAM."
        )
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    if average and dist.is_available() and dist.is_initialized():
        gradients = _averaged(gradients)
    device = gradients[0].device
    finite = torch.stack([size.to(device) for size in torch._foreach_norm(gradients)]).isfinite().all()
    factor = torch.where(finite, rate / scale, 0.0)
    for gradient in gradients:
        gradient.nan_to_num_(0.0, 0.0, 0.0)  # its product with 0 would not be 0
    _multiply(gradients, factor)
    due = torch._foreach_add([part for pair in pairs for part in pair[2:]], gradients)
    return _paired([factor for pair in pairs for factor in pair[:2]], due), finite


def _averaged(gradients: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]

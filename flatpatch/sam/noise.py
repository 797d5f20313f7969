r"""Noise on the weights that LoRA's factors add to, held during a pass (Flat-LoRA).

With :math:`W' = W + s\,B A` (and what earlier tasks' factors add), ``(out, in)``, each entry of row i moves by a normal
number of variance :math:`\sigma^2 \lVert W'_{i,:} \rVert_2^2 / \text{in}`, so that the whole moves by about
:math:`\sigma \lVert W' \rVert_F`.
The noise is added to the frozen W, which is put back from a copy, bit for bit: the copy is what this takes of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.kinds import mixed_seed
from flatpatch.sam.pairs import LoraPair

_OTHERS = (("lora_A", "lora_B"), ("loranew_A", "loranew_B"))


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that factors add to.

    Attributes:
        weight: The frozen weight's own memory, ``(out, in)``.
        products: All that is added to it as (scale, B, A), of earlier tasks too.
        rest: What else is added, a tensor of its shape, or None.
    """

    weight: Tensor
    products: list[tuple[float, Tensor, Tensor]]
    rest: Tensor | None = None

    def row_norms(self) -> Tensor:
        """Return the norms of the rows of W', (out,), in at least float32."""
        merged = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        for scale, B, A in self.products:
            merged = merged + scale * (B.to(merged.dtype) @ A.to(merged.dtype))
        if self.rest is not None:
            merged = merged + self.rest
        norms: Tensor = torch.linalg.vector_norm(merged, dim=1)
        return norms


def frozen_weights(pairs: Iterable[LoraPair]) -> list[FrozenWeight]:
    """Find the weights that pairs add to, each once.

    Raises:
        UserError: If a pair's weight is not where the known layers have it.
    """
    found: dict[tuple[int, int], FrozenWeight] = {}
    for pair in pairs:
        each = _frozen(pair)
        found.setdefault((each.weight.data_ptr(), each.weight.numel()), each)
    return list(found.values())


@torch.no_grad()
def _frozen(pair: LoraPair) -> FrozenWeight:
    owner: Any = pair.owner
    letter = pair.name.partition("lora_*_")[2][:1]
    if isinstance(getattr(owner, "lora_A", None), nn.ModuleDict) and not getattr(owner, "fan_in_fan_out", False):
        # A linear layer with its factors inside; newer releases of peft wrap it.
        weight: Tensor = getattr(owner, "base_layer", owner).weight.detach()
        products, rest = _products(owner), getattr(owner, "old", None)
    elif letter and isinstance(getattr(owner, f"lora_A_{letter}", None), nn.ModuleList) and hasattr(owner, "qkv"):
        # An attention with one pair for each task.
        weight = owner.qkv.weight.detach().chunk(3)["qkv".index(letter)]
        factors = zip(getattr(owner, f"lora_B_{letter}"), getattr(owner, f"lora_A_{letter}"), strict=True)
        products, rest = [(1.0, B.weight.detach(), A.weight.detach()) for B, A in factors], None
    else:
        weight, products, rest = torch.empty(0), [], None
    if weight.shape != (pair.B.shape[0], pair.A.shape[1]):
        raise UserError(
            f"sam=flatlora: the weight that {pair.name} adds to is not where a known layer has it, so there is nothing "
            "to put noise on. Choose another kind of SAM."
        )
    return FrozenWeight(weight, products, rest)


def _products(owner: Any) -> list[tuple[float, Tensor, Tensor]]:
    scaling = getattr(owner, "scaling", 1.0)
    found = []
    for of_A, of_B in _OTHERS:
        for name in getattr(owner, of_A, ()):
            scale = scaling
            if isinstance(scaling, Mapping):
                scale = scaling.get(name, next(iter(scaling.values())))
            found.append(
                (float(scale), getattr(owner, of_B)[name].weight.detach(), getattr(owner, of_A)[name].weight.detach())
            )
    return found


@contextmanager
def noised(weights: Iterable[FrozenWeight], *, sigma: float, seed: int) -> Iterator[None]:
    """Hold weights with noise inside the block; leaving it restores them, bit for bit.

    No global random generator is touched. With sigma 0 nothing is written.

    Args:
        weights: The weights.
        sigma: See the module.
        seed: The noise follows from this.

    Yields:
        Nothing.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for place, each in enumerate(weights if sigma else ()):
                generator = torch.Generator(each.weight.device).manual_seed(mixed_seed(seed, place))
                spread = sigma / math.sqrt(each.weight.shape[1]) * each.row_norms()
                noise = torch.empty(each.weight.shape, dtype=spread.dtype, device=spread.device)
                noise.normal_(generator=generator).mul_(spread[:, None])
                saved.append((each.weight, each.weight.clone()))
                each.weight.copy_(each.weight + noise)
            torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)
            torch.clear_autocast_cache()

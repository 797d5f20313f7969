"""The frozen weights that LoRA's factors add to, and the layers that compute with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.sam.pairs import LoraPair

_OTHERS = (("lora_A", "lora_B"), ("loranew_A", "loranew_B"))


@dataclass(frozen=True)
class FrozenWeight:
    """A weight that factors add to.

    Attributes:
        weight: The frozen weight's own memory, ``(out, in)``.
        products: All that is added to it as (scale, B, A), of earlier tasks too.
        rest: What else is added, a tensor of its shape, or None.
        layer: The module that is called with what the weight is multiplied by, if known.
        first: Where the layer's outputs that are this weight's begin.
        scale: That of the product of the trained pair.
    """

    weight: Tensor
    products: list[tuple[float, Tensor, Tensor]]
    rest: Tensor | None = None
    layer: nn.Module | None = None
    first: int = 0
    scale: float | Tensor = 1.0

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
    layer: nn.Module | None = pair.owner
    first = 0
    if isinstance(getattr(owner, "lora_A", None), nn.ModuleDict) and not getattr(owner, "fan_in_fan_out", False):
        # A linear layer with its factors inside; newer releases of peft wrap it.
        weight: Tensor = getattr(owner, "base_layer", owner).weight.detach()
        products, rest = _products(owner), getattr(owner, "old", None)
    elif letter and isinstance(getattr(owner, f"lora_A_{letter}", None), nn.ModuleList) and hasattr(owner, "qkv"):
        # An attention with one pair for each task.
        place = "qkv".index(letter)
        weight, layer = owner.qkv.weight.detach().chunk(3)[place], owner.qkv
        first = place * len(weight)
        factors = zip(getattr(owner, f"lora_B_{letter}"), getattr(owner, f"lora_A_{letter}"), strict=True)
        products, rest = [(1.0, B.weight.detach(), A.weight.detach()) for B, A in factors], None
    else:
        weight, products, rest = torch.empty(0), [], None
    if weight.shape != (pair.B.shape[0], pair.A.shape[1]):
        raise UserError(
            f"the weight that {pair.name} adds to is not where a known layer has it, and this kind of SAM perturbs "
            "that weight. Choose another kind of SAM."
        )
    return FrozenWeight(weight, products, rest, layer, first, pair.scale)


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

r"""Noise on the weights that LoRA's factors add to, held during a pass (Flat-LoRA).

With :math:`W' = W + s\,B A` (and what earlier tasks' factors add), ``(out, in)``, each entry of row i moves by a normal
number of variance :math:`\sigma^2 \lVert W'_{i,:} \rVert_2^2 / \text{in}`, so that the whole moves by about
:math:`\sigma \lVert W' \rVert_F`.
The noise is added to the frozen W, which is put back from a copy, bit for bit: the copy is what this takes of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flatpatch.kinds import mixed_seed
from flatpatch.sam.frozen import FrozenWeight


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

"""Bi-LoRA: auxiliary pairs of factors that climb while LoRA's own descend, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flatpatch.kinds.base import Kind, Passes, mixed_seed


class BiLora(Kind):
    r"""Bi-LoRA (Liu et al. 2025, arXiv:2508.19564).

    In training alone each weight that LoRA adds to has an auxiliary pair besides, with LoRA's scale s:

    .. math::
        y = W' x + s B_1 A_1 x + s B_2 A_2 x.

    One pass at both gives the gradients of both. LoRA's own pair descends by the base optimizer U, the auxiliary one
    climbs by plain gradient steps, and is then scaled back where it has left the ball:

    .. math::
        (A_1, B_1) \leftarrow U\big((A_1, B_1), \nabla_{A_1, B_1} L\big), \qquad
        (A_2, B_2) \leftarrow (A_2, B_2) + \eta_2 \nabla_{A_2, B_2} L, \\
        (A_2, B_2) \leftarrow \sqrt{\rho / c}\; (A_2, B_2) \quad \text{if } c > \rho, \qquad
        c = \big(\textstyle\sum_j \lVert s B_2 A_2 \rVert_F^2\big)^{1/2}

    over all such weights j together, once an optimizer's step. The products' norms are taken from r x r matrices. The
    paper has r = 8 and :math:`\eta_2 = \eta_1`, the learning rate, whatever LoRA's rank.
    """

    name = "bilora"
    title = "Bi-LoRA"
    place = 11
    climbs = False
    takes_radius = False
    of_pairs = True
    noises = True
    idle = ("scope",)
    arguments: ClassVar[Mapping[str, str]] = {"bilora_rank": "rank", "bilora_lr": "rate"}
    seeded = True

    def __init__(self, rank: int = 8, rate: float = 0.0, seed: int = 0) -> None:
        self.rank, self.rate, self.seed = rank, rate, seed
        self._pairs: list[list[Any]] | None = None

    def step(self, passes: Passes) -> None:
        """Take the one pass with the auxiliary pairs added."""
        seed = mixed_seed(self.seed, *passes.place)
        self._pairs = passes.descend_against(self._pairs, rank=self.rank, rate=self.rate or None, seed=seed)

    def state(self) -> dict[str, Any]:
        """Return the auxiliary pairs, with what they are still to climb."""
        return {"pairs": self._pairs}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Go on with these pairs."""
        self._pairs = kept["pairs"]


KIND = BiLora

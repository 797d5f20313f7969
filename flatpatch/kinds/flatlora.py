"""Flat-LoRA: random noise on the merged weights, in one pass."""

from __future__ import annotations

import math

from flatpatch.kinds.base import Kind, Passes, mixed_seed


class FlatLora(Kind):
    r"""Flat-LoRA (Li et al. 2024, arXiv:2409.14396).

    .. math::
        (A, B) \leftarrow U\big((A, B),\; \nabla_{A, B} L(W' + \epsilon)\big), \qquad
        \epsilon_{ij} \sim \mathcal{N}\big(0,\; \tfrac{\sigma_t^2}{n} \lVert W'_{i,:} \rVert_2^2\big), \qquad
        \sigma_t = \tfrac{\sigma}{2} (1 - \cos \pi t / T)

    with the merged weights :math:`W'` of n inputs, :math:`\sigma` = rho, and t of the task's T steps. The noise is on
    all the weights that LoRA adds to, whatever the factors could reach. It follows from the seed and each step's place.
    """

    name = "flatlora"
    title = "Flat-LoRA"
    place = 11
    climbs = False
    takes_radius = False
    of_pairs = True
    noises = True
    idle = ("sync", "scope")
    seeded = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def step(self, passes: Passes) -> None:
        """Take the one pass with noise on the weights."""
        share = (1 - math.cos(math.pi * passes.progress)) / 2
        with passes.noised(share, mixed_seed(self.seed, *passes.place)):
            passes.descend()


KIND = FlatLora

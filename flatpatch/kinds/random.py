"""Random directions: the control of SAM."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes, mixed_seed


class RandomDirections(Kind):
    r"""A control that costs as much as SAM and differs from it in the direction alone.

    .. math:: \epsilon = \rho\, z / \lVert z \rVert_2, \qquad z \sim \mathcal{N}(0, 1)

    over the same weights. The directions follow from the seed and each step's place in the training.
    """

    name = "random"
    title = "random directions"
    place = 2
    seeded = True
    climbs = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def step(self, passes: Passes) -> None:
        """Move anywhere, and descend with the gradient found there."""
        with passes.perturbed(passes.gradient(), seed=mixed_seed(self.seed, *passes.place)):
            passes.descend()


KIND = RandomDirections

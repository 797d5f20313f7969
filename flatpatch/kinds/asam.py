"""Adaptive SAM."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes


class Adaptive(Kind):
    r"""ASAM (Kwon et al. 2021, arXiv:2102.11600, Eq. 11).

    .. math:: \epsilon = \rho\, T^2 g / \lVert T g \rVert_2, \qquad T = \lvert w \rvert + \eta

    element by element. Its radius is on another scale than SAM's.
    """

    name = "asam"
    title = "ASAM"
    place = 1
    arguments = {"eta": "eta"}
    takes_radius = False
    papers_rho = (0.5,)

    def __init__(self, eta: float = 0.01) -> None:
        self.eta = eta

    def step(self, passes: Passes) -> None:
        """Climb along the scaled gradient, and descend with the one found there."""
        with passes.perturbed(passes.gradient(), eta=self.eta):
            passes.descend()


KIND = Adaptive

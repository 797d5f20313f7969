"""SAM itself."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes


class SharpnessAware(Kind):
    r"""SAM (Foret et al. 2021, arXiv:2010.01412, Eq. 2).

    .. math:: \epsilon = \rho\, g / \lVert g \rVert_2, \qquad w \leftarrow U(w, \nabla L(w + \epsilon))

    with :math:`g = \nabla L(w)` and the base optimizer's update :math:`U`.
    """

    name = "sam"
    title = "SAM"
    place = 0

    def step(self, passes: Passes) -> None:
        """Climb along the gradient, and descend with the one found there."""
        with passes.perturbed(passes.gradient()):
            passes.descend()


KIND = SharpnessAware

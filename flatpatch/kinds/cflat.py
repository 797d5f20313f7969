"""C-Flat: SAM and a flat gradient norm, for continual learning."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes, Vector
from flatpatch.kinds.vectors import is_finite, only_where, plus, where


class ContinualFlat(Kind):
    r"""C-Flat (Bian et al. 2024, arXiv:2404.00986), in four passes.

    .. math::
        g_0 &= \nabla L(w), & g_1 &= \nabla L(w + \rho\, g_0 / \lVert g_0 \rVert), \\
        w_1 &= w + \rho\, (g_1 - g_0) / \lVert g_1 - g_0 \rVert, & g_2 &= \nabla L(w_1), \\
        g_3 &= \nabla L(w_1 + \rho\, g_2 / \lVert g_2 \rVert), & w &\leftarrow U(w,\; g_1 + \lambda\, (g_3 - g_2))

    :math:`g_1` is SAM's gradient; :math:`g_3 - g_2` is that of the largest gradient norm in the ball, by the radius
    :math:`\rho` that all steps of it have in the paper. :math:`\lambda = 0` is SAM, in two passes.
    """

    name = "cflat"
    title = "C-Flat"
    arguments = {"cflat_lambda": "weight"}
    climbs = False

    def __init__(self, weight: float = 0.2) -> None:
        self.weight = weight

    def step(self, passes: Passes) -> None:
        """Take the four passes, and descend along the combination."""
        if self.weight == 0:
            with passes.perturbed(passes.gradient()):
                passes.descend()
            return
        first = passes.whole_gradient()
        with passes.perturbed(passes.chosen(first)):
            sharp = passes.whole_gradient()
        with passes.perturbed(passes.chosen(plus(sharp, -1.0, first))):
            second = passes.whole_gradient()
            with passes.perturbed(passes.chosen(second)):
                passes.descend(lambda found: self._combined(sharp, second, found))

    def _combined(self, sharp: Vector, second: Vector, found: Vector) -> Vector:
        flat = where(is_finite(second, found), plus(found, -1.0, second))
        return only_where(found, plus(sharp, self.weight, flat))


KIND = ContinualFlat

"""Surrogate-gap SAM."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes, Vector
from flatpatch.kinds.vectors import dot, is_finite, only_where, over, plus, where


class SurrogateGap(Kind):
    r"""GSAM (Zhuang et al. 2022, arXiv:2203.08065, Algorithm 1).

    .. math:: w \leftarrow U(w,\; g_p - \alpha\, g_\perp), \qquad
        g_\perp = g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2}\, g_p

    with :math:`g = \nabla L(w)`, :math:`g_p = \nabla L(w + \epsilon)` and SAM's :math:`\epsilon`. Going against
    :math:`g_\perp` narrows the gap :math:`L(w + \epsilon) - L(w)` and, to first order, leaves the loss at
    :math:`w + \epsilon`. The products are over all trained weights. Its paper also has the radius follow the learning
    rate, which is not done here. :math:`\alpha = 0` is SAM.
    """

    name = "gsam"
    title = "GSAM"
    arguments = {"gsam_alpha": "alpha"}
    climbs = False

    def __init__(self, alpha: float = 0.4) -> None:
        self.alpha = alpha

    def step(self, passes: Passes) -> None:
        """Climb as SAM does, and descend along the combination."""
        if self.alpha == 0:
            with passes.perturbed(passes.gradient()):
                passes.descend()
            return
        gradient = passes.whole_gradient()
        with passes.perturbed(passes.chosen(gradient)):
            passes.descend(lambda found: self._combined(gradient, found))

    def _combined(self, gradient: Vector, found: Vector) -> Vector:
        along = over(dot(gradient, found), dot(found, found))
        across = plus(gradient, -along, found)
        usable = where(is_finite(gradient, found), across)
        return only_where(found, plus(found, -self.alpha, usable))


KIND = SurrogateGap

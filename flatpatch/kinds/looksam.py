"""SAM at every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatpatch.kinds.base import Kind, Passes, Vector
from flatpatch.kinds.vectors import dot, is_finite, only_where, over, plus, where


class LookAgain(Kind):
    r"""LookSAM (Liu et al. 2022, arXiv:2203.02714, Algorithm 1).

    Every :math:`k`-th step, the first among them, is SAM's, and keeps what of its gradient :math:`g_s` is not along
    the plain one :math:`g`; each of the others takes one pass and adds that to its own gradient:

    .. math:: g_v = g_s - \frac{\langle g_s, g \rangle}{\lVert g \rVert^2}\, g, \qquad
        w \leftarrow U\Big(w,\; g + \alpha\, \frac{\lVert g \rVert}{\lVert g_v \rVert}\, g_v\Big)

    with norms over all trained weights. :math:`k = 1` is SAM.
    """

    name = "looksam"
    title = "LookSAM"
    arguments = {"looksam_k": "every", "looksam_alpha": "alpha"}
    climbs = False

    def __init__(self, every: int = 5, alpha: float = 0.7) -> None:
        self.every = every
        self.alpha = alpha
        self._steps = 0
        self._across: Vector = []

    def step(self, passes: Passes) -> None:
        """Take SAM's step, or one pass and what the latest of SAM's steps has left."""
        number, self._steps = self._steps, self._steps + 1
        if self.every == 1:
            with passes.perturbed(passes.gradient()):
                passes.descend()
        elif number % self.every == 0:
            gradient = passes.whole_gradient()
            with passes.perturbed(passes.chosen(gradient)):
                passes.descend(lambda found: self._kept(gradient, found))
        else:
            passes.descend(self._combined)

    def _kept(self, gradient: Vector, found: Vector) -> Vector:
        across = plus(found, -over(dot(found, gradient), dot(gradient, gradient)), gradient)
        self._across = where(is_finite(gradient, found), across)
        return found

    def _combined(self, gradient: Vector) -> Vector:
        across = [a if a is None or g is None else a.to(g) for a, g in zip(self._across, gradient, strict=True)]
        factor = over(dot(gradient, gradient), dot(across, across)).sqrt()
        return only_where(gradient, plus(gradient, self.alpha * factor, across))

    def state(self) -> dict[str, Any]:
        """Return the number of steps taken, and what the latest of SAM's has left."""
        return {"steps": self._steps, "across": self._across}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Go on after so many steps."""
        self._steps, self._across = kept["steps"], list(kept["across"])


KIND = LookAgain

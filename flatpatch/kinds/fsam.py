"""Friendly SAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatpatch.kinds.base import Kind, Passes, Vector
from flatpatch.kinds.vectors import is_finite, plus, where


class Friendly(Kind):
    r"""F-SAM (Li et al. 2024, arXiv:2403.12350), as its authors' code has it.

    .. math:: \epsilon = \rho\, d / \lVert d \rVert_2, \quad d = g_t - \sigma\, m_{t-1}, \qquad
        m_t = \lambda\, m_{t-1} + (1 - \lambda)\, g_t

    so that the weights move along what is the batch's own in the gradient :math:`g_t`, not along the mean
    :math:`m`. A weight's first gradient is climbed along as it is, and is its first :math:`m`. :math:`\sigma = 0` is
    SAM.
    """

    name = "fsam"
    title = "F-SAM"
    arguments = {"fsam_sigma": "sigma", "fsam_lambda": "decay"}

    def __init__(self, sigma: float = 1.0, decay: float = 0.9) -> None:
        self.sigma = sigma
        self.decay = decay
        self._mean: Vector = []

    def step(self, passes: Passes) -> None:
        """Climb along the gradient without its mean, and descend with the one found there."""
        if self.sigma == 0:
            with passes.perturbed(passes.gradient()):
                passes.descend()
            return
        with passes.perturbed(self._direction(passes.gradient(keep=True))):
            passes.descend()

    def _direction(self, gradient: Vector) -> Vector:
        before = self._mean or [None] * len(gradient)
        before = [m if m is None or g is None else m.to(g) for m, g in zip(before, gradient, strict=True)]
        known = [m if g is not None else None for m, g in zip(before, gradient, strict=True)]
        change = where(is_finite(gradient), plus(gradient, -1.0, known))
        self._mean = [
            m if g is None else (g_new if m is None else m + (1 - self.decay) * g_new)
            for m, g, g_new in zip(before, gradient, change, strict=True)
        ]
        return plus(gradient, -self.sigma, known)

    def state(self) -> dict[str, Any]:
        """Return the mean of the gradients."""
        return {"mean": self._mean}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Go on with a mean of the gradients."""
        self._mean = list(kept["mean"])


KIND = Friendly

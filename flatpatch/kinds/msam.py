"""Momentum-SAM: one pass."""

from __future__ import annotations

from flatpatch.kinds.base import Kind, Passes


class Momentum(Kind):
    r"""MSAM (Becker et al. 2024, arXiv:2401.12033).

    .. math:: \epsilon = -\rho\, v / \lVert v \rVert_2, \qquad w \leftarrow U(w, \nabla L(w + \epsilon))

    with the base optimizer's momentum :math:`v`: SGD's ``momentum_buffer``, Adam's ``exp_avg``. The weights move on
    the way that they have been going, beyond the valley's bottom. The one pass is at the perturbed weights, so the loss
    at the others is not known, and what is recorded as the gradient's norm is the momentum's. A weight moves from its
    second step on.
    """

    name = "msam"
    title = "momentum-SAM"
    climbs = False
    takes_radius = False
    reads_momentum = True
    idle = ("sync",)

    def step(self, passes: Passes) -> None:
        """Move along the momentum, and descend with the gradient found there."""
        with passes.perturbed([None if entry is None else -entry for entry in passes.momentum()]):
            passes.descend()


KIND = Momentum

"""nBAR: SAM's balancing of LoRA's factors without its second pass."""

from __future__ import annotations

from typing import ClassVar

from flatpatch.kinds.base import Kind, Passes


class BalancedByGradients(Kind):
    r"""nBAR (Li et al. 2024, arXiv:2410.14802).

    It takes one pass, and before the update rescales each pair of factors,

    .. math::
        A \leftarrow (1 + \alpha_t \eta_t) A, \quad B \leftarrow (1 - \alpha_t \eta_t) B
        \quad \text{if } \lVert g_A \rVert \ge \lVert g_B \rVert,

    and with the signs exchanged otherwise. :math:`\eta_t` is the learning rate; :math:`\alpha_t`, the strength, falls
    along a line, from rho at the first of a task's T steps to rho / T at the last. The weights are not perturbed.
    """

    name = "nbar"
    title = "nBAR"
    place = 12
    climbs = False
    takes_radius = False
    of_pairs = True
    balances = True
    papers_rho = (0.5, 1.0, 2.0)
    idle = ("sync", "scope")
    by: ClassVar[str] = "gradient"

    def step(self, passes: Passes) -> None:
        """Take the plain step's pass, and have the factors balanced before the update."""
        passes.descend()
        passes.balance(self.by, 1 - passes.progress)


KIND = BalancedByGradients

"""oBAR: the balancing of LoRA's factors by their own norms."""

from __future__ import annotations

from flatpatch.kinds.nbar import BalancedByGradients


class BalancedByNorms(BalancedByGradients):
    r"""oBAR (Li et al. 2024, arXiv:2410.14802).

    It is nBAR, but what decides is the factors' own norms,

    .. math::
        A \leftarrow (1 - \alpha_t \eta_t) A, \quad B \leftarrow (1 + \alpha_t \eta_t) B
        \quad \text{if } \lVert A \rVert \ge \lVert B \rVert,

    and with the signs exchanged otherwise.
    """

    name = "obar"
    title = "oBAR"
    place = 13
    by = "norm"


KIND = BalancedByNorms

"""The radius of each weight where an optimizer's groups have radii of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from flatpatch.errors import UserError

# What other SAMs keep in each group, and what holds for a whole step here.
_WHOLE_STEP = ("adaptive", "eta", "sync")


def group_radii(optimizer: Any, parameters: Iterable[Tensor], rho: float) -> list[float]:
    """Return each parameter's radius: its group's option ``rho``, or the common one.

    A group takes ``rho`` as it takes ``lr``: ``AdamW([{"params": head, "rho": 0.0}, {"params": body}])``. The
    base optimizer keeps it in its checkpoint. Where ``rho`` is an option of the base optimizer itself (Adadelta's
    is a decay), it is left to it, and all groups have the common radius.

    Args:
        optimizer: The base optimizer, or what has its ``param_groups``.
        parameters: The weights that are perturbed.
        rho: The common radius, also of a parameter that is in no group.

    Returns:
        One radius per parameter, or just the common one as often.

    Raises:
        UserError: If a group has an option that only a whole step can have.
    """
    own: dict[int, float] = {}
    known = getattr(optimizer, "defaults", {})
    for number, group in enumerate(optimizer.param_groups):
        wrong = [name for name in _WHOLE_STEP if name in group and name not in known]
        if wrong:
            raise UserError(
                f"parameter group {number} has {', '.join(wrong)} of its own, and SAM takes one for all groups. Give "
                f"it to SAM(...) and take it out of the group; only rho may differ between groups."
            )
        if "rho" in group and "rho" not in known:
            own |= {id(parameter): group["rho"] for parameter in group["params"]}
    return [own.get(id(parameter), rho) for parameter in parameters]

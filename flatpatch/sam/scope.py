"""Which weights an ascent step perturbs, chosen by name among the trainable ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from flatpatch.errors import UserError

SCOPES = ("lora", "A", "B", "head", "all")

# lora_A, loranew_A, lora_new_A, lora_A_k, lora_embedding_A, lora_a: the factor's letter ends its word. linear_a_q:
# SD-LoRA's.
FACTOR = re.compile(r"(?:^|[._])(?:lora\w*?|linear(?=_[ab]_[qv]\b))_([AB])(?![A-Za-z])", re.IGNORECASE)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA factor."""
    return FACTOR.search(name) is not None


def select_parameters(named_parameters: Iterable[tuple[str, Tensor]], scope: str) -> list[tuple[str, Tensor]]:
    """Choose the trainable parameters of a scope.

    Args:
        named_parameters: As ``model.named_parameters()`` gives them.
        scope: "lora": both LoRA factors; "A", "B": one of them; "head": whatever is trainable and not
            LoRA; "all": whatever is trainable.

    Returns:
        Names and parameters, in order, none of them empty.

    Raises:
        UserError: If the scope is unknown or chooses nothing.
    """
    if scope not in SCOPES:
        raise UserError(f"scope={scope!r} is not one of {', '.join(SCOPES)}.")
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad and p.numel() > 0]
    kinds: dict[str, list[tuple[str, Tensor]]] = {"A": [], "B": [], "head": [], "lora": [], "all": trainable}
    for name, parameter in trainable:
        factor = FACTOR.search(name)
        kinds[factor[1].upper() if factor else "head"].append((name, parameter))
        if factor:
            kinds["lora"].append((name, parameter))
    if not kinds[scope]:
        there = ", ".join(f"{kind} {len(kinds[kind])}" for kind in ("A", "B", "head"))
        example = f" (such as {trainable[0][0]})" if trainable else ""
        raise UserError(
            f"scope={scope} chooses no weight: of {len(trainable)} trainable tensors{example} there are "
            f"{there}. Choose a scope that exists."
        )
    return kinds[scope]

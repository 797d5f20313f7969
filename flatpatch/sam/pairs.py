"""The pairs of LoRA factors that a model trains, and the scale of each pair's product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.sam.scope import FACTOR, is_adapter

_INSTEAD = "Choose sam_radius=factors, and a kind of SAM that does not go by the weights that LoRA changes."


@dataclass(frozen=True)
class LoraPair:
    """Two factors whose product, times a scale, is added to a weight.

    Attributes:
        A: The factor at the input, ``(r, in)``.
        B: The factor at the output, ``(out, r)``.
        scale: The scale s; a tensor without dimensions where it is learned, and then read at each step.
        name: The parameters' name, with ``*`` for the letter.
        owner: The module in which they lie, if known.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    name: str = ""
    owner: nn.Module | None = None


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Find the pair of every trainable LoRA factor, by name: ``lora_A`` and ``lora_B``, ``linear_a`` and ``linear_b``.

    Which of the two stands at the input is read off their shapes, as not every repository calls that one A. The scale
    is peft's ``scaling`` of the layer, and 1 where a layer has none.

    Args:
        model: Any module.

    Returns:
        The pairs in the model's order, those with a frozen factor too; none if the model trains no factor.

    Raises:
        UserError: If a trainable factor has no partner, or its product is scaled in a way that is not known here.
    """
    named = dict(model.named_parameters())
    found: dict[str, LoraPair] = {}
    for name, parameter in named.items():
        if not (parameter.requires_grad and is_adapter(name)):
            continue
        star, partner = _partner(name)
        if star in found:
            continue
        if partner not in named:
            raise UserError(f"{name} has no partner {partner}, so what weight it changes is not known. {_INSTEAD}")
        A, B = sorted((parameter, named[partner]), key=lambda factor: factor.shape[0] - factor.shape[-1])
        if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0]:
            raise UserError(
                f"{name} {tuple(parameter.shape)} and {partner} {tuple(named[partner].shape)} are no (r, in) and "
                f"(out, r), so what weight they change is not known. {_INSTEAD}"
            )
        found[star] = LoraPair(A, B, _scale(model, name), star, _owner(model, name))
    return list(found.values())


def trained_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Find the pairs as `lora_pairs` does, in a model that must have some.

    Raises:
        UserError: As `lora_pairs`, or if the model trains no LoRA factor.
    """
    pairs = lora_pairs(model)
    if not pairs:
        raise UserError(f"this model trains no LoRA factors. {_INSTEAD}")
    return pairs


def _partner(name: str) -> tuple[str, str]:
    """Return a factor's name with ``*`` for its letter, and the name with the other letter."""
    match = FACTOR.search(name)
    assert match is not None
    start, end = match.span(1)
    other = {"A": "B", "B": "A", "a": "b", "b": "a"}[match[1]]
    return f"{name[:start]}*{name[end:]}", f"{name[:start]}{other}{name[end:]}"


def _owner(model: nn.Module, name: str) -> nn.Module:
    match = FACTOR.search(name)
    assert match is not None
    return model.get_submodule(name[: match.start(1)].rpartition(".")[0])


def _scale(model: nn.Module, name: str) -> float | Tensor:
    match = FACTOR.search(name)
    assert match is not None
    owner: Any = _owner(model, name)
    scaling = getattr(owner, "scaling", 1.0)
    if isinstance(scaling, Mapping):  # by the adapter's name, which follows the factor's
        return float(scaling[name[match.end(1) :].split(".")[1]])
    if scaling != 1.0:
        raise UserError(
            f"{name} is scaled by {scaling!r}, which may be another scale than that of the factors' product. {_INSTEAD}"
        )
    learned = getattr(owner, "scaling_factor", None)
    if learned is not None:  # one for all layers
        return learned[0].param.detach().squeeze()  # type: ignore[no-any-return]  # sees what is written to it
    before, handed_out, place = name.partition("cur_adapter.")
    if not handed_out:
        return 1.0
    # A transformer that hands its blocks adapters, and scales those of some blocks.
    block, projection = (int(number) for number in place.split(".")[:2])
    transformer: Any = model.get_submodule(before.rstrip("."))
    index = transformer.adapt_pos[block]
    if not getattr(transformer, "use_block_weight", False) or index not in transformer.specfic_pos:
        return 1.0
    weight: Tensor = transformer.block_weight.detach()
    return weight[projection, transformer.specfic_pos.index(index)]

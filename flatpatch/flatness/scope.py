r"""Which tensors a measure varies: LoRA factors, merged weights, whatever is trainable, or the whole model.

A LoRA layer computes :math:`(W + s\,B A)\,x`. In the scope "adapter" the variables are the factors A and B; in
"merged" the variable is the whole matrix :math:`M = W + s\,B A`, so that a measure can be compared with that of
ordinary fine-tuning and does not depend on how the product is split into factors. The frozen base enters "merged"
as a part of M and "model" as a part of the model; it never enters "adapter" and "trainable".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError, did_you_mean

SCOPES = ("adapter", "merged", "trainable", "model")

# lora_A, loranew_A, lora_A_k, lora_embedding_A: the factor's letter ends its word.
_FACTOR = re.compile(r"(?:^|[._])lora\w*?_([AB])(?![A-Za-z])", re.IGNORECASE)


def adapter_factor(name: str) -> str | None:
    """Return "A" or "B" if a parameter's name is that of a LoRA factor, else None."""
    match = _FACTOR.search(name)
    return match[1].upper() if match else None


class Scope:
    """Named variables of a model, and how the model is made to depend on them.

    Changing a variable in place changes the loss of the model while the scope is installed.

    Attributes:
        name: One of ``SCOPES``.
        names: One name per variable.
        variables: Leaf tensors: the model's own parameters, or in "merged" new ones that start as W + s B A.
        layers: In "merged" the LoRA layers that the variables stand in for, in the same order; else empty.
    """

    def __init__(
        self, model: nn.Module, name: str, named: Sequence[tuple[str, Tensor]], layers: Sequence[nn.Module] = ()
    ) -> None:
        self.model = model
        self.name = name
        self.names = tuple(name for name, _ in named)
        self.variables = tuple(variable for _, variable in named)
        self.layers = tuple(layers)
        self.sizes = [variable.numel() for variable in self.variables]

    @property
    def size(self) -> int:
        """Number of scalar variables."""
        return sum(self.sizes)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the model depend on the variables, and autograd follow these alone, until the block is left."""
        with ExitStack() as stack:
            chosen = {id(variable) for variable in self.variables}
            for parameter in self.model.parameters():
                if parameter.requires_grad != (id(parameter) in chosen):
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(id(parameter) in chosen)
            for layer, weight in zip(self.layers, self.variables, strict=False):
                stack.enter_context(_computing_with(layer, weight))
            yield


def find_scope(model: nn.Module, name: str) -> Scope:
    """Choose the variables of a scope.

    Args:
        model: Any module. For "merged", one with LoRA layers like those of peft and of N-LoRA's copy of it.
        name: "adapter": the trainable LoRA factors A and B. "merged": W + s B A of every LoRA layer. "trainable":
            whatever requires a gradient. "model": every floating-point parameter, frozen or not.

    Returns:
        The scope; tensors that are used in several places are in it once.

    Raises:
        UserError: If the scope is unknown or the model has none of its variables.
    """
    if name not in SCOPES:
        raise UserError(f"scope={name!r} is not one of {', '.join(SCOPES)}.{did_you_mean(name, SCOPES)}")
    if name == "merged":
        return _merged(model)
    parameters = [(key, p) for key, p in model.named_parameters() if p.is_floating_point() and p.numel() > 0]
    trainable = [(key, p) for key, p in parameters if p.requires_grad]
    named = {
        "model": parameters,
        "trainable": trainable,
        "adapter": [(key, p) for key, p in trainable if adapter_factor(key)],
    }[name]
    if not named:
        factors = sum(adapter_factor(key) is not None for key, _ in parameters)
        raise UserError(
            f"scope={name} chooses no weight: of the model's {len(parameters)} tensors {len(trainable)} are trainable "
            f"and {factors} are LoRA factors. Set requires_grad on those to be measured, or choose another scope."
        )
    _refuse_shared_storage(named)
    return Scope(model, name, named)


def _refuse_shared_storage(named: Sequence[tuple[str, Tensor]]) -> None:
    """Two parameters over one memory would be varied separately, though neither can move alone."""
    seen: dict[int, str] = {}
    for name, parameter in named:
        other = seen.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise UserError(
                f"{other} and {name} are two parameters over one memory. Tie them: let both be one Parameter."
            )


def _merged(model: nn.Module) -> Scope:
    found = [(key, layer) for key, layer in model.named_modules() if _is_lora_linear(layer)]
    if not found:
        raise UserError(
            "scope=merged needs LoRA layers that hold their factors in lora_A and lora_B beside the weight they change "
            "(peft's, N-LoRA's); the model has none. Choose scope=adapter or scope=trainable."
        )
    named = [(f"{key}.merged", _merged_weight(key, layer)) for key, layer in found]
    return Scope(model, "merged", named, [layer for _, layer in found])


def _is_lora_linear(layer: nn.Module) -> bool:
    factors = [getattr(layer, name, None) for name in ("lora_A", "lora_B")]
    return hasattr(layer, "weight") and all(isinstance(factor, nn.ModuleDict) and len(factor) for factor in factors)


def _bias_holder(layer: nn.Module) -> Any:
    """Return the layer that owns weight and bias: itself, or the one that newer releases of peft wrap."""
    return getattr(layer, "base_layer", layer)


def _bias(layer: nn.Module) -> Tensor | None:
    bias: Tensor | None = getattr(_bias_holder(layer), "bias", None)
    return bias


@torch.no_grad()
def _merged_weight(key: str, layer: nn.Module) -> Tensor:
    """Read W + s B A, (out, in), off the layer's own output, whatever adapters and scales it adds up."""
    weight: Tensor = _bias_holder(layer).weight
    bias = _bias(layer)
    modes = [(module, module.training) for module in layer.modules()]
    try:
        layer.eval()
        if bias is not None:
            _bias_holder(layer).bias = None
        width = int(getattr(layer, "in_features", 0))
        columns: Tensor = layer(torch.eye(width, dtype=weight.dtype, device=weight.device))
        # A layer that is not linear (or acts on something else than its input) cannot be one matrix.
        doubled: Tensor = layer(2 * torch.eye(width, dtype=weight.dtype, device=weight.device))
    finally:
        for module, mode in modes:
            module.training = mode
        if bias is not None:
            _bias_holder(layer).bias = bias
    if not torch.allclose(doubled, 2 * columns, rtol=1e-3, atol=1e-6):
        raise UserError(f"scope=merged: {key} is not linear in its input, so W + s B A does not describe it.")
    return columns.T.contiguous().requires_grad_()


@contextmanager
def _computing_with(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let a LoRA layer compute with one matrix in the place of its weight and its adapters."""
    bias = _bias(layer)
    previous = layer.__dict__.get("forward")

    def forward(x: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if previous is not None:
            layer.forward = previous

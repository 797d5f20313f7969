r"""Which tensors a measure varies: LoRA factors, merged weights, whatever is trainable, or the whole model.

A LoRA layer computes :math:`(W + s\,B A)\,x`. In the scope "adapter" the variables are the factors A and B; in
"merged" the variable is the whole matrix :math:`M = W + s\,B A`, so that a measure can be compared with that of
ordinary fine-tuning and does not depend on how the product is split into factors. In "tangent" M moves in the
directions alone that the factors can move it in, :math:`s (B\,dA + dB\,A)`, measured as M is
(:mod:`flatpatch.flatness.tangent`): neither does that depend on how the factors are written. The frozen base enters
"merged" and "tangent" as a part of M and "model" as a part of the model; it never enters "adapter" and "trainable".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatpatch.errors import UserError, did_you_mean
from flatpatch.flatness.merged import MergedLayer, merged_layers
from flatpatch.flatness.tangent import TangentLayer

SCOPES = ("adapter", "merged", "tangent", "trainable", "model")
INVARIANT_SCOPES = ("merged", "tangent")
"""Where no measure depends on how LoRA's product is split into factors."""

# lora_A, loranew_A, lora_A_k, lora_embedding_A: the factor's letter ends its word. linear_a_q: SD-LoRA's.
_FACTOR = re.compile(r"(?:^|[._])(?:lora\w*?|linear(?=_[ab]_[qv]\b))_([AB])(?![A-Za-z])", re.IGNORECASE)


def adapter_factor(name: str) -> str | None:
    """Return "A" or "B" if a parameter's name is that of a LoRA factor, else None."""
    match = _FACTOR.search(name)
    return match[1].upper() if match else None


def rank_axis(name: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the dimension of a LoRA factor that counts rank indices, None for any other parameter.

    It is A's first and B's second, unless a code base names them the other way round, as CL-LoRA does; then A is
    taller than wide and B wider than tall.

    Args:
        name: Of a parameter.
        shapes: Of all of the model's parameters, by name.
    """
    factor = adapter_factor(name)
    if factor is None:
        return None
    partner = partner_factor(name)
    A, B = (name, partner) if factor == "A" else (partner, name)
    swapped = A in shapes and B in shapes and shapes[A][0] > shapes[A][1] and shapes[B][0] < shapes[B][1]
    return (0 if factor == "A" else 1) ^ swapped


def partner_factor(name: str) -> str:
    """Return the name of the other factor of a LoRA pair, A for B and B for A."""
    match = _FACTOR.search(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a LoRA factor")
    other = {"A": "B", "B": "A", "a": "b", "b": "a"}[match[1]]
    return name[: match.start(1)] + other + name[match.end(1) :]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what torch wraps around one to compile it or to spread its batches over processes.

    The wrappers add nothing to a loss, but some cannot be differentiated twice, and all rename the weights.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


class Scope:
    """Named variables of a model, and how the model is made to depend on them.

    Changing a variable in place changes the loss of the model while the scope is installed.

    Attributes:
        name: One of ``SCOPES``.
        names: One name per variable.
        variables: Leaf tensors: the model's own parameters, in "merged" new ones that start as W + s B A, in "tangent"
            its coordinates.
        layers: In "merged" and "tangent" the modules that the variables stand in for, in the model's order; else empty.
        factors: There also the LoRA factors that each variable is made of, by its name; else empty.
        merged: There also the layers as they are merged, in the model's order; else empty.
        others: Names of the variables that are not the scope's own; see :func:`find_scope`.
        absorbed: There also all parameters that the variables are made of beside the frozen weights: the factors, and
            scales of theirs that are learned; else empty.

    Raises:
        UserError: If a variable is one that cannot be varied: complex, without values, or a part of a weight alone.
    """

    def __init__(
        self, model: nn.Module, name: str, named: Sequence[tuple[str, Tensor]], merged: Sequence[MergedLayer] = ()
    ) -> None:
        _refuse_unusable(name, named)
        self.model = model
        self.name = name
        self.names = tuple(name for name, _ in named)
        self.variables = tuple(variable for _, variable in named)
        self.merged = tuple(merged)
        self.layers = tuple(each.layer for each in merged)
        self.factors = {name: factors for each in merged for name, factors in each.factors.items()}
        scales = [scale for each in merged for scale in each.scales]
        self.absorbed = (*(factor for factors in self.factors.values() for factor in factors), *scales)
        self.others: tuple[str, ...] = ()
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
            for each in self.merged:
                stack.enter_context(each.installed())
            yield


def find_scope(model: nn.Module, name: str, *, others: bool = False, unused: Collection[str] = ()) -> Scope:
    """Choose the variables of a scope.

    Args:
        model: Any module. For "merged", one of the structures of :mod:`flatpatch.flatness.merged`.
        name: "adapter": the trainable LoRA factors A and B. "merged": W + s B A of every LoRA layer. "tangent": the
            directions that the trainable factors can move it in. "trainable": whatever requires a gradient. "model":
            every floating-point parameter, frozen or not; weights that are integers, as quantised ones are, stay as
            they are.
        others: Whether to add whatever else requires a gradient (a classifier) and is no part of the variables: the
            line between two models ends at both only if it moves all that differs.
        unused: For "tangent", names of trainable factors that are not to count, as the loss does not use them.

    Returns:
        The scope; tensors that are used in several places are in it once.

    Raises:
        UserError: If the scope is unknown, the model has none of its variables, or one of them cannot be varied: it is
            complex, on the meta device, or partitioned over processes.
    """
    model = unwrapped(model)
    if name not in SCOPES:
        raise UserError(f"scope={name!r} is not one of {', '.join(SCOPES)}.{did_you_mean(name, SCOPES)}")
    if others:
        return _with_others(model, find_scope(model, name))
    if name == "merged":
        return _merged(model)
    if name == "tangent":
        return _tangent(model, unused)
    parameters = [
        (key, p)
        for key, p in model.named_parameters()
        if (p.is_floating_point() or p.is_complex()) and (p.numel() > 0 or _is_partitioned(p))
    ]
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
    _refuse_unusable(name, named)
    _refuse_shared_storage(named)
    return Scope(model, name, named)


def _with_others(model: nn.Module, own: Scope) -> Scope:
    there = {id(tensor) for tensor in (*own.variables, *own.absorbed)}
    more = [(key, p) for key, p in model.named_parameters() if p.requires_grad and id(p) not in there]
    named = [*zip(own.names, own.variables, strict=True), *more]
    scope = Scope(model, own.name, named, own.merged)
    scope.others = tuple(key for key, _ in more)
    return scope


def _is_partitioned(parameter: Tensor) -> bool:
    """Whether other processes hold parts of it: under DeepSpeed's ZeRO-3, FSDP, or as a distributed tensor."""
    return any(hasattr(parameter, mark) for mark in ("ds_tensor", "_is_flat_param", "device_mesh"))


def _refuse_unusable(scope: str, named: Sequence[tuple[str, Tensor]]) -> None:
    for name, variable in named:
        if _is_partitioned(variable):
            raise UserError(
                f"scope={scope}: {name} is partitioned over processes (ZeRO-3, FSDP), of which each has a part. "
                "Measure a model that one process holds, such as one loaded from a gathered checkpoint."
            )
        if variable.is_meta:
            raise UserError(f"scope={scope}: {name} is on the meta device and has no values. Load the weights first.")
        if variable.is_complex():
            raise UserError(
                f"scope={scope}: {name} is complex, and curvature here is that of real weights. Let its real view be "
                "the parameter (torch.view_as_real, and view_as_complex in the forward pass), or choose a scope "
                "without it."
            )


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
    found = _known_layers(model, "merged")
    named = [pair for layer in found for pair in layer.weights.items()]
    return Scope(model, "merged", named, found)


def _tangent(model: nn.Module, unused: Collection[str]) -> Scope:
    bases = _known_layers(model, "tangent")
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    pairs, varied = {}, set()
    for name, parameter in parameters.items():
        if adapter_factor(name) is None or (other := parameters.get(partner_factor(name))) is None:
            continue
        pairs[id(parameter)] = (other, parameter) if rank_axis(name, shapes) == 0 else (parameter, other)
        if parameter.requires_grad and name not in unused:
            varied.add(id(parameter))
    found: list[MergedLayer] = [TangentLayer(base, pairs, varied) for base in bases]
    named = [pair for layer in found for pair in layer.weights.items()]
    if not named:
        raise UserError(
            f"scope=tangent has no direction: of the {len(pairs)} LoRA factors of {len(bases)} layers {len(varied)} "
            "are trainable and used, and the other one of each pair is zero. Set requires_grad on those to be "
            "measured, or choose scope=merged."
        )
    return Scope(model, "tangent", named, found)


def _known_layers(model: nn.Module, scope: str) -> list[MergedLayer]:
    found = merged_layers(model)
    if not found:
        raise UserError(
            f"scope={scope} needs LoRA layers that are known to be one matrix each: factors in lora_A and lora_B "
            "beside the weight they change (peft's, N-LoRA's), lists of them beside qkv (InfLoRA's), linear_a_q and "
            "the like beside it (SD-LoRA's), or a transformer with blocks, cur_adapter, adapt_pos and specfic_pos "
            "(CL-LoRA's). The model has none. Choose scope=adapter or scope=trainable."
        )
    return found

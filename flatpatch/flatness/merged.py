r"""Layers with LoRA as layers of one matrix each: :math:`M = W + s\,B A`, whatever a code base adds up to get there.

Four structures are known, each by its attributes, not by its class:

- a linear layer with its factors in ``lora_A`` and ``lora_B`` (peft, N-LoRA's copy of it): one matrix;
- an attention with a joint ``qkv`` and lists ``lora_A_k``, ``lora_B_k``, ... of one factor per task, whose products
  are summed up to the task that the forward is called with (InfLoRA): one matrix for each of those projections;
- a joint ``qkv`` inside a layer with factors ``linear_a_q``, ``linear_b_q`` for queries and likewise for values, with
  learned scales and fixed factors of earlier tasks (SD-LoRA): one matrix for queries and one for values;
- a transformer that hands its blocks' attentions adapters from ``cur_adapter``, scaled by ``block_weight`` where the
  block is one of ``specfic_pos`` (CL-LoRA): one matrix for each projection that ``msa`` marks. Adapters of earlier
  tasks, which only some forwards use, stay as they are.

While a layer is installed it computes with its matrices, and nothing of its factors enters the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.errors import UserError

PROJECTIONS = ("q", "k", "v")


class MergedLayer(Protocol):
    """A layer that can compute with one matrix for each of its LoRA pairs.

    Attributes:
        layer: The module whose forward is replaced.
        weights: The matrices M by name, ``(out, in)``, leaf tensors with the values they have now. A forward looks them
            up anew, so that what takes their place may compute them.
        factors: By the same names, the factors that each matrix is made of beside W.
        scales: Learned scales of the factors, which the matrices hold too.
    """

    layer: nn.Module
    weights: Mapping[str, Tensor]
    factors: dict[str, list[nn.Parameter]]
    scales: Sequence[nn.Parameter]

    def installed(self) -> Any:
        """Let the layer compute with ``weights`` until the block is left."""


def merged_layers(model: nn.Module) -> list[MergedLayer]:
    """Find every layer that one of the known structures describes.

    Args:
        model: Any module.

    Returns:
        The layers in the model's order; none if it has none.

    Raises:
        UserError: If a layer looks like one, but one matrix does not describe it.
    """
    found: list[MergedLayer] = []
    for key, module in model.named_modules():
        prefix = f"{key}." if key else ""
        if _is_lora_linear(module):
            found.append(_Linear(prefix, module))
        elif _has_tasks(module):
            found.append(_TaskAttention(prefix, module))
        elif _is_scaled_qkv(module):
            found.append(_ScaledQkv(prefix, module))
        elif _hands_out_adapters(module):
            found += _adapted_attentions(prefix, module)
    return found


def _trainable(matrix: Tensor) -> Tensor:
    return matrix.detach().clone().contiguous().requires_grad_()


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward; what somebody else had put in its place comes back afterwards."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous


def _linear(weights: Mapping[str, Tensor], name: str, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = weights[name]
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    return forward


# --- one linear layer, its factors inside


def _is_lora_linear(layer: nn.Module) -> bool:
    factors = [getattr(layer, name, None) for name in ("lora_A", "lora_B")]
    return hasattr(layer, "weight") and all(isinstance(factor, nn.ModuleDict) and len(factor) for factor in factors)


class _Linear:
    def __init__(self, prefix: str, layer: nn.Module) -> None:
        self.layer = layer
        # Newer releases of peft wrap the layer that owns weight and bias.
        self._holder: Any = getattr(layer, "base_layer", layer)
        self._bias: Tensor | None = getattr(self._holder, "bias", None)
        self.weights: Mapping[str, Tensor] = {f"{prefix}merged": self._read(prefix)}
        own = {id(self._holder.weight), id(self._bias)}
        self.factors = {f"{prefix}merged": [p for p in layer.parameters() if id(p) not in own]}
        self.scales: Sequence[nn.Parameter] = ()

    @torch.no_grad()
    def _read(self, prefix: str) -> Tensor:
        """Read W + s B A, (out, in), off the layer's own output, whatever adapters and scales it adds up."""
        weight: Tensor = self._holder.weight
        modes = [(module, module.training) for module in self.layer.modules()]
        try:
            self.layer.eval()
            if self._bias is not None:
                self._holder.bias = None
            unit = torch.eye(int(getattr(self.layer, "in_features", 0)), dtype=weight.dtype, device=weight.device)
            columns: Tensor = self.layer(unit)
            # A layer that is not linear (or acts on something else than its input) cannot be one matrix.
            doubled: Tensor = self.layer(2 * unit)
        finally:
            for module, mode in modes:
                module.training = mode
            if self._bias is not None:
                self._holder.bias = self._bias
        if not torch.allclose(doubled, 2 * columns, rtol=1e-3, atol=1e-6):
            raise UserError(
                f"scope=merged: {prefix.removesuffix('.')} is not linear in its input, so W + s B A does not describe "
                "it."
            )
        return _trainable(columns.T)

    def installed(self) -> Any:
        (name,) = self.weights
        return _forward(self.layer, _linear(self.weights, name, self._bias))


# --- an attention with one pair of factors per task


def _has_tasks(module: nn.Module) -> bool:
    return isinstance(getattr(module, "qkv", None), nn.Linear) and any(
        isinstance(getattr(module, f"lora_{factor}_{name}", None), nn.ModuleList)
        for name in PROJECTIONS
        for factor in "AB"
    )


class _TaskAttention:
    def __init__(self, prefix: str, layer: nn.Module) -> None:
        self.layer = layer
        self._qkv: nn.Linear = layer.get_submodule("qkv")  # type: ignore[assignment]
        where = prefix.removesuffix(".") or type(layer).__name__
        if self._qkv.out_features != 3 * self._qkv.in_features:
            raise UserError(
                f"scope=merged: {where}.qkv has {self._qkv.out_features} outputs for {self._qkv.in_features} inputs; "
                "expected three times as many, for queries, keys and values. Choose scope=adapter."
            )
        rows = dict(zip(PROJECTIONS, self._qkv.weight.detach().chunk(3), strict=True))
        self.scales: Sequence[nn.Parameter] = ()
        weights: dict[str, Tensor] = {}
        self.weights: Mapping[str, Tensor] = weights
        self.factors, self._learned = {}, 0
        self._ups: dict[str, Any] = {}
        for name in PROJECTIONS:
            A, B = (getattr(layer, f"lora_{factor}_{name}", None) for factor in "AB")
            if A is None and B is None:
                continue
            if not (isinstance(A, nn.ModuleList) and isinstance(B, nn.ModuleList) and len(A) == len(B)):
                raise UserError(f"scope=merged: {where} needs as many factors in lora_A_{name} as in lora_B_{name}.")
            matrix = rows[name]
            for task in range(len(A)):
                change = _weight(B[task]).detach() @ _weight(A[task]).detach()
                if bool(change.any()):
                    self._learned = max(self._learned, task + 1)
                    matrix = matrix + change
            weights[f"{prefix}{name}.merged"] = _trainable(matrix)
            self.factors[f"{prefix}{name}.merged"] = [*A.parameters(), *B.parameters()]
            self._ups[name] = B
        self._where = where

    @contextmanager
    def installed(self) -> Iterator[None]:
        original = self.layer.forward
        matrices = self.weights
        rows = self._qkv.weight.chunk(3)
        zeros = {f"lora_B_{name}": _zeros_like(B) for name, B in self._ups.items()}

        def project(x: Tensor) -> Tensor:
            stand_ins = dict(zip(self._ups, matrices.values(), strict=True))
            weight = torch.cat([stand_ins.get(name, row) for name, row in zip(PROJECTIONS, rows, strict=True)])
            return F.linear(x, weight, self._qkv.bias)

        def forward(x: Tensor, task: int, *args: Any, **kwargs: Any) -> Tensor:
            if task + 1 < self._learned:
                raise UserError(
                    f"scope=merged: the loss runs {self._where} with the adapters of tasks 0 to {task}, but those of "
                    f"task {self._learned - 1} are not zero. Measure with all tasks so far, or choose scope=adapter."
                )
            with _forward(self._qkv, project), _replaced(self.layer, zeros):
                result: Tensor = original(x, task, *args, **kwargs)
            return result

        with _forward(self.layer, forward):
            yield


def _weight(factor: nn.Module) -> Tensor:
    weight: Tensor = factor.get_parameter("weight")
    return weight


def _zeros_like(factors: nn.ModuleList) -> nn.ModuleList:
    """Make factors that add exactly nothing and take no memory."""
    zeros = nn.ModuleList()
    for factor in factors:
        weight = _weight(factor)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.new_zeros(()).expand(weight.shape), requires_grad=False)
        zeros.append(layer)
    return zeros


@contextmanager
def _replaced(module: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    saved = {name: module.get_submodule(name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, submodule in saved.items():
            setattr(module, name, submodule)


# --- a joint projection with scaled factors of several tasks


def _is_scaled_qkv(module: nn.Module) -> bool:
    factors = [getattr(module, f"linear_{factor}_{name}", None) for factor in "ab" for name in "qv"]
    return all(isinstance(each, nn.Linear) for each in (getattr(module, "qkv", None), *factors))


class _ScaledQkv:
    def __init__(self, prefix: str, layer: nn.Module) -> None:
        self.layer = layer
        self._qkv: Any = layer.get_submodule("qkv")
        matrices = dict(zip(PROJECTIONS, self._read().chunk(3), strict=True))
        self._key = matrices.pop("k")
        self.weights: Mapping[str, Tensor] = {
            f"{prefix}{name}.merged": _trainable(matrix) for name, matrix in matrices.items()
        }
        # Earlier tasks' may lie in modules below.
        self.factors = {
            f"{prefix}{name}.merged": [
                p for key, p in layer.named_parameters() if key.endswith((f"_a_{name}.weight", f"_b_{name}.weight"))
            ]
            for name in matrices
        }
        there = [*self._qkv.parameters(), *(p for factors in self.factors.values() for p in factors)]
        known = {id(p) for p in there}
        self.scales: Sequence[nn.Parameter] = [p for p in layer.parameters() if id(p) not in known]

    @torch.no_grad()
    def _read(self) -> Tensor:
        """Read the matrix, (3 out, in), off the layer's own output, whatever scales and earlier factors it adds up."""
        weight, bias = self._qkv.weight, self._qkv.bias
        unit = torch.eye(self._qkv.in_features, dtype=weight.dtype, device=weight.device)
        try:
            self._qkv.bias = None
            columns: Tensor = self.layer(unit[None])[0]
        finally:
            self._qkv.bias = bias
        return columns.T

    def installed(self) -> Any:
        matrices = self.weights

        def forward(x: Tensor) -> Tensor:
            query, value = matrices.values()
            return F.linear(x, torch.cat([query, self._key, value]), self._qkv.bias)

        return _forward(self.layer, forward)


# --- a transformer that hands adapters to its attentions


def _hands_out_adapters(module: nn.Module) -> bool:
    needed = ("blocks", "cur_adapter", "adapt_pos", "specfic_pos")
    return all(hasattr(module, name) for name in needed) and isinstance(module.cur_adapter, nn.ModuleList)


def _adapted_attentions(prefix: str, model: Any) -> list[MergedLayer]:
    found: list[MergedLayer] = []
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if index not in model.adapt_pos:
            continue
        where = f"{prefix}blocks.{index}.attn"
        if not all(isinstance(getattr(attention, f"{name}_proj", None), nn.Linear) for name in PROJECTIONS):
            raise UserError(f"scope=merged: {where} needs q_proj, k_proj and v_proj. Choose scope=adapter.")
        adapters = model.cur_adapter[model.adapt_pos.index(index)]
        scale, scales = None, []
        if getattr(model, "use_block_weight", False) and index in model.specfic_pos:
            scale = model.block_weight[:, model.specfic_pos.index(index)].detach()
            scales = [model.block_weight]
        layer = _AdaptedAttention(f"{where}.", attention, adapters, scale, scales)
        if layer.weights:
            found.append(layer)
    return found


class _AdaptedAttention:
    def __init__(
        self, prefix: str, layer: Any, adapters: nn.ModuleList, scale: Tensor | None, scales: Sequence[nn.Parameter]
    ) -> None:
        self.layer = layer
        self._adapters = adapters
        self._scale = scale
        self._where = prefix.removesuffix(".")
        weights: dict[str, Tensor] = {}
        self.weights: Mapping[str, Tensor] = weights
        self.factors, self.scales = {}, scales
        self._projections: list[nn.Linear] = []
        for index, name in enumerate(PROJECTIONS):
            if layer.msa[index] != 1:
                continue
            projection: nn.Linear = getattr(layer, f"{name}_proj")
            unit = torch.eye(projection.in_features, dtype=projection.weight.dtype, device=projection.weight.device)
            with torch.no_grad():
                change = adapters[index](unit).T
            matrix = projection.weight.detach() + (1.0 if scale is None else scale[index]) * change
            weights[f"{prefix}{name}_proj.merged"] = _trainable(matrix)
            self.factors[f"{prefix}{name}_proj.merged"] = list(adapters[index].parameters())
            self._projections.append(projection)

    @contextmanager
    def installed(self) -> Iterator[None]:
        original = self.layer.forward
        matrices = self.weights

        def forward(
            x: Tensor, adapt: Any = None, prompt: Any = None, rank_prompt: Any = None, block_weight: Any = None
        ) -> Tensor:
            if adapt is not self._adapters:  # no adapter, or one of an earlier task
                earlier: Tensor = original(x, adapt, prompt, rank_prompt, block_weight)
                return earlier
            if (block_weight is None) != (self._scale is None) or (
                self._scale is not None and not torch.equal(block_weight.detach(), self._scale)
            ):
                raise UserError(
                    f"scope=merged: the loss runs {self._where} with other block weights than the model holds for it, "
                    "so that one matrix does not describe it. Choose scope=adapter."
                )
            with ExitStack() as stack:
                for projection, name in zip(self._projections, matrices, strict=True):
                    stack.enter_context(_forward(projection, _linear(matrices, name, projection.bias)))
                result: Tensor = original(x, None, prompt, rank_prompt, None)
            return result

        with _forward(self.layer, forward):
            yield

"""LoRA adapters of a sequence of tasks: one that learns, and a frozen one that holds all earlier tasks.

A layer computes ``W x + s (B_old A_old + B A) dropout(x)`` with ``s = alpha / r``. The adapters of earlier
tasks are kept side by side in one pair, A_old ``(r_old, in)`` and B_old ``(out, r_old)``: the product of
the two is the sum of theirs. Both paths see the same dropped-out input (as in the code of O-LoRA and
N-LoRA), so there is one dropout draw per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.files import write_atomically

OLD, NEW = "old", "new"
ADAPTED = ("q", "v", "query", "value")  # the names of T5's and of BERT's query and value projections
FILE_NAME = "adapter.safetensors"


class Pair(NamedTuple):
    """The two factors of one layer's update B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)


class Adapter(NamedTuple):
    """A saved adapter: its factors by layer name, and how it was made."""

    pairs: Mapping[str, Pair]
    made: Mapping[str, str | int]  # method, lora_r, lora_alpha


class LayerMatrices(NamedTuple):
    """What a penalty may look at in one layer."""

    A: Tensor  # (r, in), trained
    B: Tensor  # (out, r), trained
    A_old: Tensor | None  # (r_old, in), frozen; None on the first task


class TwoPathLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer with a frozen second adapter, both on one dropped-out input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x plus every adapter's update: x ``(..., in)`` to ``(..., out)``."""
        dropped = self.lora_dropout[NEW](x)
        result = F.linear(x, self.weight, self.bias)
        for name in self.paths:
            result = result + self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[NEW]
        return result

    @property
    def paths(self) -> list[str]:
        """The adapters there are, old before new: the order in which upstream adds and saves them."""
        return [name for name in (OLD, NEW) if name in self.lora_A]


def attach(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float,
    old: Mapping[str, Pair] | None = None,
    new: Mapping[str, Pair] | None = None,
) -> None:
    """Give a model its adapters, in place; only the new one can be trained.

    The random numbers are drawn in the order in which O-LoRA's and N-LoRA's copies of peft draw them, so that one
    seed gives their new adapter and ours the same start.

    Args:
        model: A T5 or a BERT; its attention's query and value projections are adapted, as in both papers.
        r: Rank of the new adapter.
        alpha: LoRA's alpha; both paths are scaled by alpha / r.
        dropout: Probability of dropping an entry of an adapter's input.
        old: The earlier tasks' factors, to be added and kept frozen.
        new: The new adapter's start; default: A random, B zero, so that it changes nothing at first.

    Raises:
        ValueError: If given factors do not belong to this model.
    """
    for name, linear in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last not in ADAPTED:
            continue
        size = (linear.in_features, linear.out_features)
        layer = TwoPathLinear(
            NEW, *size, r=r, lora_alpha=alpha, lora_dropout=dropout, bias=False, init_lora_weights=False
        )
        if old is not None:
            rank_old = len(next(iter(old.values())).A)
            layer.lora_A[OLD] = nn.Linear(size[0], rank_old, bias=False)
            layer.lora_B[OLD] = nn.Linear(rank_old, size[1], bias=False)
        layer.reset_lora_parameters(NEW)
        layer.weight, layer.bias = linear.weight, linear.bias
        setattr(model.get_submodule(parent), last, layer)
    for path, pairs in ((OLD, old), (NEW, new)):
        if pairs is not None:
            _fill(model, path, pairs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NEW}." in name)


def _fill(model: nn.Module, name: str, pairs: Mapping[str, Pair]) -> None:
    layers = _layers(model)
    if layers.keys() != pairs.keys():
        raise ValueError(f"the adapter has layers {sorted(pairs)}, the model {sorted(layers)}")
    with torch.no_grad():
        for key, layer in layers.items():
            for weight, value in zip((layer.lora_A[name].weight, layer.lora_B[name].weight), pairs[key], strict=True):
                if weight.shape != value.shape:
                    raise ValueError(f"{key}: the adapter has {tuple(value.shape)}, the model {tuple(weight.shape)}")
                weight.copy_(value)


def _layers(model: nn.Module) -> dict[str, TwoPathLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TwoPathLinear)}


def layer_matrices(model: nn.Module) -> list[LayerMatrices]:
    """Return the live adapter matrices, layer by layer in the model's order."""
    return [
        LayerMatrices(
            layer.lora_A[NEW].weight,
            layer.lora_B[NEW].weight,
            layer.lora_A[OLD].weight if OLD in layer.lora_A else None,
        )
        for layer in _layers(model).values()
    ]


def joined(model: nn.Module) -> dict[str, Pair]:
    """Return copies of old and new as one pair per layer: what the next task starts from."""
    return {
        key: Pair(
            torch.cat([layer.lora_A[name].weight.detach().cpu() for name in layer.paths], dim=0),
            torch.cat([layer.lora_B[name].weight.detach().cpu() for name in layer.paths], dim=1),
        )
        for key, layer in _layers(model).items()
    }


def save(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into a folder; a reader finds either the whole file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{key}.{part}": value for key, pair in adapter.pairs.items() for part, value in pair._asdict().items()}
    # Safetensors' own writer would make a file that nobody else may read.
    write_atomically(folder / FILE_NAME, to_bytes(tensors, metadata={"made": json.dumps(dict(adapter.made))}))


def load(folder: Path) -> Adapter:
    """Read what `save` wrote.

    Raises:
        UserError: If there is no whole adapter in the folder.
    """
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            made = json.loads(file.metadata()["made"])
    except (OSError, SafetensorError) as error:
        raise UserError(f"no adapter of an earlier task at {path}: {error}. Run that task again.") from None
    keys = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return Adapter({key: Pair(tensors[f"{key}.A"], tensors[f"{key}.B"]) for key in keys}, made)

"""timm's Vision Transformer with LoRA on each attention's keys and values or without, and one classifier per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.vision.reference.options import VisionReference


class LoRALinear(nn.Linear):
    """A linear layer with LoRA: ``(W + B A + old) x + b``, where ``old`` sums up earlier tasks' updates.

    There is no scaling. The factors are held as peft holds them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        # A as usual for LoRA: uniform, as torch begins a linear layer.
        self.lora_A = nn.ModuleDict({"new": nn.Linear(self.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"new": nn.Linear(rank, self.out_features, bias=False)})
        self.old: Tensor
        self.register_buffer("old", torch.zeros_like(weight))
        with torch.no_grad():
            self.weight.copy_(weight)
            self.factor("B").zero_()
            if bias is not None:
                self.bias.copy_(bias)

    def factor(self, which: str) -> nn.Parameter:
        """Return A ``(rank, in)`` or B ``(out, rank)``."""
        return getattr(self, f"lora_{which}")["new"].get_parameter("weight")  # type: ignore[no-any-return]

    def update(self) -> Tensor:
        """Return the present task's B A: ``(out, in)``."""
        return self.factor("B") @ self.factor("A")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return super().forward(x) + F.linear(x, self.update() + self.old)


class KeyValueLoRA(nn.Module):
    """An attention's joint projection to queries, keys and values, the last two with LoRA."""

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        W_q, W_k, W_v = qkv.weight.detach().chunk(3)
        b_q, b_k, b_v = (None, None, None) if qkv.bias is None else qkv.bias.detach().chunk(3)
        self.q = nn.Linear(qkv.in_features, qkv.in_features, bias=b_q is not None)
        self.q.load_state_dict({"weight": W_q} if b_q is None else {"weight": W_q, "bias": b_q})
        self.k = LoRALinear(W_k, b_k, rank)
        self.v = LoRALinear(W_v, b_v, rank)

    def factors(self, which: str) -> list[nn.Parameter]:
        """Return A ``(rank, d)`` or B ``(d, rank)`` of keys and of values."""
        return [self.k.factor(which), self.v.factor(which)]

    @torch.no_grad()
    def fold(self) -> None:
        """Count the present updates among the earlier tasks', and start others from B = 0."""
        for part in (self.k, self.v):
            part.old += part.update()
            part.factor("B").zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to queries, keys and values ``(..., 3 d)``."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


class LoRAViT(nn.Module):
    """A Vision Transformer whose class token is classified by one linear layer per task.

    Attributes:
        projection: What stands in for the attentions' joint projections.
        task: The task that is learned or was learned last, from 0.
    """

    projection: type[KeyValueLoRA] = KeyValueLoRA

    def __init__(self, vit: VisionTransformer, rank: int, classes: Sequence[int], *, adapted: bool = True) -> None:
        super().__init__()
        self.vit: Any = vit
        plain = [block.attn.qkv for block in self.vit.blocks]
        for block in self.vit.blocks:
            block.attn.qkv = self.projection(block.attn.qkv, rank)
        self.heads = nn.ModuleList(nn.Linear(self.vit.embed_dim, count) for count in classes)
        if not adapted:  # after the classifiers' random numbers, which are then those beside LoRA
            for block, qkv in zip(self.vit.blocks, plain, strict=True):
                block.attn.qkv = qkv
        self.task = 0

    @property
    def layers(self) -> list[KeyValueLoRA]:
        """The adapted projections, from the first block to the last; none without LoRA."""
        return [block.attn.qkv for block in self.vit.blocks if isinstance(block.attn.qkv, KeyValueLoRA)]

    def train_only(self, parts: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Let gradients reach the named parts and the present task's classifier, and return these by group.

        Args:
            parts: The factors "A" and "B", and "body": all but the classifiers.
        """
        self.requires_grad_(False)
        groups = {
            part: [*self.vit.parameters()]
            if part == "body"
            else [p for layer in self.layers for p in layer.factors(part)]
            for part in parts
        }
        groups["head"] = list(self.heads[self.task].parameters())
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        return groups

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        """Return the logits of one task's own classes, of the present task by default: ``(n, classes)``."""
        logits: Tensor = self.heads[self.task if task is None else task](self.vit(images))
        return logits

    def predict(self, images: Tensor) -> Tensor:
        """Return for each image the most likely of all classes seen so far: ``(n,)``."""
        features = self.vit(images)
        return torch.cat([head(features) for head in self.heads[: self.task + 1]], dim=1).argmax(dim=1)


def build(reference: VisionReference, classes: Sequence[int], kind: type[LoRAViT] = LoRAViT) -> LoRAViT:
    """Make the model with which the first task begins, in evaluation mode, on its device.

    Args:
        reference: Sizes, weights (a classifier among them is left out), rank, and the seed of the random weights:
            classifiers, A, and without ``weights`` the whole model.
        classes: Number of classes of each task.
        kind: The model's class.

    Raises:
        UserError: If the weights cannot be read or belong to a model of other sizes.
    """
    torch.manual_seed(reference.seed)
    vit = VisionTransformer(num_classes=0, **reference.model)
    if reference.weights is not None:
        _load(vit, reference.weights)
    adapted = reference.tuning == "lora"
    return kind(vit, reference.rank, classes, adapted=adapted).eval().to(reference.device)


def _load(vit: VisionTransformer, weights: Path) -> None:
    try:
        loaded = {key: value for key, value in load_file(weights).items() if not key.startswith("head.")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read as safetensors: {error}. Download or make it again.") from None
    own = vit.state_dict()
    wrong = sorted(own.keys() ^ loaded.keys()) or [key for key in own if own[key].shape != loaded[key].shape]
    if wrong:
        raise UserError(
            f"{weights} is not of a Vision Transformer of these sizes: {len(wrong)} tensors are missing, unknown or of"
            f" another shape, the first {wrong[0]}. Give the sizes the weights were made with."
        )
    vit.load_state_dict(loaded)

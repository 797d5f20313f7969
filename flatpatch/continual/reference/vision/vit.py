"""timm's Vision Transformer with LoRA on each attention's keys and values, and one classifier per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flatpatch.continual.reference.vision.options import VisionReference
from flatpatch.errors import UserError

SLOTS = ("k", "v")


class KeyValueLoRA(nn.Module):
    """An attention's joint projection, its keys and values with LoRA: earlier tasks' frozen, the present one's beside.

    With d the width, it computes ``[q, k + (B_k A_k + old_k) x, v + (B_v A_v + old_v) x]``; there is no scaling.
    """

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        d = qkv.in_features
        self.qkv = qkv
        for slot in SLOTS:
            A = nn.Parameter(torch.empty(rank, d))
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            setattr(self, f"lora_A_{slot}", A)
            setattr(self, f"lora_B_{slot}", nn.Parameter(torch.zeros(d, rank)))
        self.old: Tensor
        self.register_buffer("old", torch.zeros(2 * d, d))

    def factors(self, which: str) -> list[nn.Parameter]:
        """Return A ``(rank, d)`` or B ``(d, rank)`` of keys and values."""
        return [getattr(self, f"lora_{which}_{slot}") for slot in SLOTS]

    def update(self) -> Tensor:
        """Return the present task's B A of keys, above that of values: ``(2 d, d)``."""
        return torch.cat([B @ A for A, B in zip(self.factors("A"), self.factors("B"), strict=True)])

    @torch.no_grad()
    def fold(self) -> None:
        """Count the present update among the earlier tasks', and start another from B = 0."""
        self.old += self.update()
        for B in self.factors("B"):
            B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to queries, keys and values ``(..., 3 d)``."""
        change = F.linear(x, self.update() + self.old)
        result: Tensor = self.qkv(x) + F.pad(change, (x.shape[-1], 0))
        return result


class LoRAViT(nn.Module):
    """A Vision Transformer whose class token is classified by one linear layer per task.

    Attributes:
        task: The task that is learned or was learned last, from 0.
    """

    def __init__(self, sizes: Mapping[str, Any], rank: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.vit: Any = VisionTransformer(num_classes=0, **sizes)
        for block in self.vit.blocks:
            block.attn.qkv = KeyValueLoRA(block.attn.qkv, rank)
        self.heads = nn.ModuleList(nn.Linear(sizes["embed_dim"], count) for count in classes)
        self.task = 0

    @property
    def layers(self) -> list[KeyValueLoRA]:
        """The adapted projections, from the first block to the last."""
        return [block.attn.qkv for block in self.vit.blocks]

    def train_only(self, factors: Sequence[str]) -> dict[str, list[nn.Parameter]]:
        """Let gradients reach the named factors and the present task's classifier, and return these by group."""
        self.requires_grad_(False)
        groups = {which: [p for layer in self.layers for p in layer.factors(which)] for which in factors}
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


def build(reference: VisionReference, classes: Sequence[int]) -> LoRAViT:
    """Make the model with which the first task begins, in evaluation mode, on its device.

    Args:
        reference: Sizes, weights (a classifier among them is left out), rank, and the seed of the random weights:
            classifiers, A, and without ``weights`` the whole model.
        classes: Number of classes of each task.

    Raises:
        UserError: If the weights cannot be read or belong to a model of other sizes.
    """
    torch.manual_seed(reference.seed)
    model = LoRAViT(reference.model, reference.rank, classes).eval()
    if reference.weights is not None:
        _load(model, reference.weights)
    return model.to(reference.device)


def _load(model: LoRAViT, weights: Path) -> None:
    try:
        loaded = {key: value for key, value in load_file(weights).items() if not key.startswith("head.")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read as safetensors: {error}. Download or make it again.") from None
    own = {
        key.replace(".qkv.qkv.", ".qkv."): value for key, value in model.vit.named_parameters() if ".lora_" not in key
    }
    wrong = sorted(own.keys() ^ loaded.keys()) or [key for key in own if own[key].shape != loaded[key].shape]
    if wrong:
        raise UserError(
            f"{weights} is not of a Vision Transformer of these sizes: {len(wrong)} tensors are missing, unknown or of"
            f" another shape, the first {wrong[0]}. Give the sizes the weights were made with."
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(loaded[key])

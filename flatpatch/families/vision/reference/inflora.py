r"""InfLoRA: interference-free LoRA (Liang & Li, CVPR 2024, arXiv:2404.00228).

Each task trains a new B; its A is fixed beforehand, to the leading directions of the task's inputs after the
directions of earlier tasks' inputs have been projected out. An input x of an earlier task then meets
:math:`B A x = 0`: the new task's update does not change what the layer made of it.

Two limits. Only the protected share of earlier inputs is free of interference. And if fewer than ``rank`` directions
are left free, or the projected inputs span fewer, the remaining rows of A are arbitrary, as in the authors' code.

Singular vectors are determined up to their sign, and only by rounding errors where singular values are equal; a
flipped row of A merely flips a column of B, and training goes on alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.families.vision.reference.dualgpm import Subspace, protect, threshold
from flatpatch.families.vision.reference.options import VisionReference
from flatpatch.families.vision.reference.vit import LoRAViT

Batches = Iterable[tuple[Tensor, Tensor]]


class InfLoRA:
    """What InfLoRA does before and after each task.

    Attributes:
        subspaces: One per layer; empty during the first task.
    """

    trained = ("B",)

    def __init__(self, reference: VisionReference, model: LoRAViT, tasks: int) -> None:
        self.reference = reference
        self.model = model
        self.tasks = tasks
        self.subspaces: list[Subspace] = []

    def begin(self, batches: Batches) -> None:
        """Fold the last task's update into the frozen ones, and fix A to the new task's inputs."""
        if self.model.task > 0:
            for layer in self.model.layers:
                layer.fold()
        covariances = input_covariances(self.model, batches, self.reference.device)
        for index, (layer, covariance) in enumerate(zip(self.model.layers, covariances, strict=True)):
            known = self.subspaces[index] if self.subspaces else None
            for A in layer.factors("A"):
                A.data.copy_(design(covariance, known, self.reference.rank))

    def end(self, batches: Batches) -> None:
        """Protect the directions of the learned task's inputs."""
        covariances = input_covariances(self.model, batches, self.reference.device)
        share = threshold(self.reference.lamb, self.reference.lame, self.model.task, self.tasks)
        known: Sequence[Subspace | None] = self.subspaces or [None] * len(covariances)
        self.subspaces = [protect(old, R.numpy(), share) for old, R in zip(known, covariances, strict=True)]


def design(covariance: Tensor, known: Subspace | None, rank: int) -> Tensor:
    """Return the A of a new task.

    Args:
        covariance: Of the task's inputs to the layer, ``(d, d)``.
        known: What is protected there; None before the first task.
        rank: Rows of A.

    Returns:
        ``(rank, d)``, with orthogonal rows of length 1/sqrt(3): the root mean square length of LoRA's usual random
        rows, whose entries are uniform within 1/sqrt(d) of zero.
    """
    allowed = covariance
    if known is not None:
        inside = torch.from_numpy(known.projection) @ covariance
        allowed = inside if known.of_complement else covariance - inside
    U, _, _ = torch.linalg.svd(allowed)
    rows: Tensor = U[:, :rank].T
    return rows / math.sqrt(3)


@torch.no_grad()
def input_covariances(model: LoRAViT, batches: Batches, device: str) -> list[Tensor]:
    """Return for each layer the mean of x x^T over its inputs x, all tokens of all images: ``(d, d)``, on the CPU."""
    means: list[Any] = [0.0] * len(model.layers)
    counts = [0] * len(model.layers)

    def record(index: int, x: Tensor) -> None:
        seen, new = counts[index], x.shape[0] * x.shape[1]
        counts[index] += new
        means[index] = (means[index] * seen + (x.mT @ x).sum(0).cpu()) / (seen + new)

    def watch(index: int, layer: nn.Module) -> Any:
        return layer.register_forward_pre_hook(lambda _, inputs: record(index, inputs[0]))

    with ExitStack() as stack:
        for index, layer in enumerate(model.layers):
            stack.callback(watch(index, layer).remove)
        for images, _ in batches:
            model(images.to(device))
    return means

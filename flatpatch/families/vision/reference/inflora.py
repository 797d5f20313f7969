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

from collections.abc import Iterable, Sequence

from torch import Tensor

from flatpatch.families.dualgpm import Subspace, design, input_covariances, protect, threshold
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
        covariances = self._covariances(batches)
        for index, (layer, covariance) in enumerate(zip(self.model.layers, covariances, strict=True)):
            known = self.subspaces[index] if self.subspaces else None
            for A in layer.factors("A"):
                A.data.copy_(design(covariance, known, self.reference.rank))

    def end(self, batches: Batches) -> None:
        """Protect the directions of the learned task's inputs."""
        covariances = self._covariances(batches)
        share = threshold(self.reference.lamb, self.reference.lame, self.model.task, self.tasks)
        known: Sequence[Subspace | None] = self.subspaces or [None] * len(covariances)
        self.subspaces = [protect(old, R.numpy(), share) for old, R in zip(known, covariances, strict=True)]

    def _covariances(self, batches: Batches) -> list[Tensor]:
        def show_all() -> None:
            for images, _ in batches:
                self.model(images.to(self.reference.device))

        return input_covariances(self.model.layers, show_all)

"""InfLoRA's design on CLIP (Liang & Li, CVPR 2024, arXiv:2404.00228): a LoRA for each task that leaves old ones alone.

Each adapted projection, of either encoder, is a layer of its own: its A is fixed to the leading directions of the
task's inputs after the directions of earlier tasks' inputs have been projected out, B alone is trained, and the
update is folded into the frozen weights when the next task begins. The text encoder's inputs are the tokens of the
class prompts, those behind the closing word included. The paper has this design for image classifiers; on CLIP it is
ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from flatpatch.families.clip.arguments import Arguments
from flatpatch.families.clip.reference.model import PromptClassifier, factor
from flatpatch.families.dualgpm import Subspace, design, input_covariances, protect, threshold

Batches = Iterable[Sequence[Tensor]]


class InfLoRA:
    """What InfLoRA does before and after each task.

    Attributes:
        subspaces: One per layer; empty during the first task.
    """

    def __init__(self, arguments: Arguments, model: PromptClassifier) -> None:
        self.arguments = arguments
        self.model = model
        self.subspaces: list[Subspace] = []

    def begin(self, task: int, batches: Batches) -> None:
        """Fold the last task's update into the frozen weights, and fix A to the new task's inputs."""
        if task > 0:
            self.model.fold()
        covariances = self._covariances(batches)
        known: Sequence[Subspace | None] = self.subspaces or [None] * len(covariances)
        for layer, old, covariance in zip(self.model.layers.values(), known, covariances, strict=True):
            factor(layer, "A").data.copy_(design(covariance, old, self.arguments.rank))

    def end(self, task: int, batches: Batches) -> None:
        """Protect the directions of the learned task's inputs."""
        covariances = self._covariances(batches)
        share = threshold(self.arguments.lamb, self.arguments.lame, task, len(self.arguments.datasets))
        known: Sequence[Subspace | None] = self.subspaces or [None] * len(covariances)
        self.subspaces = [protect(old, R.numpy(), share) for old, R in zip(known, covariances, strict=True)]

    def _covariances(self, batches: Batches) -> list[Tensor]:
        device = self.model.clip.logit_scale.device

        def show_all() -> None:
            # The prompts are the same in every batch: each once, so that their mean is that of one reading.
            self.model.clip.get_text_features(input_ids=self.model.words, attention_mask=self.model.mask)
            for images, _ in batches:
                self.model.clip.get_image_features(pixel_values=images.to(device))

        return input_covariances(list(self.model.layers.values()), show_all)

"""The losses of the repositories' training loops, computed anew as each loop computes its own.

Where upstream has a function for a part of a loss it is passed in and called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The weight that CL-LoRA's loop gives to its orthogonality penalty (models/cllora.py at the pin).
_ORTHOGONALITY = 0.0001


def trainer_loss(trainer: Any) -> Any:
    """Compute the loss that a Hugging Face Trainer computes, which also says what it divides by.

    The LLaMA of N-LoRA and O-LoRA divides by the sum of the batch's ``loss_mask`` (src/model/llama.py at the pin), T5
    by the labels that are not ignored, and so does the Trainer's label smoothing, which passes over a model's own loss.

    Args:
        trainer: Has ``compute_loss`` and ``label_smoother``.

    Returns:
        A :class:`flatpatch.flatness.WeightedLoss`: the mean of a batch, without the penalties of ``training_step``.
    """
    from flatpatch.flatness import WeightedLoss, count_terms

    def terms(batch: Any) -> float:
        mask = None if trainer.label_smoother is not None else batch.get("loss_mask")
        return count_terms(batch) if mask is None else float(mask.sum())

    return WeightedLoss(lambda model, batch: trainer.compute_loss(model, dict(batch)), terms)


def classification_loss(network: Any, inputs: Any, targets: Any) -> Any:
    """Compute InfLoRA's loss: cross-entropy over the classes of the task.

    Args:
        network: Upstream's, or its DataParallel.
        inputs: Images, ``(batch, 3, height, width)``.
        targets: Classes counted from the task's first, ``(batch,)``.

    Returns:
        The mean over the batch.
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(network(inputs)["logits"], targets)


def cllora_loss(learner: Any, inputs: Any, targets: Any, penalty: Callable[..., Any]) -> Any:
    """Compute CL-LoRA's task loss: cross-entropy, and after the first task the block weights' orthogonality penalty.

    Args:
        learner: Upstream's.
        inputs: Images, ``(batch, 3, height, width)``.
        targets: Classes counted from the task's first, ``(batch,)``.
        penalty: Of earlier tasks' block weights and the present ones.

    Returns:
        The mean over the batch, and the weighted penalty.
    """
    from torch.nn.functional import cross_entropy

    network = learner._network
    loss = cross_entropy(network(inputs, test=False)["logits"], targets)
    if learner._cur_task == 0:
        return loss
    return loss + _ORTHOGONALITY * penalty(network.backbone.block_weight_list, network.backbone.block_weight)


def cllora_distillation_loss(
    learner: Any, inputs: Any, divergence: Callable[..., Any], weight: float, temperature: float
) -> Any:
    """Compute CL-LoRA's distillation loss, of the shared adapters from what they were after the task before.

    Args:
        learner: Upstream's.
        inputs: Images, ``(batch, 3, height, width)``.
        divergence: Of the new logits from the teacher's, at a temperature ``T``.
        weight: Of the divergence.
        temperature: Of both softmaxes.

    Returns:
        The weighted mean over the batch.
    """
    student, teacher = learner._network.forward_kd(inputs, learner._cur_task)
    return weight * divergence(student["logits"], teacher["logits"], T=temperature)

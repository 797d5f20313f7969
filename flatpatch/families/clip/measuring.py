"""What is measured of a CLIP model, in words."""

from __future__ import annotations

from flatpatch.families.clip.arguments import Arguments


def loss_name(arguments: Arguments) -> str:
    """Return the measured loss in words."""
    return (
        "cross-entropy over the task's own classes, each named by the first prompt, with label smoothing "
        f"{arguments.label_smoothing:g}, of training images cut once with a fixed seed"
    )

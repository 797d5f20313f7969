"""What is measured of an image model, in words."""

from __future__ import annotations

IMAGE_LOSS = (
    "cross-entropy over the task's own classes, of training images augmented once with a fixed seed, without the "
    "method's penalty"
)

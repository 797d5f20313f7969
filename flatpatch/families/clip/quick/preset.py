"""What the quick form of the CLIP methods is made of, and how a run of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

DOMAINS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "shapes": ("disc", "square", "triangle", "cross", "ring", "star", "crescent", "bar"),
        "textures": ("lines", "columns", "slants", "checks", "dots", "circles", "grid", "speckle"),
        "colours": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
        "strokes": ("zigzag", "hook", "vee", "tee", "ell", "wye", "arrow", "ladder"),
    }
)
"""By task, in the order of training: its classes."""

TRAIN_IMAGES: Final = 60
"""Training images of a class."""

TEST_IMAGES: Final = 30
"""Test images of a class."""

PRESET: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "datasets": tuple(DOMAINS),
        "rank": 4,
        "alpha": 8,
        "iterations": 150,
        "batch_size": 32,
        "eval_batch_size": 240,
        "warmup": 15,
        "learning_rate": (0.05,),
    }
)
"""Argument -> value of profile ``quick``, for all methods unless a method's row says otherwise."""

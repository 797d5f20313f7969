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

RATES: Final[Mapping[str, float]] = MappingProxyType(
    {"shapes": 0.1, "textures": 0.03, "colours": 0.03, "strokes": 0.03}
)
"""By task: the learning rate."""

PRESET: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "datasets": tuple(DOMAINS),
        "rank": 8,
        "alpha": 16.0,
        "targets": ("q", "k", "v", "out"),
        "iterations": 100,
        "batch_size": 32,
        "eval_batch_size": 240,
        "warmup": 10,
        "momentum": 0.9,
    }
)
"""Argument -> value of profile ``quick``, for all methods unless a method's row says otherwise."""

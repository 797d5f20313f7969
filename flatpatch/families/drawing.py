"""What the generators of small images share: uniform numbers for whole batches, and edges that are not jagged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def between(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    """Draw uniform numbers, with axes for the pixels at the end: ``(*shape, 1, 1)``."""
    return (low + (high - low) * rng.random(shape))[..., None, None]


def inside(distance: Array) -> Array:
    """Turn a signed distance in pixels into how much of a pixel is covered, 0 to 1."""
    covered: Array = np.clip(0.5 - distance, 0.0, 1.0)
    return covered

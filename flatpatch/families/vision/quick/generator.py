"""Draw the quick benchmark: small images of one figure each, told apart by shape, texture and hue together.

A class is a combination of one of five shapes, five textures and five hues. Task ``t`` takes the shapes, textures and
hues ``t`` and ``t+1`` (counted around) in the four combinations in which every value of every kind occurs twice:
no shape, texture or hue alone names a class, any two of them do. Every value serves two tasks, and neighbouring
tasks have classes that differ in one kind alone: what one task learns to tell apart, another has to tell apart
otherwise. The other 105 combinations are for pre-training, so a model may have seen every shape, texture and hue, but
no class of the benchmark.

Place, size, rotation, tint, brightness, the texture's phase and period vary; the background is a grey slope of varying
tint with two small discs of any hue; each value gets noise. A pixel's colour thus says little about the class.

The bytes are the same on any machine: only additions, products, quotients, square roots and comparisons are used, which
IEEE 754 fixes to the last bit, on the uniform numbers of NumPy's PCG64.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flatpatch.families.drawing import Array, between, inside
from flatpatch.families.vision.quick.preset import TASKS

SHAPES: Final = ("disc", "square", "triangle", "cross", "ring")
TEXTURES: Final = ("plain", "across", "upright", "slanted", "checks")
HUES: Final = {
    "red": (0.95, 0.15, 0.15),
    "yellow": (0.90, 0.80, 0.10),
    "green": (0.15, 0.80, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "purple": (0.80, 0.20, 0.90),
}
SIZE: Final = 32
"""Height and width of an image, in pixels."""

TRAIN_IMAGES: Final = 80
"""Training images of a class."""

TEST_IMAGES: Final = 40
"""Test images of a class."""

Combination = tuple[int, int, int]


def _benchmark() -> tuple[Combination, ...]:
    classes: list[Combination] = []
    for task in range(TASKS):
        pair = (task, (task + 1) % TASKS)
        classes += [(pair[i], pair[j], pair[(i + j) % 2]) for i, j in product((0, 1), repeat=2)]
    return tuple(classes)


BENCHMARK: Final[tuple[Combination, ...]] = _benchmark()
"""Shape, texture and hue of each class of the benchmark, by their places in the lists above; four to a task."""

PRETRAINING: Final[tuple[Combination, ...]] = tuple(
    (shape, texture, hue)
    for shape, texture, hue in product(range(5), repeat=3)
    if (shape, texture, hue) not in BENCHMARK
)
"""The same of each class of pre-training."""


def class_name(combination: Combination) -> str:
    """Return a class's name, e.g. ``red upright ring``."""
    shape, texture, hue = combination
    return f"{tuple(HUES)[hue]} {TEXTURES[texture]} {SHAPES[shape]}"


def _distances(x: Array, y: Array) -> Array:
    """Return the signed distance to the edge of each shape, of radius about 1 around the origin: ``(5, ...)``."""
    radius = np.sqrt(x * x + y * y)
    across, upright = np.abs(x), np.abs(y)
    plus = np.minimum(np.maximum(across - 1.05, upright - 0.38), np.maximum(across - 0.38, upright - 1.05))
    return np.stack(
        [
            radius - 0.92,
            np.maximum(across, upright) - 0.82,
            np.maximum(0.8660254037844386 * across + 0.5 * y, -y) - 0.62,
            plus,
            np.abs(radius - 0.74) - 0.28,
        ]
    )


def _stripes(position: Array) -> Array:
    """Return 1 and 0 in turns along an axis, in units of a period."""
    return np.where(position - np.floor(position) < 0.5, 1.0, 0.0)


def draw(combinations: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image of each combination.

    Args:
        combinations: Shape, texture and hue of each image, ``(n, 3)``.
        rng: Draws all that varies.

    Returns:
        Images, ``(n, 32, 32, 3)``, 0 to 255.
    """
    count = len(combinations)
    shape, texture, hue = np.asarray(combinations, dtype=np.int64).reshape(count, 3).T
    everyone = np.arange(count)
    y, x = (axis[None].astype(np.float64) for axis in np.mgrid[:SIZE, :SIZE])

    # The tangent of half the angle gives sine and cosine without a library's rounding; within 20 degrees.
    tangent = between(rng, -0.176, 0.176, count)
    cosine = (1.0 - tangent * tangent) / (1.0 + tangent * tangent)
    sine = 2.0 * tangent / (1.0 + tangent * tangent)
    radius = between(rng, 7.5, 11.0, count)
    right, down = x - between(rng, 9.5, 21.5, count), y - between(rng, 9.5, 21.5, count)
    distances = _distances((cosine * right + sine * down) / radius, (cosine * down - sine * right) / radius)
    figure = inside(distances[shape, everyone] * radius)

    period = between(rng, 4.5, 6.5, count)
    phase = between(rng, 0.0, 1.0, count), between(rng, 0.0, 1.0, count)
    side = np.where(between(rng, 0.0, 1.0, count) < 0.5, 1.0, -1.0)
    across, upright = _stripes(y / period + phase[0]), _stripes(x / period + phase[1])
    textures = [
        np.broadcast_to(np.where(phase[0] < 0.5, 1.0, 0.0), across.shape),
        across,
        upright,
        _stripes((x + side * y) * 0.7071067811865476 / period + phase[0]),
        np.abs(across - upright),
    ]
    pattern = np.stack([np.broadcast_to(one, (count, SIZE, SIZE)) for one in textures])[texture, everyone]
    bright, dark = between(rng, 0.8, 1.0, count), between(rng, 0.3, 0.45, count)
    tone = bright * (pattern + (1.0 - pattern) * dark)

    colours = np.array(list(HUES.values()))
    tint = colours[hue][:, :, None, None] + between(rng, -0.12, 0.12, count, 3)
    slope = (between(rng, -0.2, 0.2, count) * (x - 16.0) + between(rng, -0.2, 0.2, count) * (y - 16.0)) / 16.0
    image = between(rng, 0.25, 0.7, count)[:, None] + between(rng, -0.08, 0.08, count, 3) + slope[:, None]
    for _ in range(2):
        spot_x, spot_y = x - between(rng, 0.0, 31.0, count), y - between(rng, 0.0, 31.0, count)
        spot = inside(np.sqrt(spot_x * spot_x + spot_y * spot_y) - between(rng, 1.5, 3.5, count))[:, None]
        spot_colour = colours[(rng.random(count) * len(colours)).astype(np.int64)][:, :, None, None]
        image = image + spot * (spot_colour * between(rng, 0.4, 1.0, count)[:, None] - image)
    image = image + figure[:, None] * (tint * tone[:, None] - image)
    image = image + 0.16 * (rng.random(image.shape) - 0.5)
    pixels: NDArray[np.uint8] = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _split(seed: int, number: int, per_class: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    labels = np.repeat(np.arange(len(BENCHMARK)), per_class)
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    return draw(np.array(BENCHMARK)[labels], rng), labels


def benchmark_images(
    *, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the benchmark.

    Args:
        seed: Draws other images of the same classes.

    Returns:
        Training images ``(1600, 32, 32, 3)``, their classes 0 to 19, test images ``(800, 32, 32, 3)``, their classes;
        both in the order of the classes.
    """
    return *_split(seed, 0, TRAIN_IMAGES), *_split(seed, 1, TEST_IMAGES)

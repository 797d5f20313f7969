"""Draw the quick form's images: four domains whose classes differ in kind, in two styles.

- shapes: one filled figure; the class is its outline, whatever its colour;
- textures: a pattern over the whole image, in two colours that say nothing;
- colours: a patch of a hue; its outline and what surrounds it say nothing;
- strokes: one line drawing of a few straight lines.

The small CLIP learns from captioned images of the style ``CAPTIONED``: clean, mostly bright on dark. The benchmark's
are drawn in the styles of ``BENCHMARK``: shapes and strokes smaller and in the middle, patches of colour smaller, and
both these and textures paler, on slopes of colour, with more spots and noise. So the model knows every class, and sorts
the benchmark's images worse than it can learn to.

The bytes are the same on any machine: only additions, products, quotients, square roots and comparisons are used, which
IEEE 754 fixes to the last bit, on the uniform numbers of NumPy's PCG64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flatpatch.families.clip.quick.preset import DOMAINS, TEST_IMAGES, TRAIN_IMAGES
from flatpatch.families.drawing import Array, between, inside

SIZE: Final = 32
"""Height and width of an image, in pixels."""

HUES: Final = {
    "red": (0.92, 0.12, 0.12),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.92, 0.86, 0.12),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.12, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.55, 0.15, 0.85),
    "pink": (0.97, 0.50, 0.75),
}


@dataclass(frozen=True)
class Style:
    """How images are drawn; pairs are the ends of a uniform distribution.

    Attributes:
        radius: Of a figure, in pixels.
        place: How far its centre may be from the image's, in pixels along each axis.
        tangent: Of half the largest angle by which it is turned.
        ground: Brightness of the background.
        slope: Largest rise of the background from the middle to an edge.
        tint: Largest change of a colour's channels.
        spots: Small discs of any hue around.
        strength: How far a figure's pixels take its colour; below 1 the background shines through.
        dark: Share of the figures whose colour is darkened rather than bright.
        noise: Largest change of a value by noise.
    """

    radius: tuple[float, float]
    place: float
    tangent: float
    ground: tuple[float, float]
    slope: float
    tint: float
    spots: int
    strength: tuple[float, float]
    dark: float
    noise: float


CAPTIONED: Final = Style((7.5, 11.5), 4.0, 0.14, (0.05, 0.55), 0.1, 0.08, 1, (0.85, 1.0), 0.15, 0.06)
_SMALL: Final = replace(CAPTIONED, radius=(5.0, 7.0), place=1.5, tangent=0.1)
_PALE: Final = Style((3.5, 6.0), 4.0, 0.2, (0.2, 0.7), 0.2, 0.12, 4, (0.35, 0.7), 0.3, 0.08)
BENCHMARK: Final[Mapping[str, Style]] = {
    "shapes": _SMALL,
    "textures": replace(_PALE, strength=(0.2, 0.6), tint=0.12, noise=0.14),
    "colours": _PALE,
    "strokes": replace(_SMALL, radius=(4.0, 5.5)),
}

_STROKES: Final[tuple[tuple[tuple[float, float], ...], ...]] = (
    ((-1.0, -0.6), (-0.33, 0.6), (0.33, -0.6), (1.0, 0.6)),
    ((0.4, -1.0), (0.4, 0.5), (-0.1, 0.95), (-0.6, 0.5)),
    ((-0.8, -0.9), (0.0, 0.9), (0.8, -0.9)),
    ((-0.9, -0.9), (0.9, -0.9), (0.0, -0.9), (0.0, 0.95)),
    ((-0.6, -1.0), (-0.6, 0.9), (0.7, 0.9)),
    ((-0.8, -0.9), (0.0, 0.0), (0.8, -0.9), (0.0, 0.0), (0.0, 0.95)),
    ((-1.0, 0.0), (1.0, 0.0), (0.4, -0.65), (1.0, 0.0), (0.4, 0.65)),
    ((-0.5, -1.0), (-0.5, 1.0), (-0.5, 0.4), (0.5, 0.4), (0.5, 1.0), (0.5, -1.0), (0.5, -0.4), (-0.5, -0.4)),
)
"""The corners of each drawing, without lifting the pen."""


def _shape_distances(x: Array, y: Array) -> Array:
    """Return the signed distance to the edge of each shape, of radius about 1 around the origin: ``(8, ...)``."""
    radius = np.sqrt(x * x + y * y)
    across, upright = np.abs(x), np.abs(y)
    plus = np.minimum(np.maximum(across - 1.05, upright - 0.36), np.maximum(across - 0.36, upright - 1.05))
    down = np.maximum(0.8660254037844386 * across + 0.5 * y, -y) - 0.62
    up = np.maximum(0.8660254037844386 * across - 0.5 * y, y) - 0.62
    beside = np.sqrt((x - 0.55) * (x - 0.55) + y * y)
    return np.stack(
        [
            radius - 0.92,
            np.maximum(across, upright) - 0.8,
            down,
            plus,
            np.abs(radius - 0.74) - 0.24,
            np.minimum(down - 0.04, up - 0.04),
            np.maximum(radius - 1.0, 0.78 - beside),
            np.maximum(across - 1.1, upright - 0.38),
        ]
    )


def _stroke_distance(x: Array, y: Array, corners: tuple[tuple[float, float], ...]) -> Array:
    """Return the distance to the nearest point of a line drawing."""
    nearest = np.full(np.broadcast(x, y).shape, np.inf)
    for (ax, ay), (bx, by) in zip(corners, corners[1:], strict=False):
        length = (bx - ax) * (bx - ax) + (by - ay) * (by - ay)
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0.0, 1.0)
        off_x, off_y = x - ax - along * (bx - ax), y - ay - along * (by - ay)
        nearest = np.minimum(nearest, np.sqrt(off_x * off_x + off_y * off_y))
    return nearest


def _rest(position: Array) -> Array:
    """Return where in its period a position is, 0 to 1."""
    rest: Array = position - np.floor(position)
    return rest


def _patterns(x: Array, y: Array, rng: np.random.Generator, count: int) -> Array:
    """Return each texture, 0 to 1, with one period, phase and side for an image: ``(8, n, 32, 32)``."""
    period = between(rng, 5.0, 8.0, count)
    phase = between(rng, 0.0, 1.0, count), between(rng, 0.0, 1.0, count)
    side = np.where(between(rng, 0.0, 1.0, count) < 0.5, 1.0, -1.0)
    across, upright = _rest(y / period + phase[0]), _rest(x / period + phase[1])
    slanted = _rest((x + side * y) * 0.7071067811865476 / period + phase[0])
    from_x, from_y = x - 16.0 - 8.0 * (phase[0] - 0.5), y - 16.0 - 8.0 * (phase[1] - 0.5)
    around = _rest(np.sqrt(from_x * from_x + from_y * from_y) / period)
    dot = (across - 0.5) * (across - 0.5) + (upright - 0.5) * (upright - 0.5)
    blocks = np.repeat(np.repeat(np.where(rng.random((count, SIZE // 2, SIZE // 2)) < 0.5, 1.0, 0.0), 2, 1), 2, 2)
    on = (
        across < 0.5,
        upright < 0.5,
        slanted < 0.5,
        (across < 0.5) != (upright < 0.5),
        dot < 0.1,
        around < 0.5,
        (across < 0.25) | (upright < 0.25),
        blocks > 0.5,
    )
    return np.stack([np.broadcast_to(np.where(one, 1.0, 0.0), (count, SIZE, SIZE)) for one in on])


def _figures(domain: int, labels: NDArray[np.int64], style: Style, rng: np.random.Generator) -> Array:
    """Return how much of each pixel the classes' figures cover, ``(n, 32, 32)``."""
    count = len(labels)
    y, x = (axis[None].astype(np.float64) for axis in np.mgrid[:SIZE, :SIZE])
    if domain == 1:
        return np.asarray(_patterns(x, y, rng, count)[labels, np.arange(count)])
    # The tangent of half the angle gives sine and cosine without a library's rounding.
    tangent = between(rng, -style.tangent, style.tangent, count)
    cosine = (1.0 - tangent * tangent) / (1.0 + tangent * tangent)
    sine = 2.0 * tangent / (1.0 + tangent * tangent)
    radius = between(rng, *style.radius, count)
    right = x - between(rng, 15.5 - style.place, 15.5 + style.place, count)
    down = y - between(rng, 15.5 - style.place, 15.5 + style.place, count)
    u, v = (cosine * right + sine * down) / radius, (cosine * down - sine * right) / radius
    if domain == 3:
        width = between(rng, 1.1, 1.6, count)
        distances = np.stack([_stroke_distance(u, v, corners) for corners in _STROKES])
        return inside(distances[labels, np.arange(count)] * radius - width)
    distances = _shape_distances(u, v)
    # A colour's patch has any outline.
    outline = labels if domain == 0 else (rng.random(count) * len(distances)).astype(np.int64)
    return inside(distances[outline, np.arange(count)] * radius)


def draw(
    domain: int,
    labels: NDArray[np.int64],
    style: Style,
    rng: np.random.Generator,
    hues: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Draw one image of each label.

    Args:
        domain: By its place among the domains.
        labels: Class of each image in it, ``(n,)``.
        style: How to draw.
        rng: Draws all that varies.
        hues: Of the figures, by their places in ``HUES``; None: any, or in the domain of colours the class.

    Returns:
        Images, ``(n, 32, 32, 3)``, 0 to 255.
    """
    count = len(labels)
    y, x = (axis[None].astype(np.float64) for axis in np.mgrid[:SIZE, :SIZE])
    figure = _figures(domain, labels, style, rng)
    colours = np.array(list(HUES.values()))
    drawn = (rng.random(count) * len(colours)).astype(np.int64)
    hue = labels if domain == 2 else drawn if hues is None else hues
    tint = colours[hue][:, :, None, None] + between(rng, -style.tint, style.tint, count, 3)
    darkened = np.where(between(rng, 0.0, 1.0, count) < style.dark, 0.45, 1.0)
    tint = tint * (darkened if domain != 2 else 0.5 + 0.5 * darkened)[:, None]
    steepness = (between(rng, -style.slope, style.slope, count) for _ in range(2))
    slope = sum(steep * (axis - 16.0) for steep, axis in zip(steepness, (x, y), strict=True)) / 16.0
    ground = between(rng, *style.ground, count)[:, None] + between(rng, -style.tint, style.tint, count, 3)
    image = ground + slope[:, None]
    for _ in range(style.spots):
        spot_x, spot_y = x - between(rng, 0.0, 31.0, count), y - between(rng, 0.0, 31.0, count)
        spot = inside(np.sqrt(spot_x * spot_x + spot_y * spot_y) - between(rng, 1.5, 3.5, count))[:, None]
        spot_colour = colours[(rng.random(count) * len(colours)).astype(np.int64)][:, :, None, None]
        image = image + spot * (spot_colour * between(rng, 0.4, 1.0, count)[:, None] - image)
    image = image + (figure * between(rng, *style.strength, count))[:, None] * (tint - image)
    image = image + 2.0 * style.noise * (rng.random(image.shape) - 0.5)
    pixels: NDArray[np.uint8] = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def benchmark_images(name: str, *, train: bool, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw one domain of the benchmark.

    Args:
        name: Of ``DOMAINS``.
        train: Its training images or its test images.
        seed: Draws other images of the same classes.

    Returns:
        Images ``(n, 32, 32, 3)`` and their classes, in the order of the classes.
    """
    domain = tuple(DOMAINS).index(name)
    labels = np.repeat(np.arange(len(DOMAINS[name])), TRAIN_IMAGES if train else TEST_IMAGES)
    return draw(
        domain, labels, BENCHMARK[name], np.random.Generator(np.random.PCG64([seed, domain, int(train)]))
    ), labels

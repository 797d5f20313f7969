r"""The loss along one or two directions, and on the plane through three models.

Each point is built anew from the base, :math:`x + a\,d_1 + b\,d_2` in float64, and rounded once to the weights'
number format, so that no rounding adds up over a walk. A cell holds the loss that was found, infinite and NaN too;
which cells have been evaluated is kept apart, in a mask, by which an interrupted landscape goes on. Buffers, such as
the running statistics of batch normalisation, are the origin's everywhere; on the plane through three models they are
means of the models', with the shares that the weights have, beyond the models within the range of theirs. They are
never computed anew. ``about`` has ``moved_buffers``, their names, if any differ.

The file (``.npz``) holds ``losses`` and ``done``, shaped as the grid; ``axis_0`` and, in two dimensions, ``axis_1``,
the coordinates; ``marks`` (k, d) and ``mark_losses`` (k,), points evaluated besides; ``origin_loss`` (), the loss
at the weights as they were; and ``about``, JSON of
``{schema, kind, scope, num_parameters, num_terms, content: {part: hash}, axes: [{label, normalisation, seed,
zero_units, skipped}], cosine, marks: [names], fingerprint}``. ``load_landscape`` reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.files import written_atomically
from flatpatch.flatness.basis import Progress
from flatpatch.flatness.content import problem_content
from flatpatch.flatness.directions import Direction
from flatpatch.flatness.points import (
    Objective,
    Point,
    as_point,
    loss_at,
    mixed_buffers,
    moving,
    tensors_of,
    weights_of,
)
from flatpatch.flatness.problem import Problem

FloatArray = NDArray[np.float64]

SCHEMA = 1
_SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Mark:
    """A point with a name, evaluated besides the grid at the very weights given.

    Attributes:
        name: What the point is, such as a model's name.
        coordinates: (d,) where it lies, in the grid's coordinates.
        weights: (n,) the weights to evaluate, or a point with its buffers.
    """

    name: str
    coordinates: tuple[float, ...]
    weights: Tensor | Point


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid.

    Attributes:
        losses: (p,) or (p, q), float64; as evaluated, infinities and NaN included. NaN where not done.
        done: Which cells have been evaluated; the same shape.
        axes: One array of coordinates per direction, (p,) and (q,).
        marks: (k, d) coordinates of the points evaluated besides.
        mark_losses: (k,) their losses.
        origin_loss: The loss at the weights as they were.
        about: What was varied; see the module's text.
    """

    losses: FloatArray
    done: NDArray[np.bool_]
    axes: tuple[FloatArray, ...]
    marks: FloatArray
    mark_losses: FloatArray
    origin_loss: float
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Plane:
    """The plane through three models, with an orthonormal basis.

    Attributes:
        origin: (n,) the first model, float64.
        basis: (2, n) orthonormal; the first points from the first model to the second.
        coordinates: (3, 2) of the three models, in weight units.
    """

    origin: Tensor
    basis: Tensor
    coordinates: FloatArray


def landscape(
    problem: Problem | Objective,
    directions: Sequence[Direction],
    axes: Sequence[Sequence[float] | FloatArray],
    *,
    origin: Tensor | Point | None = None,
    marks: Sequence[Mark] = (),
    path: Path | None = None,
    save_seconds: float = _SAVE_SECONDS,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate the loss on a grid spanned by one or two directions.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit, also after an exception.
        directions: One or two.
        axes: For each direction, its coordinates.
        origin: (n,) where all coordinates are zero, with the buffers of the whole grid; by default the weights as they
            are.
        marks: Points to evaluate besides, at their own weights.
        path: A ``.npz`` file to keep the results in, written whole or not at all. If it holds some of this very
            landscape already, only the rest is evaluated.
        save_seconds: How often the file is written; also on leaving, whatever the reason.
        progress: Called after each point.

    Returns:
        The landscape, every cell done.

    Raises:
        ValueError: If the numbers or shapes of the arguments do not fit.
        UserError: If the file holds another landscape or cannot be read, or a vector's running statistics are not known
            (see :func:`flatpatch.flatness.points.as_point`).
    """
    start = None if origin is None else as_point(problem, origin, "the origin")
    buffers = {} if start is None else start.buffers
    return _span(
        problem,
        directions,
        axes,
        origin=None if start is None else start.weights,
        buffers=lambda _: buffers,
        marks=marks,
        path=path,
        save_seconds=save_seconds,
        progress=progress,
    )


def _span(
    problem: Problem | Objective,
    directions: Sequence[Direction],
    axes: Sequence[Sequence[float] | FloatArray],
    *,
    origin: Tensor | None,
    buffers: Callable[[tuple[float, ...]], Mapping[str, Tensor]],
    marks: Sequence[Mark],
    path: Path | None,
    save_seconds: float,
    progress: Progress | None,
) -> Landscape:
    """Evaluate a landscape whose buffers are a function of the coordinates."""
    if len(directions) not in (1, 2) or len(axes) != len(directions):
        raise ValueError(f"one or two directions, each with its axis; got {len(directions)} and {len(axes)} axes")
    grid = tuple(np.asarray(axis, dtype=np.float64) for axis in axes)
    for axis in grid:
        if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
            raise ValueError("each axis must be a sequence of finite coordinates, not empty")
    with moving(problem) as objective:
        base = (objective.origin if origin is None else origin).to(torch.float64)
        vectors = [direction.vector.to(base) for direction in directions]
        for direction, vector in zip(directions, vectors, strict=True):
            if vector.shape != base.shape or objective.origin.shape != base.shape:
                raise ValueError(
                    f"{direction.label} has shape {tuple(vector.shape)}, the origin {tuple(base.shape)}, "
                    f"the weights {tuple(objective.origin.shape)}"
                )
            if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
                raise ValueError(f"{direction.label} is zero or not finite: there is nothing to vary along it")

        def point(coordinates: tuple[float, ...]) -> Point:
            moved = base
            for coordinate, vector in zip(coordinates, vectors, strict=True):
                moved = torch.add(moved, vector, alpha=coordinate)
            return Point(moved, buffers(coordinates))

        marks = [replace(mark, weights=as_point(problem, mark.weights, mark.name)) for mark in marks]
        about = {"kind": "landscape", **describe(problem), "axes": [_describe_axis(d) for d in directions]}
        if len(vectors) == 2:
            first, second = (vector / torch.linalg.vector_norm(vector) for vector in vectors)
            about["cosine"] = float(first @ second)
        return evaluate_grid(
            objective,
            point,
            grid,
            about=about,
            identity=[base, *vectors, *tensors_of(Point(base, buffers((0.0,) * len(vectors))))[1:]],
            marks=marks,
            path=path,
            save_seconds=save_seconds,
            progress=progress,
        )


def plane_through(first: Tensor | Point, second: Tensor | Point, third: Tensor | Point) -> Plane:
    """Return the plane through three points, with the first at (0, 0) and the second at (|second - first|, 0).

    It is one of the weights: what a point has besides them does not count.

    Raises:
        ValueError: If the shapes differ, a point is not finite, or the three lie on one line.
    """
    points = [weights_of(point).detach().to("cpu", torch.float64) for point in (first, second, third)]
    if any(point.ndim != 1 or point.shape != points[0].shape for point in points):
        raise ValueError(f"three vectors of one length, got shapes {[tuple(point.shape) for point in points]}")
    if not all(bool(point.isfinite().all()) for point in points):
        raise ValueError("the three models must have finite weights")
    u, v = points[1] - points[0], points[2] - points[0]
    width, reach = float(torch.linalg.vector_norm(u)), float(torch.linalg.vector_norm(v))
    if min(width, reach) == 0:
        raise ValueError("the three models are not on a plane of their own: two of them are the same point")
    e1 = u / width
    along = float(v @ e1)
    across = v - along * e1
    # Once more, so that the basis is orthogonal to rounding even if the three are nearly on a line.
    correction = float(across @ e1)
    across, along = across - correction * e1, along + correction
    height = float(torch.linalg.vector_norm(across))
    if height < 1e-6 * reach:
        raise ValueError(f"the three models lie on one line (off it by {height / reach:.1e} of their distance)")
    coordinates = np.array([[0.0, 0.0], [width, 0.0], [along, height]])
    return Plane(points[0], torch.stack([e1, across / height]), coordinates)


def plane_landscape(
    problem: Problem | Objective,
    models: Mapping[str, Tensor | Point],
    *,
    points: int = 25,
    margin: float = 0.2,
    path: Path | None = None,
    save_seconds: float = _SAVE_SECONDS,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate the loss on the plane through three models, and at the models themselves.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        models: Three names and weights, (n,) each, or points with their buffers (see the module's text for these); the
            first is at (0, 0). They are evaluated at these very weights and buffers.
        points: Grid points a side.
        margin: How far the grid reaches beyond the models, as a share of their extent.
        path: As in ``landscape``.
        save_seconds: As in ``landscape``.
        progress: As in ``landscape``.

    Returns:
        The landscape, with the models as its marks. Coordinates are in weight units on both axes.

    Raises:
        ValueError: If there are not three models, or they lie on one line.
        UserError: As in ``landscape``.
    """
    if len(models) != 3:
        raise ValueError(f"a plane needs three models, got {len(models)}: {', '.join(models)}")
    known = [as_point(problem, where, name) for name, where in models.items()]
    plane = plane_through(*known)
    (width, _), (along, height) = plane.coordinates[1:]
    mix = mixed_buffers(problem, known)

    def buffers(coordinates: tuple[float, ...]) -> dict[str, Tensor]:
        x, y = coordinates
        third = y / height
        second = (x - along * third) / width
        return mix((1 - second - third, second, third))

    low, high = plane.coordinates.min(axis=0), plane.coordinates.max(axis=0)
    reach = margin * (high - low)
    names = list(models)
    labels = [f"towards {names[1]}", f"across, towards {names[2]}"]
    return _span(
        problem,
        [Direction(vector, label, "l2") for vector, label in zip(plane.basis, labels, strict=True)],
        [np.linspace(a, b, points) for a, b in zip(low - reach, high + reach, strict=True)],
        origin=plane.origin.to(known[0].weights.device),
        buffers=buffers,
        marks=[
            Mark(name, tuple(map(float, where)), point)
            for name, point, where in zip(names, known, plane.coordinates, strict=True)
        ],
        path=path,
        save_seconds=save_seconds,
        progress=progress,
    )


def evaluate_grid(
    objective: Objective,
    point: Callable[[tuple[float, ...]], Point],
    axes: tuple[FloatArray, ...],
    *,
    about: Mapping[str, Any],
    identity: Sequence[Tensor],
    marks: Sequence[Mark] = (),
    path: Path | None = None,
    save_seconds: float = _SAVE_SECONDS,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate an objective wherever a grid is not done yet.

    Args:
        objective: The loss.
        point: From coordinates to weights and buffers.
        axes: One array of coordinates per dimension.
        about: What is varied; kept with the result.
        identity: The tensors that make this grid's points what they are; a file made from others is refused.
        marks: Points to evaluate besides.
        path: As in ``landscape``.
        save_seconds: As in ``landscape``.
        progress: As in ``landscape``.

    Returns:
        The finished landscape.

    Raises:
        UserError: If the file holds another landscape or cannot be read.
    """
    shape = tuple(len(axis) for axis in axes)
    moved = sorted({name for mark in marks if isinstance(mark.weights, Point) for name in mark.weights.buffers})
    about = {
        "schema": SCHEMA,
        **about,
        "marks": [mark.name for mark in marks],
        **({"moved_buffers": moved} if moved else {}),
        "fingerprint": _fingerprint(about, axes, [*identity, *(t for mark in marks for t in tensors_of(mark.weights))]),
    }
    places = np.array([mark.coordinates for mark in marks], dtype=np.float64).reshape(len(marks), len(axes))
    result = Landscape(
        losses=np.full(shape, math.nan),
        done=np.zeros(shape, dtype=bool),
        axes=axes,
        marks=places,
        mark_losses=np.full(len(marks), math.nan),
        origin_loss=objective.loss(objective.origin),
        about=about,
    )
    if path is not None and path.exists():
        result = _continued(result, path)
    with _saving(result, path, save_seconds) as save:
        for k, mark in enumerate(marks):
            result.mark_losses[k] = loss_at(objective, mark.weights)
        total, finished = result.done.size, int(result.done.sum())
        for index in itertools.product(*(range(length) for length in shape)):
            if result.done[index]:
                continue
            coordinates = tuple(float(axis[i]) for axis, i in zip(axes, index, strict=True))
            result.losses[index] = loss_at(objective, point(coordinates))
            result.done[index] = True
            finished += 1
            save()
            if progress is not None:
                progress(finished, total, f"loss {result.losses[index]:.4g}")
    return result


def save_landscape(result: Landscape, path: Path) -> None:
    """Write a landscape to a ``.npz`` file; a reader finds either the whole file or what was there before."""
    arrays: dict[str, Any] = {
        "losses": result.losses,
        "done": result.done,
        "marks": result.marks,
        "mark_losses": result.mark_losses,
        "origin_loss": np.array(result.origin_loss),
        "about": np.array(json.dumps(result.about)),
        **{f"axis_{k}": axis for k, axis in enumerate(result.axes)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def load_landscape(path: Path) -> Landscape:
    """Read a landscape's file.

    Raises:
        UserError: If it is not one.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            result = Landscape(
                **{name: file[name] for name in ("losses", "done", "marks", "mark_losses")},
                axes=tuple(file[f"axis_{k}"] for k in range(file["losses"].ndim)),
                origin_loss=float(file["origin_loss"]),
                about=about,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a landscape's file: {error}. Delete it or choose another.") from None
    if about.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {about.get('schema')}, this version reads {SCHEMA}. Measure again.")
    return result


@contextmanager
def _saving(result: Landscape, path: Path | None, seconds: float) -> Iterator[Callable[[], None]]:
    """Yield a function that writes the file now and then; it is also written when the block is left."""
    last = time.monotonic()

    def save() -> None:
        nonlocal last
        if path is not None and time.monotonic() - last >= seconds:
            save_landscape(result, path)
            last = time.monotonic()

    try:
        yield save
    finally:
        if path is not None:
            save_landscape(result, path)


def _continued(fresh: Landscape, path: Path) -> Landscape:
    """Return the file's cells in a landscape that is the same otherwise."""
    kept = load_landscape(path)
    # What sums in another order may change by; the fingerprint holds everything that repeats exactly.
    before, now = kept.origin_loss, fresh.origin_loss
    same_loss = abs(before - now) <= 1e-5 * max(abs(before), abs(now)) or (math.isnan(before) and math.isnan(now))
    if kept.about["fingerprint"] != fresh.about["fingerprint"] or not same_loss:
        what = "weights, directions or grid" if same_loss else f"data or weights (loss {before:.9g}, here {now:.9g})"
        raise UserError(f"{path} holds a landscape of other {what}. Delete it or choose another file.")
    return replace(fresh, losses=kept.losses, done=kept.done)


def _fingerprint(about: Mapping[str, Any], axes: Sequence[FloatArray], tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for axis in axes:
        digest.update(axis.tobytes())
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def describe(problem: Problem | Objective) -> dict[str, Any]:
    """Return what a result says about the problem it was measured on."""
    if not isinstance(problem, Problem):
        return {"scope": None, "num_parameters": len(problem.origin), "num_terms": None, "content": None}
    return {
        "scope": problem.scope.name,
        "num_parameters": problem.size,
        "num_terms": sum(problem.num_terms),
        "content": problem_content(problem),
    }


def _describe_axis(direction: Direction) -> dict[str, Any]:
    return {
        "label": direction.label,
        "normalisation": direction.normalisation,
        "seed": direction.seed,
        "zero_units": dict(direction.zero_units),
        "skipped": list(direction.skipped),
    }

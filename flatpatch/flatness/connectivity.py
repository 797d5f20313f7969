r"""Linear mode connectivity: the loss on the straight line between two models, and its barrier.

The barrier (Frankle et al. 2020, arXiv:1912.05671; Entezari et al. 2022, arXiv:2110.06296) is the highest
:math:`L(a) - [(1 - a) L(0) + a L(1)]` of the line between its ends.

Between two LoRA adapters there are two straight lines. In the scope "adapter" the factors are averaged, and the
midpoint's update is :math:`(B_1 + B_2)(A_1 + A_2) / 4`, cross terms included; in "merged" the products are:
:math:`(B_1 A_1 + B_2 A_2) / 2`. The results differ, so each is named. The first line also depends on how each product
is split into factors, the second does not.

Buffers that differ between the models, such as the running statistics of batch normalisation, lie on the same line:
:math:`(1 - a) b_1 + a b_2`. So both ends have the models' own losses. Between them the statistics are not those that
the weights there would collect; a barrier of such models is that of their average, statistics included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness.basis import Progress
from flatpatch.flatness.landscape import FloatArray, Landscape, Mark, describe, evaluate_grid
from flatpatch.flatness.points import (
    Objective,
    Point,
    as_point,
    mixed_buffers,
    moving,
    norm_buffers,
    plain,
)
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.scope import adapter_factor, find_scope, rank_axis

SPACES = {"adapter": "factor space (A and B)", "merged": "merged space (W + s B A)"}


@dataclass(frozen=True)
class Connectivity:
    """The loss on the line between two models.

    Attributes:
        space: What was interpolated, in words.
        alphas: (p,) from 0 at the first model to 1 at the second.
        losses: (p,) as evaluated, infinities and NaN included.
        barrier: Highest loss above the straight line between the ends' losses, between the ends; negative if the
            whole line lies below it. NaN if any loss is NaN.
        barrier_alpha: Where.
        barrier_above_mean: Highest loss between the ends above the mean of the ends' losses.
        distance: L2 distance of the two models' weights in this space.
        moved_buffers: Names of the buffers that differ between the ends, and lie on the line too.
        landscape: The same as a one-dimensional landscape, as it is written to files.
    """

    space: str
    alphas: FloatArray
    losses: FloatArray
    barrier: float
    barrier_alpha: float
    barrier_above_mean: float
    distance: float
    moved_buffers: tuple[str, ...]
    landscape: Landscape

    def as_dict(self) -> dict[str, Any]:
        """Return everything for a file, but the landscape, which is a file of its own."""
        whole = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "landscape"}
        as_plain: dict[str, Any] = plain({**whole, "alphas": self.alphas.tolist(), "losses": self.losses.tolist()})
        return as_plain


def linear_connectivity(
    problem: Problem | Objective,
    first: Tensor | Point,
    second: Tensor | Point,
    *,
    points: int = 25,
    names: tuple[str, str] = ("first", "second"),
    path: Path | None = None,
    progress: Progress | None = None,
) -> Connectivity:
    """Evaluate the loss on the straight line between two models, in the space of the problem's scope.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        first: (n,) weights at alpha = 0, or a point with its buffers, as ``model_point`` and ``checkpoint_point`` give
            it; evaluated exactly.
        second: At alpha = 1, likewise.
        points: How many, both ends included.
        names: Of the two models.
        path: As in ``landscape``.
        progress: As in ``landscape``.

    Returns:
        The losses and the barrier.

    Raises:
        ValueError: If the vectors do not fit or there are fewer than three points.
        UserError: As in ``landscape``, also of the ends.
    """
    if points < 3:
        raise ValueError(f"a barrier needs points between the ends: points must be at least 3, got {points}")
    alphas = np.linspace(0.0, 1.0, points)
    known = [as_point(problem, end, name) for end, name in zip((first, second), names, strict=True)]
    mix = mixed_buffers(problem, known)
    with moving(problem) as objective:
        ends = [end.weights.detach().to(objective.origin.device, torch.float64) for end in known]
        if any(end.shape != objective.origin.shape for end in ends):
            raise ValueError(
                f"the models have shapes {tuple(ends[0].shape)} and {tuple(ends[1].shape)}, "
                f"the weights {tuple(objective.origin.shape)}"
            )
        distance = float(torch.linalg.vector_norm(ends[1] - ends[0]))

        def point(coordinates: tuple[float, ...]) -> Point:
            (alpha,) = coordinates
            # Both shares written out: either end is met exactly.
            return Point(torch.add((1 - alpha) * ends[0], ends[1], alpha=alpha), mix((1 - alpha, alpha)))

        about = describe(problem)
        space = SPACES.get(str(about["scope"]), "weight space")
        if isinstance(problem, Problem) and problem.scope.others:
            space += " and what else was trained"
        if moved := tuple(mix((1.0, 0.0))):
            space += ", with the buffers that differ"
        axis = {"label": f"from {names[0]} to {names[1]}", "normalisation": "between models", "seed": None}
        result = evaluate_grid(
            objective,
            point,
            (alphas,),
            about={"kind": "connectivity", **about, "space": space, "distance": distance, "axes": [axis]},
            identity=ends,
            marks=[Mark(name, (alpha,), end) for name, alpha, end in zip(names, (0.0, 1.0), known, strict=True)],
            path=path,
            progress=progress,
        )
    barrier, barrier_alpha, above_mean = find_barrier(alphas, result.losses)
    return Connectivity(space, alphas, result.losses, barrier, barrier_alpha, above_mean, distance, moved, result)


def find_barrier(alphas: FloatArray, losses: FloatArray) -> tuple[float, float, float]:
    """Return the barrier above the line between the ends, where it is, and the one above the ends' mean.

    Args:
        alphas: (p,) increasing from 0 to 1.
        losses: (p,) at these points.

    Returns:
        Highest loss between the ends above the straight line through them (signed); its alpha; highest loss between
        the ends above their mean. NaN, each, if any loss is NaN.
    """
    if np.isnan(losses).any():
        return float("nan"), float("nan"), float("nan")
    inner = slice(1, -1)
    with np.errstate(invalid="ignore"):  # infinity minus infinity, at an infinite end
        above = (losses - (1 - alphas) * losses[0] - alphas * losses[-1])[inner]
        above_mean = float(np.max(losses[inner]) - (losses[0] + losses[-1]) / 2)
    highest = int(np.argmax(above))
    return float(above[highest]), float(alphas[inner][highest]), above_mean


def checkpoint_point(problem: Problem, state: Mapping[str, Any], *, name: str = "the checkpoint") -> Tensor | Point:
    """Read a checkpoint as a point in a problem's space: its factors, its weights, or W + s B A of its factors.

    Args:
        problem: Whose variables are meant. In the scope "merged" the checkpoint's factors are put into the model
            for a moment; the model is put back, bit for bit.
        state: Tensors by the names of the model's parameters and buffers, such as ``model.state_dict()``: a tied
            tensor by any or all of its names, and those of a compiled or parallel model by its own. Parameters that are
            no variables (in "merged": no LoRA factors) may be there, and must then equal the model's: they are the
            base. Buffers that are not there are the model's.
        name: What to call it in an error.

    Returns:
        (n,) float64; if buffers differ from the model's, a point with them.

    Raises:
        UserError: If tensors are missing, unknown, of another shape (another rank), or of another base, a buffer that
            differs is no number that can be moved, or the scope is "tangent".
        ValueError: If called inside ``problem.active()``, where merged layers do not compute with their factors.
    """
    if any("forward" in vars(layer) for layer in problem.scope.layers):
        raise ValueError("a checkpoint must be read before the problem is active")
    _refuse_tangent(problem)
    parameters = dict(problem.model.named_parameters())
    merged = problem.scope.name == "merged"
    absorbed = {id(parameter) for parameter in problem.scope.absorbed}
    wanted = list(problem.scope.names)
    if merged:
        wanted = [key for key, p in parameters.items() if id(p) in absorbed or key in problem.scope.others]
    values, buffers = _sort_checkpoint(problem.model, state, name)
    _check_checkpoint(values, parameters, wanted, name)
    moved = _moved_buffers(problem.model, buffers, name)
    if not merged:
        return _with_buffers(problem.flatten([values[key] for key in wanted], torch.float64), moved)
    saved = {key: parameters[key].detach().clone() for key in wanted}
    try:
        with torch.no_grad():
            for key in wanted:
                parameters[key].copy_(values[key])
        others = bool(problem.scope.others)
        merged_variables = find_scope(problem.model, "merged", others=others).variables
        return _with_buffers(problem.flatten(merged_variables, torch.float64), moved)
    finally:
        with torch.no_grad():
            for key, value in saved.items():
                parameters[key].copy_(value)


def model_point(problem: Problem, other: Problem, *, name: str = "the other model") -> Tensor | Point:
    """Read another model as a point in a problem's space.

    In the scope "merged" this also takes models whose adapters have another rank, as those of later tasks do.

    Args:
        problem: Whose space is meant.
        other: A problem of the other model, of the same scope.
        name: What to call it in an error.

    Returns:
        (n,) float64, on the first problem's device; if the models' buffers differ, a point with the other's.

    Raises:
        UserError: If the variables differ in name or shape (rank), the frozen weights differ (base), or a buffer that
            differs is no number that can be moved, or the scope is "tangent".
    """
    mine, others = problem.scope, other.scope
    _refuse_tangent(problem)
    if mine.name != others.name or mine.names != others.names:
        raise UserError(
            f"{name} varies {len(others.names)} tensors of scope {others.name}, the first model {len(mine.names)} of "
            f"scope {mine.name}, or by other names. Compare models of one kind over one scope."
        )
    shapes = {key: variable.shape for key, variable in zip(mine.names, mine.variables, strict=True)}
    for key, variable in zip(others.names, others.variables, strict=True):
        _check_shape(key, variable.shape, shapes, name)
    base = _base(problem)
    for key, value in _base(other).items():
        if key in base and (value.shape != base[key].shape or not torch.equal(value.to(base[key].device), base[key])):
            raise _other_base(key, name)
    # A copy: the other model may be moved, or trained on.
    moved = _moved_buffers(problem.model, dict(other.model.named_buffers()), name)
    return _with_buffers(problem.flatten(other.variables, torch.float64), moved)


def _refuse_tangent(problem: Problem) -> None:
    if problem.scope.name == "tangent":
        raise UserError(
            "scope=tangent has no lines between models: each model has directions of its own, and coordinates by them. "
            "Compare models in scope=adapter or scope=merged."
        )


def _with_buffers(weights: Tensor, moved: dict[str, Tensor]) -> Tensor | Point:
    return Point(weights, moved) if moved else weights


def _moved_buffers(model: nn.Module, theirs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return copies of the buffers that are not the model's.

    Raises:
        UserError: If one has another shape, or is no floating-point number of a finite value.
    """
    mine = dict(model.named_buffers())
    counters = norm_buffers(model, "num_batches_tracked")  # of no influence on a loss
    moved = {}
    for key, value in theirs.items():
        if key in counters:
            continue
        if key not in mine or value.shape != mine[key].shape:
            got = f"{tuple(value.shape)} in {name}"
            expected = f"{tuple(mine[key].shape)} in the model" if key in mine else "not in the model"
            raise UserError(f"the buffer {key} is {got} and {expected}. It belongs to another model.")
        if torch.equal(value.to(mine[key]), mine[key]):
            continue
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise UserError(
                f"the buffer {key} of {name} is not the model's, and has nothing between the two: it is of "
                f"{str(value.dtype).removeprefix('torch.')}, or not finite. Compare models that agree in it."
            )
        moved[key] = value.detach().clone()
    return moved


def _sort_checkpoint(
    model: nn.Module, state: Mapping[str, Any], name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a checkpoint's parameters and its buffers, each under the first of its names.

    Raises:
        UserError: If it has something that the model has not, or two values of one tensor.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    first = {id(tensor): key for key, tensor in (*parameters.items(), *buffers.items())}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = {_plain_name(key): first[id(tensor)] for key, tensor in every}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if _plain_name(key) not in known or not isinstance(value, Tensor):
            raise UserError(f"{name} has tensors the model has not, such as {key}. It belongs to another model.")
        own = known[_plain_name(key)]
        if own in found and not torch.equal(found[own], value.to(found[own])):
            raise UserError(f"{name} has two values of {own}, the other as {key}. The model has one tensor there.")
        found.setdefault(own, value)
    return {k: v for k, v in found.items() if k in parameters}, {k: v for k, v in found.items() if k in buffers}


def _plain_name(key: str) -> str:
    """A tensor's name without what torch's wrappers of models add to it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _base(problem: Problem) -> dict[str, Tensor]:
    """Return the weights that the scope does not vary and no adapter does."""
    varied = {id(tensor) for tensor in (*problem.variables, *problem.scope.absorbed)}
    return {
        key: parameter.detach()
        for key, parameter in problem.model.named_parameters()
        if id(parameter) not in varied and not adapter_factor(key)
    }


def _check_checkpoint(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], wanted: list[str], name: str
) -> None:
    if missing := [key for key in wanted if key not in state]:
        raise UserError(
            f"{name} lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}. Expected the names of the "
            f"model's parameters; it has {', '.join(list(state)[:2]) or 'none'}, ..."
        )
    shapes = {key: parameter.shape for key, parameter in parameters.items()}
    for key, value in state.items():
        _check_shape(key, value.shape, shapes, name)
        if key not in wanted and not torch.equal(value.to(parameters[key]), parameters[key].detach()):
            raise _other_base(key, name)
    for key in wanted:
        if not bool(state[key].isfinite().all()):
            raise UserError(f"{key} of {name} is not finite. Its training diverged.")


def _check_shape(key: str, got: torch.Size, shapes: Mapping[str, torch.Size], name: str) -> None:
    expected = shapes[key]
    if got == expected:
        return
    axis = rank_axis(key, shapes)
    if axis is not None and len(got) == len(expected) and got[axis] != expected[axis]:
        raise UserError(
            f"{name} has rank {got[axis]} in {key}, the model rank {expected[axis]}: factors of different rank have no "
            "line between them. Compare them in scope=merged, from a model of each rank."
        )
    raise UserError(f"{key} is {tuple(got)} in {name} and {tuple(expected)} in the model. It belongs to another model.")


def _other_base(key: str, name: str) -> UserError:
    return UserError(
        f"{name} has another base: its {key} is not the model's. Adapters are comparable over the same frozen weights."
    )

"""The geometry of a task's update in a run: along it, of its matrices, and beside the updates of earlier tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatpatch.flatness import Problem
from flatpatch.flatness.points import plain
from flatpatch.flatness.updates import along_update, decompose, entropy_rank, principal_cosines, spaces, stable_rank
from flatpatch.measurement.suite import Say, ScopeResult, duration
from flatpatch.measuring import UPDATE

SIDES = {"left": "column", "right": "row"}
"""By what an array is called: the space that it is a basis of."""


def measure_update(
    problem: Problem,
    began: Tensor,
    result: ScopeResult,
    *,
    rho: float,
    earlier: Mapping[int, Path],
    say: Say = print,
) -> None:
    """Measure what a task's training has changed, and put it among a scope's results.

    Ranks and angles are of the matrices W + s B A, so of the scope "merged" alone.

    Args:
        problem: After the training.
        began: The scope's weights before it, ``(n,)``.
        result: Filled: values and arrays as :mod:`flatpatch.measurement.files` names them, and for each earlier task
            the cosines of the principal angles.
        rho: How far further along the update the loss is taken.
        earlier: By task, the file that holds the spaces of its update.
        say: Where it goes how long the matrices take, by what the first one took.
    """
    # Both in float32, as the weights before are kept: where nothing has moved the update is zero.
    now = problem.flatten(problem.variables, torch.float32)
    update = now.double() - began.to(now.device, torch.float64)
    along = along_update(problem, update, rho=rho)
    found: dict[str, Any] = {"rho": rho, **vars(along)}
    values = {name: getattr(along, name) for name in ("slope", "curvature", "sharpness")}
    if problem.scope.name == "merged":
        matrices = list(_matrices(problem, update))
        found |= {"entropy_ranks": [], "stable_ranks": []}
        bases: dict[str, Any] = {}
        work = [matrix.numel() * min(matrix.shape) for matrix in matrices]
        for k, matrix in enumerate(matrices):
            started = time.perf_counter()
            parts = decompose(matrix)
            found["entropy_ranks"].append(entropy_rank(parts.sigma))
            found["stable_ranks"].append(stable_rank(parts.sigma))
            for side, basis in zip(SIDES, spaces(parts), strict=True):
                bases[f"update_{side}_{k}"] = basis.cpu().numpy()
            if k == 0:
                seconds = time.perf_counter() - started
                say(
                    f"measuring the update, merged: singular values of {len(matrices)} matrices, about "
                    f"{duration(seconds * sum(work) / work[0])} (the first took {seconds:.2g} s)"
                )
        values |= {name: fmean(found[f"{name}s"]) for name in ("entropy_rank", "stable_rank")}
        result.arrays |= bases
        found["cosines"] = {
            str(task + 1): {
                space: [_cosines(bases[name], there[name]) for name in bases if f"_{side}_" in name]
                for side, space in SIDES.items()
            }
            for task, path in sorted(earlier.items())
            if (there := _spaces(path, len(matrices))) is not None
        }
        for space in SIDES.values():
            squares = [c**2 for own in found["cosines"].values() for cosines in own[space] for c in cosines]
            if squares:
                values[f"{space}_overlap"] = fmean(squares)
    result.results[UPDATE] = plain(found)
    result.values |= {f"update_{name}": value if math.isfinite(value) else None for name, value in values.items()}


def _matrices(problem: Problem, update: Tensor) -> Iterator[Tensor]:
    pieces = torch.split(update, problem.scope.sizes)
    for piece, variable in zip(pieces, problem.variables, strict=True):
        yield piece.reshape(variable.shape)


def _spaces(path: Path, count: int) -> Mapping[str, Any] | None:
    """Return the bases in a task's file; None where it has none, or those of other matrices."""
    with np.load(path, allow_pickle=False) as file:
        names = [f"update_{side}_{k}" for side in SIDES for k in range(count)]
        return {name: file[name] for name in names} if all(name in file for name in names) else None


def _cosines(one: Any, other: Any) -> list[float]:
    cosines: list[float] = principal_cosines(torch.from_numpy(one), torch.from_numpy(other)).tolist()
    return cosines

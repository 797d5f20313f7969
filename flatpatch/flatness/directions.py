r"""Directions in weight space, and how long each part of one is.

Filter normalisation (Li et al. 2018, arXiv:1712.09913, Sec. 4) gives each filter of a random direction the norm of
the same filter of the weights. What a filter is:

- of an ordinary matrix, a row: the weights of one output unit (of an embedding, one token's row);
- of a LoRA pair :math:`B A`, one rank index: a row of A and a *column* of B. Then a slice does not change under
  :math:`A \to c A, B \to B / c`, which leaves the function alone; with rows of B it would. (B's rows are its
  output units, but rescaling one rank index changes them all.)

A part of the weights that is zero gives a direction of zero. A new LoRA B is all zero, and then A has no effect
either: the slice is flat by construction, whatever the loss. Such parts are counted, and the normalisation
"merged_rows" measures B's direction by what it does to the merged matrix instead. B is here the factor next to the
output, whatever it is called: CL-LoRA names it A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatpatch.flatness.points import moving
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.scope import find_scope, partner_factor, rank_axis

NORMALISATIONS = ("filter", "layer", "merged_rows", "l2")


@dataclass(frozen=True)
class Direction:
    """A direction in weight space, and what it is.

    Attributes:
        vector: (n,), float64.
        label: A few words for an axis of a figure.
        normalisation: One of ``NORMALISATIONS``, or other words.
        seed: Of a random direction; else None.
        zero_units: Units (rows, columns) by variable whose weights are zero, so that the direction is zero there.
        skipped: Variables left alone because they have no filters: biases and the weights of norms.
    """

    vector: Tensor
    label: str
    normalisation: str
    seed: int | None = None
    zero_units: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def random_direction(problem: Problem, *, normalisation: str = "filter", seed: int = 0) -> Direction:
    """Draw a random direction and normalise it by the weights.

    Args:
        problem: Whose variables the direction moves; the weights are put back afterwards.
        normalisation: How long the direction is, at coordinate 1:

            - "filter": each filter as long as the weights' (see the module's text for what a filter is);
            - "layer": each variable as long as the weights';
            - "merged_rows": in the scope "adapter" alone. B's direction changes each row of ``s B A`` by the norm of
              that row of ``W + s B A``, as filter normalisation of the merged matrix would; A's, where it varies, is
              as in "filter". Not zero where B is. Several pairs of one matrix change it by that norm together;
            - "l2": the whole direction has norm 1, no variable is skipped; coordinates are in weight units.
        seed: Of the random numbers, which are standard normal.

    Returns:
        The direction; ``zero_units`` tells where it is zero because the weights are.

    Raises:
        ValueError: If the normalisation is unknown or does not fit the scope.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}")
    if normalisation == "merged_rows" and problem.scope.name != "adapter":
        raise ValueError(f"normalisation merged_rows is for scope adapter, not {problem.scope.name}; use filter")
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.randn(variable.shape, generator=generator, dtype=torch.float64).to(problem.device)
        for variable in problem.variables
    ]
    label = f"random direction, seed {seed}"
    if normalisation == "l2":
        vector = problem.flatten(draws, torch.float64)
        return Direction(vector / torch.linalg.vector_norm(vector), label, normalisation, seed)
    axes = unit_axes(problem)
    zero_units, skipped, by_rows = {}, [], {}
    for name, draw, variable in zip(problem.scope.names, draws, problem.variables, strict=True):
        axis = axes[name]
        if axis is None:
            draw.zero_()
            skipped.append(name)
        elif normalisation == "merged_rows" and axis == 1:
            by_rows[name] = draw
        elif zeros := filter_normalise_(draw, variable.detach(), None if normalisation == "layer" else axis):
            zero_units[name] = zeros
    zero_units |= _normalise_by_merged_rows_(problem, by_rows)
    return Direction(problem.flatten(draws, torch.float64), label, normalisation, seed, zero_units, tuple(skipped))


def given_direction(vector: Tensor, label: str) -> Direction:
    """Take a vector, such as an eigenvector, as a direction of norm 1; coordinates are in weight units.

    Raises:
        ValueError: If the vector is not one-dimensional, not finite, or zero.
    """
    vector = vector.detach().to(torch.float64)
    norm = torch.linalg.vector_norm(vector)
    if vector.ndim != 1 or not (torch.isfinite(norm) and norm > 0):
        raise ValueError(f"a direction must be a finite vector that is not zero; {label} is not")
    return Direction(vector / norm, label, "l2")


def filter_normalise_(direction: Tensor, weights: Tensor, axis: int | None = 0) -> int:
    """Give each unit of a direction the norm of the same unit of the weights, in place.

    Args:
        direction: Any shape, floating point.
        weights: The same shape.
        axis: The dimension that counts units; None for the whole tensor as one unit.

    Returns:
        How many units of the weights are zero, and so of the direction.
    """
    others = [k for k in range(direction.ndim) if k != axis] if axis is not None else list(range(direction.ndim))
    wanted = torch.linalg.vector_norm(weights.to(direction.dtype), dim=others, keepdim=True)
    present = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    # A unit drawn as exactly zero stays so; there is no small number added to hide it.
    direction.mul_(torch.where(present > 0, wanted / present, 0.0))
    return int((wanted == 0).sum())


def unit_axes(problem: Problem) -> dict[str, int | None]:
    """Return, by variable, the dimension that counts its units; None where there are none (one-dimensional)."""
    owners: dict[int, nn.Module] = {}
    for module in problem.model.modules():
        for parameter in module.parameters(recurse=False):
            # A tied weight is used as an output layer and as an embedding; both count units in dimension 0.
            owners.setdefault(id(parameter), module)
    shapes = {name: parameter.shape for name, parameter in problem.model.named_parameters()}
    axes: dict[str, int | None] = {}
    for name, variable in zip(problem.scope.names, problem.variables, strict=True):
        if variable.ndim < 2:
            axes[name] = None
        elif problem.scope.name == "merged":
            axes[name] = 0
        elif (axis := rank_axis(name, shapes)) is not None:
            axes[name] = axis
        else:
            axes[name] = _output_axis(owners.get(id(variable)))
    return axes


def _output_axis(owner: nn.Module | None) -> int:
    """Hugging Face's Conv1D and torch's transposed convolutions keep (in, out, ...)."""
    return 1 if type(owner).__name__ in ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d") else 0


def _normalise_by_merged_rows_(problem: Problem, directions: Mapping[str, Tensor]) -> dict[str, int]:
    """Scale the rows of B's directions so that each row of s dB A has the norm of that of W + s B A; count zeros."""
    if not directions:
        return {}
    parameters = dict(problem.model.named_parameters())
    # InfLoRA's code marks factors of later tasks as trainable too (task 1 of 20: those of 10 to 19). They are in no
    # matrix yet, so they must not share in its change.
    unused = problem.unused_variables()
    for name, direction in directions.items():
        partner = partner_factor(name)
        if partner not in parameters:
            raise ValueError(f"normalisation merged_rows found no factor A for {name}")
        rows = torch.linalg.vector_norm(parameters[partner].detach().double(), dim=1)
        # Weighing rank indices by their A alike keeps the direction's effect the same under A -> cA, B -> B/c.
        direction.mul_(torch.where(rows > 0, 1 / rows, 0.0) * (name not in unused))
    matrices, wanted = _merged_weights(problem)
    with moving(problem), torch.no_grad():
        # Without B, so that the effect of dB is not the small difference of two large matrices.
        for name in directions:
            parameters[name].zero_()
        _, without = _merged_weights(problem)
        for name, direction in directions.items():
            parameters[name].copy_(direction)
        _, changed = _merged_weights(problem)
    zero_units = {}
    for name, direction in directions.items():
        matrix = matrices.get(id(parameters[name]))
        if matrix is None:
            raise ValueError(f"normalisation merged_rows found no merged matrix for {name}")
        length = torch.linalg.vector_norm(wanted[matrix], dim=1)
        change = torch.linalg.vector_norm(changed[matrix] - without[matrix], dim=1)
        direction.mul_(torch.where(change > 0, length / change, 0.0)[:, None])
        if zeros := int((torch.linalg.vector_norm(direction, dim=1) == 0).sum()):
            zero_units[name] = zeros
    return zero_units


def _merged_weights(problem: Problem) -> tuple[dict[int, str], dict[str, Tensor]]:
    """Return the name of the matrix that each factor (by ``id``) is a part of, and the matrices by name."""
    scope = find_scope(problem.model, "merged")
    matrices = {id(factor): name for name, factors in scope.factors.items() for factor in factors}
    return matrices, {name: w.detach().double() for name, w in zip(scope.names, scope.variables, strict=True)}

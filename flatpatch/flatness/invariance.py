r"""How much a measure changes when LoRA's factors are written differently and the model stays the same function.

:math:`A \to A / c, B \to c B` and :math:`A \to Q A, B \to B Q^T` with a rotation Q of the rank indices leave
:math:`B A` as it is. A measure of the function, or of its minimum, must not change; what changes is a measure of how
the factors happen to be written (Dinh et al. 2017, arXiv:1703.04933, for the rescaling of layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness.points import plain
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.scope import adapter_factor, partner_factor, rank_axis, unwrapped

SCALES = (0.25, 0.5, 2.0, 4.0)
ROTATIONS = 2
TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-4, torch.float32: 1e-2}
"""The largest relative change that passes, by the number format that is computed in."""

Measure = Callable[[Problem], float]


@dataclass(frozen=True)
class Invariance:
    """Quantities at several ways to write the factors of one function.

    Attributes:
        scope: Which weights vary.
        values: By way of writing, "c = 1" (as it is) first, and quantity.
        losses: By way of writing; the same but for rounding.
        changes: By quantity, the largest relative change of its value at c = 1: 0 where both are 0, infinite where
            only that one is, or a value is not finite.
        tolerance: Largest change that passes, by the number format: 1e-4 in float64, 1e-2 in float32.
        pairs: LoRA pairs that were written differently.
    """

    scope: str
    values: Mapping[str, Mapping[str, float]]
    losses: Mapping[str, float]
    changes: Mapping[str, float]
    tolerance: float
    pairs: int

    @property
    def change(self) -> float:
        """The largest of the changes."""
        return max(self.changes.values())

    @property
    def is_invariant(self) -> bool:
        """Whether no quantity changes by more than the tolerance."""
        return self.change <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        as_plain: dict[str, Any] = plain({**asdict(self), "is_invariant": self.is_invariant})
        return as_plain


def certify(
    problem: Problem, measures: Mapping[str, Measure], *, progress: Callable[[int, int, str], None] | None = None
) -> Invariance:
    """Measure quantities at A / c and c B for c = 1/4, 1/2, 1, 2, 4 and with the rank indices rotated twice at random.

    Args:
        problem: The loss, in any scope; not inside ``problem.active()``. Its model's factors are written differently in
            place and put back, bit for bit.
        measures: The quantities by name, each a function of a problem.
        progress: Called after each way of writing.

    Returns:
        The values and how much they change.

    Raises:
        UserError: If the model has no LoRA pairs, or its loss changes, so that it is no function of the products B A.
    """
    ways: dict[str, tuple[float, int | None]] = {"c = 1": (1.0, None)}
    ways |= {f"c = {c:g}": (c, None) for c in SCALES}
    ways |= {f"rotation {k + 1}": (1.0, k) for k in range(ROTATIONS)}
    pairs = lora_pairs(problem.model)
    tolerance = TOLERANCES[problem.dtype]
    values: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}
    for name, (scale, rotation) in ways.items():
        with written(pairs, scale=scale, rotation=rotation):
            # Anew: what is merged holds the product, and a tangent space the factors' directions.
            rewritten = problem.with_scope(problem.scope.name)
            losses[name] = rewritten.loss()
            _check_loss(name, losses[name], losses["c = 1"], tolerance)
            values[name] = {key: measure(rewritten) for key, measure in measures.items()}
        if progress:
            progress(len(values), len(ways), name)
    own = values["c = 1"]
    changes = {key: max(_change(own[key], found[key]) for found in values.values()) for key in measures}
    return Invariance(problem.scope.name, values, losses, changes, tolerance, len(pairs))


def lora_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return a model's LoRA pairs, frozen or not: (out, r) up from the rank, and (r, in) down to it.

    Raises:
        UserError: If it has none.
    """
    parameters = dict(unwrapped(model).named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    pairs = [
        (parameters[partner_factor(name)], parameter)
        for name, parameter in parameters.items()
        if adapter_factor(name) and parameter.ndim == 2 and rank_axis(name, shapes) == 0
        # A factor without a partner has nothing to be written against.
        if shapes.get(partner_factor(name), torch.Size())[1:] == parameter.shape[:1]
    ]
    if not pairs:
        raise UserError(
            f"there is no LoRA pair to write differently: of the model's {len(parameters)} tensors none is a factor "
            "with a partner of the same rank. Leave out measure=invariance."
        )
    return pairs


@contextmanager
def written(
    pairs: list[tuple[nn.Parameter, nn.Parameter]], *, scale: float = 1.0, rotation: int | None = None
) -> Iterator[None]:
    """Write pairs differently until the block is left: c B Q' and Q A / c.

    Args:
        pairs: (out, r) and (r, in).
        scale: c.
        rotation: Seed of a random rotation for each pair; None for none.
    """
    saved = [(up.detach().clone(), down.detach().clone()) for up, down in pairs]
    generator = torch.Generator().manual_seed(rotation or 0)
    try:
        with torch.no_grad():
            for up, down in pairs:
                up.mul_(scale)
                down.div_(scale)
                if rotation is not None:
                    draw = torch.randn(len(down), len(down), generator=generator, dtype=torch.float64)
                    Q = torch.linalg.qr(draw).Q.to(down.device)
                    up.copy_(up.double() @ Q.T)
                    down.copy_(Q @ down.double())
        yield
    finally:
        with torch.no_grad():
            for (up, down), (B, A) in zip(pairs, saved, strict=True):
                up.copy_(B)
                down.copy_(A)


def _check_loss(name: str, loss: float, before: float, tolerance: float) -> None:
    if not abs(loss - before) <= tolerance * max(abs(before), 1e-3):
        raise UserError(
            f"the loss is {before:.9g}, and {loss:.9g} with the factors written differently ({name}): the model is no "
            "function of the products B A, so that nothing can be said of how they are written. Leave out "
            "measure=invariance."
        )


def _change(before: float, now: float) -> float:
    if before == now:
        return 0.0
    change = abs(now / before - 1) if before else math.inf
    return change if math.isfinite(change) else math.inf

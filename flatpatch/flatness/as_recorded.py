r"""Three measurements as the experiment record's code makes them, faults included, to stand beside the correct ones.

They are written anew from a description of that code, and answer one question: does a conclusion drawn from them hold
when it is measured correctly? Nothing here measures flatness, and nobody should use it for anything else. What is
wrong:

- :func:`recorded_eigenvalues`, block Lanczos. Row j of a block is made orthogonal to the rows up to j alone, not to
  the rest of its own block, and nothing is orthogonalised again; so the basis Q is none (``overlap``, the largest
  entry of ``|Q Q' - I|``, is near 1), the same large eigenvalue is found several times, and values come out beyond
  the largest eigenvalue. The block below the diagonal of T holds R' where R belongs. The loss is the cross-entropy
  averaged over all positions of the labels, of which the ignored ones (padding) count as zeros: more padding looks
  flatter. So a few large eigenvalues far from the rest can be the method's own. Correct:
  :func:`flatpatch.flatness.lanczos`, and by batch :func:`flatpatch.flatness.batch_eigenvalues`.
- :func:`recorded_landscape`. Each direction is as long as the weights *tensor by tensor*. A tensor that is zero does
  not move: of a new LoRA pair B is zero, and A has no effect without it, so the picture before training is flat by
  construction; and with the rank the scale changes. Correct: :func:`flatpatch.flatness.random_direction`.
- :func:`recorded_keskar`. Random vectors are added one after the other and never taken away, and the highest loss on
  the way is kept: a random walk. It maximises nothing, and leaves the box that Keskar et al. maximise over; so it is
  no bound of the maximum in either direction. Correct: :func:`flatpatch.flatness.keskar_sharpness`.

What the description does not say is ours: random numbers, the vectors of the walk (uniform in Keskar's box of size
1e-3), that T is completed to a symmetric matrix from its lower half, and that a landscape's loss is the package's own.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatpatch.flatness.basis import Basis, Progress, random_vectors
from flatpatch.flatness.directions import Direction, filter_normalise_
from flatpatch.flatness.landscape import Landscape, landscape
from flatpatch.flatness.operator import HessianOperator, LinearOperator
from flatpatch.flatness.points import Objective, moving
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.terms import find_labels


@dataclass(frozen=True)
class RecordedEigenvalues:
    """What block Lanczos as recorded gives, pooled over batches: not the Hessian's eigenvalues.

    Attributes:
        values: The largest of each batch's T, decreasing, for the recorded loss.
        shares: Of each batch, by what the recorded loss differs from the mean over the labels that are not ignored.
        overlap: Largest entry of |Q Q' - I| over the batches; 0 for a sound basis.
        steps: Blocks of Q.
        block_size: Rows of a block.
    """

    values: Tensor  # (batches, top), float64
    shares: list[float]
    overlap: float
    steps: int
    block_size: int

    @property
    def mean(self) -> float:
        """Of the pool."""
        return float(self.values.mean())

    @property
    def median(self) -> float:
        """Of the pool."""
        return float(statistics.median(self.values.flatten().tolist()))

    @property
    def largest(self) -> float:
        """Of the pool."""
        return float(self.values.max())

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return {**vars(self), "values": self.values.tolist()}


@dataclass(frozen=True)
class RecordedKeskar:
    """The highest loss on a random walk: no maximum, and not in Keskar's box.

    Attributes:
        value: 100 (highest - loss) / (1 + loss), as Keskar et al. scale their maximum.
        highest: The highest loss on the way, the start included.
        loss: At the weights.
        step: After how many vectors it was found; 0 where nothing rose.
        reach: How far the place lies from the weights, where 1 is the box's wall: the largest over the coordinates.
        last_reach: The same for the walk's end.
        vectors: How many were added.
        epsilon: The box's relative size.
        seed: Of the vectors.
        non_finite: Losses that were infinite or NaN, which are never the highest.
    """

    value: float
    highest: float
    loss: float
    step: int
    reach: float
    last_reach: float
    vectors: int
    epsilon: float
    seed: int
    non_finite: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        return asdict(self)


def recorded_eigenvalues(
    problem: Problem,
    *,
    steps: int = 10,
    block_size: int = 4,
    top: int = 4,
    max_batches: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> RecordedEigenvalues:
    """Run block Lanczos as recorded on each of the first batches' own Hessian.

    Args:
        problem: The loss; a batch's is multiplied by the share of its labels that count.
        steps: Blocks of the basis.
        block_size: Rows of a block; no more than there are variables.
        top: How many of each batch's values are kept.
        max_batches: No more batches than these.
        seed: Of the first block of the first batch; the next batch has the next one.
        progress: Called after each batch.
    """
    count = min(max_batches, len(problem.batches))
    found, shares, overlaps = [], [], []
    for index in range(count):
        batch = problem.subset([index])
        operator = HessianOperator(batch, compile=False)
        values, overlap = recorded_block_lanczos(operator, steps=steps, block_size=block_size, seed=seed + index)
        shares.append(float(problem.num_terms[index]) / find_labels(problem.batches[index]).numel())
        found.append(shares[-1] * values[:top])
        overlaps.append(overlap)
        if progress:
            progress(index + 1, count, f"batch {index + 1} of {count}: {float(found[-1][0]):.4g}")
    return RecordedEigenvalues(torch.stack(found), shares, max(overlaps), steps, min(block_size, problem.size))


def recorded_block_lanczos(
    operator: LinearOperator, *, steps: int = 10, block_size: int = 4, seed: int = 0
) -> tuple[Tensor, float]:
    """Run block Lanczos with the two faults of the record's: see the module's text.

    Args:
        operator: A symmetric operator.
        steps: Blocks of the basis.
        block_size: Rows of a block; no more than there are variables.
        seed: Of the first block.

    Returns:
        All values of T, decreasing; and max |Q Q' - I|, Q in the operator's precision.
    """
    p = min(block_size, operator.size)
    start = random_vectors(operator.size, list(range(p)), seed=seed, device=operator.device)
    rows = torch.linalg.qr(start).Q.T  # (p, n), of the present block
    basis = Basis(operator.size, operator.dtype, operator.device, steps * p)  # for its overlap alone
    basis.append(rows.T)
    T = torch.zeros(steps * p, steps * p, dtype=torch.float64)
    previous, R = torch.zeros_like(rows), torch.zeros(p, p, dtype=torch.float64, device=rows.device)
    for step in range(steps):
        own = slice(step * p, (step + 1) * p)
        W = operator.matmat(rows.T).T - R @ previous
        for j in range(p):
            for k in range(j + 1):  # the rows after j are left in
                entry = float(rows[k] @ W[j])
                W[j].sub_(rows[k], alpha=entry)
                T[step * p + j, step * p + k] = entry
        if step + 1 == steps:
            break
        previous = rows
        Q, R = torch.linalg.qr(W.T)
        rows = Q.T
        basis.append(Q)
        T[slice(own.stop, own.stop + p), own] = R.T.cpu()  # R belongs here
    overlap = (basis.gram() - torch.eye(basis.count, dtype=torch.float64, device=rows.device)).abs().max()
    return torch.linalg.eigvalsh(T, UPLO="L").flip(0), float(overlap)


def recorded_landscape(
    problem: Problem,
    *,
    points: int = 20,
    max_batches: int = 5,
    seed: int = 42,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate the loss of the first batches on a plane of two random directions, from -1 to 1, as recorded.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        points: Grid points a side.
        max_batches: No more batches than these.
        seed: Of the directions.
        progress: Called after each point.

    Raises:
        ValueError: If all tensors are zero, so that nothing moves.
    """
    few = problem.subset(range(min(max_batches, len(problem.batches))))
    axis = np.linspace(-1, 1, points)
    return landscape(few, recorded_directions(few, seed=seed), [axis, axis], progress=progress)


def recorded_directions(problem: Problem, *, seed: int = 42) -> list[Direction]:
    """Draw two random directions, orthogonal and as long as the weights tensor by tensor.

    Args:
        problem: Whose variables they move.
        seed: Of the random numbers, which are standard normal.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        [torch.randn(variable.shape, generator=generator, dtype=torch.float64) for variable in problem.variables]
        for _ in range(2)
    )
    zeros: dict[str, int] = {}
    for name, variable, one, other in zip(problem.scope.names, problem.variables, first, second, strict=True):
        other -= float((one * other).sum() / (one * one).sum()) * one
        weights = variable.detach().cpu()
        if filter_normalise_(one, weights, None) + filter_normalise_(other, weights, None):
            zeros[name] = 1
    return [
        Direction(problem.flatten(draws, torch.float64), f"as recorded: direction {k}", "as recorded", seed, zeros)
        for k, draws in enumerate((first, second), start=1)
    ]


def recorded_keskar(
    problem: Problem | Objective,
    *,
    vectors: int = 100,
    epsilon: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> RecordedKeskar:
    """Take the highest loss on a random walk, as recorded.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        vectors: How many are added.
        epsilon: Each is uniform in Keskar's box, where coordinate i reaches ``epsilon (|w_i| + 1)``.
        seed: Of the vectors.
        progress: Called after each.
    """
    generator = torch.Generator().manual_seed(seed)
    with moving(problem) as objective:
        origin = objective.origin.double()
        walls = epsilon * (origin.abs() + 1)
        loss = objective.loss(objective.origin)
        moved = torch.zeros_like(origin)
        highest, step, reach, non_finite = loss, 0, 0.0, 0
        for k in range(1, vectors + 1):
            draw = torch.rand(len(origin), generator=generator, dtype=torch.float64)
            moved = moved + walls * (2 * draw - 1).to(walls.device)
            found = objective.loss(origin + moved)
            non_finite += not np.isfinite(found)
            if np.isfinite(found) and found > highest:
                highest, step, reach = found, k, float((moved.abs() / walls).max())
            if progress:
                progress(k, vectors, f"loss {found:.4g}")
        last_reach = float((moved.abs() / walls).max())
    value = 100 * (highest - loss) / (1 + loss)
    return RecordedKeskar(value, highest, loss, step, reach, last_reach, vectors, epsilon, seed, non_finite)

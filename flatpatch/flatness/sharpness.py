r"""How far the loss can rise in a small neighbourhood of the weights.

With the loss :math:`f`, the weights :math:`x` and a neighbourhood :math:`N`, all of it is
:math:`\max_{e \in N} f(x + e) - f(x)`:

- Keskar et al. 2017 (arXiv:1609.04836, Metric 2.1): :math:`e = A y` with
  :math:`|y_i| \le \epsilon (|(A^+ x)_i| + 1)`, times :math:`100 / (1 + f(x))`;
- SAM (Foret et al. 2021, arXiv:2010.01412): :math:`\lVert e \rVert_2 \le \rho`;
- ASAM (Kwon et al. 2021, arXiv:2102.11600): :math:`\lVert T^{-1} e \rVert_2 \le \rho` with
  :math:`T = |x| + \eta`, element by element.

A maximum that was searched for is a lower bound of the true one. The papers' own searches are weak near a minimum
(ten L-BFGS-B iterations, one step along the gradient), so a stronger bound stands beside each: ascent inside the
neighbourhood from several starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from flatpatch.flatness.basis import Progress
from flatpatch.flatness.points import Objective, moving, plain
from flatpatch.flatness.problem import Problem

_PAPER_ITERATIONS = 10
_HALVINGS = 6


@dataclass(frozen=True)
class KeskarSharpness:
    """Sharpness by Keskar et al., and a stronger lower bound of the same maximum.

    Attributes:
        phi: By the paper's protocol: the best point of ten L-BFGS-B iterations from y = 0.
        phi_sign_step: Of the one step to the corner of the box that the gradient points to.
        phi_lower_bound: The best point seen by any search: L-BFGS-B, the sign step and ascent from several starts.
        rise: The loss rise behind ``phi_lower_bound``, in units of the loss.
        loss: f(x).
        epsilon: The box's relative size.
        dimensions: p, the number of columns of A; n in the full space.
        manifold: How A was drawn, in words; the paper does not fix its law.
        column_norm: Mean norm of A's columns; 1 in the full space.
        seed: Of A and the random starts.
        iterations: L-BFGS-B iterations done.
        message: Why L-BFGS-B stopped.
        paper_evaluations: Losses with gradient that L-BFGS-B asked for.
        evaluations: Losses with gradient in all.
        non_finite: How many of them were infinite or NaN; such points never count as the maximum.
        rounding: Relative error of the best displacement after rounding the weights to their number format.
    """

    phi: float
    phi_sign_step: float
    phi_lower_bound: float
    rise: float
    loss: float
    epsilon: float
    dimensions: int
    manifold: str
    column_norm: float
    seed: int
    iterations: int
    message: str
    paper_evaluations: int
    evaluations: int
    non_finite: int
    rounding: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        as_plain: dict[str, Any] = plain(asdict(self))
        return as_plain


@dataclass(frozen=True)
class BallSharpness:
    """The loss rise in a ball around the weights.

    Attributes:
        one_step: Rise at SAM's (ASAM's) one ascent step; may be negative. 0 where the gradient is zero.
        ascent: The highest rise seen by projected ascent from several starts, the one step included.
        best_start: Where the search that found it began: "gradient", "direction 1 +", "random 1", or "weights" if
            nothing rose.
        loss: f(x).
        grad_norm: L2 norm of the gradient at x.
        rho: Radius: in weight units for SAM, relative to |x| + eta for ASAM.
        eta: ASAM's eta; None for SAM.
        norm: Of the best displacement, L2, after rounding.
        rounding: Relative error of that displacement after rounding the weights to their number format.
        evaluations: Losses with gradient.
        non_finite: How many of them were infinite or NaN; such points never count as the maximum.
        seed: Of the random starts.
    """

    one_step: float
    ascent: float
    best_start: str
    loss: float
    grad_norm: float
    rho: float
    eta: float | None
    norm: float
    rounding: float
    evaluations: int
    non_finite: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        as_plain: dict[str, Any] = plain(asdict(self))
        return as_plain


@dataclass(frozen=True)
class MSharpness:
    """SAM-ball sharpness per batch of m examples, averaged (Foret et al. 2021, Sec. 4.2).

    Attributes:
        one_step: Weighted mean over batches of each batch's own rise at its own ascent step.
        ascent: The same for each batch's projected ascent.
        m: Examples in a batch.
        batches: Each batch's result.
    """

    one_step: float
    ascent: float
    m: int
    batches: tuple[BallSharpness, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for a file."""
        as_plain: dict[str, Any] = plain(asdict(self))
        return as_plain


def keskar_sharpness(
    problem: Problem | Objective,
    *,
    epsilon: float = 1e-3,
    dimensions: int | None = None,
    ascent_steps: int = 10,
    random_starts: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> KeskarSharpness:
    """Measure sharpness as Keskar et al. 2017 define it (arXiv:1609.04836, Metric 2.1).

    The "+ 1" makes the box absolute for small weights, so the value changes under A -> cA, B -> B/c of a LoRA pair.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        epsilon: The box's relative size; the paper uses 1e-3 and 5e-4.
        dimensions: None for the full space (A = I); else the number p of random directions, 100 in the paper. A's
            entries are independent standard normal numbers; A takes 8 n p bytes, for a moment twice that.
        ascent_steps: Steps of each of the further searches.
        random_starts: How many corners of the box, drawn at random, to search from besides.
        seed: Of A and the random starts.
        progress: Called after each evaluation, with about how many there will be.

    Returns:
        The paper's value, the stronger bound and how they were found.

    Raises:
        ValueError: If an argument is out of range, the loss or gradient at the weights is not finite, or
            1 + loss is not positive.
    """
    _check_positive("epsilon", epsilon)
    with moving(problem) as objective:
        planned = 1 + _PAPER_ITERATIONS + (1 + random_starts) * (1 + ascent_steps)
        search = _Search(objective, planned, progress)
        if 1 + search.start_loss <= 0:
            raise ValueError(f"sharpness divides by 1 + loss, which must be positive; the loss is {search.start_loss}")
        generator = torch.Generator().manual_seed(seed)
        box = _make_box(search.origin, epsilon, dimensions, generator)
        iterations, message = _paper_search(search, box)
        paper_rise, paper_evaluations = search.best_rise, search.evaluations - 1
        sign_step = search.climb(box, [("gradient", None)], ascent_steps)
        starts = [(f"random {k + 1}", box.random(generator)) for k in range(random_starts)]
        search.climb(box, starts, ascent_steps)
    factor = 100 / (1 + search.start_loss)
    return KeskarSharpness(
        phi=factor * paper_rise,
        phi_sign_step=factor * sign_step,
        phi_lower_bound=factor * search.best_rise,
        rise=search.best_rise,
        loss=search.start_loss,
        epsilon=epsilon,
        dimensions=box.dimensions,
        manifold="full space" if box.basis is None else f"{box.dimensions} standard normal columns",
        column_norm=1.0 if box.basis is None else float(torch.linalg.vector_norm(box.basis, dim=0).mean()),
        seed=seed,
        iterations=iterations,
        message=message,
        paper_evaluations=paper_evaluations,
        evaluations=search.evaluations,
        non_finite=search.non_finite,
        rounding=search.rounding,
    )


def ball_sharpness(
    problem: Problem | Objective,
    rho: float,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    ascent_steps: int = 20,
    directions: Sequence[Tensor] = (),
    random_starts: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> BallSharpness:
    """Measure how far the loss rises in SAM's ball, by one ascent step and by projected ascent.

    On a quadratic at its minimum the maximum is ``rho^2 / 2`` times the largest eigenvalue, while the one step is
    undefined there (zero gradient) and may point anywhere nearby; hence the ascent, and the directions.

    Args:
        problem: The loss; the weights are put back afterwards, bit for bit.
        rho: Radius: in weight units, or relative to ``|x| + eta`` if adaptive.
        adaptive: ASAM's ball instead of SAM's.
        eta: ASAM's addition to |x|. With 0 the value does not change under A -> cA, B -> B/c.
        ascent_steps: Steps of each search.
        directions: Vectors (n,) to start from as well, both ways, such as the top eigenvectors.
        random_starts: How many random directions to start from, one way each.
        seed: Of the random starts.
        progress: Called after each evaluation, with about how many there will be.

    Returns:
        Both values and how they were found.

    Raises:
        ValueError: If an argument is out of range, or the loss or gradient at the weights is not finite.
    """
    _check_positive("rho", rho)
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and not negative, got {eta!r}")
    with moving(problem) as objective:
        planned = 1 + (1 + 2 * len(directions) + random_starts) * (1 + ascent_steps)
        search = _Search(objective, planned, progress)
        scale = search.origin.abs() + eta if adaptive else torch.ones_like(search.origin)
        ball = _Neighbourhood("ball", rho * scale)
        one_step = search.climb(ball, [("gradient", None)], ascent_steps)
        generator = torch.Generator().manual_seed(seed)
        starts: list[tuple[str, Tensor | None]] = []
        for k, direction in enumerate(directions):
            if direction.shape != search.origin.shape:
                raise ValueError(
                    f"direction {k + 1} has shape {tuple(direction.shape)}, the weights {tuple(search.origin.shape)}"
                )
            # As a gradient would be pulled: its step is the ascent step along it.
            u = ball.corner(torch.zeros_like(scale), ball.pull(direction.to(search.origin)))
            starts += [(f"direction {k + 1} +", u), (f"direction {k + 1} -", -u)]
        starts += [(f"random {k + 1}", ball.random(generator)) for k in range(random_starts)]
        search.climb(ball, starts, ascent_steps)
    return BallSharpness(
        one_step=one_step,
        ascent=search.best_rise,
        best_start=search.best_start,
        loss=search.start_loss,
        grad_norm=float(torch.linalg.vector_norm(search.start_gradient)),
        rho=rho,
        eta=eta if adaptive else None,
        norm=search.norm,
        rounding=search.rounding,
        evaluations=search.evaluations,
        non_finite=search.non_finite,
        seed=seed,
    )


def m_sharpness(
    batches: Problem | Sequence[Problem | Objective],
    rho: float,
    *,
    m: int,
    weights: Sequence[float] | None = None,
    adaptive: bool = False,
    eta: float = 0.01,
    ascent_steps: int = 0,
    random_starts: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> MSharpness:
    """Measure SAM-ball sharpness per batch of m examples and average it.

    Each batch climbs its own loss, so the average is at least the sharpness of the whole (same search, exact maxima)
    and grows as m falls.

    Args:
        batches: A problem, each batch of which is measured by itself and weighted by its loss terms; or the loss
            of each batch, at the same weights.
        rho: Radius, as in ``ball_sharpness``.
        m: Examples in a batch; recorded with the result.
        weights: One per batch; default: a problem's loss terms, else equal.
        adaptive: ASAM's ball instead of SAM's.
        eta: ASAM's addition to |x|.
        ascent_steps: Steps of projected ascent per batch; 0 leaves the one step alone, as the paper does.
        random_starts: Random directions per batch to search from besides.
        seed: Of the random starts.
        progress: Called after each batch.

    Returns:
        The weighted means and each batch's own result.

    Raises:
        ValueError: If there is no batch, or the weights do not fit, besides what ``ball_sharpness`` raises.
    """
    if isinstance(batches, Problem):
        weights = weights or batches.num_terms
        batches = [batches.subset([k]) for k in range(len(batches.batches))]
    if not batches:
        raise ValueError("m-sharpness needs at least one batch")
    shares = np.asarray([1.0] * len(batches) if weights is None else weights, dtype=np.float64)
    if shares.shape != (len(batches),) or not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"weights must be {len(batches)} numbers >= 0, not all zero; got {weights!r}")
    results: list[BallSharpness] = []
    for batch in batches:
        options: dict[str, Any] = {"adaptive": adaptive, "eta": eta, "random_starts": random_starts, "seed": seed}
        results.append(ball_sharpness(batch, rho, ascent_steps=ascent_steps, **options))
        if progress:
            progress(len(results), len(batches), f"rise {results[-1].ascent:.4g}")
    shares /= shares.sum()
    return MSharpness(
        one_step=float(shares @ [result.one_step for result in results]),
        ascent=float(shares @ [result.ascent for result in results]),
        m=m,
        batches=tuple(results),
    )


class _Neighbourhood:
    """A box or ball in unit variables u (|u_i| <= 1, or |u|_2 <= 1), with e = A (h * u)."""

    def __init__(self, shape: str, half_widths: Tensor, basis: Tensor | None = None) -> None:
        self.shape = shape
        self.half_widths = half_widths  # (p,)
        self.basis = basis  # (n, p) or None for the identity

    @property
    def dimensions(self) -> int:
        return len(self.half_widths)

    def lift(self, u: Tensor) -> Tensor:
        """From unit variables (p,) to a displacement of the weights (n,)."""
        scaled = self.half_widths * u
        return scaled if self.basis is None else self.basis @ scaled

    def pull(self, gradient: Tensor) -> Tensor:
        """From a gradient in the weights (n,) to the one in unit variables (p,)."""
        return self.half_widths * (gradient if self.basis is None else self.basis.T @ gradient)

    def corner(self, u: Tensor, slope: Tensor) -> Tensor:
        """Return the point of the neighbourhood farthest along a slope; u where the slope says nothing."""
        if self.shape == "box":
            return torch.where(slope == 0, u, slope.sign())
        largest = slope.abs().max()
        if largest == 0:
            return u
        # Dividing twice keeps the squares of the norm from under- and overflowing.
        slope = slope / largest
        farthest: Tensor = slope / torch.linalg.vector_norm(slope)
        return farthest

    def step(self, u: Tensor, slope: Tensor, size: float) -> Tensor:
        """Return u moved along a slope, by a size relative to the neighbourhood's, and projected back."""
        slope = slope / slope.abs().max()
        if self.shape == "box":
            return (u + size * slope).clamp(-1, 1)
        moved = u + size * slope / torch.linalg.vector_norm(slope)
        projected: Tensor = moved / torch.linalg.vector_norm(moved).clamp(min=1)
        return projected

    def random(self, generator: torch.Generator) -> Tensor:
        """Draw a corner of the box, or a point of the sphere."""
        draw = torch.randn(self.dimensions, generator=generator, dtype=torch.float64).to(self.half_widths.device)
        return self.corner(torch.zeros_like(draw), draw)


class _Search:
    """Evaluates points, counts, and keeps the best one seen. Displacements are float64."""

    def __init__(self, objective: Objective, planned: int, progress: Progress | None) -> None:
        self.objective = objective
        self.planned, self.progress = planned, progress
        self.weights = objective.origin
        self.origin = self.weights.to(torch.float64)
        if self.origin.ndim != 1 or not len(self.origin):
            raise ValueError(f"the weights must be one vector, not empty; got shape {tuple(self.origin.shape)}")
        self.evaluations = 1
        self.non_finite = 0
        self.start_loss, gradient = objective.loss_and_gradient(self.weights)
        self.start_gradient = gradient.to(torch.float64)
        if not (math.isfinite(self.start_loss) and bool(self.start_gradient.isfinite().all())):
            raise ValueError(f"the loss at the weights is {self.start_loss}, or its gradient is not finite")
        self.best_rise = 0.0
        self.best_start = "weights"
        self.norm = self.rounding = 0.0

    def evaluate(self, neighbourhood: _Neighbourhood, u: Tensor, start: str) -> tuple[float, Tensor]:
        """Return the rise at a point and its gradient in unit variables."""
        intended = neighbourhood.lift(u)
        point = (self.origin + intended).to(self.weights.dtype)
        if neighbourhood.shape == "box" and neighbourhood.basis is None:
            # Rounding may have left the box; the neighbouring number towards the centre is inside it.
            outside = (point.to(torch.float64) - self.origin).abs() > neighbourhood.half_widths
            point = torch.where(outside, torch.nextafter(point, self.weights), point)
        self.evaluations += 1
        loss, gradient = self.objective.loss_and_gradient(point)
        rise = loss - self.start_loss
        if not math.isfinite(rise):
            self.non_finite += 1
        elif rise > self.best_rise:
            self.best_rise, self.best_start = rise, start
            moved = point.to(torch.float64) - self.origin
            self.norm = float(torch.linalg.vector_norm(moved))
            size = float(torch.linalg.vector_norm(intended))
            self.rounding = float(torch.linalg.vector_norm(moved - intended)) / size if size else 0.0
        if self.progress:
            # A step that has to be shortened takes more evaluations than one, so the plan may be overrun.
            self.progress(min(self.evaluations, self.planned), self.planned, f"rise {self.best_rise:.4g}")
        return rise, neighbourhood.pull(gradient.to(torch.float64))

    def climb(self, neighbourhood: _Neighbourhood, starts: Sequence[tuple[str, Tensor | None]], steps: int) -> float:
        """Ascend from each start (None: from the weights, by the ascent step); return the first one's first rise.

        A step goes to the farthest point along the slope, which on a convex loss always rises; where it does not,
        to ever nearer ones. It is taken only if the loss rises.
        """
        first = 0.0
        for k, (name, start) in enumerate(starts):
            if start is None:
                slope = neighbourhood.pull(self.start_gradient)
                if not bool(slope.any()):
                    continue
                start = neighbourhood.corner(torch.zeros_like(slope), slope)
            u = start
            rise, slope = self.evaluate(neighbourhood, u, name)
            first = rise if k == 0 else first
            for _ in range(steps):
                climbed = self._climb_once(neighbourhood, u, rise, slope, name)
                if climbed is None:
                    break
                u, rise, slope = climbed
        return first

    def _climb_once(
        self, neighbourhood: _Neighbourhood, u: Tensor, rise: float, slope: Tensor, name: str
    ) -> tuple[Tensor, float, Tensor] | None:
        if not (math.isfinite(rise) and bool(slope.isfinite().all()) and bool(slope.any())):
            return None
        for halvings in range(-1, _HALVINGS):
            moved = neighbourhood.corner(u, slope) if halvings < 0 else neighbourhood.step(u, slope, 0.5**halvings)
            if torch.equal(moved, u):
                return None
            new_rise, new_slope = self.evaluate(neighbourhood, moved, name)
            if new_rise > rise:
                return moved, new_rise, new_slope
        return None


def _make_box(origin: Tensor, epsilon: float, dimensions: int | None, generator: torch.Generator) -> _Neighbourhood:
    """Return the paper's box in the full space, or on a random manifold."""
    if dimensions is None:
        return _Neighbourhood("box", epsilon * (origin.abs() + 1))
    if not 1 <= dimensions <= len(origin):
        raise ValueError(f"dimensions must be 1 to {len(origin)}, the number of weights; got {dimensions}")
    draw = torch.randn(len(origin), dimensions, generator=generator, dtype=torch.float64)
    basis = draw.to(origin.device)
    coordinates = torch.linalg.lstsq(basis, origin[:, None]).solution[:, 0]
    return _Neighbourhood("box", epsilon * (coordinates.abs() + 1), basis)


class _NotFinite(Exception):
    """L-BFGS-B cannot use the value it asked for."""


def _paper_search(search: _Search, box: _Neighbourhood) -> tuple[int, str]:
    """Run ten iterations of L-BFGS-B in y itself; return the iterations done and why it stopped."""
    half_widths = box.half_widths.cpu().numpy()
    device = box.half_widths.device
    iterations = 0

    def count(_: NDArray[np.float64]) -> None:
        nonlocal iterations
        iterations += 1

    def negative(y: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        u = torch.from_numpy(y / half_widths).to(device)
        rise, slope = search.evaluate(box, u, "L-BFGS-B")
        if not math.isfinite(rise) or not bool(slope.isfinite().all()):
            raise _NotFinite
        return -rise, -(slope.cpu().numpy() / half_widths)

    try:
        outcome = minimize(
            negative,
            np.zeros_like(half_widths),
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([-half_widths, half_widths], axis=1),
            callback=count,
            # Tolerances of zero: the default one stops at once where gradients are small, and reports no rise.
            options={"maxiter": _PAPER_ITERATIONS, "gtol": 0.0, "ftol": 0.0},
        )
    except _NotFinite:
        return iterations, "the loss was not finite at a point of the line search"
    return iterations, str(outcome.message)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")

"""Measure one model on one sample: every kind over every scope, with an estimate of the time beforehand."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    Eigenpairs,
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    Landscape,
    LinearOperator,
    Loss,
    Problem,
    ball_sharpness,
    batch_eigenvalues,
    block_curvature,
    certify,
    factor_blocks,
    find_scope,
    first_to_fifth,
    hutchinson,
    keskar_sharpness,
    lanczos,
    landscape,
    layer_blocks,
    model_loss,
    quadrature,
    random_direction,
    recorded_eigenvalues,
    recorded_keskar,
    recorded_landscape,
    spectrum_statistics,
)
from flatpatch.flatness.points import plain
from flatpatch.measuring import EFFORTS, KINDS, RECORDED_KINDS, Effort, Request

SEED = 0
# The radius of ASAM's paper (arXiv:2102.11600, section 5); on its own scale.
ASAM_RHO = 0.5
# Ten blocks of four.
RECORDED_PRODUCTS = 40
# What a recorded landscape's arrays are called before a landscape's own names, which are those of the correct one.
RECORDED = "as_recorded_"
# These vary the weights themselves, or make operators of their own.
_WITHOUT_OPERATOR = ("keskar", "sam", "landscape", "slice", "gauss_newton", "fisher", "invariance", *RECORDED_KINDS)
# Of at most so many variables the certificate's trace is exact; above, it is that of fixed probes.
EXACT_TRACE = 256
WAYS_OF_WRITING = 7
# These ask for no product with the Hessian or its kin.
_LOSSES_ALONE = ("keskar", "sam", "landscape", "slice", "recorded_landscape", "recorded_keskar")
_LOUD_SECONDS = 60.0
Say = Callable[[str], None]
Progress = Callable[[str, float, float, str], None]
"""Called with a scope, the seconds of planned work done and planned in all for it, and what is measured now."""


@dataclass
class ScopeResult:
    """What was measured over one scope; see :mod:`flatpatch.measurement.files` for how it is written."""

    num_parameters: int = 0
    loss: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None  # (num_parameters,), float32 on the CPU; only where they are to be kept
    seconds: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What one loss, one loss with its gradient and one Hessian product take on the sample, in seconds."""

    loss: float
    gradient: float
    product: float

    def of(self, kind: str, effort: Effort, num_batches: int, *, at_most: bool = False, num_blocks: int = 1) -> float:
        """Return about how long a kind takes, or how long at most where its searches never converge."""
        # One batch takes its share of a product; one more search from a random start, and one over all batches.
        batchwise = effort.batch_products * (2 + 1 / num_batches)
        # From each start so many steps are taken, each shortened once at most; SAM's from four starts, in two balls.
        climb = 1 + (2 if at_most else 1) * effort.ascent_steps
        # Seen on the quick text model: 15 to 17 products for five eigenvalues, 46 for ten to a smaller residual; and of
        # the products that a search on batches may take about half.
        lanczos = effort.eigenvalue_products
        one, block = lanczos, effort.batch_products
        if not at_most:
            lanczos, batchwise = min(lanczos, 5 * effort.eigenvalues), 0.5 * batchwise
            one, block = min(one, 8), min(block, 6)
        seconds: Mapping[str, float] = {
            "loss": 0.0,
            "eigenvalues": lanczos * self.product,
            "trace": effort.trace_probes * self.product,
            "density": effort.density_probes * effort.density_steps * self.product,
            "batchwise": batchwise * self.product,
            "keskar": ((25 if at_most else 11) + 2 * climb) * self.gradient,
            "sam": 2 * (1 + 4 * climb) * self.gradient,
            "landscape": effort.grid_points**2 * self.loss,
            "slice": effort.slice_points * self.loss,
            # A product with these is a pass more, forth and back, than one with the Hessian, whose time is known.
            "gauss_newton": 1.5 * (one + effort.trace_probes) * self.product,
            "fisher": 3 * (one + effort.trace_probes) * self.product,
            "layers": (effort.trace_probes + num_blocks * block) * self.product,
            "invariance": WAYS_OF_WRITING
            * ((one + effort.trace_probes) * self.product + ((22 if at_most else 12) + climb) * self.gradient),
            # Of the sample's batches some are taken: each product and each loss costs their share.
            "recorded_eigenvalues": RECORDED_PRODUCTS * self.product * min(1, effort.recorded_batches / num_batches),
            "recorded_landscape": effort.recorded_points**2
            * self.loss
            * min(1, effort.recorded_landscape_batches / num_batches),
            "recorded_keskar": effort.recorded_vectors * self.loss,
        }
        return seconds[kind]


def measure_model(
    model: nn.Module,
    batches: Sequence[Any],
    request: Request,
    *,
    loss: Loss = model_loss,
    title: str = "",
    say: Say = print,
    progress: Progress | None = None,
    keep_weights: bool = False,
) -> tuple[dict[str, ScopeResult], list[float]]:
    """Measure a model as it is, in evaluation mode. Use a copy of a model that is being trained.

    Args:
        model: On the device where it is to be measured; put back as it was.
        batches: The sample.
        request: What to measure.
        loss: Mean loss of a batch.
        title: What is measured, for the estimate.
        say: Where the estimate goes.
        progress: Called now and then.
        keep_weights: Whether the results hold the scopes' weights.

    Returns:
        A result per scope, and the loss terms of each batch. What fails is in the result's ``errors``.
    """
    results: dict[str, ScopeResult] = {}
    terms: list[float] = []
    for scope in request.scopes:
        result = results[scope] = ScopeResult()
        started = time.perf_counter()
        try:
            problem = Problem(model, batches, loss, scope=scope)
            terms = list(problem.num_terms)
            if keep_weights and scope != "tangent":  # whose coordinates are others at another time
                result.weights = problem.flatten(problem.variables, torch.float32).cpu()
            _measure_scope(problem, request, result, f"{title}, {scope}" if title else scope, say, progress)
        except Exception as error:  # whatever it is: training must go on
            result.errors.setdefault("loss", _reason(error))
        result.seconds = round(time.perf_counter() - started, 3)
    return results, terms


def _measure_scope(
    problem: Problem, request: Request, result: ScopeResult, title: str, say: Say, progress: Progress | None
) -> None:
    result.num_parameters = problem.size
    result.loss = problem.loss()
    kinds = [kind for kind in request.kinds if kind != "loss" and kind in KINDS]
    if not kinds:
        return
    effort = EFFORTS[request.effort]
    operator = HessianOperator(problem, compile=False)  # "auto" goes by the clock, so two runs could round differently
    try:
        costs = _time_once(
            problem,
            operator,
            products=bool({*kinds} - {*_LOSSES_ALONE}),
        )
    except Exception as error:
        result.errors["eigenvalues"] = _reason(error)
        return
    batches, blocks = len(problem.batches), len(layer_blocks(problem)) + 2
    plan = {kind: costs.of(kind, effort, batches, num_blocks=blocks) for kind in kinds}
    most = sum(costs.of(kind, effort, batches, num_blocks=blocks, at_most=True) for kind in kinds)
    _say_estimate(title, problem, costs, plan, most, say)
    measures: Mapping[str, Callable[[_Work], None]] = {
        "eigenvalues": _eigenvalues,
        "trace": _trace,
        "density": _density,
        "batchwise": _batchwise,
        "keskar": _keskar,
        "sam": _sam,
        "landscape": _landscape,
        "slice": _slice,
        "gauss_newton": _gauss_newton,
        "fisher": _fisher,
        "layers": _layers,
        "invariance": _invariance,
        "recorded_eigenvalues": _recorded_eigenvalues,
        "recorded_landscape": _recorded_landscape,
        "recorded_keskar": _recorded_keskar,
    }
    work = _Work(problem, operator, request, effort, result, _Course(problem.scope.name, plan, progress))
    for kind in kinds:
        work.course.begin(kind)
        if kind in _WITHOUT_OPERATOR:
            work.hessian.release()  # its kept graphs would only take memory
        try:
            measures[kind](work)
        except Exception as error:
            result.errors[kind] = _reason(error)
        work.course.end()
    result.values = {name: _finite(value) for name, value in result.values.items()}
    result.results = plain(result.results)


def _time_once(problem: Problem, operator: HessianOperator, *, products: bool) -> Costs:
    def once(work: Callable[[], object]) -> float:
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        began = time.perf_counter()
        work()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        return time.perf_counter() - began

    def timed(work: Callable[[], object]) -> float:
        # The first time builds graphs and fills caches; another program may come between one of the others.
        first = once(work)
        return first if first > _LOUD_SECONDS else min(once(work) for _ in range(2 if first < 1 else 1))

    loss, gradient = timed(problem.loss), timed(problem.loss_and_gradient)
    if not products:
        return Costs(loss, gradient, 0.0)
    vector = torch.zeros(problem.size, 1, dtype=torch.float64, device=problem.device)
    vector[0] = 1.0
    return Costs(loss, gradient, timed(lambda: operator.matmat(vector)))


def _say_estimate(title: str, problem: Problem, costs: Costs, plan: Mapping[str, float], most: float, say: Say) -> None:
    total = sum(plan.values())
    product = f", Hessian product {costs.product:.2g} s" if costs.product else ""
    about = f"about {duration(total)}" + (f", {duration(most)} at most" if most > 1.5 * total + 1 else "")
    line = (
        f"measuring {title}: {problem.size:,} weights, {sum(problem.num_terms):.10g} loss terms, {about} "
        f"(forward and backward {costs.gradient:.2g} s{product})"
    )
    if total > _LOUD_SECONDS:
        shares = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in plan.items() if seconds >= 1)
        line = f"NOTE: {line}. That is {shares}. Fewer kinds, or a smaller measure_samples=, take less."
    say(line)


def duration(seconds: float) -> str:
    """Say a time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Course:
    """Progress over planned seconds: each kind fills its share as it goes along, whatever it really takes."""

    def __init__(self, scope: str, plan: Mapping[str, float], progress: Progress | None) -> None:
        self._scope = scope
        self._plan = plan
        self._total = sum(plan.values()) or 1.0
        self._progress = progress
        self._before = 0.0
        self._kind = ""

    def begin(self, kind: str) -> None:
        self._kind = kind
        self.update(0, 1)

    def update(self, done: int, total: int, text: str = "") -> None:
        share = self._before + self._plan[self._kind] * min(done / total, 1.0)
        if self._progress is not None:
            self._progress(
                self._scope, share, self._total, text if text.startswith(self._kind) else f"{self._kind} {text}".strip()
            )

    def end(self) -> None:
        self.update(1, 1)
        self._before += self._plan[self._kind]


@dataclass
class _Work:
    problem: Problem
    hessian: HessianOperator
    request: Request
    effort: Effort
    result: ScopeResult
    course: _Course
    directions: tuple[Tensor, ...] = ()
    eigenpairs: Eigenpairs | None = None


def _eigenvalues(work: _Work) -> None:
    effort = work.effort
    pairs = lanczos(
        work.hessian,
        min(effort.eigenvalues, work.problem.size),
        tol=effort.eigenvalue_tolerance,
        max_products=effort.eigenvalue_products,
        seed=SEED,
        progress=work.course.update,
    )
    result = work.result
    result.results["eigenvalues"] = pairs.as_dict()
    result.arrays |= {"eigenvalues": pairs.values.numpy(), "residuals": pairs.residuals.numpy()}
    result.values["top_eigenvalue"] = float(pairs.values[0])
    result.values["top_eigenvalue_residual"] = float(pairs.residuals[0])
    result.values["eigenvalues_unconverged"] = int((~pairs.converged).sum())
    if len(pairs.values) >= 5:
        result.values["eigenvalue_ratio_1_5"] = first_to_fifth(pairs.values)
    work.directions = tuple(pairs.vectors[:, :1].T)
    work.eigenpairs = pairs


def _trace(work: _Work) -> None:
    # A seed of its own: vectors of the Lanczos run's start would not be independent of what it found.
    found = hutchinson(
        work.hessian,
        num_probes=work.effort.trace_probes,
        known=work.eigenpairs,
        seed=SEED + 1,
        progress=work.course.update,
    )
    known = len(work.eigenpairs.values) if work.eigenpairs else 0
    work.result.results["trace"] = {**found.as_dict(), "known_eigenvalues": known}
    work.result.values |= {"trace": found.value, "trace_standard_error": found.standard_error}


def _density(work: _Work) -> None:
    found = quadrature(
        work.hessian,
        num_probes=work.effort.density_probes,
        num_steps=min(work.effort.density_steps, work.problem.size),
        seed=SEED,
        progress=work.course.update,
    )
    # A node within a thousandth of the largest is not told from zero by so few steps in float32.
    statistics = spectrum_statistics(found, rounding=1e-3)
    work.result.results["density"] = {**found.as_dict(), "statistics": statistics.as_dict()}
    work.result.arrays |= {"density_nodes": found.nodes.numpy(), "density_weights": found.weights.numpy()}
    work.result.values |= {
        "density_smallest": statistics.smallest,
        "density_largest": statistics.largest,
        "negative_mass": statistics.negative_mass,
        "negative_weight": statistics.negative_weight,
        "effective_rank": statistics.effective_rank,
        "outliers": statistics.outliers,
    }


def _batchwise(work: _Work) -> None:
    found = batch_eigenvalues(
        work.problem,
        tol=work.effort.batch_tolerance,
        max_products=work.effort.batch_products,
        restarts=1,
        seed=SEED,
        progress=work.course.update,
    )
    work.result.results["batchwise"] = found.as_dict()
    work.result.arrays["batch_eigenvalues"] = found.values.numpy()
    lower, median, upper = found.quartiles
    work.result.values |= {
        "batch_eigenvalue_mean": found.mean,
        "batch_eigenvalue_median": median,
        "batch_eigenvalue_max": found.largest,
        "batch_eigenvalue_lower_quartile": lower,
        "batch_eigenvalue_upper_quartile": upper,
        "batches_unconverged": found.num_unconverged,
    }


def _keskar(work: _Work) -> None:
    found = keskar_sharpness(
        work.problem, ascent_steps=work.effort.ascent_steps, seed=SEED, progress=work.course.update
    )
    work.result.results["keskar"] = found.as_dict()
    work.result.values |= {"keskar_sharpness": found.phi, "keskar_lower_bound": found.phi_lower_bound}


def _sam(work: _Work) -> None:
    work.result.results["sam"] = {}
    for name, rho, adaptive in (("sam", work.request.rho, False), ("asam", ASAM_RHO, True)):
        found = ball_sharpness(
            work.problem,
            rho,
            adaptive=adaptive,
            ascent_steps=work.effort.ascent_steps,
            directions=work.directions,
            seed=SEED,
            progress=work.course.update,
        )
        work.result.results["sam"][name] = found.as_dict()
        work.result.values |= {f"{name}_sharpness": found.one_step, f"{name}_sharpness_ascent": found.ascent}
        work.result.values["gradient_norm"] = found.grad_norm


def _landscape(work: _Work) -> None:
    axis = torch.linspace(-1, 1, work.effort.grid_points, dtype=torch.float64).numpy()
    kind = _normalisation(work.problem)
    directions = [random_direction(work.problem, normalisation=kind, seed=seed) for seed in (SEED, SEED + 1)]
    found = landscape(work.problem, directions, [axis, axis], progress=work.course.update)
    work.result.results["landscape"] = {**found.about, "shape": list(found.losses.shape)}
    work.result.arrays |= landscape_arrays(found)
    work.result.values["landscape_mean_rise"] = float(found.losses.mean()) - found.origin_loss


def _slice(work: _Work) -> None:
    axis = torch.linspace(-1, 1, work.effort.slice_points, dtype=torch.float64).numpy()
    direction = random_direction(work.problem, normalisation=_normalisation(work.problem), seed=SEED)
    found = landscape(work.problem, [direction], [axis], progress=work.course.update)
    work.result.results["slice"] = {**found.about, "losses": found.losses.tolist(), "coordinates": axis.tolist()}
    work.result.arrays |= {"slice_coordinates": axis, "slice_losses": found.losses}
    work.result.values["slice_mean_rise"] = float(found.losses.mean()) - found.origin_loss


def _gauss_newton(work: _Work) -> None:
    work.result.results["gauss_newton"] = {}
    _top_and_trace(work, "gauss_newton", GaussNewtonOperator(work.problem), "gauss_newton")


def _fisher(work: _Work) -> None:
    work.result.results["fisher"] = {}
    _top_and_trace(work, "fisher", FisherOperator(work.problem), "fisher")
    _top_and_trace(work, "fisher", EmpiricalFisherOperator(work.problem), "empirical_fisher")


def _top_and_trace(work: _Work, kind: str, operator: LinearOperator, name: str) -> None:
    effort = work.effort
    pairs = lanczos(
        operator,
        1,
        tol=effort.eigenvalue_tolerance,
        max_products=effort.eigenvalue_products,
        seed=SEED,
        progress=work.course.update,
    )
    found = hutchinson(operator, num_probes=effort.trace_probes, known=pairs, seed=SEED + 1)
    work.result.results[kind][name] = {"eigenvalues": pairs.as_dict(), "trace": found.as_dict()}
    work.result.values |= {f"{name}_top_eigenvalue": float(pairs.values[0]), f"{name}_trace": found.value}


def _layers(work: _Work) -> None:
    layers, factors = layer_blocks(work.problem), factor_blocks(work.problem)
    found = block_curvature(
        work.hessian,
        {**{f"layer {name}": block for name, block in layers.items()}, **factors},
        num_probes=work.effort.trace_probes,
        tol=work.effort.batch_tolerance,
        max_products=work.effort.batch_products,
        seed=SEED,
        progress=work.course.update,
    )
    of_layers = {name: found[f"layer {name}"] for name in layers}
    work.result.results["layers"] = {
        "layers": {name: block.as_dict() for name, block in of_layers.items()},
        "factors": {name: found[name].as_dict() for name in factors},
    }
    work.result.values |= {
        "layer_top_eigenvalue_max": max(block.top_eigenvalue for block in of_layers.values()),
        "layer_trace_max": max(block.trace for block in of_layers.values()),
    }
    for name in factors:
        work.result.values[f"factor_{name.lower()}_top_eigenvalue"] = found[name].top_eigenvalue
        work.result.values[f"factor_{name.lower()}_trace"] = found[name].trace


def _invariance(work: _Work) -> None:
    work.result.values["invariance_change"] = None  # where it is refused this stays, so that tables can tell
    effort = work.effort
    is_exact = work.problem.size <= EXACT_TRACE

    def top_eigenvalue(problem: Problem) -> float:
        operator = HessianOperator(problem, compile=False)
        products = min(effort.eigenvalue_products, problem.size)
        pairs = lanczos(operator, 1, tol=effort.eigenvalue_tolerance, max_products=products, seed=SEED)
        return float(pairs.values[0])

    def trace(problem: Problem) -> float:
        operator = HessianOperator(problem, compile=False)
        if is_exact:
            unit = torch.eye(problem.size, dtype=torch.float64, device=problem.device)
            return float(operator.matmat(unit).trace())
        return hutchinson(operator, num_probes=effort.trace_probes, seed=SEED + 1).value

    found = certify(
        work.problem,
        {
            "top_eigenvalue": top_eigenvalue,
            "trace": trace,
            "keskar_sharpness": lambda problem: keskar_sharpness(problem, ascent_steps=0, random_starts=0).phi,
            "sam_sharpness_ascent": lambda problem: (
                ball_sharpness(problem, work.request.rho, ascent_steps=effort.ascent_steps, random_starts=0).ascent
            ),
        },
        progress=work.course.update,
    )
    by_probes = "exact" if is_exact else f"{effort.trace_probes} fixed probes"
    work.result.results["invariance"] = {**found.as_dict(), "trace_by": by_probes}
    work.result.values |= {"invariance_change": found.change, "invariance_tolerance": found.tolerance}
    work.result.values |= {f"invariance_change_{name}": change for name, change in found.changes.items()}


def _recorded_eigenvalues(work: _Work) -> None:
    found = recorded_eigenvalues(
        work.problem, max_batches=work.effort.recorded_batches, seed=SEED, progress=work.course.update
    )
    work.result.results["recorded_eigenvalues"] = found.as_dict()
    work.result.arrays[f"{RECORDED}eigenvalues"] = found.values.numpy()
    work.result.values |= {
        "as_recorded_eigenvalue_mean": found.mean,
        "as_recorded_eigenvalue_median": found.median,
        "as_recorded_eigenvalue_max": found.largest,
        "as_recorded_basis_overlap": found.overlap,
    }


def _recorded_landscape(work: _Work) -> None:
    found = recorded_landscape(
        work.problem,
        points=work.effort.recorded_points,
        max_batches=work.effort.recorded_landscape_batches,
        progress=work.course.update,
    )
    work.result.results["recorded_landscape"] = {**found.about, "shape": list(found.losses.shape)}
    work.result.arrays |= {f"{RECORDED}{name}": array for name, array in landscape_arrays(found).items()}
    work.result.values["as_recorded_landscape_mean_rise"] = float(found.losses.mean()) - found.origin_loss


def _recorded_keskar(work: _Work) -> None:
    found = recorded_keskar(work.problem, vectors=work.effort.recorded_vectors, seed=SEED, progress=work.course.update)
    work.result.results["recorded_keskar"] = found.as_dict()
    work.result.values |= {"as_recorded_keskar_sharpness": found.value, "as_recorded_keskar_reach": found.reach}


def _normalisation(problem: Problem) -> str:
    """Filters; of a LoRA pair the merged matrix's, for B's own are zero before a task and small after it.

    A landscape by those would be flat by construction, and could not be set beside one of another time or scope.
    """
    if problem.scope.name == "adapter":
        try:
            find_scope(problem.model, "merged")
        except UserError:
            return "filter"
        return "merged_rows"
    return "filter"


def landscape_arrays(found: Landscape) -> dict[str, Any]:
    """Return a landscape's arrays under the names that its own files use."""
    return {
        "losses": found.losses,
        "done": found.done,
        "marks": found.marks,
        "mark_losses": found.mark_losses,
        "origin_loss": found.origin_loss,
        "about": json.dumps(dict(found.about)),
        **{f"axis_{k}": axis for k, axis in enumerate(found.axes)},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def describe_effort(request: Request) -> dict[str, int | float]:
    """Return the numbers behind the request's effort."""
    return asdict(EFFORTS[request.effort])

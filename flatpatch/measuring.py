"""What to measure, as settings say it. Knows names and numbers alone, so that reading settings loads no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatpatch.errors import UserError, did_you_mean

SCOPES = ("adapter", "merged", "tangent", "trainable", "model")
# Where no measure depends on how LoRA's product is split into factors.
INVARIANT_SCOPES = ("merged", "tangent")
INVARIANT, DEPENDS = "invariant", "depends on writing"
WHENS = ("before", "after")
AT_LOSS = "at_loss"
LEDGER, UPDATE, LIVE = "ledger", "update", "live"
LIVE_SHARE = 0.05
"""The most of a training's time that following it may take, where the steps are chosen by their time."""
LOSSES_AVERAGED = 10

CORRECT_KINDS: Mapping[str, str] = {
    "loss": "the loss of the sample (always)",
    "eigenvalues": "largest eigenvalues of the Hessian, each with its residual",
    "trace": "trace of the Hessian with its standard error (Hutchinson)",
    "density": "density of all eigenvalues (stochastic Lanczos quadrature)",
    "batchwise": "median over batches of each batch's dominant eigenvalue (Kaddour et al. 2022)",
    "keskar": "sharpness of Keskar et al. 2017, and a stronger bound of the same maximum",
    "sam": "loss rise in SAM's and ASAM's ball: at the one step, and by projected ascent",
    "landscape": "loss on a plane of two random filter-normalised directions",
    "slice": "loss along the first of them, more finely",
}
# Beyond what is measured of every run: more operators, parts of the Hessian, and what a number depends on.
CURVATURE_KINDS: Mapping[str, str] = {
    "layers": "largest eigenvalue and trace of the Hessian's diagonal blocks: each layer's, all factors A's, all B's",
    "gauss_newton": "the same of the Gauss-Newton matrix",
    "fisher": "the same of Fisher's information, and of the empirical Fisher",
}
CERTIFICATE_KINDS: Mapping[str, str] = {
    "invariance": "how much top eigenvalue, trace, Keskar and SAM ball change with the way LoRA's factors are written",
}
# With the faults of the experiment record's code, for comparison alone: flatpatch/flatness/as_recorded.py.
RECORDED_KINDS: Mapping[str, str] = {
    "recorded_eigenvalues": "as recorded: block Lanczos on a basis that is not orthogonal, pooled over batches",
    "recorded_landscape": "as recorded: loss on a plane of directions scaled tensor by tensor",
    "recorded_keskar": "as recorded: the highest loss on a random walk",
}
KINDS: Mapping[str, str] = {**CORRECT_KINDS, **CURVATURE_KINDS, **CERTIFICATE_KINDS, **RECORDED_KINDS}
# Not of a model at one point, but of a training: from step to step, or as a whole.
FOLLOWED_KINDS: Mapping[str, str] = {
    LEDGER: "the change of each earlier task's loss along a later task's steps, split into gradient, curvature, rest",
    UPDATE: "curvature along a task's whole update, the update's ranks, and its angles to earlier tasks' updates",
    LIVE: "dominant eigenvalue and SAM's gap from step to step of a training",
}
GROUPS: Mapping[str, Mapping[str, str]] = {
    "all": CORRECT_KINDS,
    "curvature": CURVATURE_KINDS,
    "recorded": RECORDED_KINDS,
}


@dataclass(frozen=True)
class Effort:
    """How much work each kind may do."""

    eigenvalues: int
    eigenvalue_products: int
    eigenvalue_tolerance: float
    trace_probes: int
    density_probes: int
    density_steps: int
    batch_products: int
    batch_tolerance: float
    ascent_steps: int
    grid_points: int
    slice_points: int
    recorded_batches: int
    recorded_points: int
    recorded_landscape_batches: int
    recorded_vectors: int


EFFORTS: Mapping[str, Effort] = {
    "brief": Effort(5, 15, 5e-2, 8, 1, 12, 6, 1e-1, 2, 7, 9, 1, 5, 1, 10),
    "quick": Effort(5, 40, 1e-2, 16, 2, 16, 20, 5e-2, 4, 9, 17, 2, 9, 2, 25),
    "full": Effort(10, 300, 1e-3, 100, 4, 50, 100, 1e-2, 20, 25, 51, 10, 20, 5, 100),
}

IN_MINIATURE: Mapping[str, Any] = {"measure_samples": 16, "measure_batch": 8, "measure_effort": "brief"}
"""How the runs of small models are measured where nothing else is asked for: more would take longer than training."""


@dataclass(frozen=True)
class Request:
    """What is measured at each measuring point.

    Attributes:
        kinds: Of ``KINDS``, in their order, "loss" always among them; then of ``FOLLOWED_KINDS``.
        scopes: Of ``SCOPES``: which weights vary.
        when: Of ``WHENS``: around each task's training.
        samples: Training examples in the sample; all of them where there are fewer.
        batch: Examples in a batch of the sample.
        rho: Radius of SAM's ball, in weight units, whatever the run trains with: so runs can be compared.
        effort: Of ``EFFORTS``.
        at_loss: Where over 0, measure also at the step of each task's training from which on the mean recorded loss
            over ``LOSSES_AVERAGED`` steps is first at or below it, so that runs can be compared at equal loss.
        ledger_every: Steps of the training that one entry of the ledger covers.
        live_every: Steps of the training from one at which is measured live to the next; 0: as its time allows.
        live_samples: Training examples that are measured on live.
    """

    kinds: tuple[str, ...]
    scopes: tuple[str, ...] = ("adapter", "merged")
    when: tuple[str, ...] = WHENS
    samples: int = 64
    batch: int = 16
    rho: float = 0.05
    effort: str = "quick"
    at_loss: float = 0.0
    ledger_every: int = 10
    live_every: int = 0
    live_samples: int = 8

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def is_refused(values: Mapping[str, float | None]) -> bool:
    """Tell whether a certificate was asked for of what was measured over a scope, and could not be had."""
    return "invariance_change" in values and values.get("invariance_tolerance") is None


def writing_mark(scope: str, values: Mapping[str, float | None]) -> str:
    """Say in a few words whether what was measured over a scope depends on how LoRA's factors are written.

    Args:
        scope: Of ``SCOPES``.
        values: What was measured there; ``invariance_change`` where a certificate was asked for, without
            ``invariance_tolerance`` where it was refused.
    """
    change, tolerance = values.get("invariance_change"), values.get("invariance_tolerance")
    if is_refused(values):
        return "not certified: refused"
    if tolerance is None:
        return f"{INVARIANT} by construction" if scope in INVARIANT_SCOPES else DEPENDS
    if change is None:
        return f"{DEPENDS} (beyond all bounds)"
    return f"{INVARIANT} (to {change:.1g})" if change <= tolerance else f"{DEPENDS} (by {change:.2g})"


def make_request(
    kinds: str,
    scopes: str,
    when: str = "before,after",
    *,
    samples: int,
    batch: int,
    rho: float,
    effort: str,
    at_loss: float = 0.0,
    ledger_every: int = 10,
    live_every: int = 0,
    live_samples: int = 8,
) -> Request | None:
    """Turn the texts of the settings into a request.

    Args:
        kinds: Names of kinds or of ``GROUPS`` with commas between them; empty for no measuring.
        scopes: Names of scopes likewise.
        when: "before", "after" or both.
        samples: As in :class:`Request`.
        batch: As in :class:`Request`.
        rho: As in :class:`Request`.
        effort: As in :class:`Request`.
        at_loss: As in :class:`Request`.
        ledger_every: As in :class:`Request`.
        live_every: As in :class:`Request`.
        live_samples: As in :class:`Request`.

    Returns:
        The request; None where nothing is to be measured.

    Raises:
        UserError: With every mistake.
    """
    request, problems = check_request(
        kinds,
        scopes,
        when,
        samples=samples,
        batch=batch,
        rho=rho,
        effort=effort,
        at_loss=at_loss,
        ledger_every=ledger_every,
        live_every=live_every,
        live_samples=live_samples,
    )
    if problems:
        raise UserError.collect(problems)
    return request


def check_request(
    kinds: str,
    scopes: str,
    when: str,
    *,
    samples: int,
    batch: int,
    rho: float,
    effort: str,
    at_loss: float = 0.0,
    ledger_every: int = 10,
    live_every: int = 0,
    live_samples: int = 8,
) -> tuple[Request | None, list[str]]:
    """Return what ``make_request`` does, and the mistakes instead of raising them."""
    problems: list[str] = []
    chosen = _names("measure", kinds, (*KINDS, *FOLLOWED_KINDS, *GROUPS), problems)
    chosen = tuple(kind for name in chosen for kind in GROUPS.get(name, (name,)))
    scope_names = _names("measure_scope", scopes, SCOPES, problems)
    whens = _names("measure_when", when, WHENS, problems)
    sizes = {"measure_samples": samples, "measure_batch": batch, "measure_live_samples": live_samples}
    for key, value in sizes.items():
        if value < 1:
            problems.append(f"{key}={value} is an empty sample (expected at least 1, e.g. {key}=16).")
    if not (math.isfinite(rho) and rho > 0):
        problems.append(f"measure_rho={rho:g} is out of range (expected a number > 0, e.g. measure_rho=0.05).")
    if not (math.isfinite(at_loss) and at_loss >= 0):
        problems.append(
            f"measure_at_loss={at_loss:g} is out of range (expected a loss > 0, e.g. measure_at_loss=0.5; 0: none)."
        )
    if ledger_every < 1:
        problems.append(
            f"measure_ledger_every={ledger_every} is out of range (expected a number of steps >= 1, e.g. "
            "measure_ledger_every=10)."
        )
    if live_every < 0:
        problems.append(
            f"measure_live_every={live_every} is out of range (expected a number of steps >= 1, or 0 for as many as "
            f"take {100 * LIVE_SHARE:.0f} % of the training's time)."
        )
    if effort not in EFFORTS:
        problems.append(
            f"unknown measure_effort '{effort}'.{did_you_mean(effort, EFFORTS)} Expected: {', '.join(EFFORTS)}."
        )
    if chosen:
        for key, names in (("measure_scope", scope_names), ("measure_when", whens)):
            if not names and not any(problem.startswith(f"{key}=") for problem in problems):
                problems.append(f"{key}= is empty (expected at least one name).")
    if UPDATE in chosen and set(whens) != set(WHENS):
        problems.append(
            f"measure={UPDATE} is of what lies between both ends of a task: it needs measure_when=before,after."
        )
    if UPDATE in chosen and scope_names == ("tangent",):
        problems.append(
            f"measure={UPDATE} measure_scope=tangent measures no update: tangent's directions before a task are not "
            "those after it. Add another to measure_scope, e.g. measure_scope=merged,tangent."
        )
    if problems or not chosen:
        return None, problems
    ordered = tuple(kind for kind in (*KINDS, *FOLLOWED_KINDS) if kind == "loss" or kind in chosen)
    numbers = (samples, batch, rho, effort, at_loss, ledger_every, live_every, live_samples)
    return Request(ordered, scope_names, whens, *numbers), []


def read_request(values: Any, where: str) -> Request:
    """Read a request back from a JSON file.

    Args:
        values: What :meth:`Request.as_dict` gave.
        where: The place it was read from, for the error.

    Raises:
        UserError: If keys are missing or unknown, or a value is not allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(Request)}
    if not isinstance(values, dict):
        raise UserError(f"{where} is not an object.")
    problems = [
        f"{where} has an unknown key {key!r}.{did_you_mean(key, fields)}" for key in values if key not in fields
    ]
    problems += [f"{where} has no {key!r}" for key in fields if key not in values]
    if problems:
        raise UserError.collect(problems)
    try:
        request = make_request(
            *(",".join(values[key]) for key in ("kinds", "scopes", "when")),
            samples=int(values["samples"]),
            batch=int(values["batch"]),
            rho=float(values["rho"]),
            effort=values["effort"],
            at_loss=float(values["at_loss"]),
            ledger_every=int(values["ledger_every"]),
            live_every=int(values["live_every"]),
            live_samples=int(values["live_samples"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has a value of the wrong kind: {error}") from None
    if request is None:
        raise UserError(f"{where} has no kinds.")
    return request


def _names(key: str, text: str, known: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    problems += [
        f"{key}={text}: unknown name '{word}'.{did_you_mean(word, known)} Expected some of: {', '.join(known)}."
        for word in words
        if word not in known
    ]
    twice = next((word for index, word in enumerate(words) if word in words[:index]), "")
    if twice:
        problems.append(f"{key}={text} names {twice} twice. Name each once.")
    return tuple(word for word in words if word in known)

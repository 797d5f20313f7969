r"""The files a measurement leaves, and the entries of a run's record that name them.

``flatness/<n>-<task>-<when>.json`` holds one measuring point::

    {"schema": 1,
     "task": "dbpedia", "task_index": 0, "when": "before" | "after" | "at_loss" | "finished",
     "step": after how many steps of the task's own loss it was measured, at_loss alone; else null,
     "samples": 64, "batches": [16, ...] (loss terms of each), "sample_seed": 0, "indices": [...] or null,
     "weights": "float32" | "float32 copy of bfloat16 weights" | ..., "loss": what is measured, in words,
     "request": {kinds, scopes, when, samples, batch, rho, effort, at_loss, ledger_every, live_every, live_samples},
     "error": null, or why nothing could be measured,
     "scopes": {scope: {"num_parameters": n, "loss": 0.7, "values": {name: number or null},
                        "results": {kind: all that the kind found, its settings with it},
                        "errors": {kind: message}, "arrays": "flatness/....npz" or null, "seconds": 12.3}},
     "seconds": 25.1}

The values' names are those of :data:`VALUES`. ``flatness/<n>-<task>-<when>-<scope>.npz`` holds arrays: the
landscape's, as :mod:`flatpatch.flatness.landscape` describes them (such a file can be read as a landscape), and besides
``eigenvalues``, ``residuals``, ``density_nodes``, ``density_weights`` (probes, steps), ``batch_eigenvalues``,
``slice_coordinates`` and ``slice_losses``, as far as they were measured. Of the update of each matrix, numbered from 0,
``update_left_0`` (rows, rank) and ``update_right_0`` (columns, rank) are orthonormal bases of its spaces. Arrays of the
measurements that repeat the record's faults are called ``as_recorded_...``: its ``as_recorded_eigenvalues`` (batches,
4), and its landscape's under the landscape's names.

A run's record has one entry per task, time and scope::

    {"task": "dbpedia", "task_index": 0, "when": "after", "scope": "adapter", "samples": 64, "loss": 0.7,
     "values": {...}, "file": "flatness/1-dbpedia-after.json", "arrays": "flatness/....npz" or null, "seconds": 12.3}

with the loss and values null, or the values missing, where something could not be measured; the file says why. File
names are relative to the run's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flatpatch.files import written_atomically
from flatpatch.measuring import FOLLOWED_KINDS

SCHEMA = 1
FOLDER = "flatness"

VALUES: Mapping[str, str] = {
    "top_eigenvalue": "largest eigenvalue of the Hessian",
    "top_eigenvalue_residual": "norm of H x - theta x of the largest eigenvalue",
    "eigenvalue_ratio_1_5": "largest over fifth largest eigenvalue",
    "eigenvalues_unconverged": "eigenvalues whose residual missed the tolerance",
    "trace": "trace of the Hessian",
    "trace_standard_error": "standard error of the trace",
    "density_smallest": "smallest node of the quadrature",
    "density_largest": "largest node of the quadrature",
    "negative_mass": "share of eigenvalues below minus a thousandth of the largest magnitude",
    "negative_weight": "their share in the sum of all magnitudes",
    "effective_rank": "(sum of magnitudes)^2 over the sum of squares",
    "outliers": "eigenvalues above a tenth of the largest magnitude, estimated",
    "batch_eigenvalue_mean": "mean over batches of the dominant eigenvalue",
    "batch_eigenvalue_median": "median over batches of the dominant eigenvalue",
    "batch_eigenvalue_max": "its largest over batches",
    "batch_eigenvalue_lower_quartile": "its lower quartile over batches",
    "batch_eigenvalue_upper_quartile": "its upper quartile over batches",
    "batches_unconverged": "batches whose residual missed the tolerance",
    "keskar_sharpness": "phi of Keskar et al., by the paper's protocol, in percent",
    "keskar_lower_bound": "the highest phi found by any search in the same box",
    "sam_sharpness": "loss rise at SAM's one step",
    "sam_sharpness_ascent": "highest loss rise found in SAM's ball",
    "asam_sharpness": "loss rise at ASAM's one step",
    "asam_sharpness_ascent": "highest loss rise found in ASAM's ball",
    "gradient_norm": "L2 norm of the gradient",
    "distance_moved": "L2 norm of the change of the scope's weights since before the task's training",
    "update_slope": "derivative of the loss along the task's update, per unit of length",
    "update_curvature": "u'Hu / u'u along the task's update u, after it",
    "update_sharpness": "rise of the loss by going measure_rho further along the update",
    "update_entropy_rank": "exponential of the entropy of the update's singular values, mean over matrices",
    "update_stable_rank": "squared Frobenius over squared spectral norm of the update, mean over matrices",
    "update_column_overlap": "mean squared cosine of the principal angles to earlier updates' column spaces",
    "update_row_overlap": "mean squared cosine of the principal angles to earlier updates' row spaces",
    "landscape_mean_rise": "mean over the plane of the loss above that at the weights",
    "slice_mean_rise": "mean over the line of the loss above that at the weights",
    "gauss_newton_top_eigenvalue": "largest eigenvalue of the Gauss-Newton matrix",
    "gauss_newton_trace": "its trace",
    "fisher_top_eigenvalue": "largest eigenvalue of Fisher's information",
    "fisher_trace": "its trace",
    "empirical_fisher_top_eigenvalue": "largest eigenvalue of the empirical Fisher",
    "empirical_fisher_trace": "its trace",
    "layer_top_eigenvalue_max": "the largest over layers of the largest eigenvalue of the layer's own block",
    "layer_trace_max": "the largest over layers of the trace of the layer's own block",
    "factor_a_top_eigenvalue": "largest eigenvalue of the block of all factors A (next to the input)",
    "factor_a_trace": "its trace",
    "factor_b_top_eigenvalue": "largest eigenvalue of the block of all factors B (next to the output)",
    "factor_b_trace": "its trace",
    "invariance_change": "largest relative change of any of the four below, LoRA's factors written differently",
    "invariance_tolerance": "the largest that passes, by the number format",
    "invariance_change_top_eigenvalue": "relative change of the largest eigenvalue, the factors written differently",
    "invariance_change_trace": "relative change of the trace, the factors written differently",
    "invariance_change_keskar_sharpness": "relative change of Keskar's phi, the factors written differently",
    "invariance_change_sam_sharpness_ascent": "relative change of SAM's ball, the factors written differently",
    "as_recorded_eigenvalue_mean": "as recorded: mean of block Lanczos's four largest values of each batch",
    "as_recorded_eigenvalue_median": "as recorded: median of them",
    "as_recorded_eigenvalue_max": "as recorded: the largest of them",
    "as_recorded_basis_overlap": "as recorded: largest entry of |Q Q' - I|, which would be 0 for a sound basis",
    "as_recorded_landscape_mean_rise": "as recorded: mean over the plane scaled by tensor of the rise of the loss",
    "as_recorded_keskar_sharpness": "as recorded: highest loss on a random walk, scaled as Keskar's phi, in percent",
    "as_recorded_keskar_reach": "as recorded: how far outside it was, 1 being the wall of Keskar's box",
}
"""Every scalar a measurement may give, and what it is."""

GIVEN_BY: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss", "distance_moved"),
    "eigenvalues": ("top_eigenvalue", "top_eigenvalue_residual", "eigenvalue_ratio_1_5", "eigenvalues_unconverged"),
    "trace": ("trace", "trace_standard_error"),
    "density": (
        *("density_smallest", "density_largest", "negative_mass", "negative_weight", "effective_rank", "outliers"),
    ),
    "batchwise": (
        *("batch_eigenvalue_median", "batch_eigenvalue_lower_quartile", "batch_eigenvalue_upper_quartile"),
        *("batch_eigenvalue_mean", "batch_eigenvalue_max", "batches_unconverged"),
    ),
    "keskar": ("keskar_sharpness", "keskar_lower_bound"),
    "sam": (*("sam_sharpness", "sam_sharpness_ascent", "asam_sharpness", "asam_sharpness_ascent", "gradient_norm"),),
    "update": (
        *("update_slope", "update_curvature", "update_sharpness", "update_entropy_rank", "update_stable_rank"),
        *("update_column_overlap", "update_row_overlap"),
    ),
    "landscape": ("landscape_mean_rise",),
    "slice": ("slice_mean_rise",),
    "gauss_newton": ("gauss_newton_top_eigenvalue", "gauss_newton_trace"),
    "fisher": (
        *("fisher_top_eigenvalue", "fisher_trace", "empirical_fisher_top_eigenvalue", "empirical_fisher_trace"),
    ),
    "layers": (
        *("layer_top_eigenvalue_max", "layer_trace_max", "factor_a_top_eigenvalue", "factor_a_trace"),
        *("factor_b_top_eigenvalue", "factor_b_trace"),
    ),
    "invariance": (
        *("invariance_change", "invariance_tolerance", "invariance_change_top_eigenvalue", "invariance_change_trace"),
        *("invariance_change_keskar_sharpness", "invariance_change_sam_sharpness_ascent"),
    ),
    "recorded_eigenvalues": (
        *("as_recorded_eigenvalue_mean", "as_recorded_eigenvalue_median", "as_recorded_eigenvalue_max"),
        "as_recorded_basis_overlap",
    ),
    "recorded_landscape": ("as_recorded_landscape_mean_rise",),
    "recorded_keskar": ("as_recorded_keskar_sharpness", "as_recorded_keskar_reach"),
}
"""By kind of measurement: the scalars that it gives. An entry has the loss beside its values, not among them."""


def stem(task_index: int, task: str, when: str) -> str:
    """Return the name, without ending, of a measuring point's files."""
    return f"{task_index + 1}-{re.sub(r'[^A-Za-z0-9_.+-]', '_', task)}-{when}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; numbers must be finite."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz`` file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def entries(content: Mapping[str, Any], file: str) -> list[dict[str, Any]]:
    """Return a measuring point's entries for the run's record, one per scope.

    Args:
        content: Of the JSON file.
        file: Its name, relative to the run's folder.
    """
    return [
        {
            **{key: content[key] for key in ("task", "task_index", "when")},
            "scope": scope,
            "samples": content["samples"],
            **{key: found[key] for key in ("loss", "values")},
            "file": file,
            **{key: found[key] for key in ("arrays", "seconds")},
        }
        for scope, found in content["scopes"].items()
    ]


def read_entries(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the entries of those of some measuring points whose files are there.

    Args:
        folder: The run's folder.
        names: Measuring points, as ``stem`` names them.
    """
    found = []
    for name in names:
        path = folder / FOLDER / f"{name}.json"
        if path.is_file():
            found += entries(json.loads(path.read_text(encoding="utf-8")), f"{FOLDER}/{name}.json")
    return found


def shortage(content: Mapping[str, Any]) -> list[str]:
    """Say that a measuring point had fewer examples than were asked for."""
    asked, had = content["request"]["samples"], content["samples"]
    if content["error"] or content["when"] in FOLLOWED_KINDS or had >= asked:
        return []
    return [f"measure_samples={asked}, and {content['task']} has {had} training examples: measured on all of them"]


def failures(content: Mapping[str, Any]) -> list[str]:
    """Return what could not be measured, one line each."""
    if content["error"]:
        return [str(content["error"])]
    return [
        f"{scope}, {kind}: {message}"
        for scope, found in content["scopes"].items()
        for kind, message in found["errors"].items()
    ]

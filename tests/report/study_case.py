"""A small study in a folder, for the tests of its page: runs with landscapes, spectra and values, and verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flatpatch.metrics import from_lists, summarise
from flatpatch.statistics import CONTRADICTED, SUPPORTED, Difference, corrected, paired_difference
from tests.report_page import flatness_entry, write_run
from tests.report_records import make_quick_record

TASKS = ("amazon", "agnews")
RADII = {"off": 1.0, "sam": 0.4}  # how sharp runs are
FIGURES: tuple[dict[str, Any], ...] = (
    {"kind": "forest"},
    {"kind": "accuracy_matrix", "panels": ["sam"]},
    {"kind": "landscape", "panels": ["sam"], "when": ["after"]},
    {"kind": "slice", "panels": ["sam"], "when": ["before", "after"]},
    {"kind": "density", "panels": ["sam"], "when": ["after"]},
    {"kind": "spectrum", "panels": ["sam", "task"], "when": ["after"]},
    {"kind": "statistics", "value": "top_eigenvalue", "panels": ["sam"]},
    {"kind": "slope"},
)


def axis(seed: int) -> dict[str, Any]:
    return {"label": f"random direction, seed {seed}", "normalisation": "filter", "seed": seed}


def arrays(sharpness: float, centre: float, prefix: str = "") -> dict[str, Any]:
    """Return the arrays of a bowl's landscape."""
    line = np.linspace(-1, 1, 9)
    about = {"schema": 1, "kind": "landscape", "scope": "adapter", "num_parameters": 12, "axes": [axis(0), axis(1)]}
    return {
        f"{prefix}losses": centre + sharpness * (line[:, None] ** 2 + 0.5 * line**2),
        f"{prefix}done": np.ones((9, 9), dtype=bool),
        f"{prefix}marks": np.empty((0, 2)),
        f"{prefix}mark_losses": np.empty(0),
        f"{prefix}axis_0": line,
        f"{prefix}axis_1": line,
        f"{prefix}origin_loss": np.array(centre),
        f"{prefix}about": np.array(json.dumps(about)),
    }


def results(sharpness: float, centre: float) -> dict[str, Any]:
    """Return what the kinds of measurement found at one point."""
    line = np.linspace(-1, 1, 17)
    values = (sharpness * np.array([30.0, 10.0, 4.0])).tolist()
    return {
        "slice": {
            "kind": "landscape",
            "scope": "adapter",
            "axes": [axis(0)],
            "losses": (centre + sharpness * line**2).tolist(),
            "coordinates": line.tolist(),
        },
        "eigenvalues": {"values": values, "residuals": [0.1, 0.1, 0.1], "converged": [True, True, False]},
        "density": {"nodes": [[-0.1, 1.0, values[0]]], "weights": [[0.9, 0.06, 0.04]], "size": 24576},
    }


def study_run(folder: Path, sam: str, seed: int, gain: float) -> dict[str, Any]:
    """Write a finished run, and return how verdicts name it."""
    matrix = [[80.0, None], [70.0 + gain + seed, 88.0]]
    record = make_quick_record(seeds=[seed], tasks=list(TASKS), accuracy_matrix=matrix)
    record["metrics"] = summarise(from_lists(matrix))
    record["settings"] |= {"sam": {"value": sam, "source": "command line"}}
    name = f"run-{sam}-{seed}"
    for index, task in enumerate(TASKS):
        for when in ("before", "after"):
            sharpness = RADII[sam] * (1 + 0.1 * seed) * (1 + (when == "after"))
            centre = 0.5 + 0.1 * (sam == "sam")
            file = f"flatness/{index + 1}-{task}-{when}.json"
            values = {"top_eigenvalue": 30 * sharpness, "as_recorded_eigenvalue_max": 60 + sharpness}
            entry = {"samples": 8, "arrays": file.replace(".json", "-adapter.npz"), "loss": centre}
            record["flatness"].append(
                flatness_entry(index, when, "adapter", values, **entry, task=task) | {"file": file}
            )
            content = {
                **{"task": task, "indices": [1, 2, 3], "sample_seed": 0, "samples": 8, "batches": [4, 4]},
                "scopes": {"adapter": {"results": results(sharpness, centre)}},
            }
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
            both = {**arrays(sharpness, centre), **arrays(1.5, centre, "as_recorded_")}
            np.savez(folder / name / entry["arrays"], **both)
    if not (folder / name / "record.json").exists():
        write_run(folder / name, record)
    return {"name": "arms", "folder": name, "settings": {"sam": sam}, "seed": seed, "status": "finished"}


def tested(found: Difference, against: str, statement: str = "") -> dict[str, Any]:
    """Return a paired difference as verdicts hold it."""
    keys = ("effect", "low", "high", "n", "p", "adjusted_p", "verdict", "more_seeds")
    finding = found.sentence("points", "in the miniature")
    return {
        **{key: value for key, value in asdict(found).items() if key in keys},
        **{"against": against, "finding": finding, "sentence": f"{statement}: {finding}", "missing": []},
        "pairs": [{"label": f"seed {seed}", "seed": seed, "side": 71.0 + seed, "against": 70.0} for seed in (0, 1)],
    }


def hypothesis(name: str, statement: str, found: Difference, **changes: Any) -> dict[str, Any]:
    return {
        **{"hypothesis": name, "statement": statement, "quantity": "average accuracy", "unit": "points"},
        **{"direction": found.direction, "smallest": found.smallest, "side": "sam=sam", "arm": "correct"},
        **{"tested": tested(found, "sam=off", statement), "controls": {}, "points": [], "x_label": ""},
    } | changes


def verdicts(runs: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return the verdicts of a study with each kind of verdict, both arms, controls and a slope."""
    sure = paired_difference([1.0, 1.1, 1.2], [0.0] * 3, direction="higher", smallest=0.5)
    against = paired_difference([-1.0, -1.1, -1.2], [0.0] * 3, direction="higher", smallest=0.5)
    small = paired_difference([0.1, 0.11, 0.12], [0.0] * 3, direction="lower", smallest=0.5)
    wide = paired_difference([1.0, 9.0, -4.0], [0.0] * 3, direction="higher", smallest=0.5)
    single = paired_difference([2.0], [0.0], direction="lower")
    first, second, third, fourth, fifth = corrected([sure, against, small, wide, single])
    sharper = "the model is sharper after training than before"
    points = [{"label": f"seed {s}, r {r}", "seed": s, "x": r, "y": 3 * r + s} for s in (0, 1) for r in (0, 1, 2, 3)]
    known = [
        hypothesis("accuracy", "SAM raises the average accuracy", first, controls={"twice": tested(fourth, "twice")}),
        hypothesis("forgetting", "SAM lowers forgetting", third),
        hypothesis("sharp", sharper, second, unit="eigenvalue", writing="depends on writing"),
        hypothesis("sharp", sharper, first, unit="eigenvalue", writing="depends on writing", arm="as recorded"),
        hypothesis("rank", "sharpness grows with rank", fourth, unit="a doubling", points=points, x_label="log2 rank"),
        hypothesis("one", "one seed tells nothing of this rather long statement about many things", fifth),
    ]
    assert {first.verdict, second.verdict} == {SUPPORTED, CONTRADICTED}
    return {
        **{"schema": 1, "study": "made-up", "title": "A made-up study", "question": "Does SAM help here?"},
        **{"record": "Q5.2", "form": "quick", "where": "in the miniature", "seeds": [0, 1], "seconds": 4000.0},
        **{"ours": ["rank 8"], "measure": {"measure": "all", "measure_samples": "8"}, "left_out": ["nothing else"]},
        **{"runs": list(runs), "hypotheses": known, "figures": list(FIGURES)},
        "conclusions": [
            {
                **{"text": "sharper after training", "open": False, "hypotheses": ["sharp"]},
                **{"outcome": "does not survive", "as_recorded": "survives"},
                "sentence": "sharper after training does not survive when measured correctly, in the miniature.",
            }
        ],
    } | changes


def make_study(output: Path, name: str = "made-up", form: str = "quick", **changes: Any) -> Path:
    """Write a study's runs and verdicts below a folder; return the verdicts' file. Studies there share their runs."""
    runs = [study_run(output, sam, seed, 3.0 * (sam == "sam")) for sam in RADII for seed in (0, 1)]
    missing = {"name": "arms", "folder": "run-off-2", "settings": {"sam": "off"}, "seed": 2, "status": "missing"}
    path = output / "studies" / name / form / "verdicts.json"
    path.parent.mkdir(parents=True)
    found = verdicts([*runs, missing], study=name, form=form, **changes)
    path.write_text(json.dumps(found), encoding="utf-8")
    return path

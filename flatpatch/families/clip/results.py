"""What a CLIP run leaves, and the accuracies in it."""

from __future__ import annotations

from collections.abc import Mapping

from flatpatch.errors import FlatpatchError
from flatpatch.families.base import Plan, Results
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.files import read_json

CONFIG = "clip-run.json"  # in the work folder: what the run's process is told
PROCESS = "all"  # the folder of the one process, in the run's tasks/
OUTPUT = "learned"  # in the work folder: what the process writes
RESULTS = "results.json"  # in there


def collect(plan: Plan, stages: int) -> Results:
    """Read the accuracies of a finished run; see :class:`flatpatch.families.base.Family`."""
    path = plan.folder / "work" / OUTPUT / RESULTS
    results = read_json(path)
    if results.get("tasks") != list(plan.tasks):
        raise FlatpatchError(f"{path} has results of {results.get('tasks')}, expected {list(plan.tasks)}.")
    return Results(
        results["accuracy_matrix"],
        results["sample_weighted"],
        results["train_seconds"],
        results["predict_seconds"],
        before_training=results["zero_shot"],
    )


def compare_zero_shot(accuracies: Mapping[str, float]) -> str:
    """Return zero-shot accuracies beside the published ones, as a line."""
    parts = [
        f"{name} {found:.1f} (published {DATASETS[name].zero_shot}, {found - DATASETS[name].zero_shot:+.1f})"
        for name, found in accuracies.items()
    ]
    return f"zero-shot accuracy in percent: {', '.join(parts)}; the prompts' wording is ours"

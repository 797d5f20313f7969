"""What the hooks write of each step: ``metrics.jsonl``, ``progress.json``, and words for first line and summary.

Measurements wait as tensors and are fetched from the device a few steps at a time, so that recording a step does not
wait for a GPU.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.files import write_atomically
from flatpatch.kinds import KINDS
from flatpatch.settings import sam_title

BUFFERED_STEPS = 10
SECONDS_BETWEEN_PROGRESS = 0.5

MEASURED = (
    "loss",
    "perturbed_loss",
    "grad_norm",
    "perturbation_norm",
    "effective_perturbation_norm",
    "perturbation_cosine",
)


class Recorder:
    """Writes the files of one run."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.last_loss: float | None = None
        self.heeds_stop = False
        """Whether the process looks at its stop file after each step of its training."""
        self._metrics, self._progress, self._summary = (Path(run[name]) for name in ("metrics", "progress", "summary"))
        self._waiting: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        self._progress_written = -math.inf

    def start(self, after_step: int = 0) -> None:
        """Begin ``metrics.jsonl``, or go on with an interrupted one after a step."""
        write_atomically(self._metrics, "".join(_records_until(self._metrics, after_step)))

    def add(self, record: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Put a step in the queue.

        Args:
            record: What is known of the step: task, step, learning_rate, ``seconds`` (a ``timing.Span``) and others.
            measured: Names of ``MEASURED`` to 0-dimensional tensors; what is missing becomes null.
        """
        self._waiting.append((record, measured))
        if len(self._waiting) >= BUFFERED_STEPS:
            self.flush()

    def flush(self) -> None:
        """Fetch the waiting measurements from the device at once, and append them."""
        lines = []
        for (record, _), values in zip(self._waiting, _fetched([row for _, row in self._waiting]), strict=True):
            measured = {
                name: value if math.isfinite(value) else None for name, value in zip(MEASURED, values, strict=True)
            }
            self.last_loss = measured["loss"]
            known = {**record, "seconds": float(record["seconds"])}
            lines.append(json.dumps({"task": record["task"], "step": record["step"], **measured, **known}) + "\n")
        self._waiting = []
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))

    def settle(self) -> None:
        """Append what waits, and have the disk keep it, as a checkpoint goes on from there."""
        self.flush()
        with self._metrics.open("rb") as stream:
            os.fsync(stream.fileno())

    def progress_due(self) -> bool:
        """Whether the last progress was written some time ago."""
        return time.monotonic() - self._progress_written >= SECONDS_BETWEEN_PROGRESS

    def write_progress(self, phase: str, step: int, total: int | None, **more: Any) -> None:
        """Say how far the run is."""
        self._progress_written = time.monotonic()
        loss = self.last_loss if phase == "train" and step else None  # at step 0 it would be the task before's
        progress = {"phase": phase, "step": step, "total": total, "loss": loss}
        if self.heeds_stop and phase == "train":
            progress["heeds_stop"] = True
        # Read while it is fresh alone: the training does not wait for the disk.
        write_atomically(self._progress, json.dumps(progress | more) + "\n", durable=False)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Say what was done, and with how many threads, on which the numbers depend."""
        import torch

        told = {**summary, "threads": torch.get_num_threads()}
        write_atomically(self._summary, json.dumps(told, indent=2) + "\n")


def describe(settings: Mapping[str, Any], *told: str) -> str:
    """Name the kind of SAM that a run's description asks for, with its radius, its scope and its own settings.

    Args:
        settings: The description's part ``sam``.
        told: More settings to name, where they have an effect.
    """
    sam = settings["kind"]
    values = {**settings, **settings.get("options", {}), "sam": sam, "sam_radius": settings.get("radius", "factors")}
    own = KINDS[sam].arguments if sam in KINDS else ()
    return sam_title(values, told=("scope", *own, *told))


def of_step(report: Any) -> dict[str, Any]:
    """Return what is recorded of a step's first perturbation; nothing where it had none."""
    return {} if report is None else {name: getattr(report, name) for name in MEASURED if hasattr(report, name)}


def counts(trainable: Sequence[Any], perturbed: Sequence[Any]) -> dict[str, int]:
    """Count the entries of the weights that are trained and perturbed."""
    return {
        "trainable_parameters": sum(p.numel() for p in trainable),
        "perturbed_parameters": sum(p.numel() for p in perturbed),
    }


def dtypes(parameters: Sequence[Any]) -> str:
    """Name the types of weights."""
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))


def announce(words: str) -> None:
    """Print one line of its own, although a progress bar may already stand in this one."""
    print(f"\nflatpatch: {words}", flush=True)


def _fetched(rows: list[Mapping[str, Any]]) -> list[list[float]]:
    """Fetch the measurements of all steps with one transfer."""
    if not rows:
        return []
    import torch

    tensors = [value for row in rows for value in row.values()]
    device = tensors[0].device if tensors else "cpu"
    nan = torch.full((), math.nan, dtype=torch.float64, device=device)
    grid = [torch.stack([row.get(name, nan).to(device, torch.float64) for name in MEASURED]) for row in rows]
    fetched: list[list[float]] = torch.stack(grid).tolist()
    return fetched


def _records_until(path: Path, step: int) -> list[str]:
    """The lines of an interrupted record up to a step; a torn last line is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    return kept


def make_measurer(run: Mapping[str, Any], progress: Callable[[str, int, int, str], None]) -> Any:
    """Return what measures flatness at points of the run, None where nothing is measured.

    Args:
        run: The run's description, which names the class.
        progress: Called with a phase, the seconds of planned work done and planned in all, and what was said last.
    """
    if run.get("measure") is None:
        return None
    module, _, name = run["measure"]["by"].partition(":")
    return getattr(importlib.import_module(module), name)(run, progress=progress)

"""Checkpoints of a training: folders that are whole or not there, each with a manifest of its files' hashes.

A checkpoint is written beside the others under a name of its own, its manifest last, and renamed once. So a crash, a
full disk or an altered file costs that one alone: the one before it is used, and a line says so. Loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.files import digest, made_whole, written_atomically

MANIFEST = "manifest.json"
SCHEMA = 1
KEPT = 2
SHARE = 0.02
"""The most of a training's time that its checkpoints may take."""
MOST_LOST = 300.0
"""Seconds of training that are lost at most, where the share allows it."""
_DIGITS = 9


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the step after which it was written, and what was noted in it."""

    folder: Path
    step: int
    facts: Mapping[str, Any]


def write_checkpoint(
    place: Path, step: int, fill: Callable[[Path], None], *, made_by: Mapping[str, Any], facts: Mapping[str, Any]
) -> Checkpoint:
    """Write a checkpoint, and remove all but the newest two.

    Args:
        place: The folder of a training's checkpoints; made if it is missing.
        step: After how many steps; a later one has a larger number.
        fill: Writes the checkpoint's files into the folder that it is given.
        made_by: What the training is: a checkpoint of another one is refused.
        facts: What else it notes; JSON.

    Raises:
        OSError: If it cannot be written; the ones before it are untouched.
    """
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f"{step:0{_DIGITS}d}"
    shutil.rmtree(folder, ignore_errors=True)
    with made_whole(folder) as unfinished:
        fill(unfinished)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "made_by": dict(made_by),
            "facts": dict(facts),
            "files": {str(path.relative_to(unfinished)): digest(path) for path in files},
        }
        with written_atomically(unfinished / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    # One of a later step could not be used, and what a killed process left unfinished has any step's name.
    folders = _folders(place)
    for old in (*folders[: folders.index(folder)], *folders[folders.index(folder) + KEPT :], *place.glob(".*.tmp")):
        shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(folder, step, facts)


def newest_checkpoint(place: Path, *, made_by: Mapping[str, Any], tell: Callable[[str], object]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and of this training; None without one.

    Args:
        place: The folder of a training's checkpoints; need not be there.
        made_by: What the training is.
        tell: Called with a line for each checkpoint that cannot be used.
    """
    for folder in _folders(place):
        found = _read(folder, made_by)
        if isinstance(found, Checkpoint):
            return found
        tell(f"the checkpoint {folder} cannot be used: {found}. The one before it is, or else the start.")
    return None


def _folders(place: Path) -> list[Path]:
    """Return the checkpoints' folders, the newest first."""
    with contextlib.suppress(OSError):
        return sorted((path for path in place.iterdir() if path.name.isdigit() and path.is_dir()), reverse=True)
    return []


def _read(folder: Path, made_by: Mapping[str, Any]) -> Checkpoint | str:
    """Return a checkpoint, or why it cannot be used."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema, step, made, facts, files = (manifest[key] for key in ("schema", "step", "made_by", "facts", "files"))
        noted = dict(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} is missing or damaged ({error.__class__.__name__})"
    if schema != SCHEMA:
        return f"it has schema {schema!r}, expected {SCHEMA}"
    if made != dict(made_by):
        other = sorted(key for key in {*made, *made_by} if made.get(key) != made_by.get(key))
        return f"it was made by another training (different: {', '.join(other)})"
    for name, expected in noted.items():
        try:
            if digest(folder / name) != expected:
                return f"{name} was altered"
        except OSError:
            return f"{name} is missing"
    return Checkpoint(folder, step, facts)


class Pace:
    """Says when a checkpoint is due: often enough that little is lost, seldom enough that it costs little.

    Args:
        every_seconds: Seconds between two; None for ``MOST_LOST``, or more where writing them would take more than
            ``SHARE`` of the time.
        every_steps: Steps between two instead; takes the place of seconds.
        clock: Gives seconds.
    """

    def __init__(
        self,
        *,
        every_seconds: float | None = None,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._steps, self._clock = every_seconds, every_steps, clock
        self._last_time, self._last_step, self._cost = clock(), 0, 0.0

    def begin(self, step: int) -> None:
        """Count from a step on, and from now."""
        self._last_time, self._last_step = self._clock(), step

    def due(self, step: int, *, last: bool = False) -> bool:
        """Tell whether a checkpoint is due after a step.

        Args:
            step: The step.
            last: Whether it is the training's last one. What follows (predicting, saving) can take as long again, so a
                checkpoint is due unless the training since the one before was short.
        """
        if self._steps is not None:
            return step - self._last_step >= self._steps
        wait = max(MOST_LOST, self._cost / SHARE) if self._seconds is None else self._seconds
        return self._clock() - self._last_time >= (SHARE * wait if last else wait)

    def wrote(self, step: int, seconds: float) -> None:
        """Note a checkpoint and what it took."""
        self._cost = seconds
        self.begin(step)

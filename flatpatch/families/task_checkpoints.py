"""Checkpoints at the ends of tasks, for a process that learns all tasks of a run in turn.

One checkpoint after each task holds what the next one begins with: what the caller gives, where all random generators
stand, and copies of the files that the process had written by then. Nothing is written inside a task: a process that
is killed there loses that task's work alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flatpatch.checkpoints import newest_checkpoint, write_checkpoint
from flatpatch.errors import Interrupted
from flatpatch.families.recording import announce
from flatpatch.families.resuming import random_state, set_random_state

STATE = "state.pt"


class TaskCheckpoints:
    """The checkpoints of one process; its ``step`` is the number of tasks done."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        """Read where they are.

        Args:
            run: The run's description (:mod:`flatpatch.contract`); where it asks for none, nothing is done here.
        """
        self._asked = run.get("checkpoints")
        self._own_files = [Path(run[name]) for name in ("metrics", "summary")]

    def restore(self) -> dict[str, Any] | None:
        """Return what the newest usable checkpoint holds, its files put back; None without one.

        The random generators are put back by the caller, with ``set_random_state(["random"])``, once nothing more is
        drawn.
        """
        if self._asked is None:
            return None
        made_by = self._asked["made_by"]
        found = newest_checkpoint(Path(self._asked["folder"]), made_by=made_by, tell=announce)
        if found is None:
            return None
        import torch

        # Whole objects, of this run's own making: the manifest's hashes have been compared.
        state: dict[str, Any] = torch.load(found.folder / STATE, weights_only=False)
        for name, path in state["files"].items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.folder / name, path)
        announce(f"{found.step} tasks were done before; going on after them")
        return state

    def write(self, tasks: int, state: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
        """Write one after a task; then end the process, with exit code 85, if it is asked to stop.

        If it cannot be written, that is said and the training goes on.

        Args:
            tasks: How many are done.
            state: What the next task begins with. Everything in it is taken as it is, shared parts once.
            files: Files, beside the metrics and the summary, without which the next task cannot begin.
        """
        if self._asked is None:
            return
        import torch

        paths = [path for path in (*self._own_files, *files) if path.is_file()]
        # Seen from the work folder, since a run's folder may be moved.
        copies = {f"file-{number}": os.path.relpath(path) for number, path in enumerate(paths)}

        def fill(folder: Path) -> None:
            for name, path in copies.items():
                shutil.copyfile(path, folder / name)
            torch.save({**state, "files": copies, "random": random_state()}, folder / STATE)

        try:
            write_checkpoint(
                Path(self._asked["folder"]), tasks, fill, made_by=self._asked["made_by"], facts={"tasks": tasks}
            )
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
            announce(f"FAILED to write the checkpoint after task {tasks}: {error} (the training goes on)")
        if Path(self._asked["stop"]).exists():
            announce(f"stopped after task {tasks}, as asked")
            raise SystemExit(Interrupted.exit_code)


def held_after_task(model: Any, rows: list[dict[str, Any]], protecting: Any | None) -> dict[str, Any]:
    """Return what a reference engine's next task begins with.

    Args:
        model: As it is after a task.
        rows: What was found after each task so far.
        protecting: Has ``subspaces`` that later tasks leave alone; None where nothing is protected.
    """
    return {"model": model.state_dict(), "rows": rows, "subspaces": protecting.subspaces if protecting else []}


def take_up(before: Mapping[str, Any], model: Any, protecting: Any | None) -> list[dict[str, Any]]:
    """Put a reference engine where :func:`held_after_task` found it, the random generators last; return the rows."""
    model.load_state_dict(before["model"])
    if protecting:
        protecting.subspaces = before["subspaces"]
    set_random_state(before["random"])
    return list(before["rows"])

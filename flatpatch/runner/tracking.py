"""Where people look at runs: TensorBoard's event files always, another tracker where ``track=`` asks for one.

All of them are fed by the runner from what a run writes, so that no training process loads one of them. A tracker that
fails costs a warning and nothing of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flatpatch.errors import UserError

EVENTS = "tensorboard"
NONE = "none"
SECONDS_UNSEEN = 5.0  # at most, before what was written can be looked at
PROJECT = "flatpatch"
STEP, TASK = "step", "task"
_NOT_SCALARS = ("task", "step", "seed")


class Tracker(Protocol):
    """What takes a run's numbers."""

    def scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        """Take numbers at a step of the run, or after a task; both count from 1."""

    def figure(self, name: str, path: Path) -> None:
        """Take a picture."""

    def end(self, status: str) -> None:
        """Take no more."""


class TensorBoard:
    """Event files in the run's folder, made anew by each call that continues the run."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from tensorboardX import summary
        from tensorboardX.record_writer import RecordWriter

        shutil.rmtree(folder / EVENTS, ignore_errors=True)
        (folder / EVENTS).mkdir()
        self._summary = summary
        # Not its SummaryWriter: that writes from a thread, which a full disk ends, and then the caller waits for ever.
        self._file = RecordWriter(
            str(folder / EVENTS / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        )
        self._flushed_at = time.monotonic()
        self._last = 0
        self._write(file_version="brain.Event:2")
        self._write(summary=summary.text("settings", "\n".join(f"- {key} = {value}" for key, value in about.items())))

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            self._file.write(Event(wall_time=time.time(), **content).SerializeToString())
            if time.monotonic() - self._flushed_at > SECONDS_UNSEEN:
                self._flushed_at = time.monotonic()
                self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._write(summary=self._summary.scalar(f"{axis}/{name}", value), step=place)
        self._last = max(self._last, place)

    def figure(self, name: str, path: Path) -> None:
        """See :class:`Tracker`."""
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._write(summary=self._summary.image(f"figures/{name}", pixels, dataformats="HWC"), step=self._last)

    def end(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._write(summary=self._summary.text("status", status), step=self._last)
        self._file.close()


class Wandb:
    """Weights & Biases: one run of the project, continued by its name. ``WANDB_MODE=offline`` sends nothing."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        with _told_nothing_else(WANDB_DISABLED=None):  # the trainings are told this, for upstream's own reports
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16],
                name=folder.name,
                dir=str(folder),
                config=dict(about),
                resume="allow",
            )
        self._known: dict[str, int] = {}  # what an earlier call has told of the same run
        for axis in (STEP, TASK):
            self._run.define_metric(f"{axis}/*", step_metric=axis)
            self._known[axis] = int(self._run.summary.get(axis) or 0)

    def scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        """See :class:`Tracker`."""
        if place > self._known[axis]:
            self._run.log({axis: place, **{f"{axis}/{name}": value for name, value in values.items()}})

    def figure(self, name: str, path: Path) -> None:
        """See :class:`Tracker`."""
        self._run.log({f"figures/{name}": self._wandb.Image(str(path))})

    def end(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """trackio: a database on this machine, or a Space where ``TRACKIO_SPACE_ID`` names one."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=PROJECT, name=folder.name, config=dict(about), embed=False)

    def scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        """See :class:`Tracker`."""
        self._trackio.log({axis: place, **{f"{axis}/{name}": value for name, value in values.items()}})

    def figure(self, name: str, path: Path) -> None:
        """See :class:`Tracker`."""
        self._trackio.log({f"figures/{name}": self._trackio.Image(str(path))})

    def end(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._trackio.log({"finished": float(status == "finished")})
        self._trackio.finish()


class Mlflow:
    """MLflow: one run of the experiment, in the place that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params({key: str(value)[:500] for key, value in about.items()})

    def scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics({f"{axis}/{name}": value for name, value in values.items()}, step=place)

    def figure(self, name: str, path: Path) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_artifact(str(path), "figures")

    def end(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._mlflow.end_run("FINISHED" if status == "finished" else "FAILED")


_MADE: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    EVENTS: TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: If it is not.
    """
    if name != NONE and importlib.util.find_spec(name) is None:
        raise UserError(f"track={name} needs the package {name}: .venv/bin/python -m pip install {name}")


class Tracking:
    """Feeds a run's trackers.

    Args:
        folder: The run's.
        record: As it is when the run begins, and will be changed.
        asked: The tracker asked for beside TensorBoard's files, as ``track=`` names it.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], asked: str = NONE) -> None:
        self.figures: Sequence[Path] = ()
        self._record = record
        self._warned: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        self._steps = 0
        self._tasks = 0
        self._files: dict[Path, int] = {}
        about = {key: own["value"] for key, own in record["settings"].items() if own["value"] not in ("", None)}
        about |= {key: record[key] for key in ("profile", "engine", "benchmark")}
        for name in (EVENTS, *((asked,) if asked != NONE else ())):
            with self._forgiven(name):
                self._trackers[name] = _MADE[name](folder, about)

    @contextlib.contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # other people's code, on other people's servers
            self._trackers.pop(name, None)
            if name not in self._warned:
                self._warned.add(name)
                print(f"WARNING: {name} takes no more of this run: {type(error).__name__}: {error}", flush=True)

    def _scalars(self, values: Mapping[str, float], axis: str, place: int) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._forgiven(name):
                tracker.scalars(values, axis, place)

    def follow(self, steps: Path) -> None:
        """Take what a process has written of its steps since the last call; it only adds to the file."""
        read = self._files.get(steps, 0)
        try:
            with steps.open("rb") as file:
                file.seek(read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._files[steps] = read + len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                self._step(json.loads(line))

    def _step(self, row: Mapping[str, Any]) -> None:
        self._steps += 1
        values = {
            name: float(value)
            for name, value in row.items()
            if name not in _NOT_SCALARS and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._scalars(values, STEP, self._steps)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def tasks(self) -> None:
        """Take what the record has of tasks that have ended since the last call."""
        record = self._record
        names = record["tasks"]
        for index in range(self._tasks, len(names)):
            row = record["accuracy_matrix"][index]
            known = {name: value for name, value in zip(names, row, strict=True) if value is not None}
            if not known:
                return
            values = {f"accuracy/{name}": float(value) for name, value in known.items()}
            learned = [float(value) for value in row[: index + 1] if value is not None]
            values["accuracy_over_learned_tasks"] = sum(learned) / len(learned)
            for entry in record["flatness"]:
                if entry["task_index"] == index:
                    place = f"flatness/{entry['when']}/{entry['scope']}"
                    numbers = {name: value for name, value in entry["values"].items() if value is not None}
                    values |= {f"{place}/{name}": float(value) for name, value in numbers.items()}
            self._tasks = index + 1
            self._scalars(values, TASK, self._tasks)

    def end(self) -> None:
        """Take the metrics and the figures, and no more."""
        record = self._record
        metrics = {f"metrics/{name}": float(value) for name, value in record["metrics"].items() if value is not None}
        if metrics:
            self._scalars(metrics, TASK, max(self._tasks, 1))
        for name, tracker in list(self._trackers.items()):
            with self._forgiven(name):
                for path in self.figures:
                    if path.suffix == ".png":
                        tracker.figure(path.stem, path)
                tracker.end(record["status"])


@contextlib.contextmanager
def _told_nothing_else(**variables: str | None) -> Iterator[None]:
    """Set or remove variables of this process inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

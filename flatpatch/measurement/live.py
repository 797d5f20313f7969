r"""The dominant eigenvalue and SAM's gap of the task at hand, followed from step to step of its training.

At a measured step a copy of the model gets the weights of the training, and :func:`flatpatch.flatness.follow` makes a
gradient, one Hessian product and one more loss of it, on a sample of ``live_samples`` examples over the first of the
request's scopes. The product is with the vector that the last measured step left, and begins anew in each task: the
residual says how far that has come. In ``tangent`` the vector is carried in the coordinates of the matrices' tangent
spaces, which move with the factors.

With ``live_every`` 0 a step is measured where that, and all that was spent on it in this task before, its preparation
too, takes at most ``SHARE`` of the time that the task's training has taken so far. What one step will take is what the
last one took; of the first, what its preparation did. So which steps are measured differs from run to run; the training
does not.

``flatness/<n>-<task>-live.json`` is written after each task's training. It has the keys of a measuring point
(:mod:`flatpatch.measurement.files`), with ``when`` "live", no scopes, and::

    {"live": {"scope": "adapter", "every": 0, "rho": 0.05, "num_parameters": n, "steps": 100 (of the training),
              "measured": [12, 40, ...] (the steps after which was measured), and with one number for each of them
              "losses", "gradient_norms", "gaps", "eigenvalues" (the estimate of the one of largest magnitude, signed),
              "residuals" (|Hv - (v'Hv) v|: an eigenvalue is so near),
              "restarted": [12, ...] (those of them at which the vector began anew: the task's first, the first after a
              process was cut off, and where the number of variables changed),
              "training_seconds", "preparing_seconds", "measuring_seconds",
              "share": of the latter two in the first, null where that is 0}}

Where it failed, as it does of a number that is not finite, ``error`` says why and the lists hold the steps before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import FlatpatchError
from flatpatch.families.sample import SEED, Sample
from flatpatch.flatness import Loss, Problem, follow
from flatpatch.flatness.guard import working_copy
from flatpatch.flatness.scope import unwrapped
from flatpatch.measurement import files
from flatpatch.measuring import LIVE, LIVE_SHARE, Request

_SERIES = {
    "losses": "loss",
    "gradient_norms": "gradient_norm",
    "gaps": "gap",
    "eigenvalues": "eigenvalue",
    "residuals": "residual",
}


class Live:
    """Follows the training of one task after another.

    Its calls may raise, and may draw random numbers: :class:`flatpatch.measurement.in_run.Measurer` holds both back.
    """

    def __init__(self, request: Request, folder: Path, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Prepare to follow.

        Args:
            request: What is asked for.
            folder: Where the measurements' files are.
            clock: Tells the seconds, without those of other measurements.
        """
        self._request, self._folder, self._clock = request, folder, clock
        self._scope = request.scopes[0]
        self._problem: Problem | None = None

    def begin(
        self,
        *,
        task_index: int,
        task: str,
        model: nn.Module,
        sample: Sample | Callable[[Request], Sample],
        loss: Loss,
        loss_name: str,
    ) -> None:
        """Begin to follow a task's training.

        Args:
            task_index: The task that is about to be trained, counted from 0.
            task: Its name.
            model: As it is trained.
            sample: The task's, or a function that makes it; of a given one the first batches are taken.
            loss: Of the sample.
            loss_name: What that is, in words.

        Raises:
            FlatpatchError: If the loss cannot be measured, or is not finite.
        """
        began = self._clock()
        self._task, self._task_index, self._loss_name, self._weights = task, task_index, loss_name, ""
        self._measured: list[int] = []
        self._restarted: list[int] = []
        self._values: dict[str, list[float]] = {name: [] for name in _SERIES}
        self._direction: Tensor | None = None
        self._seen = self._size = self._num_parameters = 0
        self._trained = self._spent = self._preparing = 0.0
        self._problem, self._left = None, began
        request = self._request
        smaller = replace(request, samples=request.live_samples, batch=min(request.batch, request.live_samples))
        made = sample(smaller) if callable(sample) else sample
        self._size = made.size
        self._model = unwrapped(model)
        self._copy, self._weights = working_copy(self._model)
        self._problem = Problem(self._copy, made.batches, loss, scope=self._scope)
        self._wait()
        self._left = self._clock()
        self._preparing = self._next = self._left - began

    def step(self, step: int) -> None:
        """Take notice of a step of the training that has ended; measure where that is due.

        Args:
            step: Its number, from 1.
        """
        if self._problem is None:
            return
        self._seen = step
        if self._is_due():
            self._wait()  # what a GPU has still to do is the training's
            self._count_training()
            self._measure(self._problem)
            self._next = self._clock() - self._left
            self._spent += self._next
            self._left += self._next

    def _is_due(self) -> bool:
        if self._request.live_every:
            return self._seen % self._request.live_every == 0
        trained = self._trained + self._clock() - self._left
        return self._preparing + self._spent + self._next <= LIVE_SHARE * trained

    def _wait(self) -> None:
        if self._problem is not None and self._problem.device.type == "cuda":
            torch.cuda.synchronize(self._problem.device)

    def _count_training(self) -> None:
        now = self._clock()
        self._trained, self._left = self._trained + now - self._left, now

    def _measure(self, problem: Problem) -> None:
        self._place()
        # Merged matrices and tangent spaces are made of the factors anew.
        now = problem.with_scope(self._scope)
        vector = self._direction
        restarts = vector is None or len(vector) != now.size
        found = follow(now, self._request.rho, None if restarts else vector)
        numbers = {series: float(getattr(found, name)) for series, name in _SERIES.items()}
        for series, value in numbers.items():  # JSON has no place for one that is not finite
            if not math.isfinite(value):
                raise FlatpatchError(f"the {_SERIES[series].replace('_', ' ')} is {value} at step {self._seen}")
        for series, value in numbers.items():
            self._values[series].append(value)
        self._measured.append(self._seen)
        if restarts:
            self._restarted.append(self._seen)
        self._direction, self._num_parameters = found.direction, now.size

    @torch.no_grad()
    def _place(self) -> None:
        """Give the copy the weights and buffers of the training."""
        weights, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        for name, parameter in self._copy.named_parameters():
            if weights[name].requires_grad:
                parameter.copy_(weights[name])
        for name, buffer in self._copy.named_buffers():
            buffer.copy_(buffers[name])

    def end(self) -> str:
        """Write the file, and say in a line what was measured; an empty one where nothing was followed."""
        if self._problem is None:
            return ""
        self._wait()
        self._count_training()
        self.write(None)
        self.drop()
        steps = f"{len(self._measured)} of {self._seen} steps of task {self._task_index + 1} {self._task}"
        return f"followed {steps} in {self._share():.1%} of its training's time"

    def _share(self) -> float:
        return (self._preparing + self._spent) / self._trained if self._trained else math.inf

    def drop(self) -> None:
        """Follow nothing more of this task's training, and free the copy of the model."""
        self._problem = self._direction = None
        self._copy = self._model = nn.Module()

    def write(self, error: str | None) -> None:
        """Write the task's file.

        Args:
            error: Why the task was not followed to its end; None where it was. What was measured before is written all
                the same.
        """
        share = self._share()
        content: dict[str, Any] = {
            **{"schema": files.SCHEMA, "task": self._task, "task_index": self._task_index, "when": LIVE, "step": None},
            **{"samples": self._size, "batches": [], "sample_seed": SEED, "indices": None, "weights": self._weights},
            **{"loss": self._loss_name, "request": self._request.as_dict(), "error": error, "scopes": {}},
            "live": {
                **{"scope": self._scope, "every": self._request.live_every, "rho": self._request.rho},
                **{"num_parameters": self._num_parameters, "steps": self._seen, "measured": self._measured},
                **self._values,
                "restarted": self._restarted,
                "training_seconds": round(self._trained, 3),
                "preparing_seconds": round(self._preparing, 3),
                "measuring_seconds": round(self._spent, 3),
                "share": round(share, 5) if math.isfinite(share) else None,
            },
            "seconds": round(self._preparing + self._spent, 3),
        }
        files.write_json(self._folder / f"{files.stem(self._task_index, self._task, LIVE)}.json", content)

    def state(self) -> dict[str, Any] | None:
        """Return where it stands, for a checkpoint of the training; None where it follows nothing.

        The vector, as long as all variables together, is not kept: power iteration begins anew, and the file says so.
        """
        if self._problem is None:
            return None
        return {
            **{"measured": list(self._measured), "restarted": list(self._restarted)},
            "values": {name: list(values) for name, values in self._values.items()},
            "trained": self._trained + self._clock() - self._left,
            **{"preparing": self._preparing, "spent": self._spent, "next": self._next},
            **{"seen": self._seen, "num_parameters": self._num_parameters},
        }

    def put_back(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what ``state`` returned, once ``begin`` was called with the task's model."""
        if state is None or self._problem is None:
            self.drop()
            return
        self._measured, self._restarted = list(state["measured"]), list(state["restarted"])
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._trained, self._spent, self._next = state["trained"], state["spent"], state["next"]
        self._preparing += state["preparing"]  # it was done once more
        self._seen, self._num_parameters = state["seen"], state["num_parameters"]
        self._left = self._clock()

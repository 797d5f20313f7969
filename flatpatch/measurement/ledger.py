r"""The ledger of forgetting: the change of each earlier task's loss over a later one's training, split along its steps.

Each ``ledger_every`` steps, with w the weights and d what they have moved since, the loss L of an earlier task's sample
has changed by

    L(w + d) - L(w) = g'd + d'Hd / 2 + remainder

(:func:`flatpatch.flatness.taylor_terms`). The sums over a task's training telescope to the change of the loss. The
variables are all weights that the task trains; what buffers change (batch normalisation) is in the remainder.

``flatness/<n>-<task>-ledger.json`` is written after the training of each task but the first. It has the keys of a
measuring point (:mod:`flatpatch.measurement.files`), with ``when`` "ledger", no scopes, and::

    {"ledger": {"every": 10, "steps": 100, "num_parameters": n,
                "earlier": [{"task": "dbpedia", "task_index": 0, "samples": 64,
                             "steps": [10, 20, ...], "losses": [before the first step, then at each of the steps],
                             "gradients": [...], "curvatures": [...] (one per entry, in units of the loss),
                             "change": the loss's over the training, "gradient", "curvature", "remainder": sums,
                             "absolute_change", "absolute_remainder": sums of the entries' magnitudes}, ...]}}

Where it failed, as it does of a number that is not finite, ``error`` says why and the lists hold the entries before.

``flatness/<n>-<task>-ledger.pt`` holds the task's sample, which the processes of later tasks read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import FlatpatchError
from flatpatch.families.sample import SEED, Sample
from flatpatch.files import written_atomically
from flatpatch.flatness import Loss, Problem, taylor_terms
from flatpatch.flatness.guard import working_copy
from flatpatch.flatness.scope import unwrapped
from flatpatch.measurement import files
from flatpatch.measuring import LEDGER, Request

LossOf = Callable[[int, str], Loss]
"""From a task's number, counted from 0, and name to the loss of its sample on a model that has learned it."""


@dataclass
class Account:
    """What is known of one earlier task's loss."""

    task: str
    task_index: int
    sample: Sample
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # one more than steps: the first is before them
    gradients: list[float] = field(default_factory=list)
    curvatures: list[float] = field(default_factory=list)

    @property
    def series(self) -> dict[str, list[Any]]:
        """The lists, by name."""
        return {name: getattr(self, name) for name in ("steps", "losses", "gradients", "curvatures")}

    def as_dict(self) -> dict[str, Any]:
        """Return it for the file."""
        changes = [after - before for before, after in zip(self.losses, self.losses[1:], strict=False)]
        rest = [c - g - k for c, g, k in zip(changes, self.gradients, self.curvatures, strict=True)]
        return {
            **{"task": self.task, "task_index": self.task_index, "samples": self.sample.size},
            **self.series,
            "change": math.fsum(changes),
            "gradient": math.fsum(self.gradients),
            "curvature": math.fsum(self.curvatures),
            "remainder": math.fsum(rest),
            "absolute_change": math.fsum(map(abs, changes)),
            "absolute_remainder": math.fsum(map(abs, rest)),
        }


class Ledger:
    """Keeps the ledger of one task's training after another.

    It works on a copy of the model that lies where the training was at the last entry. Its calls may raise, and may
    draw random numbers: :class:`flatpatch.measurement.in_run.Measurer` holds both back.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        """Prepare to follow.

        Args:
            request: What is asked for.
            folder: Where the measurements' files are.
        """
        self._request, self._folder = request, folder
        self._accounts: list[Account] = []
        self._problems: list[Problem] = []
        self._weights = ""

    def begin(
        self,
        *,
        task_index: int,
        task: str,
        model: nn.Module,
        sample: Sample | Callable[[Request], Sample],
        loss_of: LossOf,
        loss_name: str,
    ) -> int:
        """Keep the task's sample for later tasks, and begin to follow the losses of the earlier ones.

        Args:
            task_index: The task that is about to be trained, counted from 0.
            task: Its name.
            model: As it is trained.
            sample: The task's, or a function that makes it.
            loss_of: The loss of each task's sample.
            loss_name: What that is, in words.

        Returns:
            How many earlier tasks are followed.

        Raises:
            FlatpatchError: If a loss cannot be measured, or is not finite.
            OSError: If a sample cannot be written or read.
        """
        self._task, self._task_index, self._loss_name = task, task_index, loss_name
        self._accounts, self._problems, self._seconds = [], [], 0.0
        self._anchor = self._seen = 0
        began = time.perf_counter()
        own = self._folder / f"{files.stem(task_index, task, LEDGER)}.pt"
        if not own.is_file():  # it is there where the task's training goes on
            made = sample(self._request) if callable(sample) else sample
            own.parent.mkdir(parents=True, exist_ok=True)
            kept = {"task": task, "batches": list(made.batches), "size": made.size, "indices": made.indices}
            with written_atomically(own) as unfinished:
                torch.save(kept, unfinished)
        if task_index == 0:
            return 0
        self._model = unwrapped(model)
        self._copy, self._weights = working_copy(self._model)
        for index in range(task_index):
            account = self._read(index)
            problem = Problem(self._copy, account.sample.batches, loss_of(index, account.task), scope="trainable")
            account.losses.append(_finite(problem.loss(), "loss", account, 0))
            self._accounts.append(account)
            self._problems.append(problem)
        self._seconds = time.perf_counter() - began
        return len(self._accounts)

    def _read(self, index: int) -> Account:
        found = sorted(self._folder.glob(f"{index + 1}-*-{LEDGER}.pt"))
        if not found:
            raise FileNotFoundError(f"the sample of task {index + 1} is not in {self._folder}")
        kept = torch.load(found[0], map_location="cpu", weights_only=True)
        return Account(kept["task"], index, Sample(kept["batches"], kept["size"], kept["indices"]))

    def step(self, step: int) -> None:
        """Take notice of a step of the training that has ended; make an entry where one is due.

        Args:
            step: Its number, from 1.
        """
        self._seen = step
        if self._accounts and step % self._request.ledger_every == 0:
            self._enter()

    def end(self) -> str:
        """Make the last entry and write the file; there is nothing to be said of it."""
        if not self._accounts:
            return ""
        if self._seen > self._anchor:
            self._enter()
        self.write(None)
        self.drop()
        return ""

    def drop(self) -> None:
        """Follow nothing more of this task's training, and free the copy of the model."""
        self._accounts, self._problems = [], []
        self._copy = self._model = nn.Module()

    @torch.no_grad()
    def _enter(self) -> None:
        began = time.perf_counter()
        problem = self._problems[0]
        live = dict(self._model.named_parameters())
        now = problem.flatten([live[name] for name in problem.scope.names], torch.float64)
        step = now - problem.flatten(problem.variables, torch.float64)
        terms = [taylor_terms(each, step) for each in self._problems]
        self._place(live, dict(self._model.named_buffers()))
        found = [(each.loss(), *own) for each, own in zip(self._problems, terms, strict=True)]
        for account, numbers in zip(self._accounts, found, strict=True):
            for name, value in zip(("loss", "gradient term", "curvature term"), numbers, strict=True):
                _finite(value, name, account, self._seen)
        # All accounts have the entry or none has: what fails above leaves the entries before it whole.
        for account, (loss, gradient, curvature) in zip(self._accounts, found, strict=True):
            account.steps.append(self._seen)
            account.losses.append(loss)
            account.gradients.append(gradient)
            account.curvatures.append(curvature)
        self._anchor = self._seen
        self._seconds += time.perf_counter() - began

    @torch.no_grad()
    def _place(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Give the copy these weights, of those that are trained, and these buffers."""
        for name, variable in zip(self._problems[0].scope.names, self._problems[0].variables, strict=True):
            variable.copy_(weights[name])
        for name, buffer in self._copy.named_buffers():
            buffer.copy_(buffers[name])

    def write(self, error: str | None) -> None:
        """Write the task's file.

        Args:
            error: Why the ledger is not whole; None where it is. The entries before that are written all the same.
        """
        content: dict[str, Any] = {
            **{
                "schema": files.SCHEMA,
                "task": self._task,
                "task_index": self._task_index,
                "when": LEDGER,
                "step": None,
            },
            "samples": min((account.sample.size for account in self._accounts), default=0),
            **{"batches": [], "sample_seed": SEED, "indices": None, "weights": self._weights},
            **{"loss": self._loss_name, "request": self._request.as_dict(), "error": error, "scopes": {}},
            "ledger": {
                "every": self._request.ledger_every,
                "steps": self._seen,
                "num_parameters": self._problems[0].size if self._problems else 0,
                "earlier": [account.as_dict() for account in self._accounts if account.steps or not error],
            },
            "seconds": round(self._seconds, 3),
        }
        files.write_json(self._folder / f"{files.stem(self._task_index, self._task, LEDGER)}.json", content)

    def state(self) -> dict[str, Any] | None:
        """Return where it stands, for a checkpoint of the training; None where it follows nothing."""
        if not self._accounts:
            return None
        problem = self._problems[0]
        return {
            "weights": {name: v.detach() for name, v in zip(problem.scope.names, problem.variables, strict=True)},
            "buffers": dict(self._copy.named_buffers()),
            "series": [account.series for account in self._accounts],
            **{"anchor": self._anchor, "seen": self._seen, "seconds": self._seconds},
        }

    def put_back(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what ``state`` returned, once ``begin`` was called with the task's model."""
        if state is None or not self._accounts:
            self.drop()
            return
        self._place(state["weights"], state["buffers"])
        for account, series in zip(self._accounts, state["series"], strict=True):
            for name, values in series.items():
                setattr(account, name, list(values))
        self._anchor, self._seen, self._seconds = state["anchor"], state["seen"], state["seconds"]


def _finite(value: float, name: str, account: Account, step: int) -> float:
    """Return a number of an earlier task; JSON and sums have no place for one that is not finite."""
    if not math.isfinite(value):
        raise FlatpatchError(f"the {name} of task {account.task_index + 1} is {value} at step {step}")
    return value

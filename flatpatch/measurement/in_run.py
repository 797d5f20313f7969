"""Measuring at points of a run, for whatever hook or loop trains: ``Measurer(run).at("before", ...)``."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from flatpatch.errors import FlatpatchError
from flatpatch.families.sample import SEED, Sample
from flatpatch.flatness import Loss, Problem, model_loss
from flatpatch.flatness.guard import random_states_kept, working_copy
from flatpatch.flatness.points import plain
from flatpatch.measurement import files
from flatpatch.measurement.ledger import Ledger, LossOf
from flatpatch.measurement.live import Live
from flatpatch.measurement.suite import ScopeResult, describe_effort, measure_model
from flatpatch.measurement.update import measure_update
from flatpatch.measuring import AT_LOSS, LEDGER, LIVE, LOSSES_AVERAGED, UPDATE, Request, read_request

Progress = Callable[[str, int, int, str], None]
"""Called with a phase's name, the seconds of planned work done and planned in all, and what was said last."""

_Found = TypeVar("_Found")

MODEL_LOSS = "the model's own loss, without the method's penalty"


class Measurer:
    """Measures a model that is being trained, without changing anything of the training.

    It works on a copy of the model, in evaluation mode, and puts every global random number generator back. Whatever
    fails is said loudly and written into the measurement's file; the training goes on.
    """

    def __init__(self, run: Mapping[str, Any], *, progress: Progress | None = None) -> None:
        """Read what is asked for.

        Args:
            run: The run's description (:mod:`flatpatch.contract`).
            progress: Called during the work.

        Raises:
            UserError: If the request is not valid.
        """
        self._progress = progress
        self._note = ""
        self._began: dict[tuple[int, str], Tensor] = {}  # by task and scope: the weights before its training
        self.request: Request | None = None
        if (asked := run.get("measure")) is not None:
            self.request, self._folder = read_request(asked["request"], "measure.request"), Path(asked["folder"])
        self._watched: int | None = None  # the task whose losses these are
        self._losses: deque[float] = deque(maxlen=LOSSES_AVERAGED)
        self._steps = 0
        self._is_reached = False
        self._seconds_apart = 0.0
        self._ledger: Ledger | None = None
        self._live: Live | None = None
        if self.request is not None and LEDGER in self.request.kinds:
            self._ledger = Ledger(self.request, self._folder)
        if self.request is not None and LIVE in self.request.kinds:
            self._live = Live(self.request, self._folder, clock=lambda: time.perf_counter() - self._seconds_apart)

    def wants(self, when: str) -> bool:
        """Tell whether anything is measured at this time."""
        if self.request is None:
            return False
        return self.request.at_loss > 0 if when == AT_LOSS else when in self.request.when

    def reaches(self, task_index: int, loss: float) -> bool:
        """Take the loss of a task's next step; tell whether the asked one is reached by it, for the first time.

        Args:
            task_index: The task that is trained.
            loss: As it is recorded of the step.
        """
        if not self.wants(AT_LOSS):
            return False
        assert self.request is not None
        if task_index != self._watched:
            self._watched, self._steps, self._is_reached = task_index, 0, False
            self._losses.clear()
        self._steps += 1
        self._losses.append(loss)
        mean = sum(self._losses) / LOSSES_AVERAGED
        if self._is_reached or len(self._losses) < LOSSES_AVERAGED or not mean <= self.request.at_loss:
            return False
        self._is_reached = True
        return True

    def state(self) -> dict[str, Any]:
        """Return what later measuring goes by, for a checkpoint of the training: numbers, lists and tensors."""
        return {
            "began": [[task, scope, weights] for (task, scope), weights in self._began.items()],
            "watched": self._watched,
            "losses": list(self._losses),
            "steps": self._steps,
            "is_reached": self._is_reached,
            **{name: follower.state() for name, follower in self._followers.items()},
        }

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self._began = {(task, scope): weights for task, scope, weights in state["began"]}
        self._watched, self._steps, self._is_reached = state["watched"], state["steps"], state["is_reached"]
        self._losses.extend(state["losses"])
        for name, follower in self._followers.items():
            follower.put_back(state.get(name))

    def begin(
        self,
        *,
        task_index: int,
        task: str,
        model: nn.Module,
        sample: Sample | Callable[[Request], Sample],
        loss: Loss = model_loss,
        loss_name: str = MODEL_LOSS,
        loss_of: LossOf | None = None,
    ) -> None:
        """Say that a task's training begins or goes on, so that it can be followed from step to step, if asked to.

        Args:
            task_index: As for ``at``, with those that follow.
            task: See there.
            model: See there.
            sample: See there.
            loss: See there.
            loss_name: See there.
            loss_of: From a task's number and name to the loss of its sample; by default the one loss for all.
        """
        task_of: dict[str, Any] = {"task_index": task_index, "task": task, "model": model, "sample": sample}
        if (ledger := self._ledger) is not None:
            losses = loss_of or (lambda *_: loss)
            followed = self._guarded(LEDGER, lambda: ledger.begin(**task_of, loss_of=losses, loss_name=loss_name))
            if followed:
                assert self.request is not None
                self._say(
                    f"follows the losses of {followed} earlier tasks through task {task_index + 1} {task}, an entry "
                    f"each {self.request.ledger_every} steps"
                )
        if (live := self._live) is not None:
            self._guarded(LIVE, lambda: live.begin(**task_of, loss=loss, loss_name=loss_name))

    def step(self, step: int) -> None:
        """Take notice of a step of the training that has ended: of its number, from 1."""
        for name, follower in self._followers.items():
            self._guarded(name, partial(follower.step, step))

    def end(self) -> None:
        """Say that the task's training has ended."""
        for name, follower in self._followers.items():
            if text := self._guarded(name, follower.end):
                self._say(f"{name}: {text}")

    @property
    def _followers(self) -> dict[str, Ledger | Live]:
        found = {LEDGER: self._ledger, LIVE: self._live}
        return {name: follower for name, follower in found.items() if follower is not None}

    def _guarded(self, name: str, work: Callable[[], _Found]) -> _Found | None:
        """Follow the training; what fails is said and written down, and the training goes on without."""
        follower = self._followers[name]
        try:
            with random_states_kept(), self._apart() if name != LIVE else nullcontext():
                return work()
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
            self._say(f"FAILED {name}: {reason} (the training goes on)")
            try:
                follower.write(reason)
            except OSError as problem:
                self._say(f"FAILED {name}: its file was not written: {problem} (the training goes on)")
            follower.drop()
        return None

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Have the time of the block count as none of the training's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds_apart += time.perf_counter() - began

    def at(
        self,
        when: str,
        *,
        task_index: int,
        task: str,
        model: nn.Module,
        sample: Sample | Callable[[Request], Sample],
        loss: Loss = model_loss,
        loss_name: str = MODEL_LOSS,
    ) -> list[dict[str, Any]]:
        """Measure, if asked to at this time, and write the files.

        Args:
            when: "before" or "after" the task's training, or "at_loss" in it, once ``reaches`` has said so.
            task_index: Counted from 0.
            task: Its name.
            model: As it is trained: not copied, moved or put into evaluation mode by the caller.
            sample: What is measured on, or a function that makes it from the request; the random numbers it draws
                are put back. :func:`sample_of` makes such a function of a data set and a collator.
            loss: From a model and a batch to the mean loss over the batch's loss terms.
            loss_name: What that is, in words, for the file.

        Returns:
            The entries for the run's record, empty where nothing was asked for.
        """
        if not self.wants(when):
            return []
        request = self.request
        assert request is not None
        # The random states are put back whatever happens, and nothing may reach the training loop but a keyboard's ^C.
        with random_states_kept(), self._apart():
            return self._measure(when, task_index, task, model, sample, loss, loss_name, request)

    def _measure(
        self,
        when: str,
        task_index: int,
        task: str,
        model: nn.Module,
        sample: Sample | Callable[[Request], Sample],
        loss: Loss,
        loss_name: str,
        request: Request,
    ) -> list[dict[str, Any]]:
        name = files.stem(task_index, task, when)
        step = self._steps if when == AT_LOSS else None
        title = f"{when} task {task_index + 1} {task}" if step is None else f"task {task_index + 1} {task}, step {step}"
        started = time.perf_counter()
        results = {scope: ScopeResult() for scope in request.scopes}
        terms: list[float] = []
        weights, error = "", None
        made = Sample((), 0)
        try:
            made = sample(request) if callable(sample) else sample
            copied, weights = working_copy(model)
            results, terms = measure_model(
                copied,
                made.batches,
                request,
                loss=loss,
                title=title,
                say=self._say,
                keep_weights=self.wants("before"),
                progress=lambda _scope, done, total, _text: self._tell(
                    f"measure {when}".replace("_", " "), done, total
                ),
            )
            self._note_distances(when, task_index, results)
            if when == "after" and UPDATE in request.kinds:
                self._measure_updates(task_index, copied, made, loss, request, results)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        content = describe(
            request,
            results,
            task=task,
            task_index=task_index,
            when=when,
            sample=made,
            terms=terms,
            weights=weights,
            loss_name=loss_name,
            error=error,
            seconds=time.perf_counter() - started,
            step=step,
        )
        for failure_text in files.failures(content):
            self._say(f"FAILED {title}: {failure_text} (the training goes on)")
        try:
            return write(self._folder, name, content, results)
        except OSError as failure:
            self._say(f"FAILED {title}: its files were not written: {failure} (the training goes on)")
            return []

    def _note_distances(self, when: str, task_index: int, results: Mapping[str, ScopeResult]) -> None:
        """Note how far each scope's weights have moved since they were measured before the task's training."""
        if when == "before":
            self._began.clear()
        for scope, result in results.items():
            weights, result.weights = result.weights, None
            if weights is None:
                continue
            if when == "before":
                self._began[task_index, scope] = weights
            elif (began := self._began.get((task_index, scope))) is not None and began.shape == weights.shape:
                result.values["distance_moved"] = float((weights.double() - began).norm())

    def _measure_updates(
        self,
        task_index: int,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        request: Request,
        results: Mapping[str, ScopeResult],
    ) -> None:
        """Measure each scope's change over the task's training, the random numbers being put back by the caller."""
        for scope, result in results.items():
            if scope == "tangent":  # whose directions before the task are not those after it
                continue
            began = time.perf_counter()
            try:
                if (weights := self._began.get((task_index, scope))) is None:
                    raise FlatpatchError("the weights before the task's training are not known")
                problem = Problem(model, sample.batches, loss, scope=scope, check=False)
                names = {k: f"{k + 1}-*-after-{scope}.npz" for k in range(task_index)}
                earlier = {k: path for k, name in names.items() for path in self._folder.glob(name)}
                measure_update(problem, weights, result, rho=request.rho, earlier=earlier, say=self._say)
            except Exception as failure:
                result.errors[UPDATE] = f"{type(failure).__name__}: {failure}"
            result.seconds = round(result.seconds + time.perf_counter() - began, 3)

    def _tell(self, phase: str, done: float, total: float) -> None:
        if self._progress is not None:
            self._progress(phase, round(done), max(1, round(total)), self._note)

    def _say(self, text: str) -> None:
        self._note = text
        # On a line of its own, although a progress bar may already stand in this one.
        print(f"\nflatpatch: {text}", file=sys.stderr, flush=True)


def describe(
    request: Request,
    results: Mapping[str, ScopeResult],
    *,
    task: str,
    task_index: int,
    when: str,
    sample: Sample,
    terms: list[float],
    weights: str,
    loss_name: str,
    error: str | None,
    seconds: float,
    step: int | None = None,
) -> dict[str, Any]:
    """Return the content of a measuring point's file; see :mod:`flatpatch.measurement.files`."""
    name = files.stem(task_index, task, when)
    scopes = {
        scope: {
            "num_parameters": result.num_parameters,
            "loss": plain(result.loss),
            "values": result.values,
            "results": result.results,
            "errors": result.errors,
            "arrays": f"{files.FOLDER}/{name}-{scope}.npz" if result.arrays else None,
            "seconds": result.seconds,
        }
        for scope, result in results.items()
    }
    return {
        "schema": files.SCHEMA,
        "task": task,
        "task_index": task_index,
        "when": when,
        "step": step,
        "samples": sample.size,
        "batches": terms,
        "sample_seed": SEED,
        "indices": sample.indices,
        "weights": weights,
        "loss": loss_name,
        "request": {**request.as_dict(), "numbers": describe_effort(request)},
        "error": error,
        "scopes": scopes,
        "seconds": round(seconds, 3),
    }


def write(
    folder: Path, name: str, content: Mapping[str, Any], results: Mapping[str, ScopeResult]
) -> list[dict[str, Any]]:
    """Write a measuring point's arrays, then the file that names them.

    Returns:
        Its entries for the run's record.
    """
    for scope, result in results.items():
        if result.arrays:
            files.write_arrays(folder / f"{name}-{scope}.npz", result.arrays)
    files.write_json(folder / f"{name}.json", content)
    return files.entries(content, f"{files.FOLDER}/{name}.json")

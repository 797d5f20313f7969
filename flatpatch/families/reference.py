"""What the reference engines' processes share: SAM around each step, and the files that the hooks write too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.families.recording import Recorder, announce, make_measurer, of_step
from flatpatch.families.resuming import Keeper
from flatpatch.families.sample import Sample
from flatpatch.kinds import make_kind
from flatpatch.measuring import AT_LOSS, Request
from flatpatch.sam import SAM, mixed_seed, trained_lora_pairs

_COUNTED = ("steps", "trainable", "perturbed", "fallbacks", "_trainings")


class StepRecorder:
    """Gives the training loop its SAM and writes the same files as the hook in upstream's code.

    Attributes:
        keeper: Keeps the training's checkpoints, for the loop; None where none are kept.
    """

    def __init__(self, run: dict[str, Any], *, resumes: bool = False) -> None:
        """Begin the files, or go on with those of a process that was cut off.

        Args:
            run: The run's description.
            resumes: Whether this process makes one training, which can go on from its checkpoints.
        """
        self.run = run
        self._told: dict[str, str] = {}
        self.keeper = Keeper(part, tell=self._note) if resumes and (part := run.get("checkpoints")) else None
        self.sam: SAM | None = None
        self.steps = self.trainable = self.perturbed = self._trainings = 0
        self.fallbacks: Tensor | int = 0
        self._measurer = make_measurer(run, self._measuring)
        self._measure_at: Callable[[str], Any] = lambda when: None
        self._task_index = 0
        self._model: torch.nn.Module | None = None
        self._recorder = Recorder(run)
        self._recorder.start(self.keeper.step if self.keeper else 0)
        if self.keeper is not None:
            self._recorder.heeds_stop = not self.keeper.step  # else once the steps taken before are passed over
            self.keeper.add("recorder", self._state, self._put_back)

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._recorder.flush()
        if kind is None:
            summary = {
                "steps": self.steps,
                "ascent_fallbacks": int(self.fallbacks),
                "trainable_parameters": self.trainable,
                "perturbed_parameters": self.perturbed,
                "sam": self.run["sam"]["kind"],
                "launcher": "plain",
                "dtype": "float32",
            }
            self._recorder.write_summary(summary)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the recording, with all steps before it written."""
        self._recorder.settle()
        return {
            "steps": self.steps,
            "fallbacks": int(self.fallbacks),
            "sam": None
            if self.sam is None
            else {"steps": self.sam.steps, "progress": self.sam.progress, "kind": self.sam.kind.state()},
            "measurer": None if self._measurer is None else self._measurer.state(),
        }

    def _put_back(self, kept: dict[str, Any]) -> None:
        self._recorder.heeds_stop = True
        self.steps, self.fallbacks = kept["steps"], kept["fallbacks"]
        if self.sam is not None:
            self.sam.steps, self.sam.progress = kept["sam"]["steps"], kept["sam"]["progress"]
            self.sam.kind.put_back(kept["sam"]["kind"])
        if self._measurer is not None:
            self._measurer.put_back(kept["measurer"])

    def counted(self) -> dict[str, Any]:
        """Return what the summary and the random directions of later tasks depend on, between two tasks."""
        return {name: getattr(self, name) for name in _COUNTED}

    def take_up(self, counted: Mapping[str, Any]) -> None:
        """Go on counting from what another process had counted."""
        for name in _COUNTED:
            setattr(self, name, counted[name])

    def make_gradients(self, optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        """Return the function that leaves the gradient to descend along in ``.grad``."""
        settings = self.run["sam"]
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        everything = [parameter for group in groups.values() for parameter in group]
        self.trainable = sum(parameter.numel() for parameter in everything)
        if settings["kind"] == "off":
            return lambda closure: closure()
        scope = settings["scope"]
        adapters = [parameter for name in ("A", "B") for parameter in groups.get(name, ())]
        choices = {**({"lora": adapters} if adapters else {}), **groups, "all": everything}
        if scope not in choices:
            raise UserError(f"scope={scope}: this model trains no such weights. It has: {', '.join(choices)}.")
        chosen = choices[scope]
        self.perturbed = sum(parameter.numel() for parameter in chosen)
        # A process learns one task, which it is told, or all of them in turn.
        task = self.run["task_index"]
        place = mixed_seed(settings["seed"], self._trainings if task is None else task)
        self._trainings += 1
        kind = make_kind(settings, seed=place)
        radius = settings.get("radius", "factors")
        pairs = None
        if radius == "effective" or kind.of_pairs:
            assert self._model is not None, "the model is told before its training, by measure()"
            pairs = trained_lora_pairs(self._model)
        self.sam = SAM(optimizer, rho=settings["rho"], parameters=chosen, kind=kind, pairs=pairs, radius=radius)
        task_only = settings["ascent_loss"] == "task"
        recorded = settings["kind"] == "recorded"
        share = settings.get("ascent_batch", 1.0) if kind.climbs else 1.0

        def gradients(closure: Callable[..., Tensor]) -> Tensor:
            assert self.sam is not None
            sam = self.sam

            def one_pass() -> Tensor:
                if recorded:  # it clips what it climbs along, which does not matter to a step of a given length
                    return closure(recorded="all" if sam.climbing else "last")
                return closure(penalised=not (sam.climbing and task_only), share=share if sam.climbing else 1.0)

            result: Tensor = self.sam.gradients(one_pass)
            return result

        return gradients

    def on_step(self, state: dict[str, Any], task: str = "") -> None:
        """Write one line of measurements; a process that learns several tasks says which one."""
        self.steps += 1
        measured = {"loss": torch.tensor(state["loss"], dtype=torch.float64)}
        if self.sam is not None:
            self.sam.progress = state["step"] / state["total"]
            report = self.sam.last_step
            self.fallbacks = self.fallbacks + (0 if report is None else ~report.finite)
            measured |= of_step(report)
            if self.sam.perturbed_loss is not None:
                measured["perturbed_loss"] = self.sam.perturbed_loss
        if self._measurer is not None and self._measurer.reaches(self._task_index, state["loss"]):
            self._measure_at(AT_LOSS)
        if self._measurer is not None:
            self._measurer.step(state["step"])
        record = {"task": task or self.run["task"], **{k: state[k] for k in ("step", "learning_rate", "seconds")}}
        self._recorder.add(record, measured)
        if state["step"] == state["total"]:
            self._begin("predict", task)
        else:
            self._progress("train", state, task=task)

    def on_predict(self, state: dict[str, int], task: str = "") -> None:
        """Say how far the prediction is."""
        self._progress("predict", state, task=task)

    def measure(
        self,
        when: str,
        model: torch.nn.Module,
        sample: Callable[[Request], Sample],
        task_index: int,
        task: str,
        loss_of: Callable[[int, str], Any] | None = None,
        **loss: Any,
    ) -> None:
        """Measure a loss on a fixed sample of a task's training data, if asked to at this time.

        Args:
            when: ``before`` or ``after`` the task's training; what is measured in it takes the same.
            model: As it is trained.
            sample: Draws the sample.
            task_index: The task, counted from 0.
            task: Its name.
            loss: ``loss`` and ``loss_name`` where the loss is not the model's own.
            loss_of: From a task's number and name to its loss, where that is not one for all.
        """
        self._model = model
        if self._measurer is not None:
            measured = {"task_index": task_index, "task": task, "model": model, "sample": sample, **loss}
            self._task_index, self._measure_at = task_index, partial(self._measurer.at, **measured)
            if when == "before":
                self._measurer.begin(**measured, loss_of=loss_of)
            else:
                self._measurer.end()
            if when != "before" or self.keeper is None or not self.keeper.step:  # else it was measured already
                self._measure_at(when)
        self._begin("train" if when == "before" else "predict", task)

    def tell(self, text: str) -> None:
        """Print a line for the log, and show it where the run was started."""
        self._note(text)
        self._begin("train")

    def _note(self, text: str) -> None:
        announce(text)
        self._told = {"note": text}

    def _measuring(self, phase: str, step: int, total: int, note: str) -> None:
        self._progress(phase, {"step": step, "total": total}, task="", note=note)

    def _begin(self, phase: str, task: str = "") -> None:
        """Say what comes next, before its first step has been made."""
        self._recorder.write_progress(phase, 0, None, task=task, **self._told)

    def _progress(self, phase: str, state: dict[str, Any], **more: str) -> None:
        if self._recorder.progress_due() or state["step"] == state["total"]:
            self._recorder.flush()
            self._recorder.write_progress(phase, state["step"], state["total"], **{**self._told, **more})

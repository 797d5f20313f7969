"""One task of the reference engine, as a process of its own: the counterpart of one upstream invocation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.recording import MEASURED, Recorder
from flatpatch.families.text import reference
from flatpatch.families.text.reference import ReferenceTask
from flatpatch.families.text.scripts import pairs
from flatpatch.flatness import supervised_loss
from flatpatch.measurement.in_run import IMAGE_LOSS, Measurer, images_sample_of, sample_of
from flatpatch.runner.record import write_atomically
from flatpatch.sam import SAM

if TYPE_CHECKING:
    from flatpatch.families.vision import reference as vision

SECONDS_BETWEEN_PROGRESS = 0.5


def main(words: Sequence[str]) -> int:
    """Train and evaluate one task as the arguments say, with the SAM of the hook's settings."""
    arguments = {name: value or "" for name, value in pairs(list(words))}
    try:
        task = read_task(arguments)
        task.output_dir.mkdir(parents=True, exist_ok=True)
        with StepRecorder(json.loads(Path(os.environ["FLATPATCH_RUN"]).read_text(encoding="utf-8"))) as recorder:
            reference.run_task(
                task,
                make_gradients=recorder.make_gradients,
                on_step=recorder.on_step,
                on_predict=recorder.on_predict,
                at=recorder.measure,
            )
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_task(arguments: dict[str, str]) -> ReferenceTask:
    """Turn upstream-style arguments into the reference engine's own, ignoring those it has no use for."""
    configs = Path(arguments["task_config_dir"])
    previous = Path(arguments["model_name_or_path"])
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    types = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(ReferenceTask)}
    plain = {name: kinds[text](arguments[name]) for name, text in types.items() if name in arguments and text in kinds}
    return ReferenceTask(
        model=Path(arguments["base_model"]),
        data_dir=Path(arguments["data_dir"]),
        task=_datasets(configs / "train_tasks.json")[0],
        eval_tasks=_datasets(configs / "test_tasks.json"),
        output_dir=Path(arguments["output_dir"]),
        previous=previous if previous.name == "adapter" else None,
        device="cuda" if torch.cuda.is_available() else "cpu",
        **plain,
    )


def _datasets(path: Path) -> tuple[tuple[str, str], ...]:
    config = json.loads(path.read_text(encoding="utf-8"))
    return tuple((kind, entry["dataset name"]) for kind, entries in config.items() for entry in entries)


class StepRecorder:
    """Gives the training loop its SAM and writes the same files as the hook in upstream's code."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.sam: SAM | None = None
        self.steps = self.trainable = self.perturbed = 0
        self.fallbacks: Tensor | int = 0
        self._written = 0.0
        self._measurer = Measurer(run, progress=self._measuring)
        self._recorder = Recorder(run)
        self._recorder.start()

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
                "threads": torch.get_num_threads(),
            }
            write_atomically(Path(self.run["summary"]), json.dumps(summary, indent=2))

    def make_gradients(self, optimizer: torch.optim.Optimizer) -> Callable[[Callable[..., Tensor]], Tensor]:
        """Return the function that leaves the gradient to descend along in ``.grad``."""
        settings = self.run["sam"]
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        everything = [parameter for group in groups.values() for parameter in group]
        self.trainable = sum(parameter.numel() for parameter in everything)
        if settings["kind"] == "off":
            return lambda closure: closure()
        scope = settings["scope"]
        if scope not in ("lora", "all", *groups):
            raise UserError(f"scope={scope}: this model trains no such weights. It has: lora, {', '.join(groups)}.")
        adapters = [parameter for name, group in groups.items() if name != "head" for parameter in group]
        chosen = {"all": everything, "lora": adapters, **groups}[scope]
        self.perturbed = sum(parameter.numel() for parameter in chosen)
        adaptive = settings["kind"] == "asam"
        self.sam = SAM(optimizer, rho=settings["rho"], adaptive=adaptive, eta=settings["eta"], parameters=chosen)
        task_only = settings["ascent_loss"] == "task"

        def gradients(closure: Callable[..., Tensor]) -> Tensor:
            assert self.sam is not None
            passes = 0

            def one_pass() -> Tensor:
                nonlocal passes
                passes += 1
                return closure(penalised=passes == 2 or not task_only)

            result: Tensor = self.sam.gradients(one_pass)
            return result

        return gradients

    def on_step(self, state: dict[str, Any], task: str = "") -> None:
        """Write one line of measurements; a process that learns several tasks says which one."""
        self.steps += 1
        measured = {"loss": torch.tensor(state["loss"], dtype=torch.float64)}
        if self.sam is not None and self.sam.last_step is not None:
            report = self.sam.last_step
            self.fallbacks = self.fallbacks + ~report.finite
            measured |= {name: getattr(report, name) for name in MEASURED if hasattr(report, name)}
            measured["perturbed_loss"] = self.sam.perturbed_loss
        record = {"task": task or self.run["task"], **{k: state[k] for k in ("step", "learning_rate", "seconds")}}
        self._recorder.add(record, measured)
        self._progress("train", state, state["loss"], task)
        if state["step"] == state["total"]:
            self._begin("predict", task)

    def on_predict(self, state: dict[str, int], task: str = "") -> None:
        """Say how far the prediction is."""
        self._progress("predict", state, None, task)

    def measure(self, when: str, model: torch.nn.Module, examples: Sequence[Any], collate: Callable[..., Any]) -> None:
        """Measure the task loss on a fixed sample of the training data, if asked to at this time."""
        sample = sample_of(examples, collate)
        self._measurer.at(when, task_index=self.run["task_index"], task=self.run["task"], model=model, sample=sample)
        self._begin("train" if when == "before" else "predict")

    def measure_images(self, when: str, state: vision.TaskState, task: str) -> None:
        """Measure the cross-entropy over a task's classes on the images that upstream's hook would draw."""
        images = state.tasks[state.index]
        self._measurer.at(
            when,
            task_index=state.index,
            task=task,
            model=state.model,
            sample=images_sample_of(images.train, images.classes.start),
            loss=supervised_loss(F.cross_entropy),
            loss_name=IMAGE_LOSS,
        )
        if when == "before":
            self._begin("train", task)

    def _measuring(self, phase: str, step: int, total: int, note: str) -> None:
        self._progress(phase, {"step": step, "total": total}, None, "", note=note)

    def _begin(self, phase: str, task: str = "") -> None:
        """Say what comes next, before its first step has been made."""
        self._written = -math.inf
        self._progress(phase, {"step": 0, "total": None}, None, task)

    def _progress(self, phase: str, state: dict[str, Any], loss: float | None, task: str, **more: str) -> None:
        step, total = state["step"], state["total"]
        if step == total or time.monotonic() - self._written > SECONDS_BETWEEN_PROGRESS:
            self._written = time.monotonic()
            text = json.dumps({"phase": phase, "step": step, "total": total, "loss": loss, "task": task} | more)
            write_atomically(Path(self.run["progress"]), text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

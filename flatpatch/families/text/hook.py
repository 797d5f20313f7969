"""The hook in a Hugging Face Trainer: SAM around its training step, and a record of each step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatpatch import timing
from flatpatch.contract import VARIABLE, read_description
from flatpatch.errors import FlatpatchError
from flatpatch.families.recording import MEASURED, Recorder, announce, counts, describe, dtypes, make_measurer, of_step
from flatpatch.families.resuming import Alone, Keeper, Several
from flatpatch.families.text.resuming import KeptLoop
from flatpatch.kinds import make_kind
from flatpatch.measuring import AT_LOSS

# Summed over the micro-batches of a step, whose losses are each divided by their number; the others are averaged.
_SUMMED = ("loss", "perturbed_loss", "grad_norm")


def attach_trainer(trainer: Any) -> None:
    """Make a Hugging Face Trainer train with SAM, as the run says, and record each step.

    With ``"kind": "off"`` training stays bit for bit as it was, and is only recorded.

    Args:
        trainer: A ``transformers.Trainer`` (4.28) or subclass, built and not yet training.

    Raises:
        UserError: If the run's description is not valid.
        FlatpatchError: If the trainer lacks what this hook attaches to.
    """
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    run = read_description(Path(path))
    missing = [
        name
        for name in (
            "training_step",
            "compute_loss",
            "add_callback",
            "is_world_process_zero",
            "_maybe_log_save_evaluate",
        )
        if not callable(getattr(trainer, name, None))
    ]
    if missing:
        raise FlatpatchError(
            f"flatpatch.hooks.attach_trainer: {type(trainer).__name__} has no {', '.join(missing)}. Expected a "
            "transformers 4.28 Trainer; the upstream or its library has changed, so the patch needs a refresh."
        )
    from flatpatch import sam

    if run["adapters"] == "fp32":
        sam.keep_adapters_fp32(trainer.model)
    settings, step = run["sam"], None
    if settings["kind"] != "off":
        kind = make_kind(settings, seed=sam.mixed_seed(settings["seed"], run["task_index"]))
        names = ("rho", "scope", "sync", "ascent_loss", "ascent_batch", "radius")
        options = {name: settings[name] for name in names if name in settings}
        step = sam.SAMTrainingStep(trainer, kind=kind, **options)
    recording = _RecordedTraining(trainer, run, step)
    trainer.training_step = recording.training_step
    trainer.add_callback(recording)


def trainer_loss(trainer: Any) -> Any:
    """Compute the loss that a Hugging Face Trainer computes, which also says what it divides by.

    The LLaMA of N-LoRA and O-LoRA divides by the sum of the batch's ``loss_mask`` (src/model/llama.py at the pin), T5
    by the labels that are not ignored, and so does the Trainer's label smoothing, which passes over a model's own loss.

    Args:
        trainer: Has ``compute_loss`` and ``label_smoother``.

    Returns:
        A :class:`flatpatch.flatness.WeightedLoss`: the mean of a batch, without the penalties of ``training_step``.
    """
    from flatpatch.flatness import WeightedLoss, count_terms

    def terms(batch: Any) -> float:
        mask = None if trainer.label_smoother is not None else batch.get("loss_mask")
        return count_terms(batch) if mask is None else float(mask.sum())

    return WeightedLoss(lambda model, batch: trainer.compute_loss(model, dict(batch)), terms)


class _RecordedTraining:
    """Stands in for ``training_step`` and listens as a trainer callback; writes what happens, on the first process.

    Changes nothing of the training: results are kept as tensors and fetched from the device a few steps at a time.
    """

    def __init__(self, trainer: Any, run: Mapping[str, Any], step: Any) -> None:
        self._trainer = trainer
        self._run = run
        self._sam = step
        self._plain_step: Callable[..., Any] = trainer.training_step if step is None else step
        self._writes = bool(trainer.is_world_process_zero())
        self._recorder = Recorder(run)
        self._micro_steps: list[dict[str, Any]] = []
        self._learning_rate: float | None = None
        self._began: timing.Moment | None = None
        self._steps = 0
        self._predicted = 0
        self._predicting: Any = None
        self._measurer = make_measurer(run, self._write_measuring)
        self._note: dict[str, str] = {}
        self._keeper: Keeper | None = None
        self._loop: KeptLoop | None = None
        if part := run.get("checkpoints"):
            processes = Several() if trainer.args.world_size > 1 else Alone()
            self._keeper = Keeper(part, tell=self._tell, processes=processes)
            self._keeper.add("recorder", self._state, self._put_back)
            self._loop = KeptLoop(trainer, self._keeper)

    def __getattr__(self, name: str) -> Any:
        """Ignore the callback events that are not listened to."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(name)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step and keep its loss and measurements."""
        if self._is_passing():
            return _no_loss(self._trainer.args.device)
        if self._learning_rate is None:
            self._learning_rate = _learning_rate(self._trainer)
        loss = self._plain_step(*args, **kwargs)
        if self._writes:
            measured = {"loss": loss.detach()}
            if self._sam is not None:
                if self._sam.perturbed_loss is not None:
                    measured["perturbed_loss"] = self._sam.perturbed_loss.detach()
                measured |= of_step(self._sam.last_step)
            self._micro_steps.append(measured)
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what is about to happen, and start or continue the record."""
        perturbed = [] if self._sam is None else self._sam.parameters()
        moved = [] if self._sam is None or self._sam.kind.of_pairs else perturbed
        trainable = [p for p in self._trainer.model.parameters() if p.requires_grad]
        self._counts = counts(trainable, moved)
        self._dtype = dtypes(perturbed or trainable)
        taken = state.global_step if self._keeper is None else self._keeper.step
        if self._writes:
            announce(self._liveness())
            self._recorder.start(taken)
            self._began = None
            if taken == 0:
                self._measure("before")
            if self._measurer is not None:
                self._measurer.begin(**self._measured())
        if self._loop is not None:
            keeps = self._loop.begin()
            self._recorder.heeds_stop = keeps and not self._loop.passing
        if self._writes:
            self._write_progress(taken, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        # An epoch may end within a step, whose other micro-batches are then the next epoch's first.
        if self._writes and self._began is None:
            self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the step's measurements in the queue."""
        self._steps = state.global_step
        micro_steps, self._micro_steps = self._micro_steps, []
        learning_rate, self._learning_rate = self._learning_rate, None
        began, self._began = self._began, None
        if began is None or self._is_passing():
            return
        record = {
            "task": self._run["task"],
            "step": state.global_step,
            "learning_rate": learning_rate,
            "seconds": timing.Span(began, self._now()),
        }
        measured = _combined(micro_steps, self._trainer.args.device)
        self._recorder.add(record, measured)
        # Only where it is watched does the loss wait for the device.
        watched = self._measurer is not None and self._measurer.wants(AT_LOSS)
        if watched and self._measurer.reaches(self._run["task_index"], float(measured["loss"])):
            self._measure(AT_LOSS)
        if self._measurer is not None:
            self._measurer.step(state.global_step)
        if self._recorder.progress_due():
            self._recorder.flush()
            self._write_progress(state.global_step, state.max_steps)

    def _is_passing(self) -> bool:
        return self._loop is not None and self._loop.passing

    def _tell(self, text: str) -> None:
        """Print a line for the log, and show it where the run was started."""
        announce(text)
        self._note = {"note": text}

    def _write_progress(self, step: int, total: int) -> None:
        self._recorder.write_progress("train", step, total, **self._note)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the recording, with all steps before it written."""
        if self._writes:
            self._recorder.settle()
        fallbacks = None if self._sam is None else self._sam.fallbacks
        return {
            "fallbacks": fallbacks,
            "sam": {} if self._sam is None else self._sam.kind.state(),
            "measurer": None if self._measurer is None else self._measurer.state(),
        }

    def _put_back(self, kept: Mapping[str, Any]) -> None:
        self._recorder.heeds_stop = True
        if self._writes and self._keeper is not None:
            self._write_progress(self._keeper.step, self._trainer.state.max_steps)
        if self._sam is not None:
            self._sam.kind.put_back(kept["sam"])
            if kept["fallbacks"] is not None:
                self._sam.fallbacks = kept["fallbacks"].to(self._trainer.args.device)
        if self._measurer is not None:
            self._measurer.put_back(kept["measurer"])

    def _now(self) -> timing.Moment:
        return timing.Moment(self._trainer.args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what is left, and the summary."""
        if not self._writes:
            return
        self._recorder.flush()
        fallbacks = None if self._sam is None else self._sam.fallbacks
        summary = {
            "steps": self._steps,
            "ascent_fallbacks": 0 if fallbacks is None else int(fallbacks),
            **self._counts,
            "sam": self._describe(),
            "launcher": _launcher(self._trainer),
            "dtype": self._dtype,
        }
        if self._measurer is not None:
            self._measurer.end()
        self._measure("after")
        self._recorder.write_summary(summary)
        if getattr(args, "do_predict", False):  # saving, loading and the first batch come before any count of batches
            self._recorder.write_progress("predict", 0, None)
        else:
            self._write_progress(state.global_step, state.max_steps)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Count the batches of an evaluation or prediction."""
        if eval_dataloader is not self._predicting:
            self._predicting, self._predicted = eval_dataloader, 0
        self._predicted += 1
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        if self._writes and (self._recorder.progress_due() or self._predicted == total):
            self._recorder.write_progress("predict", self._predicted, total)

    def _measure(self, when: str) -> None:
        """Measure at this point of the training, if asked to."""
        if self._measurer is not None and self._measurer.wants(when):
            self._measurer.at(when, **self._measured())

    def _measured(self) -> dict[str, Any]:
        """Return what is measured: the task loss, as the trainer computes it, on a fixed sample."""
        from flatpatch.families.sample import sample_of

        trainer = self._trainer
        collator = copy.copy(trainer.data_collator)
        if getattr(collator, "input_record_file", None):
            collator.input_record_file = None  # upstream's log of what it trains on
        return {
            "task_index": self._run["task_index"],
            "task": self._run["task"],
            "model": trainer.model,
            "sample": sample_of(trainer.train_dataset, collator),
            "loss": trainer_loss(trainer),
            "loss_name": "the trainer's compute_loss, without the penalties that training_step adds",
        }

    def _write_measuring(self, phase: str, step: int, total: int, note: str) -> None:
        if self._recorder.progress_due():
            self._recorder.write_progress(phase, step, total, note=note)

    def _liveness(self) -> str:
        perturbed, trainable = self._counts["perturbed_parameters"], self._counts["trainable_parameters"]
        where = f"task {self._run['task_index'] + 1} {self._run['task']}"
        on = f" on {perturbed:,} of {trainable:,} trainable parameters" if perturbed else ""
        return f"{self._describe()}{on} ({self._dtype}), {where}"

    def _describe(self) -> str:
        return describe(self._run["sam"], "sync", "ascent_loss")


def _no_loss(device: Any) -> Any:
    """Return the loss of a step that is passed over."""
    import torch

    return torch.zeros((), device=device)


def _ignore(*_: Any, **__: Any) -> None:
    return None


def _learning_rate(trainer: Any) -> float | None:
    groups = getattr(trainer.optimizer, "param_groups", None)
    return float(groups[0]["lr"]) if groups else None


def _combined(micro_steps: list[dict[str, Any]], device: Any) -> dict[str, Any]:
    """One 0-dimensional float64 tensor per measurement of a step: sums of losses, means of the others."""
    import torch

    combined = {}
    for name in MEASURED:
        values = [step[name].to(device, torch.float64) for step in micro_steps if name in step]
        if values:
            total = torch.stack(values).sum()
            combined[name] = total if name in _SUMMED else total / len(values)
    return combined


def _launcher(trainer: Any) -> str:
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        return f"deepspeed-zero{engine.zero_optimization_stage()}"
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(getattr(trainer, "model_wrapped", None), DistributedDataParallel):
        return "ddp"
    return "data-parallel" if getattr(trainer.args, "n_gpu", 0) > 1 else "plain"

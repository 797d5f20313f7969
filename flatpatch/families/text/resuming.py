"""How a Hugging Face Trainer (4.28) goes on from a checkpoint: its own loop passes over the steps that were taken.

The Trainer's saving knows nothing of SAM and of what is recorded, and with torch 2.8 it cannot read its own random
state. So the loop runs from the start, as ever, and draws the same batches in the same order; but up to the
checkpoint's step a training step does nothing, and there are no optimizer and no schedule to step. After that step
everything is put back as it was, the random generators last.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from flatpatch.families.recording import announce
from flatpatch.families.resuming import Keeper, put_weights, trained_weights

_OF_STATE = ("total_flos", "log_history", "best_metric", "best_model_checkpoint")
_OF_LOOP = ("_total_loss_scalar", "_globalstep_last_logged", "current_flos")
_OF_ENGINE = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_AFTER_STEP = "_maybe_log_save_evaluate"


class KeptLoop:
    """Has a trainer's loop keep checkpoints, and pass over the steps that the newest one holds.

    Attributes:
        passing: Whether the loop is at a step that the checkpoint holds.
    """

    def __init__(self, trainer: Any, keeper: Keeper) -> None:
        """Listen to what the loop does after each step.

        Args:
            trainer: Built and not yet training.
            keeper: Of this training.
        """
        self.passing = False
        self._trainer = trainer
        self._keeper = keeper
        self._stepped: dict[str, Any] = {}
        self._loss: Any = None
        self._keeps = False
        self._ended = keeper.step
        self._plain = getattr(trainer, _AFTER_STEP)
        setattr(trainer, _AFTER_STEP, self._after_step)

    def begin(self) -> bool:
        """Prepare for the loop, which is about to take its first step; tell whether checkpoints can be kept of it."""
        trainer, keeper = self._trainer, self._keeper
        self._keeps = can_keep(trainer)
        if not self._keeps:
            announce("no checkpoints within this task: its optimizer or its best model is kept where we do not look")
            return False
        keeper.add("weights", partial(trained_weights, trainer.model), partial(put_weights, trainer.model))
        if trainer.deepspeed is None:
            keeper.add("optimizer", trainer.optimizer.state_dict, trainer.optimizer.load_state_dict)
        else:
            keeper.add("engine", partial(_engine_state, trainer.deepspeed), partial(_put_engine, trainer.deepspeed))
        keeper.add("lr_scheduler", trainer.lr_scheduler.state_dict, trainer.lr_scheduler.load_state_dict)
        if scaler := getattr(trainer, "scaler", None):
            keeper.add("scaler", scaler.state_dict, scaler.load_state_dict)
        keeper.add("loop", self._state, self._put_back)
        if keeper.step:
            self.passing = True
            nothing = _Nothing()
            instead = {"optimizer": nothing, "lr_scheduler": nothing, "deepspeed": None, "do_grad_scaling": False}
            self._stepped = {name: getattr(trainer, name) for name in instead}
            vars(trainer).update(instead)
        return True

    def _after_step(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        """Stand in for what the loop calls after each step and each epoch, when all of the step is done but logging."""
        trainer, self._loss = self._trainer, loss
        step: int = trainer.state.global_step
        if self.passing:
            control = trainer.control
            control.should_log = control.should_evaluate = control.should_save = False
            if step == self._keeper.step:
                vars(trainer).update(self._stepped)
                self._keeper.go_on()
                self.passing = False
            return
        self._plain(loss, *args, **kwargs)
        if self._keeps and step != self._ended:  # an epoch's end ends no step
            self._ended = step
            self._keeper.step_ended(step, last=step >= trainer.state.max_steps)

    def _state(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "state": {name: getattr(trainer.state, name) for name in _OF_STATE},
            "loop": {name: getattr(trainer, name) for name in _OF_LOOP},
            "loss": self._loss.detach().clone(),
        }

    def _put_back(self, kept: Mapping[str, Any]) -> None:
        for owner, values in ((self._trainer.state, kept["state"]), (self._trainer, kept["loop"])):
            for name, value in values.items():
                setattr(owner, name, value)
        self._loss.copy_(kept["loss"])


def _engine_state(engine: Any) -> dict[str, Any]:
    """Return what DeepSpeed's engine (0.15) keeps beside the weights, at the end of a step: this process's part."""
    state = {"counts": {name: getattr(engine, name) for name in _OF_ENGINE}, "optimizer": _base(engine).state_dict()}
    if _is_partitioned(engine):
        state["masters"] = [weights.detach() for weights in engine.optimizer.single_partition_of_fp32_groups]
        state["scale"] = {k: v for k, v in vars(engine.optimizer.loss_scaler).items() if isinstance(v, int | float)}
    return state


def _put_engine(engine: Any, kept: Mapping[str, Any]) -> None:
    vars(engine).update(kept["counts"])
    base = _base(engine)
    before = _steps_of(base)
    base.load_state_dict(kept["optimizer"])
    if hasattr(base, "ds_opt_adam"):
        _count_up(base, before)
    if _is_partitioned(engine):
        for weights, values in zip(engine.optimizer.single_partition_of_fp32_groups, kept["masters"], strict=True):
            weights.data.copy_(values)
        vars(engine.optimizer.loss_scaler).update(kept["scale"])


def _steps_of(optimizer: Any) -> list[int]:
    """Return how many steps each of an optimizer's weights has taken."""
    weights = [each for group in optimizer.param_groups for each in group["params"]]
    return [int(optimizer.state[each].get("step", 0)) if each in optimizer.state else 0 for each in weights]


def _count_up(optimizer: Any, before: list[int]) -> None:
    """Bring the powers of beta that DeepSpeed's Adam for the CPU keeps in C++ to where they were.

    It multiplies them up step by step, which rounds otherwise than a power, and no state has them. So it takes the
    steps again, on a weight of its own.

    Args:
        optimizer: With the state that was kept.
        before: How many steps each weight had taken in this process.
    """
    import torch

    after = _steps_of(optimizer)
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for step in range(min(before, default=0) + 1, max(after, default=0) + 1):
        for group, first, last in zip(groups, before, after, strict=True):
            if first < step <= last:
                rest = (group["eps"], group["weight_decay"], group["bias_correction"])
                scratch = (torch.zeros(1) for _ in range(4))
                optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, group["lr"], *group["betas"], *rest, *scratch)


def _is_partitioned(engine: Any) -> bool:
    """Tell whether it is ZeRO's optimizer of stages 1 and 2, with a part of the weights in fp32 in each process."""
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _base(engine: Any) -> Any:
    """Return the optimizer in the engine that takes the steps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def can_keep(trainer: Any) -> bool:
    """Tell whether the whole state of a trainer is known.

    DeepSpeed has optimizers that are not, and the best model of a training so far is in files that are not kept.
    """
    if trainer.args.load_best_model_at_end:
        return False
    engine = trainer.deepspeed
    return engine is None or _is_partitioned(engine) or not hasattr(engine.optimizer, "optimizer")


class _Nothing:
    """An optimizer, and a schedule, of the steps that are passed over."""

    def step(self) -> None:
        """Do nothing."""

"""The hooks in a training loop written out by hand: SAM around each of its steps, a record of each, checkpoints.

The loop's own forward and backward pass is the first of SAM's two. Between its ``backward()`` and its ``step()`` the
hook takes the second: at the perturbed weights it computes the loss that the loop computed, and leaves the gradient
found there. So every statement of upstream still runs, in its order, and ``step()`` is upstream's own.

After each task a checkpoint takes all that upstream's learner holds, whatever it is: network, lists that grow, memory.
A process started again makes learner and data as ever, takes up what the learner held, and leaves out the tasks done.
Only gradients are not in it: upstream clears them before it takes others.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flatpatch import timing
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.recording import Recorder, announce, counts, describe, dtypes, make_measurer, of_step
from flatpatch.families.resuming import set_random_state
from flatpatch.families.task_checkpoints import TaskCheckpoints
from flatpatch.families.vision.keeping import keep_model, kept_file
from flatpatch.families.vision.places import log_files, vision_run
from flatpatch.kinds import Kind, make_kind, of_pairs
from flatpatch.measuring import AT_LOSS


def begin_task(learner: Any, optimizer: Any, loader: Any, epochs: int, steps_per_batch: int = 1) -> None:
    """Say that a task's training begins.

    Args:
        learner: Has ``_network``, ``_cur_task`` (0-based) and ``args``.
        optimizer: Does the steps of this task.
        loader: The task's batches.
        epochs: How often they are gone through.
        steps_per_batch: Optimizer steps that a batch takes.

    Raises:
        UserError: If the scope chooses no weight.
    """
    run = vision_run()
    if run is None:
        return
    training = _begun(run)
    training.begin_task(learner, optimizer, loader, epochs * len(loader) * steps_per_batch, steps_per_batch > 1)


def first_pass(name: str = "task") -> None:
    """Say that the first forward pass for a loss comes next. A batch begins with the one for "task".

    Args:
        name: Which loss it is: "task" or "distillation".
    """
    if vision_run() is not None:
        _training().first_pass(name)


def second_pass(optimizer: Any, loss: Any, again: Callable[[], Any], name: str = "task") -> None:
    """Take SAM's second pass, if this step has one, between upstream's ``backward()`` and ``step()``.

    Args:
        optimizer: Upstream's; its gradients are those of ``loss``.
        loss: What upstream has differentiated.
        again: Computes the same loss anew, at the weights as they then are.
        name: Which loss it is: "task" or "distillation".

    Raises:
        UserError: If the loss depends on no weight of the scope.
    """
    if vision_run() is not None:
        _training().second_pass(optimizer, loss, again, name)


def end_task() -> None:
    """Say that a task's training has ended."""
    if vision_run() is not None:
        _training().end_task()


def done_before(learner: Any, task: int, *curves: Any) -> bool:
    """Tell whether a process that was stopped had done a task; before the first, put back what it held after the last.

    Args:
        learner: As upstream has just made it, where ``task`` is 0; has ``args``.
        task: Counted from 0.
        curves: The lists and dictionaries of upstream's loop that grow from task to task.
    """
    run = vision_run()
    return run is not None and run.get("checkpoints") is not None and _begun(run).done_before(learner, task, curves)


def task_done(learner: Any, manager: Any, files: str = "") -> None:
    """Say that a task is learned, answered and logged: write the checkpoint with which the next one may begin.

    Args:
        learner: As the next task finds it.
        manager: Upstream's manager of the data, which every process makes anew.
        files: How the paths of the files begin that the learner reads in the next task; empty where it reads none.
    """
    run = vision_run()
    if run is not None and run.get("checkpoints") is not None:
        _training().task_done(learner, manager, files)


def classification_loss(network: Any, inputs: Any, targets: Any, classes: int | None = None) -> Any:
    """Compute the cross-entropy over the classes of the task.

    Args:
        network: Upstream's, or its DataParallel.
        inputs: Images, ``(batch, 3, height, width)``.
        targets: Classes counted from the task's first, ``(batch,)``.
        classes: How many the task has; some networks also give logits of earlier classes, which come first.

    Returns:
        The mean over the batch.
    """
    from torch.nn.functional import cross_entropy

    logits = network(inputs)["logits"]
    return cross_entropy(logits if classes is None else logits[:, -classes:], targets)


_trainings: list[_Training] = []  # at most one; a process has one run


def _begun(run: dict[str, Any]) -> _Training:
    if not _trainings:
        _trainings.append(_Training(run))
    return _trainings[0]


def _training() -> _Training:
    if not _trainings:
        raise FlatpatchError("a hook of the training loop was called before begin_task; the patch needs a refresh.")
    return _trainings[0]


class _Training:
    """One process's training: all tasks of all seeds."""

    def __init__(self, run: dict[str, Any]) -> None:
        self._run = run
        self._settings = run["sam"]
        self._sharpened = self._settings["kind"] != "off"
        self._sharpened_steps = run["vision"]["sam_on"]
        self._recorder = Recorder(run)
        self._checkpoints = TaskCheckpoints(run)
        self._before = self._checkpoints.restore()
        self._seeds: list[dict[str, Any]] = []  # in turn: how many tasks are done, curves, logs
        self._tasks: list[dict[str, Any]] = []
        if self._before is None:
            self._recorder.start()
        else:
            self._tasks = self._before["tasks"]
        self._pending: tuple[str, dict[str, Any]] | None = None
        self._earlier: list[tuple[Any, Any]] = []
        self._random_states: dict[str, Any] = {}
        self._measurer = make_measurer(run, self._write_measuring)

    def done_before(self, learner: Any, task: int, curves: Sequence[Any]) -> bool:
        if task == 0:
            self._seeds.append({"seed": learner.args["seed"], "done": 0, "curves": curves})
            self._take_up(learner, self._seeds[-1])
        done: int = self._seeds[-1]["done"]
        return task < done

    def _take_up(self, learner: Any, now: dict[str, Any]) -> None:
        """Put back what a seed's tasks had left, if any were done before."""
        before, place = self._before, len(self._seeds) - 1
        if before is None or place >= len(before["seeds"]):
            return
        then = before["seeds"][place]
        if then["seed"] != now["seed"]:
            raise FlatpatchError(f"the checkpoint is of seed {then['seed']}, and this is seed {now['seed']}.")
        now.update(done=then["done"], logs=then["logs"])
        for curve, values in zip(now["curves"], then["curves"], strict=True):
            curve.clear()
            curve.update(values) if isinstance(curve, dict) else curve.extend(values)
        # The settings, which this process has logged so far, are at the beginning of what was logged then.
        for log, content in zip(log_files(), then["logs"], strict=True):
            log.write_bytes(content)
        if place == len(before["seeds"]) - 1:
            vars(learner).update(before["learner"])
            set_random_state(before["random"])
            self._before = None
            self._drop_models(now["done"])

    def _drop_models(self, done: int) -> None:
        """Remove the models of tasks that are learned again."""
        for task in range(done, len(self._run["tasks"])) if self._run.get("keep") is not None else ():
            with suppress(OSError):
                kept_file(Path(self._run["keep"]["folder"]), task).unlink()

    def task_done(self, learner: Any, manager: Any, files: str) -> None:
        from torch.utils.data import DataLoader, Dataset

        now = self._seeds[-1]
        now["done"] += 1
        now["logs"] = [log.read_bytes() for log in log_files()]
        # All that the learner holds but the data, which are the process's, and its arguments, which are the command's.
        held = {
            name: value
            for name, value in vars(learner).items()
            if not (value is manager or value is learner.args or isinstance(value, (DataLoader, Dataset)))
        }
        found = [Path(path) for path in sorted(glob.glob(f"{glob.escape(files)}*"))] if files else []
        state = {"seeds": self._seeds, "tasks": self._tasks, "learner": held}
        self._checkpoints.write(sum(seed["done"] for seed in self._seeds), state, found)

    def begin_task(self, learner: Any, optimizer: Any, loader: Any, total: int, several_steps: bool) -> None:
        from flatpatch.sam import select_parameters, trained_lora_pairs

        named = [(name, p) for name, p in learner._network.named_parameters() if p.requires_grad]
        chosen = select_parameters(named, self._settings["scope"]) if self._sharpened else []
        self._perturbed = [parameter for _, parameter in chosen]
        self._trainable = [parameter for _, parameter in named]
        self._task, self._seed = self._run["tasks"][learner._cur_task], learner.args["seed"]
        self._step, self._total = 0, total
        self._several_steps = several_steps
        self._fallbacks: Any = 0
        self._kinds: dict[str, Kind] = {}
        self._radius = self._settings.get("radius", "factors")
        by_pairs = self._sharpened and (self._radius == "effective" or of_pairs(self._settings["kind"]))
        self._pairs = trained_lora_pairs(learner._network) if by_pairs else None
        moved = [] if of_pairs(self._settings["kind"]) else self._perturbed
        self._counts = counts(self._trainable, moved)
        self._dtype = dtypes(self._perturbed or self._trainable)
        self._launcher = "data-parallel" if hasattr(learner._network, "device_ids") else "plain"
        self._learner, self._dataset = learner, getattr(loader, "dataset", None)
        optimizer.register_step_post_hook(self._after_step)
        perturbed, trainable = self._counts["perturbed_parameters"], self._counts["trainable_parameters"]
        on = f" on {perturbed:,} of {trainable:,} trainable parameters" if self._sharpened and moved else ""
        announce(f"{self._describe()}{on} ({self._dtype}), {self._task}, seed {self._seed}")
        self._measure("before")
        if self._measurer is not None:
            self._measurer.begin(**self._measured())
        self._recorder.write_progress("train", 0, total, task=self._task)

    def first_pass(self, name: str) -> None:
        if name == "task":
            self._began = self._now()
        if not self._sharpened:
            return
        from flatpatch.sam import RandomState

        self._random_states[name] = RandomState()
        if name == "task" and self._several_steps:
            self._earlier = [(weight, weight.detach().clone()) for weight in self._trainable]

    def second_pass(self, optimizer: Any, loss: Any, again: Callable[[], Any], name: str) -> None:
        measured = {"loss": loss.detach()}
        if self._sharpened and self._sharpened_steps in ("both", name):
            measured |= self._sharpen(optimizer, loss, again, name)
        self._pending = (name, measured)

    def _sharpen(self, optimizer: Any, loss: Any, again: Callable[[], Any], name: str) -> dict[str, Any]:
        from flatpatch.families.vision.passes import LoopPasses
        from flatpatch.sam import RandomState, group_radii

        if all(weight.grad is None for weight in self._perturbed):
            raise UserError(
                f"the {name} loss depends on none of the {len(self._perturbed)} tensors that "
                f"scope={self._settings['scope']} chooses. Choose another scope, or the other step alone with sam_on."
            )
        # Upstream computed its distillation loss with the weights that are there, its task loss with earlier ones.
        earlier = self._earlier if name == "task" else []
        now = [weight.detach().clone() for weight, _ in earlier]
        random_state = RandomState()
        passes = LoopPasses(
            self._perturbed,
            self._trainable,
            loss=loss,
            again=again,
            at=lambda: _as_before_the_other_step(earlier, now),
            random_state=self._random_states[name],
            radii=group_radii(optimizer, self._perturbed, self._settings["rho"]),
            place=(self._learner._cur_task, self._step),
            optimizer=optimizer,
            pairs=self._pairs,
            radius=self._radius,
            progress=self._step / self._total,
        )
        self._kind_for(name).step(passes)
        random_state.restore()
        if passes.report is not None:
            self._fallbacks = self._fallbacks + ~passes.report.finite
        measured = {} if passes.perturbed_loss is None else {"perturbed_loss": passes.perturbed_loss}
        return {**measured, **of_step(passes.report)}

    def _kind_for(self, name: str) -> Kind:
        """Return the kind of SAM of one of a batch's steps; each remembers its own steps, and no other task's."""
        if name not in self._kinds:
            self._kinds[name] = make_kind(self._settings, seed=self._settings["seed"])
        return self._kinds[name]

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self._pending is None:
            raise FlatpatchError("upstream took a step without flatpatch.hooks.second_pass; the patch needs a refresh.")
        (name, measured), self._pending = self._pending, None
        self._step += 1
        ended = self._now()
        record = {
            "task": self._task,
            "step": self._step,
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
            "seconds": timing.Span(self._began, ended),
            "seed": self._seed,
            "loss_name": name,
        }
        self._began = ended
        self._recorder.add(record, measured)
        # Only where it is watched does the loss wait for the device.
        watched = name == "task" and self._measurer is not None and self._measurer.wants(AT_LOSS)
        if watched and self._measurer.reaches(self._learner._cur_task, float(measured["loss"])):
            self._measure(AT_LOSS)
        if self._measurer is not None:
            self._measurer.step(self._step)
            self._began = self._now()
        if self._recorder.progress_due():
            self._recorder.flush()
            self._recorder.write_progress("train", self._step, self._total, task=self._task)

    def _now(self) -> timing.Moment:
        return timing.Moment(self._trainable[0].device)

    def _describe(self) -> str:
        on = self._sharpened_steps
        return describe(self._settings) + (f" sam_on={on}" if self._sharpened and on != "both" else "")

    def end_task(self) -> None:
        self._recorder.flush()
        self._earlier = []
        about = {
            "steps": self._step,
            "ascent_fallbacks": int(self._fallbacks),
            **self._counts,
            "sam": self._describe(),
            "launcher": self._launcher,
            "dtype": self._dtype,
        }
        self._tasks.append({"task": self._task, "seed": self._seed, **about})
        if self._run.get("keep") is not None:
            network = getattr(self._learner._network, "module", self._learner._network)
            keep_model(self._run["keep"], network, self._learner._cur_task)
        if self._measurer is not None:
            self._measurer.end()
        self._measure("after")
        total = {name: sum(task[name] for task in self._tasks) for name in ("steps", "ascent_fallbacks")}
        self._recorder.write_summary({**about, **total, "tasks": self._tasks})
        # What follows is upstream's: features of the task's images, then predictions of all test images seen.
        self._recorder.write_progress("predict", 0, None, task=self._task)

    def _measure(self, when: str) -> None:
        """Measure at this point of the training, if asked to."""
        if self._measurer is not None and self._measurer.wants(when):
            self._measurer.at(when, **self._measured())

    def _measured(self) -> dict[str, Any]:
        """Return what is measured: the task's loss on a fixed sample of its images, augmented once and for all."""
        from flatpatch.families.sample import images_sample_of
        from flatpatch.families.vision.measuring import IMAGE_LOSS

        first_class = self._learner._known_classes
        classes = self._learner._total_classes - first_class
        return {
            "task_index": self._learner._cur_task,
            "task": self._task,
            "model": getattr(self._learner._network, "module", self._learner._network),
            "sample": images_sample_of(self._dataset, first_class),
            "loss": lambda model, batch: classification_loss(model, batch[0], batch[1], classes),
            "loss_name": IMAGE_LOSS,
        }

    def _write_measuring(self, phase: str, step: int, total: int, note: str) -> None:
        if self._recorder.progress_due():
            self._recorder.write_progress(phase, step, total, task=self._task, note=note)


@contextmanager
def _as_before_the_other_step(earlier: Sequence[tuple[Any, Any]], now: Sequence[Any]) -> Iterator[None]:
    """Inside the block hold the weights, perturbed as they are, where they were before a step made since.

    CL-LoRA's task loss is computed before its distillation step and differentiated after it, so that its gradient mixes
    the weights from before (in the activations) with those from after (in the products with them). The loss at the
    perturbed weights is computed inside the block and differentiated after it, and mixes them likewise. Without a
    perturbation, then, it is upstream's gradient bit for bit.

    Args:
        earlier: Weights, and what they were before the step.
        now: What they are without the perturbation.

    Yields:
        Nothing.
    """
    if not earlier:
        yield
        return
    import torch
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    weights = tuple(weight for weight, _ in earlier)
    here = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for (weight, before), after, moved in zip(earlier, now, here, strict=True):
            weight.copy_(before + (moved - after))
    kept = _unsafe_preserve_version_counter(weights)
    try:
        yield
    finally:
        with kept, torch.no_grad():
            for weight, moved in zip(weights, here, strict=True):
                weight.copy_(moved)

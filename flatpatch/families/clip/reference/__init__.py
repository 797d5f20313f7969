"""The reference engine for CLIP: LoRA factors learned on one data set after the other, over the text methods' loop.

A task is a data set, and an image is sorted among the classes of its own task (task-incremental), told apart by
prompts. Training compares an image with the first prompt of each class; a test with the mean direction of all of
them. After every task all tasks are tested, those not yet learned too, and all of them once before the first. Random
numbers come from torch's generator, seeded once.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from flatpatch.families.clip.arguments import Arguments
from flatpatch.families.clip.reference.checkpoints import restore, save
from flatpatch.families.clip.reference.inflora import InfLoRA
from flatpatch.families.clip.reference.model import PromptClassifier, build
from flatpatch.families.clip.reference.options import ClipReference, read_reference
from flatpatch.families.clip.reference.tasks import ClipTask, load_tasks
from flatpatch.families.task_checkpoints import held_after_task, take_up
from flatpatch.families.training import Batch, MakeGradients, TrainingResult, descend, plain_gradients
from flatpatch.files import write_atomically

__all__ = [
    "ClipReference",
    "ClipTask",
    "PromptClassifier",
    "TaskState",
    "criterion",
    "read_reference",
    "restore",
    "run",
]


@dataclass(frozen=True)
class TaskState:
    """A run before or after one of its tasks, for measuring; random numbers drawn meanwhile do not disturb the run."""

    index: int
    """The task, from 0."""
    model: PromptClassifier
    """``model(images)`` gives the logits of this task's classes; what is trained requires a gradient."""
    task: ClipTask


def criterion(arguments: Arguments) -> Callable[..., torch.Tensor]:
    """Return the loss of logits and classes that is trained."""
    return functools.partial(F.cross_entropy, label_smoothing=arguments.label_smoothing)


def run(
    reference: ClipReference,
    *,
    make_gradients: MakeGradients = plain_gradients,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_predict: Callable[[dict[str, int]], None] | None = None,
    on_zero_shot: Callable[[dict[str, float]], None] | None = None,
    before_task: Callable[[TaskState], None] | None = None,
    after_task: Callable[[TaskState], None] | None = None,
    before: Mapping[str, Any] | None = None,
    task_done: Callable[[int, dict[str, Any]], None] | None = None,
) -> None:
    """Learn all tasks in turn and write how well each is sorted after each.

    Writes into ``output_dir`` a checkpoint per task (see `restore`) and, last, ``results.json``, so that its presence
    means the run is done: ``zero_shot`` (percent by task, before the first) and ``accuracy_matrix`` (percent; row:
    after task i, column: on task j; with one adapter per task, the row is that of adapter i), ``sample_weighted`` (over
    all test images of the tasks learned so far), ``train_loss``, ``train_seconds``, ``predict_seconds``, ``images``
    and, for InfLoRA, ``protected_dimensions``. On one machine's CPU the same arguments give the same results, bit for
    bit, but for the seconds.

    Args:
        reference: What to do.
        make_gradients: See `descend`; SAM goes here. The optimizer's groups are named "A" (not with InfLoRA) and "B".
        on_step: See `descend`; the mapping also has ``task``, from 0. ``step`` and ``total`` are of this task.
        on_predict: Called after each tested batch with ``task``, ``step`` (from 1) and ``total``.
        on_zero_shot: Called with the accuracies before the first task, by task.
        before_task: Called when the model is ready to learn a task.
        after_task: Called when a task is learned, tested and saved.
        before: What a process that was stopped had given ``task_done`` last, with the random generators of that time
            (``random``): go on after its tasks, whose checkpoints are in ``output_dir``.
        task_done: Called after ``after_task`` with how many tasks are done and what the next one begins with.

    Raises:
        UserError: If the model or the data are not usable.
        FlatpatchError: If training diverges.
    """
    arguments = reference.arguments
    done = reference.output_dir / "results.json"
    done.unlink(missing_ok=True)
    model = build(reference.model, arguments, seed=reference.seed, device=reference.device)
    tasks = load_tasks(
        arguments, data=reference.data, model=reference.model, size=model.size, skipped=reference.skipped
    )
    tell_predicted = functools.partial(_tell_predicted, on_predict)
    # With B = 0 the factors change nothing.
    zero_shot = before["zero_shot"] if before else _evaluate(reference, model, tasks, tell_predicted(0))[0]
    if on_zero_shot is not None:
        on_zero_shot({task.name: row["accuracy"] for task, row in zip(tasks, zero_shot, strict=True)})
    inflora = InfLoRA(arguments, model) if reference.design == "inflora" else None
    rows: list[dict[str, Any]] = []
    torch.manual_seed(reference.seed)  # batches do not depend on what came before
    if before is not None:
        rows = take_up(before, model, inflora)
    for index, task in enumerate(tasks):
        if index < len(rows):
            continue
        if index and reference.design == "per_task":
            model.restart()
        model.ask(task.classes, task.templates[0])
        loader: DataLoader[Any] = DataLoader(
            task.train, batch_size=arguments.batch_size, shuffle=True, num_workers=arguments.num_workers
        )
        if inflora:
            inflora.begin(index, loader)
        groups = model.train_only(reference.trained)
        _call(before_task, TaskState(index, model, task))
        result = _train(reference, model, groups, loader, index, make_gradients, on_step)
        if inflora:
            inflora.end(index, loader)
        tested, seconds = _evaluate(reference, model, tasks, tell_predicted(index))
        seen = tested[: index + 1]
        rows.append(
            {
                "accuracy_matrix": [each["accuracy"] for each in tested],
                "sample_weighted": 100 * sum(each["right"] for each in seen) / sum(each["images"] for each in seen),
                "train_loss": result.mean_loss,
                "train_seconds": result.seconds,
                "predict_seconds": seconds,
                **({"protected_dimensions": [space.dimension for space in inflora.subspaces]} if inflora else {}),
            }
        )
        save(reference, model, index)
        model.ask(task.classes, task.templates[0])
        _call(after_task, TaskState(index, model, task))
        if task_done is not None:
            task_done(index + 1, {**held_after_task(model, rows, inflora), "zero_shot": zero_shot})
    results = {
        "design": reference.design,
        "tasks": [task.name for task in tasks],
        "zero_shot": [each["accuracy"] for each in zero_shot],
        "images": {task.name: {"train": len(task.train), "test": len(task.test)} for task in tasks},
        "skipped": len(reference.skipped),
        **{name: [row[name] for row in rows] for name in rows[0]},
    }
    write_atomically(done, json.dumps(results, indent=2, sort_keys=True) + "\n")


def _call(callback: Callable[[TaskState], None] | None, state: TaskState) -> None:
    if callback is not None:
        device = next(state.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            callback(state)


def _tell_predicted(
    on_predict: Callable[[dict[str, int]], None] | None, task: int
) -> Callable[[int, int], None] | None:
    return on_predict and (lambda step, total: on_predict({"task": task, "step": step, "total": total}))


def _train(
    reference: ClipReference,
    model: PromptClassifier,
    groups: dict[str, list[nn.Parameter]],
    loader: DataLoader[Any],
    task: int,
    make_gradients: MakeGradients,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> TrainingResult:
    arguments, loss = reference.arguments, criterion(reference.arguments)
    optimizer = _optimizer(arguments, groups, arguments.rate(task))
    model.train()
    try:
        return descend(
            model,
            optimizer,
            _without_end(loader, reference.device),
            lambda batch: (loss(model(batch["images"]), batch["targets"]), None),
            total=arguments.iterations,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rate_at, arguments)),
            make_gradients=make_gradients,
            on_step=on_step and (lambda step: on_step({"task": task, **step})),
        )
    finally:
        model.eval()


def _without_end(loader: DataLoader[Any], device: str) -> Iterator[Batch]:
    """Yield batches in a new order in each pass over the images, on and on."""
    while True:
        for images, targets in loader:
            yield {"images": images.to(device), "targets": targets.to(device)}


def rate_at(arguments: Arguments, step: int) -> float:
    """Return the factor of the learning rate at a step, from 0: growing over the warm-up, then along a cosine."""
    if step < arguments.warmup:
        return (step + 1) / arguments.warmup
    share = (step - arguments.warmup) / max(1, arguments.iterations - arguments.warmup)
    return (1 + math.cos(math.pi * share)) / 2


def _optimizer(arguments: Arguments, groups: dict[str, list[nn.Parameter]], rate: float) -> torch.optim.Optimizer:
    named = [{"params": parameters, "name": name} for name, parameters in groups.items()]
    decay = arguments.weight_decay
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(named, lr=rate, momentum=arguments.momentum, weight_decay=decay)
    return torch.optim.AdamW(named, lr=rate, betas=(0.9, 0.999), weight_decay=decay)


@torch.no_grad()
def _evaluate(
    reference: ClipReference,
    model: PromptClassifier,
    tasks: tuple[ClipTask, ...],
    tell: Callable[[int, int], None] | None,
) -> tuple[list[dict[str, Any]], float]:
    """Test every task: accuracy in percent, right answers and images of each; and the seconds that all took."""
    began = time.monotonic()
    size, workers = reference.arguments.eval_batch_size, reference.arguments.num_workers
    loaders: list[DataLoader[Any]] = [DataLoader(task.test, batch_size=size, num_workers=workers) for task in tasks]
    total, step = sum(map(len, loaders)), 0
    rows = []
    for task, loader in zip(tasks, loaders, strict=True):
        embedded = model.embed(task.classes, task.templates, size)
        right = 0
        for images, targets in loader:
            right += int((model.predict(images.to(reference.device), embedded).cpu() == targets).sum())
            step += 1
            if tell is not None:
                tell(step, total)
        rows.append({"accuracy": 100 * right / len(task.test), "right": right, "images": len(task.test)})
    return rows, time.monotonic() - began

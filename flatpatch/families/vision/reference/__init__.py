"""The reference engine for images: sequential LoRA, InfLoRA and a reconstruction of DualLoRA on a Vision Transformer.

It goes through the text methods' loop.

A run learns a dataset's classes task by task, in one process. Every task has a linear classifier of its own and is
trained with the cross-entropy over its own classes; an image is answered from the classifiers of all tasks so far,
side by side (class-incremental: nobody tells which task it belongs to). Random numbers come from torch's generator,
seeded once, in the order in which InfLoRA's code draws them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from flatpatch.errors import UserError
from flatpatch.families.dualgpm import Subspace
from flatpatch.families.task_checkpoints import held_after_task, take_up
from flatpatch.families.training import MakeGradients, TrainingResult, descend, plain_gradients
from flatpatch.families.vision.reference.checkpoints import restore, save
from flatpatch.families.vision.reference.duallora import DualLoRA, DualLoRAViT, make_model
from flatpatch.families.vision.reference.images import ImageTask, load_tasks
from flatpatch.families.vision.reference.inflora import InfLoRA
from flatpatch.families.vision.reference.options import VisionReference
from flatpatch.families.vision.reference.vit import LoRAViT
from flatpatch.files import write_atomically

__all__ = ["ImageTask", "LoRAViT", "TaskState", "VisionReference", "restore", "run", "tasks_of"]


@dataclass(frozen=True)
class TaskState:
    """A run before or after one of its tasks, for measuring; random numbers drawn meanwhile do not disturb the run."""

    index: int
    """The task, from 0."""
    model: LoRAViT
    """``model(images)`` gives the logits of this task's own classes; what is trained requires a gradient."""
    tasks: tuple[ImageTask, ...]
    """All tasks of the run, with their images."""
    subspaces: Sequence[Subspace] = ()
    """What InfLoRA or DualLoRA protects, by layer; nothing before that is known and with other methods."""


def run(
    reference: VisionReference,
    *,
    make_gradients: MakeGradients = plain_gradients,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_predict: Callable[[dict[str, int]], None] | None = None,
    before_task: Callable[[TaskState], None] | None = None,
    after_task: Callable[[TaskState], None] | None = None,
    before: Mapping[str, Any] | None = None,
    task_done: Callable[[int, dict[str, Any]], None] | None = None,
) -> None:
    """Learn all tasks in turn and write how well each is remembered.

    Writes into ``output_dir`` a checkpoint per task (see `restore`) and, last, ``results.json``, so that its presence
    means the run is done: ``accuracy_matrix`` (percent; row: after task i, column: on task j, null where j > i; every
    answer chosen from all classes seen so far), ``top1_curve`` (percent, over all test images seen so far: the
    authors' CNN accuracy), ``classes`` (labels by task), ``train_loss``, ``train_seconds``, ``test_images`` and, for
    InfLoRA and DualLoRA, ``protected_dimensions`` (per task and layer). On one machine's CPU the same arguments give
    the same results, bit for bit, but for the seconds.

    Args:
        reference: What to do.
        make_gradients: See `descend`; SAM goes here. The optimizer's groups are named "A" (sequential LoRA alone),
            "B" and "head"; without LoRA "body", where it is trained, and "head".
        on_step: See `descend`; the mapping also has ``task``, from 0. ``step`` and ``total`` are of this task.
        on_predict: Called after each predicted batch with ``task``, ``step`` (from 1) and ``total``.
        before_task: Called when the model is ready to learn a task.
        after_task: Called when a task is learned, answered and saved.
        before: What a process that was stopped had given ``task_done`` last, with the random generators of that time
            (``random``): go on after its tasks, whose checkpoints are in ``output_dir``.
        task_done: Called after ``after_task`` with how many tasks are done and what the next one begins with.

    Raises:
        UserError: If the arguments, the weights or the data are not usable.
        FlatpatchError: If training diverges.
    """
    reference.check()
    tasks = tasks_of(reference)
    if reference.tasks is not None and reference.tasks > len(tasks):
        raise UserError(f"tasks={reference.tasks}, but there are {len(tasks)}. Expected at most that many.")
    model = make_model(reference, [len(task.classes) for task in tasks])
    protecting = _protecting(reference, model, len(tasks))
    done = reference.output_dir / "results.json"
    done.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    # Batches do not depend on how the weights were drawn.
    torch.manual_seed(reference.seed)
    learned = tasks[: reference.tasks]
    if before is not None:
        rows = take_up(before, model, protecting)
    for index, task in enumerate(learned):
        if index < len(rows):
            continue
        model.task = index
        loader = DataLoader(
            task.train, batch_size=reference.batch_size, shuffle=True, num_workers=reference.num_workers
        )
        if protecting:
            protecting.begin(loader)
        groups = model.train_only(reference.trained)
        _call(before_task, TaskState(index, model, tasks, protecting.subspaces if protecting else ()))
        result = _train(reference, model, groups, loader, task.classes.start, index, make_gradients, on_step)
        if protecting:
            protecting.end(loader)
        row = _evaluate(reference, model, tasks[: index + 1], on_predict)
        rows.append(
            {
                **row,
                "train_loss": result.mean_loss,
                "train_seconds": result.seconds,
            }
        )
        if protecting:
            rows[-1]["protected_dimensions"] = [space.dimension for space in protecting.subspaces]
        save(reference, model)
        _call(after_task, TaskState(index, model, tasks, protecting.subspaces if protecting else ()))
        if task_done is not None:
            task_done(index + 1, held_after_task(model, rows, protecting))
    results = {
        "method": reference.method,
        "classes": [list(task.names) for task in learned],
        "accuracy_matrix": [row["accuracy"] + [None] * (len(rows) - len(row["accuracy"])) for row in rows],
        **{name: [row[name] for row in rows] for name in rows[0].keys() - {"accuracy"}},
    }
    write_atomically(done, json.dumps(results, indent=2, sort_keys=True) + "\n")


def tasks_of(reference: VisionReference) -> tuple[ImageTask, ...]:
    """Read all tasks of a run's dataset, with the share of the training images that it learns from.

    Raises:
        UserError: If they cannot be had; see `load_tasks`.
    """
    return load_tasks(
        reference.dataset({"data_path": str(reference.data_path)}),
        init_cls=reference.init_cls,
        increment=reference.increment,
        shuffle_seed=reference.seed if reference.shuffle else None,
        fraction=reference.fraction,
        seed=reference.seed,
    )


def _protecting(reference: VisionReference, model: LoRAViT, tasks: int) -> InfLoRA | DualLoRA | None:
    """Return what a method does before and after each task, None for nothing."""
    if isinstance(model, DualLoRAViT):
        return DualLoRA(reference, model, tasks)
    return InfLoRA(reference, model, tasks) if reference.method == "inflora" else None


def _call(callback: Callable[[TaskState], None] | None, state: TaskState) -> None:
    if callback is not None:
        device = next(state.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            callback(state)


def _train(
    reference: VisionReference,
    model: LoRAViT,
    groups: dict[str, list[nn.Parameter]],
    loader: DataLoader[Any],
    first_class: int,
    task: int,
    make_gradients: MakeGradients,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> TrainingResult:
    optimizer, cosine = _optimizer(reference, groups)
    stream = (
        {"images": images.to(reference.device), "targets": targets.to(reference.device) - first_class}
        for _ in range(reference.epochs)
        for images, targets in loader
    )
    return descend(
        model,
        optimizer,
        stream,
        lambda batch: (F.cross_entropy(model(batch["images"]), batch["targets"]), None),
        total=reference.epochs * len(loader),
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step // len(loader))),
        make_gradients=make_gradients,
        on_step=on_step and (lambda step: on_step({"task": task, **step})),
    )


def _optimizer(
    reference: VisionReference, groups: dict[str, list[nn.Parameter]]
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Return the optimizer and the factor of its learning rate in each epoch, by default as in the authors' code."""
    named = [{"params": parameters, "name": name} for name, parameters in groups.items()]
    epochs, rate, decay = reference.epochs, reference.learning_rate, reference.weight_decay

    def constant(epoch: int) -> float:
        return 1.0

    def cosine(epoch: int) -> float:
        return (1 + math.cos(math.pi * epoch / epochs)) / 2

    def cosine_of_adam(epoch: int) -> float:
        # The authors' schedule counts the first epoch twice, so that the second has the full rate too.
        return math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * max(epochs - 1, 1)))

    is_constant = reference.schedule == "constant"
    if reference.optimizer == "sgd":
        sgd = torch.optim.SGD(named, lr=rate, momentum=0.9, weight_decay=decay)
        return sgd, constant if is_constant else cosine
    return torch.optim.Adam(named, lr=rate, weight_decay=decay), constant if is_constant else cosine_of_adam


@torch.no_grad()
def _evaluate(
    reference: VisionReference,
    model: LoRAViT,
    tasks: tuple[ImageTask, ...],
    on_predict: Callable[[dict[str, int]], None] | None,
) -> dict[str, Any]:
    loader: DataLoader[Any] = DataLoader(
        ConcatDataset([task.test for task in tasks]),
        batch_size=reference.batch_size,
        num_workers=reference.num_workers,
    )
    right: list[bool] = []
    for step, (images, targets) in enumerate(loader, start=1):
        right += (model.predict(images.to(reference.device)).cpu() == targets).tolist()
        if on_predict is not None:
            on_predict({"task": len(tasks) - 1, "step": step, "total": len(loader)})
    accuracy, start = [], 0
    for task in tasks:
        end = start + len(task.test)
        accuracy.append(100 * sum(right[start:end]) / len(task.test))
        start = end
    return {"accuracy": accuracy, "top1_curve": 100 * sum(right) / len(right), "test_images": len(right)}

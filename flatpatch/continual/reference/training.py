"""The one training loop of all reference methods.

It does what transformers 4.28.1's Trainer does with upstream's arguments: AdamW (the library's own, whose
epsilon enters before the bias correction), constant learning rate, no weight decay, the norm of the final
gradient clipped, the examples in a new random order each epoch, the last batch as small as it comes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import AdamW

from flatpatch.continual.reference.adapters import layer_matrices
from flatpatch.continual.reference.task import ReferenceTask
from flatpatch.errors import FlatpatchError

Item = TypeVar("Item")
Batch = dict[str, Tensor]
Closure = Callable[..., Tensor]
Gradients = Callable[[Closure], Tensor]
MakeGradients = Callable[[torch.optim.Optimizer], Gradients]


@dataclass(frozen=True)
class TrainingResult:
    """What is left to tell when a task is learned."""

    steps: int
    mean_loss: float
    """Mean over the steps of the loss with its penalty."""
    seconds: float


def plain_gradients(optimizer: torch.optim.Optimizer) -> Gradients:
    """Return the gradient at the weights themselves: one call of the closure."""
    del optimizer
    return lambda closure: closure()


def batches(examples: Sequence[Item], collate: Callable[[list[Item]], Batch], task: ReferenceTask) -> Iterator[Batch]:
    """Yield every epoch's batches in the order in which transformers' Trainer would.

    Like the Trainer, take the order's seed from torch's global generator, and one further draw from it per
    epoch (the loader's): with the same seed, batches and dropout masks are the Trainer's too.
    """
    generator = torch.Generator()
    generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    sampler = RandomSampler(examples, generator=generator)
    loader: Iterable[Batch] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list serves as well as a Dataset
        batch_size=task.per_device_train_batch_size,
        sampler=sampler,
        collate_fn=collate,
    )
    for _ in range(task.num_train_epochs):
        yield from loader


def train_task(
    model: nn.Module,
    examples: Sequence[Item],
    collate: Callable[[list[Item]], Batch],
    task: ReferenceTask,
    penalty: Callable[[], Tensor],
    *,
    make_gradients: MakeGradients = plain_gradients,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train a model's adapter on one task, in place.

    The closure given to the gradients clears the gradients, computes the mean over the step's batches of
    (task loss + penalty) and its gradient, and returns it; ``closure(penalised=False)`` leaves the penalty
    out of the gradient alone. With upstream under DeepSpeed the penalty also counts once per step; its
    plain loop would add it once per accumulated batch.

    Args:
        model: A sequence-to-sequence model with its adapters attached.
        examples: What to learn from.
        collate: Makes a batch of the model's inputs, with labels, from some examples.
        task: Epochs, batch size, learning rate and device are read from here.
        penalty: The method's penalty at the present weights, a scalar.
        make_gradients: From the optimizer to a function that takes the closure, leaves the gradient to
            descend along in ``.grad`` and returns the loss at the unperturbed weights. SAM goes here. The
            optimizer's two groups are named "A" and "B".
        on_step: Called after each step with ``step`` (from 1), ``total``, ``loss``, ``learning_rate`` and
            ``seconds`` (of this step).

    Returns:
        Steps taken, mean loss and wall time.

    Raises:
        FlatpatchError: If the loss is no longer a finite number.
    """
    layers = layer_matrices(model)
    optimizer = AdamW(
        [
            {"params": [layer.A for layer in layers], "name": "A"},
            {"params": [layer.B for layer in layers], "name": "B"},
        ],
        lr=task.learning_rate,
        eps=1e-8,
        no_deprecation_warning=True,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = make_gradients(optimizer)
    batches_per_epoch = math.ceil(len(examples) / task.per_device_train_batch_size)
    accumulated = min(task.gradient_accumulation_steps, batches_per_epoch)
    total = task.num_train_epochs * (batches_per_epoch // accumulated)
    stream = batches(examples, collate, task)

    model.train()
    start = time.perf_counter()
    losses: list[float] = []
    for step in range(1, total + 1):
        step_start = time.perf_counter()
        # islice takes no batch too many: the loader's draw for the next epoch comes after this step's.
        inputs = [_to(task.device, batch) for batch in itertools.islice(stream, accumulated)]

        def closure(*, penalised: bool = True, inputs: list[Batch] = inputs) -> Tensor:
            optimizer.zero_grad()
            loss_sum = torch.zeros((), device=task.device)
            for batch in inputs:
                task_loss = model(**batch).loss
                loss = task_loss + penalty()
                ((loss if penalised else task_loss) / len(inputs)).backward()
                loss_sum += loss.detach() / len(inputs)
            return loss_sum

        loss = gradients(closure).item()
        if not math.isfinite(loss):
            raise FlatpatchError(f"the loss is {loss} at step {step} of {total}. Try a smaller learning_rate or rho.")
        nn.utils.clip_grad_norm_(trained, task.max_grad_norm)
        optimizer.step()
        losses.append(loss)
        if on_step is not None:
            on_step(
                {
                    "step": step,
                    "total": total,
                    "loss": loss,
                    "learning_rate": task.learning_rate,
                    "seconds": time.perf_counter() - step_start,
                }
            )
    optimizer.zero_grad()
    return TrainingResult(total, math.fsum(losses) / total, time.perf_counter() - start)


def _to(device: str, batch: Batch) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}

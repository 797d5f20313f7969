"""The one training loop of all reference methods, `descend`, and how the text methods go through it."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import AdamW

from flatpatch import timing
from flatpatch.errors import FlatpatchError
from flatpatch.families.resuming import Keeper, put_weights, trained_weights
from flatpatch.sam import first_examples

if TYPE_CHECKING:
    from flatpatch.families.text.reference.task import ReferenceTask

Item = TypeVar("Item")
Batch = dict[str, Tensor]
Closure = Callable[..., Tensor]
Gradients = Callable[[Closure], Tensor]
MakeGradients = Callable[[torch.optim.Optimizer], Gradients]


@runtime_checkable
class WithHeads(Protocol):
    """A model that answers through heads of its own."""

    @property
    def heads(self) -> nn.Module:
        """The heads."""


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
    penalty: Callable[[], Tensor | None],
    *,
    make_gradients: MakeGradients = plain_gradients,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    keeper: Keeper | None = None,
) -> TrainingResult:
    """Train a model's adapter, or where it has none all that requires a gradient, on one task, in place.

    It does what transformers 4.28.1's Trainer does with upstream's arguments: AdamW (the library's own, whose
    epsilon enters before the bias correction), or plain SGD where ``optim`` says so; constant learning rate, no
    weight decay, the norm of the final gradient clipped, the examples in a new random order each epoch, the last
    batch as small as it comes. With upstream under DeepSpeed the penalty also counts once per step; its plain loop
    would add it once per accumulated batch.

    Args:
        model: A sequence-to-sequence model, or a classifier, with its adapters attached where it has any.
        examples: What to learn from.
        collate: Makes a batch of the model's inputs, with labels, from some examples.
        task: Epochs, batch size, optimizer, learning rate and device are read from here.
        penalty: The method's penalty at the present weights, a scalar, or None without one.
        make_gradients: See `descend`. The optimizer's groups are named "A" and "B", or "body" without adapters, and
            where a head learns along with them, "head".
        on_step: See `descend`.
        keeper: See `descend`.

    Returns:
        Steps taken, mean loss and wall time.

    Raises:
        FlatpatchError: If the loss is no longer a finite number.
    """
    from flatpatch.families.text.reference.adapters import layer_matrices

    layers = layer_matrices(model)
    groups: list[dict[str, Any]] = [
        {"params": [layer.A for layer in layers], "name": "A"},
        {"params": [layer.B for layer in layers], "name": "B"},
    ]
    factors = {id(factor) for group in groups for factor in group["params"]}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in factors]
    heads = {id(each) for each in model.heads.parameters()} if isinstance(model, WithHeads) else set()
    if not layers:
        groups = [{"params": [each for each in others if id(each) not in heads], "name": "body"}]
        others = [each for each in others if id(each) in heads]
    if others:
        groups.append({"params": others, "name": "head"})
    optimizer: torch.optim.Optimizer
    if task.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=task.learning_rate)
    else:
        optimizer = AdamW(groups, lr=task.learning_rate, eps=1e-8, no_deprecation_warning=True)
    batches_per_epoch = math.ceil(len(examples) / task.per_device_train_batch_size)
    accumulated = min(task.gradient_accumulation_steps, batches_per_epoch)
    model.train()
    return descend(
        model,
        optimizer,
        (_to(task.device, batch) for batch in batches(examples, collate, task)),
        lambda batch: (model(**batch).loss, penalty()),
        total=task.num_train_epochs * (batches_per_epoch // accumulated),
        accumulated=accumulated,
        max_grad_norm=task.max_grad_norm or None,  # for the Trainer 0 means no clipping
        make_gradients=make_gradients,
        on_step=on_step,
        keeper=keeper,
    )


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    objective: Callable[[Batch], tuple[Tensor, Tensor | None]],
    *,
    total: int,
    accumulated: int = 1,
    max_grad_norm: float | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    make_gradients: MakeGradients = plain_gradients,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    keeper: Keeper | None = None,
) -> TrainingResult:
    """Take an optimizer's steps, the gradients of each from a function of the closure.

    The closure given to the gradients clears the gradients, computes the mean over the step's batches of
    (task loss + penalty) and its gradient, and returns it; ``closure(penalised=False)`` leaves the penalty
    out of the gradient alone, and ``closure(share=0.25)`` takes the first examples of each batch alone.
    ``closure(recorded="all")`` and ``closure(recorded="last")`` take the gradients of the
    experiment record's step, which is not SAM: the sum over the step's batches, or that of the last one alone, of
    (task loss / number of batches + penalty).

    Args:
        model: What is trained, in place: those of its parameters that require a gradient, all on one device.
        optimizer: Steps along the gradients of these.
        stream: At least ``total * accumulated`` batches, on that device; no batch is taken before its step.
        objective: From a batch to its mean task loss and the method's penalty, or None without one.
        total: Number of steps.
        accumulated: Batches per step.
        max_grad_norm: Clip the norm of the final gradient to this.
        schedule: Stepped after each step, not each epoch.
        make_gradients: From the optimizer to a function that takes the closure, leaves the gradient to
            descend along in ``.grad`` and returns the loss at the unperturbed weights. SAM goes here.
        on_step: Called after each step with ``step`` (from 1), ``total``, ``loss``, ``learning_rate`` and
            ``seconds`` (of this step, a ``timing.Span``).
        keeper: Keeps checkpoints, and knows the one to go on from: the batches that it has seen are drawn again and
            passed over. What else changes from step to step must be added to it before.

    Returns:
        Steps taken, mean loss and wall time.

    Raises:
        FlatpatchError: If the loss is no longer a finite number.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = make_gradients(optimizer)
    device = trained[0].device
    start = timing.Moment(device)
    losses: list[float] = []
    spent: list[float] = []  # seconds, in the processes before this one

    def seconds() -> float:
        return sum(spent) + float(timing.Span(start, timing.Moment(device)))

    done = 0
    if keeper is not None:
        keeper.add("weights", partial(trained_weights, model), partial(put_weights, model))
        keeper.add("optimizer", optimizer.state_dict, optimizer.load_state_dict)
        if schedule is not None:
            keeper.add("schedule", schedule.state_dict, schedule.load_state_dict)
        keeper.add("losses", lambda: losses, losses.extend)
        keeper.add("seconds", seconds, spent.append)
        done = keeper.step
        deque(itertools.islice(stream, done * accumulated), maxlen=0)
        keeper.go_on()
    for step in range(done + 1, total + 1):
        # islice takes no batch too many: the loader's draw for the next epoch comes after this step's.
        inputs = list(itertools.islice(stream, 1))
        began = timing.Moment(device)
        inputs += itertools.islice(stream, accumulated - 1)

        def closure(
            *, penalised: bool = True, recorded: str = "", share: float = 1.0, inputs: list[Batch] = inputs
        ) -> Tensor:
            optimizer.zero_grad()
            loss_sum = torch.zeros((), device=device)
            taken = inputs[-1:] if recorded == "last" else inputs
            for batch in taken:
                task_loss, penalty = objective(first_examples(batch, share))
                loss = task_loss if penalty is None else task_loss + penalty
                descended = (loss if penalised else task_loss) / len(inputs)
                if recorded and penalty is not None:
                    descended = task_loss / len(inputs) + penalty
                descended.backward()  # type: ignore[no-untyped-call]
                loss_sum = loss_sum + loss.detach() / len(taken)
            return loss_sum

        loss = gradients(closure).item()
        if not math.isfinite(loss):
            raise FlatpatchError(f"the loss is {loss} at step {step} of {total}. Try a smaller learning_rate or rho.")
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, max_grad_norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss)
        if on_step is not None:
            on_step(
                {
                    "step": step,
                    "total": total,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "seconds": timing.Span(began, timing.Moment(device)),
                }
            )
        if keeper is not None:
            keeper.step_ended(step, last=step == total)
    optimizer.zero_grad()
    return TrainingResult(total, math.fsum(losses) / total, seconds())


def _to(device: str, batch: Batch) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}

"""The loss whose landscape is measured: a model, fixed batches, and the tensors that vary.

The loss is the mean over all loss terms of all batches,

    L = sum_b n_b L_b / sum_b n_b,

where L_b is the mean loss of batch b and n_b its number of loss terms (for T5: labels that are not ignored), so that
it does not depend on how the examples are split into batches. Batches are read once and kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatpatch.errors import UserError
from flatpatch.flatness.scope import Scope, find_scope

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the mean loss over the batch's loss terms, a 0-dimensional tensor."""

IGNORED = -100  # the label that torch's and Hugging Face's cross-entropies leave out


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model computes itself, as Hugging Face's do when a batch holds labels."""
    loss: Tensor = model(**batch).loss
    return loss


def supervised_loss(criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Make a loss from a criterion with mean reduction, for batches that are pairs of inputs and targets."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return criterion(model(inputs), targets)

    return loss


def count_terms(batch: Any) -> int:
    """Count a batch's loss terms: labels that are not ignored if they are integers, else all entries.

    Args:
        batch: A mapping with "labels", or a sequence that ends with the targets.

    Returns:
        How many terms the batch's mean loss is a mean of.

    Raises:
        UserError: If there are no labels to count.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        labels = batch[-1]
    if not isinstance(labels, Tensor):
        raise UserError(
            f"cannot count the loss terms of a {type(batch).__name__}: expected a mapping with 'labels' or a pair "
            "(inputs, targets). Pass terms=, a function from a batch to its number of loss terms."
        )
    if labels.is_floating_point():
        return labels.numel()
    return int((labels != IGNORED).sum())


class Problem:
    """A loss over fixed batches as a function of the variables of a scope.

    The model is evaluated in eval mode without autocast and TF32. Outside the calls below it is as the caller left it:
    modes, ``requires_grad``, ``.grad``, weights and random number generators.

    Args:
        model: Any module, on the device where it is to be measured. Half-precision weights are accepted, but their
            curvature carries noise of about one percent.
        batches: What ``loss`` takes; read once, moved to the model's device and kept. An iterator or a data loader
            may shuffle or augment: what it yields now is the sample.
        loss: Mean loss of a batch; by default the model's own, ``model(**batch).loss``.
        terms: Number of loss terms of a batch, its weight in the mean.
        scope: "adapter", "merged", "trainable" or "model"; see :func:`flatpatch.flatness.scope.find_scope`.
        check: Whether to make two passes and refuse a loss that is not finite or does not repeat.

    Attributes:
        weights: Each batch's share in the mean loss; they sum to 1.
        num_terms: Loss terms of each batch.
        dtype: Of flat vectors: float64 if a variable is, else float32.
        device: Of flat vectors.

    Raises:
        UserError: If there are no batches, no loss terms in one, no variables, or the check fails.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = model_loss,
        *,
        terms: Callable[[Any], int] = count_terms,
        scope: str | Scope = "trainable",
        check: bool = True,
    ) -> None:
        self.model = model
        self.scope = find_scope(model, scope) if isinstance(scope, str) else scope
        first = self.scope.variables[0]
        self.device = first.device
        self.dtype = torch.float64 if any(v.dtype == torch.float64 for v in self.scope.variables) else torch.float32
        self.batches = [_to_device(batch, self.device) for batch in batches]
        self._loss = loss
        self._terms = terms
        if not self.batches:
            raise UserError("the sample is empty: curvature needs at least one batch.")
        self.num_terms = [terms(batch) for batch in self.batches]
        for index, count in enumerate(self.num_terms):
            if count <= 0:
                raise UserError(f"batch {index} has {count} loss terms (all labels ignored?). Leave such batches out.")
        self.weights = [count / sum(self.num_terms) for count in self.num_terms]
        self._is_active = False
        if check:
            self._check()

    def with_scope(self, scope: str | Scope) -> Problem:
        """Return the same loss as a function of other variables."""
        return Problem(self.model, self.batches, self._loss, terms=self._terms, scope=scope, check=False)

    def subset(self, indices: Iterable[int]) -> Problem:
        """Return the loss over some of the batches, as a function of the same variables."""
        chosen = [self.batches[index] for index in indices]
        return Problem(self.model, chosen, self._loss, terms=self._terms, scope=self.scope, check=False)

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """The tensors that vary. Changing one in place changes the loss."""
        return self.scope.variables

    @property
    def size(self) -> int:
        """Number of scalar variables, n."""
        return self.scope.size

    def flatten(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Join tensors shaped like the variables into one vector ``(n,)``, in the variables' order."""
        dtype = dtype or self.dtype
        return torch.cat([tensor.detach().reshape(-1).to(self.device, dtype) for tensor in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector ``(..., n)`` into tensors shaped ``(..., *shape)`` and typed like the variables."""
        pieces = torch.split(vector, self.scope.sizes, dim=-1)
        return [
            piece.reshape((*vector.shape[:-1], *v.shape)).to(v.device, v.dtype)
            for piece, v in zip(pieces, self.variables, strict=True)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the model into the state in which its loss is measured; undone when the block is left.

        Calls below enter it themselves; entering it around many of them saves the repeated change of state.
        """
        if self._is_active:
            yield
            return
        self._is_active = True
        try:
            with _evaluating(self.model, self.device), self.scope.installed():
                yield
        finally:
            self._is_active = False

    def batch_loss(self, index: int, *, twice_differentiable: bool = False) -> Tensor:
        """Compute the mean loss of one batch, with a graph if gradients are enabled. Call it inside ``active()``.

        Args:
            index: Which batch.
            twice_differentiable: Whether to run attention by the plain kernel. The fused ones have no second
                derivative.

        Returns:
            A 0-dimensional tensor.

        Raises:
            UserError: If the loss function returns anything else.
        """
        if not self._is_active:
            raise ValueError("batch_loss must be called inside problem.active()")
        with ExitStack() as stack:
            if twice_differentiable:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            loss = self._loss(self.model, self.batches[index])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss of batch {index} is not one number ({got}). Return the mean over its loss terms."
            )
        return loss.reshape(())

    def loss(self) -> float:
        """Evaluate the mean loss at the variables' present values, summed over batches in float64."""
        with self.active(), torch.no_grad():
            losses = torch.stack([self.batch_loss(index).double() for index in range(len(self.batches))])
        return math.fsum(w * value for w, value in zip(self.weights, losses.tolist(), strict=True))

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Evaluate the mean loss and its gradient at the variables' present values.

        Returns:
            The loss, and the gradient as a float64 vector ``(n,)``.
        """
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        losses = []
        with self.active(), torch.set_grad_enabled(True):
            for index, weight in enumerate(self.weights):
                loss = self.batch_loss(index)
                gradients = differentiate(loss, self.variables)
                total.add_(self.flatten(gradients, torch.float64), alpha=weight)
                losses.append(loss.detach().double())
        values = torch.stack(losses).tolist()
        return math.fsum(w * value for w, value in zip(self.weights, values, strict=True)), total

    def unused_variables(self) -> set[str]:
        """Return the names of variables that the loss does not depend on, judged by the first batch."""
        with self.active(), torch.set_grad_enabled(True):
            found = torch.autograd.grad(self.batch_loss(0), self.variables, allow_unused=True)
        return {name for name, gradient in zip(self.scope.names, found, strict=True) if gradient is None}

    def _check(self) -> None:
        with self.active():  # once around both: leaving it puts the generators back, and dropout would repeat
            first, second = self.loss(), self.loss()
        if not math.isfinite(first):
            raise UserError(
                f"the loss is {first}. Curvature needs a finite loss: check the weights, batches and dtype."
            )
        # What sums in another order may change by; a GPU does not always add in the same one.
        precision = max(torch.finfo(v.dtype).eps for v in self.variables)
        if not abs(first - second) <= 100 * precision * max(abs(first), abs(second)):
            raise UserError(
                f"two passes over the data gave losses {first:.9g} and {second:.9g}; curvature needs the same loss "
                "twice. Turn off dropout, augmentation and shuffling inside the model and the loss."
            )


def differentiate(output: Tensor, variables: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient for each variable, zero for one that the output does not depend on."""
    if not output.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    return list(torch.autograd.grad(output, variables, create_graph=create_graph, materialize_grads=True))


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, full precision and unfused encoder layers; everything as before when the block is left."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    matmul_tf32, cudnn_tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            if any(mode for _, mode in modes):  # else there is nothing to change, in hundreds of modules
                model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul_tf32, cudnn_tf32
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_device(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    return value

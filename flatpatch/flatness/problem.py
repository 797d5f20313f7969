"""The loss whose landscape is measured: a model, fixed batches, and the tensors that vary.

The loss is the mean over all loss terms of all batches,

    L = sum_b n_b L_b / sum_b n_b,

where L_b is the mean loss of batch b and n_b its number of loss terms, i.e. what L_b divides by (for T5: labels that
are not ignored; with class weights: their sum), so that it does not depend on how the examples are split into batches.
Batches are read once and kept.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as tree

from flatpatch.errors import UserError
from flatpatch.flatness.scope import Scope, find_scope, unwrapped
from flatpatch.flatness.terms import (
    Terms,
    check_terms,
    count_shifted_terms,
    count_terms,
    criterion_terms,
    with_first_labels_alone,
    with_other_first_labels,
)

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the mean loss over the batch's loss terms, a 0-dimensional tensor."""


@dataclass(frozen=True)
class WeightedLoss:
    """A loss that knows what it divides by.

    Attributes:
        compute: The loss.
        terms: From a batch to what its loss divides by.
    """

    compute: Loss
    terms: Terms

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss."""
        return self.compute(model, batch)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model computes itself, as Hugging Face's do when a batch holds labels."""
    loss: Tensor = model(**batch).loss
    return loss


def supervised_loss(criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Make a loss from a criterion with mean reduction, for batches that are pairs of inputs and targets.

    What torch's own criteria divide by is known, with their class weights and ignored labels: modules, functions of
    ``torch.nn.functional`` and ``functools.partial`` of these with keywords. For another criterion the targets are
    counted as by ``count_terms``, and a problem tries on a few examples whether that is right.

    Raises:
        UserError: If the criterion's reduction is not a mean.
    """
    terms = criterion_terms(criterion)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return criterion(model(inputs), targets)

    return loss if terms is None else WeightedLoss(loss, lambda batch: terms(batch[1]))


class Problem:
    """A loss over fixed batches as a function of the variables of a scope.

    The model is evaluated in eval mode without autocast and TF32; what is compiled runs uncompiled, and gradients of
    embeddings are neither sparse nor scaled by frequency, which is no part of a loss. Outside the calls below it is as
    the caller left it: modes, ``requires_grad``, ``.grad``, weights and random number generators.

    Args:
        model: Any module, on the device where it is to be measured. Half-precision weights are accepted, but their
            curvature carries noise of about one percent. Of a compiled or (distributed) data-parallel model the one
            inside is measured, by this process alone.
        batches: What ``loss`` takes; read once, moved to the model's device and kept. An iterator or a data loader
            may shuffle or augment: what it yields now is the sample.
        loss: Mean loss of a batch; by default the model's own, ``model(**batch).loss``.
        terms: Number of loss terms of a batch: what its loss divides by, its weight in the mean. By default the loss's
            own if it knows them (:class:`WeightedLoss`), else its labels are counted: those that are not ignored,
            without the first of each sequence where the loss does not look at it, as in causal language models; two
            or three evaluations of one batch tell.
        scope: "adapter", "merged", "tangent", "trainable" or "model"; see :func:`flatpatch.flatness.scope.find_scope`.
        check: Whether to make two passes, and refuse a loss that is not finite, does not repeat or has no gradient; and
            whether to compare the loss of a few examples with the weighted mean of their parts', and refuse one that
            divides by something else than its terms. Beside the passes this takes three batches' time. It sees nothing
            where examples cannot be put together anew (no tensors with one row per example, or batches of one example,
            each of its own shape), where their losses hardly differ, nor where all batches of one shape have terms that
            are wrong by the same factor.

    Attributes:
        weights: Each batch's share in the mean loss; they sum to 1.
        num_terms: Loss terms of each batch; no integers with class weights.
        dtype: Of flat vectors: float64 if a variable is, else float32.
        device: Of flat vectors.

    Raises:
        UserError: If there are no batches, no loss terms in one, no variables or one that cannot be varied, a forward
            pass that changes weights, or the check fails.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss = model_loss,
        *,
        terms: Terms | None = None,
        scope: str | Scope = "trainable",
        check: bool = True,
    ) -> None:
        self.model = unwrapped(model)
        self.scope = find_scope(self.model, scope) if isinstance(scope, str) else scope
        _refuse_changing_weights(self.model)
        first = self.scope.variables[0]
        self.device = first.device
        self.dtype = torch.float64 if any(v.dtype == torch.float64 for v in self.scope.variables) else torch.float32
        self.batches = [_to_device(batch, self.device) for batch in batches]
        self._loss = loss
        self._is_active = False
        if not self.batches:
            raise UserError("the sample is empty: curvature needs at least one batch.")
        self._terms: Terms = terms or (loss.terms if isinstance(loss, WeightedLoss) else self._find_terms())
        self.num_terms = [_number(self._terms(batch)) for batch in self.batches]
        for index, count in enumerate(self.num_terms):
            if not 0 < count < math.inf:
                raise UserError(f"batch {index} has {count} loss terms (all labels ignored?). Leave such batches out.")
        self.weights = [count / math.fsum(self.num_terms) for count in self.num_terms]
        if scope == "tangent":  # a factor that no forward pass uses moves nothing
            unused = self.with_scope("adapter").unused_variables()
            self.scope = find_scope(self.model, scope, unused=unused) if unused else self.scope
        if check:
            self._check(given=terms is not None)

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
            return self._evaluate(self.batches[index], f"batch {index}")

    def _evaluate(self, batch: Any, name: str) -> Tensor:
        loss = self._loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"the loss of {name} is not one number ({got}). Return the mean over its loss terms.")
        return loss.reshape(())

    def _find_terms(self) -> Terms:
        """Count labels, and ask the loss itself whether it looks at the first of each sequence."""
        for index, batch in enumerate(self.batches):
            other = with_other_first_labels(batch)
            if other is not None:
                with self.active(), torch.no_grad():
                    seen, changed = (self._evaluate(each, f"batch {index}") for each in (batch, other))
                    if not torch.equal(seen, changed):
                        return count_terms
                    if seen.dtype.itemsize >= 4:
                        return count_shifted_terms
                    # 16 bits need not show one label among many; without a single term a mean is not a number.
                    alone = float(self._evaluate(with_first_labels_alone(batch), f"batch {index}"))
                return count_terms if 0 < abs(alone) < math.inf else count_shifted_terms
        return count_terms

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

    def _check(self, *, given: bool) -> None:
        with self.active():  # once around both: leaving it puts the generators back, and dropout would repeat
            first, second = self.loss(), self.loss()
        named = zip(self.scope.names, self.variables, strict=True)
        bad = next((name for name, variable in named if not bool(variable.isfinite().all())), None)
        if not math.isfinite(first):
            also = f" and {bad} is not finite" if bad else ""
            raise UserError(
                f"the loss is {first}{also}. Curvature needs a finite loss: check the weights, batches and dtype."
            )
        if bad:
            raise UserError(f"{bad} is not finite, although the loss is. Its training diverged, or it was not loaded.")
        # What sums in another order may change by; a GPU does not always add in the same one.
        precision = max(torch.finfo(v.dtype).eps for v in self.variables)
        if not abs(first - second) <= 100 * precision * max(abs(first), abs(second)):
            raise UserError(
                f"two passes over the data gave losses {first:.9g} and {second:.9g}; curvature needs the same loss "
                "twice. Turn off dropout, augmentation and shuffling inside the model and the loss."
            )
        self._check_graph()
        with self.active(), torch.no_grad():
            check_terms(
                lambda batch: float(self._evaluate(batch, "a few examples")),
                self._terms,
                self.batches,
                tolerance=self._rounding(),
                given=given,
            )

    def _check_graph(self) -> None:
        """Autograd gives zeros, and no error, for what it cannot follow."""
        variables = {id(variable) for variable in self.variables}
        for index in range(len(self.batches)):
            with self.active(), torch.set_grad_enabled(True):
                nodes = graph_nodes([self.batch_loss(index)])
            if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
                raise UserError(
                    "the model recomputes its activations by reentrant checkpoints, through which autograd.grad sees "
                    "no weights. Switch gradient checkpointing off, or give torch.utils.checkpoint use_reentrant=False."
                )
            if any(id(getattr(node, "variable", None)) in variables for node in nodes):
                return
        raise UserError(
            f"the loss depends on none of the {len(self.variables)} tensors of scope={self.scope.name}, or was "
            "computed without gradients (no_grad, detach, item). Choose another scope, or return what autograd can "
            "follow."
        )

    def _rounding(self) -> float:
        """What a loss of other batches may differ by, relative to one and to the loss: much more than it does."""
        tensors = [*self.variables, *self.model.parameters(), *self.model.buffers()]
        tensors += [leaf for leaf in tree.tree_leaves(self.batches[0]) if isinstance(leaf, Tensor)]
        precision = max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point() or t.is_complex())
        # Models in float64 compute some of their steps in float32.
        quantised = any(p.element_size() == 1 for p in self.model.parameters())
        return 0.05 if quantised else min(max(1000 * precision, 1e-6), 0.05)


def _number(terms: float) -> float:
    """Return a count as it is and anything else, such as a tensor, as a float."""
    return terms if isinstance(terms, int) else float(terms)


def differentiate(output: Tensor, variables: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient for each variable, zero for one that the output does not depend on.

    Raises:
        UserError: If a gradient is asked for that can be differentiated again, and there is none.
    """
    if not output.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    found = torch.autograd.grad(output, variables, create_graph=create_graph, materialize_grads=True)
    if create_graph and any(gradient.layout != torch.strided for gradient in found):
        raise UserError(
            "the gradient of a weight is sparse (torch.nn.functional.embedding with sparse=True) and cannot be "
            "differentiated again. Give it sparse=False, or use mode='finite-difference'."
        )
    return [gradient.to_dense() if gradient.layout != torch.strided else gradient for gradient in found]


def graph_nodes(outputs: Sequence[Tensor]) -> set[Node]:
    """Return autograd's nodes behind some tensors."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        for following, _ in pending.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return seen


def _refuse_changing_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise UserError(
                f"{name or type(module).__name__} has max_norm={module.max_norm:g}, by which a forward pass changes "
                "its weights: there is no loss at weights that do not stay. Set its max_norm to None, once the weights "
                "are as they are to be measured."
            )


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, full precision and nothing fused or compiled; everything as before when the block is left."""
    embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)]
    ways = [(embedding, embedding.sparse, embedding.scale_grad_by_freq) for embedding in embeddings]
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    matmul_tf32, cudnn_tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            if any(mode for _, mode in modes):  # else there is nothing to change, in hundreds of modules
                model.eval()
            for embedding in embeddings:
                embedding.sparse = embedding.scale_grad_by_freq = False
            torch.backends.mha.set_fastpath_enabled(False)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for embedding, sparse, scaled in ways:
                embedding.sparse, embedding.scale_grad_by_freq = sparse, scaled
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

"""What a batch weighs in the mean loss: the number that its own loss divides by.

A criterion of torch's says it. Labels that nothing else is known of are counted. Whether the count is right is then
tried on a few examples: the loss of all of them must be the weighted mean of their parts' losses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as tree

from flatpatch.errors import UserError

Terms = Callable[[Any], float]
"""From a batch to what its loss divides by."""

IGNORED = -100  # the label that torch's and Hugging Face's cross-entropies leave out
_PARTS = 4

_BY_CLASS: tuple[Any, ...] = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_BY_EXAMPLE: tuple[Any, ...] = (
    *(nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss),
    *(F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss),
)
_BY_ENTRY: tuple[Any, ...] = (
    *(nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss),
    *(nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
    *(F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.soft_margin_loss, F.hinge_embedding_loss),
)


def find_labels(batch: Any) -> Tensor:
    """Return a batch's labels: its "labels" if it is a mapping, its last entry if it is a sequence.

    Raises:
        UserError: If there are none.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        labels = batch[-1]
    if not isinstance(labels, Tensor):
        raise UserError(
            f"cannot count the loss terms of a {type(batch).__name__}: expected a mapping with 'labels' or a pair "
            "(inputs, targets). Pass terms=, a function from a batch to the number that its loss divides by."
        )
    return labels


def count_terms(batch: Any) -> int:
    """Count a batch's labels: those that are not ignored if they are integers, else all entries.

    Args:
        batch: A mapping with "labels", or a sequence that ends with the targets.

    Returns:
        How many terms the batch's mean loss is a mean of, if it leaves out nothing else.

    Raises:
        UserError: If there are no labels to count.
    """
    return _count(find_labels(batch))


def count_shifted_terms(batch: Any) -> int:
    """Count as ``count_terms``, but for the first label of each sequence: causal language models predict none there."""
    return _count(find_labels(batch)[..., 1:])


def _count(labels: Tensor) -> int:
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORED).sum())


def criterion_terms(criterion: Callable[..., Any]) -> Callable[[Tensor], float] | None:
    """Return what a criterion of torch's divides by, as a function of the targets.

    Args:
        criterion: A module or function of torch's, or a ``functools.partial`` of such a function with keywords.

    Returns:
        The function; None if the criterion is not known.

    Raises:
        UserError: If its reduction is not a mean.
    """
    kind, options = criterion, {}
    if isinstance(criterion, functools.partial):
        kind, options = criterion.func, criterion.keywords
    elif isinstance(criterion, nn.Module):
        options = {name: getattr(criterion, name, None) for name in ("reduction", "weight", "ignore_index")}
    reduction = options.get("reduction") or "mean"
    if reduction in ("none", "sum"):
        raise UserError(
            f"the criterion has reduction={reduction!r}: the loss must be a mean over its terms, so that it does not "
            "depend on how the examples are split into batches. Give it reduction='mean'."
        )
    if (isinstance(criterion, functools.partial) and criterion.args) or {"size_average", "reduce"} & {*options}:
        return None
    if _is_one_of(kind, _BY_CLASS):
        ignored = options.get("ignore_index")
        return lambda targets: _class_terms(targets, options.get("weight"), IGNORED if ignored is None else ignored)
    if reduction == "batchmean" or _is_one_of(kind, _BY_EXAMPLE):
        return len
    return Tensor.numel if _is_one_of(kind, _BY_ENTRY) else None


def _is_one_of(kind: Any, known: tuple[Any, ...]) -> bool:
    return any(isinstance(kind, each) if isinstance(each, type) else kind is each for each in known)


def _class_terms(targets: Tensor, weight: Tensor | None, ignored: int) -> float:
    if targets.is_floating_point():  # probabilities: classes in the second dimension, if there are examples
        return targets.numel() // targets.shape[1 if targets.ndim > 1 else 0]
    counted = targets[targets != ignored]
    return counted.numel() if weight is None else float(weight[counted].sum())


def with_other_first_labels(batch: Any) -> Any:
    """Change the first label of each sequence, so that the loss tells whether it looks at them.

    Args:
        batch: As for ``count_terms``.

    Returns:
        The batch, with labels that others of it have; None if its labels are no sequences of integers, or the first
        ones are all ignored, so that it does not matter.
    """
    labels = find_labels(batch)
    if labels.is_floating_point() or labels.ndim < 2 or not bool((labels[..., 0] != IGNORED).any()):
        return None
    changed, first = labels.clone(), labels[..., 0]
    used = labels[labels != IGNORED].long()
    low, high = used.min(), used.max()
    if low == high:
        low, high = torch.zeros_like(low), high.clamp(min=1)
    other = torch.where(first == low, high, low).to(labels.dtype)
    changed[..., 0] = torch.where(first == IGNORED, first, other)
    return _with_labels(batch, changed)


def with_first_labels_alone(batch: Any) -> Any:
    """Ignore all labels but the first of each sequence.

    Args:
        batch: As for ``count_terms``.

    Returns:
        The batch.
    """
    labels = find_labels(batch).clone()
    labels[..., 1:] = IGNORED
    return _with_labels(batch, labels)


def _with_labels(batch: Any, changed: Tensor) -> Any:
    if isinstance(batch, Mapping):
        return {**batch, "labels": changed}
    entries = [*batch[:-1], changed]
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)


def uneven_parts(batches: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    """Choose examples with labels as different as possible, as one batch and cut into a few.

    Examples of several batches come together where the batches have the same shapes but for their number of examples.

    Args:
        batches: On one device.

    Returns:
        The one batch, with at most as many examples as the largest, and its parts; None if no two examples can be put
        into one batch, as where the batches are not made of tensors with one row per example.
    """
    groups: dict[Any, list[tuple[float, int, int]]] = {}
    most: dict[Any, int] = {}
    for index, batch in enumerate(batches):
        leaves, form = tree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if _has_rows(leaf)]
        if len({len(tensor) for tensor in tensors}) != 1:
            continue
        key = (str(form), *((leaf.shape[1:], leaf.dtype) if _has_rows(leaf) else repr(leaf) for leaf in leaves))
        try:
            labels = find_labels(batch)
        except UserError:
            labels = tensors[0]
        if not labels.ndim:
            continue
        rows = labels.reshape(len(labels), -1)
        counts = [True] * len(rows) if rows.is_floating_point() else (rows != IGNORED).any(dim=1).tolist()
        means = rows.double().mean(dim=1).tolist()
        group = groups.setdefault(key, [])
        group += [(mean, index, row) for row, (mean, used) in enumerate(zip(means, counts, strict=True)) if used]
        most[key] = max(most.get(key, 0), len(rows), 2)
    spreads = {key: max(group)[0] - min(group)[0] for key, group in groups.items() if len(group) > 1}
    if not spreads:
        return None
    chosen = max(spreads, key=lambda key: spreads[key])
    group, size = sorted(groups[chosen]), min(len(groups[chosen]), most[chosen])
    # Evenly from the lowest labels to the highest: each part is of one kind, and no kind is left out.
    picked = [group[round(k * (len(group) - 1) / (size - 1))] for k in range(size)]
    bounds = [round(k * size / min(_PARTS, size)) for k in range(min(_PARTS, size) + 1)]
    parts = [_take(batches, picked[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return _take(batches, picked), parts


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim > 0


def _take(batches: Sequence[Any], picked: Sequence[tuple[float, int, int]]) -> Any:
    """Put examples into one batch."""
    flat = {index: tree.tree_flatten(batches[index]) for index in {index for _, index, _ in picked}}
    leaves, form = flat[picked[0][1]]
    joined = [
        torch.stack([flat[index][0][place][row] for _, index, row in picked]) if _has_rows(leaf) else leaf
        for place, leaf in enumerate(leaves)
    ]
    return tree.tree_unflatten(joined, form)


def _twice(part: Any) -> Any:
    return tree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if _has_rows(leaf) else leaf, part)


def check_terms(
    loss: Callable[[Any], float], terms: Terms, batches: Sequence[Any], *, tolerance: float, given: bool
) -> None:
    """Refuse terms that are not what the loss divides by, as far as a few examples tell.

    They tell nothing where no two of them can be put into one batch, where the loss cannot be computed of such a batch,
    where their losses hardly differ, and of terms that are wrong by one factor for all examples of one shape.

    Args:
        loss: Of a batch.
        terms: Of a batch, as they were counted.
        batches: To take examples from.
        tolerance: Of rounding, relative to the losses and to one.
        given: Whether the caller chose the terms: then a loss may tie a batch's examples together.

    Raises:
        UserError: If the loss of the examples is not the weighted mean of their parts' losses.
    """
    chosen = uneven_parts(batches)
    if chosen is None:
        return
    try:
        counts = [terms(part) for part in chosen[1]]
        whole, *parts = [loss(batch) for batch in (chosen[0], *chosen[1])]
    except Exception:  # a batch of examples that the caller never put together need not be one the loss can take
        return
    if not math.isfinite(whole) or min(counts) <= 0:
        return
    mean = math.fsum(c * value for c, value in zip(counts, parts, strict=True)) / math.fsum(counts)
    limit = tolerance * max(1.0, *(abs(value) for value in parts if math.isfinite(value)))
    if abs(whole - mean) <= limit:
        return
    seen = f"a few examples have loss {whole:.6g}, their parts {', '.join(f'{value:.6g}' for value in parts)}"
    if abs(whole - math.fsum(parts)) <= limit:
        raise UserError(f"the loss is a sum: {seen}. Return the mean over the loss terms (reduction='mean').")
    outside = all(map(math.isfinite, parts)) and not min(parts) - limit <= whole <= max(parts) + limit
    # Whatever the terms are, no mean over examples changes where each of them comes twice.
    part, once = next((pair for pair in zip(chosen[1], parts, strict=True) if math.isfinite(pair[1])), (None, whole))
    if outside or (part is not None and not abs(loss(_twice(part)) - once) <= limit):
        if given:
            return
        raise UserError(
            f"the loss is no mean over examples: {seen}. The examples of a batch seem to act on each other (a "
            "contrastive loss, statistics of the batch), so that its value holds for one split into batches alone; or "
            "the first dimension counts something else (steps of time). To measure that, pass terms=, a function from "
            "a batch to its weight."
        )
    raise UserError(
        f"the loss divides by something else than its loss terms as counted: {seen}, whose mean with the counts "
        f"{', '.join(f'{count:g}' for count in counts)} as weights is {mean:.6g}. So the value would depend on how the "
        "examples are split into batches. Pass terms=, a function from a batch to what its loss divides by "
        "(check=False leaves this out)."
    )

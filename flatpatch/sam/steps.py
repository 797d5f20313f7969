"""The passes of one step, by whatever trains: what is common to a closure, a Trainer and a loop written by hand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.kinds import Kind, make_kind
from flatpatch.sam import auxiliary
from flatpatch.sam.balance import balance_before_update
from flatpatch.sam.frozen import FrozenWeight, frozen_weights
from flatpatch.sam.noise import noised
from flatpatch.sam.pairs import LoraPair
from flatpatch.sam.passes import RandomState, batch_norm_statistics_kept
from flatpatch.sam.perturbation import ADAPTIVE_AT_RANDOM, AscentStep, perturbed

Gradients = list[Tensor | None]
Combine = Callable[[Gradients], Gradients]

RADII = ("factors", "effective")
"""What a radius is of: the norm of the step of LoRA's factors, or that of the change of the weights they add to."""

# What the momentum is called in an optimizer's state.
_MOMENTA = ("momentum_buffer", "exp_avg")


class StepPasses(ABC):
    """One step's passes; of a subclass is how a pass is carried out.

    Attributes:
        report: What the step's first perturbation did; None if there was none.
        loss: What the step's first pass returned.
        perturbed_loss: What its last pass returned, if that was at perturbed weights and not the step's only one.
    """

    def __init__(
        self,
        chosen: Sequence[Tensor],
        trained: Sequence[Tensor],
        *,
        radii: Sequence[float],
        place: tuple[int, ...],
        optimizer: Any,
        sync: str = "local",
        model: nn.Module | None = None,
        diagnostics: bool = True,
        random_state: RandomState | None = None,
        pairs: Sequence[LoraPair] | None = None,
        radius: str = "factors",
        progress: float = 0.0,
        begins: bool = True,
    ) -> None:
        """Begin a step.

        Args:
            chosen: The weights that are perturbed.
            trained: All weights that are trained, those among them.
            radii: One for each that is perturbed.
            place: As in :class:`flatpatch.kinds.base.Passes`.
            optimizer: As there.
            sync: As for :func:`flatpatch.sam.perturbed`.
            model: Whose BatchNorm statistics come from the step's first pass alone.
            diagnostics: As for :func:`flatpatch.sam.perturbed`.
            random_state: Where the random generators stood before the first pass, if that is taken already.
            pairs: Of the model's LoRA factors, where they are asked for.
            radius: What the radius is of, see :data:`RADII`.
            progress: As in :class:`flatpatch.kinds.base.Passes`.
            begins: As there.
        """
        self.place = place
        self.optimizer = optimizer
        self.progress = progress
        self.begins = begins
        self.report: AscentStep | None = None
        self.loss: Any = None
        self.perturbed_loss: Any = None
        self._chosen, self._trained, self._radii = list(chosen), list(trained), list(radii)
        self._sync, self._model, self._diagnostics = sync, model, diagnostics
        self._pairs, self._effective = pairs, radius == "effective"
        self._random_state = random_state or RandomState()
        self._taken = 0
        self._moved = 0

    @abstractmethod
    def _climb(self, weights: list[Tensor], *, keep: bool, combined: bool) -> tuple[Any, Gradients]:
        """Take a pass of which nothing stays; return its loss and the gradients of some weights.

        Args:
            weights: Those.
            keep: Whether they must stay what they are during later passes, dense, in at least float32 and unscaled.
            combined: Whether they become a part of what is descended along, and so must be of all processes.
        """

    @abstractmethod
    def _descend(self, combine: Combine | None) -> Any:
        """Take the pass that leaves its gradient, or what ``combine`` makes of that; return its loss."""

    def gradient(self, *, keep: bool = False) -> Gradients:
        """Take a pass; return the gradients of the weights that are perturbed."""
        with self._pass():
            loss, gradients = self._climb(self._chosen, keep=keep, combined=False)
        self._heard(loss)
        return gradients

    def whole_gradient(self) -> Gradients:
        """Take a pass; return the gradients of all trained weights, dense, in at least float32, without loss scale."""
        with self._pass():
            loss, gradients = self._climb(self._trained, keep=True, combined=True)
        self._heard(loss)
        return gradients

    def descend(self, combine: Combine | None = None) -> None:
        """Take the step's last pass, and leave its gradient or what ``combine`` makes of it."""
        with self._pass():
            loss = self._descend(combine)
        self._heard(loss)
        if self._moved and self._taken > 1:  # of a step's only pass it would be the loss once more
            self.perturbed_loss = loss

    def chosen(self, vector: Gradients) -> Gradients:
        """Return of a vector over all trained weights the part of those that are perturbed."""
        found = {id(weight): entry for weight, entry in zip(self._trained, vector, strict=True)}
        return [found[id(weight)] for weight in self._chosen]

    @contextmanager
    def perturbed(
        self, direction: Gradients, *, eta: float | None = None, seed: int | None = None
    ) -> Iterator[AscentStep]:
        """Hold the weights at a distance of the radius along a direction inside the block."""
        step = perturbed(
            self._chosen,
            direction,
            rho=self._radii,
            adaptive=eta is not None,
            eta=0.0 if eta is None else eta,
            sync=self._sync,
            random_seed=seed,
            pairs=self._pairs if self._effective and eta is None else None,
            diagnostics=self._diagnostics,
        )
        del direction
        with step as report:
            self.report = self.report or report
            with self._elsewhere():
                yield report

    def momentum(self) -> Gradients:
        """Return the optimizer's momentum for each weight that is perturbed; None before the weight's first step."""
        options = [group.get("momentum") or group.get("betas") for group in self.optimizer.param_groups]
        if not any(options):
            raise UserError(
                f"sam=msam moves along the optimizer's momentum, and {type(self.optimizer).__name__} has none. Give "
                "it a momentum, or choose another kind of SAM."
            )
        states = [self.optimizer.state.get(weight, {}) for weight in self._chosen]
        return [next((state[name] for name in _MOMENTA if state.get(name) is not None), None) for state in states]

    @contextmanager
    def noised(self, share: float, seed: int) -> Iterator[None]:
        """Hold noise inside the block on the weights that LoRA's factors add to, see `sam.noise`."""
        sigma = share * max(self._radii)
        weights = self._frozen_weights()  # refused at the first step where they are not known, noise or none
        if sigma == 0:
            yield
            return
        with noised(weights, sigma=sigma, seed=seed), self._elsewhere():
            yield

    def descend_against(
        self, pairs: list[auxiliary.Pair] | None, *, rank: int, rate: float | None, seed: int
    ) -> list[auxiliary.Pair] | None:
        """Take the step's last pass with auxiliary pairs beside LoRA's, which climb; see `sam.auxiliary`."""
        rho = max(self._radii)
        weights = self._frozen_weights()
        if rho == 0:
            self.descend()
            return None
        if pairs is None:
            pairs = auxiliary.new_pairs(weights, rank=rank, seed=seed)
        pairs = [[part.to(each.weight.device) for part in pair] for each, pair in zip(weights, pairs, strict=True)]
        if self.begins:
            pairs, length = auxiliary.climbed(weights, pairs, rho=rho)
        else:
            length = auxiliary.norm(weights, pairs)
        with auxiliary.added(weights, pairs) as leaves, self._elsewhere():
            self.descend()
        pairs, finite = auxiliary.heard(
            pairs,
            leaves,
            rate=self._learning_rate() if rate is None else rate,
            scale=self._loss_scale(),
            average=self._sync == "global",
        )
        unknown = torch.full_like(length, math.nan)
        self.report = AscentStep(unknown, length, length, unknown, finite)
        return pairs

    def _frozen_weights(self) -> list[FrozenWeight]:
        if not self._pairs:
            raise UserError(
                "a perturbation of the weights that LoRA changes needs LoRA's pairs, as lora_pairs(model) finds them"
            )
        return frozen_weights(self._pairs)

    def _learning_rate(self) -> float:
        """Return the learning rate of LoRA's factors; under DeepSpeed, whose groups hold copies, the first group's."""
        factors = {id(factor) for pair in self._pairs or () for factor in (pair.A, pair.B)}
        groups = self.optimizer.param_groups
        own = (group for group in groups if any(id(weight) in factors for weight in group["params"]))
        return float(next(own, groups[0])["lr"])

    def _loss_scale(self) -> Tensor | float:
        """Return by what the loss is multiplied that a pass differentiates, as far as that is known here."""
        return 1.0

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """Tell that the passes inside the block are not at the weights themselves."""
        self._moved += 1
        try:
            yield
        finally:
            self._moved -= 1

    def balance(self, by: str, share: float) -> None:
        """Let LoRA's factors be rescaled against each other before the optimizer's next update, see `sam.balance`."""
        balance_before_update(self._pairs or (), self.optimizer, self._chosen, self._radii, share=share, by=by)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Give each pass the first one's random numbers, and have the first one alone count for BatchNorm."""
        first = self._taken == 0
        self._taken += 1
        if not first:
            self._random_state.restore()
        with nullcontext() if first else batch_norm_statistics_kept(self._model):
            yield

    def _heard(self, loss: Any) -> None:
        if self._taken == 1:
            self.loss = loss


def check_radius(radius: str, pairs: Sequence[LoraPair] | None) -> None:
    """Raise ValueError for what no radius can be of."""
    if radius not in RADII:
        raise ValueError(f"radius must be one of {', '.join(RADII)}, got {radius!r}")
    if radius == "effective" and not pairs:
        raise ValueError("an effective radius is of LoRA's factors: give their pairs, as lora_pairs(model) finds them")


def chosen_kind(kind: Kind | None, *, adaptive: bool, eta: float, random_seed: int | None) -> Kind:
    """Return the kind of SAM that these arguments ask for.

    Raises:
        ValueError: If they ask for two.
    """
    if adaptive and random_seed is not None:
        raise ValueError(ADAPTIVE_AT_RANDOM)
    if kind is not None and (adaptive or random_seed is not None):
        raise ValueError("give a kind of SAM, or adaptive=True or random_seed, not both")
    if random_seed is not None:
        return make_kind({"kind": "random"}, seed=random_seed)
    return kind or make_kind({"kind": "asam", "eta": eta} if adaptive else {"kind": "sam"})


def kept(gradients: Iterable[Tensor | None], scale: Tensor | float = 1.0) -> Gradients:
    """Return gradients as later passes leave them: copies, dense, in at least float32, without a loss scale."""
    found: Gradients = []
    for gradient in gradients:
        if gradient is None:
            found.append(None)
            continue
        dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        wide = torch.promote_types(dense.dtype, torch.float32)
        found.append(dense.to(wide, copy=True) if isinstance(scale, float) and scale == 1 else dense.to(wide) / scale)
    return found


def first_examples(batch: Any, share: float) -> Any:
    """Return the first ``ceil(share * m)`` examples of a batch of m.

    Args:
        batch: Tensors, or lists, by name or one after another; each has the examples along its first dimension.
        share: Over 0 and at most 1, which returns the batch itself.

    Raises:
        UserError: If the batch's parts are not of one length.
    """
    if share == 1:
        return batch
    parts = list(batch.values() if isinstance(batch, Mapping) else batch)
    lengths = {_length(part) for part in parts}
    if len(lengths) != 1 or -1 in lengths:
        kinds = ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        raise UserError(
            f"ascent_batch={share:g}: a batch here is no list of examples that could be cut (it holds {kinds}). Leave "
            "ascent_batch out."
        )
    count = math.ceil(share * lengths.pop())
    if isinstance(batch, Mapping):
        return {name: part[:count] for name, part in batch.items()}
    return type(batch)(part[:count] for part in batch)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.dim()) else -1


@torch.no_grad()
def put_gradients(weights: Iterable[Tensor], combined: Gradients) -> None:
    """Put a combined gradient where an optimizer looks for it, in the place of the last pass's."""
    for weight, gradient in zip(weights, combined, strict=True):
        if gradient is None or weight.grad is None:
            continue
        if weight.grad.is_sparse:
            weight.grad = gradient.to(weight.dtype)
        else:
            weight.grad.copy_(gradient)

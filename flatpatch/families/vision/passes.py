"""The passes of a step in a training loop written out by hand, whose own forward and backward pass is the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from flatpatch.sam import Combine, Gradients, StepPasses, kept, put_gradients


class LoopPasses(StepPasses):
    """The loop has taken the first pass, whose gradients are there; the others compute the same loss anew."""

    def __init__(
        self,
        chosen: Sequence[Tensor],
        trained: Sequence[Tensor],
        *,
        loss: Tensor,
        again: Callable[[], Tensor],
        at: Callable[[], AbstractContextManager[None]],
        **of_step: Any,
    ) -> None:
        """Begin between the loop's ``backward()`` and its ``step()``.

        Args:
            chosen: As for :class:`flatpatch.sam.StepPasses`.
            trained: As there.
            loss: What the loop has differentiated.
            again: Computes it anew, at the weights as they then are.
            at: Around each such computation.
            of_step: The rest that :class:`flatpatch.sam.StepPasses` takes.
        """
        super().__init__(chosen, trained, **of_step)
        self._own, self._again, self._at = loss.detach(), again, at

    def _climb(self, weights: list[Tensor], *, keep: bool, combined: bool) -> tuple[Tensor, Gradients]:
        loss = self._take()
        gradients = [weight.grad for weight in weights]
        return loss, kept(gradients) if keep else gradients

    def _descend(self, combine: Combine | None) -> Tensor:
        loss = self._take()
        if combine is not None:
            put_gradients(self._trained, combine(kept(weight.grad for weight in self._trained)))
        return loss

    def _take(self) -> Tensor:
        if self._taken == 1 and not self._moved:
            return self._own
        self._random_state.restore()  # the first pass, too, may have to be taken anew
        self.optimizer.zero_grad()
        with self._at():
            loss = self._again()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

"""What every kind of SAM is, and the passes of which it makes a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

Vector = list[Any]
"""A tensor, or None, for each weight."""


class Passes(Protocol):
    """The forward and backward passes of one step, all on the same batch and with the same random numbers.

    Attributes:
        place: Numbers that tell this step from all others of the training.
        progress: How far the training is, from 0 to 1; 0 where nobody knows.
        optimizer: What descends with the gradient that the step leaves; its state is read alone.
        begins: Whether no other batch came before since the optimizer's latest update.
    """

    place: tuple[int, ...]
    progress: float
    optimizer: Any
    begins: bool

    def gradient(self, *, keep: bool = False) -> Vector:
        """Take a pass at the weights as they are; return the gradients of the weights that are to be perturbed.

        Args:
            keep: Return them dense, in at least float32 and without any loss scale; else they are there to be climbed
                along at once, and the next pass may overwrite them.
        """

    def whole_gradient(self) -> Vector:
        """Take a pass at the weights as they are; return the gradients of all trained weights, to keep.

        They are dense, in at least float32, and without any loss scale.
        """

    def chosen(self, vector: Vector) -> Vector:
        """Return of a vector over all trained weights the part of those that are to be perturbed."""

    def perturbed(
        self, direction: Vector, *, eta: float | None = None, seed: int | None = None
    ) -> AbstractContextManager[Any]:
        """Hold the weights inside the block at a distance of the radius along a direction, then restore them.

        Args:
            direction: One entry for each weight that is to be perturbed; its length does not matter.
            eta: Measure the distance as ASAM does, with this added to each weight's size.
            seed: Take a random direction instead, which follows from this.
        """

    def descend(self, combine: Callable[[Vector], Vector] | None = None) -> None:
        """Take the last pass of the step at the weights as they are, and leave its gradient to descend along.

        Args:
            combine: Makes of this pass's gradient, as of :meth:`whole_gradient`, the one to descend along.
        """

    def noised(self, share: float, seed: int) -> AbstractContextManager[None]:
        """Hold noise inside the block on the weights that LoRA's factors add to, see :mod:`flatpatch.sam.noise`.

        Args:
            share: How much of its standard deviation, which is the radius.
            seed: The noise follows from this.
        """

    def descend_against(
        self, pairs: list[list[Any]] | None, *, rank: int, rate: float | None, seed: int
    ) -> list[list[Any]] | None:
        """Take the last pass of the step, as :meth:`descend` does, with auxiliary pairs beside LoRA's that climb.

        See :mod:`flatpatch.sam.auxiliary`. They climb and are scaled back, to the radius, where the next update's
        first batch begins.

        Args:
            pairs: What the pass before returned; None makes new ones.
            rank: Of new ones.
            rate: How far along their gradient they climb; None: the optimizer's learning rate.
            seed: New ones follow from this.

        Returns:
            The pairs; None where the radius is 0 and there are none.
        """

    def balance(self, by: str, share: float) -> None:
        """Let LoRA's factors be rescaled against each other before the optimizer's next update.

        Args:
            by: "gradient" or "norm", see :mod:`flatpatch.sam.balance`.
            share: How much of the strength, which is the radius.
        """

    def momentum(self) -> Vector:
        """Return what the optimizer has of momentum for each weight that is to be perturbed.

        Raises:
            UserError: If it has none at all.
        """


class Kind:
    """One kind of SAM, for the training of one task. Its docstring has its equation and where that is from.

    Attributes:
        name: Its value of ``sam=``.
        title: What it is called.
        place: Where it stands among the others where they are listed.
        arguments: Its settings, of those that not all kinds have, each with the argument of ``__init__`` that takes it.
        takes_radius: Whether its radius may be that of the weights that LoRA changes (``sam_radius=``).
        of_pairs: Whether it goes by LoRA's factors as pairs, and so perturbs none of them.
        noises: Whether it perturbs the weights that LoRA's factors add to, and so needs those.
        balances: Whether it weighs the two factors of a pair against each other, and so needs both.
        papers_rho: The radii that its paper takes, where they are on another scale than SAM's.
        idle: Settings that all other kinds have and that change nothing in it.
        seeded: Whether ``__init__`` takes a ``seed``.
        climbs: Whether the gradient of a pass of its own says where to climb and does nothing else: whether that pass
            may be taken on another loss or on fewer examples (``ascent_loss=``, ``ascent_batch=``).
        reads_momentum: Whether it needs ``passes.momentum``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[int] = 10
    arguments: ClassVar[Mapping[str, str]] = {}
    takes_radius: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = False
    noises: ClassVar[bool] = False
    balances: ClassVar[bool] = False
    papers_rho: ClassVar[tuple[float, ...]] = ()
    idle: ClassVar[tuple[str, ...]] = ()
    seeded: ClassVar[bool] = False
    climbs: ClassVar[bool] = True
    reads_momentum: ClassVar[bool] = False

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """Return its settings, of those that not all kinds have."""
        radius = ("sam_radius",) if cls.takes_radius else ()
        return (*cls.arguments, *radius, *(("ascent_loss", "ascent_batch") if cls.climbs else ()))

    def step(self, passes: Passes) -> None:
        """Take one step's passes, the last of them by ``passes.descend`` or ``passes.descend_against``.

        Args:
            passes: Of this step.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what it remembers from step to step, for a checkpoint: tensors, numbers, and lists of them."""
        return {}

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Remember what :meth:`state` returned; its tensors may have come back on the CPU."""


def mixed_seed(*numbers: int) -> int:
    """Return one seed for some numbers: equal for equal ones, and unrelated for others, however near they are."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1  # torch takes 63 bits

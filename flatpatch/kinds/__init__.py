"""The kinds of SAM: one file each, found here by itself.

A file says all of its kind: its equation, what it is called, its settings, its state, and its step in terms of the
passes that whatever trains can make (:class:`flatpatch.kinds.base.Passes`). A setting that a kind alone has is also
declared in ``flatpatch/settings.py``, with its default. Loading this loads no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from flatpatch.kinds.base import Kind, Passes, mixed_seed

_HELPERS = ("base", "vectors")


def _found() -> list[type[Kind]]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _HELPERS]
    kinds: list[type[Kind]] = [importlib.import_module(f"{__name__}.{name}").KIND for name in names]
    return sorted(kinds, key=lambda kind: (kind.place, kind.name))


KINDS: Mapping[str, type[Kind]] = {kind.name: kind for kind in _found()}
"""By the value of ``sam=``."""

OF_SOME_KINDS: tuple[str, ...] = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.settings()))
"""Settings that have a meaning for some of the kinds alone."""


def of_pairs(name: str) -> bool:
    """Whether a value of ``sam=`` is a kind that goes by LoRA's factors as pairs."""
    return name in KINDS and KINDS[name].of_pairs


def noises(name: str) -> bool:
    """Whether a value of ``sam=`` is a kind that needs the weights that LoRA's factors add to."""
    return name in KINDS and KINDS[name].noises


def balances(name: str) -> bool:
    """Whether a value of ``sam=`` is a kind that needs both factors of a pair trained."""
    return name in KINDS and KINDS[name].balances


def make_kind(settings: Mapping[str, Any], *, seed: int = 0) -> Kind:
    """Make the kind that a run's description asks for, with no state yet.

    Args:
        settings: The description's part ``sam``: ``kind``, and the kinds' own settings in it or in its ``options``.
        seed: Of random directions.

    Returns:
        A kind for the training of one task: what it remembers must not reach the next one.
    """
    kind = KINDS[settings["kind"]]
    given = {**settings, **settings.get("options", {})}
    values = {argument: given[name] for name, argument in kind.arguments.items() if name in given}
    return kind(**values, **({"seed": seed} if kind.seeded else {}))


__all__ = ["KINDS", "OF_SOME_KINDS", "Kind", "Passes", "balances", "make_kind", "mixed_seed", "noises", "of_pairs"]

"""Reference numbers that ship with the package, each with its source.

``olora_*`` are derived from the result files O-LoRA's repository ships; ``paper_*`` are rows of the
papers' tables, with a ``verification`` level on each row. Repository runs and paper rows are different
experiments: do not mix them in one column.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from flatpatch.errors import UserError, did_you_mean

_FOLDER = files("flatpatch") / "baselines"


def list_baselines() -> list[str]:
    """Return the names ``load_baseline`` knows, sorted."""
    return sorted(item.name.removesuffix(".json") for item in _FOLDER.iterdir() if item.name.endswith(".json"))


def load_baseline(name: str) -> dict[str, Any]:
    """Return one set of reference numbers.

    Args:
        name: One of ``list_baselines()``, e.g. ``"olora_order1"``.

    Returns:
        The file's object. ``olora_*`` hold ``setting``, ``source``, ``metrics`` and ``definitions``;
        ``paper_*`` hold ``paper``, ``verification_levels`` and ``tables`` of rows.

    Raises:
        UserError: If there is no such baseline.
    """
    known = list_baselines()
    if name not in known:
        raise UserError(f"unknown baseline '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    baseline: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return baseline

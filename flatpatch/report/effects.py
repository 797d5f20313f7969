"""Which settings change nothing beside the others: one rule for runs, their names, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatpatch.report.records import setting

OF_SAM = ("rho", "eta", "scope", "sam_on", "sync", "ascent_loss")
# How is measured, where something is.
HOW_MEASURED = tuple(f"measure_{part}" for part in ("scope", "when", "samples", "batch", "rho", "effort"))


def without_effect(sam: str, measure: str) -> frozenset[str]:
    """Return the settings that change nothing with these two."""
    of_sam = {"off": OF_SAM, "sam": ("eta",)}.get(sam, ())
    return frozenset((*of_sam, *(() if measure.strip(" ,") else HOW_MEASURED)))


def why_without_effect(key: str, sam: str) -> str:
    """Say why one of these settings changes nothing, and what would give it an effect."""
    if key in HOW_MEASURED:
        return "nothing is measured. Add measure=all."
    return f"sam={sam}. Add sam={'asam' if key == 'eta' else 'sam'}."


def idle_settings(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the settings that changed nothing of a recorded run."""
    return without_effect(str(setting(record, "sam", "off")), str(setting(record, "measure", "")))

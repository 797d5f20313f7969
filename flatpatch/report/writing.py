"""Whether a measured flatness depends on how LoRA's factors are written, in words and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flatpatch.measuring import INVARIANT_SCOPES, is_refused, writing_mark

# Columns of the certificate's table.
_CHANGES = {
    "invariance_change_top_eigenvalue": "top eigenv.",
    "invariance_change_trace": "trace",
    "invariance_change_keskar_sharpness": "Keskar",
    "invariance_change_sam_sharpness_ascent": "SAM ball",
}
_CERTIFICATE = "invariance_tolerance"

Entry = Mapping[str, Any]


def mark_of(record: Mapping[str, Any], entry: Entry) -> str:
    """Return the mark of one measuring point's scope; empty where the run has no LoRA."""
    tuning = record.get("settings", {}).get("tuning", {}).get("value", "lora")
    return writing_mark(entry["scope"], entry["values"]) if tuning == "lora" else ""


def writing_sentence(scope: str, values: Iterable[Mapping[str, float | None]]) -> str:
    """Say for a table of one scope whether its numbers depend on how LoRA's factors are written.

    That of the loss never does, so of a loss alone nothing is said.

    Args:
        scope: What was varied.
        values: Of each measuring point; those with a certificate decide, the worst of them first: one that was
            refused, then the largest change.
    """
    values = [each for each in values if each]
    if not values:
        return ""
    if refused := sum(map(is_refused, values)):
        return (
            "Whether these numbers depend on how LoRA's factors are written is not certified: of "
            f"{len(values)} measuring points {refused} had the certificate (measure=invariance) refused. The files in "
            "flatness/ say why."
        )
    certified = [each for each in values if each.get(_CERTIFICATE) is not None]
    if not certified:
        depends = scope not in INVARIANT_SCOPES
        return _words(depends) + " By construction: no certificate was measured (measure=invariance)."
    changes = [each.get("invariance_change") for each in certified]
    finite = [change for change in changes if change is not None]
    tolerance = max(float(each[_CERTIFICATE] or 0) for each in certified)
    depends = len(finite) < len(changes) or max(finite) > tolerance
    largest = f"{max(finite):.2g}" if len(finite) == len(changes) else "beyond all bounds"
    return f"{_words(depends)} Measured: largest relative change {largest} (passes up to {tolerance:g})."


def certificate_table(entries: Sequence[Entry]) -> list[str]:
    """Return the lines of a table of relative changes, a row for each certificate; none where there is none."""
    certified = [entry for entry in entries if entry["values"].get(_CERTIFICATE) is not None]
    if not certified:
        return []
    title = "relative change when A, B are written A/c, cB (c = 1/4 ... 4) and rotated"
    places = [f"{entry['task_index'] + 1} {entry['task']} {entry['when']}" for entry in certified]
    width = max(map(len, places))
    lines = ["", title, f"{'':<{width}} {'scope':<9}" + "".join(f"{words:>12}" for words in _CHANGES.values())]
    for place, entry in zip(places, certified, strict=True):
        numbers = "".join(f"{_short(entry['values'].get(name)):>12}" for name in _CHANGES)
        mark = writing_mark(entry["scope"], entry["values"])
        lines.append(f"{place:<{width}} {entry['scope']:<9}{numbers}  {mark}")
    return lines


def _words(depends: bool) -> str:
    how = ", the loss apart, depend" if depends else " do not depend"
    return f"These numbers{how} on how LoRA's factors are written (A / c and c B are the same function)."


def _short(value: float | None) -> str:
    return "beyond" if value is None else f"{value:.2g}"

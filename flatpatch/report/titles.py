"""What a table or figure says about the run it shows: which run it is, and how far its numbers carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.families import of_record
from flatpatch.report.records import setting, settings_of
from flatpatch.settings import DEFAULTS, idle_settings, sam_title

_LABEL_TEXTS = {
    "quick": "small model and data",
    "small": "a small pretrained model on some of the texts, in our own training loop",
    "reference": "our own small implementation, not upstream's code",
    "reconstruction": "written from summaries of a paper whose text was not read",
    "off-protocol": "not upstream's own set-up; the deviations are in record.json",
}

# What a verdict on such runs is about, in the words that stand in its own sentence.
_ABOUT = {"quick": "in the miniature", "small": "in the small form"}


def about(profile: str) -> str:
    """Return what verdicts on runs of a profile are about; empty where that needs no word."""
    return _ABOUT.get(profile, "")


def labels(record: Mapping[str, Any]) -> list[str]:
    """Return why the run's numbers must not stand beside a paper's; empty if they may.

    Quick and reference runs are labelled whatever the record's own ``labels`` say.
    """
    found = {*record.get("labels", ()), record["profile"], record["engine"]}
    return [label for label in _LABEL_TEXTS if label in found]


def warning(record: Mapping[str, Any]) -> str:
    """Return the label to print loudly with the run's numbers, or an empty string if it needs none."""
    found = labels(record)
    if not found:
        return ""
    texts = "; ".join(_LABEL_TEXTS[label] for label in found)
    return f"{_capitals(found)} RUN ({texts}). Not comparable with the paper's numbers."


def short_warning(record: Mapping[str, Any]) -> str:
    """Return the label in a few words, for a figure's title."""
    found = labels(record)
    return f"{_capitals(found)} RUN, not comparable with the paper's numbers" if found else ""


def describe(record: Mapping[str, Any]) -> str:
    """Return one line that names the run: method, order, optimiser, seed, profile and engine."""
    parts = [setting(record, "variant") or record["method"]]
    if of_record(record).learns_classes:
        parts.append(record["benchmark"])
    if (order := setting(record, "order")) is not None:
        parts.append(f"order {order}")
    parts.append(sam_title(settings_of(record)))
    parts += [
        f"{key}={setting(record, key)}"
        for key in ("tuning", "budget", "fraction")
        if setting(record, key, DEFAULTS[key]) != DEFAULTS[key]
    ]
    if seeds := record["seeds"]:
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    parts += [f"profile {record['profile']}", f"engine {record['engine']}"]
    return ", ".join(parts)


def radius_note(record: Mapping[str, Any]) -> str:
    """Say what the recorded norms are of where the radius is of something else; empty where it is theirs."""
    if setting(record, "sam_radius") != "effective" or "sam_radius" in idle_settings(record):
        return ""
    return (
        "With sam_radius=effective rho is the norm of the change of the weights that LoRA adds to. The perturbation's "
        "norms here are those of the factors' own step, before and after rounding."
    )


def _capitals(found: Sequence[str]) -> str:
    return " AND ".join(found).upper()

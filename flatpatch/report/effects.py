"""What a change of settings does: two groups of runs paired by their seeds, and a verdict on whether it is better.

Every sentence is about a hypothesis: that the first group is better by a metric. Where several groups are told to be,
as with several radii, each metric's hypotheses are corrected for their number (``flatpatch.statistics``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flatpatch.metrics import IN_A_LINE, MARGIN, METRICS, Metric
from flatpatch.report.groups import Group, apart
from flatpatch.report.records import setting
from flatpatch.report.titles import about
from flatpatch.settings import with_role
from flatpatch.statistics import Difference, corrected, paired_difference, pairing

_WIDTH = 110
_OF_SAM = frozenset({"sam", *with_role("sam")})


@dataclass(frozen=True)
class Runs:
    """Finished runs that differ by their seed alone."""

    title: str
    records: Sequence[Mapping[str, Any]]

    @property
    def by_seed(self) -> dict[str, Mapping[str, Any]]:
        """The records by their seeds, as text; of a seed that was run twice the first."""
        found: dict[str, Mapping[str, Any]] = {}
        for record in self.records:
            found.setdefault(", ".join(map(str, record["seeds"])) or "none", record)
        return found


@dataclass(frozen=True)
class Effect:
    """What the first group's runs have more of one metric."""

    metric: Metric
    seeds: tuple[str, ...]  # of the pairs
    here: tuple[float, ...]  # their values
    there: tuple[float, ...]
    lacking: tuple[str, ...]  # seeds that have no such number on one side
    difference: Difference | None  # None where no pair has one


@dataclass(frozen=True)
class Contrast:
    """Two groups and their effects."""

    here: Runs
    there: Runs
    seeds: tuple[str, ...]  # that both have
    effects: tuple[Effect, ...]

    @property
    def unpaired(self) -> list[str]:
        """A sentence for each side that has seeds without a partner."""
        found = []
        for own, other in ((self.here, self.there), (self.there, self.here)):
            if alone := [seed for seed in own.by_seed if seed not in other.by_seed]:
                found.append(f"seed {', '.join(alone)} of {own.title} has no partner and is left out")
        return found


def effects_of_sam(groups: Sequence[Group], *, margin: float = MARGIN) -> list[Contrast]:
    """Compare each group with SAM with the one that differs from it in SAM's settings alone and has SAM off.

    Args:
        groups: As ``group_runs`` returns them; those without a finished run are left out.
        margin: The smallest difference that matters, in points.

    Returns:
        A contrast of each such pair, corrected together.
    """
    finished = [group for group in groups if group.is_finished]
    pairs = [
        (_runs_of(group), _runs_of(off))
        for group in finished
        for off in finished
        if off is not group and _sam_of(off) == "off" and _sam_of(group) != "off" and apart(group, off) <= _OF_SAM
    ]
    return contrasts(pairs, margin=margin)


def contrasts(
    pairs: Sequence[tuple[Runs, Runs]], *, metrics: Sequence[str] = IN_A_LINE, margin: float = MARGIN
) -> list[Contrast]:
    """Compare groups by some metrics, each with the hypothesis that the first is better.

    Args:
        pairs: The groups; pairs that share no seed are kept, without an effect.
        metrics: Names as in a record's ``metrics``.
        margin: The smallest difference that matters, in points.

    Returns:
        One contrast of each pair. Of several, each metric's hypotheses are corrected for their number.
    """
    found = [_contrast(here, there, metrics, margin) for here, there in pairs]
    if len(found) < 2:
        return found
    corrections = [_corrected([one.effects[k] for one in found]) for k in range(len(metrics))]
    return [replace(one, effects=own) for one, own in zip(found, zip(*corrections, strict=True), strict=True)]


def _corrected(effects: Sequence[Effect]) -> list[Effect]:
    """Return effects of one metric, corrected for how many they are."""
    judged = corrected([effect.difference for effect in effects])
    return [replace(effect, difference=found) for effect, found in zip(effects, judged, strict=True)]


def effects_text(found: Sequence[Contrast], *, margin: float = MARGIN) -> str:
    """Return contrasts as text: two lines and the verdict on each metric; empty where there is none."""
    if not found:
        return ""
    points = f"{margin:g} point{'s' * (margin != 1)}"
    several = f" p-values of a metric are corrected for {len(found)} hypotheses." if len(found) > 1 else ""
    lines = [f"paired by seed: is the first better? What lies within {points} is too small to matter.{several}"]
    for one in found:
        lines += [f"{one.here.title} minus {one.there.title}"]
        lines += [f"  {sentence}" for sentence in sentences(one)]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="    ") or [""])


def sentences(one: Contrast) -> list[str]:
    """Return what is said of two groups: each metric's verdict, and what was left out."""
    if not one.seeds:
        return ["they share no seed, so that no run has a partner"]
    return [say(effect, one) for effect in one.effects] + _savings(one) + one.unpaired


def _savings(one: Contrast) -> list[str]:
    """Say what the pairing saves where both sides begin with the same state."""
    if not all("forked" in record for side in (one.here, one.there) for record in side.records):
        return []
    saved = {effect.metric.words.title: pairing(effect.here, effect.there) for effect in one.effects}
    return [f"{title}, the interval: {found.sentence('points')}" for title, found in saved.items() if found is not None]


def say(effect: Effect, one: Contrast) -> str:
    """Return the verdict on one metric, with what it is about."""
    title = effect.metric.words.title
    if effect.difference is None:
        return f"{title}: no pair of runs has it on both sides"
    text = effect.difference.sentence("points", about(one.here.records[0]["profile"]))
    lacking = f"; seed {', '.join(effect.lacking)} lacks it and is left out" if effect.lacking else ""
    return f"{title} is {effect.metric.better}: {text}{lacking}"


def _contrast(here: Runs, there: Runs, metrics: Sequence[str], margin: float) -> Contrast:
    ours, theirs = here.by_seed, there.by_seed
    seeds = tuple(seed for seed in ours if seed in theirs)
    effects = []
    for name in metrics:
        values = {seed: (ours[seed]["metrics"].get(name), theirs[seed]["metrics"].get(name)) for seed in seeds}
        paired = {seed: pair for seed, pair in values.items() if None not in pair}
        first, second = ([pair[side] for pair in paired.values()] for side in (0, 1))
        difference = (
            paired_difference(first, second, direction=METRICS[name].better, smallest=margin) if paired else None
        )
        lacking = tuple(seed for seed in seeds if seed not in paired)
        effects.append(Effect(METRICS[name], tuple(paired), tuple(first), tuple(second), lacking, difference))
    return Contrast(here, there, seeds, tuple(effects))


def _runs_of(group: Group) -> Runs:
    return Runs(group.title, [run.record for run in group.counted])


def _sam_of(group: Group) -> str:
    return str(setting(group.record, "sam", "off"))

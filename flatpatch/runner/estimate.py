"""How long runs will take, judged by those of their kind that are finished."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatpatch.families.base import Plan
from flatpatch.report.records import RECORD_FILE
from flatpatch.runner.executors.board import in_time

# What the README says of quick runs: minutes.
QUICK_SECONDS = 180.0
Kind = tuple[str, str, str]  # method, profile, engine


@dataclass(frozen=True)
class Estimate:
    """How long runs will take.

    Attributes:
        seconds: All of them together, one after another; None where of one nothing is known.
        source: From what that is known, or why it is not.
    """

    seconds: float | None
    source: str

    def sentence(self, at_once: int = 1) -> str:
        """Return it in words, for runs of which some go at once."""
        if self.seconds is None:
            return f"no estimate of the time: {self.source}"
        together = f" with {at_once} at once" if at_once > 1 else " of computing"
        return f"{in_time(self.seconds / at_once)}{together}, by {self.source}"


def estimate(plans: Sequence[Plan], output: Path) -> Estimate:
    """Estimate how long runs will take.

    Args:
        plans: The runs.
        output: The folder with the runs to judge by.
    """
    kinds = Counter((plan.request.settings.method, plan.profile, plan.engine) for plan in plans)
    known = seconds_taken(output)
    guessed = {kind for kind in kinds if kind not in known and kind[1] == "quick"}
    if unknown := [kind for kind in kinds if kind not in known and kind not in guessed]:
        return Estimate(None, f"no run of {' '.join(unknown[0])} is finished in {output}")
    means = {kind: QUICK_SECONDS if kind in guessed else statistics.fmean(known[kind]) for kind in kinds}
    sources = []
    if seen := [kind for kind in kinds if kind not in guessed]:
        count = sum(len(known[kind]) for kind in seen)
        sources.append(f"the mean time of {count} finished run{'s' if count > 1 else ''} of the same kind in {output}")
    if guessed:
        sources.append(f"the README's minutes for a quick run, taken as {QUICK_SECONDS / 60:g}")
    return Estimate(sum(means[kind] * count for kind, count in kinds.items()), " and ".join(sources))


def seconds_taken(output: Path) -> dict[Kind, list[float]]:
    """Return the seconds that runs took, by what they are runs of: finished ones that were never stopped."""
    found: dict[Kind, list[float]] = {}
    for path in sorted(output.glob(f"*/{RECORD_FILE}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text(encoding="utf-8"))
            kind = (record["method"], record["profile"], record["engine"])
            whole = record["status"] == "finished" and not record["restarts"]
            if whole and (seconds := float(record["timing"]["total_seconds"])) > 0:
                found.setdefault(kind, []).append(seconds)
    return found

"""Repositories driven by JSON files around a hand-written loop (the PyCIL and PILOT kind)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatpatch.families.base import FinishedRun, Machine, Plan, Results
from flatpatch.families.vision.comparing import compare_data, knows_data, read_log, subject
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.settings import Request

__all__ = [
    "LEARNS_CLASSES",
    "collect",
    "compare_data",
    "knows_data",
    "plan",
    "read_log",
    "reopen",
    "subject",
]

LEARNS_CLASSES = True


def plan(upstream: VisionUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.vision.planning import make_plan

    return make_plan(upstream, request, machine, dry_run=dry_run)


def collect(plan: Plan, stages: int) -> Results:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.vision.results import collect

    return collect(plan, stages)


def reopen(upstream: VisionUpstream, folder: Path, record: dict[str, Any]) -> FinishedRun:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.vision.reopening import reopen

    return reopen(upstream, folder, record)

"""Repositories driven by shell scripts around Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatpatch.families.base import FinishedRun, Machine, Plan, Results
from flatpatch.families.text.comparing import compare_data, knows_data, read_log, subject
from flatpatch.families.text.upstream import TextUpstream
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

LEARNS_CLASSES = False


def plan(upstream: TextUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.text.planning import make_plan

    return make_plan(upstream, request, machine, dry_run=dry_run)


def collect(plan: Plan, stages: int) -> Results:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.text.results import collect

    return collect(plan, stages)


def reopen(upstream: TextUpstream, folder: Path, record: dict[str, Any]) -> FinishedRun:
    """See :class:`flatpatch.families.base.Family`."""
    from flatpatch.families.text.reopening import reopen

    return reopen(upstream, folder, record)

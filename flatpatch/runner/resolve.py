"""From words to a plan: which method, which family, on which machine; and a plan as text."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from flatpatch import settings
from flatpatch.families.base import PORT, Family, Machine, Plan, Stage
from flatpatch.runner.sam_places import where_sam_enters
from flatpatch.runner.tracking import check_tracker
from flatpatch.settings import Request, in_name, sam_title, shown
from flatpatch.upstreams import UPSTREAMS


def parse(words: Sequence[str]) -> Request:
    """Turn ``key=value`` words into a checked request.

    Raises:
        UserError: With every mistake found.
    """
    return settings.parse(words, UPSTREAMS)


def make_plan(request: Request, *, dry_run: bool = False) -> Plan:
    """Resolve every ``auto``, and check whatever can be checked without starting.

    Args:
        request: The parsed settings.
        dry_run: Plan for a machine that has what is missing here (CUDA, data, weights).

    Raises:
        UserError: With the reasons why this run cannot start as asked.
    """
    check_tracker(request.settings.track)
    upstream = UPSTREAMS[request.settings.method]
    machine = Machine(cuda_devices=cuda_devices())
    return Family(upstream.family).plan(upstream, request, machine, dry_run=dry_run)


def cuda_devices() -> int:
    """Return how many CUDA devices torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def command_of(stage: Stage, python: str, port: int) -> list[str]:
    """Return the words of the command that runs one stage."""
    return [python, *(word.replace(PORT, str(port)) for word in stage.command)]


def render(plan: Plan, python: str = "python") -> str:
    """Return the plan as text: the exact commands, and their difference from upstream's own."""
    lines = [headline(plan), ""]
    for stage in plan.stages:
        variables = f"CUDA_VISIBLE_DEVICES={','.join(plan.devices)} " if plan.device == "cuda" else ""
        command = command_of(stage, python, plan.request.settings.port or 29500)
        lines += [f"# {stage.title}", variables + shlex.join(command), ""]
    for part in (plan.recipe, where_sam_enters(plan)):
        lines += [*part, ""] if part else []
    if plan.engine == "upstream":
        lines.append("Differences from upstream's own settings and requirements:")
        for deviation in plan.deviations:
            where = f" [{', '.join(deviation.tasks)}]" if deviation.tasks else ""
            lines.append(
                f"  {deviation.what}{where}: {deviation.upstream or '-'} -> {deviation.here or '-'}  ({deviation.why})"
            )
        if not plan.deviations:
            lines.append("  none")
    lines += ["This run cannot start here:", *(f"  - {lack}" for lack in plan.lacks)] if plan.lacks else []
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def headline(plan: Plan) -> str:
    """Return what will run and why, in a few lines."""
    settings = plan.request.settings
    title = sam_title(dataclasses.asdict(settings), told=("scope",))
    sam = "without SAM" if settings.sam == "off" else f"with {title}"
    own = in_name(settings, ("tuning", "budget", "fraction"))
    controls = "".join(f", {key}={shown(value)}" for key, value in own.items())
    lines = [
        f"{plan.upstream.title}, {plan.sequence}, {sam}{controls}, seed {settings.seed}",
        f"  profile {plan.profile}: {plan.profile_reason}",
        f"  engine {plan.engine}: {plan.engine_reason}",
        f"  device {plan.device}{':' + ','.join(plan.devices) if plan.devices else ''}, "
        f"{plan.world_size} process(es), launcher {plan.launcher}",
        f"  folder {plan.folder}",
    ]
    if plan.labels:
        lines.append(f"  {' and '.join(plan.labels)} run: its numbers are not comparable with a paper's")
    return "\n".join(lines)

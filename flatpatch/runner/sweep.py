"""Several runs one after another."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.base import Plan
from flatpatch.report.effects import effects_of_sam, effects_text
from flatpatch.report.groups import Run, group_runs
from flatpatch.report.overview import seeds_table
from flatpatch.runner.execute import execute
from flatpatch.runner.pages import leave_page
from flatpatch.runner.record import check_continues, compared_settings
from flatpatch.runner.resolve import make_plan, parse, render
from flatpatch.settings import WHOLE, Request, given_twice, repeated, shown, split_word
from flatpatch.terminal import say

MANY = 1_000  # runs that need a word more
MOST = 10_000  # runs that are planned at all
SURE = "yes"
SHOWN = 20  # runs whose commands a dry run prints


def expand(words: Sequence[str]) -> list[list[str]]:
    """Return one list of ``key=value`` words for every combination of the listed values.

    Raises:
        UserError: If a range is empty, a list names a value twice, or the combinations are too many to mean that.

    >>> expand(["rho=0,0.1", "seed=0..1"])
    [['rho=0', 'seed=0'], ['rho=0', 'seed=1'], ['rho=0.1', 'seed=0'], ['rho=0.1', 'seed=1']]
    """
    last: dict[str, Sequence[str]] = {}
    sure = False
    for word in words:
        key, value = split_word(word)
        if key == SURE:
            sure = _is_sure(value)
        elif key in WHOLE or key.startswith("upstream."):
            last[key] = [value]
        else:
            last[key] = listed(word, key, value)
    count = math.prod(map(len, last.values()))
    if count > MOST or (count > MANY and not sure):
        longest = max(last, key=lambda key: len(last[key]))
        advice = f"If you mean it, add {SURE}=true." if count <= MOST else f"A sweep has at most {MOST}: split it."
        raise UserError(f"these are {count} runs, {len(last[longest])} values of {longest} alone. {advice}")
    chosen = [[f"{key}={value}" for value in values] for key, values in last.items()]
    return [list(combination) for combination in itertools.product(*chosen)]


def listed(word: str, key: str, value: str) -> Sequence[str]:
    """Return the values that a word lists; of a long range no more than shows that it is too long."""
    match = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", value)
    if match is None:
        values = [part.strip() for part in value.split(",")]
        if twice := repeated(values):
            raise UserError(f"{word} names {twice} twice. Name each value once.")
        return values
    first, final = int(match[1]), int(match[2])
    if final < first:
        raise UserError(f"{word}: the range is empty (expected the smaller number first, e.g. {key}={final}..{first}).")
    if final - first >= MOST:
        raise UserError(f"{word}: these are {final - first + 1} runs. A sweep has at most {MOST}: split it.")
    return [str(number) for number in range(first, final + 1)]


def _is_sure(value: str) -> bool:
    if value not in ("true", "false"):
        raise UserError(f"{SURE}='{value}' is neither true nor false.")
    return value == "true"


def sweep(words: Sequence[str]) -> int:
    """Run every combination, then print what they gave; returns 1 if a run failed."""
    dry_run = "--dry-run" in words
    combinations = expand([word for word in words if word != "--dry-run"])
    if combinations == [[]] and not dry_run:
        raise UserError("nothing to sweep over: name at least one setting, e.g. seed=0..2. See sweep --help.")
    requests = [parse(combination) for combination in combinations]
    if said := given_twice([word for word in words if word != "--dry-run"]):
        say("\n".join(f"note: {note}" for note in said))
    if len(requests) > 1:
        say("\n".join([f"{len(requests)} combinations", *_without_effect(requests)]))
    plans: list[Plan] = []
    known: list[tuple[Any, ...]] = []
    for plan in (make_plan(request, dry_run=dry_run) for request in requests):
        # Without SAM its radius changes nothing, and auto may come to what is named too: one run stands for all.
        what = (plan.folder, plan.profile, plan.engine, compared_settings(plan))
        if what not in known:
            known.append(what)
            plans.append(plan)
    if len(plans) > 1 and any(plan.request.settings.run for plan in plans):
        raise UserError(
            "run=NAME would put every run of the sweep into one folder. Leave run= out, or set output=FOLDER."
        )
    folders = [plan.folder for plan in plans]
    if twice := repeated([str(folder) for folder in folders]):
        raise UserError(
            f"two runs of this sweep would use {twice}. Give them different output= folders, one sweep each."
        )
    if dry_run:
        print("1 run\n" if len(plans) == 1 else f"{len(plans)} runs that differ\n")
        if len(plans) <= SHOWN:
            print("\n\n".join(render(plan) for plan in plans))
            return 0
        print(render(plans[0]))
        print("\nand in the same way (with run instead of sweep, --dry-run shows the commands of one):")
        print("\n".join(f"  {plan.folder}" for plan in plans[1:]))
        return 0
    for plan in plans:
        check_continues(plan.folder, plan)
    ended, failures = [], []
    for number, plan in enumerate(plans, 1):
        say(f"\nrun {number}/{len(plans)}: {plan.folder.name}")
        try:
            ended.append((plan, execute(plan)))
        except FlatpatchError as error:
            if error.exit_code != 1:
                raise
            print(f"flatpatch: {error}")
            failures.append(plan.folder.name)
    print("\n" + seeds_table([record for _, record in ended]))
    finished = [Run(plan.folder, record) for plan, record in ended]
    if effects := effects_of_sam(group_runs(finished)):
        print(f"\n{effects_text(effects)}")
    if failures:
        print(f"failed: {', '.join(failures)}")
    leave_page(folders)
    return 1 if failures else 0


def _without_effect(requests: Sequence[Request]) -> list[str]:
    """Say which settings change nothing, and where: runs that differ by them alone are one."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for request in requests:
        for key, why in request.idle().items():
            values.setdefault((key, why), {})[shown(getattr(request.settings, key))] = None
    return [f"note: {key}={','.join(given)} has no effect where {why}" for (key, why), given in values.items()]

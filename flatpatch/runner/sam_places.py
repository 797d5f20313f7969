"""Where SAM enters the code that a run executes, as files and lines of the patched tree."""

from __future__ import annotations

import re
from pathlib import Path

from flatpatch import patches
from flatpatch.families.base import Plan

# Of the calls that the patches insert: those by which a step's gradient is taken at the perturbed weights.
CALLS = {
    "flatpatch.hooks.attach_trainer(": "from then on each pass of a step is a call of the trainer's training_step",
    "flatpatch.hooks.second_pass(": "the gradient at the perturbed weights takes the place of the authors'",
}
DEFAULT_LOSS = "task"  # where a call names none
OF_REFERENCE = ("flatpatch/families/reference.py", "self.sam.gradients(")


def sam_places(plan: Plan) -> list[str]:
    """Return each place as ``file:line  call``, for the code that this plan runs."""
    if plan.verified is None:
        file, call = OF_REFERENCE
        lines = (patches.PROJECT.root / file).read_text(encoding="utf-8").splitlines()
        return [f"{file}:{number}  {call[:-1]}" for number, line in enumerate(lines, 1) if call in line]
    found = []
    for path, number, line in patches.inserted_lines(plan.verified.repo):
        call = line.strip()
        for name, what in CALLS.items():
            if call.startswith(name) and _trains_by(plan, path) and _perturbs(plan, loss := _loss_of(call)):
                of_loss = "" if loss == DEFAULT_LOSS else f" of the {loss} loss"
                found.append(f"{path}:{number}  {name[:-1]}: {what}{of_loss}")
    return found


def _trains_by(plan: Plan, path: str) -> bool:
    return not plan.trained_by or Path(path).stem in plan.trained_by


def _perturbs(plan: Plan, loss: str) -> bool:
    return not plan.perturbed_losses or loss in plan.perturbed_losses


def _loss_of(call: str) -> str:
    """Return the loss that an inserted call names."""
    named = re.search(r'"(\w+)"\)$', call)
    return named[1] if named else DEFAULT_LOSS


def where_sam_enters(plan: Plan) -> list[str]:
    """Return a few lines about it for a dry run."""
    places = sam_places(plan)
    tree = "flatpatch's own code" if plan.verified is None else f"the patched tree, {_copy(plan)}"
    on = plan.request.settings.sam != "off"
    return [f"SAM {'enters' if on else 'is off; it would enter'} in {tree}:", *(f"  {place}" for place in places)]


def _copy(plan: Plan) -> str:
    assert plan.verified is not None
    return f"build/{patches.copy_path(plan.verified.repo, plan.verified.patched_tree).name}"

"""The run's record: written before the start, finished after, always whole."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.families.base import Plan, Stage
from flatpatch.families.choices import installed
from flatpatch.files import folder_hash, write_atomically
from flatpatch.report.records import read_record
from flatpatch.runner.own_code import other_code, own_code
from flatpatch.settings import OF_PLACES, without_effect

SCHEMA = 1
LOCK = ".lock"
SLURM_LOG = "slurm.txt"  # what an element of an array says
ROOM = ".room"  # kept while a run is at work
BYTES_OF_ROOM = 2**20
# Variables of the caller that can change a number.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
# What may differ between two calls that continue the same run and yet change its numbers: said, and recorded.
OF_MACHINE = ("python", "processor", "threads", "gpus", "cuda")
# What may differ between two calls that continue the same run.
NOT_COMPARED = (*OF_PLACES, "profile", "engine")  # the last two by what they came to


def keep_room(folder: Path) -> None:
    """Take some of the disk, so that the record can still be written when the rest is full."""
    # Random, since a file system may compress zeros away.
    (folder / ROOM).write_bytes(os.urandom(BYTES_OF_ROOM))


def write_last_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record.json`` a last time, in the room that was kept for it if need be."""
    (folder / ROOM).unlink(missing_ok=True)
    write_record(folder, record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record.json`` into a run folder."""
    write_atomically(folder / "record.json", json.dumps(record, indent=2, allow_nan=False) + "\n")


def new_record(plan: Plan) -> dict[str, Any]:
    """Return the record of a run that is about to start."""
    verified = plan.verified
    return {
        "schema": SCHEMA,
        "status": "running",
        "method": plan.request.settings.method,
        "family": plan.upstream.family,
        "benchmark": plan.benchmark,
        "profile": plan.profile,
        "profile_reason": plan.profile_reason,
        "engine": plan.engine,
        "engine_reason": plan.engine_reason,
        "labels": list(plan.labels),
        "settings": plan.request.as_record(),
        "upstream": None
        if verified is None
        else {
            "repo": verified.repo,
            "url": verified.url,
            "pin": verified.pin,
            "base_tree": verified.base_tree,
            "patched_tree": verified.patched_tree,
            "absent_files": list(verified.absent),
        },
        "deviations": _deviations(plan),
        "notes": list(plan.notes),
        "environment": environment(plan),
        "seeds": [plan.request.settings.seed],
        "tasks": list(plan.tasks),
        "inputs": {
            name: folder_hash(found) if isinstance(found, Path) else found for name, found in plan.inputs.items()
        },
        "accuracy_matrix": [[None] * len(plan.tasks) for _ in plan.tasks],
        "metrics": {},
        "flatness": [],
        "training": [],
        "timing": {"started": _now(), "finished": None, "total_seconds": 0.0},
        "restarts": 0,
    }


def _deviations(plan: Plan) -> list[dict[str, object]]:
    """Return the deviations in the record's form."""
    rows = []
    for deviation in plan.deviations:
        row: dict[str, object] = asdict(deviation)
        if not deviation.tasks:
            del row["tasks"]
        else:
            row["tasks"] = list(deviation.tasks)
        rows.append(row)
    return rows


def environment(plan: Plan) -> dict[str, Any]:
    """Return what the numbers may depend on: versions, hardware, variables."""
    import torch

    # What the training processes are told, who may not take this one's number of threads.
    variables = {**{n: os.environ[n] for n in VARIABLES if n in os.environ}, **plan.environment}
    gpus = [torch.cuda.get_device_name(int(number)) for number in plan.devices] if torch.cuda.is_available() else []
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": plan.threads or _threads_left_to_the_machine(plan),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "device": plan.device,
        "world_size": plan.world_size,
        "launcher": plan.launcher,
        "libraries": {name: installed(name) for name in plan.libraries},
        "flatpatch": own_code(),
        "variables": variables,
    }


def _threads_left_to_the_machine(plan: Plan) -> int:
    """Return the threads of a process that flatpatch gives no number; each says its own count in ``training``."""
    import torch

    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal():
        return int(told)
    by_torchrun = plan.world_size > 1 and "torch.distributed.run" in plan.stages[0].command
    return 1 if by_torchrun else torch.get_num_threads()


def compared_settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that must be equal for two calls to be the same run: those that have an effect."""
    left_out = (*NOT_COMPARED, *_idle(plan))
    return {key: entry["value"] for key, entry in plan.request.as_record().items() if key not in left_out}


def made_by(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Return what a training is, which its checkpoints note: one of another training must not be gone on from."""
    code, verified = own_code(), plan.verified
    return {
        "stage": stage.name,
        "profile": plan.profile,
        "engine": plan.engine,
        "settings": compared_settings(plan),
        "pin": None if verified is None else verified.pin,
        "patched_tree": None if verified is None else verified.patched_tree,
        "flatpatch": {name: code[name] for name in ("version", "code")},
    }


def _idle(plan: Plan) -> frozenset[str]:
    return without_effect(plan.request.settings.sam, plan.request.settings.measure)


def check_continues(folder: Path, plan: Plan, *, elsewhere: bool = False) -> dict[str, Any] | None:
    """Return the record that this plan continues, or None for a new run.

    Args:
        folder: The run's.
        plan: What is to run there.
        elsewhere: As for :func:`made_otherwise`.

    Raises:
        UserError: If the folder holds something else.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be read: {error.strerror}. Choose another output=FOLDER."
        ) from error
    if all(name in (LOCK, SLURM_LOG) for name in names):
        return None
    path = folder / "record.json"
    advice = "Choose another folder with run=NAME or output=FOLDER, or remove this one."
    if not os.path.lexists(path):
        raise UserError(f"the run folder {folder} is occupied: it has files but no record.json. {advice}")
    old = read_record(folder)
    theirs = {key: entry["value"] for key, entry in old["settings"].items() if key not in NOT_COMPARED}
    ours = compared_settings(plan)
    idle = _idle(plan)
    different = [
        f"{key} is {theirs.get(key, '(not given)')!r} there and {ours.get(key, '(not given)')!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key) and key not in idle
    ]
    different += made_otherwise(old, plan, elsewhere=elsewhere)
    if different:
        raise UserError(f"the run folder {folder} is occupied by another run: {'; '.join(different)}. {advice}")
    return old


def made_otherwise(old: Mapping[str, Any], plan: Plan, *, elsewhere: bool = False) -> list[str]:
    """Return in what a recorded run was made otherwise than this plan would make it, its settings aside.

    Args:
        old: The record.
        plan: The plan.
        elsewhere: Whether the plan was made on another machine than the one that carries it out, with other GPUs
            and data: what follows from these is then left out.
    """
    different = []
    for name in ("profile", "engine"):
        mine = getattr(plan, name)
        if old.get(name) != mine:
            different.append(f"{name} is {old.get(name)!r} there and {mine!r} here")
    here = new_record(plan)
    for name in ("libraries",) if elsewhere else ("device", "world_size", "launcher", "libraries"):
        if old.get("environment", {}).get(name) != here["environment"][name]:
            different.append(
                f"{name} is {old.get('environment', {}).get(name)} there and {here['environment'][name]} here"
            )
    if said := other_code(old.get("environment", {}).get("flatpatch"), here["environment"]["flatpatch"]):
        different.append(said)
    if not elsewhere and _without_why(old.get("deviations", [])) != _without_why(here["deviations"]):
        different.append("its deviations from upstream were others")
    if not elsewhere and old.get("inputs") != here["inputs"]:
        different.append("its model or data were other files")
    tree = plan.verified.patched_tree if plan.verified else None
    if (old.get("upstream") or {}).get("patched_tree") != tree:
        different.append("it was made with another patched tree")
    return different


def _without_why(deviations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The reason for an engine tells how it was chosen, which may differ.
    return [{key: value for key, value in row.items() if key != "why"} for row in deviations]


def machine_changes(old: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what the numbers may depend on and differs between two calls' machines: ``{name: [before, now]}``."""
    before, now = old.get("environment", {}), record["environment"]
    found = {name: [before.get(name), now[name]] for name in OF_MACHINE if before.get(name) != now[name]}
    theirs, ours = before.get("variables", {}), now["variables"]
    for name in VARIABLES:
        if "_NUM_THREADS" not in name and theirs.get(name) != ours.get(name):
            found[name] = [theirs.get(name), ours.get(name)]
    return found


def begins_fork(record: dict[str, Any], old: Mapping[str, Any]) -> bool:
    """Write into a record whose first tasks are another run's that it is such; tell whether this is its first start."""
    if "forked" not in old:
        return False
    fork = old["forked"]
    record["forked"] = {**fork, "begun": True}
    record["labels"] = list(dict.fromkeys([*record["labels"], "off-protocol"]))
    changed = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in fork["changed"].items())
    learned = "task 1 was" if fork["tasks"] == 1 else f"tasks 1 to {fork['tasks']} were"
    record["notes"].append(
        f"{learned} learned by the run {fork['run']}; from there on: {changed or 'the same settings'}"
    )
    return not fork["begun"]


def note_restart(record: dict[str, Any], old: Mapping[str, Any], kept: int, step: int = 0) -> list[str]:
    """Write into a record that the run was resumed, and return what its reader must know of it.

    Args:
        record: The record of this call.
        old: That of the call before.
        kept: How many tasks were finished before and are kept.
        step: After which step of the next process it goes on, 0 for its start.
    """
    record["restarts"] = old["restarts"] + 1
    record["timing"]["started"] = old["timing"]["started"]
    changes = machine_changes(old, record) if (kept or step) and kept < len(record["tasks"]) else {}
    row = {"at": _now(), "tasks_kept": kept, "after_step": step, "machine_changed": changes}
    record["resumed"] = [*old.get("resumed", []), row]
    said = [_change_note(row) for row in record["resumed"] if row["machine_changed"]]
    record["notes"] += said
    return said[-1:] if changes else []


def _change_note(resumed: Mapping[str, Any]) -> str:
    changes = ", ".join(f"{name} {now} (before: {old})" for name, (old, now) in resumed["machine_changed"].items())
    step = f", step {resumed['after_step'] + 1}," if resumed.get("after_step") else ""
    return (
        f"since task {resumed['tasks_kept'] + 1}{step} the run is on another machine or set-up: {changes}. Its results "
        "are not bit for bit those of a run on one machine"
    )


def finish_record(record: dict[str, Any], status: str) -> None:
    """Set the status and the time it was reached."""
    record["status"] = status
    record["timing"]["finished"] = _now()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

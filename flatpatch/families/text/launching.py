"""By which launcher, and in how many processes, a task of a text method is trained."""

from __future__ import annotations

import dataclasses
import os

from flatpatch.errors import UserError
from flatpatch.kinds import KINDS, balances
from flatpatch.settings import Request


def choose_launcher(asked: str, device: str, engine: str) -> str:
    """Return the launcher; upstream's own where there is a GPU."""
    if engine == "reference":
        if asked == "deepspeed":
            raise UserError(
                "launcher=deepspeed needs the authors' code (engine=upstream); engine=reference runs in plain python."
            )
        return "python"
    if asked != "auto":
        return asked
    return "deepspeed" if device == "cuda" else "python"


def choose_world_size(
    asked: int, device: str, devices: tuple[str, ...], theirs: int, engine: str, nodes: int = 1
) -> int:
    """Return the number of processes of a machine; upstream's own where there are as many GPUs."""
    if engine == "reference":
        for key, value in {"processes": asked, "nodes": nodes}.items():
            if value > 1:
                raise UserError(
                    f"{key}={value}: the reference engine runs in one process. Use engine=upstream or {key}=1."
                )
        return 1
    if device == "cuda":
        if asked > len(devices):
            raise UserError(
                f"processes={asked} needs as many GPUs, and {len(devices)} are chosen. Name them with device=0,1,..."
            )
        return asked or min(len(devices), theirs)
    return asked or 1


def nodes_problems(nodes: int) -> list[str]:
    """Return why a run cannot be spread over several machines from here."""
    if nodes == 1 or "SLURM_JOB_ID" in os.environ:
        return []
    return [
        f"nodes={nodes} needs a job of SLURM on as many: python -m flatpatch sweep ... nodes={nodes} executor=slurm"
    ]


def settle(request: Request, engine: str, reason: str, launcher: str, world_size: int, notes: list[str]) -> Request:
    """Put settings back to their defaults that change nothing where the run was found to go; notes each.

    Raises:
        UserError: If one cannot be used there at all.
    """
    settings = request.settings
    if engine == "reference" and settings.adapters != "upstream":
        raise UserError(
            f"adapters={settings.adapters} is for the authors' DeepSpeed engine, and engine=reference ({reason}) has "
            "LoRA weights in fp32 in any case. Leave it out, or use engine=upstream."
        )
    if launcher == "deepspeed" and settings.sam in KINDS and KINDS[settings.sam].reads_momentum:
        raise UserError(
            f"sam={settings.sam} needs the momentum of each weight, and DeepSpeed's optimizer holds flattened "
            "copies of all. Use launcher=python, or another kind of SAM."
        )
    if request.overrides.get("optim") == "sgd" and settings.sam in KINDS and KINDS[settings.sam].reads_momentum:
        raise UserError(
            f"sam={settings.sam} moves along the optimizer's momentum, and upstream.optim=sgd has none. Leave "
            "upstream.optim out, or use another kind of SAM."
        )
    if launcher == "deepspeed" and balances(settings.sam):
        raise UserError(
            f"sam={settings.sam} rescales LoRA's factors before an update, and DeepSpeed's optimizer updates flattened "
            "copies of them. Use launcher=python, or another kind of SAM."
        )
    idle: dict[str, str] = {}
    if launcher == "python" and settings.adapters != "upstream":
        idle["adapters"] = "upstream"
        notes.append(f"adapters={settings.adapters} has no effect: without DeepSpeed LoRA weights are fp32 anyway")
    if world_size == 1 and settings.sync != "local":
        idle["sync"] = "local"
        if settings.sam != "off":  # else it is said already that sync= has no effect
            notes.append(f"sync={settings.sync} has no effect: the run has one process")
    if launcher == "python" and world_size == 1 and settings.port:
        notes.append(f"port={settings.port} has no effect: the run has one process and no launcher")
    if not idle:
        return request
    return dataclasses.replace(
        request,
        settings=dataclasses.replace(settings, **idle),  # type: ignore[arg-type]
        sources={**request.sources, **dict.fromkeys(idle, "default")},
    )

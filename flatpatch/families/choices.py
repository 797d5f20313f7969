"""What every ``auto`` means on this machine, each with its reason."""

from __future__ import annotations

import dataclasses
import re

from flatpatch import patches
from flatpatch.errors import UserError
from flatpatch.report.titles import in_one_line
from flatpatch.settings import Request
from flatpatch.upstreams import METHODS, Method


def cuda_devices() -> int:
    """Return how many CUDA devices torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_profile(asked: str, method: Method, available: int) -> tuple[str, str]:
    """Return the profile and why."""
    if asked != "auto":
        return asked, "as asked"
    if method.repository is None:
        return "quick", f"{method.title} has no repository of its own"
    if available:
        return "upstream", f"{available} CUDA device(s) here"
    return "quick", "no CUDA device here"


def choose_engine(asked: str, method: Method, profile: str) -> tuple[str, str]:
    """Return the engine and why.

    Raises:
        UserError: If the method, profile and engine do not go together.
    """
    if method.repository is None:
        if profile != "quick":
            raise UserError(
                f"{method.title} is a reference implementation and runs in profile quick alone, "
                f"not {profile}. Use profile=quick, or a method with a repository: "
                f"{', '.join(name for name, row in METHODS.items() if row.repository)}."
            )
        return "reference", f"{method.title} has no repository of its own"
    if asked == "reference":
        if profile != "quick":
            raise UserError(
                f"engine=reference runs in profile quick alone (got profile={profile}). "
                "Use profile=quick or engine=upstream."
            )
        return "reference", "as asked"
    if asked == "upstream" or profile != "quick":
        return (
            "upstream",
            "as asked" if asked == "upstream" else f"profile {profile} runs only the authors' code",
        )
    here, why = patches.is_available(method.repository)
    return (
        ("upstream", f"{method.repository} is here: {why}")
        if here
        else ("reference", f"{method.repository} cannot be had: {in_one_line(why)}")
    )


def find_upstream(method: Method, engine: str, notes: list[str]) -> patches.Verified | None:
    """Return the verified checkout that the engine needs; notes each folder that was named for it and lacks it.

    Raises:
        UserError: If it is nowhere, or not what it should be.
    """
    if engine != "upstream" or not method.repository:
        return None
    verified = patches.verify(method.repository)
    notes += [f"{lack}; {verified.checkout} is used" for lack in patches.passed_over(method.repository)]
    return verified


def choose_device(
    request: Request, profile: str, available: int, dry_run: bool, lacks: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Return ``cpu`` or ``cuda``, and the GPUs' numbers; a dry run adds to ``lacks`` which of them are not here.

    Raises:
        UserError: If a GPU is asked for, or needed, that is not here.
    """
    asked = request.settings.device.strip()
    if asked == "cpu":
        return "cpu", ()
    numbers = tuple(part.strip() for part in asked.split(",")) if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", asked) else ()
    if asked not in ("auto", "cuda") and not numbers:
        raise UserError(
            f"device='{asked}' is not a device (expected auto, cpu, cuda, or GPU numbers such as 0 or 0,1)."
        )
    if asked == "auto" and (profile == "quick" and not available):
        return "cpu", ()
    missing = [number for number in numbers if int(number) >= available]
    if not available or missing:
        lack = f"GPU {', '.join(missing)} is not here ({available} found)" if available else "torch sees no CUDA device"
        if dry_run:
            lacks.append(f"{lack}, which this run needs. device=cpu takes the CPU.")
            return "cuda", numbers or ("0",)
        advice = "Add device=cpu to run on the CPU, or use profile=quick."
        if profile == "quick":
            advice = "Leave device= out, or use device=cpu."
        raise UserError(
            f"{'device=' + asked if asked != 'auto' else 'profile=' + profile} needs a CUDA device, and {lack}. "
            f"{advice}"
        )
    if numbers:
        return "cuda", numbers
    if profile == "quick":
        return "cuda", ("0",)
    return "cuda", tuple(str(number) for number in range(available))


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


def choose_world_size(asked: int, device: str, devices: tuple[str, ...], theirs: int, engine: str) -> int:
    """Return the number of processes; upstream's own where there are as many GPUs."""
    if engine == "reference":
        if asked > 1:
            raise UserError(
                f"processes={asked}: the reference engine runs in one process. Use engine=upstream or processes=1."
            )
        return 1
    if device == "cuda":
        if asked > len(devices):
            raise UserError(
                f"processes={asked} needs as many GPUs, and {len(devices)} are chosen. Name them with device=0,1,..."
            )
        return asked or min(len(devices), theirs)
    return asked or 1


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

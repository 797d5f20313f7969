"""What every ``auto`` means on this machine, each with its reason, and what all families' processes are given."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatpatch import patches
from flatpatch.errors import UserError, in_one_line
from flatpatch.families.base import Deviation, Machine, Upstream
from flatpatch.files import ROOT
from flatpatch.measuring import LEDGER
from flatpatch.settings import MINIATURES, Request, as_default, measured_briefly

# The small models are no faster with more threads, much slower where these wait for cores, and their numbers depend on
# the count.
QUICK_THREADS = 1
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Draft:
    """What every plan decides first: :func:`choose_engine_of` makes it, :meth:`find_machine` completes it.

    Attributes:
        notes: What the user is told of the run.
        lacks: What a dry run finds missing here.
    """

    upstream: Upstream
    request: Request
    dry_run: bool
    profile: str
    profile_reason: str
    engine: str
    engine_reason: str
    device: str = ""
    devices: tuple[str, ...] = ()
    threads: int | None = None
    verified: patches.Verified | None = None
    notes: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)

    @property
    def is_quick(self) -> bool:
        """Whether the run is on the small models and data of ours."""
        return self.profile == "quick"

    @property
    def is_small(self) -> bool:
        """Whether the run is of a small pretrained model on some of the real data."""
        return self.profile == "small"

    @property
    def is_record(self) -> bool:
        """Whether the run has the experiment record's settings, in the reference engine."""
        return self.profile == "record"

    def find_machine(self, machine: Machine) -> None:
        """Choose threads and devices, and find the checkout that the engine needs.

        Raises:
            UserError: If one of them is not here.
        """
        available = machine.cuda_devices
        self.request = measured_briefly(own_threads(self.request, self.profile, self.notes), self.profile)
        self.threads = self.request.settings.threads or (QUICK_THREADS if self.profile in MINIATURES else None)
        self.device, self.devices = choose_device(self.request, self.profile, available, self.dry_run, self.lacks)
        self.verified = find_checkout(self.upstream, self.engine, self.notes)

    def lack(self, problem: str) -> None:
        """Note what is missing here, in a dry run.

        Raises:
            UserError: With the problem, in any other.
        """
        if not self.dry_run:
            raise UserError(problem)
        self.lacks.append(problem)

    def facts(self) -> dict[str, Any]:
        """Return what a plan says of it."""
        names = ("upstream", "request", "profile", "profile_reason", "engine", "engine_reason", "device", "devices")
        kept = {name: getattr(self, name) for name in (*names, "threads", "verified")}
        return kept | {"notes": tuple(self.notes), "lacks": tuple(self.lacks)}


def choose_engine_of(upstream: Upstream, request: Request, machine: Machine, *, dry_run: bool) -> Draft:
    """Choose profile and engine.

    Raises:
        UserError: If the method, profile and engine do not go together.
    """
    settings = request.settings
    profile, profile_reason = choose_profile(settings.profile, upstream, machine.cuda_devices)
    engine, engine_reason = choose_engine(settings.engine, upstream, profile)
    check_reference(upstream, engine, settings.engine)
    if settings.sam == "recorded" and (upstream.family, profile, engine) != ("text", "quick", "reference"):
        raise UserError(
            f"sam=recorded repeats the fault of one training loop on text, in our small copy of it alone, and this run "
            f"is of {upstream.title} ({upstream.family}), profile {profile}, engine {engine}. Use a text method with "
            "profile=quick engine=reference, or sam=sam."
        )
    notes = list(request.notes)
    if upstream.reconstruction:
        notes.append(f"{upstream.title} is a reconstruction: {upstream.reconstruction}")
    return Draft(upstream, request, dry_run, profile, profile_reason, engine, engine_reason, notes=notes)


def choose_profile(asked: str, upstream: Upstream, available: int) -> tuple[str, str]:
    """Return the profile and why."""
    if asked != "auto":
        return asked, "as asked"
    if upstream.repository is None:
        return "quick", f"{upstream.title} has no repository of its own"
    if available:
        return "upstream", f"{available} CUDA device(s) here"
    return "quick", "no CUDA device here"


def choose_engine(asked: str, upstream: Upstream, profile: str) -> tuple[str, str]:
    """Return the engine and why.

    Raises:
        UserError: If the method, profile and engine do not go together.
    """
    if upstream.repository is None:
        if profile not in upstream.profiles:
            raise UserError(
                f"{upstream.title} is a reference implementation and runs in profile "
                f"{' or '.join(upstream.profiles)} alone, not {profile}. Use "
                f"profile={' or profile='.join(upstream.profiles)}, or a method with a repository."
            )
        return "reference", f"{upstream.title} has no repository of its own"
    if profile == "small":
        if asked == "upstream":
            raise UserError(
                "profile small runs our reference implementation alone (got engine=upstream). Leave engine= out, or "
                "use profile=quick."
            )
        return "reference", "as asked" if asked == "reference" else "profile small runs our reference implementation"
    if asked == "reference":
        if profile != "quick":
            raise UserError(
                f"engine=reference runs in profile {' or '.join(upstream.profiles)} alone (got profile={profile}). "
                "Use profile=quick or engine=upstream."
            )
        return "reference", "as asked"
    if asked == "upstream" or profile != "quick":
        return (
            "upstream",
            "as asked" if asked == "upstream" else f"profile {profile} runs only the authors' code",
        )
    here, why = patches.is_available(upstream.repository)
    return (
        ("upstream", f"{upstream.repository} is here: {why}")
        if here
        else ("reference", f"{upstream.repository} cannot be had: {in_one_line(why)}")
    )


def check_reference(upstream: Upstream, engine: str, asked: str) -> None:
    """Refuse the reference engine for a method that it does not have.

    Raises:
        UserError: If that is the engine.
    """
    if engine != "reference" or upstream.reference:
        return
    raise UserError(
        f"{upstream.title} has no reference implementation: every profile needs the authors' code. "
        + (
            "Leave out engine=reference."
            if asked == "reference"
            else f"{patches.is_available(str(upstream.repository))[1]}\nIt comes with: {fetch_command(upstream)}"
        )
    )


def fetch_command(upstream: Upstream) -> str:
    """Return the command that fetches a method's code."""
    return f"git submodule update --init third_party/{upstream.repository}"


def find_checkout(upstream: Upstream, engine: str, notes: list[str]) -> patches.Verified | None:
    """Return the verified checkout that the engine needs; notes each folder that was named for it and lacks it.

    Raises:
        UserError: If it is nowhere, or not what it should be.
    """
    if engine != "upstream" or not upstream.repository:
        return None
    verified = patches.verify(upstream.repository)
    notes += [f"{lack}; {verified.checkout} is used" for lack in patches.skipped_checkouts(upstream.repository)]
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
    if asked == "auto" and (profile in MINIATURES and not available):
        return "cpu", ()
    missing = [number for number in numbers if int(number) >= available]
    if not available or missing:
        lack = f"GPU {', '.join(missing)} is not here ({available} found)" if available else "torch sees no CUDA device"
        if dry_run:
            lacks.append(f"{lack}, which this run needs. device=cpu takes the CPU.")
            return "cuda", numbers or ("0",)
        advice = "Add device=cpu to run on the CPU, or use profile=quick."
        if profile in MINIATURES:
            advice = "Leave device= out, or use device=cpu."
        raise UserError(
            f"{'device=' + asked if asked != 'auto' else 'profile=' + profile} needs a CUDA device, and {lack}. "
            f"{advice}"
        )
    if numbers:
        return "cuda", numbers
    if profile in MINIATURES:
        return "cuda", ("0",)
    return "cuda", tuple(str(number) for number in range(available))


def refuse_ledger(draft: Draft) -> None:
    """Refuse measure=ledger where the losses of earlier tasks cannot be had from the model that is trained.

    Raises:
        UserError: If it is asked for.
    """
    request = draft.request.settings.measuring
    if request is not None and LEDGER in request.kinds:
        raise UserError(
            f"measure={LEDGER} follows the losses of earlier tasks, which {draft.upstream.title} with "
            f"engine={draft.engine} does not give while it trains (text methods do, and images with engine=reference). "
            f"Leave {LEDGER} out of measure=."
        )


def own_threads(request: Request, profile: str, notes: list[str]) -> Request:
    """Let ``threads=`` that names a miniature's default be no other run, and say what the caller's count does."""
    if profile not in MINIATURES:
        return request
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given not in ("", str(request.settings.threads or QUICK_THREADS)):
        notes.append(f"OMP_NUM_THREADS={given} has no effect in profile {profile}, which takes threads={QUICK_THREADS}")
    return as_default(request, "threads", QUICK_THREADS)


def without_idle(request: Request, idle: Collection[str], notes: list[str]) -> Request:
    """Leave out overrides that name the value which runs without them: they make no other run."""
    notes += [
        f"upstream.{name}={request.overrides[name]} changes nothing: the run has that value anyway" for name in idle
    ]
    kept = {name: word for name, word in request.overrides.items() if name not in idle}
    return dataclasses.replace(request, overrides=kept)


def environment(device: str, devices: Sequence[str], threads: int | None) -> dict[str, str]:
    """Return the variables that every process of a run gets beside the caller's own."""
    variables = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "WANDB_DISABLED": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": visible_devices(devices) if device == "cuda" else "",
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
    }
    return variables | (dict.fromkeys(_THREAD_VARIABLES, str(threads)) if threads else {})


def visible_devices(numbers: Sequence[str]) -> str:
    """Return ``CUDA_VISIBLE_DEVICES`` for some of the GPUs this process sees, itself perhaps a choice."""
    own = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(own[int(number)] if int(number) < len(own) else number for number in numbers)


def library_deviations(theirs: Mapping[str, str], absent: str, known: Mapping[str, str | None]) -> list[Deviation]:
    """Compare the versions of libraries that upstream names with what is installed.

    Args:
        theirs: By name: the version that upstream names.
        absent: Why one that is not installed is not needed.
        known: Versions that no package tells, such as Python's.
    """
    found = []
    for name, version in theirs.items():
        ours = known[name] if name in known else installed(name)
        if ours != version:
            why = "one environment serves every upstream" if ours else absent
            found.append(Deviation(f"library {name}", version, ours, why))
    return found


def installed(name: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

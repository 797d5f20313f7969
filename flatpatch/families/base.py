"""All that the runner knows of any method.

A family turns settings into data, and what a run left into data::

    plan(upstream, request, machine, dry_run=False) -> Plan
    collect(plan, stages) -> Results
    reopen(upstream, folder, record) -> FinishedRun

:class:`Family` finds them in a family's folder. Loading this file loads no torch.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flatpatch.errors import UserError, did_you_mean
from flatpatch.files import digest

if TYPE_CHECKING:
    from torch import nn

    from flatpatch import patches
    from flatpatch.families.sample import Sample
    from flatpatch.flatness import Loss
    from flatpatch.measuring import Request as MeasureRequest
    from flatpatch.settings import Request, Settings

# Room for the patched copy, the adapters, the predictions and the data sets' cache of a run.
BYTES_NEEDED = 300 * 2**20
# What runs here where paper and repository disagree.
AS_SHIPPED = "as the repository"
PAPER_PROFILE = "as the repository; `profile=paper`: as the paper"
# In a stage's command: stands for the port of the launcher, which is chosen when the stage starts.
PORT = "<port>"


@dataclass(frozen=True)
class Argument:
    """An argument that ``profile=paper`` sets.

    Attributes:
        where: The shipped scripts' orders or the configuration files concerned.
        argument: Its name.
        value: A word for a command line, or any JSON value for a configuration file.
    """

    where: tuple[str, ...]
    argument: str
    value: Any


@dataclass(frozen=True)
class Conflict:
    """One disagreement between a paper and its repository, with its source and what runs here."""

    subject: str
    paper: str
    repository: str
    here: str
    source: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Deviation:
    """One difference of a run from upstream's own command or environment; ``tasks`` is empty where it holds for all."""

    what: str
    upstream: str | None
    here: str | None
    why: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuMemory:
    """What a method's own settings were seen to take of a GPU: GiB, and what was measured."""

    gib: float
    of: str


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One method, and what is true of it alone. Each family has a subclass with the facts that it reads.

    Attributes:
        name: The method's, as ``method=`` takes it.
        title: As it is written.
        repository: The folder in ``third_party/``; None where the reference engine alone has the method.
        seed: What upstream's script or configuration runs with.
        reference: Whether there is a reference implementation.
        tunings: What can be trained in its place: of the choices of ``tuning=``.
        default: Whether it is meant where no method is named; true of one.
        conflicts: Where paper and repository disagree.
        metric_words: By metric of the record: what its paper or its code calls it.
        profiles: Those in which the reference engine runs it.
        gpu_memory: What its own settings take of a GPU; None where nobody measured it.
        reconstruction: Why what runs here is a reconstruction, not the paper's method, as the end of a sentence; empty
            where it is none.
    """

    family: ClassVar[str]

    name: str
    title: str
    repository: str | None = None
    seed: int = 42
    reference: bool = True
    tunings: tuple[str, ...] = ("lora",)
    default: bool = False
    conflicts: tuple[Conflict, ...] = ()
    metric_words: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[str, ...] = ("quick",)
    gpu_memory: GpuMemory | None = None
    reconstruction: str = ""

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = []
        if settings.engine == "upstream" and self.repository is None:
            problems.append(f"method {self.name} has no repository of its own: use engine=reference.")
        if settings.profile in ("small", "record") and settings.profile not in self.profiles:
            known = self.profiles if self.repository is None else ("upstream", *self.profiles)
            problems.append(
                f"profile={settings.profile} has no settings for {self.title}, a {self.family} method. Use "
                f"profile={' or profile='.join(known)}."
            )
        return problems

    def paper_arguments(self, where: str) -> list[tuple[Argument, str]]:
        """Return what ``profile=paper`` sets for an order or a configuration file, each with its reason."""
        return [
            (argument, f"profile paper: the paper has {conflict.paper} ({conflict.source})")
            for conflict in self.conflicts
            for argument in conflict.arguments
            if where in argument.where
        ]


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    cuda_devices: int


@dataclass(frozen=True)
class Stage:
    """One process of a run.

    Attributes:
        name: In messages; unique in the run.
        title: On the terminal.
        folder: Its place under the run's ``tasks/``.
        tasks: The tasks that it trains, by their places in the plan's.
        command: What Python is given, from the work folder; ``PORT`` stands for a port.
        contract: What the hooks are told beside that which every run tells them.
        output: The folder in the work folder that it fills; emptied before it starts.
        results: Files that it must leave, as patterns below the run's folder; each finds one file or more.
        models: By task: the file below the run's folder in which the hooks keep its model, if they could.
    """

    name: str
    title: str
    folder: str
    tasks: tuple[int, ...]
    command: tuple[str, ...]
    contract: Mapping[str, Any]
    output: str
    results: tuple[str, ...]
    models: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run will do.

    Attributes:
        tasks: Their names, in the order of training.
        stages: The processes, in order.
        sequence: What is learned, in a few words.
        benchmark: Its name in the record.
        environment: Variables that each process gets beside the caller's own.
        threads: CPU threads of each process; None leaves it to the machine and the caller.
        links: Names in the work folder, and what they stand for.
        own_folders: Folders of upstream's tree that the run makes for itself instead.
        files: Names in the work folder, and their text.
        made: Names of folders in the work folder, and what fills each.
        inputs: Hashes for the record, or the folders to hash.
        recipe: Lines about what the commands do not show.
        libraries: Those whose versions the record has.
        lacks: What a dry run found missing here, without which the run is refused.
        trained_by: Of the patched files, those the run trains by; empty for all.
        perturbed_losses: Of the losses that the patched files name, those that SAM perturbs; empty for all.
    """

    request: Request
    upstream: Upstream
    profile: str
    profile_reason: str
    engine: str
    engine_reason: str
    device: str
    devices: tuple[str, ...]
    world_size: int
    launcher: str
    verified: patches.Verified | None
    folder: Path
    tasks: tuple[str, ...]
    stages: tuple[Stage, ...]
    sequence: str
    benchmark: str
    deviations: tuple[Deviation, ...]
    environment: Mapping[str, str]
    libraries: tuple[str, ...]
    threads: int | None = None
    links: Mapping[str, Path] = field(default_factory=dict)
    own_folders: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    recipe: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    off_protocol: bool = False
    bytes_needed: int = BYTES_NEEDED
    trained_by: tuple[str, ...] = ()
    perturbed_losses: tuple[str, ...] = ()

    @property
    def resumes(self) -> bool:
        """Whether each task is a process of its own, so that finished ones need no checkpoint to be kept."""
        return len(self.stages) == len(self.tasks)

    @property
    def labels(self) -> tuple[str, ...]:
        """Why this run's numbers must not stand beside a paper's; empty if they may."""
        found = {
            "quick": self.profile == "quick",
            "small": self.profile == "small",
            "reference": self.engine == "reference",
            "reconstruction": bool(self.upstream.reconstruction),
            "off-protocol": self.off_protocol,
        }
        return tuple(label for label, holds in found.items() if holds)


@dataclass(frozen=True)
class Results:
    """What the first stages of a run measured.

    Attributes:
        accuracy: After task i, on task j, in percent, None where not evaluated.
        sample_weighted: After each task, over all test examples, in percent; None where not measured.
        train_seconds: Of each task, None where it is not known; empty where upstream does not say.
        predict_seconds: Likewise.
        before_training: On each task before the first one is learned, in percent; empty where not measured.
    """

    accuracy: Sequence[Sequence[float | None]]
    sample_weighted: Sequence[float | None]
    train_seconds: Sequence[float | None] = ()
    predict_seconds: Sequence[float | None] = ()
    before_training: Sequence[float] = ()


@dataclass(frozen=True)
class LoggedRun:
    """A run in a log that upstream's own code left.

    Attributes:
        subject: What it is a run of, as ``Family.subject`` says it of a record.
        first_line: Where it begins in the file, from 1.
        complete: Whether it reached its last task.
        settings: Those printed that say what it computed, beside the seed and the subject.
        order: What it learned, in the order of learning; None where that is upstream's own for the seed.
        accuracy: After task i, on task j, in percent; None where the log does not tell it by task.
        sample_weighted: After each task, over all test examples, in percent.
    """

    subject: Mapping[str, Any]
    seed: int
    first_line: int
    complete: bool
    settings: Mapping[str, str]
    order: tuple[object, ...] | None
    accuracy: Sequence[Sequence[float | None]] | None
    sample_weighted: Sequence[float | None]

    def doubt_data(self, kind: str, *, shipped: bool) -> list[str]:
        """Return, as sentences, what cannot be known of its data.

        Args:
            kind: The baseline's, such as ``paper``; empty where there is none.
            shipped: Whether it is a run of a log that upstream ships.
        """
        return []


@dataclass(frozen=True)
class FinishedRun(ABC):
    """A finished run, its folder and its record; what follows from these depends on what was learned."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's folder's name."""
        return self.folder.name

    def task_index(self, name: str) -> int:
        """Return a task's number; an empty name means the last one.

        Raises:
            UserError: If the run has no such task.
        """
        tasks: list[str] = self.record["tasks"]
        if not name:
            return len(tasks) - 1
        if name not in tasks:
            raise UserError(
                f"task={name}: {self.name} has no such task.{did_you_mean(name, tasks)} It has: {', '.join(tasks)}."
            )
        return tasks.index(name)

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """The loss that is measured."""

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """The loss in words."""

    @abstractmethod
    def rebuild(self, index: int, *, joined: bool = False) -> nn.Module:
        """Rebuild the model as it was after a task; ``joined`` lets the factors of all tasks vary."""

    @abstractmethod
    def draw_sample(self, index: int, request: MeasureRequest) -> Sample:
        """Draw the fixed sample of a task's training data."""

    @abstractmethod
    def learned(self, index: int) -> Sequence[Any]:
        """Return what was learned up to a task, in the order of learning; runs must agree in it to be compared."""

    def noted_hash(self, process: str, path: Path) -> str | None:
        """Return the SHA-256 that the run noted of a file when one of its processes ended.

        Args:
            process: The process's folder in ``tasks``.
            path: In the run's folder.

        Returns:
            The hash, or None if the run noted none.
        """
        try:
            done = json.loads((self.folder / "tasks" / process / "done.json").read_text(encoding="utf-8"))
            found: str | None = done["files"].get(str(path.relative_to(self.folder)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # gone, cut short or of another kind
            return None
        return found

    def check_file(self, process: str, path: Path) -> None:
        """Refuse a file that is there and is not the one of which the run noted the hash.

        Raises:
            UserError: If it is another one.
        """
        noted = self.noted_hash(process, path)
        if noted is not None and path.is_file() and digest(path) != noted:
            raise UserError(
                f"{self.name}: {path} is not the file that the run left (its SHA-256 differs from the one in "
                f"tasks/{process}/done.json), so its models cannot be rebuilt. Restore it, or make the run again."
            )

    def ready(self, index: int, model: nn.Module) -> nn.Module:
        """Return a rebuilt model in evaluation mode, on the CPU, or on a GPU where there is one.

        Raises:
            UserError: If its weights are not finite.
        """
        import torch

        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if not all(bool(value.isfinite().all()) for value in model.parameters()):
            raise UserError(f"{self.name}: the weights after task {index + 1} are not finite: its training diverged.")
        return model

    def working(self) -> AbstractContextManager[None]:
        """Return the block in which the run's models work."""
        return nullcontext()

    def check_companion(self, other: FinishedRun) -> None:
        """Refuse a run between whose models and this one's nothing can lie.

        Raises:
            UserError: With what differs.
        """
        if type(self) is not type(other):
            raise UserError(f"{self.name} and {other.name} learned different kinds of data. Name runs of one kind.")


class Family:
    """A family of repositories. What it does stands in its rooms, files of the same names in every family's folder.

    A room is loaded when it is first asked for something.

    Args:
        name: Its folder's.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _room(self, name: str) -> Any:
        return importlib.import_module(f"flatpatch.families.{self.name}.{name}")

    @property
    def learns_classes(self) -> bool:
        """Whether its tasks are groups of one data set's classes; else each is a data set."""
        return bool(self._room("comparing").LEARNS_CLASSES)

    def plan(self, upstream: Any, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
        """Resolve every ``auto``, read upstream's settings, and check whatever can be checked without starting.

        Args:
            upstream: The method, a row of this family.
            request: The parsed settings.
            machine: What there is to run on.
            dry_run: Plan for a machine that has what is missing here (CUDA, data, weights).

        Raises:
            UserError: With the reasons why this run cannot start as asked.
        """
        found: Plan = self._room("planning").make_plan(upstream, request, machine, dry_run=dry_run)
        return found

    def collect(self, plan: Plan, stages: int) -> Results:
        """Read what the first stages of a run left.

        Raises:
            FlatpatchError: If it is not what the plan's tasks leave.
        """
        found: Results = self._room("results").collect(plan, stages)
        return found

    def reopen(self, upstream: Any, folder: Path, record: dict[str, Any]) -> FinishedRun:
        """Return a finished run whose models can be rebuilt.

        Raises:
            UserError: If it is not one that can be.
        """
        found: FinishedRun = self._room("reopening").reopen(upstream, folder, record)
        return found

    def subject(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run is a run of, in the form of a baseline's ``applies_to``."""
        found: dict[str, Any] = self._room("comparing").subject(record)
        return found

    def knows_data(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record tells runs on other data apart, wherever the data lie."""
        found: bool = self._room("comparing").knows_data(record)
        return found

    def compare_data(
        self,
        upstream: Any,
        subject: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        kind: str,
    ) -> tuple[str, list[str]]:
        """Compare the data of runs with each other's and with those behind a baseline.

        Args:
            upstream: The method.
            subject: What they are runs of.
            records: Theirs.
            names: What to call the runs.
            kind: The baseline's, such as ``paper``; empty where there is none.

        Returns:
            Which difference forbids a comparison, empty if none is known; and, as sentences, what cannot be known.
        """
        found: tuple[str, list[str]] = self._room("comparing").compare_data(upstream, subject, records, names, kind)
        return found

    def read_log(self, path: Path, upstreams: Iterable[Any]) -> list[LoggedRun]:
        """Read every run in a log that the code of this family's repositories left, in the file's order.

        Args:
            path: The log.
            upstreams: The family's methods.

        Raises:
            UserError: If the file cannot be read, or a line of it is damaged.
        """
        found: list[LoggedRun] = self._room("comparing").read_log(path, upstreams)
        return found

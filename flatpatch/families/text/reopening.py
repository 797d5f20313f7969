"""The models that a finished run left, rebuilt from its work folder, with the data they were trained on.

Both engines' adapters go into the reference engine's layers, which compute what the authors' do: W x plus the update of
every task's factors. What is rebuilt can be checked against the loss that was measured in the run itself.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.sample import Sample, draw_sample
from flatpatch.families.text import reference
from flatpatch.families.text.changes import TaskPlan
from flatpatch.families.text.planning import Plan, make_plan
from flatpatch.families.text.reference import adapters
from flatpatch.families.text.reference.adapters import Pair
from flatpatch.families.text.reference.data import load_examples, make_collate, read_instructions
from flatpatch.flatness import Loss, model_loss
from flatpatch.measuring import Request
from flatpatch.report.records import read_record, run_folder
from flatpatch.runner.record import folder_digest
from flatpatch.settings import OF_MEASURING, parse
from flatpatch.upstreams import METHODS

_UPSTREAM_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


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
    def draw_sample(self, index: int, request: Request) -> Sample:
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
        if noted is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != noted:
            raise UserError(
                f"{self.name}: {path} is not the file that the run left (its SHA-256 differs from the one in "
                f"tasks/{process}/done.json), so its models cannot be rebuilt. Restore it, or make the run again."
            )

    def working(self) -> AbstractContextManager[None]:
        """Return the block in which the run's models work."""
        return nullcontext()

    def check_companion(self, other: FinishedRun) -> None:
        """Refuse a run between whose models and this one's nothing can lie.

        Raises:
            UserError: With what differs.
        """
        if type(self) is not type(other):
            raise UserError(f"{self.name} and {other.name}: one learned images and one texts. Name runs of one kind.")


@dataclass(frozen=True)
class TrainedRun(FinishedRun):
    """A finished run on texts, and the plan it followed."""

    plan: Plan

    @property
    def loss(self) -> Loss:
        """The model's own."""
        return model_loss

    @property
    def loss_name(self) -> str:
        """The loss in words."""
        return "the model's own loss, without the method's penalty"

    def rebuild(self, index: int, *, joined: bool = False) -> nn.Module:
        """See :func:`rebuild`."""
        return rebuild(self, index, joined=joined)

    def draw_sample(self, index: int, request: Request) -> Sample:
        """See :func:`draw_task_sample`."""
        return draw_task_sample(self, index, request)

    def learned(self, index: int) -> Sequence[Any]:
        """Return the task's name: models after different orders may be compared."""
        return self.record["tasks"][index : index + 1]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SavedAdapter:
    """The factors that were saved after a task, all tasks' joined, and the newest task's rank.

    Attributes:
        pairs: By layer, A (r_total, in) and B (out, r_total).
        rank: Of the newest task.
        alpha: LoRA's alpha: both paths are scaled by alpha / rank.
    """

    pairs: Mapping[str, Pair]
    rank: int
    alpha: int

    @property
    def total_rank(self) -> int:
        """Rank of all tasks' factors together."""
        return len(next(iter(self.pairs.values())).A)


def find_run(name: str) -> FinishedRun:
    """Find a finished run. One on texts is planned again, which tells what its tasks were given.

    Args:
        name: Its folder, or its folder's name inside ``runs``.

    Raises:
        UserError: If there is no such run, it is not finished, or it is not one that can be rebuilt.
    """
    folder = run_folder(name).absolute()
    record = read_record(folder)
    if record["status"] != "finished":
        raise UserError(
            f"run={name} is not finished ({record['status']}): only a finished run can be measured afterwards. "
            "The command that started it continues it."
        )
    method = METHODS.get(record["method"])
    if method is not None and method.vision:
        from flatpatch.families.vision.reopening import read_image_run

        return read_image_run(folder, record)
    given = {key: entry for key, entry in record["settings"].items() if entry["source"] == "command line"}
    if record["method"] not in reference.METHODS or str(
        record["settings"].get("order", {}).get("value", "")
    ).startswith("llama"):
        raise UserError(
            f"run={name} is of method {record['method']}, {record['benchmark']}: models can be rebuilt of image "
            "runs, and of T5 runs "
            f"of {', '.join(reference.METHODS)}. Measure inside the run with measure=."
        )
    ours = (*OF_MEASURING, "profile", "engine", "output", "run")
    words = [f"{key}={entry['value']}" for key, entry in given.items() if key not in ours]
    request = parse([*words, f"profile={record['profile']}", f"engine={record['engine']}"])
    plan = make_plan(request, dry_run=True)
    if list(plan.task_names) != record["tasks"]:
        raise UserError(
            f"run={name} learned {', '.join(record['tasks'])}, but its settings mean {', '.join(plan.task_names)} now. "
            "It was made by another version; measure it with that one."
        )
    run = TrainedRun(folder, record, plan)
    _check_inputs(run)
    return run


def _check_inputs(run: TrainedRun) -> None:
    for link, digest in run.record.get("inputs", {}).items():
        place = run.folder / "work" / link
        if (here := folder_digest(place)) != digest:
            what = "is gone" if here is None else "holds other files now"
            raise UserError(f"{run.name}: {place} {what}, so its models cannot be rebuilt.")


def load_adapter(run: TrainedRun, index: int) -> SavedAdapter:
    """Read the adapter that was saved after a task.

    Raises:
        UserError: If it is missing, damaged, or of other ranks than the run's.
    """
    folder = run.folder / "work" / _task(run, index).invocation.get("output_dir") / "adapter"
    for path in sorted(folder.glob("*")):
        run.check_file(_task(run, index).folder, path)
    if run.record["engine"] == "reference":
        saved = adapters.load(folder)
        return SavedAdapter(saved.pairs, int(saved.made["lora_r"]), int(saved.made["lora_alpha"]))
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state: dict[str, Tensor] = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
        rank, alpha = int(config["r"]), int(config["lora_alpha"])
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{run.name}: no whole adapter in {folder}: {error}. Run that task again.") from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _UPSTREAM_KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{run.name}: {folder} holds {key}, which is not a LoRA factor of upstream's.")
        factors.setdefault(match[1], {})[match[2]] = value.float()
    if not factors or any(set(pair) != {"A", "B"} for pair in factors.values()):
        raise UserError(f"{run.name}: {folder} does not hold pairs of LoRA factors.")
    return SavedAdapter({layer: Pair(pair["A"], pair["B"]) for layer, pair in factors.items()}, rank, alpha)


def rebuild(run: TrainedRun, index: int, *, joined: bool = False) -> nn.Module:
    """Rebuild the model as it was after a task.

    Args:
        run: The run.
        index: The task.
        joined: False: the newest task's factors vary and the earlier ones are frozen, as when it was trained. True:
            the factors of all tasks vary, as one pair of matrices per layer.

    Returns:
        The model on the CPU, or on a GPU where there is one.

    Raises:
        UserError: If the checkpoint is missing or does not fit the model.
    """
    from transformers import AutoModelForSeq2SeqLM

    saved = load_adapter(run, index)
    keeps_old = reference.METHODS[run.record["method"]].keeps_old
    earlier = 0 if joined else saved.total_rank - saved.rank
    if saved.total_rank != (saved.rank * (index + 1) if keeps_old else saved.rank):
        raise UserError(
            f"{run.name}: the adapter after task {index + 1} has rank {saved.total_rank} in all, and {saved.rank} a "
            "task: it is not that task's."
        )
    model = AutoModelForSeq2SeqLM.from_pretrained(_base_model(run))
    old = {key: Pair(pair.A[:earlier], pair.B[:, :earlier]) for key, pair in saved.pairs.items()} if earlier else None
    new = {key: Pair(pair.A[earlier:], pair.B[:, earlier:]) for key, pair in saved.pairs.items()}
    rank = saved.total_rank - earlier
    try:
        # One scale for both: alpha over the rank of a single task.
        adapters.attach(model, r=rank, alpha=saved.alpha * rank // saved.rank, dropout=0.0, old=old, new=new)
    except ValueError as error:
        raise UserError(f"{run.name}: the adapter after task {index + 1} is of another model: {error}.") from None
    model.resize_token_embeddings(len(_tokenizer(run))).requires_grad_(False)
    # A parameter that holds the whole vocabulary is not an adapter; resizing makes a new one.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{adapters.NEW}." in name)
    return ready(run, index, model)


def ready(run: FinishedRun, index: int, model: nn.Module) -> nn.Module:
    """Return a model in evaluation mode, on the CPU, or on a GPU where there is one.

    Raises:
        UserError: If its weights are not finite.
    """
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if not all(bool(value.isfinite().all()) for value in model.parameters()):
        raise UserError(f"{run.name}: the weights after task {index + 1} are not finite: its training diverged.")
    return model


def draw_task_sample(run: TrainedRun, index: int, request: Request) -> Sample:
    """Draw the fixed sample of a task's training data: the examples that are measured inside a run too.

    Raises:
        UserError: If the data cannot be read.
    """
    arguments = _task(run, index).invocation
    work = run.folder / "work"
    told = work / arguments.get("task_config_dir") / "train_tasks.json"
    try:
        config = json.loads(told.read_text(encoding="utf-8"))
        tasks = [(kind, entry["dataset name"]) for kind, entries in config.items() for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.name}: {told}, which names the task's data, cannot be read ({error}).") from None
    file = arguments.get("instruction_file")
    instructions = read_instructions(work / file if file else None)
    limit = arguments.get("max_train_samples")
    data = work / arguments.get("data_dir")
    examples = load_examples(data, tasks, "train", instructions, int(limit) if limit else None)
    source = int(arguments.get("max_source_length", "512"))
    target = int(arguments.get("max_target_length", "50"))
    collate = make_collate(_tokenizer(run), source, target)
    return draw_sample(examples, collate, samples=request.samples, batch=request.batch)


def check_against_run(run: FinishedRun, index: int, samples: int, loss: float) -> None:
    """Compare a rebuilt model's loss with the one measured in the run right after the task, if it was.

    Raises:
        UserError: If they differ.
    """
    for entry in run.record["flatness"]:
        there = entry["loss"]
        same = (entry["task_index"], entry["when"], entry["samples"]) == (index, "after", samples)
        if same and there is not None and abs(loss - there) > 1e-3 * max(abs(loss), abs(there)):
            raise UserError(
                f"{run.name}: rebuilt after task {index + 1}, the model has loss {loss:.6g} on the sample; in the "
                f"run it had {there:.6g}. The checkpoint or the data is not the run's."
            )


def _task(run: TrainedRun, index: int) -> TaskPlan:
    return run.plan.tasks[index]


def _base_model(run: TrainedRun) -> Path:
    first = _task(run, 0).invocation
    name = first.get("base_model") or first.get("model_name_or_path")
    folder = run.folder / "work" / name
    if not (folder / "config.json").is_file():
        raise UserError(f"{run.name}: its base model {folder} is gone.")
    return folder


def _tokenizer(run: TrainedRun) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_base_model(run))


def names_of(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a name for each run, told apart where folders' names are equal."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        return [f"{run.folder.parent.name}/{run.name}" for run in runs]
    return names

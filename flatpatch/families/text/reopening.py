"""The models that a finished run on texts left, rebuilt from its folder, with the data they were trained on.

Both engines' adapters go into the reference engine's layers, which compute what the authors' do: W x plus the update of
every task's factors. What is rebuilt can be checked against the loss that was measured in the run itself.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.base import FinishedRun
from flatpatch.families.sample import Sample, draw_sample
from flatpatch.families.text import reference
from flatpatch.families.text.llama import is_llama
from flatpatch.families.text.models import is_encoder
from flatpatch.families.text.reference import adapters, classifier, whole
from flatpatch.families.text.reference.adapters import Pair
from flatpatch.families.text.reference.classifier import Classifier, load_heads
from flatpatch.families.text.reference.data import load_examples
from flatpatch.families.text.scripts import pairs
from flatpatch.families.text.upstream import TextUpstream
from flatpatch.files import folder_hash
from flatpatch.flatness import Loss, model_loss
from flatpatch.measuring import Request

# Of what a process is given, that which is read here; a launcher's own words stand before.
_NEEDED = ("do_train", "method", "model_name_or_path", "output_dir", "task_config_dir")
_UPSTREAM_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class TextRun(FinishedRun):
    """A finished run on texts, and what each of its processes was given."""

    arguments: tuple[Mapping[str, str], ...]

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


def reopen(upstream: TextUpstream, folder: Path, record: dict[str, Any]) -> TextRun:
    """Return a finished run; see :class:`flatpatch.families.base.Family`."""
    order = str(record["settings"].get("order", {}).get("value", ""))
    if upstream.name not in reference.METHODS or is_llama(order):
        raise UserError(
            f"run={folder.name} is of method {upstream.name}, {record['benchmark']}: of text runs, models can be "
            f"rebuilt of T5 and {', '.join(reference.METHODS)}. Measure inside the run with measure=."
        )
    for link, digest in record.get("inputs", {}).items():
        place = folder / "work" / link
        if (here := folder_hash(place)) != digest:
            what = "is gone" if here is None else "holds other files now"
            raise UserError(f"{folder.name}: {place} {what}, so its models cannot be rebuilt.")
    return TextRun(folder, record, tuple(_arguments(folder, name, i) for i, name in enumerate(record["tasks"])))


def _process(index: int, task: str) -> str:
    return f"{index + 1}-{task}"


def _arguments(folder: Path, task: str, index: int) -> dict[str, str]:
    """Return what a task's process was given."""
    told = folder / "tasks" / _process(index, task) / "hook.json"
    try:
        words = json.loads(told.read_text(encoding="utf-8"))["command"]
        first = next(place for place, word in enumerate(words) if word.startswith("--") and word[2:] in _NEEDED)
        return {name: value or "" for name, value in pairs(words[first:])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):  # gone, damaged or older
        raise UserError(
            f"run={folder.name}: {told} does not say by which command its task was trained. A run of an earlier "
            "version is measured with that version."
        ) from None


def _saved_folder(run: TextRun, index: int) -> Path:
    """Return the folder of what was saved after a task, with its files checked."""
    folder = run.folder / "work" / run.arguments[index]["output_dir"] / "adapter"
    for path in sorted(folder.glob("*")):
        run.check_file(_process(index, run.record["tasks"][index]), path)
    return folder


def load_adapter(run: TextRun, index: int) -> SavedAdapter:
    """Read the adapter that was saved after a task.

    Raises:
        UserError: If it is missing, damaged, or of other ranks than the run's.
    """
    folder = _saved_folder(run, index)
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


def rebuild(run: TextRun, index: int, *, joined: bool = False) -> nn.Module:
    """Rebuild the model as it was after a task.

    Args:
        run: The run.
        index: The task.
        joined: False: the newest task's factors vary and the earlier ones are frozen, as when it was trained. True:
            the factors of all tasks vary, as one pair of matrices per layer. Where every weight was trained, all vary.

    Returns:
        The model on the CPU, or on a GPU where there is one.

    Raises:
        UserError: If the checkpoint is missing or does not fit the model.
    """
    from transformers import AutoModelForSeq2SeqLM

    base, folder = _base_model(run), _saved_folder(run, index)
    model: reference.Model = (
        classifier.load(base, load_heads(folder), run.record["tasks"][index])
        if is_encoder(base)
        else AutoModelForSeq2SeqLM.from_pretrained(base)
    )
    if run.arguments[index].get("tuning") == "full":
        if not isinstance(model, Classifier):
            model.resize_token_embeddings(len(_tokenizer(run)))
        whole.load(folder, reference.body_of(model))
        return run.ready(index, reference.let_learn(model))
    saved = load_adapter(run, index)
    keeps_old = reference.METHODS[run.record["method"]].keeps_old
    earlier = 0 if joined else saved.total_rank - saved.rank
    if saved.total_rank != (saved.rank * (index + 1) if keeps_old else saved.rank):
        raise UserError(
            f"{run.name}: the adapter after task {index + 1} has rank {saved.total_rank} in all, and {saved.rank} a "
            "task: it is not that task's."
        )
    old = {key: Pair(pair.A[:earlier], pair.B[:, :earlier]) for key, pair in saved.pairs.items()} if earlier else None
    new = {key: Pair(pair.A[earlier:], pair.B[:, earlier:]) for key, pair in saved.pairs.items()}
    rank = saved.total_rank - earlier
    try:
        # One scale for both: alpha over the rank of a single task.
        adapters.attach(model, r=rank, alpha=saved.alpha * rank // saved.rank, dropout=0.0, old=old, new=new)
    except ValueError as error:
        raise UserError(f"{run.name}: the adapter after task {index + 1} is of another model: {error}.") from None
    if not isinstance(model, Classifier):
        model.resize_token_embeddings(len(_tokenizer(run))).requires_grad_(False)
    # A parameter that holds the whole vocabulary is not an adapter; resizing makes a new one.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{adapters.NEW}." in name)
    if isinstance(model, Classifier):
        model.let_head_learn()
    return run.ready(index, model)


def draw_task_sample(run: TextRun, index: int, request: Request) -> Sample:
    """Draw the fixed sample of a task's training data: the examples that are measured inside a run too.

    Raises:
        UserError: If the data cannot be read.
    """
    arguments = run.arguments[index]
    work = run.folder / "work"
    told = work / arguments["task_config_dir"] / "train_tasks.json"
    try:
        config = json.loads(told.read_text(encoding="utf-8"))
        tasks = [(kind, entry["dataset name"]) for kind, entries in config.items() for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.name}: {told}, which names the task's data, cannot be read ({error}).") from None
    file = arguments.get("instruction_file")
    base = _base_model(run)
    instructions = reference.wording(base, work / file if file else None)
    limit = arguments.get("max_train_samples")
    data = work / arguments["data_dir"]
    examples = load_examples(data, tasks, "train", instructions, int(limit) if limit else None)
    source = int(arguments.get("max_source_length", "512"))
    target = int(arguments.get("max_target_length", "50"))
    collate = reference.collate_for(base, _tokenizer(run), data, tasks, source, target)
    return draw_sample(examples, collate, samples=request.samples, batch=request.batch)


def _base_model(run: TextRun) -> Path:
    first = run.arguments[0]
    folder = run.folder / "work" / (first.get("base_model") or first["model_name_or_path"])
    if not (folder / "config.json").is_file():
        raise UserError(f"{run.name}: its base model {folder} is gone.")
    return folder


def _tokenizer(run: TextRun) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_base_model(run))

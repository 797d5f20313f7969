"""An encoder that answers through one linear head for each task.

It stands in where a T5 is too large. The T5 is told the data set and its answers in the prompt; so the encoder is told
the task too, by the choice of the head. It reads the bare sentence. The head takes the mean of the last layer's vectors
over the tokens. The adapters are those of the T5, the head learns along with them, and the heads of earlier tasks are
kept as they were: whatever such a task loses is lost in the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import BertModel

from flatpatch.errors import UserError
from flatpatch.families.text.data import read_labels
from flatpatch.families.text.reference.data import Example
from flatpatch.families.text.reference.task import ReferenceTask
from flatpatch.files import write_atomically

HEADS_NAME = "heads.safetensors"


class Encoder(BertModel):  # type: ignore[misc]
    """A BERT whose pooler, which is not used, may lie in its folder."""

    _keys_to_ignore_on_load_unexpected = [r"pooler"]


class Output(NamedTuple):
    """What the classifier returns; the loss is None where no labels are given."""

    loss: Tensor | None
    logits: Tensor  # (n, classes of the task)


class Classifier(nn.Module):
    """An encoder and the heads of the tasks that it has met.

    Args:
        encoder: A BERT without its pooler.
        heads: By data set, in the order of learning.
        active: The data set whose head answers; it may be changed.
    """

    def __init__(self, encoder: BertModel, heads: Mapping[str, nn.Linear], active: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        self.heads = nn.ModuleDict(dict(heads))
        self.active = active

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        """Return the mean cross-entropy over the batch, and the logits."""
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(vectors.dtype)
        mean = (vectors * mask).sum(dim=1) / mask.sum(dim=1)
        logits: Tensor = self.heads[self.active](self.dropout(mean))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)

    def let_head_learn(self) -> None:
        """Let the active head be trained, and no other."""
        for name, head in self.heads.items():
            head.requires_grad_(name == self.active)


def load(folder: Path, heads: Mapping[str, nn.Linear], active: str) -> Classifier:
    """Load an encoder, without adapters.

    Args:
        folder: The pretrained model's.
        heads: As in `Classifier`.
        active: As in `Classifier`.
    """
    return Classifier(Encoder.from_pretrained(folder, add_pooling_layer=False), heads, active)


def begin(task: ReferenceTask) -> Classifier:
    """Load the encoder with the heads of the tasks before and a new one.

    A head starts as BERT's own do: normal with the model's standard deviation, and no bias.
    """
    heads = load_heads(task.previous) if task.previous else {}
    model = load(task.model, heads, task.task[1])
    config = model.encoder.config
    head = nn.Linear(config.hidden_size, len(read_labels(task.data_dir, *task.task)))
    nn.init.normal_(head.weight, std=config.initializer_range)
    nn.init.zeros_(head.bias)
    model.heads[task.task[1]] = head
    return model


def save_heads(folder: Path, model: Classifier) -> None:
    """Write the heads into an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.heads.state_dict().items()}
    write_atomically(folder / HEADS_NAME, to_bytes(tensors))


def load_heads(folder: Path) -> dict[str, nn.Linear]:
    """Read what `save_heads` wrote.

    Raises:
        UserError: If there are no whole heads in the folder.
    """
    path = folder / HEADS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"no heads of the earlier tasks at {path}: {error}. Run that task again.") from None
    heads = {}
    for name in [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]:
        classes, width = tensors[f"{name}.weight"].shape
        heads[name] = nn.Linear(width, classes)
        heads[name].load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
    return heads


def make_collate(
    tokenizer: Any, data_dir: Path, tasks: Sequence[tuple[str, str]], max_source_length: int
) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """Return a function that turns examples of some data sets into a padded batch.

    Args:
        tokenizer: The model's.
        data_dir: The benchmark's folder, which says in which order a data set's classes are counted.
        tasks: (task type, dataset) of each data set.
        max_source_length: Longest sentence in tokens, with the first and the last one.

    Returns:
        A function from n examples to ``input_ids`` and ``attention_mask`` ``(n, length)`` and ``labels`` ``(n,)``.
    """
    places = {name: {label: i for i, label in enumerate(read_labels(data_dir, kind, name))} for kind, name in tasks}
    encode = _encoder_of(tokenizer, max_source_length)

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        labels = torch.tensor([places[example.dataset][example.label] for example in examples])
        return {**encode(examples), "labels": labels}

    return collate


def _encoder_of(tokenizer: Any, max_source_length: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    def encode(examples: Sequence[Example]) -> dict[str, Tensor]:
        found = tokenizer(
            [example.prompt for example in examples],
            max_length=max_source_length,
            truncation=True,
            padding="longest",
            return_tensors="pt",
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return encode


def predict(
    model: Classifier,
    tokenizer: Any,
    examples: Sequence[Example],
    task: ReferenceTask,
    on_predict: Callable[[dict[str, int]], None] | None = None,
) -> list[str]:
    """Answer each question with its own data set's head.

    Args:
        model: The classifier; left in evaluation mode.
        tokenizer: Its tokenizer.
        examples: The questions.
        task: Batch size, length, device and data are read from here.
        on_predict: Called after each batch with ``step`` (from 1) and ``total``.

    Returns:
        One label per example, in order.
    """
    encode = _encoder_of(tokenizer, task.max_source_length)
    size = task.per_device_eval_batch_size
    by_dataset: dict[tuple[str, str], list[int]] = {}
    for index, example in enumerate(examples):
        by_dataset.setdefault((example.task_type, example.dataset), []).append(index)
    batches = [
        (dataset, own[start : start + size])
        for dataset, own in by_dataset.items()
        for start in range(0, len(own), size)
    ]
    answers = [""] * len(examples)
    model.eval()
    active = model.active
    for step, (dataset, indices) in enumerate(batches, start=1):
        model.active = dataset[1]
        inputs = {name: value.to(task.device) for name, value in encode([examples[i] for i in indices]).items()}
        labels = read_labels(task.data_dir, *dataset)
        with torch.no_grad():
            best = model(**inputs).logits.argmax(dim=1).tolist()
        for index, place in zip(indices, best, strict=True):
            answers[index] = labels[place]
        if on_predict is not None:
            on_predict({"step": step, "total": len(batches)})
    model.active = active
    return answers

r"""From benchmark files to the batches a T5 is trained on.

A prompt has upstream's shape, so that both engines ask the same question::

    Task:<TYPE>
    Dataset:<dataset>
    <instruction>Option: <label>, <label> \n<sentence>
    Answer:
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.families.text.data import read_labels, read_split

IGNORED = -100  # the label that torch's cross entropy leaves out of its mean

# Our own wording, for use where upstream's instruction file is not there.
INSTRUCTIONS: Mapping[str, str] = {
    "TC": "Name the topic of the text below. Answer with one of the options.\n",
    "SC": "Say how the writer of the text below feels. Answer with one of the options.\n",
    "NLI": "Say how the second sentence below follows from the first. Answer with one of the options.\n",
    "QQP": "Say if both sentences below ask the same thing. Answer with one of the options.\n",
    "BoolQA": "Read the text below and answer its question with one of the options.\n",
    "MultiRC": "Read the text below and judge the proposed answer. Answer with one of the options.\n",
    "WiC": "Say if the word means the same in both sentences below. Answer with one of the options.\n",
}
# COPA's sentences already hold the question and both options; upstream asks them as they are.
BARE_TYPES = ("COPA",)


@dataclass(frozen=True)
class Example:
    """One question with its answer."""

    task_type: str
    dataset: str
    prompt: str
    label: str


def read_instructions(path: Path | None) -> Mapping[str, str]:
    """Return the instruction of each task type.

    Args:
        path: A file in the format of upstream's instruction_config.json, of which the first zero-shot entry
            of each type is taken (``--instruction_strategy single``); None for our own wording.

    Raises:
        UserError: If the file cannot be read as such.
    """
    if path is None:
        return INSTRUCTIONS
    try:
        entries: dict[str, list[dict[str, str]]] = json.loads(path.read_text(encoding="utf-8"))
        return {
            task_type: next(item["instruction"] for item in items if item["instruction_type"] == "zero-shot")
            for task_type, items in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path} is not an instruction file ({type(error).__name__}: {error}). Expected, for each task type, a list"
            " with an object {'instruction_type': 'zero-shot', 'instruction': ...}."
        ) from None


def load_examples(
    data_dir: Path,
    tasks: Sequence[tuple[str, str]],
    split: str,
    instructions: Mapping[str, str] | None = INSTRUCTIONS,
    limit: int | None = None,
    limit_each: int | None = None,
) -> list[Example]:
    """Read a split of some datasets, one after the other, in the files' order.

    Args:
        data_dir: The benchmark's folder.
        tasks: (task type, dataset) of each.
        split: ``train``, ``dev`` or ``test``.
        instructions: Instruction by task type; None for prompts that are the bare sentences.
        limit: Keep only so many of the examples, the first ones.
        limit_each: Keep only so many of each dataset, the first ones.

    Raises:
        UserError: If the data is bad, or a task type has no instruction.
    """
    examples: list[Example] = []
    for task_type, dataset in tasks:
        instances = read_split(data_dir, task_type, dataset, split)[:limit_each]
        if instructions is None:
            examples += [Example(task_type, dataset, each["sentence"], each["label"]) for each in instances]
            continue
        options = f"Option: {', '.join(read_labels(data_dir, task_type, dataset))} \n"
        if task_type not in BARE_TYPES and task_type not in instructions:
            raise UserError(f"no instruction for task type '{task_type}'; known: {', '.join(instructions)}.")
        question = "" if task_type in BARE_TYPES else instructions[task_type] + options
        for instance in instances:
            prompt = f"Task:{task_type}\nDataset:{dataset}\n{question}{instance['sentence']}\nAnswer:"
            examples.append(Example(task_type, dataset, prompt, instance["label"]))
    return examples[:limit]


def make_collate(
    tokenizer: Any, max_source_length: int, max_target_length: int
) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """Return a function that turns examples into a padded batch of a T5's inputs.

    Args:
        tokenizer: The model's tokenizer.
        max_source_length: Longest prompt, in tokens with the closing one.
        max_target_length: Longest answer, likewise.

    Returns:
        A function from n examples to ``input_ids`` and ``attention_mask`` ``(n, source)`` and ``labels``
        ``(n, target)``, padding ignored.
    """

    def shorten(prompt: str) -> str:
        tokens = tokenizer(prompt)["input_ids"]
        if len(tokens) <= max_source_length:
            return prompt
        # As upstream: back to text and tokenised anew, where unknown tokens, dropped on the way, make room.
        return str(tokenizer.decode(tokens[:max_source_length], skip_special_tokens=True))

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        source = tokenizer(
            [shorten(example.prompt) for example in examples],
            max_length=max_source_length,
            truncation=True,
            padding="longest",
            return_tensors="pt",
        )
        target = tokenizer(
            text_target=[example.label for example in examples],
            max_length=max_target_length,
            truncation=True,
            padding="longest",
            return_tensors="pt",
        )
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED),
        }

    return collate

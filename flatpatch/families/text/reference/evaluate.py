"""Exact match of greedy answers, as upstream counts it."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flatpatch.families.text.reference.data import Example, make_collate
from flatpatch.families.text.reference.task import ReferenceTask

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower the case, drop ASCII punctuation, collapse white space.

    Example:
        >>> normalise("  Science,  or Technology. ")
        'science or technology'
    """
    return " ".join(answer.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers under upstream's names.

    Args:
        examples: The questions with their labels.
        predictions: The answers, in the same order.

    Returns:
        Percent with four decimals: ``exact_match`` over all examples (so a large dataset counts for more),
        and ``exact_match_for_<name>`` for each task type and each dataset.

    Raises:
        ValueError: If there is nothing to score, or not one prediction per example.
    """
    if not examples or len(examples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    groups: dict[str, list[bool]] = {"exact_match": []}
    for example, prediction in zip(examples, predictions, strict=True):
        right = normalise(prediction) == normalise(example.label)
        groups["exact_match"].append(right)
        for name in (example.task_type, example.dataset):
            groups.setdefault(f"exact_match_for_{name}", []).append(right)
    return {name: round(100.0 * sum(right) / len(right), 4) for name, right in groups.items()}


def predict(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    task: ReferenceTask,
    on_predict: Callable[[dict[str, int]], None] | None = None,
) -> list[str]:
    """Answer questions greedily.

    Args:
        model: A sequence-to-sequence model; left in evaluation mode.
        tokenizer: Its tokenizer.
        examples: The questions.
        task: Batch size, lengths and device are read from here.
        on_predict: Called after each batch with ``step`` (from 1) and ``total``.

    Returns:
        One answer per example, in order.
    """
    collate = make_collate(tokenizer, task.max_source_length, task.max_target_length)
    size = task.per_device_eval_batch_size
    starts = range(0, len(examples), size)
    answers: list[str] = []
    model.eval()
    for step, start in enumerate(starts, start=1):
        batch = collate(examples[start : start + size])
        with torch.no_grad():
            tokens = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"].to(task.device),
                attention_mask=batch["attention_mask"].to(task.device),
                max_new_tokens=task.max_target_length,
                num_beams=1,
                do_sample=False,
            )
        answers += tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        if on_predict is not None:
            on_predict({"step": step, "total": len(starts)})
    return answers

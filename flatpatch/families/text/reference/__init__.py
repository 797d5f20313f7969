"""The reference engine: continual-learning methods with LoRA, to be read beside their papers.

It serves where the authors' repositories cannot be had, and as an oracle for them: from the same weights
and batches it gives the losses of their code. One module per method (what becomes of the earlier tasks'
adapter, and the penalty), one training loop for all; each task is one call of `run_task`, in a process of
its own or not. Methods for images go through the same loop and are in the sub-package `vision`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, set_seed

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.resuming import Keeper
from flatpatch.families.text.data import check_benchmark
from flatpatch.families.text.models import is_encoder
from flatpatch.families.text.reference import adapters, classifier, inclora, nlora, olora, seqlora, whole
from flatpatch.families.text.reference.adapters import Adapter, LayerMatrices
from flatpatch.families.text.reference.classifier import Classifier
from flatpatch.families.text.reference.data import load_examples, make_collate, read_instructions
from flatpatch.families.text.reference.evaluate import exact_match, predict
from flatpatch.families.text.reference.task import ReferenceTask
from flatpatch.families.training import (
    Gradients,
    MakeGradients,
    TrainingResult,
    plain_gradients,
    train_task,
)
from flatpatch.files import write_atomically

__all__ = [
    "METHODS",
    "Gradients",
    "MakeGradients",
    "Method",
    "ReferenceTask",
    "TrainingResult",
    "learn",
    "plain_gradients",
    "prepare",
    "run_task",
    "train_task",
]


Model: TypeAlias = "PreTrainedModel | Classifier"
AtTrainingsEnds = Callable[[str, Model, Sequence[Any], Callable[[Sequence[Any]], dict[str, Tensor]]], None]
"""Called with "before" or "after", the model, the training examples and what collates them."""


@dataclass(frozen=True)
class Method:
    """What sets one method apart."""

    keeps_old: bool
    """True: earlier adapters are frozen and a new one is added; False: the one adapter is trained on."""
    penalty: Callable[[Sequence[LayerMatrices], float, float], Tensor]
    """From the layers, lamda_1 and lamda_2 to a scalar that is added to the loss."""


METHODS: Mapping[str, Method] = {
    "nlora": Method(nlora.KEEPS_OLD, nlora.penalty),
    "olora": Method(olora.KEEPS_OLD, olora.penalty),
    "seqlora": Method(seqlora.KEEPS_OLD, seqlora.penalty),
    "inclora": Method(inclora.KEEPS_OLD, inclora.penalty),
}


def prepare(task: ReferenceTask) -> tuple[Model, Any]:
    """Load the model as the task begins with it: with its adapters, or all of it trained up to here.

    Returns:
        The model on its device, and its tokenizer.

    Raises:
        UserError: If the model or the previous adapter is missing or does not fit.
    """
    if not (task.model / "config.json").is_file():
        raise UserError(f"no model at {task.model}: it has no config.json. Give the folder of a pretrained T5 or BERT.")
    earlier = _load_previous(task) if task.tuning == "lora" else None
    set_seed(task.seed)
    model: Model = (
        classifier.begin(task) if is_encoder(task.model) else AutoModelForSeq2SeqLM.from_pretrained(task.model)
    )
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    if task.tuning == "full":
        if not isinstance(model, Classifier):
            model.resize_token_embeddings(len(tokenizer))
        if task.previous is not None:
            whole.load(task.previous, body_of(model))
        return let_learn(model).to(task.device), tokenizer
    path = "old" if METHODS[task.method].keeps_old else "new"
    try:
        adapters.attach(
            model,
            r=task.lora_r,
            alpha=task.lora_alpha,
            dropout=task.lora_dropout,
            **{path: earlier.pairs if earlier else None},
        )
    except ValueError as error:
        raise UserError(f"the adapter in {task.previous} is of another model than {task.model}: {error}.") from None
    if isinstance(model, Classifier):
        model.let_head_learn()
    else:
        # As upstream: T5 has more words than its tokenizer, and the loss is taken over the tokenizer's.
        model.resize_token_embeddings(len(tokenizer)).requires_grad_(False)
    return model.to(task.device), tokenizer


def body_of(model: Model) -> Any:
    """Return what is saved and loaded whole where every weight is trained: a classifier's heads have their own file."""
    return model.encoder if isinstance(model, Classifier) else model


def let_learn(model: Model) -> Any:
    """Let every weight be trained, but for the heads of other tasks; return the model."""
    model.requires_grad_(True)
    if isinstance(model, Classifier):
        model.let_head_learn()
    return model


def _made(task: ReferenceTask) -> dict[str, str | int]:
    return {"method": task.method, "lora_r": task.lora_r, "lora_alpha": task.lora_alpha}


def _load_previous(task: ReferenceTask) -> Adapter | None:
    if task.previous is None:
        return None
    earlier = adapters.load(task.previous)
    if earlier.made != _made(task):
        raise UserError(
            f"{task.previous} was made with {dict(earlier.made)}, this task asks for {_made(task)}."
            " Keep the settings of the first task, or start the sequence again."
        )
    return earlier


def wording(model: Path, instruction_file: Path | None) -> Mapping[str, str] | None:
    """Return the instructions that stand in a model's prompts; None where it reads the bare sentences."""
    return None if is_encoder(model) else read_instructions(instruction_file)


def collate_for(
    model: Path,
    tokenizer: Any,
    data_dir: Path,
    datasets: Sequence[tuple[str, str]],
    max_source_length: int,
    max_target_length: int,
) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Return what makes a batch of examples of some data sets for a model, which is named by its folder."""
    if is_encoder(model):
        return classifier.make_collate(tokenizer, data_dir, datasets, max_source_length)
    return make_collate(tokenizer, max_source_length, max_target_length)


def learn(
    model: Model,
    tokenizer: Any,
    task: ReferenceTask,
    *,
    make_gradients: MakeGradients | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    at: AtTrainingsEnds | None = None,
    keeper: Keeper | None = None,
) -> tuple[TrainingResult, int]:
    """Train a prepared model on the task's training split.

    ``at`` is called as ``at("before", model, examples, collate)`` and, after the last step, with "after". ``keeper``
    lets the training go on from a checkpoint, see `train_task`.

    Returns:
        The training's result and the number of training examples.
    """
    instructions = wording(task.model, task.instruction_file)
    examples = load_examples(task.data_dir, [task.task], "train", instructions, task.max_train_samples)
    layers = adapters.layer_matrices(model)
    method = METHODS[task.method]
    # As the Trainer does when it is made: batches and dropout do not depend on how the weights were drawn.
    set_seed(task.seed)
    lengths = (task.max_source_length, task.max_target_length)
    collate = collate_for(task.model, tokenizer, task.data_dir, [task.task], *lengths)
    if at is not None:
        at("before", model, examples, collate)
    result = train_task(
        model,
        examples,
        collate,
        task,
        lambda: method.penalty(layers, task.lamda_1, task.lamda_2) if layers else None,
        make_gradients=make_gradients or plain_gradients,
        on_step=on_step,
        keeper=keeper,
    )
    if at is not None:
        at("after", model, examples, collate)
    return result, len(examples)


def run_task(
    arguments: ReferenceTask,
    *,
    make_gradients: MakeGradients | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_predict: Callable[[dict[str, int]], None] | None = None,
    at: AtTrainingsEnds | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Train on one task, save its adapter or the whole model, answer the test sets and write the results.

    Writes into ``output_dir``: ``adapter/`` (the next task's ``previous``), ``predictions.jsonl`` and,
    last, ``all_results.json`` with upstream's names, so that its presence means the task is done. On one
    machine's CPU the same arguments give the same losses and files' contents, bit for bit, but for the
    times.

    Args:
        arguments: What to do.
        make_gradients: See `train_task`; SAM goes here.
        on_step: See `train_task`.
        on_predict: Called after each predicted batch with ``step`` (from 1) and ``total``.
        at: See `learn`.
        keeper: See `learn`.

    Raises:
        UserError: If the method, the data, the model or the previous adapter is not usable.
        FlatpatchError: If training diverges.
    """
    task = arguments
    if task.method not in METHODS:
        hint = did_you_mean(task.method, METHODS)
        raise UserError(f"unknown method '{task.method}'.{hint} Known methods: {', '.join(METHODS)}.")
    check_benchmark(task.data_dir, [(*task.task, "train"), *((*each, "test") for each in task.eval_tasks)])
    model, tokenizer = prepare(task)
    result, train_samples = learn(
        model, tokenizer, task, make_gradients=make_gradients, on_step=on_step, at=at, keeper=keeper
    )
    if task.tuning == "full":
        whole.save(task.output_dir / "adapter", body_of(model))
    else:
        adapters.save(task.output_dir / "adapter", Adapter(adapters.joined(model), _made(task)))

    instructions = wording(task.model, task.instruction_file)
    limits = (task.max_predict_samples, task.max_test_samples)
    questions = load_examples(task.data_dir, task.eval_tasks, "test", instructions, *limits)
    start = time.perf_counter()
    if isinstance(model, Classifier):
        classifier.save_heads(task.output_dir / "adapter", model)
        answers = classifier.predict(model, tokenizer, questions, task, on_predict)
    else:
        answers = predict(model, tokenizer, questions, task, on_predict)
    lines = [
        json.dumps({"task": q.task_type, "dataset": q.dataset, "prompt": q.prompt, "label": q.label, "prediction": a})
        for q, a in zip(questions, answers, strict=True)
    ]
    write_atomically(task.output_dir / "predictions.jsonl", "\n".join(lines) + "\n")
    results = {
        "epoch": float(task.num_train_epochs),
        "train_loss": result.mean_loss,
        "train_runtime": result.seconds,
        "train_samples": train_samples,
        "train_steps_per_second": result.steps / result.seconds,
        **{f"predict_{name}": value for name, value in exact_match(questions, answers).items()},
        "predict_global_step": result.steps,
        "predict_runtime": time.perf_counter() - start,
        "predict_samples": len(questions),
    }
    write_atomically(task.output_dir / "all_results.json", json.dumps(results, indent=2, sort_keys=True) + "\n")

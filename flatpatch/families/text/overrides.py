"""What ``upstream.<argument>=`` may say to a text run, checked before anything starts.

Kinds are read where the run would read them: from the fields that upstream's entry script declares, from transformers'
own training arguments, or from the reference engine's task. Ranges are what the arguments mean.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.errors import did_you_mean

# Settings of ours that stand for an argument of upstream's; overriding the argument itself would bypass the record.
OURS = {
    "model_name_or_path": "model=",
    "data_dir": "data=",
    "output_dir": "output= and run=",
    "task_config_dir": "tasks=",
    "seed": "seed=",
    "local_rank": "processes=",
    "deepspeed": "launcher=",
    "no_cuda": "device=",
}
# Without these a task leaves no adapter or no accuracy, and the run could only fail at its end.
ALWAYS = ("do_train", "do_predict", "predict_with_generate")
# Variables by which a launcher tells a process its rank; transformers would join the others.
_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as transformers' parser
_NUMBERS: Mapping[str, type] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``open`` leaves the ends themselves out."""

    low: float = -math.inf
    high: float = math.inf
    open: str = ""  # "low", "high" or neither

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open == "low" else value >= self.low
        below = value < self.high if self.open == "high" else value <= self.high
        return abs(value) <= sys.float_info.max and above and below  # isfinite() fails on huge whole numbers

    def __str__(self) -> str:
        low = f"{'over' if self.open == 'low' else 'at least'} {_plain(self.low)}" if math.isfinite(self.low) else ""
        high = (
            f"{'under' if self.open == 'high' else 'at most'} {_plain(self.high)}" if math.isfinite(self.high) else ""
        )
        return " and ".join(filter(None, (low, high))) or "a finite number"


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


COUNT, OVER_ZERO, NOT_NEGATIVE = Range(1, 2**31 - 1), Range(0, open="low"), Range(0)
SHARE, PART = Range(0, 1), Range(0, 1, open="high")
RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("repetition_penalty", "lora_alpha"), OVER_ZERO),
    "num_train_epochs": Range(0, 1e6, open="low"),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("per_gpu_train_batch_size", "per_gpu_eval_batch_size", "eval_accumulation_steps"),
            *("lora_r", "lora_dim", "max_source_length", "max_target_length", "generation_max_length"),
            *("num_beams", "generation_num_beams", "max_train_samples", "max_eval_samples", "max_predict_samples"),
            "max_test_samples",
            *("logging_steps", "save_steps", "eval_steps", "save_total_limit", "preprocessing_num_workers"),
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "lamda_1", "lamda_2"),
            *("adam_epsilon", "dataloader_num_workers", "eval_delay", "num_examples"),
            *("max_num_instances_per_task", "max_num_instances_per_eval_task"),
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), PART),
    "warmup_ratio": SHARE,
    "data_seed": Range(0, 2**32 - 1),
    "max_steps": Range(-1),
}
_WORDS = {"instruction_strategy": ("single", "multiple")}  # texts of which upstream's code takes these alone
_OF_REFERENCE = {"optim": ("adamw_hf", "sgd")}  # texts of which the reference engine takes these alone


@dataclass(frozen=True)
class Kind:
    """What an argument takes: a type, and the only words where it takes no others."""

    type: type = str
    words: tuple[str, ...] = ()


def upstream_kinds(entry: Path) -> dict[str, Kind]:
    """Return the arguments of upstream's entry script: its own, which count first, and transformers'."""
    from transformers import Seq2SeqTrainingArguments

    kinds = {field.name: _kind_of(field.type) for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    return kinds | {name: Kind(_NUMBERS.get(text, str)) for name, text in _declared(entry).items()}


def reference_kinds() -> dict[str, Kind]:
    """Return the arguments that reach the reference engine; read from its file, as loading it takes seconds."""
    file = Path(__file__).parent / "reference" / "task.py"
    numbers = {name: Kind(_NUMBERS[text]) for name, text in _declared(file).items() if text in ("int", "float")}
    return numbers | {name: Kind(str, words) for name, words in _OF_REFERENCE.items()}


def _declared(file: Path) -> dict[str, str]:
    """Return the fields that the classes of a file declare, each with its type, without the None that it may be."""
    return {
        item.target.id: re.sub(r"^(?:typing\.)?Optional\[(.*)\]$", r"\1", ast.unparse(item.annotation)).removesuffix(
            " | None"
        )
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def problems_of(
    overrides: Mapping[str, str],
    known: Mapping[str, Kind],
    *,
    unused: Collection[str],
    title: str,
    reference: bool,
    device: str,
) -> list[str]:
    """Return what is wrong with the overrides of a text run, one message each.

    Args:
        overrides: Argument to the word given.
        known: The arguments that reach the run.
        unused: Those that the method's code takes and never uses.
        title: How it is called.
        reference: Whether the reference engine runs it.
        device: ``cpu`` or ``cuda``.
    """
    problems = []
    values: dict[str, Any] = {}
    for name, word in overrides.items():
        if name in OURS:
            problems.append(f"upstream.{name}: use the setting {OURS[name]} instead, so that the record stays true.")
        elif name not in known:
            whose = "the reference engine" if reference else "upstream"
            problems.append(f"upstream.{name}: {whose} has no argument '{name}'.{did_you_mean(name, known)}")
        elif name in unused:
            problems.append(f"upstream.{name} cannot reach the run: {title} never uses it. Leave it out.")
        else:
            try:
                values[name] = read(name, word, known[name])
            except ValueError as error:
                problems.append(str(error))
    if not problems and not reference and device == "cpu":
        problems += _together(values)
    return problems


def read(name: str, word: str, kind: Kind) -> Any:
    """Return what a word means.

    Raises:
        ValueError: If the argument does not take it; says what it takes.
    """
    got = f"upstream.{name}='{word}'"
    kind = dataclasses.replace(kind, words=_WORDS.get(name, kind.words))
    if kind.words and word not in kind.words:
        raise ValueError(f"{got} is unknown.{did_you_mean(word, kind.words)} Expected: {', '.join(kind.words)}.")
    if kind.type is bool:
        if word.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{got} is neither true nor false.")
        if name in ALWAYS and word.lower() in _FALSE:
            raise ValueError(f"{got}: a run trains and predicts, and would end without a result. Leave it out.")
        return word.lower() in _TRUE
    if kind.type is str:
        if not word:  # upstream's parser would take the next argument for its value
            raise ValueError(f"{got} is empty. Give it a value, or leave it out.")
        if word.startswith("-"):  # upstream's parser would take it for an argument of its own
            raise ValueError(f"{got} begins with '-', which upstream would read as another argument.")
        return word
    limits = RANGES.get(name, Range())
    what = "a whole number" if kind.type is int else "a number"
    try:
        if "_" in word:  # Python reads 1_0 as ten
            raise ValueError
        value = kind.type(word)
    except ValueError:
        raise ValueError(f"{got} is not {what} (expected {limits}).") from None
    if isinstance(value, float) and not math.isfinite(value):
        bounds = "" if limits == Range() else f", {limits}"
        raise ValueError(f"{got} is out of range (expected a finite number{bounds}).")
    if value not in limits:
        raise ValueError(f"{got} is out of range (expected {limits}).")
    return value


def _together(values: Mapping[str, Any]) -> list[str]:
    """Return what transformers itself says against these values on the CPU."""
    from transformers import Seq2SeqTrainingArguments

    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    given = {name: value for name, value in values.items() if name in theirs}
    if not given or any(name in os.environ for name in _RANKS):
        return []
    try:
        Seq2SeqTrainingArguments(output_dir=tempfile.gettempdir(), no_cuda=True, **given)
    except (ValueError, TypeError, ImportError) as error:
        said = " ".join(str(error).split())
        return [f"{', '.join(f'upstream.{name}={values[name]}' for name in given)}: transformers refuses it: {said}"]
    return []


def _kind_of(annotation: Any) -> Kind:
    options: Sequence[Any] = typing.get_args(annotation) or (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return Kind(str, tuple(str(member.value) for member in option))
    chosen = next((option for option in options if option in (bool, int, float)), str)
    return Kind(str if typing.get_origin(annotation) is list else chosen)

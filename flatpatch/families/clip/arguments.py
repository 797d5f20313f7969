"""The arguments of a CLIP run, as ``upstream.<argument>=`` takes them. Loading this file loads no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.quick.preset import RATES
from flatpatch.settings import repeated

TARGETS = ("q", "k", "v", "out")
WORDS: Mapping[str, tuple[str, ...]] = {
    "tower": ("vision", "text", "both"),
    "optimizer": ("sgd", "adamw"),
    "on_bad_image": ("stop", "skip"),
}
OURS = (
    *("rank", "alpha", "targets", "tower", "momentum", "lamb", "lame", "eval_batch_size", "num_workers"),
    *("iterations", "batch_size", "warmup", "label_smoothing", "weight_decay"),
)
"""What the record does not state, so that the values of profile ``record`` are ours."""
OF_THE_PROTOCOL = ("iterations", "batch_size", "warmup", "label_smoothing", "weight_decay")
"""Those of them that are the values of the protocol by which the data sets are learned in turn (MTIL)."""


@dataclass(frozen=True)
class Arguments:
    """How the tasks are learned; the defaults are those of profile ``record``."""

    datasets: tuple[str, ...] = tuple(DATASETS)
    """The tasks, in the order of training."""
    rank: int = 8
    """Of the LoRA factors."""
    alpha: float = 16.0
    """Their product counts alpha / rank times."""
    targets: tuple[str, ...] = ("q", "v")
    """Which projections of an attention have factors: some of q, k, v, out."""
    tower: str = "both"
    """Which encoder's attentions have them: vision, text or both."""
    iterations: int = 1000
    """Steps of each task."""
    batch_size: int = 64
    """Training images of a step."""
    eval_batch_size: int = 256
    """Test images, and prompts, that go through the model at once."""
    learning_rate: tuple[float, ...] = ()
    """One for all tasks, or one for each; none: the profile's own of each data set."""
    warmup: int = 100
    """Steps over which the learning rate grows from zero; then it falls along a cosine."""
    label_smoothing: float = 0.2
    optimizer: str = "sgd"
    """sgd or adamw."""
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0
    lamb: float = 0.95
    """InfLoRA: share of the inputs' energy that is protected after the first task."""
    lame: float = 1.0
    """InfLoRA: the share would reach this one task after the last; it grows linearly in between."""
    num_workers: int = 4
    """Processes that load images."""
    on_bad_image: str = "stop"
    """What an image that cannot be decoded does: stop the run, or be skipped and counted."""

    def rate(self, task: int) -> float:
        """Return a task's learning rate."""
        if not self.learning_rate:
            name = self.datasets[task]
            return RATES[name] if name in RATES else DATASETS[name].learning_rate
        return self.learning_rate[task if len(self.learning_rate) > 1 else 0]

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


FIELDS = {item.name: item for item in dataclasses.fields(Arguments)}
_COUNTS = ("rank", "iterations", "batch_size", "eval_batch_size")


def from_dict(values: Mapping[str, Any]) -> Arguments:
    """Return the arguments that :meth:`Arguments.as_dict` gave."""
    kept: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Arguments(**kept)


def override(base: Arguments, words: Mapping[str, str], datasets: Sequence[str]) -> Arguments:
    """Return the arguments with what ``upstream.<argument>=`` asks for.

    Args:
        base: Without it.
        words: By argument, as given.
        datasets: Which data sets the profile has.

    Raises:
        UserError: With every argument that is unknown, and every value that cannot be used.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, word in words.items():
        if name not in FIELDS:
            known = f"{did_you_mean(name, FIELDS)} Known: {', '.join(FIELDS)}"
            problems.append(f"upstream.{name}: CLIP runs have no argument '{name}'.{known}.")
            continue
        try:
            values[name] = _parse(name, word, getattr(base, name))
        except ValueError as error:
            problems.append(f"upstream.{name}={word}: {error}.")
    found = dataclasses.replace(base, **values)
    problems += _problems(found, datasets)
    if problems:
        raise UserError.collect(problems)
    return found


def _parse(name: str, word: str, example: Any) -> Any:
    """Turn a word into a value of an argument's kind.

    Raises:
        ValueError: If it is none.
    """
    if name == "learning_rate":
        return tuple(_number(name, part.strip(), float) for part in word.split(","))
    if isinstance(example, tuple):
        return tuple(part.strip() for part in word.split(","))
    return word.strip() if isinstance(example, str) else _number(name, word.strip(), type(example))


def _number(name: str, word: str, kind: type) -> Any:
    try:
        if "_" in word:  # Python reads 1_0 as ten
            raise ValueError
        return kind(word)
    except ValueError:
        what, example = ("a whole number", "8") if kind is int else ("a number", "0.05")
        raise ValueError(f"'{word}' is not {what} (expected e.g. upstream.{name}={example})") from None


def _problems(found: Arguments, datasets: Sequence[str]) -> list[str]:
    """Return which values cannot be used, one message each."""
    problems = []
    for name, known in (("datasets", tuple(datasets)), ("targets", TARGETS)):
        values: tuple[str, ...] = getattr(found, name)
        text = f"upstream.{name}={','.join(values)}"
        for word in values:
            if word not in known:
                problems.append(f"{text}: unknown '{word}'.{did_you_mean(word, known)} Expected: {', '.join(known)}.")
        if twice := repeated(values):
            problems.append(f"{text} names {twice} twice. Name each once.")
    for name, words in WORDS.items():
        value = getattr(found, name)
        if value not in words:
            problems.append(
                f"upstream.{name}={value} is unknown.{did_you_mean(value, words)} Expected: {', '.join(words)}."
            )
    for name in FIELDS:
        value = getattr(found, name)
        if not isinstance(value, int | float):
            continue
        least = 1 if name in _COUNTS else 0
        if not (math.isfinite(value) and least <= value < 2**31):
            kind = "a whole number" if isinstance(value, int) else "a finite number"
            problems.append(
                f"upstream.{name}={value} is out of range (expected {kind} of at least {least}, e.g. "
                f"upstream.{name}={FIELDS[name].default:g})."
            )
    if found.alpha == 0:
        problems.append("upstream.alpha=0 leaves nothing of the factors. Expected a number over 0.")
    if not 0 <= found.label_smoothing < 1:
        problems.append(f"upstream.label_smoothing={found.label_smoothing:g}: expected a share under 1, e.g. 0.2.")
    if not found.momentum < 1:
        problems.append(f"upstream.momentum={found.momentum:g}: expected a number under 1, e.g. 0.9.")
    for name in ("lamb", "lame"):
        if not 0 < getattr(found, name) <= 1:
            problems.append(f"upstream.{name}={getattr(found, name):g}: expected a share over 0 and at most 1.")
    if found.warmup > found.iterations:
        problems.append(
            f"upstream.warmup={found.warmup} is more than upstream.iterations={found.iterations}. Choose a smaller one."
        )
    rates, tasks = found.learning_rate, found.datasets
    if len(rates) not in (0, 1, len(tasks)):
        problems.append(
            f"upstream.learning_rate={','.join(f'{rate:g}' for rate in rates)} has {len(rates)} values for "
            f"{len(tasks)} tasks ({', '.join(tasks)}): expected one for all, or one for each."
        )
    if bad := [f"{rate:g}" for rate in rates if not (math.isfinite(rate) and rate > 0)]:
        problems.append(f"upstream.learning_rate has {', '.join(bad)}: expected finite numbers over 0.")
    return problems

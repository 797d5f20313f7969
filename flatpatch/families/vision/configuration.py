"""Upstream's JSON configurations under change, with every change written down as a deviation."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatpatch.errors import FlatpatchError, UserError, did_you_mean
from flatpatch.families.base import Deviation
from flatpatch.families.vision.upstream import VisionUpstream

# Settings of ours that stand for a key of upstream's; overriding the key itself would bypass the record.
OURS = {
    "dataset": "benchmark=",
    "data_path": "data=",
    "device": "device=",
    "model_name": "method= or variant=",
    "seed": "seed=",
}
# What the reference engine is told, in InfLoRA's spelling, with the values of its configs/cifar100_inflora.json.
REFERENCE_DEFAULTS: Mapping[str, Any] = {
    "init_cls": 10,
    "increment": 10,
    "batch_size": 128,
    "rank": 10,
    "lamb": 0.95,
    "lame": 1.0,
    "shuffle": False,
    "epochs": 20,
    "lrate": 0.0005,
    "weight_decay": 0.0,
    "optim": "adam",
}
# What the trainers of this family have in common: numbers from 1 on, counts but for 0, and such as are not negative.
COUNTS = ("init_cls", "increment", "batch_size", "epochs", "init_epoch")
WHOLE = ("num_workers",)
NOT_NEGATIVE = ("num_workers", "init_lr", "lrate", "lrate_decay", "weight_decay", "init_weight_decay")
_READS = re.compile(r"""args(?:\.get\(|\[)\s*["'](\w+)["']""")


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration that upstream ships.

    Raises:
        FlatpatchError: If it is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlatpatchError(f"upstream's configuration {path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise FlatpatchError(f"upstream's configuration {path} holds a {type(content).__name__}, expected an object.")
    return content


def known_keys(checkout: Path, shipped: Path) -> set[str]:
    """Return the keys of the shipped configuration, and those that trainer and this model's own code read."""
    config = read_config(shipped)
    folder = checkout / ("methods" if (checkout / "methods").is_dir() else "models")
    code = (checkout / "trainer.py", folder / "base.py", folder / f"{config['model_name'].lower()}.py")
    read = {key for path in code if path.is_file() for key in _READS.findall(path.read_text(encoding="utf-8"))}
    return {*config, *read}


class ConfigEditor:
    """A configuration under change. Keys keep upstream's order; a new one comes last."""

    def __init__(self, shipped: Mapping[str, Any]) -> None:
        self.shipped = dict(shipped)
        self.current = dict(shipped)
        self.reasons: dict[str, str] = {}
        self.extra: list[Deviation] = []

    def set(self, key: str, value: Any, why: str) -> None:
        """Set one key; an equal value is no change."""
        if key not in self.current or self.current[key] != value:
            self.current[key] = value
            self.reasons[key] = why

    def note(self, what: str, upstream: str | None, here: str | None, why: str) -> None:
        """Record a difference that is not a key."""
        self.extra.append(Deviation(what, upstream, here, why))

    def deviations(self) -> list[Deviation]:
        """Return every difference from what is shipped, as JSON, with its reason."""
        found = list(self.extra)
        for key, why in self.reasons.items():
            old = json.dumps(self.shipped[key]) if key in self.shipped else None
            new = json.dumps(self.current[key])
            if old != new:
                found.append(Deviation(key, old, new, why))
        return found


def override(
    editor: ConfigEditor,
    overrides: Mapping[str, str],
    known: set[str],
    upstream: VisionUpstream,
    *,
    quick: bool = False,
) -> None:
    """Set what ``upstream.<key>=`` asks for.

    Args:
        editor: The configuration.
        overrides: Key to the word given, JSON or plain text.
        known: The keys upstream knows.
        upstream: The method.
        quick: Whether the profile is quick.

    Raises:
        UserError: If a key is unknown or a setting of ours, a value is of another kind than upstream's, or one that is
            not in force already would not reach the run.
    """
    problems = []
    after = {**editor.current, **{key: _parse(word) for key, word in overrides.items()}}
    for key, word in overrides.items():
        if key in OURS:
            problems.append(f"upstream.{key}: use the setting {OURS[key]} instead, so that the record stays true.")
            continue
        if key not in known:
            problems.append(f"upstream.{key}: upstream knows no key '{key}'.{did_you_mean(key, known)}")
            continue
        value = _parse(word)
        if key in editor.current and (problem := _wrong_kind(key, word, value, editor.current[key])):
            problems.append(problem)
            continue
        in_force = key in editor.current and editor.current[key] == value
        if not in_force and (why := upstream.why_unread(after, key, quick=quick)):
            advice = "" if ". " in why else " Leave it out."
            problems.append(f"upstream.{key} cannot reach the run: {upstream.title}'s code {why}.{advice}")
            continue
        editor.set(key, value, f"setting upstream.{key}=")
    if problems:
        raise UserError.collect(problems)


def _parse(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def _wrong_kind(key: str, word: str, value: Any, theirs: Any) -> str:
    kinds: dict[str, type | tuple[type, ...]] = {
        "true or false": bool,
        "a number": (int, float),
        "a list": list,
        "text": str,
    }
    for name, kind in kinds.items():
        if isinstance(theirs, kind):
            # For Python true is a number too; for a configuration it is not.
            same = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            example = json.dumps(theirs, separators=(",", ":"))
            return "" if same else f"upstream.{key}='{word}' is not {name} (expected e.g. upstream.{key}={example})."
    return ""


def _value_problems(config: Mapping[str, Any], upstream: VisionUpstream) -> list[str]:
    """Return which numbers the code could not use, whoever set them."""
    problems = []
    not_negative = (*NOT_NEGATIVE, *upstream.not_negative)
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        finite = abs(value) <= sys.float_info.max  # isfinite() fails on huge whole numbers
        if not finite or (key in not_negative and value < 0) or (key in WHOLE and value != int(value)):
            kind = "a whole number" if key in WHOLE else "a finite number"
            bound = " of at least 0" if key in not_negative else ""
            problems.append(f"upstream.{key}={json.dumps(value)} is out of range (expected {kind}{bound}).")
    return problems


def task_classes(
    config: Mapping[str, Any], classes: int, upstream: VisionUpstream, *, width: int = 768, blocks: int = 12
) -> tuple[tuple[int, int], ...]:
    """Return the first and last class of each task, having checked all that the configuration says.

    Args:
        config: Upstream's configuration, with ``init_cls`` and ``increment``.
        classes: How many classes the benchmark has.
        upstream: The method.
        width: Of the model; a ViT-B/16's.
        blocks: Of the model.

    Raises:
        UserError: If a value cannot be used, or upstream's own groups of classes, which its log has accuracies of,
            would not be the tasks.
    """
    problems = []
    for key in (*COUNTS, *upstream.counts):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            problems.append(
                f"upstream.{key}={json.dumps(value)} is out of range (expected a whole number of at least 1)."
            )
    for key, words in upstream.words.items():
        if key in config and config[key] not in words:
            problems.append(f"upstream.{key}={json.dumps(config[key])} is unknown here. Expected: {', '.join(words)}.")
    problems += _value_problems(config, upstream)
    problems += upstream.value_problems(config, width, blocks)
    if problems:
        raise UserError.collect(problems)
    first, step = config["init_cls"], config["increment"]
    rest = classes - first
    if first > classes or rest % step:
        problems.append(
            f"{classes} classes do not divide into a first task of {first} and further ones of {step}: the log's "
            "groups of classes would not be the tasks. "
            + (
                f"Choose upstream.increment= so that it divides {classes} - {first} = {rest}, the classes after the "
                "first task, or another upstream.init_cls=."
                if rest > 0
                else f"Choose upstream.init_cls= of at most {classes}."
            )
        )
    elif min(first, step) < 2:
        problems.append(
            "a task of one class: upstream's log leaves out a last group of one class. "
            "Choose upstream.init_cls= and upstream.increment= of at least 2."
        )
    problems += [] if problems else upstream.config_problems(config, classes, 1 + rest // step)
    if problems:
        raise UserError.collect(problems)
    starts = range(first, classes, step)
    return ((0, first - 1), *((start, start + step - 1) for start in starts))

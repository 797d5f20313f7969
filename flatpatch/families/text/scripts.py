"""Read upstream's shell scripts: which commands they run, with which arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flatpatch.errors import FlatpatchError


@dataclass(frozen=True)
class Invocation:
    """One training command of an upstream script.

    ``arguments`` keeps upstream's order and spelling, without the leading dashes; a flag's value is None.
    """

    environment: tuple[tuple[str, str], ...]
    launcher: tuple[str, ...]
    entry: str
    arguments: tuple[tuple[str, str | None], ...]

    def get(self, name: str, default: str = "") -> str:
        """Return the value of one argument."""
        for key, value in self.arguments:
            if key == name:
                return value or ""
        return default

    def has(self, name: str) -> bool:
        """Tell whether an argument or flag is given."""
        return any(key == name for key, _ in self.arguments)

    def with_argument(self, name: str, value: str | None) -> Invocation:
        """Return a copy with one argument set, in its place or at the end."""
        if self.has(name):
            changed = tuple((key, value if key == name else old) for key, old in self.arguments)
        else:
            changed = (*self.arguments, (name, value))
        return replace(self, arguments=changed)

    def without(self, name: str) -> Invocation:
        """Return a copy that lacks one argument."""
        return replace(self, arguments=tuple(item for item in self.arguments if item[0] != name))

    @property
    def world_size(self) -> int:
        """How many GPUs upstream's command runs on."""
        devices = dict(self.environment).get("CUDA_VISIBLE_DEVICES", "0")
        return len([device for device in devices.split(",") if device.strip()])

    def words(self) -> list[str]:
        """Return the entry and its arguments as a command line's words."""
        words = [self.entry]
        for key, value in self.arguments:
            words.append(f"--{key}")
            if value is not None:
                words.append(value)
        return words


def parse_script(path: Path) -> list[Invocation]:
    """Return the ``deepspeed ... src/<entry>.py --arguments`` commands of a script, in order.

    Args:
        path: A script such as upstream's ``scripts/order_1.sh``.

    Raises:
        FlatpatchError: If the script is missing or holds no such command.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FlatpatchError(f"upstream's script {path} cannot be read: {error.strerror}.") from error
    found = [invocation for words in _commands(text) if (invocation := _parse_command(words))]
    if not found:
        raise FlatpatchError(
            f"{path} holds no training command (expected lines such as: deepspeed ... src/run.py --...)."
        )
    return found


def _commands(text: str) -> Iterator[list[str]]:
    joined = re.sub(r"\\[ \t]*\n", " ", text)
    for line in joined.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            yield shlex.split(line, comments=True)


def _parse_command(words: list[str]) -> Invocation | None:
    environment = []
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        key, value = words.pop(0).split("=", 1)
        environment.append((key, value))
    if not words or words[0] not in ("deepspeed", "python", "python3", "torchrun"):
        return None
    entry = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if entry is None:
        return None
    return Invocation(tuple(environment), tuple(words[:entry]), words[entry], tuple(pairs(words[entry + 1 :])))


def pairs(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each ``--name [value]`` of a command line; a flag has no value."""
    position = 0
    while position < len(words):
        name = words[position].removeprefix("--")
        position += 1
        if position < len(words) and not words[position].startswith("--"):
            yield name, words[position]
            position += 1
        else:
            yield name, None

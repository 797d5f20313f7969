"""What an audited implementation is to the checks: where it comes from, and how one makes it and takes its step."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Passes = Callable[[], Tensor]  # runs forward and backward, clears no gradient, returns the loss


class NotOfferedError(Exception):
    """The implementation does not claim to do this; the message says what it does instead."""


class MissingError(Exception):
    """The implementation is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Order:
    """What is to be made: SAM over ``groups`` of the parameters of ``model``."""

    model: nn.Module
    groups: Sequence[Mapping[str, Any]]  # each with "params", and with "lr" where it has its own
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.1})
    rho: float = 0.1
    adaptive: bool = False

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained, in the order of the groups."""
        return [p for group in self.groups for p in group["params"]]

    def make_groups(self) -> list[dict[str, Any]]:
        """Return groups that an optimizer may keep and change."""
        return [dict(group) for group in self.groups]

    def make_base(self) -> torch.optim.Optimizer:
        """Return the optimizer that does the descent, for implementations that wrap an instance."""
        return self.base(self.make_groups(), **self.options)


class Stepper:
    """One step of an implementation, written as its own pages tell users to."""

    def __init__(self, optimizer: Any, *, scheduled: Any = None) -> None:
        """Keep the object that is saved, and the one that a learning-rate scheduler is to be given."""
        self.optimizer = optimizer
        self.scheduled = optimizer if scheduled is None else scheduled

    def step(self, passes: Passes, before_descent: Callable[[], None] | None = None) -> None:
        """Take a step; ``before_descent`` runs when the last gradient is there and the weights are restored or not."""
        raise NotImplementedError

    def call(self, passes: Passes) -> Any:
        """Take a step by the one call ``step(closure)``; return what that returned."""
        raise NotOfferedError("has no step(closure)")

    def state_dict(self) -> Any:
        """Return the checkpoint of the object that users are told to save."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load a checkpoint."""
        self.optimizer.load_state_dict(state)


@dataclass(frozen=True)
class Source:
    """Where an implementation is found.

    Attributes:
        module: What is imported.
        package: Name on the package index, or "" for a checkout.
        repository: ``owner/name`` on GitHub, or "" for a package.
        pin: Version, or commit, that the rows were written for.
        beside: Packages that it needs and this project has not, to install without what they ask for in turn.
        whole: Packages that it needs, to install with that.
    """

    module: str
    package: str = ""
    repository: str = ""
    pin: str = ""
    beside: Sequence[str] = ()
    whole: Sequence[str] = ()

    @property
    def folder(self) -> str:
        """Name of the checkout's folder."""
        return self.repository.replace("/", "-")

    @property
    def url(self) -> str:
        """Where people read about it."""
        return (
            f"https://github.com/{self.repository}" if self.repository else f"https://pypi.org/project/{self.package}/"
        )

    def how_to_get(self, checkouts: Path) -> str:
        """Return the command that brings it to where it is looked for."""
        if self.repository:
            place = checkouts / self.folder
            return f"git clone -q https://github.com/{self.repository} {place} && git -C {place} checkout -q {self.pin}"
        install = f"python -m pip install --target {checkouts / 'packages'}"
        commands = [" ".join([install, "--no-deps", f"{self.package}=={self.pin}", *self.beside])]
        if self.whole:
            commands.append(" ".join([install, *self.whole]))
        return " && ".join(commands)

    def load(self, checkouts: Path) -> ModuleType:
        """Import it.

        Raises:
            MissingError: If it is not there, or what it needs is not.
        """
        if not (self.package or self.repository):
            return importlib.import_module(self.module)
        folder = checkouts / (self.folder if self.repository else "packages")
        if self.repository and not folder.is_dir():
            raise MissingError(f"there is no {folder}\n    {self.how_to_get(checkouts)}")
        # Several call their module "sam": they are imported one at a time, and none stays under that name.
        alone = bool(self.repository) or self.module == "sam"
        try:
            return _import_alone(self.module, folder) if alone else _import(self.module, folder)
        except ImportError as error:
            way = "needs more than is installed" if self.repository else self.how_to_get(checkouts)
            raise MissingError(f"{error}\n    {way}") from error

    def version(self, checkouts: Path) -> str:
        """Return the version or commit that is really there."""
        if self.repository:
            asked = [
                "git",
                "-C",
                str(checkouts / self.folder),
                "describe",
                "--always",
                "--dirty",
                "--exclude=*",
                "--abbrev=7",
            ]
            found = subprocess.run(asked, capture_output=True, text=True, check=False)
            return found.stdout.strip() or "not a git checkout"
        if not self.package:
            return "this commit"
        looked_in = [str(checkouts / "packages"), *sys.path]
        return next(iter(importlib.metadata.Distribution.discover(name=self.package, path=looked_in))).version


@dataclass(frozen=True, eq=False)
class Row:
    """An implementation to audit.

    Attributes:
        name: What the matrix calls it.
        source: Where it is found.
        make: Makes a stepper from the imported module and an order.
        licence: Of its code.
        by_design: For some checks, the documented choice behind an outcome that would count as a fault.
        eta: ASAM's addition to ``|w|`` where it offers ASAM, else None.
        note: What else a reader should know.
    """

    name: str
    source: Source
    make: Callable[[ModuleType, Order], Stepper]
    licence: str = ""
    by_design: Mapping[str, str] = field(default_factory=dict)
    eta: float | None = None
    note: str = ""


def _import(name: str, folder: Path) -> ModuleType:
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


def _import_alone(name: str, folder: Path) -> ModuleType:
    held = _taken_out(name)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        _taken_out(name)
        sys.modules.update(held)


def _taken_out(name: str) -> dict[str, ModuleType]:
    top = name.partition(".")[0]
    return {key: sys.modules.pop(key) for key in [*sys.modules] if key == top or key.startswith(f"{top}.")}

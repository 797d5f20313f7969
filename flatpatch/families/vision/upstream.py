"""What an image method's row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flatpatch.errors import did_you_mean
from flatpatch.families.base import Deviation, Upstream

if TYPE_CHECKING:
    from flatpatch.settings import Settings


NEVER_USED = "never uses it"
KEEPS_NO_EXEMPLARS = "keeps no exemplars, and never uses it"


@dataclass(frozen=True, kw_only=True)
class VisionUpstream(Upstream):
    """A method whose settings stand in one JSON file per variant and benchmark.

    Attributes:
        configs: By variant and benchmark: the file.
        config_flag: What stands before the configuration's name on upstream's command line.
        losses: What the losses are called that a batch takes a step for, in their order.
        several_gpus: Names of models whose code stops on a single device.
        saves_models: Whether its own code saves a model after every task.
        quick: Its own keys in profile ``quick``.
        kept: Pattern of the names of the weights that training changes and a task's loss depends on, with ``{task}``
            for the task's number from 0.
        kept_by_task: Whether a task's loss depends on what was kept of all tasks up to it, or on its own alone.
        shuffles: Whether its own configurations shuffle the classes.
        unlisted_splits: By benchmark: whose split into training and test images it takes, of which there is no list.
        logged_splits: Benchmarks of which it is known which split the shipped logs had.
    """

    family: ClassVar[str] = "vision"

    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config_flag: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("task",)
    several_gpus: tuple[str, ...] = ()
    saves_models: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict)
    kept: str = ""
    kept_by_task: bool = False
    shuffles: bool = False
    unlisted_splits: Mapping[str, str] = field(default_factory=dict)
    logged_splits: tuple[str, ...] = ()

    def config(self, variant: str, benchmark: str) -> str | None:
        """Return the shipped configuration of a variant and benchmark; empty means the first. None if none ships."""
        files = self.configs.get(variant or next(iter(self.configs)), {})
        return files.get(benchmark or next(iter(files), ""))

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = super().check(settings)
        if settings.sam_on != "both" and len(self.losses) == 1:
            problems.append(
                f"sam_on={settings.sam_on} is for methods that take two steps a batch; {self.title} takes one. "
                "Leave it out."
            )
        if (settings.benchmark or settings.variant) and not self.configs:
            problems.append(
                f"{self.title} has no repository and so no benchmark= or variant= to choose. Leave them out."
            )
        elif settings.variant and settings.variant not in self.configs:
            problems.append(
                f"unknown variant '{settings.variant}' of {self.title}.{did_you_mean(settings.variant, self.configs)} "
                f"Expected: {', '.join(self.configs)}."
            )
        elif self.configs and self.config(settings.variant, settings.benchmark) is None:
            variant = settings.variant or next(iter(self.configs))
            files = self.configs[variant]
            shipped = ", ".join(f"{name} ({file})" for name, file in files.items())
            problems.append(
                f"{self.title} ships no configuration of benchmark '{settings.benchmark}' for variant {variant}."
                f"{did_you_mean(settings.benchmark, files)} It ships: {shipped}."
            )
        return problems

    def why_unread(self, config: Mapping[str, Any], key: str, *, quick: bool) -> str:
        """Say why an override of a key would not reach the run.

        What each key does was seen by changing it in upstream's unpatched code on a small model
        (``tests/upstream/test_reach.py`` does it again), and read in the code for the models that this leaves out.

        Args:
            config: The configuration with all overrides in it.
            key: The key overridden.
            quick: Whether the profile is quick.

        Returns:
            What upstream's code does instead, to follow "the code"; empty if the value reaches the run.
        """
        return ""

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what in a configuration this method's code could not use, one message each.

        Args:
            config: The configuration that is to run.
            classes: How many classes the benchmark has.
            tasks: How many tasks they make.
        """
        return []

    def follow(self, config: Mapping[str, Any], overridden: Mapping[str, str], classes: int) -> dict[str, Any]:
        """Return the keys that follow from overridden ones, and their values.

        Args:
            config: The configuration with all overrides in it.
            overridden: The keys that were overridden.
            classes: How many classes the benchmark has.
        """
        return {}

    def note_variant(self, settings: Settings) -> tuple[list[str], list[Deviation]]:
        """Return notes and deviations of the variant chosen."""
        return [], []

    def note_images(self, inputs: Mapping[str, str], root: Path, checkout: Path) -> tuple[list[str], list[Deviation]]:
        """Return notes and deviations of the images that are here.

        Args:
            inputs: Hashes, as in the record.
            root: The data folder.
            checkout: Upstream's.
        """
        return [], []

    def grow(self, network: Any, index: int, classes: int) -> None:
        """Bring upstream's new network to the shape that it has after a task.

        Args:
            network: As upstream's factory makes it.
            index: The task, from 0.
            classes: How many classes were learned by then.
        """
        raise NotImplementedError(f"{self.title}: how its network grows is not said")

    def leave_one_classifier(self, network: Any, index: int) -> None:
        """Take out of a network the classifiers of tasks other than one, where the factors of all tasks vary."""

    @staticmethod
    def only(modules: Any, index: int | None) -> Any:
        """Return a module list with one module in its place and nothing in the others."""
        from torch import nn

        return nn.ModuleList(module if place == index else nn.Identity() for place, module in enumerate(modules))

"""What an image method's row says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from flatpatch.errors import FlatpatchError, did_you_mean
from flatpatch.families.base import Deviation, Upstream
from flatpatch.families.vision.data import Dataset
from flatpatch.kinds import noises
from flatpatch.settings import Settings, by_pairs

NEVER_USED = "never uses it"
KEEPS_NO_EXEMPLARS = "keeps no exemplars, and never uses it"


@dataclass(frozen=True, kw_only=True)
class VisionUpstream(Upstream):
    """A method whose settings stand in one JSON file per variant and benchmark.

    What a method with a repository leaves unsaid here stops its runs with a message: nothing is taken for granted.

    Attributes:
        configs: By variant and benchmark: the file.
        command: What Python is given, with ``{devices}`` and ``{config}`` where they go.
        datasets: By the repository's name of a data set, in lower case: what must be there.
        epochs: Keys that count in epochs, numbers or lists of them: ``budget=`` multiplies these, so that a schedule
            of milestones is stretched as a cosine is.
        losses: What the losses are called that a batch takes a step for, in their order.
        counts: Keys of its own whose values are whole numbers of at least 1, beside those that all such code has.
        not_negative: Keys of its own whose values are numbers of at least 0.
        words: By key: the values that its code knows.
        choices: Keys that the reference engine takes for it alone, with what they are by default.
        training_keys: Keys of its own in which runs may differ between whose models lies a line.
        several_gpus: Names of models whose code stops on a single device.
        saves_models: Whether its own code saves a model after every task.
        quick: Its own keys in profile ``quick``.
        record: Its keys in profile ``record``, on CIFAR-100, where the reference engine runs it in that.
        record_weights: timm's name of the pretrained weights there.
        kept: Pattern of the names of the weights that training changes and a task's loss depends on, with ``{task}``
            for the task's number from 0.
        kept_by_task: Whether what was kept of each task up to one lies in other weights of the network, or that of the
            task alone is put into it.
        shuffles: Whether its own configurations shuffle the classes.
        unlisted_splits: By benchmark: whose split into training and test images it takes, of which there is no list.
        logged_splits: Benchmarks of which it is known which split the shipped logs had.
        unpaired: Whether some of its LoRA factors have no partner.
        scaled: Whether what its LoRA factors add is scaled by what is learned.
    """

    family: ClassVar[str] = "vision"

    configs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    datasets: Mapping[str, Dataset] = field(default_factory=dict)
    epochs: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("task",)
    counts: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    training_keys: tuple[str, ...] = ()
    several_gpus: tuple[str, ...] = ()
    saves_models: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    record_weights: str = ""
    kept: str = ""
    kept_by_task: bool = False
    shuffles: bool = False
    unlisted_splits: Mapping[str, str] = field(default_factory=dict)
    logged_splits: tuple[str, ...] = ()
    unpaired: bool = False
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.repository is not None:
            unsaid = [name for name in ("configs", "command", "datasets", "epochs", "kept") if not getattr(self, name)]
            if unsaid:
                raise NotImplementedError(f"{self.title}: its row does not say {', '.join(unsaid)}")

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
        if self.unpaired and (word := by_pairs(settings)):
            problems.append(
                f"{word} goes by LoRA's factors as pairs, and some of {self.title}'s have no partner. Leave it out."
            )
        if self.scaled and noises(settings.sam):
            problems.append(
                f"sam={settings.sam} needs the weight that a pair adds to, and {self.title}'s pairs are scaled by what "
                "is learned. Use another kind of SAM."
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
        if self.repository is not None:
            raise NotImplementedError(f"{self.title}: which keys do not reach a run is not said")
        return ""

    def value_problems(self, config: Mapping[str, Any], width: int, blocks: int) -> list[str]:
        """Return which values of its own keys this method's code could not use, one message each.

        Args:
            config: The configuration that is to run.
            width: Of the model.
            blocks: Of the model.
        """
        return []

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what this method's code could not use where each value by itself is sound, one message each.

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

    def note_budget(self, config: Mapping[str, Any]) -> list[str]:
        """Return what does not follow where every task is trained longer.

        Args:
            config: The configuration that is to run.
        """
        return []

    def note_images(self, inputs: Mapping[str, str], root: Path, checkout: Path) -> tuple[list[str], list[Deviation]]:
        """Return notes and deviations of the images that are here.

        Args:
            inputs: Hashes, as in the record.
            root: The data folder.
            checkout: Upstream's.
        """
        return [], []

    def method_of_log(self, settings: Mapping[str, str]) -> str | None:
        """Return the method, or its variant, that a log is of; None if it is not of this repository's trainer.

        Args:
            settings: As the log prints them.
        """
        model = settings.get("model_name", "").lower()
        return model if model.startswith(self.name) else None  # a variant's name begins with its method's

    def pretrained(self, config: Mapping[str, Any]) -> str:
        """Return timm's name of the model whose weights upstream's code loads.

        Args:
            config: The configuration that is to run.
        """
        raise NotImplementedError(f"{self.title}: which pretrained weights it loads is not said")

    def named_versions(self, checkout: Path) -> dict[str, str]:
        """Return the versions of Python and libraries that upstream names, here in a list of its README.

        Args:
            checkout: Upstream's.

        Raises:
            FlatpatchError: If there are none.
        """
        readme = checkout / "README.md"
        text = readme.read_text(encoding="utf-8")
        named = re.findall(r"^\s*-\s*`?([A-Za-z0-9_-]+)\s*={1,2}\s*([\d.]+)`?\s*$", text, flags=re.MULTILINE)
        if not named:
            raise FlatpatchError(
                f"{readme} names no versions of libraries; {self.title}'s row must say where they are."
            )
        return dict(named)

    def grow(self, network: Any, index: int, classes: int) -> None:
        """Bring upstream's new network to the shape that it has after a task.

        Args:
            network: As upstream's factory makes it.
            index: The task, from 0.
            classes: How many classes were learned by then.
        """
        raise NotImplementedError(f"{self.title}: how its network grows is not said")

    def complete(
        self,
        network: Any,
        index: int,
        classes: int,
        kept: Callable[[int], Mapping[str, Any]],
        *,
        joined: bool,
    ) -> None:
        """Put into a network what is not a weight of it by name, and leave out what other tasks' losses need alone.

        Args:
            network: Grown, with what was kept in it.
            index: The task, from 0.
            classes: How many classes the task has.
            kept: From a task's number to what was kept of it.
            joined: Whether the factors of all tasks are to vary, and other tasks' classifiers to be left out.
        """
        raise NotImplementedError(f"{self.title}: what its network holds beside its weights is not said")

    @staticmethod
    def only(modules: Any, index: int | None) -> Any:
        """Return a module list with one module in its place and nothing in the others."""
        from torch import nn

        return nn.ModuleList(module if place == index else nn.Identity() for place, module in enumerate(modules))

"""What a vision run of the reference engine is asked to do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, did_you_mean
from flatpatch.families.vision.configuration import REFERENCE_DEFAULTS
from flatpatch.families.vision.dual_choices import DualChoices, choices_of

VIT_BASE: Mapping[str, int] = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
TRAINED: Mapping[str, tuple[str, ...]] = {"duallora": ("A", "B"), "inflora": ("B",), "seqlora": ("A", "B")}
"""The factors that each method trains, beside the present task's classifier."""
TUNINGS = ("lora", "head", "full")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class VisionReference:
    """Arguments of one run; defaults are those of InfLoRA's configuration for ten-task CIFAR-100."""

    method: str
    """inflora; duallora, which is a reconstruction; or seqlora: one adapter, A and B, trained on all tasks in turn with
    nothing protected."""
    dataset: Callable[[dict[str, Any]], Any]
    """A class with the interface of InfLoRA's datasets: made from ``{"data_path": ...}``; ``download_data()``
    then sets ``train_data``, ``train_targets``, ``test_data`` and ``test_targets``; ``train_trsf``,
    ``test_trsf``, ``common_trsf``, ``use_path`` and ``class_order`` say how to read them."""
    output_dir: Path
    """Where ``tasks/<n>.safetensors`` and results.json go."""
    model: Mapping[str, Any] = field(default_factory=lambda: VIT_BASE)
    """Sizes of timm's VisionTransformer."""
    weights: Path | None = None
    """Its pretrained weights, safetensors under timm's names; None: random ones, for tests."""
    data_path: Path = Path("data")
    shuffle: bool = False
    """True: order the classes at random, by the seed; False: as the dataset says."""
    seed: int = 0
    init_cls: int = 10
    """Classes of the first task."""
    increment: int = 10
    """Classes of each later task; the last one takes what is left."""
    rank: int = 10
    tuning: str = "lora"
    """What is trained beside the task's classifier: "lora", the method's factors; "head", nothing; "full", the whole
    network, without factors. The last two are for seqlora."""
    tasks: int | None = None
    """Learn only so many of the tasks, the first; they are learned as in a run of all."""
    fraction: float = 1.0
    """Share of each task's training images, drawn by the seed."""
    lamb: float = 0.95
    """InfLoRA: share of the inputs' energy that is protected after the first task."""
    lame: float = 1.0
    """InfLoRA: the share would reach this one task after the last; it grows linearly in between."""
    dual: DualChoices = field(default_factory=DualChoices)
    """DualLoRA: which reading of it; ``lamb`` and ``lame`` are its too."""
    epochs: int = 20
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    batch_size: int = 128
    optimizer: str = "adam"
    """adam, or sgd with momentum 0.9."""
    schedule: str = "cosine"
    """Of the learning rate: cosine, or constant."""
    num_workers: int = 0
    device: str = "cpu"

    @property
    def trained(self) -> tuple[str, ...]:
        """What is trained beside the task's classifier, as `LoRAViT.train_only` names it."""
        return {"head": (), "full": ("body",)}.get(self.tuning, TRAINED[self.method])

    def check(self) -> None:
        """Refuse what cannot be run, before anything is read or written.

        Raises:
            UserError: With every problem found.
        """
        problems = []
        for name, value, known in (
            ("method", self.method, tuple(TRAINED)),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("tuning", self.tuning, TUNINGS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                hint = did_you_mean(value, known)
                problems.append(f"unknown {name} '{value}'.{hint} Known for images: {', '.join(known)}.")
        for name in ("init_cls", "increment", "rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.tuning != "lora" and self.method != "seqlora":
            problems.append(f"tuning={self.tuning}: {self.method} is a method of LoRA factors. Use method seqlora.")
        if self.tasks is not None and self.tasks < 1:
            problems.append(f"tasks={self.tasks}: expected at least 1.")
        if not 0 < self.fraction <= 1:
            problems.append(f"fraction={self.fraction}: expected a share over 0 and at most 1.")
        problems += self.dual.problems()
        width = self.model["embed_dim"]
        if self.rank > width:
            problems.append(f"rank={self.rank} is more than the model's width; expected at most {width}.")
        if not (0 < self.lamb <= 1 and 0 < self.lame <= 1):
            problems.append(f"lamb={self.lamb}, lame={self.lame}: expected shares over 0 and at most 1.")
        if self.weights is not None and not self.weights.is_file():
            problems.append(f"no weights at {self.weights}. Give a safetensors file with timm's names.")
        if problems:
            raise UserError.collect(problems)


# Settings of ours that stand in the configuration under their own names, where they are not left out.
OWN = ("tuning", "tasks", "fraction", "schedule")
# By the method's name in settings: the engine's own.
_METHODS = {"inflora": "inflora", "seqlora_vit": "seqlora"}
# Where the engine's word for a setting is not InfLoRA's.
_NAMES = {"lrate": "learning_rate", "optim": "optimizer"}


def read_reference(config: Mapping[str, Any], description: Mapping[str, Any]) -> VisionReference:
    """Turn a configuration in InfLoRA's spelling into the reference engine's own."""
    module, name = description["dataset"]["class"].split(":")
    images = getattr(importlib.import_module(module), name)
    seed = description["dataset"]["seed"]
    return VisionReference(
        method=_METHODS.get(config["method"], config["method"]),
        dataset=lambda settings: images(settings, seed=seed),
        output_dir=Path("logs"),
        model=description["model"] or VIT_BASE,
        weights=Path(description["weights"]),
        seed=config["seed"][0],
        dual=choices_of(config),
        **{key: config[key] for key in OWN if key in config},
        device="cpu" if description["device"] == "cpu" else "cuda",
        **{_NAMES.get(key, key): config[key] for key in REFERENCE_DEFAULTS},
    )

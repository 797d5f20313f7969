"""InfLoRA: each task's LoRA in a subspace that leaves the tasks before it alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatpatch.families.base import AS_SHIPPED, PAPER_PROFILE, Argument, Conflict, Deviation, GpuMemory
from flatpatch.families.vision import splits
from flatpatch.families.vision.data import CIFAR100, IMAGES, SHOWN, SPLITS, Dataset, fetch_it
from flatpatch.families.vision.upstream import KEEPS_NO_EXEMPLARS, NEVER_USED, VisionUpstream
from flatpatch.kinds import balances

if TYPE_CHECKING:
    from flatpatch.settings import Settings

_PAPER = "InfLoRA's paper (arXiv:2404.00228), by secondary sources"
_DOMAINNET = ("configs/domainnet_inflora.json", "configs/domainnet_inflorab5.json")

# Models with a learning rate for the head and none for task 1; the epoch after which `lrate_decay` multiplies both.
_MILESTONES: Mapping[str, int] = {"InfLoRA_CA1": 18, "InfLoRA_domain": 4, "InfLoRAb5_domain": 4}

# Keys that do not reach a run, whatever else the configuration says, and what the code does instead.
_UNREAD: Mapping[str, str] = {
    **dict.fromkeys(("prefix", "EPSILON", "init_lr_decay"), NEVER_USED),
    **dict.fromkeys(("memory_size", "memory_per_class", "fixed_memory"), KEEPS_NO_EXEMPLARS),
    **dict.fromkeys(
        ("embd_dim", "num_heads"), "has the sizes of its ViT written in it, and stops or goes on unchanged"
    ),
    "class_order": "sets it itself. Use upstream.shuffle",
}


OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class InfLoRA(VisionUpstream):
    """InfLoRA's row, and what its code does otherwise than other repositories'."""

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = super().check(settings)
        if settings.sam != "off" and settings.scope == "A":
            problems.append("scope=A has nothing to perturb: InfLoRA trains no A. Use scope=B or scope=lora.")
        if balances(settings.sam):
            problems.append(
                f"sam={settings.sam} weighs LoRA's A against its B, and InfLoRA trains B alone. Use another kind of "
                "SAM."
            )
        return problems

    def why_unread(self, config: Mapping[str, Any], key: str, *, quick: bool) -> str:
        """Say why an override of a key would not reach the run; see the base class."""
        model = config.get("model_name", "")
        if not model.startswith("InfLoRA"):  # the reference engine has no key too many
            return ""
        if key == "num_workers" and quick:
            return "gets its images from memory in profile quick, without processes that load them"
        if key in _UNREAD:
            return _UNREAD[key]
        if model in _MILESTONES:
            if key == "init_epoch":
                return "trains the first task as the others. Use upstream.epochs"
            if key in ("fc_lrate", "lrate_decay") and config.get("optim") == "adam":
                return "reads it with optim=sgd alone. Add upstream.optim=sgd"
            epochs, milestone = config.get("epochs"), _MILESTONES[model]
            if key == "lrate_decay" and isinstance(epochs, int) and epochs <= milestone:
                return f"uses it after epoch {milestone} alone. Use more with upstream.epochs"
        elif key == "lrate_decay":
            return "takes a cosine schedule, and never uses it"
        elif model == "InfLoRAb5" and key == "init_weight_decay" and config.get("optim") == "sgd":
            return "reads it with optim=adam alone. Add upstream.optim=adam"
        return ""

    def value_problems(self, config: Mapping[str, Any], width: int, blocks: int) -> list[str]:
        """Return which values this method's code could not use; see the base class."""
        return share_problems(config, width)

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what this method's code could not use; see the base class."""
        problems = []
        first, step = config["init_cls"], config["increment"]
        if "total_sessions" in config and first != step:
            problems.append(
                f"upstream.init_cls={first} and upstream.increment={step} differ, and InfLoRA's classifiers all have "
                "init_cls classes. Set both to one number."
            )
        elif config.get("total_sessions", tasks) != tasks:
            problems.append(
                f"upstream.total_sessions={config['total_sessions']}, but {classes} classes make {tasks} tasks "
                f"of {step}. Add upstream.total_sessions={tasks}."
            )
        return [*problems, *schedule_problems(config)]

    def follow(self, config: Mapping[str, Any], overridden: Mapping[str, str], classes: int) -> dict[str, Any]:
        """Return the keys that follow from overridden ones; see the base class."""
        step = config["increment"]
        if "increment" not in overridden or "total_sessions" in overridden or "total_sessions" not in config:
            return {}
        return {"total_sessions": classes // step} if isinstance(step, int) and step > 0 and not classes % step else {}

    def note_variant(self, settings: Settings) -> tuple[list[str], list[Deviation]]:
        """Return what is to be said of the variant chosen; see the base class."""
        if settings.variant != "infloraca" or (settings.sam == "off" and settings.measuring is None):
            return [], []
        stage = "InfLoRA's second stage trains the classifier with its own SGD"
        note = f"{stage}: no SAM there, and measure_when=after measures the model before it"
        off = settings.sam == "off"
        return [note], [] if off else [Deviation("SAM", None, "in the first stage of a task alone", stage)]

    def note_budget(self, config: Mapping[str, Any]) -> list[str]:
        """Say that a milestone stays where the code has it; see the base class."""
        milestone = _MILESTONES.get(config.get("model_name", ""))
        if milestone is None or config.get("optim") == "adam":
            return []
        return [
            f"the learning rate falls after epoch {milestone} however many there are: the code has it written in it"
        ]

    def note_images(self, inputs: Mapping[str, str], root: Path, checkout: Path) -> tuple[list[str], list[Deviation]]:
        """Say which split of ImageNet-R is here; see the base class."""
        split = splits.split_of(inputs)
        if split is None:  # another benchmark
            return [], []
        said = f"the split of {splits.FOLDER} is {split}"
        if split == splits.LOGGED:
            return [said], []
        why = f"train/ and test/ of data= hold other images: the logs' split is drawn by its code at seed {splits.SEED}"
        warning = (
            f"WARNING: {said}; compare will not set this run beside the shipped logs, only beside the paper, whose "
            "split is not known. To keep this split, do nothing. To get the logs' split, put the images of both halves "
            "back into one "
            f"folder a class and draw it, which changes the folder for all who use it: {_draw_again(root, checkout)}"
        )
        return [warning], [Deviation(f"split of {splits.FOLDER}", splits.LOGGED, split, why)]

    def pretrained(self, config: Mapping[str, Any]) -> str:
        """Return timm's name of the model whose weights are loaded: it is written in the code."""
        return "vit_base_patch16_224_in21k"

    def grow(self, network: Any, index: int, classes: int) -> None:
        """Give a new network the classifiers of the first tasks; see the base class."""
        network.numtask = index
        network.update_fc(classes)

    def complete(
        self,
        network: Any,
        index: int,
        classes: int,
        kept: Callable[[int], Mapping[str, Any]],
        *,
        joined: bool,
    ) -> None:
        """Leave out other tasks' classifiers; see the base class."""
        if not joined:
            return
        network.classifier_pool = self.only(network.classifier_pool, index)
        if hasattr(network, "classifier_pool_backup"):
            network.classifier_pool_backup = self.only(network.classifier_pool_backup, None)


def share_problems(config: Mapping[str, Any], width: int) -> list[str]:
    """Return what of a rank and of shares of a spectrum could not be used, one message each."""
    problems = []
    rank = config.get("rank", 1)
    if isinstance(rank, int) and rank > width:
        problems.append(f"upstream.rank={rank} is more than the model's width (expected at most {width}).")
    for key in ("lamb", "lame"):
        if not 0 < config.get(key, 1) <= 1:
            problems.append(f"upstream.{key}={json.dumps(config[key])}: expected a share over 0 and at most 1.")
    return problems


def schedule_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what the schedule of the learning rate could not use, one message each."""
    if config.get("optim") == "adam" and 1 in (config.get("epochs"), config.get("init_epoch")):
        return ["one epoch with optim=adam: InfLoRA's schedule divides by the epochs less one. Use 2 or more."]
    return []


def _split_first(dataset: Dataset, root: Path, checkout: Path, absent: Sequence[str]) -> str:
    """Say how to get the halves that ImageNet-R lacks. Drawing them moves files for good: only for whole folders."""
    place = root / dataset.folder
    if present := [split for split in SPLITS if split not in absent]:
        would = "remove test/ with all that is in it" if present == ["test"] else "stop"
        return (
            f", but {present[0]}: half a split, with which InfLoRA's code would {would}. Put the missing half back, "
            f"or begin anew with an empty {place}. {fetch_it(dataset, root)}"
        )
    paths = sorted(path.relative_to(place) for path in place.glob("*/**/*") if path.suffix.lower() in IMAGES)
    filled = {path.parts[0] for path in paths}
    empty = sorted({folder.name for folder in place.iterdir() if folder.is_dir()} - filled)
    deep = [str(path) for path in paths if len(path.parts) > 2]
    if (len(paths), len(filled)) != (dataset.total, dataset.classes) or empty or deep:
        more = f", none in {', '.join(empty[:SHOWN])}" if empty else ""
        more += f", folders in folders: {', '.join(deep[:SHOWN])}" if deep else ""
        return (
            f", and is not whole: {len(paths)} images in {len(filled)} folders (expected {dataset.total} in "
            f"{dataset.classes}){more}. {fetch_it(dataset, root)}"
        )
    return (
        ". InfLoRA's code would draw the split itself, moving your files, with the random numbers of the run's seed. "
        "Draw it once beforehand, as the runs of its shipped logs had it (the next run says whether it is that one): "
        f"{_draw(place, checkout)}"
    )


def _draw_again(root: Path, checkout: Path) -> str:
    """Return the commands that draw the split of the shipped logs where ImageNet-R is split otherwise."""
    place = (root / splits.FOLDER).resolve()
    return f"(cd {shlex.quote(str(place))} && cp -al train/. test/. . && rm -r train test) && {_draw(place, checkout)}"


def _draw(place: Path, checkout: Path) -> str:
    data_path = json.dumps(str(place.resolve()), ensure_ascii=False)
    code = (
        f"import torch; from utils.data import iIMAGENET_R; torch.manual_seed({splits.SEED}); "
        f'iIMAGENET_R({{"data_path": {data_path}}}).download_data()'
    )
    return f"(cd {shlex.quote(str(checkout))} && python -c {shlex.quote(code)})"


UPSTREAM = InfLoRA(
    name="inflora",
    gpu_memory=GpuMemory(12.5, "ViT-B/16, batch 128, SAM off"),
    title="InfLoRA",
    repository="InfLoRA",
    configs={
        **{
            variant: {
                "cifar100": f"configs/cifar100_{variant}.json",
                **{f"imagenet_r_{n}": f"configs/mimg{n}_{variant}.json" for n in (5, 10, 20)},
                "domainnet": f"configs/domainnet_{variant}.json",
            }
            for variant in ("inflora", "inflorab5")
        },
        "infloraca": {
            "cifar100": "configs/cifar100_infloraca.json",
            "imagenet_r_10": "configs/mimg10_infloraca.json",
        },
    },
    command=("main.py", "--device", "{devices}", "--config", "{config}"),
    datasets={
        "cifar100": CIFAR100,
        # The figures are those of the lists in utils/splits/ (a test counts them).
        "imagenet_r": Dataset(
            200,
            splits.FOLDER,
            "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
            (24000, 6000),
            30000,
            split_first=_split_first,
        ),
        "domainnet": Dataset(
            345,
            "domainnet",
            "http://ai.bu.edu/M3SDA/",
            lists=tuple(f"dataloaders/splits/domainnet_{split}.yaml" for split in SPLITS),
        ),
    },
    epochs=("init_epoch", "epochs"),
    counts=("rank", "total_sessions"),
    not_negative=("fc_lrate",),
    words={"optim": OPTIMIZERS, "net_type": ("sip",)},
    # The rank shows in the shapes, and models of any rank meet in the space of W + s B A.
    training_keys=("optim", "EPSILON", "lamb", "lame", "rank"),
    seed=0,
    # Their code takes the network out of its DataParallel wrapper whether there is one or not.
    several_gpus=("InfLoRA_CA1", "InfLoRA_domain", "InfLoRAb5_domain"),
    saves_models=True,
    quick={
        "total_sessions": 5,
        "embd_dim": 64,
        "num_heads": 4,
        "init_epoch": 10,
        "epochs": 10,
        # Ten times upstream's: a task takes 50 steps here, and close to 800 on upstream's CIFAR-100.
        "init_lr": 5e-3,
        "lrate": 5e-3,
        "num_workers": 0,
    },
    # The adapters and the classifier of the task; earlier ones stay as they are.
    kept=r"(.*\.lora_[AB]_[kv]\.{task}|classifier_pool\.{task})\b.*",
    kept_by_task=True,
    logged_splits=("imagenet_r",),
    metric_words={
        "averaged_accuracy_inflora": "as its code prints it",
        "average_over_steps": "averaged accuracy, as its paper defines it",
    },
    conflicts=(
        Conflict(
            "DomainNet: optimizer, learning rate, rank",
            "Adam, 5e-4, rank 20",
            "SGD, 5e-3 (head 1e-2), rank 30",
            PAPER_PROFILE
            + " (with Adam the code gives the head the same learning rate and takes its cosine schedule, not "
            "MultiStep)",
            f"{_PAPER}; {', '.join(_DOMAINNET)}",
            (
                Argument(_DOMAINNET, "optim", "adam"),
                Argument(_DOMAINNET, "lrate", 0.0005),
                Argument(_DOMAINNET, "rank", 20),
            ),
        ),
        Conflict(
            "InfLoRA-b5, ImageNet-R in 5 tasks: threshold",
            "0.99",
            "0.98",
            PAPER_PROFILE,
            f"{_PAPER}; configs/mimg5_inflorab5.json",
            (Argument(("configs/mimg5_inflorab5.json",), "lamb", 0.99),),
        ),
        Conflict(
            "InfLoRA with classifier alignment (`variant=infloraca`): optimizer",
            "Adam everywhere",
            "SGD",
            "as the repository, in `profile=paper` too",
            f"{_PAPER}; configs/cifar100_infloraca.json, configs/mimg10_infloraca.json",
        ),
        Conflict(
            "InfLoRA with classifier alignment (`variant=infloraca`): second stage, from task 2 on",
            "-",
            "the classifier is trained again after each task, in a loop with its own SGD",
            "as the repository: SAM does not perturb there, no step of it is recorded, and `measure_when=after` "
            "measures the model before it",
            "methods/inflora_ca.py, methods/inflora_ca1.py",
        ),
        Conflict(
            "trials",
            "5 trials",
            "seeds 0 to 4, class order not shuffled, in two configurations alone; elsewhere seed 0",
            "one seed a run, the first listed unless `seed=` says otherwise; `sweep seed=0..4` for five",
            f"{_PAPER}; the author in InfLoRA's issue 9; configs/*.json",
        ),
        Conflict(
            "accuracy after task t",
            "mean over the t tasks' accuracies",
            "printed total: share of all test images, so larger tasks weigh more (differs on ImageNet-R)",
            "both, each under its own name: `average_accuracy`, `sample_weighted_accuracy`",
            f"{_PAPER}; utils/toolkit.py",
        ),
        Conflict(
            "dimensionality reduction matrix B",
            "the leading left singular vectors",
            "the same vectors divided by the square root of 3",
            AS_SHIPPED,
            f"{_PAPER}; methods/inflora.py",
        ),
        Conflict(
            "threshold of the old tasks' subspace",
            "a constant per benchmark",
            "rises from `lamb` towards `lame` over the tasks; of the squared spectrum of the second moments",
            AS_SHIPPED,
            f"{_PAPER}; methods/inflora.py",
        ),
        Conflict(
            "network's mode while training; what the optimizer holds",
            "not said",
            "evaluation mode; all parameters, the frozen ones without a gradient",
            "as the repository; SAM's perturbation and its norm leave out weights without a gradient",
            "methods/inflora.py",
        ),
        Conflict(
            "k-means over features after each task",
            "not part of the method",
            "runs within each task's timed training, its result unused",
            "as the repository: times include it",
            "methods/inflora.py",
        ),
        Conflict(
            "learning-rate schedule",
            "not said",
            "with Adam lr * cos(99 pi e / (200 (K - 1))) after epoch e of K",
            AS_SHIPPED,
            "utils/schedulers.py",
        ),
        Conflict(
            "ImageNet-R: split into training and test images",
            "not said",
            "drawn by the code in the data folder itself, on first use, with the random numbers of that run's seed; "
            "its shipped logs fit the one that seed 40 draws (all their accuracies are whole numbers of its test "
            "images, and of no other seed's below 3000), not the one in utils/splits/, which the code does not read",
            "a folder split beforehand (the error gives the command that draws the logs' split, with the repository's "
            "own code); a run on any other split is warned, has it in its record, and is compared with the paper alone",
            "utils/data.py; utils/splits/; logs/ImageNet_R/",
        ),
        Conflict(
            "logs of several seeds",
            "-",
            "all seeds of a call land in 0.log; 1.log to 4.log stay empty",
            "one process a seed, so each seed has its own log",
            "trainer.py; logs/",
        ),
        Conflict(
            "versions",
            "-",
            "Python 3.8, torch 1.10.0, torchvision 0.11.1, timm 0.6.7",
            "requirements.lock; each difference is in the run's record",
            "README.md",
        ),
    ),
)

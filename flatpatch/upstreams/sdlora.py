"""SD-LoRA: magnitudes and directions of LoRA learned apart (github.com/WuYichen-97/SD-Lora-CL at the pin).

Its queries and values are ``W x + s B A x + sum_i p_i B_i A_i x / (|B_i| |A_i|)`` with Frobenius norms: ``A`` and ``B``
are the present task's, ``A_i`` and ``B_i`` an earlier task's, which stay as they are. The magnitudes ``s`` and ``p_i``
are one number each for the whole network; every task begins with all of them at 0.8. One classifier grows by the
classes of each task. So the network of the last task is all that is left of the training, but for the earlier tasks'
factors, which upstream saves to files and loads again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.families.base import AS_SHIPPED, Conflict
from flatpatch.families.vision import places
from flatpatch.families.vision.data import PILOT
from flatpatch.families.vision.upstream import KEEPS_NO_EXEMPLARS, NEVER_USED, VisionUpstream

NOT_RUN = ("exps/sdlora_dom.json",)  # of DomainNet, a data set that its code does not know
MAGNITUDE = "backbone.wrapped_param.0.param"
TOP_K = 5  # models/base.py
MOST_TASKS = 21  # one, and as many as backbone/lora.py has earlier magnitudes
# Of its requirements.txt: what its code imports.
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "einops", "safetensors", "tqdm")

_DECAY = "decays no weights, and never uses it"
# Keys that do not reach a run, and what the code does instead.
_UNREAD: Mapping[str, str] = {
    "optimizer": "takes SGD with momentum, whatever it says",
    "scheduler": "multiplies the learning rate at milestones, whatever it says. Use upstream.milestones and "
    "upstream.lrate_decay, for the first task upstream.init_milestones and upstream.init_lr_decay",
    **dict.fromkeys(("min_lr", "tuned_epoch"), NEVER_USED),
    **dict.fromkeys(("weight_decay", "init_weight_decay"), _DECAY),
    **dict.fromkeys(("memory_size", "memory_per_class", "fixed_memory"), KEEPS_NO_EXEMPLARS),
    **dict.fromkeys(("nb_classes", "nb_tasks"), "sets it itself. Use upstream.init_cls and upstream.increment"),
    "filepath": "only saves each task's factors there and reads them back, in the run's own folder",
}
_DECAYS: Mapping[str, tuple[str, str]] = {
    "init_lr_decay": ("init_milestones", "init_epoch"),
    "lrate_decay": ("milestones", "epochs"),
}


@dataclass(frozen=True, kw_only=True)
class SDLoRA(VisionUpstream):
    """SD-LoRA's row, and what its code does otherwise than other repositories'."""

    def why_unread(self, config: Mapping[str, Any], key: str, *, quick: bool) -> str:
        """Say why an override of a key would not reach the run; see the base class."""
        if key in _DECAYS:
            milestones, epochs = (config.get(name) for name in _DECAYS[key])
            if (
                isinstance(milestones, list)
                and isinstance(epochs, int)
                and not any(isinstance(epoch, int) and epoch < epochs for epoch in milestones)
            ):
                name, length = _DECAYS[key]
                return (
                    f"uses it after the epochs of {name} alone, and {length}={epochs} comes before them. Use an "
                    f"earlier one with upstream.{name}"
                )
        return _UNREAD.get(key, "")

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what in a configuration this method's code could not use; see the base class."""
        first, step = config["init_cls"], config["increment"]
        found = []
        for key in ("milestones", "init_milestones"):
            if not all(isinstance(epoch, int) and not isinstance(epoch, bool) for epoch in config.get(key, [])):
                found.append(f"upstream.{key}={config[key]}: expected numbers of epochs, e.g. [10,15].")
        if first < TOP_K:
            found.append(
                f"upstream.init_cls={first}, and SD-LoRA's code asks for the {TOP_K} likeliest classes after the first "
                f"task already. Choose upstream.init_cls= of at least {TOP_K}."
            )
        if first != step:
            found.append(
                f"upstream.init_cls={first} and upstream.increment={step} differ, and SD-LoRA's log has accuracies of "
                "groups of increment classes from the first on. Set both to one number."
            )
        if tasks > MOST_TASKS:
            found.append(
                f"{tasks} tasks, and SD-LoRA's code has magnitudes for {MOST_TASKS} at most. Choose a larger "
                "upstream.init_cls= and upstream.increment=."
            )
        return found

    def method_of_log(self, settings: Mapping[str, str]) -> str | None:
        """Return its name for its trainer's logs; the shipped ones call the model finetune, as it then was called."""
        own = settings.get("model_name") == "finetune" and "filepath" in settings
        return self.name if own else super().method_of_log(settings)

    def pretrained(self, config: Mapping[str, Any]) -> str:
        """Return timm's name, since 0.9, for what its own version fetches as vit_base_patch16_224; its logs name it."""
        return "vit_base_patch16_224.augreg2_in21k_ft_in1k"

    def named_versions(self, checkout: Path) -> dict[str, str]:
        """Return the versions in its list of requirements, of what its code imports; see the base class."""
        text = (checkout / "requirements.txt").read_text(encoding="utf-8")
        pins = dict(re.findall(r"^([A-Za-z0-9_-]+)==([\d.]+)$", text, flags=re.MULTILINE))
        return {name: pins[name] for name in LIBRARIES}

    def grow(self, network: Any, index: int, classes: int) -> None:
        """Give a new network the classifier of the first tasks' classes; see the base class."""
        network.update_fc(classes)

    def complete(
        self, network: Any, index: int, classes: int, kept: Callable[[int], Mapping[str, Any]], *, joined: bool
    ) -> None:
        """Give a network the earlier tasks' factors, as upstream loads its files; see the base class."""
        give_earlier_tasks(network, [kept(task) for task in range(index)], joined=joined)
        if joined:
            only_last_classes(network, classes)


def give_earlier_tasks(network: Any, kept: Sequence[Mapping[str, Any]], *, joined: bool) -> None:
    """Put earlier tasks' factors into a network in which those of the present task are, as upstream loads its files.

    Args:
        network: Upstream's, made for its first task.
        kept: For each earlier task the factors by their names in the network.
        joined: Whether the earlier factors are parameters of the network as well, and what the present task's loss
            does not depend on is left out: earlier classes, and magnitudes of later tasks.
    """
    from torch import nn

    layers = {name: module for name, module in network.named_modules() if hasattr(module, "saved_A")}

    def saved(factor: str) -> dict[str, list[Any]]:
        found = {}
        for task, tensors in enumerate(kept):
            modules = []
            for name in layers:
                for projection in "qv":
                    weight = tensors[f"{name}.linear_{factor}_{projection}.weight"]
                    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                    module.weight = nn.Parameter(weight)
                    modules.append(module)
            found[f"saved_{factor.upper()}_{task}"] = modules
        return found

    down, up = saved("a"), saved("b")
    for place, layer in enumerate(layers.values()):
        layer.task_id, layer.saved_A, layer.saved_B = len(kept), down, up
        if joined:
            layer.earlier = nn.ModuleList(
                nn.ModuleDict(
                    {
                        f"linear_{factor}_{projection}": both[f"saved_{factor.upper()}_{task}"][2 * place + which]
                        for factor, both in (("a", down), ("b", up))
                        for which, projection in enumerate("qv")
                    }
                )
                for task in range(len(kept))
            )
    if joined:
        for magnitude in network.backbone.wrapped_param_prev[len(kept) :]:
            magnitude.requires_grad_(False)


def only_last_classes(network: Any, classes: int) -> None:
    """Leave the last classes alone in a network's classifier."""
    from torch import nn

    for name in ("weight", "bias"):
        tensor = getattr(network.fc, name)
        setattr(network.fc, name, nn.Parameter(tensor.detach()[-classes:].clone(), requires_grad=tensor.requires_grad))


# --- called by the patches


def load_layers() -> None:
    """Let ``torch.load`` read linear layers saved whole, as it did unasked before torch 2.6."""
    if places.vision_run() is None:
        return
    import torch

    torch.serialization.add_safe_globals([torch.nn.Linear])


def on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that calls a bare ``.cuda()`` leave things where they are, where there is no GPU to use.

    Args:
        function: Of upstream's.

    Returns:
        A function that does the same.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        run = places.vision_run()
        if run is None:
            return function(*args, **kwargs)
        import torch

        if run["vision"]["device"] != "cpu" and torch.cuda.is_available():
            return function(*args, **kwargs)
        kinds: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
        kept = [kind.cuda for kind in kinds]
        try:
            for kind in kinds:
                kind.cuda = lambda it: it
            return function(*args, **kwargs)
        finally:
            for kind, cuda in zip(kinds, kept, strict=True):
                kind.cuda = cuda

    return called


_NOT_READ = "not read"

UPSTREAM = SDLoRA(
    name="sdlora",
    scaled=True,
    title="SD-LoRA",
    repository="SD-LoRA",
    configs={
        "sdlora": {
            "cifar100": "exps/sdlora_c100.json",
            "imagenet_r": "exps/sdlora_inr.json",
            "imagenet_a": "exps/sdlora_ina.json",
        }
    },
    command=("main.py", "--config", "{config}"),
    datasets=PILOT,
    epochs=("init_epoch", "epochs", "init_milestones", "milestones"),
    words={"backbone_type": ("vit_base_patch16_224",)},
    # filepath: where it keeps earlier tasks' factors.
    training_keys=("milestones", "tuned_epoch", "filepath"),
    seed=1993,  # of the first configuration; ImageNet-R's has 1995
    reference=False,
    quick={
        # Its code asks for the five likeliest classes after the first task already, and shuffles the classes anyway.
        "init_cls": 5,
        "increment": 5,
        "init_epoch": 6,
        "epochs": 6,
        # Larger than upstream's: a task takes 42 steps here, and 800 on upstream's CIFAR-100.
        "init_lr": 0.02,
        "lrate": 0.02,
    },
    # What a task's loss depends on beside the frozen ViT: its factors, all magnitudes, the classifier.
    kept=r"backbone\.wrapped_param(_prev)?\..*|.*\.linear_[ab]_[qv]\.weight|fc\..*",
    shuffles=True,
    unlisted_splits=dict.fromkeys(("imagenet_r", "imagenet_a"), "one that it does not name"),
    conflicts=(
        Conflict(
            "optimizer",
            _NOT_READ,
            "three of four configurations say Adam, one names none; the code takes SGD with momentum 0.9 "
            "whatever they say",
            "as the code; `upstream.optimizer=` is refused",
            "SD-LoRA's issue 4; models/sdlora.py; exps/sdlora_*.json",
        ),
        Conflict(
            "learning-rate schedule, weight decay",
            _NOT_READ,
            "configurations say cosine, constant or steplr and give weight decays; the code multiplies the "
            "learning rate "
            "at the milestones and decays no weights",
            "as the code; overrides of keys that it does not read are refused",
            "models/sdlora.py; exps/sdlora_*.json",
        ),
        Conflict(
            "learning rates, epochs: configurations and shipped logs",
            "other values than the logs', by issue 4; not read",
            "ImageNet-A: 0.01, later tasks 0.005 and falling after epochs 10 and 15; its log 0.01 throughout. "
            "ImageNet-R "
            "in 10 tasks: 0.01; its log 0.008. CIFAR-100: seed 1993; its log 1994",
            "as the configurations; `compare` says in which settings a log differs",
            "SD-LoRA's issue 4; exps/sdlora_*.json; logs/",
        ),
        Conflict(
            "names of the shipped logs",
            "-",
            "InR-T10.log holds 20 tasks of 10 classes, InR-T20.log 10 tasks of 20; all call the model finetune",
            "the baselines are named by the number of tasks",
            "logs/",
        ),
        Conflict(
            "forgetting and accuracy matrix as printed",
            "-",
            "groups of classes are sorted as text, 100-119 before 20-39, so with over 100 classes a column holds "
            "several "
            "tasks: the shipped log of ImageNet-A prints 12.09, in the order of the tasks it is 10.41",
            "from the accuracies in the order of the tasks",
            "trainer.py; logs/",
        ),
        Conflict(
            "magnitudes of earlier tasks",
            _NOT_READ,
            "one number a task for the whole network; each task starts all of them at 0.8 again, and none is saved",
            "as the repository; with `scope=lora` SAM leaves them alone, with `scope=all` it perturbs them",
            "backbone/lora.py; models/sdlora.py",
        ),
        Conflict(
            "normalisation of directions",
            _NOT_READ,
            "earlier tasks' products BA are divided by the product of their factors' norms; the present task's is not",
            AS_SHIPPED,
            "backbone/lora.py",
        ),
        Conflict(
            "orthogonality loss",
            _NOT_READ,
            "computed at every step after the first task, from the files of all earlier tasks, and not used",
            "as the repository: times include it; SAM's second pass leaves it out",
            "models/sdlora.py; backbone/lora.py",
        ),
        Conflict(
            "pretrained weights",
            _NOT_READ,
            "whatever timm means by vit_base_patch16_224; with its version, and in its logs, augreg2_in21k_ft_in1k",
            "those, by name; our timm means others by the short name",
            "models/sdlora.py; requirements.txt; logs/",
        ),
        Conflict(
            "DomainNet",
            _NOT_READ,
            "a configuration is shipped; the code knows no such data set and stops",
            "not offered",
            "exps/sdlora_dom.json; utils/data_manager.py",
        ),
        Conflict(
            "ImageNet-R, ImageNet-A: split into training and test images",
            _NOT_READ,
            "reads train/ and test/ of folders that its README does not say where to get",
            "the errors name the split of LAMDA-PILOT, on whose code this is built; the record has the hash of "
            "the lists "
            "found; `compare` says that the split could not be checked",
            "README.md; utils/data.py; SD-LoRA's issues 7 and 8",
        ),
        Conflict(
            "runs",
            _NOT_READ,
            "one seed a configuration, one log a benchmark",
            "one seed a run, the configuration's unless `seed=` says otherwise; `sweep` runs several",
            "exps/sdlora_*.json; logs/",
        ),
        Conflict(
            "factors of earlier tasks",
            "-",
            "saved to and read from a folder that the configuration names, so that runs at once would share it",
            "the folder is in the run's own",
            "backbone/lora.py; exps/sdlora_*.json",
        ),
        Conflict(
            "versions",
            "-",
            "torch 2.4.1, torchvision 0.19.1, timm 1.0.9, numpy 2.1.1",
            "requirements.lock; each difference is in the run's record. Newer versions of torch load its files "
            "of whole "
            "layers only when told so, which the hooks do",
            "requirements.txt",
        ),
    ),
)

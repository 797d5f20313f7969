"""CL-LoRA: shared and task-specific adapters, with a distillation step of their own in each batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from flatpatch.errors import FlatpatchError
from flatpatch.families.base import AS_SHIPPED, PAPER_PROFILE, Argument, Conflict, GpuMemory
from flatpatch.families.vision import places
from flatpatch.families.vision.data import PILOT
from flatpatch.families.vision.upstream import KEEPS_NO_EXEMPLARS, NEVER_USED, VisionUpstream

if TYPE_CHECKING:
    from flatpatch.settings import Settings

# The weight that its loop gives to the orthogonality penalty (models/cllora.py at the pin).
_ORTHOGONALITY = 0.0001
TOP_K = 5  # models/base.py
_PAPER = "CL-LoRA's paper (arXiv:2505.24816), read in full"

# Keys that do not reach a run, and what the code does instead.
_UNREAD: Mapping[str, str] = {
    **dict.fromkeys(("recalc_sim", "alpha", "beta", "use_old_data", "adapter_num"), NEVER_USED),
    **dict.fromkeys(("pretrained", "vpt_type", "prompt_token_num"), "never uses it for this model"),
    **dict.fromkeys(("memory_size", "memory_per_class", "fixed_memory"), KEEPS_NO_EXEMPLARS),
    **dict.fromkeys(("nb_classes", "nb_tasks"), "sets it itself. Use upstream.init_cls and upstream.increment"),
    **dict.fromkeys(
        ("init_milestones", "init_lr_decay"), "reads it with scheduler=steplr alone, which is refused here"
    ),
}
# Switches of which only one position runs: the code of the other fails.
_ONLY: Mapping[str, bool] = {
    "use_init_ptm": False,
    "moni_adam": False,
    "use_reweight": True,
    "msa_adapt": True,
    "use_distillation": True,
    "use_block_weight": True,
}


@dataclass(frozen=True, kw_only=True)
class CLLoRA(VisionUpstream):
    """CL-LoRA's row, and what its code does otherwise than other repositories'."""

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""
        problems = super().check(settings)
        if settings.sam != "off" and settings.scope == "B" and settings.sam_on != "task":
            problems.append(
                "scope=B has nothing to perturb in CL-LoRA's distillation step: B of the general blocks is frozen. "
                "Add sam_on=task, or use scope=A or scope=lora."
            )
        return problems

    def why_unread(self, config: Mapping[str, Any], key: str, *, quick: bool) -> str:
        """Say why an override of a key would not reach the run; see the base class."""
        if key.startswith("later_") and config.get("init_cls") == config.get("increment"):
            instead = key.replace("later_", "init_")
            return (
                f"never reads it where init_cls equals increment, as here. Use upstream.{instead}, which every task "
                "reads"
            )
        if key == "min_lr" and config.get("scheduler") == "constant":
            return "reads it with scheduler=cosine alone. Add upstream.scheduler=cosine"
        if key in _ONLY and config[key] is not _ONLY[key]:
            return f"fails with {key}={str(config[key]).lower()}"
        return _UNREAD.get(key, "")

    def value_problems(self, config: Mapping[str, Any], width: int, blocks: int) -> list[str]:
        """Return which values this method's code could not use; see the base class."""
        problems = []
        if "msa" in config and not (len(config["msa"]) == 3 and set(config["msa"]) in ({0, 1}, {1})):
            problems.append(
                f"upstream.msa={json.dumps(config['msa'])}: expected three of 0 and 1, one of them 1, e.g. [1,0,1]."
            )
        for key in ("general_pos", "specfic_pos"):
            own = config.get(key, [0])
            if not own or any(isinstance(place, bool) or place not in range(blocks) for place in own):
                problems.append(
                    f"upstream.{key}={json.dumps(own)}: expected numbers of blocks from 0 to {blocks - 1}, at least "
                    "one."
                )
        return problems

    def config_problems(self, config: Mapping[str, Any], classes: int, tasks: int) -> list[str]:
        """Return what this method's code could not use; see the base class."""
        first = config["init_cls"]
        if first >= TOP_K:
            return []
        return [
            f"upstream.init_cls={first}, and CL-LoRA's code asks for the {TOP_K} likeliest classes after the first "
            f"task already. Choose upstream.init_cls= of at least {TOP_K}."
        ]

    def pretrained(self, config: Mapping[str, Any]) -> str:
        """Return timm's name of the model whose weights are loaded; see the base class."""
        return str(config["backbone_type"]).removesuffix("_cllora")

    def grow(self, network: Any, index: int, classes: int) -> None:
        """Give a new network the classifier of the first tasks' classes; see the base class."""
        network._cur_task = index - 1
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
        if joined:
            network.fc = network.init_proto = None


# --- called by the patches


def backbones(timm: Any) -> Any:
    """Return timm, or where the run has its own weights or sizes what stands in for it.

    Args:
        timm: The library as upstream has imported it.

    Returns:
        Has timm's ``create_model``. Of a model of other sizes the attention is split, because upstream splits it at
        the width of its own model.
    """
    chosen = places.backbones(timm)
    if places.model_sizes() is None:
        return chosen

    def create_model(*args: Any, **arguments: Any) -> Any:
        model = chosen.create_model(*args, **arguments)
        return SimpleNamespace(state_dict=lambda: _with_split_attention(model.state_dict()))

    return SimpleNamespace(create_model=create_model)


def _with_split_attention(weights: dict[str, Any]) -> dict[str, Any]:
    split = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}_proj.")] = third
        else:
            split[name] = tensor
    return split


def block_weight(chosen: Any, inputs: Any) -> Any:
    """Return the weights of a block's adapters; where it has none, the ones that upstream puts there, on the device.

    Args:
        chosen: The weights, or None.
        inputs: What the block works on, ``(batch, tokens, width)``.

    Returns:
        A tensor of three weights; None where there is no run.
    """
    if chosen is not None or places.vision_run() is None:
        return chosen
    import torch

    return torch.ones(3, device=inputs.device)


_kept_versions: list[Any] = []


def keep_versions(optimizer: Any) -> None:
    """Note how often each weight has been written to, before a forward pass whose backward pass follows a step.

    Upstream makes a step between the forward and the backward pass of its task loss. That is possible with the torch
    that it names (2.0.1, on CUDA), whose optimizers write to all weights at once without counting; newer ones count,
    and the backward pass refuses. See ``forget_the_step``.
    """
    if places.vision_run() is None:
        return
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    weights = tuple(weight for group in optimizer.param_groups for weight in group["params"])
    _kept_versions[:] = [_unsafe_preserve_version_counter(weights)]
    _kept_versions[0].__enter__()


def forget_the_step() -> None:
    """Put the counts back to where ``keep_versions`` saw them; the weights stay as they are."""
    if places.vision_run() is None:
        return
    if not _kept_versions:
        raise FlatpatchError("forget_the_step was called without keep_versions; the patch needs a refresh.")
    _kept_versions.pop().__exit__(None, None, None)


def task_loss(learner: Any, inputs: Any, targets: Any, penalty: Callable[..., Any]) -> Any:
    """Compute CL-LoRA's task loss: cross-entropy, and after the first task the block weights' orthogonality penalty.

    Args:
        learner: Upstream's.
        inputs: Images, ``(batch, 3, height, width)``.
        targets: Classes counted from the task's first, ``(batch,)``.
        penalty: Of earlier tasks' block weights and the present ones.

    Returns:
        The mean over the batch, and the weighted penalty.
    """
    from torch.nn.functional import cross_entropy

    network = learner._network
    loss = cross_entropy(network(inputs, test=False)["logits"], targets)
    if learner._cur_task == 0:
        return loss
    return loss + _ORTHOGONALITY * penalty(network.backbone.block_weight_list, network.backbone.block_weight)


def distillation_loss(
    learner: Any, inputs: Any, divergence: Callable[..., Any], weight: float, temperature: float
) -> Any:
    """Compute CL-LoRA's distillation loss, of the shared adapters from what they were after the task before.

    Args:
        learner: Upstream's.
        inputs: Images, ``(batch, 3, height, width)``.
        divergence: Of the new logits from the teacher's, at a temperature ``T``.
        weight: Of the divergence.
        temperature: Of both softmaxes.

    Returns:
        The weighted mean over the batch.
    """
    student, teacher = learner._network.forward_kd(inputs, learner._cur_task)
    return weight * divergence(student["logits"], teacher["logits"], T=temperature)


UPSTREAM = CLLoRA(
    name="cllora",
    scaled=True,
    gpu_memory=GpuMemory(4.89, "ViT-B/16, batch 32, SAM off"),
    title="CL-LoRA",
    repository="CL-LoRA",
    configs={
        "cllora": {
            "cifar100": "exps/cifar.json",
            "imagenet_r": "exps/inr.json",
            "imagenet_a": "exps/ina.json",
            "vtab": "exps/vtab.json",
        }
    },
    command=("main.py", "{config}"),
    datasets=PILOT,
    counts=("ffn_num", "init_epochs", "later_epochs"),
    not_negative=("later_lr", "min_lr"),
    # What its code knows, but for the scheduler steplr: it needs milestones that no shipped configuration has.
    words={
        "optimizer": ("sgd", "adam", "adamw"),
        "scheduler": ("cosine", "constant"),
        "backbone_type": ("vit_base_patch16_224_in21k_cllora", "vit_base_patch16_224_cllora"),
    },
    # ffn_num, the rank: it shows in the shapes, and models of any rank meet in the space of W + s B A.
    training_keys=("optimizer", "scheduler", "init_epochs", "later_epochs", "later_lr", "min_lr", "ffn_num"),
    seed=1993,
    reference=False,
    epochs=("init_epochs", "later_epochs"),
    losses=("task", "distillation"),
    quick={
        # Its code asks for the five likeliest classes after the first task already. It shuffles the classes anyway, so
        # they come in four tasks of any five.
        "init_cls": 5,
        "increment": 5,
        "init_epochs": 6,
        "general_pos": [0, 1, 2],
        "specfic_pos": [3, 4, 5],
    },
    # All that the task's forward pass uses of what is trained.
    kept=r"(backbone\.cur_adapter|backbone\.block_weight|proxy_fc)\b.*",
    shuffles=True,
    unlisted_splits=dict.fromkeys(("imagenet_r", "imagenet_a", "vtab"), "LAMDA-PILOT's"),
    metric_words={"averaged_accuracy_inflora": "its average accuracy", "forgetting_cllora": "as its code prints it"},
    conflicts=(
        Conflict(
            "ImageNet-R: pretrained weights",
            "ImageNet-21k, 'across all experiments'",
            "timm's vit_base_patch16_224, fine-tuned on ImageNet-1k",
            PAPER_PROFILE,
            f"{_PAPER}; exps/inr.json",
            (Argument(("exps/inr.json",), "backbone_type", "vit_base_patch16_224_in21k_cllora"),),
        ),
        Conflict(
            "CIFAR-100: rank",
            "10",
            "8 (`ffn_num`)",
            PAPER_PROFILE,
            f"{_PAPER}; exps/cifar.json",
            (Argument(("exps/cifar.json",), "ffn_num", 10),),
        ),
        Conflict(
            "ImageNet-R, ImageNet-A, VTAB: split into training and test images",
            "-",
            "reads train/ and test/ of folders that LAMDA-PILOT's README links; no list of their files",
            "the record has the hash of the lists found, and says of ImageNet-R whether it is one that InfLoRA uses; "
            "`compare` says that it could not be checked. ImageNet-A's 5,981 training and 1,519 test images and VTAB's "
            "1,796 and 8,619 are those of arXiv:2303.07338, not checked here against the paper or the data: other "
            "counts are noted, not refused",
            "utils/data.py; LAMDA-PILOT's README",
        ),
        Conflict(
            "runs",
            "10 runs with grid search",
            "one seed (1993) with fixed values",
            "one seed a run, 1993 unless `seed=` says otherwise; one run is not comparable with the paper's spread",
            f"{_PAPER}; the author in CL-LoRA's issue 2; exps/*.json",
        ),
        Conflict(
            "the loss",
            "one joint loss (Eq. 13)",
            "two optimizer steps a batch: distillation, then cross-entropy with the orthogonality term",
            "as the repository; each step gets its own perturbation, `sam_on=task` or `distillation` picks one",
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "gradient of the task loss",
            "of one joint loss (Eq. 13)",
            "forward pass before the distillation step, backward pass after it, so it mixes the weights from before "
            "and after; newer versions of torch than its own (2.0.1, on CUDA) refuse that",
            "as the repository with torch 2.0.1, and so is SAM's second pass; only torch's count of writes is put back",
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "orthogonality of block weights",
            "sum of norms (Eq. 12)",
            "mean absolute cosine of the flattened block weights",
            AS_SHIPPED,
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "block weights",
            "one scalar a block",
            "three a block: query, key, value",
            AS_SHIPPED,
            f"{_PAPER}; backbone/vit_cllora.py",
        ),
        Conflict(
            "learning rate, epochs, batch, optimizer",
            "not in the main text",
            "SGD with momentum 0.9 and the values of exps/*.json",
            AS_SHIPPED,
            f"{_PAPER}; exps/*.json",
        ),
        Conflict(
            "names of LoRA's factors",
            "-",
            "`lora_A` is the up-projection that starts at zero, which other repositories call B",
            "`scope=A` and `scope=B` go by the repository's names",
            "backbone/vit_cllora.py",
        ),
        Conflict(
            "positions of the task-specific blocks",
            "-",
            "README: `specific_pos`; configurations and code: `specfic_pos`",
            "`upstream.specfic_pos=`; the other spelling is told so",
            "README.md; exps/*.json",
        ),
        Conflict(
            "versions",
            "-",
            "Python 3.9.4, torch 2.0.1, timm 0.6.12",
            "requirements.lock; each difference is in the run's record",
            "README.md",
        ),
    ),
)

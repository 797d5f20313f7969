"""Keys of upstream's configurations whose value changes nothing, or stops the run: overriding one is refused.

What each does was seen by changing it in upstream's unpatched code on a small model (``tests/upstream/test_reach.py``
does it again), and read in the code for the models that this leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNUSED = "never uses it"
_EXEMPLARS = "keeps no exemplars, and never uses it"
# Models with a learning rate for the head and none for task 1; the epoch after which `lrate_decay` multiplies both.
_MILESTONES: Mapping[str, int] = {"InfLoRA_CA1": 18, "InfLoRA_domain": 4, "InfLoRAb5_domain": 4}

# InfLoRA's models, whatever else the configuration says.
_INFLORA: Mapping[str, str] = {
    **dict.fromkeys(("prefix", "EPSILON", "init_lr_decay"), _UNUSED),
    **dict.fromkeys(("memory_size", "memory_per_class", "fixed_memory"), _EXEMPLARS),
    **dict.fromkeys(
        ("embd_dim", "num_heads"), "has the sizes of its ViT written in it, and stops or goes on unchanged"
    ),
    "class_order": "sets it itself. Use upstream.shuffle",
}
_CLLORA: Mapping[str, str] = {
    **dict.fromkeys(("recalc_sim", "alpha", "beta", "use_old_data", "adapter_num"), _UNUSED),
    **dict.fromkeys(("pretrained", "vpt_type", "prompt_token_num"), "never uses it for this model"),
    **dict.fromkeys(("memory_size", "memory_per_class", "fixed_memory"), _EXEMPLARS),
    **dict.fromkeys(("nb_classes", "nb_tasks"), "sets it itself. Use upstream.init_cls and upstream.increment"),
    **dict.fromkeys(
        ("init_milestones", "init_lr_decay"), "reads it with scheduler=steplr alone, which is refused here"
    ),
}
# CL-LoRA's switches of which only one position runs: the code of the other fails.
_ONLY: Mapping[str, bool] = {
    "use_init_ptm": False,
    "moni_adam": False,
    "use_reweight": True,
    "msa_adapt": True,
    "use_distillation": True,
    "use_block_weight": True,
}


def why_unread(config: Mapping[str, Any], key: str, *, quick: bool) -> str:
    """Say why an override of a key would not reach the run.

    Args:
        config: The configuration with all overrides in it.
        key: The key overridden.
        quick: Whether the profile is quick.

    Returns:
        What upstream's code does instead, to follow "the code"; empty if the value reaches the run.
    """
    model = config.get("model_name", "")
    if model == "cllora":
        return _of_cllora(config, key)
    if not model.startswith("InfLoRA"):  # the reference engine has no key too many
        return ""
    if key == "num_workers" and quick:
        return "gets its images from memory in profile quick, without processes that load them"
    if key in _INFLORA:
        return _INFLORA[key]
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


def _of_cllora(config: Mapping[str, Any], key: str) -> str:
    if key.startswith("later_") and config.get("init_cls") == config.get("increment"):
        instead = key.replace("later_", "init_")
        return (
            f"never reads it where init_cls equals increment, as here. Use upstream.{instead}, which every task reads"
        )
    if key == "min_lr" and config.get("scheduler") == "constant":
        return "reads it with scheduler=cosine alone. Add upstream.scheduler=cosine"
    if key in _ONLY and config[key] is not _ONLY[key]:
        return f"fails with {key}={str(config[key]).lower()}"
    return _CLLORA.get(key, "")

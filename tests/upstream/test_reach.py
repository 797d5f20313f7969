"""Every key of upstream's configurations reaches a run, or overriding it is refused.

Upstream's unpatched code runs a small model once for each key, changed alone: what the run computed must differ where
the override is taken, and must not where it is refused. Keys whose other values stop upstream's code are in
``FAILING``, and are seen to stop it. All of InfLoRA's six models run here, those that need several GPUs under
DataParallel on the CPU. Of InfLoRA_CA1 it is one task, since the second stops with an AttributeError; so what acts from
the second on (``lame``) is not seen there. Keys in ``ELSEWHERE`` are not tried here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch.errors import UserError
from flatpatch.families.vision.configuration import OURS, ConfigEditor, known_keys, override, task_classes
from flatpatch.families.vision.results import CONFIG
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.upstreams import UPSTREAMS
from tests.upstream.test_neutrality_vision import differences, run
from tests.vision_upstream import CONFIGS

pytestmark = pytest.mark.third_party
TWO_TASKS = {"init_cls": 5, "increment": 5, "total_sessions": 2, "init_epoch": 2, "epochs": 3}
HEAD = {"optim": "sgd", "fc_lrate": 0.02, "epochs": 6, "batch_size": 40}
ONE_TASK = {"init_cls": 10, "increment": 10, "total_sessions": 1}
# The repository, its shipped configuration whose keys are tried, what the small model has otherwise, and its blocks:
# the b5 variants adapt the first five.
BASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "InfLoRA": ("InfLoRA", "configs/cifar100_inflora.json", TWO_TASKS, 2),
    "InfLoRA with SGD": ("InfLoRA", "configs/cifar100_inflora.json", TWO_TASKS | {"optim": "sgd"}, 2),
    "InfLoRA on DomainNet": (
        "InfLoRA",
        "configs/domainnet_inflora.json",
        TWO_TASKS | HEAD | {"model_name": "InfLoRA_domain", "dataset": "domainnet"},
        2,
    ),
    "InfLoRAb5": ("InfLoRA", "configs/cifar100_inflorab5.json", TWO_TASKS | {"model_name": "InfLoRAb5"}, 6),
    "InfLoRAb5 with SGD": (
        "InfLoRA",
        "configs/cifar100_inflorab5.json",
        TWO_TASKS | {"model_name": "InfLoRAb5", "optim": "sgd"},
        6,
    ),
    "InfLoRAb5 on DomainNet": (
        "InfLoRA",
        "configs/domainnet_inflorab5.json",
        TWO_TASKS | HEAD | {"model_name": "InfLoRAb5_domain", "dataset": "domainnet"},
        6,
    ),
    "InfLoRA_CA": (
        "InfLoRA",
        "configs/mimg10_infloraca.json",
        TWO_TASKS | {"model_name": "InfLoRA_CA", "batch_size": 40},
        2,
    ),
    "InfLoRA_CA1": (
        "InfLoRA",
        "configs/cifar100_infloraca.json",
        ONE_TASK | HEAD | {"model_name": "InfLoRA_CA1", "epochs": 20},
        2,
    ),
    "CL-LoRA": ("CL-LoRA", "exps/cifar.json", {}, 2),
    "SD-LoRA": ("SD-LoRA", "exps/sdlora_ina.json", {}, 2),
    "SD-LoRA without milestones": (
        "SD-LoRA",
        "exps/sdlora_c100.json",
        {"milestones": [2], "init_milestones": [2]},
        2,
    ),
}
# Another value of each key that upstream's code takes in stride.
OTHERS: dict[str, dict[str, Any]] = {
    "InfLoRA": {"prefix": "x", "memory_size": 5, "memory_per_class": 1, "fixed_memory": False, "num_heads": 4}
    | {"EPSILON": 0.01, "shuffle": True, "init_epoch": 3, "epochs": 2, "init_lr": 0.02, "init_lr_decay": 0.5}
    | {"init_weight_decay": 0.1, "weight_decay": 0.1, "lrate": 0.02, "lrate_decay": 0.5, "batch_size": 8, "rank": 2}
    | {"lamb": 0.3, "lame": 0.5, "num_workers": 1, "class_order": [1]},
    "CL-LoRA": {"memory_size": 5, "memory_per_class": 1, "fixed_memory": True, "shuffle": False, "init_epochs": 3}
    | {"later_epochs": 4, "init_lr": 0.02, "later_lr": 0.02, "batch_size": 8, "weight_decay": 0.1, "min_lr": 0.01}
    | {"scheduler": "constant", "ffn_num": 2, "use_diagonal": True, "recalc_sim": False, "alpha": 0.5, "beta": 0.5}
    | {"adapter_num": 3, "use_old_data": True, "pretrained": False, "vpt_type": "x", "prompt_token_num": 3}
    | {"msa": [1, 1, 1], "general_pos": [1], "specfic_pos": [0], "nb_tasks": 3, "nb_classes": 7}
    | {"init_milestones": [1], "init_lr_decay": 0.5},
    "SD-LoRA": {"memory_size": 5, "memory_per_class": 1, "fixed_memory": True, "shuffle": False, "init_epoch": 3}
    | {"epochs": 3, "init_lr": 0.02, "lrate": 0.02, "batch_size": 8, "init_milestones": [0], "milestones": [0]}
    | {"init_lr_decay": 0.1, "lrate_decay": 0.1, "init_weight_decay": 0.1, "weight_decay": 0.1, "optimizer": "adamw"}
    | {"scheduler": "constant", "min_lr": 0.1, "tuned_epoch": 5, "filepath": "./other/", "nb_tasks": 3}
    | {"nb_classes": 7},
}
MORE: dict[str, dict[str, Any]] = {
    "InfLoRA": {"optim": "sgd"},
    **dict.fromkeys(("InfLoRA on DomainNet", "InfLoRAb5 on DomainNet", "InfLoRA_CA1"), {"fc_lrate": 0.2}),
}
UNSEEN: dict[str, set[str]] = {"InfLoRA_CA1": {"lame"}}
# Another value that upstream's code does not survive, and the error; keys seen elsewhere: the tasks, what only names or
# prints.
FAILING: dict[str, dict[str, tuple[Any, str]]] = {
    "InfLoRA": {"embd_dim": (8, "RuntimeError: mat1 and mat2"), "net_type": ("vit", "ValueError: Unknown net: vit")},
    "CL-LoRA": {
        "use_init_ptm": (True, "RuntimeError: The expanded size of the tensor (0)"),
        "use_reweight": (False, "RuntimeError: mat1 and mat2 shapes"),
        "moni_adam": (True, "RuntimeError: mat1 and mat2 shapes"),
        "msa_adapt": (False, "IndexError: index 0 is out of range"),
        "use_distillation": (False, "has no attribute 'old_adapter_list'"),
        "use_block_weight": (False, "has no attribute 'block_weight_list'"),
    },
}
ELSEWHERE = {
    "InfLoRA": {"init_cls", "increment", "total_sessions", "optim", "fc_lrate"},
    "CL-LoRA": {"init_cls", "increment", "optimizer", "backbone_type", "print_forget", "prefix"},
    "SD-LoRA": {"init_cls", "increment", "backbone_type", "prefix"},
}


def row_of(repo: str) -> VisionUpstream:
    [row] = [row for row in UPSTREAMS.values() if row.repository == repo]
    assert isinstance(row, VisionUpstream)
    return row


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BASES)
def test_overrides_change_what_upstream_computes_unless_they_are_refused(
    name: str, warm: Callable[..., Path], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    repo, file, base, depth = BASES[name]
    checkout = upstream(repo)
    known = known_keys(checkout, checkout / file)
    others = {
        key: value for key, value in (OTHERS[repo] | MORE.get(name, {})).items() if key not in UNSEEN.get(name, ())
    }
    changes = (base, *(base | {key: value} for key, value in others.items()))
    found = run(warm, tmp_path / "run", repo, [0], patched=False, changes=changes, depth=depth)
    first, *changed = found["seeds"]
    reaches = {key for key, one in zip(others, changed, strict=True) if differences(first, one)}
    config = CONFIGS[repo] | base
    why_unread = row_of(repo).why_unread
    taken = {key for key in others if not why_unread(config | {key: others[key]}, key, quick=False)}
    assert reaches == taken & known


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "key"), [(repo, key) for repo, keys in FAILING.items() for key in keys])
def test_values_said_to_stop_upstream_do(
    repo: str, key: str, warm: Callable[..., Path], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream(repo)
    value, error = FAILING[repo][key]
    with pytest.raises(AssertionError) as caught:  # that main.py ended well
        run(
            warm,
            tmp_path / "run",
            repo,
            [0],
            patched=False,
            changes=((TWO_TASKS if repo == "InfLoRA" else {}) | {key: value},),
        )
    assert error in str(caught.value)


@pytest.mark.parametrize("repo", ["InfLoRA", "CL-LoRA", "SD-LoRA"])
def test_every_key_that_upstream_knows_is_tried(repo: str, upstream: Callable[[str], Path]) -> None:
    checkout = upstream(repo)
    files = {file for variant in row_of(repo).configs.values() for file in variant.values()}
    known = set().union(*(known_keys(checkout, checkout / file) for file in files))
    assert known - set(OURS) == {*OTHERS[repo], *FAILING.get(repo, ()), *ELSEWHERE[repo]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("method=inflora", "upstream.EPSILON=1"), "InfLoRA's code never uses it. Leave it out."),
        (("method=inflora", "upstream.memory_size=20"), "InfLoRA's code keeps no exemplars, and never uses it. Leave"),
        (("method=inflora", "upstream.embd_dim=384"), "has the sizes of its ViT written in it"),
        (("method=inflora", "upstream.net_type=vit"), 'net_type="vit" is unknown here. Expected: sip.'),
        (("method=inflora", "upstream.lrate_decay=1"), "takes a cosine schedule, and never uses it"),
        (("method=inflora", "variant=inflorab5", "upstream.optim=sgd", "upstream.init_weight_decay=1"), "adam alone"),
        (("method=inflora", "benchmark=domainnet", "upstream.optim=adam", "upstream.fc_lrate=1"), "upstream.optim=sgd"),
        (("method=inflora", "benchmark=domainnet", "upstream.init_epoch=1"), "Use upstream.epochs"),
        (
            ("method=inflora", "benchmark=domainnet", "upstream.epochs=4", "upstream.lrate_decay=1"),
            "after epoch 4 alone",
        ),
        (("method=inflora", "profile=quick", "upstream.num_workers=1"), "images from memory in profile quick"),
        (("method=inflora", "benchmark=domainnet", "upstream.epochs=x", "upstream.lrate_decay=1"), "is not a number"),
        (("method=cllora", "upstream.alpha=1"), "CL-LoRA's code never uses it. Leave it out."),
        (
            ("method=cllora", "upstream.use_reweight=false"),
            "CL-LoRA's code fails with use_reweight=false. Leave it out.",
        ),
        (("method=cllora", "upstream.nb_tasks=3"), "sets it itself. Use upstream.init_cls and upstream.increment."),
        (("method=cllora", "upstream.scheduler=constant", "upstream.min_lr=1"), "Add upstream.scheduler=cosine."),
        (("method=cllora", "upstream.init_milestones=[1]"), "scheduler=steplr alone, which is refused here"),
        (("method=cllora", "upstream.backbone_type=vit"), "Expected: vit_base_patch16_224_in21k_cllora"),
        (("method=cllora", "upstream.use_reweight=True"), "upstream.use_reweight='True' is not true or false"),
        (("method=cllora", "upstream.use_init_ptm=False"), "upstream.use_init_ptm='False' is not true or false"),
        (("method=cllora", "upstream.use_block_weight=1"), "upstream.use_block_weight='1' is not true or false"),
        (("method=cllora", "upstream.alpha=much"), "upstream.alpha='much' is not a number"),
        (
            ("method=sdlora", "benchmark=imagenet_a", "upstream.optimizer=sgd"),
            "SD-LoRA's code takes SGD with momentum, whatever it says. Leave it out.",
        ),
        (("method=sdlora", "upstream.scheduler=constant"), "whatever it says. Use upstream.milestones"),
        (("method=sdlora", "upstream.lrate_decay=0.1"), "uses it after the epochs of milestones alone, and epochs=20"),
        (("method=sdlora", "upstream.weight_decay=0.1"), "SD-LoRA's code decays no weights, and never uses it."),
        (("method=sdlora", "upstream.filepath=./x/"), "reads them back, in the run's own folder. Leave it out."),
        (("method=sdlora", "upstream.backbone_type=vit"), "Expected: vit_base_patch16_224."),
        (("method=sdlora", "upstream.milestones=[x]"), "is not a list (expected e.g. upstream.milestones=[40,70])"),
        (("method=sdlora", 'upstream.milestones=["x"]'), "expected numbers of epochs, e.g. [10,15]"),
        (("method=sdlora", "upstream.init_cls=20"), "init_cls=20 and upstream.increment=10 differ, and SD-LoRA's log"),
        (("method=sdlora", "upstream.init_cls=4", "upstream.increment=4"), "the 5 likeliest classes after the first"),
        (
            ("method=sdlora", "benchmark=imagenet_r", "upstream.init_cls=8", "upstream.increment=8"),
            "25 tasks, and SD-LoRA's code has magnitudes for 21 at most",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_override_that_cannot_reach_the_run_is_refused_with_the_reason(
    words: tuple[str, ...], expected: str, upstream: Callable[[str], Path]
) -> None:
    upstream(str(UPSTREAMS[words[0].removeprefix("method=")].repository))
    profile = () if "profile=quick" in words else ("profile=upstream",)
    with pytest.raises(UserError) as caught:
        make_plan(parse([*words, *profile]), dry_run=True)
    assert expected in str(caught.value)


def test_weight_decay_of_inflorab5_with_sgd_is_taken(upstream: Callable[[str], Path]) -> None:
    """Its SGD has it from the second task on."""
    upstream("InfLoRA")
    words = ["method=inflora", "variant=inflorab5", "profile=upstream", "device=0"]
    plan = make_plan(parse([*words, "upstream.optim=sgd", "upstream.weight_decay=1e-4"]), dry_run=True)
    assert json.loads(plan.files[CONFIG])["weight_decay"] == 1e-4


@pytest.mark.parametrize("method", ["inflora", "cllora", "sdlora"])
def test_every_key_may_be_given_the_value_that_it_has(method: str, upstream: Callable[[str], Path]) -> None:
    """Also one that cannot reach the run with another value, or whose other values stop upstream's code."""
    row = UPSTREAMS[method]
    assert isinstance(row, VisionUpstream)
    shipped = json.loads((upstream(str(row.repository)) / str(row.config("", ""))).read_text())
    words = [f"upstream.{key}={json.dumps(value)}" for key, value in shipped.items() if key not in OURS]
    plan = make_plan(parse([f"method={method}", "profile=upstream", "device=0", *words]), dry_run=True)
    assert plan.labels == ()
    assert plan.request.overrides == {}
    assert any("upstream.memory_size" in note and "changes nothing" in note for note in plan.notes)


@pytest.mark.parametrize("repo", ["InfLoRA", "CL-LoRA", "SD-LoRA"])
def test_accepted_overrides_are_in_the_configuration_that_runs(repo: str, upstream: Callable[[str], Path]) -> None:
    row = row_of(repo)
    checkout = upstream(repo)
    shipped = json.loads((checkout / str(row.config("", ""))).read_text())
    known = known_keys(checkout, checkout / str(row.config("", "")))
    for key, value in OTHERS[repo].items():
        if key in known and not row.why_unread(shipped | {key: value}, key, quick=False):
            editor = ConfigEditor(shipped)
            override(editor, {key: json.dumps(value)}, known, row)
            assert editor.current == shipped | {key: value}
            task_classes(editor.current, 100, row)

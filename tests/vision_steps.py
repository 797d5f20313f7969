"""Two tasks of one full batch in a patched repository's own loop, in float64, and the same steps worked out densely.

    python vision_steps.py TREE CONFIG RESULTS

The dense steps use upstream's network and torch alone: plain gradients, weights moved by hand, the papers' formulas.
RESULTS holds, for each task, the trained weights before it, after upstream's loop, and as the formulas have them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import runpy
import sys
from pathlib import Path

import torch
from torch.nn import functional
from torchvision import transforms

from tests.vision_upstream import TinyImages


class TenImages(TinyImages):
    """Ten classes of images that are not augmented, so that a batch is the same whenever it is drawn."""

    train_trsf = TinyImages.test_trsf
    common_trsf = (transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),)

    def __init__(self, seed: int) -> None:
        super().__init__(seed, classes=10)


def trained(network) -> dict:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def gradient(loss, weights: dict) -> dict:
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, found, strict=True) if g is not None}


def put(weights: dict, values: dict) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def along(gradients: dict, rho: float) -> dict:
    """SAM's perturbation over the LoRA factors."""
    chosen = {name: g for name, g in gradients.items() if "lora_" in name}
    norm = torch.cat([g.flatten() for g in chosen.values()]).norm()
    return {name: rho * g / norm for name, g in chosen.items()}


def shifted(values: dict, change: dict) -> dict:
    return {name: value + change[name] if name in change else value for name, value in values.items()}


def step_of_new_classes(network, batch, learner, rate: float, rho: float) -> dict:
    weights = trained(network)
    before = {name: w.detach().clone() for name, w in weights.items()}
    inputs, targets = batch

    def loss():
        # A task has five classes; SD-LoRA's network has logits of the earlier ones before theirs.
        return functional.cross_entropy(network(inputs)["logits"][:, -5:], targets - learner._known_classes)

    put(weights, shifted(before, along(gradient(loss(), weights), rho)))
    found = gradient(loss(), weights)
    return {name: w - rate * found.get(name, 0.0) for name, w in before.items()}


def cllora_steps(network, batch, learner, rate: float, rho: float) -> dict:
    """Distillation, re-weighted; then the task, whose forward pass saw the weights from before the distillation."""
    weights = trained(network)
    w0 = {name: w.detach().clone() for name, w in weights.items()}
    inputs, targets = batch
    backbone = network.backbone
    momentum: dict = {}
    w1 = w0

    def distillation():
        student, teacher = (out["logits"] / 2 for out in network.forward_kd(inputs, learner._cur_task))
        return -5 * (teacher.softmax(1) * student.log_softmax(1)).sum() / len(inputs)

    def task():
        loss = functional.cross_entropy(network(inputs, test=False)["logits"], targets - learner._known_classes)
        units = [w.flatten() / (w.norm() + 1e-8) for w in (*backbone.block_weight_list, backbone.block_weight)]
        if learner._cur_task:
            loss = loss + 1e-4 * sum((units[-1] @ unit).abs() for unit in units[:-1]) / (len(units) - 1)
        return loss

    def mixed(before: dict, after: dict) -> dict:
        put(weights, before)
        loss = task()
        with torch.autograd._unsafe_preserve_version_counter(tuple(weights.values())):
            put(weights, after)
        return gradient(loss, weights)

    if learner._cur_task:
        put(weights, shifted(w0, along(gradient(distillation(), weights), rho)))
        momentum = gradient(distillation(), weights)
        for general in backbone.general_pos:
            place = backbone.adapt_pos.index(general)
            for part in (0, 2):
                rows = backbone.old_adapter_list[-1][place][part].lora_A.weight.norm(dim=1)
                name = f"backbone.cur_adapter.{place}.{part}.lora_A.weight"
                momentum[name] = momentum[name] * (len(rows) * rows / rows.sum())[:, None]
        w1 = {name: w - rate * momentum.get(name, 0.0) for name, w in w0.items()}
    change = along(mixed(w0, w1), rho)
    found = mixed(shifted(w0, change), shifted(w1, change))
    return {name: w - rate * (0.9 * momentum.get(name, 0.0) + found.get(name, 0.0)) for name, w in w1.items()}


def main() -> None:
    tree, config, output = sys.argv[1:]
    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, tree)
    settings = json.loads(Path(config).read_text())
    rho = json.loads(Path(os.environ["FLATPATCH_RUN"]).read_text())["sam"]["rho"]
    import trainer

    model = settings["model_name"]
    loops = {"InfLoRA": ["train_function"], "sdlora": ["_init_train", "_update_representation"]}
    steps = cllora_steps if model == "cllora" else step_of_new_classes
    tasks: list[dict] = []
    get_model = trainer.factory.get_model

    def watched(name, args):
        learner = get_model(name, args)

        def train(original, loader, *arguments):
            ((_, inputs, targets),) = list(loader)  # one full batch
            dense = copy.deepcopy(learner._network)
            before = {name: w.detach().clone() for name, w in trained(dense).items()}
            expected = steps(dense, (inputs, targets), learner, settings["init_lr"], rho)
            original(loader, *arguments)
            after = {name: w.detach().clone() for name, w in trained(learner._network).items()}
            tasks.append({"before": before, "after": after, "expected": expected})

        for loop in loops.get(model, ["_init_train"]):
            setattr(learner, loop, functools.partial(train, getattr(learner, loop)))
        return learner

    trainer.factory.get_model = watched
    sys.argv = ["main.py", *([config] if model == "cllora" else ["--config", config])]
    runpy.run_path(str(Path(tree) / "main.py"), run_name="__main__")
    torch.save(tasks, output)


if __name__ == "__main__":
    main()

"""The reference engine against InfLoRA's own code: same starting weights, same losses and subspaces, task after task.

Upstream's class runs unedited in a process of its own; replaced from outside are the size of its model, its device,
its dataset, and one step without effect: the clustering of features, whose result nothing reads but which draws
random numbers. Batches and augmentations then come from the same random numbers on both sides. With SAM, upstream's
Adam is one that takes the perturbed gradient by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_images import SIZES, make_reference
from safetensors.torch import save_file
from torch import Tensor

from flatpatch.continual.reference import vision
from flatpatch.sam import SAM

TESTS = Path(__file__).resolve().parent
RHO = 0.05
GAIN = 5.0

# Arguments: the checkout, where to write, the tests' folder, and settings as JSON.
DRIVER = """
import json, sys, types
import torch
checkout, record, tests, settings = sys.argv[1:]
torch.set_num_threads(1)
settings = json.loads(settings)
sys.path[:0] = [checkout, tests]
from methods import inflora
from models import sinet_inflora
from utils import data_manager
from reference_images import TinyImages

sizes = settings["sizes"]
def small_vit(name, pretrained, **kwargs):
    return sinet_inflora.ViT_lora_co(**sizes, num_classes=0, n_tasks=kwargs["n_tasks"], rank=kwargs["rank"])
sinet_inflora._create_vision_transformer = small_vit
data_manager._get_idata = lambda name, args: TinyImages(args)
inflora.InfLoRA.clustering = lambda self, loader: None
losses, batch = [], {}
plain_loss = torch.nn.functional.cross_entropy
def recorded_loss(logits, targets):
    loss = plain_loss(logits, targets)
    losses.append(loss.item())
    batch["targets"] = targets
    return loss
inflora.F = types.SimpleNamespace(cross_entropy=recorded_loss)

class SharpnessAwareAdam(torch.optim.Adam):
    def step(self):
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        norm = torch.cat([w.grad.flatten() for w in weights]).norm()
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w in weights:
                w += settings["rho"] * w.grad / norm
        self.zero_grad()
        plain_loss(learner._network(batch["images"])["logits"], batch["targets"]).backward()
        with torch.no_grad():
            for w, value in zip(weights, before):
                w.copy_(value)
        super().step()

if settings["rho"]:
    inflora.optim = types.SimpleNamespace(Adam=SharpnessAwareAdam)
args = dict(settings["args"], device=[torch.device("cpu")])
data = data_manager.DataManager("tiny", False, 0, args["init_cls"], args["increment"], args)
torch.manual_seed(11)
learner = inflora.InfLoRA(args)
with torch.no_grad():  # a fresh ViT is so nearly the same for all images that it has one direction alone
    for name, weight in learner._network.image_encoder.named_parameters():
        if weight.ndim > 1 and "lora" not in name:
            weight *= settings["gain"]
def remember(module, inputs):
    batch["images"] = inputs[0]
learner._network.register_forward_pre_hook(remember)
found = {"start": {name: value.clone() for name, value in learner._network.state_dict().items()}, "tasks": []}
torch.manual_seed(args["seed"])
for task in range(data.nb_tasks):
    learner.incremental_train(data)
    top1 = learner.eval_task()[0]["top1"]
    learner.after_task()
    layers = [block.attn for block in learner._network.image_encoder.blocks]
    found["tasks"].append(
        {
            "losses": losses[:],
            "A": [layer.lora_A_k[task].weight.detach().clone() for layer in layers],
            "B": [layer.lora_B_v[task].weight.detach().clone() for layer in layers],
            "projections": learner.feature_mat,
            "kinds": learner.project_type[:],
            "top1": float(top1),
        }
    )
    losses.clear()
torch.save(found, record)
"""


def run_upstream(checkout: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    record = folder / "upstream.pt"
    root = str(TESTS.parent)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, checkout, record, TESTS, json.dumps(settings)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = torch.load(record)
    return found


def backbone(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of upstream's weights that timm's model has, under timm's names."""
    names = {name.removeprefix("image_encoder."): value for name, value in start.items() if "image_encoder" in name}
    return {name: value for name, value in names.items() if "lora_" not in name and "_grow" not in name}


@pytest.mark.third_party
@pytest.mark.parametrize("rho", [0.0, RHO], ids=["plain", "sam"])
@pytest.mark.parametrize(("lamb", "lame"), [(0.9, 0.99), (0.999, 1.0)], ids=["remove", "retain"])
def test_losses_and_subspaces_equal_upstreams(
    rho: float, lamb: float, lame: float, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = make_reference(
        tmp_path / "run", weights=tmp_path / "vit.safetensors", lamb=lamb, lame=lame, epochs=4, learning_rate=2e-3
    )
    shared = {name: getattr(reference, name) for name in ("seed", "init_cls", "increment", "rank", "lamb", "lame")}
    args = {
        **shared,
        **{"net_type": "sip", "optim": "adam", "EPSILON": 1e-8, "dataset": "tiny", "total_sessions": 3},
        **{"init_epoch": 4, "epochs": 4, "init_lr": 2e-3, "lrate": 2e-3, "init_lr_decay": 0.1, "lrate_decay": 0.1},
        **{"init_weight_decay": 0.0, "weight_decay": 0.0, "batch_size": reference.batch_size, "num_workers": 0},
        **{"memory_size": 0, "memory_per_class": 0, "fixed_memory": True, "embd_dim": SIZES["embed_dim"]},
    }
    theirs = run_upstream(upstream("InfLoRA"), tmp_path, sizes=SIZES, args=args, rho=rho, gain=GAIN)
    start = theirs["start"]
    save_file(backbone(start), tmp_path / "vit.safetensors")

    def take_their_classifiers(state: vision.TaskState) -> None:
        if state.index == 0:
            for name, value in state.model.heads.state_dict().items():
                value.copy_(start[f"classifier_pool.{name}"])

    losses: list[list[float]] = [[], [], []]
    ours: list[dict[str, Any]] = []

    def remember(state: vision.TaskState) -> None:
        ours.append(
            {
                "A": [layer.factors("A")[0].detach().clone() for layer in state.model.layers],
                "B": [layer.factors("B")[1].detach().clone() for layer in state.model.layers],
                "subspaces": list(state.subspaces),
            }
        )

    vision.run(
        reference,
        make_gradients=(lambda optimizer: SAM(optimizer, rho=rho).gradients) if rho else vision.plain_gradients,
        on_step=lambda step: losses[step["task"]].append(step["loss"]),
        before_task=take_their_classifiers,
        after_task=remember,
    )
    top1 = json.loads((tmp_path / "run" / "results.json").read_text())["top1_curve"]
    for t in range(3):
        th = theirs["tasks"][t]
        print(losses[t][:5], th['losses'][:5])
        print(t, max(abs(a-b)/b for a,b in zip(losses[t], th["losses"])), len(losses[t]), top1[t], th["top1"], th["kinds"])
        for i in range(2):
            s = ours[t]["subspaces"][i]
            print("   ", s.dimension, s.of_complement, float((torch.from_numpy(s.projection)-th["projections"][i]).abs().max()),
              float((ours[t]["A"][i]-th["A"][i]).abs().max()), float((ours[t]["B"][i]-th["B"][i]).abs().max()))
    assert 0

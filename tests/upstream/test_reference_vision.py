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
from safetensors.torch import save_file
from torch import Tensor

from flatpatch.families.vision import reference as vision
from flatpatch.sam import SAM
from tests.reference_images import SIZES, make_reference

TESTS = Path(__file__).resolve().parents[1]
RHO = 0.05

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
from tests.reference_images import TinyImages

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
with torch.no_grad():  # a fresh ViT tells images hardly apart
    for name, weight in learner._network.image_encoder.named_parameters():
        if weight.ndim > 1 and "lora" not in name:
            weight *= 5
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
            **{
                name: [getattr(layer, "lora_" + name)[task].weight.detach().clone() for layer in layers]
                for name in ("A_k", "A_v", "B_k", "B_v")
            },
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


def upstream_arguments(reference: vision.VisionReference, tasks: int) -> dict[str, Any]:
    """Return InfLoRA's configuration for the same run."""
    shared = {name: getattr(reference, name) for name in ("seed", "init_cls", "increment", "rank", "lamb", "lame")}
    return {
        **shared,
        **{"net_type": "sip", "optim": "adam", "EPSILON": 1e-8, "dataset": "tiny", "total_sessions": tasks},
        **{"batch_size": reference.batch_size, "num_workers": 0, "embd_dim": SIZES["embed_dim"]},
        **dict.fromkeys(("init_epoch", "epochs"), reference.epochs),
        **dict.fromkeys(("init_lr", "lrate"), reference.learning_rate),
        **dict.fromkeys(("init_weight_decay", "weight_decay", "init_lr_decay", "lrate_decay"), 0.0),
        **{"memory_size": 0, "memory_per_class": 0, "fixed_memory": True},
    }


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("sam", "lamb", "lame", "kinds"),
    [(False, 0.99, 1.0, {"remove"}), (True, 0.9995, 1.0, {"remove", "retain"})],
    ids=["plain", "sam"],
)
def test_losses_and_subspaces_equal_upstreams(
    sam: bool, lamb: float, lame: float, kinds: set[str], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = make_reference(
        tmp_path / "run", weights=tmp_path / "vit.safetensors", lamb=lamb, lame=lame, epochs=4, learning_rate=5e-3
    )
    arguments = upstream_arguments(reference, tasks=4)
    theirs = run_upstream(upstream("InfLoRA"), tmp_path, sizes=SIZES, args=arguments, rho=RHO if sam else 0)
    start, expected = theirs["start"], theirs["tasks"]
    save_file(backbone(start), tmp_path / "vit.safetensors")
    losses: list[list[float]] = [[], [], [], []]
    found: list[dict[str, Any]] = []

    def take_their_classifiers(state: vision.TaskState) -> None:
        if state.index == 0:
            for name, value in state.model.heads.state_dict().items():
                value.copy_(start[f"classifier_pool.{name}"])

    def remember(state: vision.TaskState) -> None:
        (A_k, A_v), (B_k, B_v) = (
            zip(*[[w.detach().clone() for w in layer.factors(which)] for layer in state.model.layers], strict=True)
            for which in "AB"
        )
        found.append({"A_k": A_k, "A_v": A_v, "B_k": B_k, "B_v": B_v, "subspaces": state.subspaces})

    vision.run(
        reference,
        make_gradients=(lambda optimizer: SAM(optimizer, rho=RHO).gradients) if sam else vision.plain_gradients,
        on_step=lambda step: losses[step["task"]].append(step["loss"]),
        before_task=take_their_classifiers,
        after_task=remember,
    )
    assert [len(each) for each in losses] == [12, 12, 12, 12]
    curve = json.loads((tmp_path / "run" / "results.json").read_text())["top1_curve"]
    assert [round(value, 2) for value in curve] == [task["top1"] for task in expected]
    for task, (ours, their) in enumerate(zip(found, expected, strict=True)):
        assert losses[task] == pytest.approx(their["losses"], rel=1e-5)  # 4e-7 seen
        assert ["retain" if space.of_complement else "remove" for space in ours["subspaces"]] == their["kinds"]
        for layer, space in enumerate(ours["subspaces"]):
            # Rounding of covariances in float32, 6e-8, over the gaps between their singular values: 2e-6 seen.
            torch.testing.assert_close(
                torch.from_numpy(space.projection), their["projections"][layer], rtol=0, atol=2e-5
            )
            for slot in "kv":
                A, B = ours[f"A_{slot}"][layer], ours[f"B_{slot}"][layer]
                A_theirs, B_theirs = their[f"A_{slot}"][layer], their[f"B_{slot}"][layer]
                signs = (A * A_theirs).sum(dim=1).sign()  # a row of A is determined up to its sign
                torch.testing.assert_close(signs[:, None] * A, A_theirs, rtol=0, atol=5e-5)  # 3e-6 seen
                torch.testing.assert_close(B * signs, B_theirs, rtol=0, atol=5e-5)  # 8e-6 seen
    assert {kind for task in expected for kind in task["kinds"]} == kinds

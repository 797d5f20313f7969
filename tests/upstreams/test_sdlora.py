"""What is true of SD-LoRA alone: its matrices in both spaces, its earlier tasks, its limits, and what compare knows."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flatpatch.__main__ import main
from flatpatch.comparison.compare import compare_runs
from flatpatch.errors import UserError
from flatpatch.flatness import HessianOperator, Problem, find_scope
from flatpatch.flatness.scope import adapter_factor, partner_factor
from flatpatch.metrics import from_lists, summarise
from flatpatch.report.baselines import load_baseline
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.sam import select_parameters
from flatpatch.upstreams import sdlora
from tests.comparison_cases import inflora_record
from tests.families.vision.test_places import started
from tests.families.vision.test_results import kill_during, results
from tests.flatness.test_scope import CROSS_ENTROPY, all_products, dense_hessian, randomised
from tests.flatness_cases import import_file

__all__ = ["started"]  # a fixture of the hooks' tests

LAYERS = [f"backbone.lora_vit.blocks.{place}.attn.qkv" for place in range(2)]


class Network(nn.Module):
    """Upstream's network as far as its factors go."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.backbone(x))
        return result


@pytest.fixture
def build(
    upstream: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[nn.Module, list[dict[str, Tensor]]]]]:
    """Return a function that makes upstream's network, in float64, and factors of earlier tasks by their names."""
    checkout = upstream("SD-LoRA")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr(nn.Module, "cuda", lambda module: module)
    before = set(sys.modules)
    module = import_file(checkout / "backbone" / "lora.py", "sdlora_backbone")

    def make(earlier: int, *, joined: bool = False) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        torch.manual_seed(3)
        sizes: dict[str, Any] = {"img_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 2, "num_heads": 2}
        vit = VisionTransformer(num_classes=0, **sizes)
        network = Network(module.LoRA_ViT_timm(vit_model=vit, r=2, filepath=str(tmp_path)))
        randomised(network).double()
        factors = [name for name in network.state_dict() if adapter_factor(name)]
        kept = [
            {name: torch.randn(network.get_parameter(name).shape, dtype=torch.float64) for name in factors}
            for _ in range(earlier)
        ]
        sdlora.give_earlier_tasks(network, kept, joined=joined)
        return network, kept

    torch.set_default_dtype(torch.float64)  # its forward pass makes layers
    yield make
    torch.set_default_dtype(torch.float32)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("backbone", "sdlora_backbone"):
            del sys.modules[name]


def images() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3, 4, 4), torch.randint(3, (n,))) for n in (4, 3)]


@pytest.mark.third_party
def test_products_over_the_factors_are_those_of_the_dense_hessian(build: Callable[..., Any]) -> None:
    problem = Problem(build(2)[0], images(), CROSS_ENTROPY, scope="adapter")
    assert problem.scope.names == tuple(
        f"{layer}.linear_{factor}_{name}.weight" for layer in LAYERS for name in "qv" for factor in "ab"
    )
    torch.testing.assert_close(all_products(HessianOperator(problem)), dense_hessian(problem), rtol=1e-9, atol=1e-11)


@pytest.mark.third_party
def test_merged_matrices_are_those_of_the_formula(build: Callable[..., Any]) -> None:
    network, kept = build(2)
    batches = images()
    problem = Problem(network, batches, CROSS_ENTROPY, scope="merged")
    weights = dict(zip(problem.scope.names, problem.variables, strict=True))
    assert set(weights) == {f"{layer}.{name}.merged" for layer in LAYERS for name in "qv"}
    magnitudes = [p.item() for p in network.backbone.wrapped_param_prev.parameters()]
    with torch.no_grad():
        for layer in LAYERS:
            for row, name in ((0, "q"), (2, "v")):
                A, B = (f"{layer}.linear_{factor}_{name}.weight" for factor in "ab")
                expected = network.get_parameter(f"{layer}.qkv.weight").chunk(3)[row].clone()
                own = network.get_parameter(B) @ network.get_parameter(A)
                expected += network.get_parameter(sdlora.MAGNITUDE).item() * own
                for task, factors in enumerate(kept):
                    length = factors[B].norm() * factors[A].norm()
                    expected += magnitudes[task] * factors[B] @ factors[A] / length
                torch.testing.assert_close(weights[f"{layer}.{name}.merged"].detach(), expected, rtol=1e-12, atol=1e-14)
    plain = Problem(network, batches, CROSS_ENTROPY, scope="adapter").loss()
    assert problem.loss() == pytest.approx(plain, rel=1e-12)
    assert HessianOperator(problem).disagreement_with_differences() < 1e-5
    assert Problem(network, batches, CROSS_ENTROPY, scope="adapter").loss() == plain


@pytest.mark.third_party
def test_joined_factors_are_the_same_model_and_all_move_it(build: Callable[..., Any]) -> None:
    (alone, kept), (joined, _) = build(2), build(2, joined=True)
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(alone(x), joined(x))
    names = {name for name, p in joined.named_parameters() if adapter_factor(name)}
    assert len(names) == 3 * len(kept[0])
    assert {partner_factor(name) for name in names} == names
    free = {name for name, p in joined.named_parameters() if p.requires_grad}
    magnitudes = {name for name in free if "wrapped_param" in name}
    assert magnitudes == {sdlora.MAGNITUDE, *(f"backbone.wrapped_param_prev.{task}.param" for task in range(2))}
    scope = find_scope(joined, "merged", others=True)
    assert set(scope.others) == {"fc.weight", "fc.bias"}
    before = joined(x)
    for name in sorted(names):
        with torch.no_grad():
            joined.get_parameter(name).mul_(-1)
        assert not torch.allclose(joined(x), before)
        with torch.no_grad():
            joined.get_parameter(name).mul_(-1)
    sdlora.only_last_classes(joined, 2)
    assert torch.equal(joined(x), before[:, 1:])


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("A", ["linear_a_q"]), ("B", ["linear_b_v"]), ("lora", ["linear_a_q", "linear_b_v"]), ("head", ["param", "fc"])],
)
def test_factors_are_a_and_b_and_magnitudes_are_none(scope: str, expected: list[str]) -> None:
    layer = "backbone.lora_vit.blocks.0.attn.qkv"
    names = (sdlora.MAGNITUDE, f"{layer}.linear_a_q.weight", f"{layer}.linear_b_v.weight", "fc.weight")
    chosen = select_parameters([(name, nn.Parameter(torch.ones(1))) for name in names], scope)
    assert [name.split(".")[-2 if "fc" in name or "linear" in name else -1] for name, _ in chosen] == expected
    # A layer of another name is no factor.
    assert adapter_factor("decoder.linear_b.weight") is adapter_factor("linear_a_quick.weight") is None


def test_decays_are_read_where_a_milestone_comes_within_the_epochs() -> None:
    config = {"milestones": [40, "x"], "epochs": 20, "init_milestones": [19], "init_epoch": 20}
    assert sdlora.UPSTREAM.why_unread(config, "lrate_decay", quick=False).startswith(
        "uses it after the epochs of milestones alone"
    )
    assert sdlora.UPSTREAM.why_unread(config, "init_lr_decay", quick=False) == ""
    assert sdlora.UPSTREAM.why_unread(config | {"milestones": [19]}, "lrate_decay", quick=False) == ""


@pytest.mark.third_party
def test_profile_paper_is_refused_as_the_paper_was_not_read(upstream: Callable[[str], Path]) -> None:
    upstream("SD-LoRA")
    with pytest.raises(UserError, match="so that profile=paper has nothing to follow"):
        make_plan(parse(["method=sdlora", "profile=paper"]), dry_run=True)


def test_logs_of_its_trainer_are_told_from_others_of_the_same_model_name() -> None:
    method = sdlora.UPSTREAM.method_of_log
    assert method({"model_name": "sdlora"}) == "sdlora"
    assert method({"model_name": "finetune", "filepath": "./CF100/"}) == "sdlora"
    assert method({"model_name": "finetune"}) is None
    assert method({"model_name": "cllora", "filepath": "./CF100/"}) is None


def record_like(name: str) -> dict[str, Any]:
    """Return the record of a run that gave what a shipped run gave."""
    baseline = load_baseline(name)
    (run,) = baseline["per_seed"]
    metrics = summarise(from_lists(run["accuracy_matrix"]), sample_weighted=run["top1_curve"])
    tasks = [str(task) for task in range(baseline["applies_to"]["tasks"])]
    more = {"accuracy_matrix": run["accuracy_matrix"], "metrics": metrics, "tasks": tasks, "seeds": [run["seed"]]}
    return inflora_record(0, method="sdlora", benchmark=baseline["applies_to"]["dataset"], **more)


def test_run_is_compared_with_the_shipped_log_of_its_benchmark() -> None:
    result = compare_runs([record_like("sdlora_cifar100")])
    assert (result["baseline"]["name"], result["verdict"]) == ("sdlora_cifar100", "reproduced")
    assert result["notes"] == []
    result = compare_runs([record_like("sdlora_imagenet_r_5")])
    assert result["verdict"] == "reproduced"
    assert result["notes"] == [
        "the split of imagenet_r could not be checked: SD-LoRA takes one that it does not name, of which no list is "
        "published"
    ]


@pytest.mark.parametrize("name", ["sdlora_imagenet_a_10", "sdlora_imagenet_r_10"])
def test_run_is_not_compared_with_a_log_of_other_settings_than_the_configuration(name: str) -> None:
    result = compare_runs([record_like(name)])
    assert result["verdict"].startswith("not comparable because")
    assert f"{name} ran with other settings than upstream's configuration says: " in result["why"]
    assert "lrate is 0.0" in result["why"]


@pytest.mark.third_party
@pytest.mark.slow
def test_killed_run_ends_as_an_undisturbed_one_and_its_files_lie_in_its_own_folder(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("SD-LoRA")

    def command(run: str) -> list[str]:
        given = ["method=sdlora", "profile=quick", "device=cpu", "sam=sam", f"output={tmp_path}", f"run={run}"]
        tasks = ["upstream.init_cls=10", "upstream.increment=10", "upstream.batch_size=200"]
        return ["run", *given, *tasks, "upstream.init_epoch=1", "upstream.epochs=2"]

    assert main(command("undisturbed")) == 0
    steps = tmp_path / "killed/tasks/all/metrics.jsonl"
    kill_during(command("killed"), lambda: steps.is_file() and "10-19" in steps.read_text())
    assert main(command("killed")) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    assert [step["task"] for step in results(tmp_path / "killed")["steps"]] == ["0-9"] * 4 + ["10-19"] * 8
    for run in ("undisturbed", "killed"):
        work = tmp_path / run / "work"
        own = json.loads((work / "flatpatch-config.json").read_text())["filepath"]
        assert {path.name for path in (work / own).iterdir()} == {
            f"{name}{task}.pt" for name in ("lora_w_a_", "lora_w_b_", "CLs_weight", "CLs_bias") for task in (0, 1)
        }


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_bare_cuda_leaves_things_where_they_are_without_a_gpu(started, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = torch.Tensor.cuda, torch.nn.Module.cuda
    layer = torch.nn.Linear(2, 2)

    @sdlora.on_the_device
    def upstreams(weight, fails=False):
        if fails:
            raise ValueError("upstream's")
        return layer.cuda(), weight.cuda()

    started(device=device)
    given = torch.ones(2)
    assert upstreams(given) == (layer, given)
    with pytest.raises(ValueError, match="upstream's"):
        upstreams(given, fails=True)
    assert (torch.Tensor.cuda, torch.nn.Module.cuda) == before


def test_a_bare_cuda_is_upstreams_own_where_there_is_a_gpu_to_use(started, monkeypatch):
    moved = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: moved.append(tensor))
    started(device="cuda:0")
    sdlora.on_the_device(lambda tensor: tensor.cuda())(torch.ones(2))
    monkeypatch.delenv("FLATPATCH_RUN")
    sdlora.on_the_device(lambda tensor: tensor.cuda())(torch.ones(2))
    assert len(moved) == 2


def test_layers_saved_whole_are_loaded_in_a_run_alone(started, tmp_path):
    path = tmp_path / "layers.pt"
    torch.save([torch.nn.Linear(2, 3, bias=False)], path)
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        sdlora.load_layers()
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(path)
        started()
        sdlora.load_layers()
        (layer,) = torch.load(path)
        assert layer.out_features == 3
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)

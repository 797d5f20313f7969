"""The hooks that say where an image repository runs: device, data, model, weights and logs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from flatpatch import hooks
from flatpatch.errors import UserError
from flatpatch.families.vision import places as images
from tests.families.vision.test_hook import description
from tests.vision_upstream import SIZES, TinyImages


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a run that is otherwise upstream's own, in a working folder of its own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def start(**vision):
        run = description(tmp_path)
        run["vision"] |= vision
        path = tmp_path / "hook.json"
        path.write_text(json.dumps(run))
        monkeypatch.setenv("FLATPATCH_RUN", str(path))
        images.read_run.cache_clear()

    yield start
    images.read_run.cache_clear()


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", ["cpu"]), ("cuda:3", ["cuda:3"]), ("cuda:0,2", ["cuda:0", "cuda:2"]), (None, ["cuda:1"])],
)
def test_the_run_names_the_devices(started, device, expected):
    started(device=device)
    args = {"device": [torch.device("cuda:1")]}
    hooks.redirect_paths(args)
    assert args == {"device": [torch.device(name) for name in expected]}


def test_the_run_says_how_many_processes_load_images(started):
    started(workers=0)
    args = {"device": [], "num_workers": 16}
    hooks.redirect_paths(args)
    assert args["num_workers"] == 0
    assert hooks.workers(8) == 0


def test_data_lies_where_the_run_says(started, tmp_path):
    data = tmp_path / "shared"
    data.mkdir()
    (data / "cifar").write_text("")
    started(data=str(data))
    for _ in range(2):  # each seed
        hooks.redirect_paths({"device": []})
    assert Path("data/cifar").exists()
    for path in ("/data/imagenet-a/train/", "./data/imagenet-a/train/", "data/imagenet-a/train"):
        assert hooks.data_folder(path) == f"{data}/imagenet-a/train"
    (tmp_path / "other").mkdir()
    started(data=str(tmp_path / "other"))
    with pytest.raises(UserError, match="work/data is not .*other, from which the run takes its data"):
        hooks.redirect_paths({"device": []})


def test_each_seed_has_its_own_log(started, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    started()
    for seed in ("0", "1"):
        hooks.new_log()
        logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler(tmp_path / seed)])
        logging.info("seed %s", seed)
    hooks.new_log()
    assert [(tmp_path / seed).read_text() for seed in ("0", "1")] == ["INFO:root:seed 0\n", "INFO:root:seed 1\n"]


def test_the_quick_data_set_is_the_runs_and_others_are_upstreams(started):
    started(dataset={"class": "tests.vision_upstream:TinyImages", "seed": 5})
    assert hooks.provides_dataset("FlatPatch_Quick")
    assert not hooks.provides_dataset("cifar100")
    data, same = hooks.dataset(), TinyImages(seed=5)
    data.download_data()
    same.download_data()
    assert (data.train_data == same.train_data).all()
    assert data.train_data.dtype == "uint8"
    started()
    assert not hooks.provides_dataset("flatpatch_quick")


def test_the_run_gives_the_sizes_of_the_model(started):
    args, sizes = {"embd_dim": 768, "num_heads": 12}, {"embed_dim": 768, "depth": 12, "rank": 10}
    started()
    hooks.resize(args, sizes)
    assert (args["embd_dim"], sizes["depth"], hooks.embed_dim(768), hooks.should_download(True)) == (768, 12, 768, True)
    started(model=SIZES)
    hooks.resize(args, sizes)
    assert args == {"embd_dim": 16, "num_heads": 2}
    assert sizes == SIZES | {"rank": 10}
    assert hooks.embed_dim(768) == 16
    assert hooks.should_download(True) is False
    assert hooks.resized(dict)(embed_dim=768, rank=10) == SIZES | {"rank": 10}


def vit(seed: int, **more) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**SIZES, **more)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_are_loaded_except_for_the_head(started, tmp_path, suffix):
    path, source = tmp_path / f"vit.{suffix}", vit(1, num_classes=7)
    (save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    started(weights=str(path))
    assert hooks.should_download(True) is False
    model = vit(2, num_classes=3)
    model.blocks[0].attn.lora_A_k = torch.nn.Linear(2, 2)
    before = model.head.weight.detach().clone()
    hooks.load_weights(model)
    assert torch.equal(model.head.weight, before)
    for name, tensor in model.state_dict().items():
        if "head" not in name and "lora" not in name:
            assert torch.equal(tensor, source.state_dict()[name])


def test_weights_of_another_model_are_refused_with_every_difference(started, tmp_path):
    weights = vit(1, num_classes=0).state_dict()
    weights["norm.weight"] = torch.zeros(3)
    weights["bias"] = weights.pop("norm.bias")
    save_file(weights, tmp_path / "vit.safetensors")
    started(weights=str(tmp_path / "vit.safetensors"))
    with pytest.raises(UserError) as caught:
        hooks.load_weights(vit(2, num_classes=0))
    for problem in ("unknown bias", "has no norm.bias", "norm.weight of shape (3,), expected (16,)"):
        assert problem in str(caught.value)


def test_googles_weights_are_loaded_by_the_models_own_code(started, tmp_path):
    path = tmp_path / "ViT-B_16.npz"
    path.write_bytes(b"")
    started(weights=str(path))
    loaded = []
    hooks.load_weights(SimpleNamespace(load_pretrained=loaded.append))
    assert loaded == [str(path)]
    asked = []

    def create_model(name, **arguments):
        asked.append((name, arguments))
        return SimpleNamespace(load_pretrained=loaded.append)

    hooks.backbones(SimpleNamespace(create_model=create_model)).create_model("vit_base", pretrained=True, num_classes=0)
    assert asked == [("vit_base", {"pretrained": False, "num_classes": 0})]
    assert loaded == [str(path)] * 2


def test_a_backbone_of_other_sizes_holds_the_runs_weights(started, tmp_path):
    source = vit(1, num_classes=0).state_dict()
    save_file(source, tmp_path / "vit.safetensors")
    started(model=SIZES, weights=str(tmp_path / "vit.safetensors"))
    model = hooks.backbones(timm).create_model("vit_base_patch16_224", pretrained=True, num_classes=0)
    assert isinstance(model, VisionTransformer)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_a_file_may_lack_only_what_timms_vit_does_not_have(started, tmp_path):
    weights = vit(1, num_classes=0).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    started(weights=str(tmp_path / "vit.safetensors"))
    model = vit(2, num_classes=3)
    model.blocks[0].attn.linear_a_q = torch.nn.Linear(2, 2)
    hooks.load_weights(model)
    for name in weights:
        save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "vit.safetensors")
        with pytest.raises(UserError, match=f"has no {name}"):
            hooks.load_weights(model)

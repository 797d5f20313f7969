"""Run an image repository's own main.py, patched or not, on a tiny model and data, and keep all that it computed.

    python vision_upstream.py TREE CONFIG[,CONFIG...] RESULTS [DEPTH]

With the depth of a model everything that has to be otherwise on a machine without GPU is put in place from outside, by
replacing attributes of upstream's modules and of torch; none of it comes from flatpatch.
"""

from __future__ import annotations

import functools
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torchvision import transforms

import flatpatch.hooks

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}

# What the repositories have in common; one batch too small, so that batches are uneven.
COMMON = {
    "prefix": "test",
    "dataset": "flatpatch_quick",
    "memory_size": 0,
    "memory_per_class": 0,
    "weight_decay": 0.001,
    "seed": [0],
}
CONFIGS = {
    "InfLoRA": COMMON
    | {"model_name": "InfLoRA", "data_path": "data/", "net_type": "sip", "shuffle": False, "fixed_memory": True}
    | {"init_cls": 2, "increment": 2, "embd_dim": SIZES["embed_dim"], "num_heads": 2, "total_sessions": 5}
    | {"optim": "adam", "EPSILON": 1e-8, "init_epoch": 2, "epochs": 2, "batch_size": 9, "num_workers": 0}
    | {"init_lr": 0.01, "init_lr_decay": 0.1, "init_weight_decay": 0.001, "lrate": 0.01, "lrate_decay": 0.1}
    | {"rank": 3, "lamb": 0.7, "lame": 0.9},
    "CL-LoRA": COMMON
    | {"model_name": "cllora", "backbone_type": "vit_base_patch16_224_in21k_cllora", "device": ["0"], "shuffle": True}
    | {"init_cls": 5, "increment": 5, "fixed_memory": False, "init_epochs": 2, "later_epochs": 2, "batch_size": 12}
    | {"init_lr": 0.05, "later_lr": 0.05, "min_lr": 0, "optimizer": "sgd", "scheduler": "cosine", "ffn_num": 3}
    | {"use_diagonal": False, "recalc_sim": True, "alpha": 0.0, "beta": 0, "use_init_ptm": False, "adapter_num": -1}
    | {"use_old_data": False, "use_reweight": True, "moni_adam": False, "msa_adapt": True, "pretrained": True}
    | {"use_distillation": True, "use_block_weight": True, "msa": [1, 0, 1], "general_pos": [0], "specfic_pos": [1]}
    | {"print_forget": True},
    "SD-LoRA": COMMON
    | {"model_name": "sdlora", "backbone_type": "vit_base_patch16_224", "device": ["0"], "shuffle": True}
    | {"init_cls": 5, "increment": 5, "fixed_memory": False, "init_epoch": 2, "epochs": 2, "batch_size": 12}
    | {"init_lr": 0.05, "lrate": 0.05, "min_lr": 0.01, "optimizer": "adam", "scheduler": "cosine", "tuned_epoch": 2}
    | {"init_milestones": [1], "init_lr_decay": 0.5, "milestones": [1], "lrate_decay": 0.5, "init_weight_decay": 0.001}
    | {"filepath": "./factors/"},
}


class TinyImages:
    """Twenty-five classes of 8x8 images, each a pattern of its own with noise."""

    use_path = False
    train_trsf = (transforms.RandomHorizontalFlip(), transforms.ToTensor())
    test_trsf = (transforms.ToTensor(),)
    common_trsf = (transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),)

    def __init__(self, seed: int, classes: int = 25) -> None:
        self.class_order = list(range(classes))
        generator = np.random.default_rng(seed)
        self._patterns = generator.uniform(0, 255, (classes, 8, 8, 3))
        self._generator = generator

    def download_data(self) -> None:
        self.train_data, self.train_targets = self._draw(8)
        self.test_data, self.test_targets = self._draw(3)

    def _draw(self, each: int) -> tuple[np.ndarray, np.ndarray]:
        targets = np.repeat(np.arange(len(self._patterns)), each)
        noise = self._generator.normal(0, 30, (len(targets), 8, 8, 3))
        return np.clip(self._patterns[targets] + noise, 0, 255).astype(np.uint8), targets


class TenImages(TinyImages):
    """As many classes as five tasks of two take."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, classes=10)


class FifteenImages(TinyImages):
    """As many classes as three tasks of five take."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, classes=15)


DATA = {"InfLoRA": TenImages, "CL-LoRA": FifteenImages, "SD-LoRA": FifteenImages}


# These can only train under DataParallel, which without a GPU passes its inputs on to the network.
SEVERAL_DEVICES = ("InfLoRA_CA1", "InfLoRA_domain", "InfLoRAb5_domain")


class FewProcesses(torch.utils.data.DataLoader):
    """Upstream's loaders that have four processes whatever its configuration says do without: none of them draws."""

    def __init__(self, *arguments, num_workers: int = 0, **more) -> None:
        super().__init__(*arguments, num_workers=0 if num_workers == 4 else num_workers, **more)


def on_the_cpu(args: dict) -> None:
    args["device"] = [torch.device("cpu")] * (2 if args["model_name"] in SEVERAL_DEVICES else 1)


def emulate(repo: str, depth: int) -> None:
    """Let an unpatched repository run here, or a patched one whose hooks do nothing."""
    sizes = SIZES | {"depth": depth}
    import trainer
    import utils.data_manager

    trainer._set_device = on_the_cpu
    utils.data_manager._get_idata = lambda *_: DATA[repo](seed=0)
    train_one_seed = trainer._train

    def train_with_its_own_log(args: dict) -> None:
        logging.getLogger().handlers.clear()
        train_one_seed(args)

    trainer._train = train_with_its_own_log
    if repo == "InfLoRA":
        from models import sinet_inflora, sinet_inflorab5

        for sinet in (sinet_inflora, sinet_inflorab5):
            create = sinet._create_vision_transformer
            sinet._create_vision_transformer = lambda variant, pretrained, create=create, **arguments: create(
                variant, pretrained=False, **arguments | sizes
            )
        return
    if repo == "SD-LoRA":
        emulate_sdlora(sizes)
        return
    import models.cllora
    from backbone import linears, vit_cllora
    from timm.models.vision_transformer import VisionTransformer

    models.cllora.num_workers = 0
    torch.Tensor.cuda = lambda tensor: tensor
    defaults = linears.CosineLinearFeature.forward_diagonal.__defaults__
    linears.CosineLinearFeature.forward_diagonal.__defaults__ = tuple(
        SIZES["embed_dim"] if value == 768 else value for value in defaults
    )

    class Small(vit_cllora.VisionTransformer):
        out_dim = property(lambda self: SIZES["embed_dim"], lambda self, value: None)

        def __init__(self, tuning_config, **arguments) -> None:
            tuning_config.d_model = SIZES["embed_dim"]
            super().__init__(tuning_config=tuning_config, **arguments | sizes)

    vit_cllora.VisionTransformer = Small

    def create_model(name: str, **_: object) -> SimpleNamespace:
        weights = VisionTransformer(num_classes=0, **sizes).state_dict()
        for key in [key for key in weights if ".qkv." in key]:
            for letter, part in zip("qkv", weights.pop(key).split(SIZES["embed_dim"]), strict=True):
                weights[key.replace(".qkv.", f".{letter}_proj.")] = part
        return SimpleNamespace(state_dict=lambda: weights)

    vit_cllora.timm = SimpleNamespace(create_model=create_model)
    # What torch 2.0.1 does on CUDA: a step of the optimizer counts as no write to the weights.
    step = torch.optim.SGD.step

    def uncounted(optimizer, *arguments):
        weights = tuple(p for group in optimizer.param_groups for p in group["params"])
        with torch.autograd._unsafe_preserve_version_counter(weights):
            return step(optimizer, *arguments)

    torch.optim.SGD.step = uncounted


def emulate_sdlora(sizes: dict) -> None:
    """As ``emulate``; its torch loads whole layers unasked and its GPU takes what a bare ``cuda()`` gives it."""
    import models.sdlora
    import utils.inc_net
    from backbone.lora import LoRA_ViT_timm
    from timm.models.vision_transformer import VisionTransformer

    models.sdlora.num_workers = 0
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda it: it
    torch.load = functools.partial(torch.load, weights_only=False)
    LoRA_ViT_timm.out_dim = property(lambda self: SIZES["embed_dim"], lambda self, value: None)
    small = SimpleNamespace(create_model=lambda name, pretrained, **more: VisionTransformer(**sizes, **more))
    models.sdlora.timm = utils.inc_net.timm = small


def watch() -> list[tuple[object, list]]:
    """Return a list that fills with the learners that upstream makes, each with every number it takes from a tensor."""
    import trainer

    seen: list[tuple[object, list]] = []
    numbers: list[list] = [[]]
    get_model, item = trainer.factory.get_model, torch.Tensor.item

    def kept(*arguments):
        numbers.append([])
        learner = get_model(*arguments)
        seen.append((learner, numbers[-1]))
        return learner

    def noted(tensor):
        number = item(tensor)
        numbers[-1].append(number)
        return number

    trainer.factory.get_model = kept
    torch.Tensor.item = noted
    return seen


def watch_features(sinet) -> list[bool]:
    """Return a list that says of each of InfLoRA's feature passes whether the weights stood as a step left them."""
    found: list[bool] = []
    after: dict = {}
    step, forward = torch.optim.Adam.step, sinet.SiNet.forward

    def stepped(optimizer, *arguments):
        result = step(optimizer, *arguments)
        after.update(
            (p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        )
        return result

    def passed(network, *arguments, get_cur_feat=False, **more):
        if get_cur_feat:
            found.append(all(torch.equal(p, after[p]) for p in network.parameters() if p in after))
        return forward(network, *arguments, get_cur_feat=get_cur_feat, **more)

    torch.optim.Adam.step, sinet.SiNet.forward = stepped, passed
    return found


def results(learner) -> dict:
    """Return all that a learner has learned."""
    network = learner._network
    found = {
        "weights": network.state_dict(),
        "predictions": [torch.as_tensor(p) for p in learner._eval_cnn(learner.test_loader)],
    }
    if hasattr(learner, "feature_list"):
        found["features"] = [torch.as_tensor(feature) for feature in learner.feature_list]
        found["projections"] = learner.feature_mat
        found["project_types"] = getattr(learner, "project_type", None)  # the variants without DualGPM have none
        found["keys"] = learner.all_keys
    elif hasattr(network.backbone, "wrapped_param"):
        layer = network.backbone.lora_vit.blocks[0].attn.qkv
        found["earlier"] = {
            name: [module.weight for module in modules]
            for saved in (layer.saved_A, layer.saved_B)
            for name, modules in saved.items()
        }
    else:
        backbone = network.backbone
        found["block_weights"] = [*backbone.block_weight_list, backbone.block_weight]
        found["adapters"] = [[a.state_dict() for a in task] for task in backbone.adapter_list]
    return found


def main() -> None:
    tree, config, output, *rest = sys.argv[1:]
    models = {"sdlora": "SD-LoRA", "cllora": "CL-LoRA", "base": "InfLoRA"}
    repo = next(name for file, name in models.items() if any(Path(tree).glob(f"m*/{file}.py")))
    # As for `python main.py`; this file's own folder must stay findable for the data set.
    sys.path.insert(0, tree)
    torch.utils.data.DataLoader = FewProcesses
    if rest:
        emulate(repo, int(rest[0]))
    else:
        place = flatpatch.hooks.redirect_paths

        def place_on_several(args: dict) -> None:
            place(args)
            on_the_cpu(args)

        flatpatch.hooks.redirect_paths = place_on_several
    seen = watch()
    features: list[bool] = []
    if repo == "InfLoRA":
        import models.sinet_inflora

        features = watch_features(models.sinet_inflora)
    for path in config.split(","):
        sys.argv = ["main.py", *([path] if repo == "CL-LoRA" else ["--config", path])]
        runpy.run_path(str(Path(tree) / "main.py"), run_name="__main__")
    # Evaluating once more, below, takes more numbers and would write more into the log.
    seen = [(learner, tuple(numbers)) for learner, numbers in seen if hasattr(learner, "test_loader")]
    logging.disable()
    found = [results(learner) | {"numbers": numbers} for learner, numbers in seen]
    torch.save({"seeds": found, "features_unperturbed": features}, output)


if __name__ == "__main__":
    main()

"""The hooks that let an image repository run elsewhere than at its authors': device, data, model, weights, logs.

None of them changes what is computed where upstream's own settings would have worked. Without ``FLATPATCH_RUN`` each
returns what it was given.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from flatpatch.contract import VARIABLE, Part, Sam, read_description
from flatpatch.errors import UserError

DATASET = "flatpatch_quick"

# The weights of timm's ViT that a file of weights must hold: all but the head; upstream adds others to them.
_PART = r"(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])"
_NEEDED = re.compile(rf"cls_token|pos_embed|(patch_embed\.proj|blocks\.\d+\.{_PART}|norm)\.(weight|bias)")


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise ValueError("it does not exist")
    return path


ExistingPath = Annotated[str, AfterValidator(_existing)]


class Sizes(Part):
    """Sizes of the ViT, as timm names them."""

    img_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(gt=0)


class OwnDataset(Part):
    """What the run's data set is made with: ``package.module:Class`` and a seed.

    ``Class(seed=0)`` has the interface of upstream's own data sets: ``use_path``, ``train_trsf``, ``test_trsf``,
    ``common_trsf``, ``class_order``, and after ``download_data()`` also ``train_data``, ``train_targets``,
    ``test_data``, ``test_targets``.
    """

    name: str = Field(alias="class", pattern=r"^\w+(\.\w+)*:\w+$")
    seed: int


class LoopSam(Sam):
    """SAM in a loop written out by hand: one process, and a loss that is not taken apart."""

    sync: Literal["local"]
    ascent_loss: Literal["total"]


class Site(Part):
    """Where and on what an image run runs, ``vision`` of its description; null is always: as upstream says.

    Attributes:
        device: ``cpu``, ``cuda:0``, ``cuda:0,1`` ...
        data: The folder that upstream's ``./data`` stands for.
        weights: The file of the ViT's weights.
        workers: Processes that load images.
        model: Sizes of the ViT; without weights it is a random one.
        dataset: What the run's own data set stands for.
        sam_on: Which of the losses of a batch take SAM.
    """

    device: str | None = Field(pattern=r"^(cpu|cuda:\d+(,\d+)*)$")
    data: ExistingPath | None
    weights: ExistingPath | None
    workers: int | None = Field(ge=0)
    model: Sizes | None
    dataset: OwnDataset | None
    sam_on: Literal["both", "task", "distillation"]


def vision_run() -> dict[str, Any] | None:
    """Return the run's description, or None where there is no run.

    Returns:
        The description, with a ``vision`` object.

    Raises:
        UserError: If the description is not valid, or not that of a vision run.
    """
    path = os.environ.get(VARIABLE)
    return None if path is None else read_run(path)


@functools.cache
def read_run(path: str) -> dict[str, Any]:
    """Read the description of an image run, once."""
    return read_description(
        Path(path),
        vision=Site,
        sam=LoopSam,
        task=type(None),
        task_index=type(None),
        tasks=list[str],
        adapters=Literal["upstream"],
    )


def _vision() -> dict[str, Any]:
    """The run's ``vision`` object; empty where there is no run."""
    run = vision_run()
    return {} if run is None else run["vision"]


def new_log() -> None:
    """Let the ``logging.basicConfig`` that follows take effect, although an earlier seed has called it."""
    if vision_run() is None:
        return
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()


def log_files() -> list[Path]:
    """Return the files into which this process logs, with all that it has logged in them."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    for handler in handlers:
        handler.flush()
    return [path for handler in handlers if (path := Path(handler.baseFilename)).is_file()]


def redirect_paths(args: MutableMapping[str, Any]) -> None:
    """Put the run's device, image-loading processes and data where upstream's arguments name theirs.

    Upstream has logged nothing yet. Where a run keeps checkpoints, these bring back what an earlier process logged, so
    that nothing may be left of it here.

    Args:
        args: Upstream's arguments, in which ``device`` is a list of devices.

    Raises:
        UserError: If ``./data`` is already there and is not the run's data.
    """
    run = vision_run()
    if run is not None and run.get("checkpoints") is not None:
        for log in log_files():
            log.write_bytes(b"")
    vision = _vision()
    if vision.get("device") is not None:
        import torch

        kind, _, numbers = vision["device"].partition(":")
        args["device"] = [torch.device(kind, int(n)) for n in numbers.split(",")] if numbers else [torch.device(kind)]
    if vision.get("workers") is not None and "num_workers" in args:
        args["num_workers"] = vision["workers"]
    if vision.get("data") is not None:
        _link(Path("data"), Path(vision["data"]).resolve())


def _link(link: Path, folder: Path) -> None:
    if link.is_symlink() and not link.exists():
        link.unlink()
    if not link.exists():
        link.symlink_to(folder, target_is_directory=True)
    elif link.resolve() != folder:
        raise UserError(
            f"{link.absolute()} is not {folder}, from which the run takes its data. Move it away, or run elsewhere."
        )


def data_folder(path: str) -> str:
    """Return where a folder named ``/data/...`` or ``./data/...`` by upstream lies."""
    data = _vision().get("data")
    if data is None:
        return path
    parts = Path(path).parts
    below = parts[parts.index("data") + 1 :] if "data" in parts else parts
    return os.path.join(data, *below)


def workers(number: int) -> int:
    """Return the number of processes that load images."""
    chosen = _vision().get("workers")
    return number if chosen is None else chosen


def provides_dataset(name: str) -> bool:
    """Whether a data set of this name is the run's, not upstream's."""
    return name.lower() == DATASET and _vision().get("dataset") is not None


def dataset() -> Any:
    """Make the run's data set."""
    chosen = _vision()["dataset"]
    module, _, name = chosen["class"].partition(":")
    return getattr(importlib.import_module(module), name)(seed=chosen["seed"])


def model_sizes() -> dict[str, Any] | None:
    """Return the run's sizes of the ViT; None where they are upstream's."""
    sizes: dict[str, Any] | None = _vision().get("model")
    return sizes


def resize(args: MutableMapping[str, Any], sizes: MutableMapping[str, Any]) -> None:
    """Put the run's sizes of the model in the place of upstream's.

    Args:
        args: Upstream's arguments, whose ``embd_dim`` and ``num_heads`` describe the model too.
        sizes: Arguments of the ViT.
    """
    model = model_sizes()
    if model is not None:
        sizes.update(model)
        args.update(embd_dim=model["embed_dim"], num_heads=model["num_heads"])


def resized(model_class: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class of ViTs, or a function that makes one of the run's sizes, whatever sizes it is asked for."""
    model = model_sizes()
    if model is None:
        return model_class
    if not isinstance(model_class, type):
        return lambda **arguments: model_class(**{**arguments, **model})

    parent: Any = model_class

    def begin(self: Any, **arguments: Any) -> None:
        parent.__init__(self, **{**arguments, **model})

    # A class under the name of the one whose place it takes, so that its objects can be saved whole.
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (model_class,), {**names, "__init__": begin})


def embed_dim(upstream: int) -> int:
    """Return the width of the ViT's tokens where upstream's code spells its own out."""
    model = model_sizes()
    return upstream if model is None else model["embed_dim"]


def should_download(pretrained: bool) -> bool:
    """Whether timm is to fetch weights, which it is not where the run has its own or makes a model of other sizes."""
    return pretrained and _vision().get("weights") is None and model_sizes() is None


def load_weights(model: Any) -> None:
    """Load the run's weights, if it has any, into a ViT.

    Args:
        model: Has timm's names of a ViT's weights; for an ``.npz`` file of Google's also timm's ``load_pretrained``.

    Raises:
        UserError: If the file is not one of such a model.
    """
    path = _vision().get("weights")
    if path is None:
        return
    if path.endswith(".npz"):
        model.load_pretrained(path)
        return
    weights = {name: tensor for name, tensor in _read_weights(path).items() if not name.startswith("head.")}
    theirs = model.state_dict()
    problems = [f"has an unknown {name}" for name in weights if name not in theirs]
    problems += [f"has no {name}" for name in theirs if name not in weights and _NEEDED.fullmatch(name)]
    problems += [
        f"has {name} of shape {tuple(tensor.shape)}, expected {tuple(theirs[name].shape)}"
        for name, tensor in weights.items()
        if name in theirs and tensor.shape != theirs[name].shape
    ]
    if problems:
        raise UserError.collect([f"{path} {problem}" for problem in problems])
    model.load_state_dict(weights, strict=False)


def _read_weights(path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def backbones(timm: Any) -> Any:
    """Return timm, or what stands in for it where the run has its own weights or sizes.

    Args:
        timm: The library as upstream has imported it.

    Returns:
        Has timm's ``create_model``.
    """
    sizes = model_sizes()
    if _vision().get("weights") is None and sizes is None:
        return timm

    def create_model(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if sizes is None:
            model = timm.create_model(name, pretrained=False, **arguments)
        else:
            model = timm.models.vision_transformer.VisionTransformer(**sizes, **arguments)
        load_weights(model)
        return model

    return SimpleNamespace(create_model=create_model)

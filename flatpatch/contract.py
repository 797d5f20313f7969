"""The files that a hook shares with the run that started its process: the description it reads, what it writes.

``FLATPATCH_RUN`` names a JSON file::

    {"schema": 1, "task_index": 0, "task": "dbpedia",
     "metrics": "/.../metrics.jsonl", "progress": "/.../progress.json", "summary": "/.../summary.json",
     "sam": {"kind": "off" | "sam" | "asam", "rho": 0.05, "eta": 0.01, "scope": "lora" | "A" | "B" | "head" | "all",
             "sync": "local" | "global", "ascent_loss": "total" | "task"},
     "adapters": "upstream" | "fp32",
     "measure": null | {"request": {...}, "folder": "/.../flatness"}}

``measure`` may be left out; what it holds, flatpatch.measurement.in_run says. So may ``keep``, the folder in which an
image run keeps its models (flatpatch.families.vision.keeping).

A run of one of the image repositories, whose single process learns all tasks, has ``"task_index": null, "task": null``
and ``"sync": "local", "ascent_loss": "total", "adapters": "upstream"``, and says where and on what it runs::

    "vision": {"device": null | "cpu" | "cuda:0" | "cuda:0,1",  null: as upstream's configuration says
               "data": null | "/.../data",     the folder that upstream's ./data stands for
               "weights": null | "/.../ViT-B_16.npz" | "/.../vit.safetensors",  null: as upstream fetches them
               "workers": null | 0,            processes that load images; null: as upstream says
               "model": null | {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4,
                                "mlp_ratio": 4.0},  null: upstream's ViT-B/16; without weights a random model
               "dataset": null | {"class": "package.module:Class", "seed": 0},  what "flatpatch_quick" stands for
               "sam_on": "both" | "task" | "distillation"}  which of CL-LoRA's two steps a batch takes SAM

``Class(seed=0)`` has the interface of upstream's own data sets: ``use_path``, ``train_trsf``, ``test_trsf``,
``common_trsf``, ``class_order``, and after ``download_data()`` also ``train_data``, ``train_targets``, ``test_data``,
``test_targets``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, did_you_mean

VARIABLE = "FLATPATCH_RUN"
SCHEMA = 1

_CHOICES = {
    "kind": ("off", "sam", "asam"),
    "scope": ("lora", "A", "B", "head", "all"),
    "sync": ("local", "global"),
    "ascent_loss": ("total", "task"),
}
_RADII = ("rho", "eta")
_VISION = ("device", "data", "weights", "workers", "model", "dataset", "sam_on")
_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
_SAM_ON = ("both", "task", "distillation")
# What has no meaning where one process without DeepSpeed learns all tasks, and the only value it may have there.
_FIXED_FOR_VISION = {"sam.sync": "local", "sam.ascent_loss": "total", "adapters": "upstream"}
_TOP = ("schema", "task_index", "task", "metrics", "progress", "summary", "sam", "adapters")


def read_description(path: Path) -> dict[str, Any]:
    """Read and check a run's description, reporting all its mistakes at once."""
    where = f"{VARIABLE}={path}"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} cannot be read as JSON: {error}. Unset {VARIABLE} to train without flatpatch."
        ) from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        found = run.get("schema") if isinstance(run, dict) else type(run).__name__
        raise UserError(f"{where} has schema {found!r}, expected {SCHEMA}. Start the run again with this flatpatch.")
    problems = _differences(run, (*_TOP, *(name for name in ("vision", "measure", "keep") if name in run)), where)
    settings = run.get("sam")
    if isinstance(settings, dict):
        problems += _differences(settings, (*_CHOICES, *_RADII), f"{where}: sam")
        for name, allowed in _CHOICES.items():
            if name in settings and settings[name] not in allowed:
                problems.append(f"{where}: sam.{name}={settings[name]!r} is not one of {', '.join(allowed)}")
        for name in _RADII:
            value = settings.get(name, 0.0)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                problems.append(f"{where}: sam.{name}={value!r} is not a number >= 0")
    elif "sam" in run:
        problems.append(f"{where}: sam is not an object")
    if run.get("adapters", "upstream") not in ("upstream", "fp32"):
        problems.append(f"{where}: adapters={run['adapters']!r} is not one of upstream, fp32")
    if not isinstance(run.get("keep"), str | None):
        problems.append(f"{where}: keep={run['keep']!r} is not null or a folder")
    if "vision" in run:
        problems += _vision_problems(run, where)
    if problems:
        raise UserError.collect(problems)
    return run


def _vision_problems(run: Mapping[str, Any], where: str) -> list[str]:
    vision = run["vision"]
    if not isinstance(vision, dict):
        return [f"{where}: vision is not an object"]
    problems = _differences(vision, _VISION, f"{where}: vision")
    device = vision.get("device")
    if not (device is None or (isinstance(device, str) and re.fullmatch(r"cpu|cuda:\d+(,\d+)*", device))):
        problems.append(f"{where}: vision.device={device!r} is not null, cpu or like cuda:0,1")
    for name in ("data", "weights"):
        path = vision.get(name)
        if not (path is None or (isinstance(path, str) and Path(path).exists())):
            problems.append(f"{where}: vision.{name}={path!r} does not exist")
    workers = vision.get("workers")
    if not (workers is None or (_is_whole(workers) and workers >= 0)):
        problems.append(f"{where}: vision.workers={workers!r} is not null or a whole number >= 0")
    if vision.get("sam_on") not in _SAM_ON:
        problems.append(f"{where}: vision.sam_on={vision.get('sam_on')!r} is not one of {', '.join(_SAM_ON)}")
    model, dataset = vision.get("model"), vision.get("dataset")
    if isinstance(model, dict):
        problems += _differences(model, _SIZES, f"{where}: vision.model")
        for name in _SIZES:
            value = model.get(name, 1)
            whole = _is_whole(value) or (name == "mlp_ratio" and isinstance(value, float))
            if not (whole and value > 0):
                problems.append(f"{where}: vision.model.{name}={value!r} is not a number > 0")
    elif model is not None:
        problems.append(f"{where}: vision.model is not null or an object")
    if isinstance(dataset, dict):
        problems += _differences(dataset, ("class", "seed"), f"{where}: vision.dataset")
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", str(dataset.get("class", "a:b"))):
            problems.append(f"{where}: vision.dataset.class={dataset['class']!r} is not like package.module:Class")
        if not _is_whole(dataset.get("seed", 0)):
            problems.append(f"{where}: vision.dataset.seed={dataset['seed']!r} is not a whole number")
    elif dataset is not None:
        problems.append(f"{where}: vision.dataset is not null or an object")
    settings = run.get("sam")
    given = (
        {f"sam.{name}": settings.get(name) for name in ("sync", "ascent_loss")} if isinstance(settings, dict) else {}
    )
    given |= {name: run.get(name) for name in ("adapters", "task_index", "task")}
    for name, value in given.items():
        if value != (only := _FIXED_FOR_VISION.get(name)):
            problems.append(f"{where}: {name}={value!r} has no meaning in a vision run, expected {json.dumps(only)}")
    return problems


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _differences(given: Mapping[str, Any], expected: tuple[str, ...], where: str) -> list[str]:
    unknown = [
        f"{where} has an unknown key {key!r}.{did_you_mean(key, expected)}" for key in given if key not in expected
    ]
    return unknown + [f"{where} has no {key!r}" for key in expected if key not in given]

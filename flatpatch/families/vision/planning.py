"""Plan a run of an image method: one seed, one process of upstream's ``main.py`` that learns all tasks in turn.

Its settings are the JSON configuration upstream ships, read when the run starts. Upstream lets the JSON win over its
command line, so whatever differs goes into a changed copy of that JSON in the run's work folder.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flatpatch import patches
from flatpatch.errors import FlatpatchError, UserError, named_path
from flatpatch.families import choices
from flatpatch.families.base import BYTES_NEEDED, Deviation, Machine, Plan, Stage
from flatpatch.families.vision import data, quick
from flatpatch.families.vision.configuration import (
    REFERENCE_DEFAULTS,
    ConfigEditor,
    known_keys,
    override,
    read_config,
    task_classes,
)
from flatpatch.families.vision.keeping import kept_file
from flatpatch.families.vision.results import CONFIG, LOGS, MODELS, PROCESS, QUICK_DATASET, RESULTS
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.files import ROOT, file_hash, folder_problems
from flatpatch.settings import Request, Settings, as_default, in_name

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn")
QUICK_CLASS = "flatpatch.families.vision.quick:QuickImages"
# A saved ViT-B/16 with its adapters, of which some repositories' code saves one after every task.
BYTES_OF_A_MODEL = 400 * 2**20


def make_plan(upstream: VisionUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """Plan a run; see :class:`flatpatch.families.base.Family`."""
    settings = request.settings
    available = machine.cuda_devices
    profile, profile_reason = choices.choose_profile(settings.profile, upstream, available)
    is_quick = profile == "quick"
    engine, engine_reason = choices.choose_engine(settings.engine, upstream, profile)
    request = _checked(upstream, request, profile, profile_reason, engine, engine_reason)
    notes = list(request.notes)
    lacks: list[str] = []
    request = choices.own_threads(request, profile, notes)
    settings = request.settings
    device, devices = choices.choose_device(request, profile, available, dry_run, lacks)
    if device == "cuda" and settings.device.strip() in ("auto", "cuda"):
        devices = devices[:1]  # as upstream's commands; several only where they are named
    verified = choices.find_checkout(upstream, engine, notes)
    file = upstream.config(settings.variant, settings.benchmark) if upstream.configs else None
    shipped = read_config(verified.checkout / file) if verified and file else {}

    editor = ConfigEditor(shipped or REFERENCE_DEFAULTS)
    if engine == "reference" and upstream.repository:
        editor.note("engine", f"the authors' {upstream.repository}", "our reference implementation", engine_reason)
    if is_quick:
        for key, value in {"dataset": QUICK_DATASET, **quick.PRESET, **upstream.quick}.items():
            if verified or key in REFERENCE_DEFAULTS:
                editor.set(key, value, "profile quick: small images and model of ours, minutes on two CPU cores")
    if profile == "paper":
        for argument, why in upstream.paper_arguments(str(file)):
            editor.set(argument.argument, argument.value, why)
        notes.append("where else paper and repository differ, the repository's way runs: see DEVIATIONS.md")
    request = _choose_seed(request, editor, file)
    if verified and device == "cuda" and "device" in shipped:
        editor.set("device", _upstream_devices(devices).split(","), "the chosen GPUs, counted from 0")
    off_protocol = _check_devices(upstream, shipped, file, devices, dry_run, lacks)
    if verified and device == "cpu":
        editor.note("device", "cuda:0", "cpu", "setting device=" if settings.device != "auto" else "no GPU here")
        off_protocol = not is_quick
        if not is_quick:
            notes.append(
                "WARNING: a ViT-B/16 on the CPU. The authors' GPU took over an hour for a seed of CIFAR-100 or "
                "ImageNet-R (InfLoRA's logs); expect a CPU to take many times that. profile=quick takes minutes."
            )
    known = known_keys(verified.checkout, verified.checkout / str(file)) if verified else set(REFERENCE_DEFAULTS)
    before = dict(editor.current)
    override(editor, request.overrides, known, upstream, quick=is_quick)
    dataset = None if is_quick else _dataset(upstream, editor)
    classes = quick.CLASSES if dataset is None else dataset.classes
    for key, value in upstream.follow(editor.current, request.overrides, classes).items():
        editor.set(key, value, "follows from " + ", ".join(f"upstream.{name}=" for name in request.overrides))
    idle = [key for key in request.overrides if key in before and editor.current[key] == before[key]]
    request = choices.without_idle(request, idle, notes)
    off_protocol |= bool(request.overrides)
    model = quick.MODEL if is_quick else {"embed_dim": 768, "depth": 12}
    ranges = task_classes(editor.current, classes, upstream, width=int(model["embed_dim"]), blocks=int(model["depth"]))

    root = named_path("data", settings.data).absolute() if settings.data else ROOT / "data"
    weights: Path | None = quick.WEIGHTS
    inputs = {quick.WEIGHTS.name: file_hash(quick.WEIGHTS)}
    if dataset is not None:
        assert verified is not None
        timm_name = upstream.pretrained(editor.current)
        weights, inputs = _find_inputs(request, dataset, timm_name, verified.checkout, root, dry_run, notes, lacks)
        theirs = data.weights_file(timm_name)
        if settings.model and weights and weights.name != theirs:
            editor.note("pretrained weights", theirs, weights.name, "setting model=")
            off_protocol = True
    said, differences = upstream.note_images(inputs, root, verified.checkout) if verified else ([], [])
    more, others = upstream.note_variant(settings)
    notes += [*said, *more]
    editor.extra += [*differences, *others]
    if verified and is_quick:
        editor.note("model", "ViT-B/16, pretrained", "a small ViT of ours", "profile quick")
        if "num_workers" not in shipped:
            editor.note("processes that load images", "8", "0", "profile quick: images in memory")

    folder = _run_folder(request, profile, engine)
    names = tuple(f"{first}-{last}" for first, last in ranges)
    contract = {
        "task_index": None,
        "task": None,
        "tasks": names,
        "vision": {
            "device": "cpu" if device == "cpu" else f"cuda:{_upstream_devices(devices)}",
            "data": None if is_quick else str(root),
            "weights": str(weights) if weights else None,
            "workers": 0 if is_quick else None,
            "model": dict(quick.MODEL) if is_quick else None,
            "dataset": {"class": QUICK_CLASS, "seed": 0} if is_quick else None,
            "sam_on": settings.sam_on,
        },
    }
    models = Path("tasks") / PROCESS / MODELS
    if verified:
        contract["keep"] = {"folder": str(folder / models), "names": upstream.kept}
    own = {"method": settings.method} if engine == "reference" else {}
    benchmark = _benchmark_name(upstream, settings, profile)
    shuffled = " in shuffled order" if editor.current.get("shuffle") else ""
    threads = choices.choose_threads(request, profile)
    saves = len(ranges) if upstream.saves_models and not is_quick else 0
    plan = Plan(
        request=request,
        upstream=upstream,
        profile=profile,
        profile_reason=profile_reason,
        engine=engine,
        engine_reason=engine_reason,
        device=device,
        devices=devices,
        world_size=1,
        launcher="python",
        verified=verified,
        folder=folder,
        tasks=names,
        stages=(
            Stage(
                name=f"tasks 1-{len(ranges)}",
                title=f"tasks 1-{len(ranges)}",
                folder=PROCESS,
                tasks=tuple(range(len(ranges))),
                command=_command(upstream, engine, devices),
                contract=contract,
                output=LOGS,
                results=(f"work/{LOGS}/**/*.log",)
                if verified
                else (f"work/{LOGS}/{RESULTS}", f"work/{LOGS}/tasks/*.safetensors"),
                # The reference engine keeps its own checkpoints.
                models={task: str(kept_file(models, task)) for task in range(len(ranges))} if verified else {},
            ),
        ),
        sequence=f"{benchmark}: {len(ranges)} tasks, classes {' '.join(names[:2])} ...{shuffled}",
        benchmark=benchmark,
        deviations=(*editor.deviations(), *_library_deviations(upstream, verified))
        if verified
        else tuple(editor.extra),
        environment=choices.environment(device, devices, threads),
        libraries=LIBRARIES,
        threads=threads,
        links={} if is_quick else {"data": root},
        own_folders=(LOGS, "data"),
        files={CONFIG: json.dumps({**editor.current, **own}, indent=4) + "\n"},
        inputs=inputs,
        recipe=_recipe(upstream, editor, str(file) if verified and file else "", is_quick),
        notes=tuple(notes),
        lacks=tuple(lacks),
        off_protocol=off_protocol,
        bytes_needed=BYTES_NEEDED + saves * BYTES_OF_A_MODEL,
        trained_by=(str(editor.current["model_name"]).lower(),) if verified else (),
        perturbed_losses=() if settings.sam_on == "both" else (settings.sam_on,),
    )
    if not dry_run and (problems := folder_problems(plan.folder, plan.bytes_needed)):
        raise UserError.collect(problems)
    return plan


def _checked(
    upstream: VisionUpstream, request: Request, profile: str, profile_reason: str, engine: str, engine_reason: str
) -> Request:
    """Refuse what profile or engine cannot do; return the request with what names a default left out."""
    settings = request.settings
    choices.check_reference(upstream, engine, settings.engine)
    if profile == "quick" and (given := [key for key in ("benchmark", "data", "model") if getattr(settings, key)]):
        raise UserError(
            f"{', '.join(f'{key}=' for key in given)} has no meaning in profile quick ({profile_reason}), which has "
            f"images and a model of its own. Leave it out, or use profile=upstream (without a GPU also device=cpu)."
        )
    if profile == "paper" and not any(conflict.arguments for conflict in upstream.conflicts):
        raise UserError(
            f"no argument is known here that {upstream.title}'s paper has otherwise than its configurations, so "
            "that profile=paper has nothing to follow. Use profile=upstream."
        )
    if upstream.configs:
        variant = settings.variant or next(iter(upstream.configs))
        request = as_default(request, "benchmark", next(iter(upstream.configs[variant])))
        request = as_default(request, "variant", next(iter(upstream.configs)))
        settings = request.settings
    if engine == "reference" and settings.variant:
        asked = settings.engine == "reference"
        raise UserError(
            f"variant={settings.variant} needs the authors' code: the reference engine has {upstream.title} alone. "
            "Leave out variant=, or "
            f"{'leave out engine=reference' if asked else f'fetch the code ({engine_reason})'}.\n"
            f"The code comes with: {choices.fetch_command(upstream)}"
        )
    return request


def _check_devices(
    upstream: VisionUpstream,
    shipped: Mapping[str, Any],
    file: str | None,
    devices: tuple[str, ...],
    dry_run: bool,
    lacks: list[str],
) -> bool:
    """Tell whether several GPUs take the run off upstream's protocol; a model whose code needs several has them."""
    several = shipped.get("model_name") in upstream.several_gpus
    if several and len(devices) < 2:
        lack = (
            f"{upstream.title}'s code of {shipped['model_name']} ({file}) stops on a single device: it needs two GPUs "
            "or more. Name them with device=0,1, or choose another variant= or benchmark=."
        )
        if not dry_run:
            raise UserError(lack)
        lacks.append(lack)
    return len(devices) > 1 and not several


def _command(upstream: VisionUpstream, engine: str, devices: tuple[str, ...]) -> tuple[str, ...]:
    """Return what Python is given to learn all tasks."""
    if engine == "reference":
        return ("-m", "flatpatch.families.vision.reference", CONFIG)
    return tuple(word.format(devices=_upstream_devices(devices), config=CONFIG) for word in upstream.command)


def _recipe(upstream: VisionUpstream, editor: ConfigEditor, config_file: str, is_quick: bool) -> tuple[str, ...]:
    """Return the values of the configuration that reach the run, and what upstream ships where it differs."""
    file = config_file or "InfLoRA's configs/cifar100_inflora.json (what the reference engine takes of it)"
    lines = [f"Configuration, from {file}; its own value stands in brackets where it differs:"]
    unread = []
    for key, value in editor.current.items():
        if upstream.why_unread(editor.current, key, quick=is_quick):
            unread.append(key)
            continue
        shown = f"  {key} = {json.dumps(value)}"
        if key not in editor.shipped:
            shown += "  (upstream's has none)" if config_file else ""
        elif editor.shipped[key] != value:
            shown += f"  (there: {json.dumps(editor.shipped[key])})"
        lines.append(shown)
    return (*lines, *([f"  left out, as these have no effect: {', '.join(unread)}"] if unread else []))


def _upstream_devices(devices: tuple[str, ...]) -> str:
    """Return the devices as upstream counts them, which sees the chosen ones alone."""
    return ",".join(str(number) for number in range(max(1, len(devices))))


def _choose_seed(request: Request, editor: ConfigEditor, file: str | None) -> Request:
    """Put the one seed into the configuration, and say where it came from."""
    listed = editor.shipped.get("seed")
    if request.sources["seed"] == "default" and listed:
        source = f"{file}: the first of {listed}"
        request = dataclasses.replace(
            request,
            settings=dataclasses.replace(request.settings, seed=listed[0]),
            sources={**request.sources, "seed": source},
        )
    editor.set("seed", [request.settings.seed], "one run trains one seed")
    return request


def _dataset(upstream: VisionUpstream, editor: ConfigEditor) -> data.Dataset:
    """Return what is said of the images of a configuration.

    Raises:
        FlatpatchError: If nothing is.
    """
    name = editor.current["dataset"].lower()
    if name not in upstream.datasets:
        raise FlatpatchError(f"{upstream.title}: the row does not say what must be there of the data set '{name}'.")
    return upstream.datasets[name]


def _find_inputs(
    request: Request,
    dataset: data.Dataset,
    timm_name: str,
    checkout: Path,
    root: Path,
    dry_run: bool,
    notes: list[str],
    lacks: list[str],
) -> tuple[Path | None, dict[str, str]]:
    """Find images and weights and check them; what is missing stops a run, and a dry one says it."""
    problems: list[str] = []
    inputs: dict[str, str] = {}
    weights = None
    try:
        found, more = data.check_images(dataset, root, checkout)
        inputs |= found
        notes += more
    except UserError as error:
        problems.append(str(error))
    try:
        caches = (ROOT / "models", Path(torch.hub.get_dir()) / "checkpoints")
        weights = data.find_weights(timm_name, request.settings.model, caches)
        inputs[weights.name] = file_hash(weights)
    except UserError as error:
        problems.append(str(error))
    if problems and not dry_run:
        raise UserError.collect(problems)
    lacks += problems
    return weights, inputs


def _library_deviations(upstream: VisionUpstream, verified: patches.Verified) -> list[Deviation]:
    """Compare the versions that upstream names with what is installed."""
    known = {"python": platform.python_version(), "cudatoolkit": torch.version.cuda}
    named = upstream.named_versions(verified.checkout)
    return choices.library_deviations(named, "not installed under that name", known)


def _run_folder(request: Request, profile: str, engine: str) -> Path:
    settings = request.settings
    name = settings.run
    if not name:
        parts = [settings.variant or settings.method, settings.benchmark, profile, engine, settings.sam]
        if settings.sam != "off":
            parts.append(f"rho{settings.rho:g}")
        parts += [
            f"{key}{value}" for key, value in in_name(settings, ("eta", "scope", "sam_on", "device", "threads")).items()
        ]
        parts += ["measured"] if settings.measuring is not None else []
        parts += [f"{key}{value}" for key, value in request.overrides.items()]
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join([*filter(None, parts), f"seed{settings.seed}"]))
    return (named_path("output", settings.output) / name).absolute()


def _benchmark_name(upstream: VisionUpstream, settings: Settings, profile: str) -> str:
    if profile == "quick":
        return "quick images"
    files = upstream.configs[settings.variant or next(iter(upstream.configs))]
    return settings.benchmark or next(iter(files))

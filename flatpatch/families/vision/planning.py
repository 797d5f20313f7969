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
from flatpatch.checkpoints import KEPT
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
from flatpatch.settings import DEFAULTS, OF_SAM_NAMED, Request, as_default, effective_settings, in_name, shown

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn")
QUICK_CLASS = "flatpatch.families.vision.quick:QuickImages"
RECORD_CLASS = "flatpatch.families.vision.cifar:CIFAR100Images"
# What the experiment record's script for these images does not say, or has otherwise.
OURS = (
    "which pretrained weights of a ViT-B/16 on ImageNet-21k; SAM's scope, the classes' order; LoRA on keys and values; "
    "its update is not scaled, where the record's alpha of 32 at rank 8 makes it 4 times as large"
)
# A saved ViT-B/16 with its adapters, of which some repositories' code saves one after every task.
BYTES_OF_A_MODEL = 400 * 2**20
_MODELS_IN_CHECKPOINTS = 2 * (KEPT + 1)  # the one being written too; some learners hold a second ViT


def make_plan(upstream: VisionUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """Plan a run; see :class:`flatpatch.families.base.Family`."""
    draft = choices.choose_engine_of(upstream, request, machine, dry_run=dry_run)
    draft.request = _checked(upstream, draft)
    draft.find_machine(machine)
    settings = draft.request.settings
    if draft.device == "cuda" and settings.device.strip() in ("auto", "cuda"):
        draft.devices = draft.devices[:1]  # as upstream's commands; several only where they are named
    verified, is_quick = draft.verified, draft.is_quick
    if draft.engine == "upstream":
        choices.refuse_ledger(draft)  # the network in training answers through the present task's classes alone
    if verified and effective_settings(settings).ascent_batch != 1:
        raise UserError(
            f"ascent_batch={settings.ascent_batch:g}: the authors' loop has passed the whole batch before SAM has its "
            "turn, so the ascent cannot be on a part of it. Leave ascent_batch out, or use engine=reference."
        )
    file = upstream.config(settings.variant, settings.benchmark) if upstream.configs else None
    own_keys = {**REFERENCE_DEFAULTS, **upstream.choices}
    editor = ConfigEditor(read_config(verified.checkout / file) if verified and file else own_keys)
    off_protocol = _configure(upstream, draft, editor, file)
    dataset = None if is_quick else _dataset(upstream, draft, editor)
    classes = quick.CLASSES if dataset is None else dataset.classes
    off_protocol |= _override(upstream, draft, editor, file, classes)
    off_protocol |= _lengthen(upstream, draft, editor) or settings.fraction < 1
    model = quick.MODEL if is_quick else {"embed_dim": 768, "depth": 12}
    ranges = task_classes(editor.current, classes, upstream, width=int(model["embed_dim"]), blocks=int(model["depth"]))

    root = named_path("data", settings.data).absolute() if settings.data else ROOT / "data"
    weights: Path | None = quick.WEIGHTS
    inputs = {quick.WEIGHTS.name: file_hash(quick.WEIGHTS)}
    if dataset is not None:
        timm_name = upstream.pretrained(editor.current) if verified else upstream.record_weights
        weights, inputs = _find_inputs(draft, dataset, timm_name, root)
        theirs = data.weights_file(timm_name)
        if settings.model and weights and weights.name != theirs:
            editor.note("pretrained weights", theirs, weights.name, "setting model=")
            off_protocol = True
    _note_what_is_here(upstream, draft, editor, inputs, root)

    names = tuple(f"{first}-{last}" for first, last in ranges)
    names = _first_tasks(draft, editor, names)
    folder = _run_folder(draft)
    settings = draft.request.settings
    if settings.fraction < 1:
        why = f"setting fraction=: drawn by seed {settings.seed}, the classes in their proportions"
        editor.note("training examples of each task", "all", f"a share of {settings.fraction:g}", why)
    own: dict[str, Any] = {}
    if draft.engine == "reference":
        own = {"method": settings.method, "tuning": settings.tuning, "fraction": settings.fraction}
        own |= {"schedule": upstream.record["schedule"]} if draft.is_record else {}
        own |= {"tasks": len(names)} if settings.tasks else {}
    benchmark = _benchmark_name(upstream, draft)
    shuffled = " in shuffled order" if editor.current.get("shuffle") else ""
    saves = len(ranges) if upstream.saves_models and not is_quick else 0
    if settings.checkpointing is not None and not is_quick:
        saves += _MODELS_IN_CHECKPOINTS
    plan = Plan(
        **draft.facts(),
        world_size=1,
        launcher="python",
        folder=folder,
        tasks=names,
        stages=(_stage(upstream, draft, folder, names, root, weights),),
        sequence=f"{benchmark}: {len(names)} tasks, classes {' '.join(names[:2])} ...{shuffled}",
        benchmark=benchmark,
        deviations=(*editor.deviations(), *_library_deviations(upstream, verified))
        if verified
        else tuple(editor.extra),
        environment=choices.environment(draft.device, draft.devices, draft.threads),
        libraries=LIBRARIES,
        links={} if is_quick else {"data": root},
        own_folders=(LOGS, "data"),
        files={CONFIG: json.dumps({**editor.current, **own}, indent=4) + "\n"},
        inputs=inputs,
        recipe=_recipe(upstream, editor, str(file) if verified and file else "", is_quick),
        off_protocol=off_protocol or bool(settings.tasks),
        bytes_needed=BYTES_NEEDED + saves * BYTES_OF_A_MODEL,
        trained_by=(str(editor.current["model_name"]).lower(),) if verified else (),
        perturbed_losses=() if settings.sam_on == "both" else (settings.sam_on,),
    )
    if not dry_run and (problems := folder_problems(plan.folder, plan.bytes_needed)):
        raise UserError.collect(problems)
    return plan


def _configure(upstream: VisionUpstream, draft: choices.Draft, editor: ConfigEditor, file: str | None) -> bool:
    """Set what engine, profile, seed and device ask for; tell whether that takes the run off upstream's protocol."""
    verified, settings = draft.verified, draft.request.settings
    if draft.engine == "reference" and upstream.repository:
        theirs = f"the authors' {upstream.repository}"
        editor.note("engine", theirs, "our reference implementation", draft.engine_reason)
    if draft.is_quick:
        for key, value in {"dataset": QUICK_DATASET, **quick.PRESET, **upstream.quick}.items():
            if verified or key in REFERENCE_DEFAULTS:
                editor.set(key, value, "profile quick: small images and model of ours, minutes on two CPU cores")
    if draft.is_record:
        for key in upstream.record.keys() & REFERENCE_DEFAULTS.keys():
            editor.set(key, upstream.record[key], "profile record: the experiment record's script")
        draft.notes.append(f"ours, as the record does not state it or has it otherwise: {OURS}")
    if draft.profile == "paper":
        for argument, why in upstream.paper_arguments(str(file)):
            editor.set(argument.argument, argument.value, why)
        draft.notes.append("where else paper and repository differ, the repository's way runs: see DEVIATIONS.md")
    draft.request = _choose_seed(draft.request, editor, file)
    if verified and draft.device == "cuda" and "device" in editor.shipped:
        editor.set("device", _upstream_devices(draft.devices).split(","), "the chosen GPUs, counted from 0")
    several = editor.shipped.get("model_name") in upstream.several_gpus
    if several and len(draft.devices) < 2:
        draft.lack(
            f"{upstream.title}'s code of {editor.shipped['model_name']} ({file}) stops on a single device: it needs "
            "two GPUs or more. Name them with device=0,1, or choose another variant= or benchmark=."
        )
    if not (verified and draft.device == "cpu"):
        return len(draft.devices) > 1 and not several
    editor.note("device", "cuda:0", "cpu", "setting device=" if settings.device != "auto" else "no GPU here")
    if not draft.is_quick:
        draft.notes.append(
            "WARNING: a ViT-B/16 on the CPU. The authors' GPU took over an hour for a seed of CIFAR-100 or "
            "ImageNet-R (InfLoRA's logs); expect a CPU to take many times that. profile=quick takes minutes."
        )
    return not draft.is_quick


def _override(
    upstream: VisionUpstream, draft: choices.Draft, editor: ConfigEditor, file: str | None, classes: int
) -> bool:
    """Set what ``upstream.<key>=`` asks for and what follows from it; tell whether anything was changed."""
    checkout = draft.verified.checkout if draft.verified else None
    known = known_keys(checkout, checkout / str(file)) if checkout else {*REFERENCE_DEFAULTS, *upstream.choices}
    before = dict(editor.current)
    overrides = draft.request.overrides
    override(editor, overrides, known, upstream, quick=draft.is_quick)
    for key, value in upstream.follow(editor.current, overrides, classes).items():
        editor.set(key, value, "follows from " + ", ".join(f"upstream.{name}=" for name in overrides))
    idle = [key for key in overrides if key in before and editor.current[key] == before[key]]
    draft.request = choices.without_idle(draft.request, idle, draft.notes)
    return bool(draft.request.overrides)


def _first_tasks(draft: choices.Draft, editor: ConfigEditor, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks to learn, all or so many of the first as ``tasks=`` says.

    Raises:
        UserError: If that is not a number of them.
    """
    asked, most = draft.request.settings.tasks, len(names)
    if not asked:
        return names
    if not (asked.isascii() and asked.isdecimal() and len(asked) < 9 and 1 <= int(asked) <= most):
        raise UserError(f"tasks={asked}: expected how many of the first to learn, from 1 to {most}, e.g. tasks=1.")
    # The same number in other digits makes no other run, and all of them are what leaving it out means.
    settings = dataclasses.replace(draft.request.settings, tasks=str(int(asked)))
    draft.request = as_default(dataclasses.replace(draft.request, settings=settings), "tasks", str(most))
    kept = names[: int(asked)]
    if len(kept) < most:
        editor.note("tasks", ", ".join(names), ", ".join(kept), "setting tasks=")
    return kept


def _lengthen(upstream: VisionUpstream, draft: choices.Draft, editor: ConfigEditor) -> bool:
    """Train every task as many times as long; tell whether that changed anything."""
    budget = draft.request.settings.budget
    if budget == 1:
        return False
    for key in upstream.epochs:
        value = editor.current.get(key)
        if value and not upstream.why_unread(editor.current, key, quick=draft.is_quick):
            longer = [budget * epoch for epoch in value] if isinstance(value, list) else budget * value
            editor.set(key, longer, f"setting budget={budget}")
    editor.note("budget", "1", str(budget), f"setting budget=: {budget} times as many epochs of every task")
    draft.notes += upstream.note_budget(editor.current)
    return True


def _note_what_is_here(
    upstream: VisionUpstream, draft: choices.Draft, editor: ConfigEditor, inputs: Mapping[str, str], root: Path
) -> None:
    """Note what the row says of images and variant, and what is small in a quick run."""
    said: tuple[list[str], list[Deviation]] = ([], [])
    if draft.verified:
        said = upstream.note_images(inputs, root, draft.verified.checkout)
    for notes, deviations in (said, upstream.note_variant(draft.request.settings)):
        draft.notes += notes
        editor.extra += deviations
    if draft.verified and draft.is_quick:
        editor.note("model", "ViT-B/16, pretrained", "a small ViT of ours", "profile quick")
        if "num_workers" not in editor.shipped:
            editor.note("processes that load images", "8", "0", "profile quick: images in memory")


def _stage(
    upstream: VisionUpstream,
    draft: choices.Draft,
    folder: Path,
    names: tuple[str, ...],
    root: Path,
    weights: Path | None,
) -> Stage:
    """Return the one process of the run."""
    is_quick = draft.is_quick
    images = QUICK_CLASS if is_quick else RECORD_CLASS
    contract: dict[str, Any] = {
        "task_index": None,
        "task": None,
        "tasks": names,
        "vision": {
            "device": "cpu" if draft.device == "cpu" else f"cuda:{_upstream_devices(draft.devices)}",
            "data": None if is_quick else str(root),
            "weights": str(weights) if weights else None,
            "workers": 0 if is_quick else None,
            "model": dict(quick.MODEL) if is_quick else None,
            "dataset": None if draft.verified and not is_quick else {"class": images, "seed": 0},
            "sam_on": draft.request.settings.sam_on,
        },
    }
    results: tuple[str, ...] = (f"work/{LOGS}/{RESULTS}", f"work/{LOGS}/tasks/*.safetensors")
    kept: dict[int, str] = {}  # the reference engine keeps its own checkpoints
    if draft.verified:
        models = Path("tasks") / PROCESS / MODELS
        contract["keep"] = {"folder": str(folder / models), "names": upstream.kept}
        results = (f"work/{LOGS}/**/*.log",)
        kept = {task: str(kept_file(models, task)) for task in range(len(names))}
    title = f"tasks 1-{len(names)}"
    return Stage(
        name=title,
        title=title,
        folder=PROCESS,
        tasks=tuple(range(len(names))),
        command=_command(upstream, draft.engine, draft.devices),
        contract=contract,
        output=LOGS,
        results=results,
        models=kept,
    )


def _checked(upstream: VisionUpstream, draft: choices.Draft) -> Request:
    """Refuse what profile or engine cannot do; return the request with what names a default left out."""
    request, settings = draft.request, draft.request.settings
    if draft.engine != "reference" and (
        given := [key for key in ("tasks", "fraction") if getattr(settings, key) != DEFAULTS[key]]
    ):
        raise UserError(
            f"{', '.join(f'{key}={shown(getattr(settings, key))}' for key in given)}: the authors' code learns every "
            "task of a configuration from all its images. Leave it out, or use engine=reference where the method has "
            "it."
        )
    if draft.is_quick and (given := [key for key in ("benchmark", "data", "model") if getattr(settings, key)]):
        raise UserError(
            f"{', '.join(f'{key}=' for key in given)} has no meaning in profile quick ({draft.profile_reason}), which "
            f"has images and a model of its own. Leave it out, or use profile=upstream (without a GPU also device=cpu)."
        )
    if draft.profile == "paper" and not any(conflict.arguments for conflict in upstream.conflicts):
        raise UserError(
            f"no argument is known here that {upstream.title}'s paper has otherwise than its configurations, so "
            "that profile=paper has nothing to follow. Use profile=upstream."
        )
    if upstream.configs:
        variant = settings.variant or next(iter(upstream.configs))
        request = as_default(request, "benchmark", next(iter(upstream.configs[variant])))
        request = as_default(request, "variant", next(iter(upstream.configs)))
        settings = request.settings
    if draft.engine == "reference" and settings.variant:
        asked = settings.engine == "reference"
        raise UserError(
            f"variant={settings.variant} needs the authors' code: the reference engine has {upstream.title} alone. "
            "Leave out variant=, or "
            f"{'leave out engine=reference' if asked else f'fetch the code ({draft.engine_reason})'}.\n"
            f"The code comes with: {choices.fetch_command(upstream)}"
        )
    return request


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


def _dataset(upstream: VisionUpstream, draft: choices.Draft, editor: ConfigEditor) -> data.Dataset:
    """Return what is said of the images of a configuration.

    Raises:
        FlatpatchError: If nothing is.
    """
    if draft.is_record:
        return data.CIFAR100
    name = editor.current["dataset"].lower()
    if name not in upstream.datasets:
        raise FlatpatchError(f"{upstream.title}: the row does not say what must be there of the data set '{name}'.")
    return upstream.datasets[name]


def _find_inputs(
    draft: choices.Draft, dataset: data.Dataset, timm_name: str, root: Path
) -> tuple[Path | None, dict[str, str]]:
    """Find images and weights and check them; what is missing stops a run, and a dry one says it."""
    problems: list[str] = []
    inputs: dict[str, str] = {}
    weights = None
    try:
        found, notes = data.check_images(dataset, root, draft.verified.checkout if draft.verified else None)
        inputs |= found
        draft.notes += notes
    except UserError as error:
        problems.append(str(error))
    try:
        caches = (ROOT / "models", Path(torch.hub.get_dir()) / "checkpoints")
        weights = data.find_weights(timm_name, draft.request.settings.model, caches)
        inputs[weights.name] = file_hash(weights)
    except UserError as error:
        problems.append(str(error))
    if problems and not draft.dry_run:
        raise UserError.collect(problems)
    draft.lacks += problems
    return weights, inputs


def _library_deviations(upstream: VisionUpstream, verified: patches.Verified) -> list[Deviation]:
    """Compare the versions that upstream names with what is installed."""
    known = {"python": platform.python_version(), "cudatoolkit": torch.version.cuda}
    named = upstream.named_versions(verified.checkout)
    return choices.library_deviations(named, "not installed under that name", known)


def _run_folder(draft: choices.Draft) -> Path:
    settings = draft.request.settings
    name = settings.run
    if not name:
        parts = [settings.variant or settings.method, settings.benchmark, draft.profile, draft.engine]
        parts.append(settings.sam)
        if settings.sam != "off":
            parts.append(f"rho{settings.rho:g}")
        keys = (*OF_SAM_NAMED, "tuning", "budget", "fraction", "tasks", "device", "threads")
        parts += [f"{key}{value}" for key, value in in_name(settings, keys).items()]
        parts += ["measured"] if settings.measuring is not None else []
        parts += [f"{key}{value}" for key, value in draft.request.overrides.items()]
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join([*filter(None, parts), f"seed{settings.seed}"]))
    return (named_path("output", settings.output) / name).absolute()


def _benchmark_name(upstream: VisionUpstream, draft: choices.Draft) -> str:
    settings = draft.request.settings
    if draft.is_quick:
        return "quick images"
    if draft.is_record:
        return "CIFAR-100 in tasks of five classes"
    files = upstream.configs[settings.variant or next(iter(upstream.configs))]
    return settings.benchmark or next(iter(files))

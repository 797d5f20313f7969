"""Plan a run of an image method: one seed, one process of upstream's ``main.py`` that learns all tasks in turn.

Its settings are the JSON configuration upstream ships, read when the run starts. Upstream lets the JSON win over its
command line, so whatever differs goes into a changed copy of that JSON in the run's work folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flatpatch import patches
from flatpatch.errors import UserError, named_path
from flatpatch.families.choices import choose_device, choose_engine, choose_profile, find_upstream
from flatpatch.families.text.changes import Deviation, Stage
from flatpatch.families.text.planning import (
    BYTES_NEEDED,
    ROOT,
    Plan,
    folder_problems,
    own_threads,
    paper_arguments,
    without_idle,
)
from flatpatch.families.vision import data as vision_data
from flatpatch.families.vision import quick as quick_vision
from flatpatch.families.vision import splits
from flatpatch.families.vision.configuration import ConfigEditor, known_keys, override, read_config, task_classes
from flatpatch.families.vision.unread import why_unread
from flatpatch.settings import Request, as_default, in_name
from flatpatch.upstreams import METHODS, Method

CONFIG = "flatpatch-config.json"  # the changed copy, in the work folder
QUICK_DATASET = "flatpatch_quick"  # the name under which the hooks give upstream our images
QUICK_CLASS = "flatpatch.families.vision.quick:QuickImages"
# Models of InfLoRA's whose code takes the network out of its DataParallel wrapper whether there is one or not.
SEVERAL_GPUS = ("InfLoRA_CA1", "InfLoRA_domain", "InfLoRAb5_domain")
# A saved ViT-B/16 with its adapters; InfLoRA's code saves one after every task.
BYTES_OF_A_MODEL = 400 * 2**20
# What the reference engine is told, in InfLoRA's spelling, with the values of its configs/cifar100_inflora.json.
REFERENCE_DEFAULTS: Mapping[str, Any] = {
    "init_cls": 10,
    "increment": 10,
    "batch_size": 128,
    "rank": 10,
    "lamb": 0.95,
    "lame": 1.0,
    "shuffle": False,
    "epochs": 20,
    "lrate": 0.0005,
    "weight_decay": 0.0,
    "optim": "adam",
}


@dataclass(frozen=True)
class AllTasks:
    """The one process of an image run."""

    name: str
    folder: str = "all"


@dataclass(frozen=True)
class VisionPlan(Plan):
    """Everything that a run of an image method will do."""

    config: Mapping[str, Any] = field(default_factory=dict)
    shipped: Mapping[str, Any] = field(default_factory=dict)  # upstream's, from which config was made
    config_file: str = ""  # of upstream's; empty for the reference engine
    classes: tuple[tuple[int, int], ...] = ()  # first and last class of each task, in upstream's order
    hook: Mapping[str, Any] = field(default_factory=dict)  # "vision" of the hooks' description
    inputs: Mapping[str, str] = field(default_factory=dict)  # hashes for the record

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The processes of the run: one for all tasks."""
        return (AllTasks(f"tasks 1-{len(self.classes)}"),)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, each named by its classes."""
        return tuple(f"{first}-{last}" for first, last in self.classes)

    def title(self, stage: Stage) -> str:
        """Return how the process is called on the terminal."""
        return stage.name

    @property
    def sequence(self) -> str:
        """What is learned, in a few words."""
        order = " in shuffled order" if self.config.get("shuffle") else ""
        return f"{self.benchmark}: {len(self.classes)} tasks, classes {' '.join(self.task_names[:2])} ...{order}"

    def command(self, stage: Stage, python: str, port: int) -> list[str]:
        """Return the words of the command that runs all tasks."""
        if self.engine == "reference":
            return [python, "-m", "flatpatch.families.vision.reference.process", CONFIG]
        if not self.method.config_flag:  # CL-LoRA names its devices in the configuration
            return [python, "main.py", CONFIG]
        return [python, "main.py", "--device", _upstream_devices(self.devices), *self.method.config_flag, CONFIG]

    def recipe(self) -> list[str]:
        """Return the values of the configuration that reach the run, and what upstream ships where it differs."""
        file = self.config_file or "InfLoRA's configs/cifar100_inflora.json (what the reference engine takes of it)"
        quick = self.profile == "quick"
        lines = [f"Configuration, from {file}; its own value stands in brackets where it differs:"]
        for key, value in self.config.items():
            if why_unread(self.config, key, quick=quick):
                continue
            shown = f"  {key} = {json.dumps(value)}"
            if key not in self.shipped:
                shown += "  (upstream's has none)" if self.config_file else ""
            elif self.shipped[key] != value:
                shown += f"  (there: {json.dumps(self.shipped[key])})"
            lines.append(shown)
        unread = [key for key in self.config if why_unread(self.config, key, quick=quick)]
        if unread:
            lines.append(f"  left out, as these have no effect: {', '.join(unread)}")
        return lines

    def executes(self, path: str) -> bool:
        """Tell whether the run trains by a patched file: each model of upstream's has its own."""
        return Path(path).stem == str(self.config["model_name"]).lower()

    def perturbs(self, call: str) -> bool:
        """Tell whether an inserted call takes a step with SAM where SAM is on; CL-LoRA's two can be told apart."""
        sam_on = self.request.settings.sam_on
        return sam_on == "both" or (sam_on == "distillation") == ('"distillation"' in call)


def make_vision_plan(request: Request, available: int, *, dry_run: bool = False) -> VisionPlan:
    """Resolve every ``auto``, read upstream's configuration, and check whatever can be checked without starting.

    Args:
        request: The parsed settings.
        available: How many CUDA devices there are.
        dry_run: Plan for a machine that has what is missing here (CUDA, images, weights).

    Raises:
        UserError: With the reasons why this run cannot start as asked.
    """
    settings = request.settings
    method = METHODS[settings.method]
    profile, profile_reason = choose_profile(settings.profile, method, available)
    quick = profile == "quick"
    engine, engine_reason = choose_engine(settings.engine, method, profile)
    if engine == "reference" and not method.reference:
        raise UserError(
            f"{method.title} has no reference implementation: every profile needs the authors' code. "
            + (
                "Leave out engine=reference."
                if settings.engine == "reference"
                else f"{patches.is_available(str(method.repository))[1]}\n"
                f"It comes with: git submodule update --init third_party/{method.repository}"
            )
        )
    if quick and (given := [key for key in ("benchmark", "data", "model") if getattr(settings, key)]):
        raise UserError(
            f"{', '.join(f'{key}=' for key in given)} has no meaning in profile quick ({profile_reason}), which has "
            f"images and a model of its own. Leave it out, or use profile=upstream (without a GPU also device=cpu)."
        )
    if method.configs:
        variant = settings.variant or next(iter(method.configs))
        request = as_default(request, "benchmark", next(iter(method.configs[variant])))
        request = as_default(request, "variant", next(iter(method.configs)))
        settings = request.settings
    if engine == "reference" and settings.variant:
        asked = settings.engine == "reference"
        raise UserError(
            f"variant={settings.variant} needs the authors' code: the reference engine has {method.title} alone. "
            "Leave out variant=, or "
            f"{'leave out engine=reference' if asked else f'fetch the code ({engine_reason})'}.\n"
            f"The code comes with: git submodule update --init third_party/{method.repository}"
        )
    notes = list(request.notes)
    lacks: list[str] = []
    request = own_threads(request, profile, notes)
    settings = request.settings
    device, devices = choose_device(request, profile, available, dry_run, lacks)
    if device == "cuda" and settings.device.strip() in ("auto", "cuda"):
        devices = devices[:1]  # as upstream's commands; several only where they are named
    verified = find_upstream(method, engine, notes)
    file = method.config(settings.variant, settings.benchmark) if method.configs else None
    shipped = read_config(verified.checkout / file) if verified and file else {}

    editor = ConfigEditor(shipped or REFERENCE_DEFAULTS)
    if engine == "reference" and method.repository:
        editor.note("engine", f"the authors' {method.repository}", "our reference implementation", engine_reason)
    if quick:
        own = quick_vision.METHOD_PRESETS.get({"seqlora_vit": "seqlora"}.get(settings.method, settings.method), {})
        for key, value in {"dataset": QUICK_DATASET, **quick_vision.PRESET, **own}.items():
            if verified or key in REFERENCE_DEFAULTS:
                editor.set(key, value, "profile quick: small images and model of ours, minutes on two CPU cores")
    if profile == "paper":
        for argument, why in paper_arguments(method, str(file)):
            editor.set(argument.argument, argument.value, why)
        notes.append("where else paper and repository differ, the repository's way runs: see DEVIATIONS.md")
    request = _choose_seed(request, editor, file)
    if verified and device == "cuda" and "device" in shipped:
        editor.set("device", _upstream_devices(devices).split(","), "the chosen GPUs, counted from 0")
    several = shipped.get("model_name") in SEVERAL_GPUS
    if several and len(devices) < 2:
        lack = (
            f"InfLoRA's code of {shipped['model_name']} ({file}) stops on a single device: it needs two GPUs or more. "
            f"Name them with device=0,1, or choose another variant= or benchmark=."
        )
        if not dry_run:
            raise UserError(lack)
        lacks.append(lack)
    off_protocol = len(devices) > 1 and not several
    if verified and device == "cpu":
        editor.note("device", "cuda:0", "cpu", "setting device=" if settings.device != "auto" else "no GPU here")
        off_protocol = not quick
        if not quick:
            notes.append(
                "WARNING: a ViT-B/16 on the CPU. The authors' GPU took over an hour for a seed of CIFAR-100 or "
                "ImageNet-R (InfLoRA's logs); expect a CPU to take many times that. profile=quick takes minutes."
            )
    known = known_keys(verified.checkout, verified.checkout / str(file)) if verified else set(REFERENCE_DEFAULTS)
    before = dict(editor.current)
    override(editor, request.overrides, known, quick=quick)
    classes = quick_vision.CLASSES if quick else vision_data.DATASETS[editor.current["dataset"].lower()].classes
    _fit_sessions(editor, request, classes)
    idle = [key for key in request.overrides if key in before and editor.current[key] == before[key]]
    request = without_idle(request, idle, notes)
    off_protocol |= bool(request.overrides)
    model = quick_vision.MODEL if quick else {"embed_dim": 768, "depth": 12}
    width, blocks = int(model["embed_dim"]), int(model["depth"])
    ranges = task_classes(editor.current, classes, width=width, blocks=blocks)

    root = named_path("data", settings.data).absolute() if settings.data else ROOT / "data"
    weights, inputs = _find_inputs(request, method, editor, verified, profile, root, dry_run, notes, lacks)
    if settings.method == "inflora" and verified:
        _note_split(editor, inputs, root, verified.checkout, notes)
    if settings.model and weights and weights.name != _weights_name(editor):
        editor.note("pretrained weights", _weights_name(editor), weights.name, "setting model=")
        off_protocol = True
    if settings.variant == "infloraca" and (settings.sam != "off" or settings.measuring is not None):
        stage = "InfLoRA's second stage trains the classifier with its own SGD"
        notes.append(f"{stage}: no SAM there, and measure_when=after measures the model before it")
        if settings.sam != "off":
            editor.note("SAM", None, "in the first stage of a task alone", stage)
    if verified and quick:
        editor.note("model", "ViT-B/16, pretrained", "a small ViT of ours", "profile quick")
    workers = 0 if quick else None
    if workers == 0 and verified and "num_workers" not in shipped:
        editor.note("processes that load images", "8", "0", "profile quick: images in memory")

    plan = VisionPlan(
        request=request,
        method=method,
        profile=profile,
        profile_reason=profile_reason,
        engine=engine,
        engine_reason=engine_reason,
        device=device,
        devices=devices,
        world_size=1,
        launcher="python",
        tasks=(),
        deviations=(*editor.deviations(), *_library_deviations(verified)) if verified else tuple(editor.extra),
        links={} if quick else {"data": root},
        task_configs={},
        verified=verified,
        folder=_run_folder(request, profile, engine),
        notes=tuple(notes),
        lacks=tuple(lacks),
        off_protocol=off_protocol,
        benchmark=_benchmark_name(method, settings.benchmark, profile, settings.variant),
        config=editor.current,
        shipped=editor.shipped,
        config_file=str(file) if verified and file else "",
        classes=ranges,
        hook={
            "device": "cpu" if device == "cpu" else f"cuda:{_upstream_devices(devices)}",
            "data": None if quick else str(root),
            "weights": str(weights) if weights else None,
            "workers": workers,
            "model": dict(quick_vision.MODEL) if quick else None,
            "dataset": {"class": QUICK_CLASS, "seed": 0} if quick else None,
            "sam_on": settings.sam_on,
        },
        inputs=inputs,
    )
    if not dry_run:
        saves = len(ranges) if settings.method == "inflora" and not quick else 0
        if problems := folder_problems(plan.folder, BYTES_NEEDED + saves * BYTES_OF_A_MODEL):
            raise UserError.collect(problems)
    return plan


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


def _fit_sessions(editor: ConfigEditor, request: Request, classes: int) -> None:
    """Keep InfLoRA's number of tasks right where the classes of a task are changed."""
    step = editor.current["increment"]
    follows = "increment" in request.overrides and "total_sessions" not in request.overrides
    if follows and "total_sessions" in editor.current and isinstance(step, int) and step > 0 and classes % step == 0:
        editor.set("total_sessions", classes // step, "follows from upstream.increment=")


def _timm_name(editor: ConfigEditor) -> str:
    """Return timm's name of the model whose weights upstream loads; InfLoRA's is written in its code."""
    return str(editor.current.get("backbone_type", "vit_base_patch16_224_in21k_cllora")).removesuffix("_cllora")


def _weights_name(editor: ConfigEditor) -> str:
    return vision_data.weights_url(_timm_name(editor)).rsplit("/", 1)[1]


def _find_inputs(
    request: Request,
    method: Method,
    editor: ConfigEditor,
    verified: patches.Verified | None,
    profile: str,
    root: Path,
    dry_run: bool,
    notes: list[str],
    lacks: list[str],
) -> tuple[Path | None, dict[str, str]]:
    """Find images and weights and check them; what is missing stops a run, and a dry one says it."""
    if profile == "quick":
        return quick_vision.WEIGHTS, {quick_vision.WEIGHTS.name: vision_data.file_hash(quick_vision.WEIGHTS)}
    assert verified is not None
    problems: list[str] = []
    inputs: dict[str, str] = {}
    weights = None
    try:
        found, more = vision_data.check_images(editor.current["dataset"], root, verified.checkout)
        inputs |= found
        notes += more
    except UserError as error:
        problems.append(str(error))
    try:
        caches = (ROOT / "models", Path(torch.hub.get_dir()) / "checkpoints")
        weights = vision_data.find_weights(_timm_name(editor), request.settings.model, caches)
        inputs[weights.name] = vision_data.file_hash(weights)
    except UserError as error:
        problems.append(str(error))
    if problems and not dry_run:
        raise UserError.collect(problems)
    lacks += problems
    return weights, inputs


def _note_split(editor: ConfigEditor, inputs: Mapping[str, str], root: Path, checkout: Path, notes: list[str]) -> None:
    """Say which split of ImageNet-R is here; record one that InfLoRA's logs did not have and say how to get theirs."""
    split = splits.split_of(inputs)
    if split is None:  # another benchmark
        return
    said = f"the split of {splits.FOLDER} is {split}"
    if split != splits.LOGGED:
        why = f"train/ and test/ of data= hold other images: the logs' split is drawn by its code at seed {splits.SEED}"
        editor.note(f"split of {splits.FOLDER}", splits.LOGGED, split, why)
        said = (
            f"WARNING: {said}; compare will not set this run beside the shipped logs, only beside the paper, whose "
            "split is not known. To keep this split, do nothing. To get the logs' split, put the images of both halves "
            "back into one "
            f"folder a class and draw it, which changes the folder for all who use it: "
            f"{vision_data.draw_again(root, checkout)}"
        )
    notes.append(said)


def _library_deviations(verified: patches.Verified) -> list[Deviation]:
    """Compare the versions that upstream's README names with what is installed."""
    found = []
    text = (verified.checkout / "README.md").read_text(encoding="utf-8")
    for name, theirs in re.findall(r"^\s*-\s*`?([A-Za-z0-9_-]+)\s*={1,2}\s*([\d.]+)`?\s*$", text, flags=re.MULTILINE):
        ours = _version(name)
        if ours != theirs:
            why = "one environment serves every upstream" if ours else "not installed under that name"
            found.append(Deviation(f"library {name}", theirs, ours, why))
    return found


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    if name == "cudatoolkit":
        return torch.version.cuda
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def _benchmark_name(method: Method, asked: str, profile: str, variant: str) -> str:
    if profile == "quick":
        return "quick images"
    files = method.configs[variant or next(iter(method.configs))]
    return asked or next(iter(files))


def written_config(plan: VisionPlan) -> str:
    """Return the text of the configuration that runs; the reference engine is told method and tasks by it too."""
    own = {"method": plan.request.settings.method, "tasks": plan.task_names} if plan.engine == "reference" else {}
    return json.dumps({**plan.config, **own}, indent=4) + "\n"

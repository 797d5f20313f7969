"""Plan a run of a CLIP method: one seed, one process of the reference engine that learns all tasks in turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, named_path
from flatpatch.families import choices
from flatpatch.families.base import BYTES_NEEDED, Deviation, Machine, Plan, Stage
from flatpatch.families.clip import quick
from flatpatch.families.clip.arguments import FIELDS, OF_THE_PROTOCOL, OURS, Arguments, override
from flatpatch.families.clip.data import broken_message, check_pictures
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.results import CONFIG, OUTPUT, PROCESS, RESULTS
from flatpatch.families.clip.upstream import DESIGNS, ClipUpstream
from flatpatch.files import ROOT, folder_hash, folder_problems
from flatpatch.settings import OF_SAM_NAMED, Request, in_name, shown

LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "numpy", "pillow")
MODEL = "openai/clip-vit-base-patch16"
MODEL_LINK, DATA_LINK = "model", "data"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WORDS = ("tokenizer.json", "vocab.json")


def make_plan(upstream: ClipUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """Plan a run; see :class:`flatpatch.families.base.Family`."""
    draft = choices.choose_engine_of(upstream, request, machine, dry_run=dry_run)
    settings = draft.request.settings
    if draft.is_quick and settings.data:
        raise UserError(
            f"data= has no meaning in profile quick ({draft.profile_reason}), which draws its images. Leave it out, or "
            "use profile=record."
        )
    choices.refuse_ledger(draft)  # the model in training holds the present task's prompts alone
    draft.find_machine(machine)
    draft.devices = draft.devices[:1]
    base = replace(Arguments(num_workers=0), **{**quick.PRESET, **upstream.quick}) if draft.is_quick else Arguments()
    arguments = _override(draft, base)
    arguments = replace(arguments, iterations=settings.budget * arguments.iterations)
    model, links = _find_model(draft, arguments)
    inputs: dict[str, str | Path] = {MODEL_LINK: model}
    skipped: tuple[str, ...] = ()
    if not draft.is_quick:
        root = named_path("data", settings.data).absolute() if settings.data else ROOT / "data"
        links[DATA_LINK] = root
        found, skipped = _find_images(draft, arguments, root)
        inputs |= found
        draft.notes.append(_ours(draft.request.overrides, arguments))
    design = DESIGNS[upstream.design]
    if design.note:
        draft.notes.append(design.note)
    config = {
        "design": upstream.design,
        "arguments": arguments.as_dict(),
        "model": MODEL_LINK,
        "base": folder_hash(model),
        "output_dir": OUTPUT,
        "data": None if draft.is_quick else DATA_LINK,
        "skipped": skipped,
        "seed": settings.seed,
        "device": draft.device,
    }
    plan = Plan(
        **draft.facts(),
        world_size=1,
        launcher="python",
        folder=_run_folder(draft),
        tasks=arguments.datasets,
        stages=(_stage(arguments),),
        sequence=f"{len(arguments.datasets)} tasks ({' > '.join(arguments.datasets)})",
        benchmark="quick domains" if draft.is_quick else "MTIL order I, its first tasks",
        deviations=(*_skipped_deviations(skipped), *_budget_deviations(settings.budget)),
        environment=choices.environment(draft.device, draft.devices, draft.threads),
        libraries=LIBRARIES,
        links=links,
        files={CONFIG: json.dumps(config, indent=2) + "\n"},
        inputs=inputs,
        recipe=_recipe(base, arguments, design.words),
        off_protocol=bool(draft.request.overrides) or bool(settings.model) or settings.budget != 1,
    )
    if not dry_run and (problems := folder_problems(plan.folder, BYTES_NEEDED)):
        raise UserError.collect(problems)
    return plan


def _override(draft: choices.Draft, base: Arguments) -> Arguments:
    """Set what ``upstream.<argument>=`` asks for, and leave out what changes nothing."""
    overrides = draft.request.overrides
    arguments = override(base, overrides, tuple(quick.DOMAINS) if draft.is_quick else tuple(DATASETS))
    idle = [name for name in overrides if getattr(arguments, name) == getattr(base, name)]
    draft.request = choices.without_idle(draft.request, idle, draft.notes)
    return arguments


def _stage(arguments: Arguments) -> Stage:
    """Return the one process of the run."""
    count = len(arguments.datasets)
    title = f"tasks 1-{count}" if count > 1 else "task 1"
    return Stage(
        name=title,
        title=title,
        folder=PROCESS,
        tasks=tuple(range(count)),
        command=("-m", "flatpatch.families.lean", "flatpatch.families.clip.reference", CONFIG),
        contract={"task_index": None, "task": None, "tasks": arguments.datasets},
        output=OUTPUT,
        results=(f"work/{OUTPUT}/{RESULTS}", f"work/{OUTPUT}/tasks/*.safetensors"),
    )


def _find_model(draft: choices.Draft, arguments: Arguments) -> tuple[Path, dict[str, Path]]:
    """Find the pre-trained CLIP, whole; what is missing stops a run, and a dry one says it."""
    asked = draft.request.settings.model
    folder = quick.MODEL_FOLDER if draft.is_quick and not asked else _model_folder(asked or MODEL)
    if problem := model_problem(folder, arguments):
        draft.lack(
            f"{problem} Put config.json, {' or '.join(WEIGHTS)} and the tokenizer's files into one folder, e.g. "
            f"`huggingface-cli download {MODEL} --local-dir {ROOT / 'models' / Path(MODEL).name}`, or name the folder, "
            "or a model of the Hugging Face hub whose files are in its cache, with model=. profile=quick without "
            "model= needs none."
        )
    return folder, {MODEL_LINK: folder}


def _model_folder(asked: str) -> Path:
    """Return the folder of a model that is named by its folder, or as on the Hugging Face hub."""
    folder = named_path("model", asked).absolute()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", asked):
        return folder
    if (own := ROOT / "models" / asked.rpartition("/")[2]).is_dir():
        return own
    from huggingface_hub import snapshot_download

    files = ["*.json", "merges.txt", *WEIGHTS]
    try:
        return Path(snapshot_download(asked, allow_patterns=files, local_files_only=True))
    except Exception:  # whatever says that it is not in the cache
        return own


def model_problem(folder: Path, arguments: Arguments) -> str:
    """Say why a folder does not hold a CLIP that these arguments fit; empty if it does."""
    if not folder.is_dir():
        return f"the pre-trained CLIP is missing: there is no folder {folder}."
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return f"the pre-trained CLIP is missing: {folder / 'config.json'} cannot be read ({error})."
    if kind != "clip":
        return f"{folder} holds a model of type {kind!r}, expected 'clip'."
    for names in (WEIGHTS, WORDS):
        if not any((folder / name).is_file() for name in names):
            return f"the pre-trained CLIP is not whole: {folder} has no {' and no '.join(names)}."
    widths = {
        tower: int((config.get(f"{tower}_config") or {}).get("hidden_size", default))
        for tower, default in (("vision", 768), ("text", 512))
        if arguments.tower in (tower, "both")
    }
    narrowest = min(widths.values())
    if arguments.rank > narrowest:
        raise UserError(f"upstream.rank={arguments.rank} is more than the model's width. Expected at most {narrowest}.")
    return ""


def _find_images(draft: choices.Draft, arguments: Arguments, root: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Check the images; return hashes for the record, and what is left out, from the data folder."""
    problems: list[str] = []
    inputs: dict[str, str] = {}
    skipped: list[str] = []
    for name in arguments.datasets:
        try:
            checked = check_pictures(name, root)
        except UserError as error:
            problems.append(str(error))
            continue
        inputs |= checked.hashes
        if checked.broken and arguments.on_bad_image == "stop":
            problems.append(broken_message(name, checked.broken))
        skipped += [str(path.relative_to(root)) for path in checked.broken]
    if problems and not draft.dry_run:
        raise UserError.collect(problems)
    draft.lacks += problems
    return inputs, tuple(skipped)


def _skipped_deviations(skipped: tuple[str, ...]) -> list[Deviation]:
    if not skipped:
        return []
    here = f"{len(skipped)} left out: {', '.join(skipped)}"
    return [Deviation("images that cannot be decoded", None, here, "setting upstream.on_bad_image=skip")]


def _budget_deviations(budget: int) -> list[Deviation]:
    if budget == 1:
        return []
    return [Deviation("budget", "1", str(budget), f"setting budget=: {budget} times as many iterations of every task")]


def _ours(overrides: Mapping[str, str], arguments: Arguments) -> str:
    """Return which values the record does not state."""
    left = [name for name in OURS if name not in overrides]
    said = [f"{name} {_shown(getattr(arguments, name))}" for name in left if name not in OF_THE_PROTOCOL]
    protocol = [f"{name} {_shown(getattr(arguments, name))}" for name in left if name in OF_THE_PROTOCOL]
    return (
        f"ours, as the record does not state them: {', '.join(said)}, and the prompts' wording; of the MTIL "
        f"protocol, for the same reason: {', '.join(protocol)}"
    )


def _recipe(base: Arguments, arguments: Arguments, words: str) -> tuple[str, ...]:
    """Return every argument, and the profile's own value where it differs."""
    lines = [f"Arguments ({words}):"]
    for name in FIELDS:
        value, own = getattr(arguments, name), getattr(base, name)
        line = f"  {name} = {_shown(value)}"
        if name == "learning_rate" and not value:
            line = f"  {name} = {_shown(tuple(arguments.rate(task) for task in range(len(arguments.datasets))))}"
        lines.append(line + (f"  (the profile's: {_shown(own)})" if value != own else ""))
    return tuple(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "the profile's own"
    return shown(value)


def _run_folder(draft: choices.Draft) -> Path:
    settings = draft.request.settings
    name = settings.run
    if not name:
        parts = [settings.method, Path(settings.model).name, draft.profile, settings.sam]
        parts += [f"rho{settings.rho:g}"] if settings.sam != "off" else []
        parts += [
            f"{key}{value}" for key, value in in_name(settings, (*OF_SAM_NAMED, "budget", "device", "threads")).items()
        ]
        parts += ["measured"] if settings.measuring is not None else []
        parts += [f"{key}{value}" for key, value in draft.request.overrides.items()]
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join([*filter(None, parts), f"seed{settings.seed}"]))
    return (named_path("output", settings.output) / name).absolute()

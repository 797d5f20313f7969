"""Decide what a run will do, before anything is started or written.

A plan holds one command per task. Its arguments are upstream's own, read from upstream's script; whatever differs is
a :class:`Deviation`, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flatpatch import patches
from flatpatch.errors import UserError, named_path
from flatpatch.families.choices import (
    choose_device,
    choose_engine,
    choose_launcher,
    choose_profile,
    choose_world_size,
    cuda_devices,
    find_upstream,
    settle,
)
from flatpatch.families.text import overrides, quick
from flatpatch.families.text.changes import Datasets, Deviation, Editor, Stage, TaskPlan, dataset_of
from flatpatch.families.text.data import check_benchmark
from flatpatch.families.text.scripts import Invocation, parse_script
from flatpatch.runner.sam_places import where_sam_enters
from flatpatch.settings import TELLING_WORDS, Request, as_default, in_name
from flatpatch.upstreams import METHODS, STANDARD_ORDERS, Method
from flatpatch.upstreams.conflicts import PaperArgument

ROOT = Path(__file__).resolve().parents[3]
# Room for the patched copy, the adapters, the predictions and the datasets cache of a run.
BYTES_NEEDED = 300 * 2**20
# The small models are no faster with more threads, much slower where these wait for cores, and their numbers depend on
# the count.
QUICK_THREADS = 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LONGEST_NAME = 240


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    request: Request
    method: Method
    profile: str
    profile_reason: str
    engine: str
    engine_reason: str
    device: str
    devices: tuple[str, ...]
    world_size: int
    launcher: str
    tasks: tuple[TaskPlan, ...]
    deviations: tuple[Deviation, ...]
    links: Mapping[str, Path]
    task_configs: Mapping[str, Mapping[str, list[tuple[str, str]]]]
    verified: patches.Verified | None
    folder: Path
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()  # what a dry run found missing here, without which the run is refused
    off_protocol: bool = False
    benchmark: str = ""

    @property
    def stages(self) -> Sequence[Stage]:
        """The processes of the run, in order: one per task."""
        return self.tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order of training."""
        return tuple(task.name for task in self.tasks)

    def title(self, stage: Stage) -> str:
        """Return how a stage is called on the terminal."""
        names = [other.name for other in self.stages]
        return f"task {names.index(stage.name) + 1}/{len(names)} {stage.name}"

    @property
    def threads(self) -> int | None:
        """How many CPU threads each process is given; None leaves it to the machine and the caller."""
        return self.request.settings.threads or (QUICK_THREADS if self.profile == "quick" else None)

    @property
    def sequence(self) -> str:
        """What is learned, in a few words."""
        return f"order {self.request.settings.order} ({' > '.join(self.task_names)})"

    @property
    def labels(self) -> tuple[str, ...]:
        """Why this run's numbers must not stand beside a paper's; empty if they may."""
        labels = []
        if self.profile == "quick":
            labels.append("quick")
        if self.engine == "reference":
            labels.append("reference")
        if self.off_protocol:
            labels.append("off-protocol")
        return tuple(labels)

    def command(self, stage: Stage, python: str, port: int) -> list[str]:
        """Return the words of the command that runs one stage."""
        assert isinstance(stage, TaskPlan)
        words = stage.invocation.words()
        if self.engine == "reference":
            return [python, "-m", "flatpatch.families.text.reference.process", *words[1:]]
        if self.launcher == "deepspeed" and self.device == "cuda":
            return [python, "-m", "deepspeed.launcher.runner", "--master_port", str(port), *words]
        if self.launcher == "deepspeed" or self.world_size > 1:
            launch = [
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={self.world_size}",
                f"--master_port={port}",
            ]
            return [python, *launch, *words]
        return [python, *words]

    def recipe(self) -> list[str]:
        """Return lines about what the commands do not show; a text run's commands show all."""
        return []

    def executes(self, path: str) -> bool:
        """Tell whether the run trains by a patched file; a text repository has one."""
        return True

    def perturbs(self, call: str) -> bool:
        """Tell whether an inserted call takes a step with SAM where SAM is on."""
        return True

    def environment(self) -> dict[str, str]:
        """Return the variables that every task's command gets beside the caller's own."""
        variables = {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "WANDB_DISABLED": "true",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": visible_devices(self.devices) if self.device == "cuda" else "",
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        }
        if self.threads:
            variables |= dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        if self.device == "cpu" and self.launcher == "deepspeed":
            variables |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(self.world_size)}
        return variables


def visible_devices(numbers: Sequence[str]) -> str:
    """Return ``CUDA_VISIBLE_DEVICES`` for some of the GPUs this process sees, itself perhaps a choice."""
    own = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(own[int(number)] if int(number) < len(own) else number for number in numbers)


def make_plan(request: Request, *, dry_run: bool = False) -> Plan:
    """Resolve every ``auto``, read upstream's script, and check whatever can be checked without starting.

    Args:
        request: The parsed settings.
        dry_run: Plan for a machine that has what is missing here (CUDA, the model's weights).

    Raises:
        UserError: With all the reasons why this run cannot start as asked.
    """
    settings = request.settings
    method = METHODS[settings.method]
    available = cuda_devices()
    if method.vision:
        from flatpatch.families.vision.planning import make_vision_plan

        return make_vision_plan(request, available, dry_run=dry_run)
    profile, profile_reason = choose_profile(settings.profile, method, available)
    engine, engine_reason = choose_engine(settings.engine, method, profile)
    notes = list(request.notes)
    lacks: list[str] = []
    request = own_threads(request, profile, notes)
    device, devices = choose_device(request, profile, available, dry_run, lacks)
    verified = find_upstream(method, engine, notes)
    originals = _read_invocations(request, method, profile, engine, verified)

    editor = Editor(originals)
    task_configs: dict[str, dict[str, list[tuple[str, str]]]] = {}
    evaluates = [_evaluated(inv, index, originals, verified) for index, inv in enumerate(originals)]
    if settings.tasks:
        evaluates = editor.select(settings.tasks, evaluates, task_configs)
        request = _in_order(request, [dataset_of(inv) for inv in editor.originals], notes)
    if engine == "reference" and method.repository:
        editor.note("engine", f"the authors' {method.repository}", "our reference implementation", engine_reason)
    if engine == "reference" and not settings.tasks:
        for original, seen in zip(originals, evaluates, strict=True):
            task_configs[dataset_of(original)] = {"train": [seen[-1]], "dev": list(seen), "test": list(seen)}
    if profile == "quick" and engine == "upstream":
        preset = {**quick.PRESET, **quick.METHOD_PRESETS.get(settings.method, {})}
        for name, number in preset.items():
            editor.set(name, str(number), "profile quick: minutes on two CPU cores")
    if profile == "paper":
        for argument, why in paper_arguments(method, settings.order):
            editor.set(argument.argument, argument.value, why)
        notes.append("where else paper and repository differ, the repository's way runs: see DEVIATIONS.md")
    launcher = choose_launcher(settings.launcher, device, engine)
    world_size = choose_world_size(settings.processes, device, devices, originals[0].world_size, engine)
    devices = devices[:world_size]
    request = settle(request, engine, engine_reason, launcher, world_size, notes)
    settings = request.settings
    if settings.measuring is not None and world_size > 1:
        raise UserError(
            f"measure={settings.measure} works in one process, and this run has {world_size}. Use processes=1, or "
            "leave measure= out and measure the finished run: python -m flatpatch measure run=FOLDER."
        )
    off_protocol = editor.fit_world_size(world_size, launcher, profile) or bool(settings.tasks)
    if settings.adapters != "upstream" and launcher == "deepspeed":
        editor.note("LoRA weights", "as the engine makes them (bf16)", settings.adapters, "setting adapters=")
        off_protocol = True
    if engine == "upstream":
        left = editor.fit_launcher(launcher, device, world_size, asked=settings.device != "auto")
        off_protocol |= left and profile != "quick"  # quick runs are not upstream's in any case
    if settings.seed != 42:
        editor.set("seed", str(settings.seed), "setting seed=; upstream's scripts pass none, which means 42")
    links = _find_places(request, editor, verified, profile, engine, dry_run, lacks)
    off_protocol |= bool(settings.data) or bool(settings.model and editor.changes("model_name_or_path"))
    _check_overrides(request, method, verified, originals[0], device)
    idle = [name for name, value in request.overrides.items() if not editor.would_change(name, value)]
    request = without_idle(request, idle, notes)
    for name, value in request.overrides.items():
        editor.set(name, value, f"setting upstream.{name}=")
        off_protocol = True

    plan = Plan(
        request=request,
        method=method,
        profile=profile,
        profile_reason=profile_reason,
        engine=engine,
        engine_reason=engine_reason,
        device=device,
        devices=devices,
        world_size=world_size,
        launcher=launcher,
        tasks=editor.tasks(evaluates),
        deviations=(*editor.deviations(), *_library_deviations(verified, engine)),
        links=links,
        task_configs=task_configs,
        verified=verified,
        folder=_run_folder(request, profile, engine),
        notes=tuple(notes),
        off_protocol=off_protocol,
        benchmark=_benchmark_name(request, profile),
        lacks=tuple(lacks),
    )
    problems = _data_problems(plan)
    if dry_run:
        return replace(plan, lacks=(*plan.lacks, *problems))
    if problems := [*problems, *folder_problems(plan.folder, BYTES_NEEDED)]:
        raise UserError.collect(problems)
    return plan


def _in_order(request: Request, kept: Sequence[str], notes: list[str]) -> Request:
    """Write ``tasks=`` in the order of training, so that each choice of tasks is one run; note where it was another."""
    asked = [name.strip() for name in request.settings.tasks.split(",")]
    if asked != list(kept):
        notes.append(f"tasks={','.join(asked)} are trained in the order's own sequence: {' > '.join(kept)}")
    return replace(request, settings=replace(request.settings, tasks=",".join(kept)))


def own_threads(request: Request, profile: str, notes: list[str]) -> Request:
    """Let ``threads=`` of a quick run that names the default be no other run, and say what the caller's count does."""
    if profile != "quick":
        return request
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given not in ("", str(request.settings.threads or QUICK_THREADS)):
        notes.append(f"OMP_NUM_THREADS={given} has no effect in profile quick, which takes threads={QUICK_THREADS}")
    return as_default(request, "threads", QUICK_THREADS)


def paper_arguments(method: Method, where: str) -> list[tuple[PaperArgument, str]]:
    """Return what ``profile=paper`` sets for a task order or shipped configuration, each with its reason."""
    return [
        (argument, f"profile paper: the paper has {conflict.paper} ({conflict.source})")
        for conflict in method.conflicts
        for argument in conflict.arguments
        if where in argument.where
    ]


def _read_invocations(
    request: Request, method: Method, profile: str, engine: str, verified: patches.Verified | None
) -> list[Invocation]:
    order = request.settings.order
    if profile == "quick" and order not in STANDARD_ORDERS:
        raise UserError(
            f"profile quick has the four tasks of orders {', '.join(STANDARD_ORDERS)} (got order={order}). "
            f"Use one of those, or profile=upstream."
        )
    if engine == "upstream":
        assert verified is not None
        return parse_script(verified.checkout / method.scripts[order])
    preset = {**quick.PRESET, **quick.METHOD_PRESETS.get(request.settings.method, {})}
    tasks = STANDARD_ORDERS[order]
    invocations = []
    for index, name in enumerate(tasks):
        outputs = f"logs_and_outputs/order_{order}/outputs"
        model = f"{outputs}/{index}-{tasks[index - 1]}/adapter" if index else f"initial_model/{quick.MODEL_FOLDER.name}"
        arguments = {
            "method": request.settings.method,
            "base_model": f"initial_model/{quick.MODEL_FOLDER.name}",
            "model_name_or_path": model,
            "data_dir": "quick_benchmark",
            "task_config_dir": f"task_configs/{name}",
            "output_dir": f"{outputs}/{index + 1}-{name}",
            **{key: str(value) for key, value in preset.items()},
        }
        invocations.append(Invocation((), (), "reference", tuple(arguments.items())))
    return invocations


def _evaluated(
    invocation: Invocation, index: int, invocations: Sequence[Invocation], verified: patches.Verified | None
) -> Datasets:
    """Return the (type, dataset) pairs that a task tests, in the order of training."""
    if verified is None:
        return tuple((quick.TASKS[dataset_of(inv)], dataset_of(inv)) for inv in invocations[: index + 1])
    config = verified.checkout / invocation.get("task_config_dir") / "test_tasks.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    types = {entry["dataset name"]: kind for kind, entries in content.items() for entry in entries}
    order = [dataset_of(inv) for inv in invocations]
    return tuple(
        (types[name], name) for name in sorted(types, key=lambda name: order.index(name) if name in order else 99)
    )


def _find_places(
    request: Request,
    editor: Editor,
    verified: patches.Verified | None,
    profile: str,
    engine: str,
    dry_run: bool,
    lacks: list[str],
) -> dict[str, Path]:
    """Find the model and the data; return the links the working directory needs, and set the arguments that differ."""
    settings = request.settings
    links: dict[str, Path] = {}
    asked = editor.current[0].get("model_name_or_path") if engine == "upstream" else ""
    if settings.model:
        model = named_path("model", settings.model).absolute()
    elif profile == "quick":
        model = quick.MODEL_FOLDER
    else:
        assert verified is not None
        places = (ROOT / "models" / Path(asked).name, verified.checkout / asked)
        model = next((place for place in places if (place / "config.json").is_file()), places[0])
    if lacking := _lacking(model):
        hub = "huggyllama/llama-7b" if settings.order.startswith("llama") else "google-t5/t5-large"
        advice = (
            "Leave model= out: profile quick has a small model of its own."
            if profile == "quick"
            else f"Put the weights there or name their folder with model=FOLDER, "
            f"e.g. `huggingface-cli download {hub} --local-dir models/{Path(asked).name or model.name}`. "
            f"profile=quick needs none."
        )
        lack = f"the pretrained model is missing: {model} has no {lacking}. {advice}"
        if not dry_run:
            raise UserError(lack)
        lacks.append(lack)
    name = model.name.lower()
    telling = [word for word in (*TELLING_WORDS, "codegen", "bloomz", "gpt-neox") if word in name]
    if not settings.order.startswith("llama") and ("t5" not in name or telling):
        raise UserError(
            f"model={model}: upstream's code tells a model by its folder's name, which must hold 't5'"
            + (f" and not '{telling[0]}'" if telling else "")
            + f" (got '{model.name}'). Rename or link the folder."
        )
    argument = f"initial_model/{model.name}"
    links[argument] = model
    if argument != asked:
        why = f"profile {profile}'s own small model" if profile == "quick" and not settings.model else "setting model="
        models = [argument, *(inv.get("model_name_or_path") for inv in editor.current[1:])]
        editor.set_each("model_name_or_path", models, why)
        if engine == "reference":
            editor.set("base_model", argument, why)

    if settings.data:
        links["CL_Benchmark"] = named_path("data", settings.data).absolute()
        editor.note("benchmark data", "the repository's CL_Benchmark", str(links["CL_Benchmark"]), "setting data=")
        if profile == "quick" and engine == "reference":
            editor.set("data_dir", "CL_Benchmark", "setting data=")
    elif profile == "quick":
        editor.set("data_dir", "quick_benchmark", "profile quick's own data, made by a seeded generator")
    return links


def _lacking(model: Path) -> str:
    """Return what a model folder lacks, or an empty string."""
    if not (model / "config.json").is_file():
        return "config.json"
    if not any((model / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model")):
        return "tokenizer (tokenizer.json or spiece.model)"
    if not any(model.glob("*.safetensors")) and not any(model.glob("pytorch_model*.bin")):
        return "weights (*.safetensors or pytorch_model*.bin)"
    return ""


def _check_overrides(
    request: Request,
    method: Method,
    verified: patches.Verified | None,
    invocation: Invocation,
    device: str,
) -> None:
    if not request.overrides:
        return
    reference = verified is None
    known = (
        overrides.reference_kinds()
        if verified is None
        else overrides.upstream_kinds(verified.checkout / invocation.entry)
    )
    problems = overrides.problems_of(
        request.overrides,
        known,
        method=request.settings.method,
        title=method.title,
        reference=reference,
        device=device,
    )
    if problems:
        raise UserError.collect(problems)


def without_idle(request: Request, idle: Collection[str], notes: list[str]) -> Request:
    """Leave out overrides that name the value which runs without them: they make no other run."""
    notes += [
        f"upstream.{name}={request.overrides[name]} changes nothing: the run has that value anyway" for name in idle
    ]
    return replace(request, overrides={name: word for name, word in request.overrides.items() if name not in idle})


def _library_deviations(verified: patches.Verified | None, engine: str) -> list[Deviation]:
    """Compare what upstream's requirements pin with what is installed."""
    if engine == "reference" or verified is None:
        return []
    found = []
    requirements = verified.checkout / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    for line in lines:
        match = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)==([^\s;#]+)\s*", line)
        if not match:
            continue
        name, theirs = match.groups()
        try:
            ours: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            ours = None
        if ours != theirs:
            why = "one environment serves every upstream" if ours else "not imported by what runs here"
            found.append(Deviation(f"library {name}", theirs, ours, why))
    return found


def _run_folder(request: Request, profile: str, engine: str) -> Path:
    settings = request.settings
    name = settings.run
    if not name:
        parts = [
            settings.method,
            f"order{settings.order.replace('llama', 'L')}",
            profile,
            engine,
            settings.sam,
        ]
        if settings.sam != "off":
            parts.append(f"rho{settings.rho:g}")
        keys = (
            "eta",
            "scope",
            "sync",
            "ascent_loss",
            "adapters",
            "tasks",
            "processes",
            "device",
            "launcher",
            "threads",
        )
        changed = in_name(settings, keys)
        # "adapters" in the name would itself be one of the words that upstream misreads.
        parts += [f"{key}{value}".replace(",", "+").replace("adapters", "lora") for key, value in changed.items()]
        parts += ["measured"] if settings.measuring is not None else []
        parts += [f"{key}{value}" for key, value in request.overrides.items()]
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join([*parts, f"seed{settings.seed}"]))
    return (named_path("output", settings.output) / name).absolute()


def _benchmark_name(request: Request, profile: str) -> str:
    if profile == "quick":
        return f"quick, order {request.settings.order}"
    kind = "standard" if request.settings.order in ("1", "2", "3") or "llama" in request.settings.order else "long"
    return f"{kind} CL benchmark, order {request.settings.order}"


def _data_problems(plan: Plan) -> list[str]:
    """Return which of the plan's data are missing or damaged."""
    problems = []
    data = plan.links.get("CL_Benchmark")
    if data is None and plan.profile != "quick":
        assert plan.verified is not None
        data = plan.verified.checkout / plan.tasks[0].invocation.get("data_dir")
    if data is not None:
        wanted = [
            (kind, name, split)
            for task in plan.tasks
            for kind, name in task.evaluates
            for split in (("train", "dev", "test") if name == task.name else ("dev", "test"))
        ]
        absent = plan.verified.absent if plan.verified and "CL_Benchmark" not in plan.links else ()
        lacking = [f"{kind}/{name}/{split}.json" for kind, name, split in sorted(set(wanted))]
        lacking = [path for path in lacking if any(lost.endswith(path) for lost in absent)]
        if lacking:
            problems.append(
                f"the checkout {data.parent} is partial and lacks {', '.join(lacking)}. Fetch all of it: "
                f"{patches.fetch_command(data.parent, plan.verified.pin) if plan.verified else ''}; or name a complete "
                "benchmark folder with data=FOLDER."
            )
            wanted = []
        try:
            check_benchmark(data, sorted(set(wanted)))
        except UserError as error:
            problems.append(str(error))
    return problems


def folder_problems(folder: Path, bytes_needed: int, what: str = "run") -> list[str]:
    """Return why the folder of a run, or of something else, cannot be made or filled."""
    problems = []
    parent = folder
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if len(folder.name.encode()) > LONGEST_NAME:
        advice = "Give one with run=NAME." if what == "run" else "Choose another with output=FOLDER."
        problems.append(f"the {what}'s name {folder.name[:40]}... is too long for a folder. {advice}")
    elif not parent.is_dir():
        problems.append(
            f"the {what} folder {folder} cannot be made: {parent} is a file. Choose another place with output=FOLDER."
        )
    elif problem := unwritable(parent):
        problems.append(
            f"the {what} folder {folder} cannot be written: {problem}. Choose another place with output=FOLDER."
        )
    elif (place := _fullest(parent, ROOT)) and (free := shutil.disk_usage(place).free) < bytes_needed:
        problems.append(
            f"the disk of {place} is full: {free / 2**20:.0f} MiB free, {bytes_needed / 2**20:.0f} MiB needed. "
            f"Free some space or choose another place with output=FOLDER."
        )
    return problems


def _fullest(*places: Path) -> Path:
    return min(places, key=lambda place: shutil.disk_usage(place).free)


def unwritable(folder: Path) -> str:
    """Return why nothing can be written into a folder, empty if it can.

    Tries it, because root may write where the mode bits say no and a full or read-only disk may not.
    """
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".flatpatch-")
        os.close(handle)
        os.unlink(name)
    except FileNotFoundError:  # as in /proc: the folder is there, and takes no file
        return "the place is read-only, no file can be made in it"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def render(plan: Plan, python: str = "python") -> str:
    """Return the plan as text: the exact commands, and their difference from upstream's own."""
    lines = [headline(plan), ""]
    for stage in plan.stages:
        variables = f"CUDA_VISIBLE_DEVICES={','.join(plan.devices)} " if plan.device == "cuda" else ""
        command = plan.command(stage, python, plan.request.settings.port or 29500)
        lines += [f"# {plan.title(stage)}", variables + shlex.join(command), ""]
    for part in (plan.recipe(), where_sam_enters(plan)):
        lines += [*part, ""] if part else []
    if plan.engine == "upstream":
        theirs = "configuration" if plan.method.vision else "script"
        lines.append(f"Differences from upstream's own {theirs} and requirements:")
        for deviation in plan.deviations:
            where = f" [{', '.join(deviation.tasks)}]" if deviation.tasks else ""
            lines.append(
                f"  {deviation.what}{where}: {deviation.upstream or '-'} -> {deviation.here or '-'}  ({deviation.why})"
            )
        if not plan.deviations:
            lines.append("  none")
    lines += ["This run cannot start here:", *(f"  - {lack}" for lack in plan.lacks)] if plan.lacks else []
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def headline(plan: Plan) -> str:
    """Return what will run and why, in a few lines."""
    settings = plan.request.settings
    sam = (
        "without SAM"
        if settings.sam == "off"
        else f"with {settings.sam.upper()} rho={settings.rho:g} scope={settings.scope}"
    )
    lines = [
        f"{plan.method.title}, {plan.sequence}, {sam}, seed {settings.seed}",
        f"  profile {plan.profile}: {plan.profile_reason}",
        f"  engine {plan.engine}: {plan.engine_reason}",
        f"  device {plan.device}{':' + ','.join(plan.devices) if plan.devices else ''}, "
        f"{plan.world_size} process(es), launcher {plan.launcher}",
        f"  folder {plan.folder}",
    ]
    if plan.labels:
        lines.append(f"  {' and '.join(plan.labels)} run: its numbers are not comparable with a paper's")
    return "\n".join(lines)


def deviations_as_record(plan: Plan) -> list[dict[str, object]]:
    """Return the deviations in the record's form."""
    rows = []
    for deviation in plan.deviations:
        row: dict[str, object] = asdict(deviation)
        if not deviation.tasks:
            del row["tasks"]
        else:
            row["tasks"] = list(deviation.tasks)
        rows.append(row)
    return rows

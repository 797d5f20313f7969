"""Decide what a run of a text method will do, before anything is started or written.

One process trains one task. Its arguments are upstream's own, read from upstream's script; whatever differs is a
:class:`~flatpatch.families.base.Deviation`, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flatpatch import patches
from flatpatch.errors import UserError, named_path
from flatpatch.families import choices
from flatpatch.families.base import BYTES_NEEDED, PORT, Deviation, Machine, Plan, Stage
from flatpatch.families.text import llama, overrides, quick, small
from flatpatch.families.text.changes import Datasets, Editor, dataset_of
from flatpatch.families.text.data import check_benchmark, thin_benchmark
from flatpatch.families.text.launching import choose_launcher, choose_world_size, nodes_problems, settle
from flatpatch.families.text.models import lacks
from flatpatch.families.text.results import RESULT_FILE
from flatpatch.families.text.scripts import Invocation, parse_script
from flatpatch.families.text.upstream import STANDARD_ORDERS, WORDS_IN_PATHS, TextUpstream
from flatpatch.files import ROOT, folder_problems
from flatpatch.settings import MINIATURES, OF_SAM_NAMED, Request, in_name

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "deepspeed", "numpy")
QUICK_DATA = "quick_benchmark"
THINNED_DATA = "thinned_benchmark"
BENCHMARK = "CL_Benchmark"
RANKS = ("lora_r", "lora_dim")  # what the reference engine and upstream's code call LoRA's rank
MICRO_BATCHES = "gradient_accumulation_steps"
RECORDED_MICRO_BATCHES = 4
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout")
# What the processes of a run make in the work folder, where upstream's tree has folders of the same names.
OWN_FOLDERS = ("logs_and_outputs", "logs_and_outputs_llama", "initial_model")


def make_plan(upstream: TextUpstream, request: Request, machine: Machine, *, dry_run: bool = False) -> Plan:
    """Plan a run; see :class:`flatpatch.families.base.Family`."""
    draft = choices.choose_engine_of(upstream, request, machine, dry_run=dry_run)
    draft.find_machine(machine)
    chosen = small.choose(draft) if draft.is_small else None
    originals = _read_invocations(draft, upstream, chosen)
    editor = Editor(originals)
    evaluates = [_evaluated(inv, index, originals, draft.verified) for index, inv in enumerate(originals)]
    if draft.request.settings.tasks:
        evaluates = editor.select(draft.request.settings.tasks, evaluates)
        draft.request = _in_order(draft.request, editor.names, draft.notes)
    _configure(upstream, draft, editor)
    if chosen is not None:
        small.declare(chosen, draft, editor)
    launcher, world_size, off_protocol = _launch(draft, editor, originals[0].world_size)
    settings = draft.request.settings
    if settings.seed != upstream.seed:
        why = f"setting seed=; upstream's scripts pass none, which means {upstream.seed}"
        editor.set("seed", str(settings.seed), why)
    links = {f"initial_model/{chosen.name}": chosen.model} if chosen else _find_places(draft, editor)
    folder = editor.current[0].get("data_dir")
    made: dict[str, Callable[[Path], None]] = {}
    if draft.is_quick and BENCHMARK not in links:
        made = {QUICK_DATA: quick.write_benchmark}
    if settings.fraction < 1 and chosen is None:
        made = _thin(draft, editor, links, evaluates)
    off_protocol |= settings.fraction < 1
    off_protocol |= bool(settings.data) or bool(settings.model and editor.changes("model_name_or_path"))
    off_protocol |= _override(upstream, draft, editor, originals[0])
    if llama.is_llama(settings.order):
        _check_llama(editor, links)
    _check_rank(draft, links)
    off_protocol |= _lengthen(settings.budget, editor)
    texts = small.texts_of(chosen, draft, editor) if chosen is not None else {}

    variables = choices.environment(draft.device, draft.devices, draft.threads)
    if draft.device == "cpu" and launcher == "deepspeed":
        variables |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(world_size // settings.nodes)}
    plan = Plan(
        **draft.facts(),
        world_size=world_size,
        launcher=launcher,
        folder=_run_folder(draft.request, draft.profile, draft.engine),
        tasks=editor.names,
        stages=_stages(editor, draft.engine, launcher, draft.device, world_size, settings.nodes),
        sequence=f"order {settings.order} ({' > '.join(editor.names)})",
        benchmark=_benchmark_name(draft.request, draft.profile),
        deviations=(*editor.deviations(), *_library_deviations(draft.verified)),
        environment=variables,
        libraries=LIBRARIES,
        links=links,
        own_folders=OWN_FOLDERS,
        files=(_written_configs(evaluates) if settings.tasks or draft.engine == "reference" else {})
        | {f"{small.DATA}/{name}": text for name, text in texts.items()},
        made=made,
        inputs=dict(sorted(links.items())) | ({small.DATA: small.hash_of(texts)} if texts else {}),
        off_protocol=off_protocol,
        bytes_needed=BYTES_NEEDED + (len(editor.names) * _bytes_of(links) if settings.tuning == "full" else 0),
    )
    problems = _data_problems(plan, folder, evaluates)
    if dry_run:
        return replace(plan, lacks=(*plan.lacks, *problems))
    problems += nodes_problems(settings.nodes)
    if problems := [*problems, *folder_problems(plan.folder, plan.bytes_needed)]:
        raise UserError.collect(problems)
    return plan


def _configure(upstream: TextUpstream, draft: choices.Draft, editor: Editor) -> None:
    """Set what engine and profile ask for."""
    if draft.engine == "reference" and upstream.repository:
        theirs = f"the authors' {upstream.repository}"
        editor.note("engine", theirs, "our reference implementation", draft.engine_reason)
    if draft.is_quick and draft.engine == "upstream":
        preset = quick.LLAMA_PRESET if llama.is_llama(draft.request.settings.order) else quick.PRESET
        for name, number in {**preset, **upstream.quick}.items():
            editor.set(name, str(number), "profile quick: minutes on two CPU cores")
    if draft.request.settings.sam == "recorded":
        _split_batches(draft, editor)
    if draft.profile == "paper":
        for argument, why in upstream.paper_arguments(draft.request.settings.order):
            editor.set(argument.argument, argument.value, why)
        draft.notes.append("where else paper and repository differ, the repository's way runs: see DEVIATIONS.md")


def _split_batches(draft: choices.Draft, editor: Editor) -> None:
    """Split every batch into the four micro-batches of the recorded step, so that other runs have the same batches."""
    name, why = MICRO_BATCHES, "setting sam=recorded"
    size = max(1, int(editor.current[0].get("per_device_train_batch_size")) // RECORDED_MICRO_BATCHES)
    editor.set(name, str(RECORDED_MICRO_BATCHES), why)
    editor.set("per_device_train_batch_size", str(size), why)
    editor.note("the second pass of SAM's step", "the whole batch", "the last micro-batch, penalty undivided", why)
    draft.notes.append(
        "sam=recorded is NOT SAM: it climbs along all micro-batches of a step and descends along the last one alone, "
        f"its loss divided by their number ({RECORDED_MICRO_BATCHES} of {size} examples, "
        "unless overridden) and the method's penalty not"
    )


def _launch(draft: choices.Draft, editor: Editor, theirs: int) -> tuple[str, int, bool]:
    """Choose launcher and number of processes, and fit the arguments to them.

    Args:
        draft: Of the plan.
        editor: Upstream's invocations under change.
        theirs: Processes of upstream's own.

    Returns:
        The launcher, the number of processes, and whether they or ``tasks=`` take the run off upstream's protocol.

    Raises:
        UserError: If they cannot be had, or cannot measure.
    """
    settings, engine = draft.request.settings, draft.engine
    launcher = choose_launcher(settings.launcher, draft.device, engine)
    of_each = choose_world_size(settings.processes, draft.device, draft.devices, theirs, engine, settings.nodes)
    draft.devices = draft.devices[:of_each]
    world_size = of_each * settings.nodes
    draft.request = settle(draft.request, engine, draft.engine_reason, launcher, world_size, draft.notes)
    settings = draft.request.settings
    if settings.measuring is not None and world_size > 1:
        raise UserError(
            f"measure={settings.measure} works in one process, and this run has {world_size}. Use processes=1, or "
            "leave measure= out and measure the finished run: python -m flatpatch measure run=FOLDER."
        )
    off_protocol = editor.fit_world_size(world_size, launcher, draft.profile) or bool(settings.tasks)
    if settings.nodes > 1:
        why = "setting nodes=; torch.distributed.run starts the processes of each, not DeepSpeed's launcher"
        editor.note("machines", "1", str(settings.nodes), why)
    if settings.adapters != "upstream" and launcher == "deepspeed":
        editor.note("LoRA weights", "as the engine makes them (bf16)", settings.adapters, "setting adapters=")
        off_protocol = True
    if engine == "upstream":
        left = editor.fit_launcher(launcher, draft.device, world_size, asked=settings.device != "auto")
        off_protocol |= left and not draft.is_quick  # quick runs are not upstream's in any case
    return launcher, world_size, off_protocol


def _override(upstream: TextUpstream, draft: choices.Draft, editor: Editor, invocation: Invocation) -> bool:
    """Set what ``upstream.<argument>=`` asks for; tell whether anything was changed."""
    _check_overrides(draft.request, upstream, draft.verified, invocation, draft.device)
    idle = [name for name, value in draft.request.overrides.items() if not editor.would_change(name, value)]
    draft.request = choices.without_idle(draft.request, idle, draft.notes)
    for name, value in draft.request.overrides.items():
        editor.set(name, value, f"setting upstream.{name}=")
    if draft.request.settings.sam == "recorded" and int(editor.current[0].get(MICRO_BATCHES)) < 2:
        raise UserError(
            f"sam=recorded is of several micro-batches a step, and upstream.{MICRO_BATCHES}=1. Leave that out."
        )
    return bool(draft.request.overrides)


def _check_llama(editor: Editor, links: Mapping[str, Path]) -> None:
    """Refuse a model that upstream's LLaMA code could not train as it is meant.

    Raises:
        UserError: If it is one.
    """
    longest = max(int(inv.get("max_source_length", "512")) for inv in editor.current)
    for name, folder in links.items():
        is_whole = name.startswith("initial_model/") and not lacks(folder, llama=True)
        if is_whole and (problems := llama.model_problems(folder, longest)):
            raise UserError.collect(problems)


def _check_rank(draft: choices.Draft, links: Mapping[str, Path]) -> None:
    """Refuse a rank that is larger than the matrices it is to change.

    Raises:
        UserError: If it is.
    """
    models = [target for name, target in links.items() if name.startswith("initial_model/")]
    given = {name: int(draft.request.overrides[name]) for name in RANKS if name in draft.request.overrides}
    if not given or not (models[0] / "config.json").is_file():
        return
    config = json.loads((models[0] / "config.json").read_text(encoding="utf-8"))
    width = config.get("d_model") or config.get("hidden_size")
    inner = config.get("num_heads", 1) * config.get("d_kv", width) if "d_kv" in config else width
    for name, rank in given.items():
        if width and rank > min(width, inner):
            raise UserError(
                f"upstream.{name}={rank} is more than the width of the matrices that LoRA changes in {models[0].name} "
                f"(expected at most {min(width, inner)})."
            )


def _lengthen(budget: int, editor: Editor) -> bool:
    """Train every task as many times as long; tell whether that changed anything."""
    if budget == 1:
        return False
    # Where steps are counted, the Trainer passes over the epochs.
    counted = any(float(inv.get("max_steps", "-1")) > 0 for inv in editor.current)
    name = "max_steps" if counted else "num_train_epochs"
    lengths = [budget * float(inv.get(name)) for inv in editor.current]
    words = [str(int(length) if length == int(length) else length) for length in lengths]
    editor.set_each(name, words, f"setting budget={budget}")
    editor.note("budget", "1", str(budget), f"setting budget=: {budget} times as many epochs of every task")
    return True


def _stages(editor: Editor, engine: str, launcher: str, device: str, world_size: int, nodes: int) -> tuple[Stage, ...]:
    """Return the processes, one for each task."""
    stages = []
    for index, (name, invocation) in enumerate(zip(editor.names, editor.current, strict=True)):
        output = invocation.get("output_dir")
        stages.append(
            Stage(
                name=name,
                title=f"task {index + 1}/{len(editor.names)} {name}",
                folder=Path(output).name,
                tasks=(index,),
                command=_command(invocation.words(), engine, launcher, device, world_size, nodes),
                contract={"task_index": index, "task": name},
                output=output,
                results=(f"work/{output}/adapter/*", f"work/{output}/{RESULT_FILE}"),
            )
        )
    return tuple(stages)


def _command(
    words: Sequence[str], engine: str, launcher: str, device: str, world_size: int, nodes: int
) -> tuple[str, ...]:
    """Return what Python is given to train a task."""
    if engine == "reference":
        return ("-m", "flatpatch.families.lean", "flatpatch.families.text.reference", *words[1:])
    if nodes > 1:
        across = ("-m", "flatpatch.families.text.across_nodes", str(nodes), PORT)
        return (*across, "torch.distributed.run", f"--nproc_per_node={world_size // nodes}", *words)
    if launcher == "deepspeed" and device == "cuda":
        return ("-m", "deepspeed.launcher.runner", "--master_port", PORT, *words)
    if launcher == "deepspeed" or world_size > 1:
        launch = ("-m", "torch.distributed.run", f"--nproc_per_node={world_size}", f"--master_port={PORT}")
        return (*launch, *words)
    return tuple(words)


def _written_configs(evaluates: Sequence[Datasets]) -> dict[str, str]:
    """Return the files that tell upstream's code which data sets a task has, by their place in the work folder.

    A task learns the last of those that it evaluates.
    """
    files = {}
    for seen in evaluates:
        for split, pairs in (("train", seen[-1:]), ("dev", seen), ("test", seen)):
            config: dict[str, list[dict[str, str]]] = {}
            for kind, dataset in pairs:
                config.setdefault(kind, []).append({"sampling strategy": "full", "dataset name": dataset})
            files[f"task_configs/{seen[-1][1]}/{split}_tasks.json"] = json.dumps(config, indent=2)
    return files


def _in_order(request: Request, kept: Sequence[str], notes: list[str]) -> Request:
    """Write ``tasks=`` in the order of training, so that each choice of tasks is one run; note where it was another."""
    asked = [name.strip() for name in request.settings.tasks.split(",")]
    if asked != list(kept):
        notes.append(f"tasks={','.join(asked)} are trained in the order's own sequence: {' > '.join(kept)}")
    return replace(request, settings=replace(request.settings, tasks=",".join(kept)))


def _read_invocations(draft: choices.Draft, upstream: TextUpstream, chosen: small.Chosen | None) -> list[Invocation]:
    order, verified = draft.request.settings.order, draft.verified
    if llama.is_llama(order) and draft.is_quick:
        if draft.engine != "upstream":
            raise UserError(
                f"order={order} is run by the authors' code alone: the reference engine has no LLaMA. Use "
                f"engine=upstream (git submodule update --init third_party/{upstream.repository}), or order=1."
            )
    elif draft.profile in MINIATURES and order not in STANDARD_ORDERS:
        raise UserError(
            f"profile {draft.profile} has the four tasks of orders {', '.join(STANDARD_ORDERS)} (got order={order}). "
            f"Use one of those, or profile=upstream."
        )
    if draft.engine == "upstream":
        assert verified is not None
        return parse_script(verified.checkout / upstream.scripts[order])
    tasks, tuning = STANDARD_ORDERS[order], draft.request.settings.tuning
    preset: dict[str, int | float] = {**quick.PRESET, **upstream.quick}
    first, data = f"initial_model/{quick.MODEL_FOLDER.name}", QUICK_DATA
    if chosen is not None:
        tasks, preset = tuple(task.dataset for task in chosen.tasks), {**chosen.preset, **upstream.quick}
        first, data = f"initial_model/{chosen.name}", small.DATA
    invocations = []
    for index, name in enumerate(tasks):
        outputs = f"logs_and_outputs/order_{order}/outputs"
        arguments = {
            "method": upstream.name,
            "base_model": first,
            "model_name_or_path": f"{outputs}/{index}-{tasks[index - 1]}/adapter" if index else first,
            "data_dir": data,
            "task_config_dir": f"task_configs/{name}",
            "output_dir": f"{outputs}/{index + 1}-{name}",
            **({} if tuning == "lora" else {"tuning": tuning}),
            **{key: str(value) for key, value in preset.items()},
        }
        invocations.append(Invocation((), (), "reference", tuple(arguments.items())))
    return invocations


def _evaluated(
    invocation: Invocation, index: int, invocations: Sequence[Invocation], verified: patches.Verified | None
) -> Datasets:
    """Return the (type, dataset) pairs that a task tests, in the order of training."""
    if verified is None:
        return tuple((small.TYPES[dataset_of(inv)], dataset_of(inv)) for inv in invocations[: index + 1])
    config = verified.checkout / invocation.get("task_config_dir") / "test_tasks.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    types = {entry["dataset name"]: kind for kind, entries in content.items() for entry in entries}
    order = [dataset_of(inv) for inv in invocations]
    return tuple(
        (types[name], name) for name in sorted(types, key=lambda name: order.index(name) if name in order else 99)
    )


def _find_places(draft: choices.Draft, editor: Editor) -> dict[str, Path]:
    """Find the model and the data; return the links the working directory needs, and set the arguments that differ."""
    settings, verified, profile, engine = draft.request.settings, draft.verified, draft.profile, draft.engine
    links: dict[str, Path] = {}
    asked = editor.current[0].get("model_name_or_path") if engine == "upstream" else ""
    of_llama = llama.is_llama(settings.order)
    if settings.model:
        model = named_path("model", settings.model).absolute()
    elif profile == "quick":
        model = quick.LLAMA_FOLDER if of_llama else quick.MODEL_FOLDER
    else:
        assert verified is not None
        places = (ROOT / "models" / Path(asked).name, verified.checkout / asked)
        model = next((place for place in places if (place / "config.json").is_file()), places[0])
    if lacking := lacks(model, llama=of_llama):
        hub = "huggyllama/llama-7b" if of_llama else "google-t5/t5-large"
        advice = (
            "Leave model= out: profile quick has a small model of its own."
            if profile == "quick"
            else f"Put the weights there or name their folder with model=FOLDER, "
            f"e.g. `huggingface-cli download {hub} --local-dir models/{Path(asked).name or model.name}`. "
            f"profile=quick needs none."
        )
        draft.lack(f"the pretrained model is missing: {model} has no {lacking}. {advice}")
    name = model.name.lower()
    misread = [word for word in (*WORDS_IN_PATHS, "codegen", "bloomz", "gpt-neox") if word in name]
    if of_llama:
        if problem := llama.name_problem(name):
            raise UserError(
                f"model={model}: upstream's code tells a model by its folder's name, which {problem} "
                f"(got '{model.name}'). Rename or link the folder."
            )
    elif "t5" not in name or misread:
        raise UserError(
            f"model={model}: upstream's code tells a model by its folder's name, which must hold 't5'"
            + (f" and not '{misread[0]}'" if misread else "")
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
        links[BENCHMARK] = named_path("data", settings.data).absolute()
        editor.note("benchmark data", "the repository's CL_Benchmark", str(links[BENCHMARK]), "setting data=")
        if profile == "quick" and engine == "reference":
            editor.set("data_dir", BENCHMARK, "setting data=")
    elif profile == "quick":
        editor.set("data_dir", QUICK_DATA, "profile quick's own data, made by a seeded generator")
    return links


def _thin(
    draft: choices.Draft, editor: Editor, links: Mapping[str, Path], evaluates: Sequence[Datasets]
) -> dict[str, Callable[[Path], None]]:
    """Let the run read a benchmark with a part of the training examples; return what makes it."""
    settings = draft.request.settings
    source = links.get(BENCHMARK)
    if source is None and draft.verified is not None and not draft.is_quick:
        source = draft.verified.checkout / editor.current[0].get("data_dir")
    pairs = sorted({pair for seen in evaluates for pair in seen})
    why = f"setting fraction=: drawn by seed {settings.seed}, the labels in their proportions"
    editor.set("data_dir", THINNED_DATA, why)
    editor.note("training examples of each task", "all", f"a share of {settings.fraction:g}", why)

    def fill(folder: Path) -> None:
        if source is None:
            quick.write_benchmark(folder)
        thin_benchmark(source or folder, folder, pairs, settings.fraction, settings.seed)

    return {THINNED_DATA: fill}


def _bytes_of(links: Mapping[str, Path]) -> int:
    """Return how large the model's files are, all of which may be saved again after a task."""
    models = [target for name, target in links.items() if name.startswith("initial_model/")]
    return sum(file.stat().st_size for model in models for file in model.glob("*") if file.is_file())


def _check_overrides(
    request: Request,
    upstream: TextUpstream,
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
        unused=(*upstream.unused, *(OF_LORA if request.settings.tuning == "full" else ())),
        title=upstream.title,
        reference=reference,
        device=device,
    )
    if problems:
        raise UserError.collect(problems)


def _library_deviations(verified: patches.Verified | None) -> list[Deviation]:
    """Compare what upstream's requirements pin with what is installed."""
    requirements = verified.checkout / "requirements.txt" if verified else None
    text = requirements.read_text(encoding="utf-8") if requirements and requirements.is_file() else ""
    pins = dict(re.findall(r"^\s*([A-Za-z0-9_.-]+)==([^\s;#]+)\s*$", text, flags=re.MULTILINE))
    return choices.library_deviations(pins, "not imported by what runs here", {})


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
            *OF_SAM_NAMED,
            "adapters",
            "tuning",
            "budget",
            "fraction",
            "tasks",
            "processes",
            "nodes",
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
    if profile in MINIATURES:
        return f"{profile}, order {request.settings.order}"
    order = request.settings.order
    kind = "standard" if order in STANDARD_ORDERS or llama.is_llama(order) else "long"
    return f"{kind} CL benchmark, order {order}"


def _data_problems(plan: Plan, folder: str, evaluates: Sequence[Datasets]) -> list[str]:
    """Return which of the plan's data are missing or damaged."""
    problems = []
    data = plan.links.get(BENCHMARK)
    if data is None and plan.profile not in MINIATURES:
        assert plan.verified is not None
        data = plan.verified.checkout / folder
    if data is not None:
        wanted = [
            (kind, name, split)
            for task, seen in zip(plan.tasks, evaluates, strict=True)
            for kind, name in seen
            for split in (("train", "dev", "test") if name == task else ("dev", "test"))
        ]
        absent = plan.verified.absent if plan.verified and BENCHMARK not in plan.links else ()
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

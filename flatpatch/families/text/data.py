"""Benchmark data in upstream's layout: ``<data>/<TYPE>/<dataset>/{train,dev,test,labels}.json``.

A split is a JSON list of ``{"sentence": ..., "label": ...}``; ``labels.json`` is the list of answers to
choose from. Both engines read these files, so the checks run before either of them starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.families.thinning import thinned

NEXT_STEP = "Restore it from CL_Benchmark in the N-LoRA or O-LoRA repository, or name another data folder."


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {NEXT_STEP}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. {NEXT_STEP}") from None
    if not text.strip():
        raise UserError(f"{path} is empty, expected a JSON list. {NEXT_STEP}")
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself. Run in its repository: git lfs pull")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not complete JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            f" of {len(text)} characters. {NEXT_STEP}"
        ) from None


def read_labels(data_dir: Path, task_type: str, dataset: str) -> list[str]:
    """Read the answers a dataset allows, in the order in which its prompts list them.

    Raises:
        UserError: If the file is missing, broken, or not a list of at least one text.
    """
    path = data_dir / task_type / dataset / "labels.json"
    labels = _read_json(path)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path} holds no labels, expected a JSON list of texts. {NEXT_STEP}")
    return labels


def read_split(data_dir: Path, task_type: str, dataset: str, split: str) -> list[dict[str, str]]:
    """Read one split of a dataset and check every instance of it.

    Training labels must be in ``labels.json``. Other splits may hold further labels: real ones do (131 of
    the 7,600 MNLI test instances are labelled ``-``), and such an instance merely counts as answered
    wrongly.

    Args:
        data_dir: The benchmark's folder.
        task_type: The kind of task, as upstream writes it: ``TC``, ``SC``, ``NLI``...
        dataset: The dataset's folder name.
        split: ``train``, ``dev`` or ``test``.

    Returns:
        The instances in the file's order, each with the texts ``sentence`` and ``label``.

    Raises:
        UserError: If a file is missing, empty or broken, or a training label is unknown.
    """
    path = data_dir / task_type / dataset / f"{split}.json"
    instances = _read_json(path)
    if not isinstance(instances, list) or not instances:
        raise UserError(f"{path} holds no instances, expected a JSON list of at least one. {NEXT_STEP}")
    labels = read_labels(data_dir, task_type, dataset)
    for index, instance in enumerate(instances):
        for key in ("sentence", "label"):
            if not isinstance(instance, dict) or not isinstance(instance.get(key), str):
                raise UserError(f"{path}, instance {index}: expected an object with the text '{key}'. {NEXT_STEP}")
        if split == "train" and instance["label"] not in labels:
            raise UserError(
                f"{path}, instance {index}: label '{instance['label']}' is not in labels.json"
                f" ({', '.join(labels)}). Correct the label or add it to labels.json."
            )
    return instances


def thin_benchmark(source: Path, folder: Path, datasets: Iterable[tuple[str, str]], fraction: float, seed: int) -> None:
    """Write a benchmark with a share of each dataset's training instances; everything else stays as it is.

    Args:
        source: The whole benchmark's folder.
        folder: Where to write; may be the same.
        datasets: (task type, dataset) of each.
        fraction: The share.
        seed: Draws the instances; see `thinned`.
    """
    for task_type, dataset in datasets:
        place, own = source / task_type / dataset, folder / task_type / dataset
        own.mkdir(parents=True, exist_ok=True)
        for file in sorted(place.glob("*.json")):
            if place != own and file.name != "train.json":
                shutil.copyfile(file, own / file.name)
        if not (place / "train.json").exists():  # of a task that is only tested
            continue
        instances = read_split(source, task_type, dataset, "train")
        kept = thinned([instance["label"] for instance in instances], fraction, seed)
        text = json.dumps([instances[index] for index in kept], indent=1, ensure_ascii=False)
        (own / "train.json").write_text(text, encoding="utf-8")


def check_benchmark(data_dir: Path, splits: Iterable[tuple[str, str, str]]) -> None:
    """Check everything a run will read, before it starts.

    Args:
        data_dir: The benchmark's folder.
        splits: What the run reads, as (task type, dataset, split); repetitions are checked once.

    Raises:
        UserError: With every problem found, each naming its file and what to do next.
    """
    if not data_dir.is_dir():
        raise UserError(f"no benchmark folder at {data_dir}. Expected <TYPE>/<dataset>/train.json below it.")
    problems: list[str] = []
    wanted = list(dict.fromkeys(splits))
    files = dict.fromkeys(
        data_dir / task_type / dataset / f"{name}.json"
        for task_type, dataset, split in wanted
        for name in (split, "labels")
    )
    missing = [path for path in files if not path.exists()]
    if len(missing) > 1:  # one line for all: a folder of something else lacks every one
        problems.append(
            f"{data_dir} lacks {len(missing)} of the {len(files)} files that the run reads (first: {missing[0]}). "
            f"{NEXT_STEP}"
        )
    for task_type, dataset, split in wanted:
        folder = data_dir / task_type / dataset
        if len(missing) > 1 and {folder / f"{split}.json", folder / "labels.json"} & {*missing}:
            continue
        try:
            read_split(data_dir, task_type, dataset, split)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.collect(list(dict.fromkeys(problems)))

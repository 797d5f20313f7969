"""What a run of an image method is a run of, and whether two runs had the same images, for comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from flatpatch.families.base import LoggedRun
from flatpatch.families.vision import logs
from flatpatch.families.vision.splits import FOLDER, LISTED, LOGGED, list_hashes, split_of
from flatpatch.families.vision.upstream import VisionUpstream

LEARNS_CLASSES = True

# What configurations call the data sets, where the name differs by more than its case.
_DATASETS = {"cifar224": "cifar100", "imagenetr": "imagenet_r", "imageneta": "imagenet_a"}
# Settings in a log that say where and how a run ran, not what it computed; and those compared on their own.
_INCIDENTAL = {"config", "device", "prefix", "data_path", "num_workers", "seed", "dataset", "shuffle"}
_SHIPPED, _PAPER = "shipped run", "paper"
_OF_THE_PAPER = "which one the paper's runs had is not known"


def subject(record: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`flatpatch.families.base.Family`: method or its variant, dataset and number of tasks."""
    variant = record["settings"].get("variant", {}).get("value")
    # A changed class order needs no mark here: overriding upstream's configuration labels the run off-protocol.
    dataset = re.sub(r"_\d+$", "", record["benchmark"])
    return {"method": variant or record["method"], "dataset": dataset, "tasks": len(record["tasks"])}


def knows_data(record: Mapping[str, Any]) -> bool:
    """See :class:`flatpatch.families.base.Family`."""
    return bool(list_hashes(record.get("inputs", {})))


def compare_data(
    upstream: VisionUpstream,
    subject: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    kind: str,
) -> tuple[str, list[str]]:
    """See :class:`flatpatch.families.base.Family`."""
    inputs = [record.get("inputs", {}) for record in records]
    found = [split_of(own) for own in inputs]
    dataset = subject["dataset"]
    obstacle = _other_images(names, [list_hashes(own) for own in inputs])
    if source := upstream.unlisted_splits.get(dataset):
        here = "".join(f"; here it is {split}" for split in dict.fromkeys(filter(None, found)))
        return obstacle, [
            f"the split of {dataset} could not be checked: {upstream.title} takes {source}, of which no list is "
            f"published{here}"
        ]
    if dataset not in upstream.logged_splits:
        doubt = f"the split of {dataset} could not be checked: which one {upstream.title} takes is not known here"
        return obstacle, [doubt] if any(found) else []
    notes = []
    for split in dict.fromkeys(found):
        if split is None:
            notes.append(f"the split of {FOLDER} could not be checked: a record has no hash of it")
        elif kind == _PAPER:
            notes.append(f"the split of {FOLDER} is {split}; {_OF_THE_PAPER}")
        elif kind == _SHIPPED and split != LOGGED and not obstacle:
            obstacle = f"its split of {FOLDER} is {split}" + (f", not {LOGGED}" if split == LISTED else "")
    return obstacle, notes


def _other_images(names: Sequence[str], lists: Sequence[Mapping[str, str]]) -> str:
    for (one, first), (other, second) in combinations(zip(names, lists, strict=True), 2):
        for key in sorted(first.keys() & second.keys()):
            if first[key] != second[key]:
                hashes = f"{first[key][:12]} and {second[key][:12]}"
                return f"{one} and {other} had other images: their lists of {key} have the hashes {hashes}"
    return ""


@dataclass(frozen=True)
class _ImageRun(LoggedRun):
    """A logged run of an image method; ``split_matters`` where several splits of its images are in use."""

    split_matters: bool

    def doubt_data(self, kind: str, *, shipped: bool) -> list[str]:
        """See the base class."""
        if not self.split_matters:
            return []
        if not shipped:
            return [f"the split of {FOLDER} cannot be known: a log does not say which images a run had"]
        return [f"the split of {FOLDER} is {LOGGED}; {_OF_THE_PAPER}"] if kind == _PAPER else []


def read_log(path: Path, upstreams: Iterable[VisionUpstream]) -> list[LoggedRun]:
    """See :class:`flatpatch.families.base.Family`."""
    rows = list(upstreams)
    return [as_logged(run, rows) for run in logs.read_log(path)]


def as_logged(run: logs.LoggedRun, upstreams: Iterable[VisionUpstream]) -> LoggedRun:
    """Return a run of a log in the form of all families."""
    found = [(row, method) for row in upstreams if (method := row.method_of_log(run.settings))]
    unknown = (None, run.settings.get("model_name", "").lower())
    upstream, method = max(found, key=lambda each: len(each[0].name), default=unknown)
    dataset = run.settings.get("dataset", "").lower()
    subject = {"method": method, "dataset": _DATASETS.get(dataset, dataset), "tasks": len(run.task_ranges)}
    shuffled = run.settings.get("shuffle") == "True" and not (upstream and upstream.shuffles)
    return _ImageRun(
        subject=subject | ({"shuffled": True} if shuffled else {}),
        seed=run.seed,
        first_line=run.first_line,
        complete=run.complete,
        settings={key: value for key, value in run.settings.items() if key not in _INCIDENTAL},
        order=run.class_order,
        accuracy=run.accuracy_matrix() if run.groups_are_tasks else None,
        sample_weighted=run.top1_curve,
        split_matters=upstream is not None and subject["dataset"] in upstream.logged_splits,
    )

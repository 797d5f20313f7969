"""ImageNet-R's known splits: what they are, what the shipped logs show of theirs, and how a run judges its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.vision import data as vision_data
from flatpatch.families.vision.data import PILOT, SPLITS, check_images, list_hash
from flatpatch.families.vision.splits import HASHES, LISTED, LOGGED, OTHER, SEED, list_hashes, split_of
from flatpatch.report.baselines import load_baseline
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.upstreams import inflora

IMAGENET_R = inflora.UPSTREAM.datasets["imagenet_r"]


pytestmark = pytest.mark.third_party
Halves = dict[str, set[str]]


@pytest.fixture(scope="module")
def checkout(upstream: Callable[[str], Path]) -> Path:
    return upstream("InfLoRA")


@pytest.fixture(scope="module")
def listed(checkout: Path) -> Halves:
    """The lists in utils/splits/, as folder/file."""
    return {
        half: {
            "/".join(entry.split("/")[-2:])
            for entry in vision_data._listed(checkout / f"utils/splits/imagenet-r_{half}.yaml")
        }
        for half in SPLITS
    }


@pytest.fixture(scope="module")
def drawn(checkout: Path, listed: Halves, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder with empty files of ImageNet-R's names, split by the command that the error message gives."""
    root = tmp_path_factory.mktemp("data")
    for path in listed["train"] | listed["test"]:
        (root / "imagenet-r" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "imagenet-r" / path).touch()
    with pytest.raises(UserError) as caught:
        check_images(IMAGENET_R, root, checkout)
    command = str(caught.value).split("whether it is that one): ")[1].replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-c", command], check=True, env={"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(root)})
    yield root
    shutil.rmtree(root)


def halves_of(root: Path) -> Halves:
    return {half: set(vision_data._images(root / "imagenet-r" / half)) for half in SPLITS}


def move(root: Path, halves: Halves) -> None:
    """Move the images of a split folder into other halves."""
    for half, other in (SPLITS, SPLITS[::-1]):
        for path in halves_of(root)[other] & halves[half]:
            shutil.move(root / "imagenet-r" / other / path, root / "imagenet-r" / half / path)


def test_shipped_lists_have_the_known_hash_and_counts(listed: Halves) -> None:
    assert {half: list_hash(sorted(paths)) for half, paths in listed.items()} == HASHES[LISTED]
    assert tuple(len(listed[half]) for half in SPLITS) == IMAGENET_R.files
    assert len({path.split("/")[0] for path in listed["train"] | listed["test"]}) == IMAGENET_R.classes
    assert not listed["train"] & listed["test"]


def test_upstreams_code_at_the_known_seed_draws_the_known_split(drawn: Path, checkout: Path) -> None:
    hashes, notes = check_images(IMAGENET_R, drawn, checkout)
    assert split_of(hashes) == LOGGED
    assert list_hashes(hashes) == {f"imagenet-r/{half}": HASHES[LOGGED][half] for half in SPLITS}
    assert notes == []


def _unfit(values: Sequence[float | None], sizes: Sequence[int], decimals: int = 2) -> int:
    """Count the accuracies in percent that are no whole number of so many images, rounded as upstream rounds them."""
    return sum(
        value is not None and round(100 * round(value * size / 100) / size, decimals) != value
        for value, size in zip(values, sizes, strict=True)
    )


def test_shipped_logs_accuracies_are_those_of_the_drawn_split_and_not_of_the_listed_one(
    drawn: Path, listed: Halves
) -> None:
    """With n test images an accuracy is k/n: twenty sizes of tasks, ten in each of two class orders, must fit."""
    unfit, numbers = Counter[str](), 0
    classes = sorted({path.split("/")[0] for path in listed["test"]})
    for name in ("inflora_imagenet_r_10", "inflora_imagenet_r_10_shuffled_seed1993"):
        for run in load_baseline(name)["per_seed"]:
            order = range(200) if run["class_order"] == "identity" else run["class_order"]
            for split, test in (("drawn", halves_of(drawn)["test"]), ("listed", listed["test"])):
                of_class = Counter(path.split("/")[0] for path in test)
                sizes = [sum(of_class[classes[c]] for c in order[20 * task : 20 * task + 20]) for task in range(10)]
                totals = [sum(sizes[: task + 1]) for task in range(10)]
                unfit[split] += sum(_unfit(row, sizes) for row in run["accuracy_matrix"])
                unfit[split] += _unfit(run["top1_curve"], totals)
            numbers += 55 + 10
    assert numbers == 330 + 60
    assert unfit["drawn"] == 0
    assert unfit["listed"] > 300


def test_no_other_seed_below_3000_draws_a_split_that_fits_the_logs(listed: Halves) -> None:
    """What random_split draws of ImageFolder's images is torch.randperm's last fifth; only counts of classes matter."""
    paths = sorted(listed["train"] | listed["test"])
    classes = sorted({path.split("/")[0] for path in paths})
    class_of = torch.tensor([classes.index(path.split("/")[0]) for path in paths])
    runs = []
    for name in ("inflora_imagenet_r_10", "inflora_imagenet_r_10_shuffled_seed1993"):
        for run in load_baseline(name)["per_seed"]:
            order = torch.arange(200) if run["class_order"] == "identity" else torch.tensor(run["class_order"])
            runs.append((order, run["accuracy_matrix"], run["top1_curve"]))

    def fits(seed: int) -> bool:
        torch.manual_seed(seed)
        of_class = torch.bincount(class_of[torch.randperm(len(paths))[24000:]], minlength=200)
        for order, matrix, curve in runs:
            sizes = of_class[order].view(10, 20).sum(1)
            if _unfit(curve, sizes.cumsum(0).tolist()) or any(_unfit(row, sizes.tolist()) for row in matrix):
                return False
        return True

    with torch.random.fork_rng():
        assert [seed for seed in range(3000) if fits(seed)] == [SEED]


@pytest.fixture
def planned(drawn: Path, checkout: Path) -> Callable[..., object]:
    def plan(*words: str) -> object:
        return make_plan(parse([*words, "profile=upstream", "device=0", f"data={drawn}"]), dry_run=True)

    return plan


def _split_rows(plan: object) -> list[tuple[str | None, str | None]]:
    return [(row.upstream, row.here) for row in plan.deviations if row.what == "split of imagenet-r"]  # type: ignore[attr-defined]


def test_run_on_another_split_is_warned_and_recorded_and_told_how_to_get_the_logs_split(
    drawn: Path, listed: Halves, planned: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = halves_of(drawn)
    words = ("method=inflora", "benchmark=imagenet_r_10")

    plan = planned(*words)
    assert plan.labels == () and _split_rows(plan) == []
    assert f"the split of imagenet-r is {LOGGED}" in plan.notes

    one, other = min(theirs["train"]), min(theirs["test"])
    try:
        move(drawn, {"train": theirs["train"] - {one} | {other}, "test": theirs["test"] - {other} | {one}})
        plan = planned(*words)
        assert plan.labels == ()
        assert _split_rows(plan) == [(LOGGED, OTHER)]
        assert main(["run", *words, "profile=upstream", "device=0", f"data={drawn}", "--dry-run"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert (
            f"WARNING: the split of imagenet-r is {OTHER}; compare will not set this run beside the shipped logs, only"
            in printed
        )

        move(drawn, listed)
        plan = planned(*words)
        assert plan.labels == () and _split_rows(plan) == [(LOGGED, LISTED)]
        [said] = [note for note in plan.notes if note.startswith(f"WARNING: the split of imagenet-r is {LISTED}")]
        _, notes = check_images(PILOT["imagenetr"], drawn, drawn)
        assert notes[0].endswith(f"it is {LISTED}")
        assert "To keep this split, do nothing." in said
        command = said.split("for all who use it: ")[1].replace("python -c", f"{sys.executable} -c")
        subprocess.run(["bash", "-c", command], check=True, env={"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(drawn)})
        assert halves_of(drawn) == theirs
        assert {path.name for path in (drawn / "imagenet-r").iterdir()} == set(SPLITS)
    finally:
        move(drawn, theirs)


def test_cllora_on_imagenet_r_is_told_which_known_split_it_has(
    planned: Callable[..., object], upstream: Callable[[str], Path]
) -> None:
    upstream("CL-LoRA")
    plan = planned("method=cllora", "benchmark=imagenet_r")
    assert plan.labels == () and _split_rows(plan) == []
    assert any("no hash of imagenet-r's split is published" in n and n.endswith(f"it is {LOGGED}") for n in plan.notes)
    assert plan.inputs["imagenet-r/test: list of files"] == HASHES[LOGGED]["test"]

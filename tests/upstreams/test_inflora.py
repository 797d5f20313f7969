"""ImageNet-R where InfLoRA's code would split it: what is told, and that what is told does it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.families.vision.data import check_images
from flatpatch.upstreams import inflora


@pytest.mark.third_party
def test_unsplit_imagenet_r_is_told_how_to_be_split_as_upstream_does(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    """The command of the message is run on a small folder: it makes train/ and test/, and always the same ones."""
    lists = []
    for attempt in range(2):
        root = tmp_path / f"it's {attempt}"
        unsplit(root)
        with pytest.raises(UserError, match="would draw the split itself, moving your files") as caught:
            check_images(UNSPLIT, root, upstream("InfLoRA"))
        command = str(caught.value).split("whether it is that one): ")[1]
        command = command.replace("python -c", f"{sys.executable} -c")
        subprocess.run(["bash", "-c", command], check=True, env={"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)})
        lists.append(sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg")))
    assert lists[0] == lists[1]
    assert sum("/train/" in path for path in lists[0]) == 32


# ImageNet-R as InfLoRA's code takes it, but of two classes.
UNSPLIT = dataclasses.replace(
    inflora.UPSTREAM.datasets["imagenet_r"], classes=2, source="https://example.org/r.tar", files=(32, 8), total=40
)


def unsplit(root: Path) -> Path:
    """Make a whole ImageNet-R of two classes with twenty images each, not split."""
    for name in ("cat", "dog"):
        (root / "imagenet-r" / name).mkdir(parents=True)
        for number in range(20):
            (root / "imagenet-r" / name / f"{number}.jpg").write_bytes(b"")
    return root / "imagenet-r"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda place: (place / "test/cat").mkdir(parents=True), "has no folder train, but test: half a split"),
        (lambda place: (place / "test/cat").mkdir(parents=True), "InfLoRA's code would remove test/ with all"),
        (
            lambda place: (place / "train/cat").mkdir(parents=True),
            "no folder test, but train: half a split, with which",
        ),
        (lambda place: (place / "cat/0.jpg").unlink(), "39 images in 2 folders (expected 40 in 2)."),
        (lambda place: shutil.rmtree(place / "dog"), "20 images in 1 folders (expected 40 in 2)."),
        (lambda place: (place / "dog").rename(place / "cat/dog"), "folders in folders: cat/dog/0.jpg, cat/dog/1.jpg"),
        (lambda place: (place / "pig").mkdir(), "40 images in 2 folders (expected 40 in 2), none in pig."),
    ],
    ids=["test", "test is lost", "train", "an image", "a class", "depth", "empty"],
)
def test_command_that_draws_the_split_is_given_for_a_whole_unsplit_folder_alone(
    damage: Callable[[Path], object], expected: str, tmp_path: Path
) -> None:
    """Upstream's code removes a test/ without train/, and draws whatever images are there, for good."""
    place = unsplit(tmp_path)
    with pytest.raises(UserError, match="torch.manual_seed"):
        check_images(UNSPLIT, tmp_path, tmp_path)
    damage(place)
    with pytest.raises(UserError) as caught:
        check_images(UNSPLIT, tmp_path, tmp_path)
    assert expected in str(caught.value)
    assert "https://example.org/r.tar" in str(caught.value)
    assert "manual_seed" not in str(caught.value)

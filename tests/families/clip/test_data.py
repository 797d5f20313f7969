"""The real data sets' loaders, on small copies of their folders: what is missing or broken is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from flatpatch.errors import UserError
from flatpatch.families.clip import templates
from flatpatch.families.clip.arguments import Arguments
from flatpatch.families.clip.data import Pictures, check_pictures, open_pictures, quick_pictures, split_hash
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.reference.tasks import load_tasks

CLASSES = {
    "aircraft": ("707-320", "A300B4", "Yak-42"),
    "caltech101": ("Faces", "ant", "barrel"),
    "dtd": ("banded", "grid"),
}
Fill = Callable[[str], Path]


def _image(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # As many bytes as the cut in a test needs.
    Image.effect_noise((40, 30), 60).convert(mode).save(path, quality=95)


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Return a function that makes a small copy of a data set, of which the project then expects no more."""

    def make(name: str) -> Path:
        classes = CLASSES[name]
        root = tmp_path / "data"
        counts = (0, 0)
        if name == "caltech101":
            folder = root / "caltech101" / "101_ObjectCategories"
            for each in (*classes, "BACKGROUND_Google"):
                for number in range(1, 7):
                    _image(folder / each / f"image_{number:04d}.jpg", "L" if number == 1 else "RGB")
            counts = (14, 4)
        elif name == "dtd":
            folder = root / "dtd" / "dtd"
            (folder / "labels").mkdir(parents=True)
            for number, split in enumerate(("train", "test")):
                files = [f"{each}/{each}_{number}.jpg" for each in classes]
                (folder / "labels" / f"{split}1.txt").write_text("".join(f"{file}\n" for file in files))
                for file in files:
                    _image(folder / "images" / file)
            counts = (2, 2)
        else:
            folder = root / "fgvc-aircraft-2013b" / "data"
            (folder / "images").mkdir(parents=True)
            (folder / "variants.txt").write_text("".join(f"{each}\n" for each in classes))
            for number, split in enumerate(("train", "test")):
                lines = [f"{number}{place} {each}\n" for place, each in enumerate(classes)]
                (folder / f"images_variant_{split}.txt").write_text("".join(lines))
                for place in range(len(classes)):
                    _image(folder / "images" / f"{number}{place}.jpg")
            counts = (3, 3)
        small = replace(DATASETS[name], classes=classes, images=counts, split="")
        monkeypatch.setattr("flatpatch.families.clip.data.DATASETS", {**DATASETS, name: small})
        return root

    return make


def refusal(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_pictures(name, root)
    return str(caught.value)


def test_facts_of_the_data_sets_are_the_protocols() -> None:
    assert {name: len(each.templates) for name, each in DATASETS.items()} == {
        "aircraft": 2,
        "caltech101": 34,
        "cifar100": 18,
        "dtd": 8,
    }
    assert [each.zero_shot for each in DATASETS.values()] == [24.3, 88.4, 68.2, 44.6]
    assert [len(each.classes) for each in DATASETS.values()] == [100, 101, 0, 47]
    for each in DATASETS.values():
        assert all(form.count("{}") == 1 and "{{" not in form for form in each.templates)
        assert len({*each.templates}) == len(each.templates)
        assert len({*each.classes}) == len(each.classes)
        assert list(each.classes) == sorted(each.classes)  # torchvision's order
        assert each.prompts.keys() <= {*each.classes}
        prompts = [each.prompt_of(name) for name in each.classes]
        assert len({*prompts}) == len(prompts) and not any("_" in prompt for prompt in prompts)
    assert templates.AIRCRAFT is DATASETS["aircraft"].templates


def test_split_of_caltech101_is_the_one_expected_of_its_whole() -> None:
    """8677 images, four fifths for training, drawn from seed 42; another release of torch may draw another split."""
    total = sum(DATASETS["caltech101"].images)
    generator = torch.Generator().manual_seed(42)
    order = torch.randperm(total, generator=generator).tolist()
    number = int(0.8 * total)
    halves = [Pictures(None, tuple(part), (), ()) for part in (order[:number], order[number:])]
    assert (number, total - number) == DATASETS["caltech101"].images
    assert split_hash(*halves) == DATASETS["caltech101"].split


@pytest.mark.parametrize("name", ["aircraft", "caltech101", "dtd"])
def test_whole_data_set_is_read_and_hashed(name: str, fill: Fill) -> None:
    root = fill(name)
    checked = check_pictures(name, root)
    assert checked.broken == ()
    assert sorted(checked.hashes) == [f"{DATASETS[name].folder}/{split}" for split in ("test", "train")]
    assert checked == check_pictures(name, root)
    train, test = (open_pictures(name, root, train=train) for train in (True, False))
    assert not {*train.paths} & {*test.paths}
    assert train.classes == test.classes == CLASSES[name]
    for pictures in (train, test):
        for index, path in enumerate(pictures.paths):
            image, label = pictures[index]
            image.load()  # which closes its file
            assert image.size == (40, 30)
            if name != "aircraft":
                assert path.parent.name == CLASSES[name][label]


def test_caltech101_is_split_as_torch_splits_it(fill: Fill) -> None:
    root = fill("caltech101")
    order = torch.randperm(18, generator=torch.Generator().manual_seed(42)).tolist()
    assert open_pictures("caltech101", root, train=True).places == tuple(order[:14])
    assert open_pictures("caltech101", root, train=False).places == tuple(order[14:])


@pytest.mark.parametrize("name", list(DATASETS))
def test_missing_folder_is_told_what_to_put_where(name: str, tmp_path: Path) -> None:
    text = refusal(name, tmp_path)
    assert f"is missing: there is no folder {tmp_path / DATASETS[name].folder}. Fetch {DATASETS[name].source}" in text
    assert "data=FOLDER" in text


@pytest.mark.parametrize(("name", "place"), [("caltech101", "ant"), ("dtd", "images/grid")])
def test_missing_class_is_named(name: str, place: str, fill: Fill) -> None:
    root = fill(name)
    shutil.rmtree(root / DATASETS[name].folder / place)
    assert f"has no folder of class {Path(place).name} (expected {len(CLASSES[name])} classes)" in refusal(name, root)


def test_class_without_images_is_named(fill: Fill) -> None:
    root = fill("caltech101")
    for path in (root / "caltech101/101_ObjectCategories/ant").iterdir():
        path.unlink()
    assert "no train image is of class ant" in refusal("caltech101", root)


def test_missing_class_of_aircraft_is_named(fill: Fill) -> None:
    root = fill("aircraft")
    listed = root / "fgvc-aircraft-2013b/data/images_variant_train.txt"
    listed.write_text("".join(line for line in listed.read_text().splitlines(keepends=True) if "A300B4" not in line))
    assert "no train image is of class A300B4" in refusal("aircraft", root)


def test_other_class_list_is_told(fill: Fill) -> None:
    root = fill("aircraft")
    for file in (root / "fgvc-aircraft-2013b/data").glob("*.txt"):
        file.write_text(file.read_text().replace("Yak-42", "Zeppelin"))
    text = refusal("aircraft", root)
    assert "of other classes than expected: without Yak-42 and with Zeppelin, which are none of its classes" in text


def test_missing_image_is_named(fill: Fill) -> None:
    root = fill("dtd")
    lost = root / "dtd/dtd/images/grid/grid_1.jpg"
    lost.unlink()
    assert f"1 of its 2 test images are missing, e.g. {lost}" in refusal("dtd", root)


def test_other_number_of_images_is_told(fill: Fill) -> None:
    root = fill("caltech101")
    _image(root / "caltech101/101_ObjectCategories/ant/image_0007.jpg")
    assert "it has 15 training and 4 test images (expected 14 and 4)" in refusal("caltech101", root)


def test_lists_that_are_missing_are_told(fill: Fill) -> None:
    root = fill("dtd")
    (root / "dtd/dtd/labels/train1.txt").unlink()
    assert "DTD cannot be read: [Errno 2]" in refusal("dtd", root)


def test_damaged_cifar_is_told(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / CIFAR100.train_list[0][0]).write_bytes(b"not it")
    assert "CIFAR-100 cannot be read: Dataset not found or corrupted" in refusal("cifar100", tmp_path)


@pytest.mark.parametrize("kind", ["cut short", "text"])
def test_image_that_cannot_be_decoded_is_found_and_can_be_left_out(kind: str, fill: Fill) -> None:
    root = fill("dtd")
    bad = root / "dtd/dtd/images/grid/grid_0.jpg"
    bad.write_bytes(bad.read_bytes()[:-300] if kind == "cut short" else b"no image")
    assert check_pictures("dtd", root).broken == (bad,)
    whole = open_pictures("dtd", root, train=True)
    left = whole.without([bad])
    assert left.paths == tuple(path for path in whole.paths if path != bad)
    assert [left[index][1] for index in range(len(left))] == [0]
    assert open_pictures("dtd", root, train=False).without([bad]).paths == (
        root / "dtd/dtd/images/banded/banded_1.jpg",
        root / "dtd/dtd/images/grid/grid_1.jpg",
    )


def test_tasks_have_prompts_templates_and_images_of_the_models_size(fill: Fill, tmp_path: Path) -> None:
    root = fill("caltech101")
    arguments = replace(Arguments(), datasets=("caltech101",))
    (task,) = load_tasks(arguments, data=root, model=tmp_path, size=16, skipped=())
    assert task.classes == ("face of a person in a room", "ant", "barrel")
    assert task.templates is DATASETS["caltech101"].templates
    assert (len(task.train), len(task.test)) == (14, 4)
    assert {tuple(task.train[index][0].shape) for index in range(14)} == {(3, 16, 16)}, "grey ones too"
    assert torch.equal(task.test[0][0], task.test[0][0])
    assert not torch.equal(task.train[0][0], task.train[0][0]), "cut at random"


def test_drawn_domains_have_their_classes_in_order() -> None:
    for name in ("shapes", "strokes"):
        test = quick_pictures(name, train=False)
        assert [test[index][1] for index in range(len(test))] == sorted(list(range(8)) * 30)
        assert test[0][0].size == (32, 32)

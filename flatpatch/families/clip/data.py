"""Where the images of a CLIP run are, whether they are whole, and how they are read, by torchvision's data sets."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.families.clip.datasets import DATASETS, ImageSet
from flatpatch.progress import Progress

SHOWN = 5
SPLIT_SEED = 42  # of Caltech101's split, the protocol's
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class Pictures:
    """One split of a data set: what its files hold, and where they are.

    Attributes:
        source: torchvision's data set: pairs of an image and its class's number.
        places: Of this split's images in it.
        paths: Their files; empty where all images are in one file.
        classes: The classes' names there.
    """

    source: Any
    places: tuple[int, ...]
    paths: tuple[Path, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[self.places[index]]
        return image, int(label)

    def without(self, skipped: Sequence[Path]) -> Pictures:
        """Return it without some files."""
        if not {*skipped} & {*self.paths}:
            return self
        left = [(place, path) for place, path in zip(self.places, self.paths, strict=True) if path not in {*skipped}]
        return replace(self, places=tuple(place for place, _ in left), paths=tuple(path for _, path in left))


@dataclass(frozen=True)
class Checked:
    """What a look at a data set's files found: hashes for the record, and the images that cannot be decoded."""

    hashes: dict[str, str]
    broken: tuple[Path, ...]


def open_pictures(name: str, root: Path, *, train: bool) -> Pictures:
    """Open one split of a data set.

    Args:
        name: Of ``DATASETS``.
        root: The data folder.
        train: Training images or test images.

    Raises:
        UserError: If it cannot be read.
    """
    found = DATASETS[name]
    try:
        return _OPENERS[name](root, train)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{found.title} cannot be read: {_first(error)}. {fetch_it(found, root)}") from error


@functools.cache  # every image is decoded, and a sweep or a study plans many runs
def check_pictures(name: str, root: Path) -> Checked:
    """Check that a data set is whole, file by file; each image is decoded, coarsely.

    Args:
        name: Of ``DATASETS``.
        root: The data folder.

    Raises:
        UserError: If something is missing; says what to fetch, from where and to which folder.
    """
    found = DATASETS[name]
    folder = root / found.folder
    if not folder.is_dir():
        raise UserError(f"{found.title} is missing: there is no folder {folder}. {fetch_it(found, root)}")
    _check_classes(found, root, _class_folders(name, folder))
    splits = {split: open_pictures(name, root, train=split == "train") for split in ("train", "test")}
    problems, hashes, broken = [], {}, []
    for split, pictures in splits.items():
        lost = [path for path in pictures.paths if not path.is_file()]
        if lost:
            shown = ", ".join(map(str, lost[:2]))
            problems.append(f"{len(lost)} of its {len(pictures)} {split} images are missing, e.g. {shown}")
        if found.classes and pictures.classes != found.classes:
            problems.append(_other_classes(found, pictures.classes, split))
        labels = set(range(len(pictures.classes))) - _labels_of(pictures)
        if labels and (split == "train" or _OPENERS[name] is not _caltech101):  # chance may leave one out of a test
            names = ", ".join(pictures.classes[label] for label in sorted(labels)[:SHOWN])
            problems.append(f"no {split} image is of class {names}")
        hashes[f"{found.folder}/{split}"] = _hash_of(pictures, root)
    counts = tuple(len(pictures) for pictures in splits.values())
    if not problems and counts != found.images:
        problems.append(
            f"it has {counts[0]} training and {counts[1]} test images (expected {found.images[0]} and "
            f"{found.images[1]})"
        )
    if not problems and found.split and (drawn := split_hash(splits["train"], splits["test"])) != found.split:
        problems.append(
            f"its split into training and test images, drawn from seed {SPLIT_SEED}, has the hash {drawn[:12]} "
            f"(expected {found.split[:12]}): this release of torch draws another one"
        )
    if problems:
        raise UserError(f"{found.title} is not whole: {'; '.join(problems)}. {fetch_it(found, root)}")
    paths = [path for pictures in splits.values() for path in pictures.paths]
    with Progress(f"checking the images of {found.title}", "image") as shown_progress:
        for number, path in enumerate(paths, start=1):
            if not _decodes(path):
                broken.append(path)
            shown_progress.update("", number, len(paths))
    return Checked(hashes, tuple(broken))


def fetch_it(found: ImageSet, root: Path) -> str:
    """Return the advice to get a data set's images."""
    return (
        f"Fetch {found.source} and unpack it so that {root / found.folder} is there, or name the folder that holds "
        f"{found.folder.partition('/')[0]}/ with data=FOLDER. profile=quick needs none."
    )


def split_hash(train: Pictures, test: Pictures) -> str:
    """Return the SHA-256 of which images train and which test."""
    text = "|".join(",".join(map(str, split.places)) for split in (train, test))
    return hashlib.sha256(text.encode()).hexdigest()


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _class_folders(name: str, folder: Path) -> list[str] | None:
    """Return the names of the folders of classes; None where the data set has none."""
    place = {"caltech101": folder, "dtd": folder / "images"}.get(name)
    if place is None or not place.is_dir():
        return None
    return [each.name for each in sorted(place.iterdir()) if each.is_dir()]


def _check_classes(found: ImageSet, root: Path, folders: list[str] | None) -> None:
    """Name the classes whose folders are missing, before torchvision stumbles over them."""
    absent = [name for name in found.classes if name not in folders] if folders is not None else []
    if absent:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        raise UserError(
            f"{found.title} is not whole: {root / found.folder} has no folder of class {', '.join(absent[:SHOWN])}"
            f"{more} (expected {len(found.classes)} classes). {fetch_it(found, root)}"
        )


def _other_classes(found: ImageSet, there: Sequence[str], split: str) -> str:
    lacking = [name for name in found.classes if name not in there][:SHOWN]
    strange = [name for name in there if name not in found.classes][:SHOWN]
    parts = [f"without {', '.join(lacking)}"] if lacking else []
    parts += [f"with {', '.join(strange)}, which are none of its classes"] if strange else []
    return f"its {split} images are of other classes than expected: {' and '.join(parts) or 'in another order'}"


def _labels_of(pictures: Pictures) -> set[int]:
    labels = getattr(pictures.source, "_labels", None) or getattr(pictures.source, "y", None)
    labels = pictures.source.targets if labels is None else labels
    return {int(labels[place]) for place in pictures.places}


def _hash_of(pictures: Pictures, root: Path) -> str:
    """Return the SHA-256 of a split's files by name, in order; of images in one file, of the images."""
    if not pictures.paths:
        return hashlib.sha256(pictures.source.data.tobytes()).hexdigest()
    names = "".join(f"{path.relative_to(root)}\n" for path in pictures.paths)
    return hashlib.sha256(names.encode()).hexdigest()


def _decodes(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except (OSError, SyntaxError, ValueError):  # what PIL raises for files that are cut short or no images
        return False
    return True


def _aircraft(root: Path, train: bool) -> Pictures:
    from torchvision.datasets import FGVCAircraft

    source = FGVCAircraft(str(root), split="train" if train else "test")
    paths = tuple(Path(file) for file in source._image_files)
    return Pictures(source, tuple(range(len(paths))), paths, tuple(source.classes))


def _caltech101(root: Path, train: bool) -> Pictures:
    import torch
    from torch.utils.data import random_split
    from torchvision.datasets import Caltech101

    source = Caltech101(str(root))
    number = int(TRAIN_SHARE * len(source))
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    every: Any = range(len(source))
    halves: Any = random_split(every, [number, len(source) - number], generator=generator)
    places = tuple(halves[0 if train else 1].indices)
    folder = Path(source.root) / "101_ObjectCategories"
    paths = tuple(
        folder / source.categories[source.y[place]] / f"image_{source.index[place]:04d}.jpg" for place in places
    )
    return Pictures(source, places, paths, tuple(source.categories))


def _cifar100(root: Path, train: bool) -> Pictures:
    from torchvision.datasets import CIFAR100

    source = CIFAR100(str(root), train=train)
    return Pictures(source, tuple(range(len(source))), (), tuple(source.classes))


def _dtd(root: Path, train: bool) -> Pictures:
    from torchvision.datasets import DTD

    source = DTD(str(root), split="train" if train else "test")
    paths = tuple(Path(file) for file in source._image_files)
    return Pictures(source, tuple(range(len(paths))), paths, tuple(source.classes))


_OPENERS = {"aircraft": _aircraft, "caltech101": _caltech101, "cifar100": _cifar100, "dtd": _dtd}


def broken_message(name: str, broken: Sequence[Path]) -> str:
    """Return what is said of images that cannot be decoded."""
    more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    return (
        f"{DATASETS[name].title} has {len(broken)} image(s) that cannot be decoded: "
        f"{', '.join(map(str, broken[:SHOWN]))}{more}. Fetch them again, or leave them out, which the record then "
        "says, with upstream.on_bad_image=skip."
    )


def quick_pictures(name: str, *, train: bool) -> Pictures:
    """Return one split of a domain of profile ``quick``, drawn anew."""
    from flatpatch.families.clip.quick import DOMAINS
    from flatpatch.families.clip.quick.generator import benchmark_images

    images, labels = benchmark_images(name, train=train)
    return Pictures(_Drawn(images, labels), tuple(range(len(images))), (), DOMAINS[name])


class _Drawn:
    """Arrays as a data set of torchvision's kind."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.targets = images, labels

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), int(self.targets[index])

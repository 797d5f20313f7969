"""Where an image run's data and weights are, whether they are whole, and the hashes that tell them apart."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatpatch.errors import UserError, named_path
from flatpatch.families.vision import splits
from flatpatch.files import file_hash

IMAGES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # those of torchvision's ImageFolder
SPLITS = ("train", "test")
SHOWN = 5


@dataclass(frozen=True)
class Dataset:
    """An image benchmark: its classes, its folder in the data folder, and where it comes from.

    Attributes:
        classes: How many it has.
        folder: Its place in the data folder, with ``train/`` and ``test/`` in it, unless ``lists`` says otherwise.
        source: Where to get it.
        files: The numbers of training and test images; None where they are not known for sure.
        total: Their sum.
        stated: Numbers that a paper gives and nobody checked here.
        even: Whether each class has as many test images as any other.
        lists: Files in upstream's checkout that list the images.
        split_first: From the data folder, upstream's checkout and the absent ones of ``train`` and ``test``: what to
            say where upstream's code would draw the split itself; None where it does not.
    """

    classes: int
    folder: str
    source: str
    files: tuple[int, int] | None = None
    total: int | None = None
    stated: tuple[int, int] | None = None
    even: bool = False
    lists: tuple[str, ...] = ()
    split_first: Callable[[Dataset, Path, Path, Sequence[str]], str] | None = None


CIFAR100 = Dataset(100, "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", even=True)
# ImageNet-R, ImageNet-A and VTAB as LAMDA-PILOT splits them, by the names that its code and code made from it give
# them. The figures of ImageNet-R are those of the lists InfLoRA ships (a test counts them); of ImageNet-A its authors
# publish the sum. What is stated is the table of data sets in the appendix of _STATED_BY, not
# checked here against the paper or the data.
_PILOT = "the split of LAMDA-PILOT, linked in the README of github.com/LAMDA-CL/LAMDA-PILOT"
_STATED_BY = "arXiv:2303.07338"
PILOT: Mapping[str, Dataset] = {
    "cifar224": CIFAR100,
    "imagenetr": Dataset(200, "imagenet-r", _PILOT, (24000, 6000), 30000),
    "imageneta": Dataset(200, "imagenet-a", _PILOT, None, 7500, (5981, 1519)),
    "vtab": Dataset(50, "vtab", _PILOT, stated=(1796, 8619)),
}


def check_images(dataset: Dataset, root: Path, checkout: Path | None) -> tuple[dict[str, str], list[str]]:
    """Check that a benchmark's images are all there.

    Args:
        dataset: The benchmark.
        root: The data folder, upstream's ``data/``.
        checkout: Upstream's checkout, which may hold lists of files; CIFAR-100 needs none.

    Returns:
        Hashes for the record, and notes to show.

    Raises:
        UserError: If something is missing; says what to fetch, from where and to which folder.
    """
    place = root / dataset.folder
    if dataset is CIFAR100:
        return _check_cifar(dataset, root), []
    assert checkout is not None
    if not place.is_dir():
        raise UserError(f"the images are missing: there is no folder {place}. {fetch_it(dataset, root)}")
    if dataset.lists:
        return _check_listed(dataset, root, checkout)
    found = {split: _images(place / split) for split in SPLITS}
    absent = [split for split in SPLITS if not (place / split).is_dir()]
    if absent:
        lack = f"{place} has no folder {' and no '.join(absent)}"
        if dataset.split_first is None:
            halves = f"Expected {dataset.folder}/train and {dataset.folder}/test, one folder a class"
            raise UserError(f"{lack}. {halves}. {fetch_it(dataset, root)}")
        raise UserError(f"{lack}{dataset.split_first(dataset, root, checkout, absent)}")
    problems = []
    for split in SPLITS:
        empty = [folder.name for folder in sorted((place / split).iterdir()) if folder.is_dir()]
        filled = {path.split("/")[0] for path in found[split]}
        empty = [folder for folder in empty if folder not in filled]
        if len(filled) != dataset.classes or empty:
            lack = f", without images: {', '.join(empty[:SHOWN])}" if empty else ""
            problems.append(f"{place / split} has images of {len(filled)} classes (expected {dataset.classes}{lack})")
    counts = tuple(len(found[split]) for split in SPLITS)
    if dataset.files is not None and counts != dataset.files:
        problems.append(
            f"{place} has {counts[0]} training and {counts[1]} test images "
            f"(expected {dataset.files[0]} and {dataset.files[1]})"
        )
    elif dataset.total is not None and sum(counts) != dataset.total:
        problems.append(f"{place} has {sum(counts)} images (expected {dataset.total})")
    if problems:
        raise UserError(f"the images are not whole: {'; '.join(problems)}. {fetch_it(dataset, root)}")
    hashes = {splits.list_key(f"{dataset.folder}/{split}"): list_hash(found[split]) for split in SPLITS}
    if dataset.split_first is not None:  # the row says which split it is
        return hashes, []
    notes = [f"no hash of {dataset.folder}'s split is published; the record has the hash of the lists found here"]
    if dataset.folder == splits.FOLDER:
        notes[0] += f"; it is {splits.split_of(hashes)}"
    if dataset.stated not in (None, counts):
        notes.append(f"NOTE: {place} has {counts[0]} training and {counts[1]} test images, {_stated(dataset)}")
    return hashes, notes


def list_hash(paths: Sequence[str]) -> str:
    """Return the SHA-256 of a sorted list of relative paths, one a line."""
    return hashlib.sha256("".join(f"{path}\n" for path in sorted(paths)).encode()).hexdigest()


def _images(folder: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*") if path.suffix.lower() in IMAGES)


def fetch_it(dataset: Dataset, root: Path) -> str:
    """Return the advice to get a benchmark's images."""
    link = dataset.source.startswith("http")
    get = f"Fetch {dataset.source}" if link else f"Get {dataset.source}"
    known = [f"{dataset.total} images"] if dataset.total else []
    known += [f"training and test images {_stated(dataset)}"] if dataset.stated else []
    counts = f" ({'; '.join(known)})" if known else ""
    return (
        f"{get}{counts} and unpack it to {root / dataset.folder}, or name the folder that holds {dataset.folder}/ with "
        f"data=FOLDER. profile=quick needs none."
    )


def _stated(dataset: Dataset) -> str:
    train, test = dataset.stated or (0, 0)
    return f"expected {train} and {test}, as the paper {_STATED_BY} states; not checked by us"


def _check_cifar(dataset: Dataset, root: Path) -> dict[str, str]:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    published = datasets.CIFAR100
    expected = {
        **dict(published.train_list),
        **dict(published.test_list),
        published.meta["filename"]: published.meta["md5"],
    }
    wrong = []
    if not (root / dataset.folder).is_dir():
        wrong, expected = [f"there is no folder {root / dataset.folder}"], {}
    for file, md5 in expected.items():
        path = root / dataset.folder / file
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif not check_integrity(str(path), md5):
            wrong.append(f"{path} is damaged (expected md5 {md5})")
    if wrong:
        raise UserError(
            f"CIFAR-100 is not whole: {'; '.join(wrong)}. Fetch {dataset.source} (md5 {published.tgz_md5}) and unpack "
            f"it in {root}, or name the folder that holds {dataset.folder}/ with data=FOLDER. profile=quick needs none."
        )
    return {f"{dataset.folder}/{file}: md5": md5 for file, md5 in expected.items()}


def _listed(path: Path) -> list[str]:
    """Return the ``data`` entries of a list of images, without reading its YAML whole: it has 100,000 lines."""
    text = path.read_text(encoding="utf-8")
    data = text[text.index("data:") :].split("targets:")[0]
    return re.findall(r"^\s*- ['\"]?(.+?)['\"]?\s*$", data, flags=re.MULTILINE)


def _check_listed(dataset: Dataset, root: Path, checkout: Path) -> tuple[dict[str, str], list[str]]:
    absent = [name for name in dataset.lists if not (checkout / name).is_file()]
    if absent:
        raise UserError(
            f"the checkout {checkout} is partial and lacks {', '.join(absent)}, the lists of {dataset.folder}'s images."
            f" Fetch the whole repository: git submodule update --init third_party/{checkout.name}"
        )
    hashes = {}
    for name in dataset.lists:
        entries = _listed(checkout / name)
        lost = [entry for entry in entries if not _below(root, entry).is_file()]
        if lost:
            raise UserError(
                f"{dataset.folder} is not whole: {len(lost)} of the {len(entries)} images of {name} are missing, e.g. "
                f"{', '.join(str(_below(root, entry)) for entry in lost[:2])}. {fetch_it(dataset, root)}"
            )
        hashes[splits.list_key(name)] = list_hash(entries)
    return hashes, []


def _below(root: Path, entry: str) -> Path:
    """Return where an entry such as ``data/domainnet/...`` lies, ``data`` being the data folder."""
    return root / entry.removeprefix("./").removeprefix("data/")


def weights_url(model: str) -> str:
    """Return where timm fetches a model's pretrained weights; a name with a dot is one of timm's since 0.9."""
    if "." in model:
        return f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors"
    from timm.models.vision_transformer import default_cfgs

    return str(default_cfgs[model]["url"])


def weights_file(model: str) -> str:
    """Return the name of the file of a model's pretrained weights."""
    return f"{model}.safetensors" if "." in model else weights_url(model).rsplit("/", 1)[1]


def find_weights(model: str, asked: str, places: Sequence[Path]) -> Path:
    """Return the file of a model's pretrained weights, whole.

    Args:
        model: timm's name.
        asked: The setting ``model=``: a file, or the folder that holds it; empty: look in ``places``.
        places: Folders to look in.

    Raises:
        UserError: If it is missing or damaged; says what to fetch and where to put it.
    """
    url = weights_url(model)
    name = weights_file(model)
    if asked:
        given = named_path("model", asked).absolute()
        candidates = [given / name if given.is_dir() else given]
    else:
        candidates = [place / name for place in places]
    path = next((place for place in candidates if place.is_file()), None)
    if path is None:
        raise UserError(
            f"the pretrained weights are missing: no {candidates[0]}. Fetch {url} and put it there, e.g. "
            f"`curl -L --create-dirs -o {places[0] / name} {url}`, or name the file with model=FILE. "
            f"profile=quick needs none."
        )
    check_weights(path)
    return path


def check_weights(path: Path) -> None:
    """Refuse a file of weights that is cut short, damaged, or not the one its name promises.

    Raises:
        UserError: If it is.
    """
    remedy = "Fetch it again, or name another file with model=FILE."
    promised = re.search(r"-([0-9a-f]{8,64})\.(?:pth|npz|safetensors)$", path.name)  # as torch.hub names its files
    if promised and not file_hash(path).startswith(promised[1]):
        raise UserError(f"the weights {path} are damaged: their SHA-256 does not begin with {promised[1]}. {remedy}")
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"{broken} fails its checksum")
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as file:
                list(file.keys())
        else:
            import torch

            try:
                torch.load(path, map_location="meta", weights_only=True)
            except Exception as error:  # its own words are about pickling, and many
                raise ValueError(f"torch.load cannot read it ({type(error).__name__})") from error
    except Exception as error:
        raise UserError(f"the weights {path} are damaged: {error}. {remedy}") from error

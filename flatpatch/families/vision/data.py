"""Where an image run's data and weights are, whether they are whole, and the hashes that tell them apart."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence
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

    ``files`` are the numbers of training and test images, ``total`` their sum; None where no number is known for sure.
    ``stated`` are numbers that a paper gives and nobody checked here.
    """

    classes: int
    folder: str
    source: str
    files: tuple[int, int] | None = None
    total: int | None = None
    stated: tuple[int, int] | None = None


CIFAR100 = Dataset(100, "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz")
# The figures of ImageNet-R are those of the lists InfLoRA ships in utils/splits/ (a test counts them); of ImageNet-A
# its authors publish the sum. What is stated is the table of data sets in the appendix of _STATED_BY, not checked here
# against the paper or the data. CL-LoRA takes ImageNet-R, ImageNet-A and VTAB as LAMDA-PILOT splits them.
_PILOT = "the split of LAMDA-PILOT, linked in the README of github.com/LAMDA-CL/LAMDA-PILOT"
_STATED_BY = "arXiv:2303.07338"
IMAGENET_R = Dataset(
    200, "imagenet-r", "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", (24000, 6000), 30000
)
DATASETS: Mapping[str, Dataset] = {  # by upstream's name, in lower case
    "cifar100": CIFAR100,
    "cifar224": CIFAR100,
    "imagenet_r": IMAGENET_R,
    "imagenetr": Dataset(200, "imagenet-r", _PILOT, (24000, 6000), 30000),
    "imageneta": Dataset(200, "imagenet-a", _PILOT, None, 7500, (5981, 1519)),
    "vtab": Dataset(50, "vtab", _PILOT, stated=(1796, 8619)),
    "domainnet": Dataset(345, "domainnet", "http://ai.bu.edu/M3SDA/"),
}
DOMAINNET_LISTS = tuple(f"dataloaders/splits/domainnet_{split}.yaml" for split in SPLITS)


def check_images(name: str, root: Path, checkout: Path) -> tuple[dict[str, str], list[str]]:
    """Check that a benchmark's images are all there.

    Args:
        name: Upstream's name of the data set.
        root: The data folder, upstream's ``data/``.
        checkout: Upstream's checkout, which may hold lists of files.

    Returns:
        Hashes for the record, and notes to show.

    Raises:
        UserError: If something is missing; says what to fetch, from where and to which folder.
    """
    dataset = DATASETS[name.lower()]
    place = root / dataset.folder
    if dataset is CIFAR100:
        return _check_cifar(dataset, root), []
    if not place.is_dir():
        raise UserError(f"the images are missing: there is no folder {place}. {_fetch(dataset, root)}")
    if dataset.folder == "domainnet":
        return _check_listed(dataset, root, checkout)
    found = {split: _images(place / split) for split in SPLITS}
    absent = [split for split in SPLITS if not (place / split).is_dir()]
    if absent:
        lack = f"{place} has no folder {' and no '.join(absent)}"
        if name.lower() != "imagenet_r":
            halves = f"Expected {dataset.folder}/train and {dataset.folder}/test, one folder a class"
            raise UserError(f"{lack}. {halves}. {_fetch(dataset, root)}")
        raise UserError(f"{lack}{_split_first(dataset, root, checkout, absent)}")
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
        raise UserError(f"the images are not whole: {'; '.join(problems)}. {_fetch(dataset, root)}")
    hashes = {splits.list_key(f"{dataset.folder}/{split}"): list_hash(found[split]) for split in SPLITS}
    if dataset is IMAGENET_R:
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


def _fetch(dataset: Dataset, root: Path) -> str:
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


def _split_first(dataset: Dataset, root: Path, checkout: Path, absent: Sequence[str]) -> str:
    """Say how to get the halves that ImageNet-R lacks. Drawing them moves files for good: only for whole folders."""
    place = root / dataset.folder
    if present := [split for split in SPLITS if split not in absent]:
        would = "remove test/ with all that is in it" if present == ["test"] else "stop"
        return (
            f", but {present[0]}: half a split, with which InfLoRA's code would {would}. Put the missing half back, "
            f"or begin anew with an empty {place}. {_fetch(dataset, root)}"
        )
    paths = sorted(path.relative_to(place) for path in place.glob("*/**/*") if path.suffix.lower() in IMAGES)
    filled = {path.parts[0] for path in paths}
    empty = sorted({folder.name for folder in place.iterdir() if folder.is_dir()} - filled)
    deep = [str(path) for path in paths if len(path.parts) > 2]
    if (len(paths), len(filled)) != (dataset.total, dataset.classes) or empty or deep:
        more = f", none in {', '.join(empty[:SHOWN])}" if empty else ""
        more += f", folders in folders: {', '.join(deep[:SHOWN])}" if deep else ""
        return (
            f", and is not whole: {len(paths)} images in {len(filled)} folders (expected {dataset.total} in "
            f"{dataset.classes}){more}. {_fetch(dataset, root)}"
        )
    return (
        ". InfLoRA's code would draw the split itself, moving your files, with the random numbers of the run's seed. "
        "Draw it once beforehand, as the runs of its shipped logs had it (the next run says whether it is that one): "
        f"{_draw(place, checkout)}"
    )


def draw_again(root: Path, checkout: Path) -> str:
    """Return the commands that draw the split of InfLoRA's logs where ImageNet-R is split otherwise."""
    place = (root / IMAGENET_R.folder).resolve()
    return f"(cd {shlex.quote(str(place))} && cp -al train/. test/. . && rm -r train test) && {_draw(place, checkout)}"


def _draw(place: Path, checkout: Path) -> str:
    data_path = json.dumps(str(place.resolve()), ensure_ascii=False)
    code = (
        f"import torch; from utils.data import iIMAGENET_R; torch.manual_seed({splits.SEED}); "
        f'iIMAGENET_R({{"data_path": {data_path}}}).download_data()'
    )
    return f"(cd {shlex.quote(str(checkout))} && python -c {shlex.quote(code)})"


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
    """Return the ``data`` entries of one of InfLoRA's lists, without reading its YAML whole: it has 100,000 lines."""
    text = path.read_text(encoding="utf-8")
    data = text[text.index("data:") :].split("targets:")[0]
    return re.findall(r"^\s*- ['\"]?(.+?)['\"]?\s*$", data, flags=re.MULTILINE)


def _check_listed(dataset: Dataset, root: Path, checkout: Path) -> tuple[dict[str, str], list[str]]:
    absent = [name for name in DOMAINNET_LISTS if not (checkout / name).is_file()]
    if absent:
        raise UserError(
            f"the checkout {checkout} is partial and lacks {', '.join(absent)}, the lists of DomainNet's images. "
            f"Fetch the whole repository: git submodule update --init third_party/InfLoRA"
        )
    hashes = {}
    for name in DOMAINNET_LISTS:
        entries = _listed(checkout / name)
        lost = [entry for entry in entries if not _below(root, entry).is_file()]
        if lost:
            raise UserError(
                f"DomainNet is not whole: {len(lost)} of the {len(entries)} images of {name} are missing, e.g. "
                f"{', '.join(str(_below(root, entry)) for entry in lost[:2])}. {_fetch(dataset, root)}"
            )
        hashes[splits.list_key(name)] = list_hash(entries)
    return hashes, []


def _below(root: Path, entry: str) -> Path:
    """Return where an entry such as ``data/domainnet/...`` lies, ``data`` being the data folder."""
    return root / entry.removeprefix("./").removeprefix("data/")


def weights_url(model: str) -> str:
    """Return where timm fetches a model's pretrained weights."""
    from timm.models.vision_transformer import default_cfgs

    return str(default_cfgs[model]["url"])


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
    name = url.rsplit("/", 1)[1]
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

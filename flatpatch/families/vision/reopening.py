"""The models that a finished image run left, rebuilt with the code that trained them, and the images they learned.

The reference engine's come from its own checkpoints. Upstream's network is built by upstream's own code, imported from
the patched copy and told what the run was told (its configuration, and its description for the hooks); what was trained
then comes from the files that the hooks kept. The frozen ViT is read from the weights the run began with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flatpatch import patches
from flatpatch.contract import VARIABLE
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.base import FinishedRun
from flatpatch.families.sample import Sample, images_sample_of
from flatpatch.families.vision.hook import classification_loss
from flatpatch.families.vision.keeping import failure_of, kept_file
from flatpatch.families.vision.measuring import IMAGE_LOSS
from flatpatch.families.vision.reference import ImageTask, tasks_of
from flatpatch.families.vision.reference.checkpoints import checkpoint_file, restore
from flatpatch.families.vision.reference.options import read_reference
from flatpatch.families.vision.results import CONFIG, LOGS, MODELS, PROCESS
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.files import file_hash
from flatpatch.flatness import Loss, supervised_loss
from flatpatch.flatness.guard import random_states_kept
from flatpatch.flatness.scope import adapter_factor
from flatpatch.measuring import Request

TRAINING_KEYS = frozenset(
    ("prefix", "seed", "device", "data_path", "num_workers", "tasks")  # tasks: as the numbers of classes say
    + ("fraction", "epochs", "init_epoch", "batch_size", "lrate", "lrate_decay", "weight_decay")
    + ("init_lr", "init_lr_decay", "init_weight_decay", "init_milestones", "milestones")
)
"""Keys of a configuration in which runs may differ between whose models lies a line, beside those that a row names."""


@dataclass(frozen=True)
class ImageRun(FinishedRun):
    """A finished run of an image method, by either engine.

    Attributes:
        row: The method's.
        config: What the run's process was told.
        vision: On what it ran; see :mod:`flatpatch.contract`.
    """

    row: VisionUpstream
    config: Mapping[str, Any]
    vision: Mapping[str, Any]

    @property
    def _upstream(self) -> bool:
        return bool(self.record["engine"] == "upstream")

    @property
    def loss(self) -> Loss:
        """The cross-entropy over the task's own classes."""
        if self._upstream:
            return _loss_of_upstream
        return supervised_loss(F.cross_entropy)

    @property
    def loss_name(self) -> str:
        """The loss in words."""
        return IMAGE_LOSS

    def _classes(self, index: int) -> tuple[int, int]:
        """Return a task's first and last class, by their places in the order of learning."""
        first, last = self.record["tasks"][index].split("-")
        return int(first), int(last)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Let upstream's code find the hooks as in the run, in which some of its forward passes call them."""
        previous = os.environ.get(VARIABLE)
        if self._upstream:
            os.environ[VARIABLE] = str(_description(self.folder))
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)
            if previous is not None:
                os.environ[VARIABLE] = previous

    def rebuild(self, index: int, *, joined: bool = False) -> nn.Module:
        """Rebuild the model as it was when a task's training ended.

        Args:
            index: The task.
            joined: False: what varies is what the task trained. True: the factors of all tasks vary as well, and
                other tasks' classifiers are left out.

        Returns:
            The model, as :meth:`flatpatch.families.base.FinishedRun.ready` leaves it.

        Raises:
            UserError: If something that the run began with or kept is missing or is another's.
        """
        self._check_weights()
        if self._upstream:
            return self.ready(index, _rebuild_upstream(self, index, joined))
        for task in range(index + 1):
            self.check_file(PROCESS, checkpoint_file(self._reference, task))
        model = restore(self._reference, index, joined=joined)
        if joined:
            model.heads = VisionUpstream.only(model.heads, index)
        return self.ready(index, model)

    def draw_sample(self, index: int, request: Request) -> Sample:
        """Draw the fixed sample of a task's training images, augmented as inside a run.

        Raises:
            UserError: If the images cannot be read.
        """
        first, last = self._classes(index)
        with _code_of(self):  # also for paths that start in the run's work folder
            dataset: Any = (
                self._data.get_dataset(range(first, last + 1), source="train", mode="train")
                if self._upstream
                else self._tasks[index].train
            )
            return images_sample_of(dataset, first)(request)

    def check_companion(self, other: FinishedRun) -> None:
        """Refuse a run of another method, engine, model, data or build of the model; see the base class."""
        super().check_companion(other)
        assert isinstance(other, ImageRun)
        for what, mine, theirs in (
            ("methods", self._method, other._method),
            ("engines", self.record["engine"], other.record["engine"]),
            ("benchmarks", self.record["benchmark"], other.record["benchmark"]),
            ("sizes of the model", self.vision["model"], other.vision["model"]),
            ("pretrained weights", self._weights_hash, other._weights_hash),
            ("images", self._images, other._images),
        ):
            if mine != theirs:
                raise UserError(
                    f"{self.name} and {other.name} are of different {what} ({mine} and {theirs}): nothing lies between "
                    "their models. Name runs that differ in their settings of SAM or, where both learn the classes in "
                    "one order, in their seed."
                )

        different = [
            f"{key} is {self.config.get(key)} and {other.config.get(key)}"
            for key in sorted({*self.config, *other.config} - TRAINING_KEYS - {*self.row.training_keys})
            if self.config.get(key) != other.config.get(key)
        ]
        if different:
            raise UserError(
                f"{self.name} and {other.name} have models that may be put together differently, so that nothing lies "
                f"between them: {'; '.join(different)}. Name runs that differ only in how they were trained."
            )

    def learned(self, index: int) -> list[int]:
        """Return the labels of the classes learned up to a task, in the order of learning."""
        last = self._classes(index)[1]
        if self._upstream:
            return [int(label) for label in self._data._class_order[: last + 1]]
        return [int(label) for task in self._tasks for label in task.names][: last + 1]

    @property
    def _method(self) -> str:
        return str(self.config.get("model_name", self.record["method"]))

    @property
    def _weights_hash(self) -> str | None:
        found: str | None = self.record["inputs"].get(Path(self.vision["weights"] or "").name)
        return found

    @property
    def _images(self) -> dict[str, str]:
        """Hashes of the images, where the record has them."""
        weights = Path(self.vision["weights"] or "").name
        return {name: digest for name, digest in self.record["inputs"].items() if name != weights}

    def _check_weights(self) -> None:
        weights, expected = self.vision["weights"], self._weights_hash
        if weights is None or expected is None:
            raise UserError(f"{self.name} began with weights that its record does not name, so it cannot be rebuilt.")
        path = Path(weights)
        if not path.is_file() or file_hash(path) != expected:
            what = "are other ones now" if path.is_file() else "are gone"
            raise UserError(f"{self.name}: the weights {path} it began with {what}, so its models cannot be rebuilt.")

    @functools.cached_property
    def _reference(self) -> Any:
        found = read_reference(self.config, self.vision)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return dataclasses.replace(found, output_dir=self.folder / "work" / LOGS, device=device)

    @functools.cached_property
    def _tasks(self) -> tuple[ImageTask, ...]:
        return tasks_of(self._reference)

    @functools.cached_property
    def _tree(self) -> Path:
        built = patches.build(self.record["upstream"]["repo"])
        if built.tree != self.record["upstream"]["patched_tree"]:
            raise UserError(
                f"{self.name} ran the patched tree {self.record['upstream']['patched_tree'][:12]} of {built.repo}, "
                f"this version has {built.tree[:12]}. Measure it with the version that made it, or make the run again."
            )
        return built.path

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        """What upstream's main.py hands on, but for the device: models are built on the CPU."""
        return {**self.config, "seed": self.config["seed"][0], "device": [torch.device("cpu")]}

    @functools.cached_property
    def _data(self) -> Any:
        """Upstream's data manager, with the run's class order."""
        arguments = self._arguments
        names = ("dataset", "shuffle", "seed", "init_cls", "increment")
        with _code_of(self):
            manager = importlib.import_module("utils.data_manager").DataManager
            return manager(*(arguments[name] for name in names), arguments)


_NEEDED = {"seed", "init_cls", "increment"}  # of a configuration, whatever engine was told by it


def reopen(upstream: VisionUpstream, folder: Path, record: dict[str, Any]) -> ImageRun:
    """Return a finished run; see :class:`flatpatch.families.base.Family`."""
    try:
        config = json.loads((folder / "work" / CONFIG).read_text(encoding="utf-8"))
        vision = json.loads(_description(folder).read_text(encoding="utf-8"))["vision"]
        if not (isinstance(config, dict) and isinstance(vision, dict) and config.keys() >= _NEEDED):
            raise ValueError(f"{CONFIG} or {_description(folder).name} does not hold what it must")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"run={folder.name}: what it was told cannot be read ({error}). Make the run again.") from None
    return ImageRun(folder, record, upstream, config, vision)


def _description(folder: Path) -> Path:
    return folder / "tasks" / PROCESS / "hook.json"


# --- upstream's code


@contextlib.contextmanager
def _code_of(run: ImageRun) -> Iterator[None]:
    """Let upstream's modules be imported as in the run: from its tree, in its work folder, with its hooks.

    They are called ``utils`` and ``models``, and bind what the hooks say while they are imported. So each run imports
    its own, and what had these names before has them again afterwards.
    """
    if not run._upstream:
        with random_states_kept():
            yield
        return
    tree = run._tree
    names = {path.stem for path in tree.iterdir()}

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in names]

    aside = {name: sys.modules.pop(name) for name in imported()}
    here = Path.cwd()
    sys.path.insert(0, str(tree))
    os.chdir(run.folder / "work")
    try:
        with run.working(), random_states_kept(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # upstream's own, which the run's log has
            yield
    except FlatpatchError:
        raise
    except Exception as error:  # whatever the authors' code raises where data or files are not as in the run
        if not isinstance(error, ImportError) and not _passes_through(error, tree):
            raise
        raise UserError(
            f"{run.name}: the authors' code stops ({type(error).__name__}: {error}). It needs what the run needed: its "
            "images and weights in their places, and the libraries of its record."
        ) from error
    finally:
        os.chdir(here)
        sys.path.remove(str(tree))
        for name in imported():
            del sys.modules[name]
        sys.modules.update(aside)


def _passes_through(error: BaseException, tree: Path) -> bool:
    """Whether the call that failed was made by code in a folder."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).is_relative_to(tree) for frame in frames)


def _loss_of_upstream(network: Any, batch: Any) -> Any:
    return classification_loss(network, batch[0], batch[1], network.flatpatch_classes)


def _rebuild_upstream(run: ImageRun, index: int, joined: bool) -> nn.Module:
    data, arguments = run._data, run._arguments
    with _code_of(run):
        torch.manual_seed(0)  # what is neither read nor kept (no loss depends on it) shall be alike in all runs
        arguments = {**arguments, "class_order": data._class_order, "nb_tasks": data.nb_tasks}
        arguments["nb_classes"] = len(data._class_order)
        learner = importlib.import_module("utils.factory").get_model(arguments["model_name"], arguments)
        network: Any = learner._network
        run.row.grow(network, index, run._classes(index)[1] + 1)
    kept, trained = _read_kept(run, range(index + 1) if run.row.kept_by_task else range(index, index + 1))
    parameters = dict(network.named_parameters())
    network.requires_grad_(False)
    with torch.no_grad():
        for name, value in kept.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise UserError(f"{run.name}: the model after task {index + 1} has {name} of another model.")
            parameters[name].copy_(value)
            parameters[name].requires_grad_(name in trained or (joined and adapter_factor(name) is not None))
    first, last = run._classes(index)
    network.flatpatch_classes = last + 1 - first  # for the loss
    run.row.complete(
        network,
        index,
        network.flatpatch_classes,
        lambda task: _read_kept(run, range(task, task + 1))[0],
        joined=joined,
    )
    built: nn.Module = network
    return built


def _read_kept(run: ImageRun, tasks: range) -> tuple[dict[str, Tensor], set[str]]:
    """Return what was kept of some tasks, and the names of what the last of them trained."""
    kept: dict[str, Tensor] = {}
    trained: list[str] = []
    for task in tasks:
        path = kept_file(run.folder / "tasks" / PROCESS / MODELS, task)
        _check_kept(run, task, path)
        try:
            with safe_open(path, framework="pt") as file:
                trained = json.loads(file.metadata()["trained"])
                kept |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{run.name}: {path} cannot be read: {error}. Restore it, or make the run again.") from None
    return kept, set(trained)


def _check_kept(run: ImageRun, task: int, path: Path) -> None:
    """Refuse a kept model that is missing, with the cause, or is not the one that the run kept.

    Raises:
        UserError: If it is either.
    """
    remedy = "Make the run again, or measure inside it with measure=."
    if run.noted_hash(PROCESS, path) is not None:
        if not path.is_file():
            raise UserError(f"{run.name}: the model that it kept of task {task + 1}, {path}, is gone. {remedy}")
        run.check_file(PROCESS, path)
        return
    log = run.folder / "tasks" / PROCESS / "log.txt"
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    failures = [line for line in said if failure_of(task) in line]
    why = f"{log} says: {failures[-1]}" if failures else "Runs of earlier versions kept none."
    raise UserError(f"{run.name} kept no model of task {task + 1}. {why} {remedy}")

"""What every test stands on: no network, no display, one thread, fixed seeds, and the upstream checkouts."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy
import pytest
import torch

from tests.warm import IMAGES, TEXT, runs_by, warm_python

ROOT = Path(__file__).resolve().parent.parent

# Set before any test module imports the library that reads them, and inherited by the runs that tests start.
# TRANSFORMERS_OFFLINE is not set: with it, N-LoRA and O-LoRA refuse to start unless nltk has its punkt.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
}
# FLATPATCH_RUN switches the hooks on; git sets its own while it runs a hook, and they redirect our git calls.
REMOVED = ("FLATPATCH_RUN", "GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "TRANSFORMERS_OFFLINE")


def pytest_configure(config: pytest.Config) -> None:
    caches = tempfile.TemporaryDirectory(prefix="flatpatch-caches-")
    config.add_cleanup(caches.cleanup)
    os.environ.update(ENVIRONMENT, HF_HOME=caches.name)
    for name in REMOVED:
        os.environ.pop(name, None)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random numbers, in whatever order they run."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cuda_for_gpu_tests(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def third_party_folders() -> list[Path]:
    """Return where checkouts may lie, in the order in which flatpatch looks."""
    configured = subprocess.run(
        ["git", "config", "--type=path", "flatpatch.thirdParty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    named = [os.environ.get("FLATPATCH_THIRD_PARTY", ""), configured]
    return [ROOT / Path(folder).expanduser() for folder in [*named, "third_party"] if folder]


@pytest.fixture(scope="session")
def upstream() -> Callable[[str], Path]:
    """Return a function from a repository's name to its checkout; it skips the test where there is none."""

    def find(name: str) -> Path:
        for folder in third_party_folders():
            checkout = folder / name
            if (checkout / ".git").exists():
                return checkout
        pytest.skip(f"no checkout of {name}; run: git submodule update --init third_party/{name}")

    return find


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[[tuple[str, ...]], Path]]:
    """Return a function that gives the Python with some modules imported already, for processes on the CPU."""
    made: dict[tuple[str, ...], Path] = {}
    with ExitStack() as stack:

        def python(modules: tuple[str, ...]) -> Path:
            if modules not in made:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flatpatch-warm-"))
                made[modules] = stack.enter_context(warm_python(Path(folder), modules))
            return made[modules]

        yield python


@pytest.fixture
def warm_text_runs(warm: Callable[[tuple[str, ...]], Path]) -> Iterator[None]:
    """Let a test's runs of text methods start warm: where it is not about how a process starts or ends."""
    with runs_by(warm(TEXT)):
        yield


@pytest.fixture
def warm_image_runs(warm: Callable[[tuple[str, ...]], Path]) -> Iterator[None]:
    """As ``warm_text_runs``, of image methods."""
    with runs_by(warm(IMAGES)):
        yield


@pytest.fixture
def no_submodules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``third_party/`` be an empty folder, whether the submodules are filled or not, and return it."""
    folder = tmp_path / "third_party"
    folder.mkdir()
    monkeypatch.setattr("flatpatch.patches.workspace.Workspace.submodule", lambda _, repo: folder / repo)
    return folder

"""A small project with one upstream repository and its patches, made in a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.patches import Workspace, refresh
from flatpatch.patches.patchfile import FileChange, Insertion, Patch

REPO = "Toy"
HEADER = "Why:     a test needs it.\nTouches: {paths}.\nRemove when: the test goes.\n\n"
UPSTREAM = {
    "run.py": b"import os\n\n\ndef main():\n    trainer = os\n\n    return trainer\n",
    "data/big.json": b"[1, 2, 3]\n",
    "open-end.py": b"first\nsecond",
    ".gitignore": b"logs/\n",
}
CALL = Insertion(5, ("    import flatpatch.hooks", "    flatpatch.hooks.attach_trainer(trainer)"))
NO_BLOB = "0" * 40


def git(*arguments: str, folder: Path, **variables: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**os.environ, **identity, **variables},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def best_seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes when no other program is in the way."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Project:
    root: Path
    checkout: Path

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    @property
    def folder(self) -> Path:
        return self.root / "patches" / REPO

    @property
    def lock(self) -> dict[str, Any]:
        return json.loads((self.root / "patches/lock.json").read_text())[REPO]

    @property
    def pin(self) -> str:
        return git("rev-parse", "HEAD", folder=self.checkout)

    def edit(self, file: Path, change: Callable[[str], str]) -> None:
        before = file.read_bytes().decode()
        after = change(before)
        assert after != before
        file.write_bytes(after.encode())

    def commit_upstream(self, files: Mapping[str, bytes]) -> str:
        for name, content in files.items():
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkout / name).write_bytes(content)
        git("add", "--all", folder=self.checkout)
        git("commit", "--quiet", "--message", "next", folder=self.checkout)
        return self.pin

    def record_pin(self) -> None:
        git("update-index", "--add", "--cacheinfo", f"160000,{self.pin},third_party/{REPO}", folder=self.root)

    def write_patch(self, name: str, changes: Mapping[str, Sequence[Insertion]]) -> Path:
        blobs = {path: git("rev-parse", f"HEAD:{path}", folder=self.checkout) for path in changes}
        patch = Patch(
            name,
            HEADER.format(paths=", ".join(changes) or "nothing yet"),
            tuple(FileChange(path, "100644", blobs[path], NO_BLOB, tuple(lines)) for path, lines in changes.items()),
        )
        (self.folder / name).write_text(patch.text)
        with (self.folder / "series").open("a") as series:
            series.write(name + "\n")
        return self.folder / name

    def refresh(self) -> list[str]:
        return refresh(REPO, workspace=self.workspace)


def make_project(
    folder: Path,
    files: Mapping[str, bytes] = UPSTREAM,
    changes: Mapping[str, Sequence[Insertion]] | None = None,
) -> Project:
    """Make upstream's repository and a project whose ``third_party/Toy`` is a clone of it, with one patch."""
    project = Project(folder / "project", folder / "project/third_party" / REPO)
    project.checkout.mkdir(parents=True)
    git("init", "--quiet", "--template=", folder=project.checkout)
    git("config", "gc.auto", "0", folder=project.checkout)
    project.commit_upstream(files)
    project.folder.mkdir(parents=True)
    (project.folder / "series").touch()
    git("init", "--quiet", "--template=", folder=project.root)
    (project.root / ".gitmodules").write_text(
        f'[submodule "third_party/{REPO}"]\n\tpath = third_party/{REPO}\n\turl = {folder / "upstream.git"}\n'
    )
    git("clone", "--quiet", "--bare", str(project.checkout), str(folder / "upstream.git"), folder=folder)
    project.record_pin()
    project.write_patch("attach-the-trainer.patch", {"run.py": [CALL]} if changes is None else changes)
    project.refresh()
    return project

"""Make the disposable copy of a repository that runs execute: ``build/<Repo>-<first 12 digits of its tree>/``."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.files import digest, locked, made_whole
from flatpatch.patches.checks import Verified, apply_series, load_patches, verify
from flatpatch.patches.gitcalls import scratch
from flatpatch.patches.workspace import PROJECT, Workspace

# Written last into a copy; without it a folder is no copy of ours.
MANIFEST = ".flatpatch-copy.json"


@dataclass(frozen=True)
class Built:
    """A copy that is complete and unedited."""

    path: Path
    tree: str
    repo: str
    pin: str
    set_aside: Path | None = None  # where an edited copy was moved that stood in the way


def build(repo: str, *, patched: bool = True, into: Path | None = None, workspace: Workspace = PROJECT) -> Built:
    """Make the copy of a repository, or find the one that was made before.

    The copy is made from the checkout's git objects in a temporary folder, then renamed: it is either complete or not
    there. Files that a partial checkout lacks are left out. A copy that was edited is moved aside, never deleted.

    Args:
        repo: Name of the repository.
        patched: Whether to apply the patches.
        into: Folder in which copies lie; ``build/`` of the project by default.
        workspace: The project.

    Returns:
        The copy.

    Raises:
        UserError: If the repository does not verify.
    """
    verified = verify(repo, workspace=workspace)
    tree = verified.patched_tree if patched else verified.base_tree
    parent = (into or workspace.root / "build").resolve()
    path = copy_path(repo, tree, parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the copies' folder {parent} cannot be written: {error.strerror}. Make it writable."
        ) from error
    set_aside = None
    with locked(parent / f".{path.name}.lock"):
        manifest = read_manifest(path)
        if manifest is None or manifest["absent"] != list(verified.absent) or edited_files(path):
            if path.exists():
                set_aside = _free_name(path)
                path.rename(set_aside)
            _make(path, verified, tree, workspace)
    return Built(path, tree, repo, verified.pin, set_aside)


def copy_path(repo: str, tree: str, parent: Path = PROJECT.root / "build") -> Path:
    """Return where the copy of a tree lies."""
    return parent / f"{repo}-{tree[:12]}"


def read_manifest(copy: Path) -> dict[str, Any] | None:
    """Return what is recorded of a copy, or None if the folder is not a complete copy."""
    try:
        manifest: dict[str, Any] = json.loads((copy / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return manifest


def edited_files(copy: Path) -> list[tuple[str, str]]:
    """Compare a copy with its manifest.

    Args:
        copy: A folder with a manifest.

    Returns:
        What happened ("edited", "deleted", "new") and the path, for each file that was edited or deleted and each
        Python file that was added.
    """
    manifest = read_manifest(copy)
    assert manifest is not None
    found = []
    for path, recorded in manifest["files"].items():
        try:
            if _stamp(copy / path) != recorded[:2] and _sha256(copy / path) != recorded[2]:
                found.append(("edited", path))
        except OSError:
            found.append(("deleted", path))
    for file in sorted(copy.rglob("*.py")):
        if (path := file.relative_to(copy).as_posix()) not in manifest["files"]:
            found.append(("new", path))
    return found


def _make(path: Path, verified: Verified, tree: str, workspace: Workspace) -> None:
    with made_whole(path) as copy:
        with scratch(verified.checkout) as git:
            git.read_tree(verified.pin)
            if tree != verified.base_tree:
                patches, _ = load_patches(verified.repo, workspace)
                apply_series(git, patches, verified.pin)
            if git.write_tree() != tree:
                raise UserError(f"the patches of {verified.repo} changed while they were applied. Run it again.")
            files = [
                entry.path for entry in git.entries() if entry.path not in verified.absent and entry.mode != "160000"
            ]
            git.check_out(files, copy)
        manifest = {
            "repo": verified.repo,
            "pin": verified.pin,
            "tree": tree,
            "absent": list(verified.absent),
            "files": {name: [*_stamp(copy / name), _sha256(copy / name)] for name in files},
        }
        (copy / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _stamp(file: Path) -> list[int]:
    found = file.lstat()
    return [found.st_size, found.st_mtime_ns]


def _sha256(file: Path) -> str:
    if stat.S_ISLNK(file.lstat().st_mode):
        return hashlib.sha256(os.readlink(file).encode()).hexdigest()
    return digest(file)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}.edited-{number}")).exists():
        number += 1
    return name

"""Which flatpatch this is: a run is trained by one version alone."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatpatch import __version__, patches
from flatpatch.errors import FlatpatchError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
_DIRTY = "-dirty"


def own_code() -> dict[str, Any]:
    """Return the version, the commit with ``-dirty`` behind it where there are edits, and a hash of the package."""
    return {"version": __version__, "commit": _commit(ROOT), "code": _digest(PACKAGE)}


def other_code(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any], root: Path = ROOT) -> str:
    """Say how the flatpatch that began a run differs from this one, and how to get it; empty where it does not.

    Edits outside the package make no other code. Without git, the hash of the package is what is compared.
    """
    theirs = theirs or {}
    if all(_plain(theirs, key) == _plain(ours, key) for key in ("version", "commit", "code")):
        return ""
    commit, here = _plain(theirs, "commit"), _plain(ours, "commit")
    edits = " with edits" if str(theirs.get("commit")).endswith(_DIRTY) else ""
    if commit and commit != here:
        again = " and make the same edits, which are not kept" if edits else ""
        now = f"commit {here}" if here else "no git checkout"
        return (
            f"it was begun by flatpatch at commit {commit}{edits}, and this is {now}. To go on with it, run: "
            f"git -C {root} checkout {commit}{again}; then the same command"
        )
    return (
        f"it was begun by flatpatch {theirs.get('version')} with other files (a hash over the package is "
        f"{_short(theirs)} there and {_short(ours)} here). To go on with it, use the files that began it"
        + (f": git -C {root} status shows the edits" if here else "")
    )


def _plain(code: Mapping[str, Any], key: str) -> str:
    return str(code.get(key) or "").removesuffix(_DIRTY)


def _short(code: Mapping[str, Any]) -> str:
    return str(code.get("code") or "not recorded")[:12]


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # an unpacked archive, perhaps inside another project's repository
        return None
    try:
        return (
            patches.in_checkout(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None
        )
    except FlatpatchError:  # no git, or no commit
        return None


@functools.cache
def _digest(package: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()

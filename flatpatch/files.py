"""Files: written whole or not at all, hashed, locked, and found to have room."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flatpatch.errors import DiskFull, FlatpatchError, UserError

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 240
_BLOCK = 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between.

    Args:
        path: The file; its folder is there.
        content: Text is written as UTF-8.

    Raises:
        DiskFull: If the disk is full.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if is_disk_full(error):
            raise DiskFull(
                f"the disk is full: {path} was not written. Free some space and run the same command again."
            ) from error
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file that this program wrote.

    Raises:
        FlatpatchError: If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlatpatchError(f"{path} cannot be read ({error}). Remove it and run the same command again.") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether a full disk, or a used up quota, is what an error comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, read anew."""
    total = hashlib.sha256()
    _add(total, path)
    return total.hexdigest()


@functools.cache
def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file that does not change while this process runs."""
    return digest(path)


@functools.cache
def folder_hash(folder: Path) -> str | None:
    """Return a hash over the names and contents of a folder's files, None where there is no such folder."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        _add(total, path)
    return total.hexdigest()


def _add(total: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_BLOCK):
            total.update(chunk)


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock, which the system lets go when this process ends, however it ends.

    Args:
        path: The lock's file; made if it is missing.
        taken: The message where another process holds it.

    Raises:
        UserError: If another process holds it, or it cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(taken) from None
    except OSError as error:
        raise UserError(f"the folder {path.parent} cannot be written: {path.name}: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def folder_problems(folder: Path, bytes_needed: int, what: str = "run") -> list[str]:
    """Return why the folder of a run, or of something else, cannot be made or filled."""
    parent = folder
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if len(folder.name.encode()) > LONGEST_NAME:
        advice = "Give one with run=NAME." if what == "run" else "Choose another with output=FOLDER."
        return [f"the {what}'s name {folder.name[:40]}... is too long for a folder. {advice}"]
    if not parent.is_dir():
        return [
            f"the {what} folder {folder} cannot be made: {parent} is a file. Choose another place with output=FOLDER."
        ]
    if problem := unwritable(parent):
        return [f"the {what} folder {folder} cannot be written: {problem}. Choose another place with output=FOLDER."]
    fullest = min((parent, ROOT), key=lambda place: shutil.disk_usage(place).free)
    if (free := shutil.disk_usage(fullest).free) < bytes_needed:
        return [
            f"the disk of {fullest} is full: {free / 2**20:.0f} MiB free, {bytes_needed / 2**20:.0f} MiB needed. "
            "Free some space or choose another place with output=FOLDER."
        ]
    return []


def unwritable(folder: Path) -> str:
    """Return why nothing can be written into a folder, empty if it can.

    Tries it, because root may write where the mode bits say no and a full or read-only disk may not.
    """
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".flatpatch-")
        os.close(handle)
        os.unlink(name)
    except FileNotFoundError:  # as in /proc: the folder is there, and takes no file
        return "the place is read-only, no file can be made in it"
    except OSError as error:
        return error.strerror or str(error)
    return ""

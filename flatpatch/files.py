"""Files and folders: written whole or not at all, hashed, locked, and found to have room."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import secrets
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


@contextlib.contextmanager
def written_atomically(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a place to write to; what is there takes the place of ``path`` when the block ends.

    A reader, or a crash, sees the old file or the new one and nothing between. A block that fails leaves the old one.

    Args:
        path: The file; its folder is there.
        durable: Whether the content is on the disk before the name is, which a busy disk takes its time for.

    Yields:
        Where to write: a new name in the same folder.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        if durable:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file as ``written_atomically`` does, and say where the disk is full.

    Args:
        path: The file; its folder is there.
        content: Text is written as UTF-8.
        durable: As for ``written_atomically``.

    Raises:
        DiskFull: If the disk is full.
    """
    try:
        with written_atomically(path, durable=durable) as unfinished:
            unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"the disk is full: {path} was not written. Free some space and run the same command again."
            ) from error
        raise


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes ``folder`` when the block ends: that one is whole or not there.

    What a killed process left of an earlier attempt goes away, so no two processes may do this at the same time.

    Args:
        folder: Not there yet; the folder around it is.

    Yields:
        The folder to fill.
    """
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as holder:
        unfinished = Path(holder) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


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
def locked(path: Path, taken: str | None = None, *, patience: float = 0) -> Iterator[None]:
    """Hold a lock, which the system lets go when this process ends, however it ends.

    Args:
        path: The lock's file; made if it is missing.
        taken: The message where another process holds it; None to wait until that one lets it go.
        patience: Seconds to wait before that message.

    Raises:
        UserError: If another process holds it, or it cannot be made.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if taken is None else patience)
    except Timeout:
        raise UserError(str(taken)) from None
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

"""Files and folders are there whole or not at all, and one process at a time holds a lock."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.files import ROOT, digest, locked, made_whole, write_atomically, written_atomically

# Holds a lock until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from flatpatch.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with written_atomically(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["record.json"]


@pytest.mark.parametrize("written", [True, False])
def test_block_that_fails_leaves_the_old_file_alone(written: bool, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_atomically(path) as unfinished:
        if written:
            unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


def test_block_that_writes_nothing_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), written_atomically(path):
        pass
    assert path.read_text() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_written_file_has_the_mode_of_other_files(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_text_is_utf_8_and_bytes_are_themselves(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "1 ± 2\n")
    assert (tmp_path / "a").read_bytes() == b"1 \xc2\xb1 2\n"
    write_atomically(tmp_path / "a", b"\r\n\x00")
    assert (tmp_path / "a").read_bytes() == b"\r\n\x00"
    assert digest(tmp_path / "a") == hashlib.sha256(b"\r\n\x00").hexdigest()


def test_folder_is_there_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    folder = tmp_path / "copy[1]"
    with made_whole(folder) as unfinished:
        (unfinished / "a").write_text("a")
        assert not folder.exists()
    assert names(folder) == ["a"]
    assert names(tmp_path) == ["copy[1]"]


def test_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no more"), made_whole(tmp_path / "copy") as unfinished:
        (unfinished / "a").write_text("a")
        raise OSError("no more")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_of_a_folder_goes_away(tmp_path: Path) -> None:
    for name in (".copy[1].killed.tmp", ".copy1.killed.tmp"):
        (tmp_path / name / "copy").mkdir(parents=True)
    with made_whole(tmp_path / "copy[1]"):
        pass
    assert names(tmp_path) == [".copy1.killed.tmp", "copy[1]"]


def test_lock_that_another_process_holds_is_told_or_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="somebody is at work"), locked(path, "somebody is at work"):
            pass
        began = time.monotonic()
        threading.Timer(0.5, holder.kill).start()
        with locked(path):
            assert time.monotonic() - began >= 0.5
    with locked(path, "somebody is at work"):
        pass


def test_lock_that_cannot_be_made_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = f"the folder {tmp_path / 'file'} cannot be written: lock: "
    with pytest.raises(UserError, match=expected), locked(tmp_path / "file" / "lock", "taken"):
        pass

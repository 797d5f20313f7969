"""A reader that goes away ends no run, and leaves no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatpatch.terminal import Lasting

ROOT = Path(__file__).resolve().parent.parent


def test_text_goes_through_as_long_as_somebody_reads() -> None:
    source, target = os.pipe()
    with os.fdopen(source) as reader, os.fdopen(target, "w") as writer:
        stream = Lasting(writer)
        print("a\nb", file=stream, flush=True)
        assert [reader.readline(), reader.readline()] == ["a\n", "b\n"]
        assert not stream.isatty()


def test_stream_falls_silent_when_its_reader_has_gone() -> None:
    source, target = os.pipe()
    os.close(source)
    with os.fdopen(target, "w") as writer:
        with pytest.raises(BrokenPipeError):
            os.write(target, b"x")
        stream = Lasting(writer)
        assert stream.write("x" * 100_000) == 100_000  # more than a buffer holds
        stream.flush()
        print("and on", file=stream, flush=True)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["nonsense"]])
def test_command_whose_reader_has_gone_ends_without_a_traceback(words: list[str]) -> None:
    """As in ``--help | head -1``, where it died with a traceback."""
    source, target = os.pipe()
    os.close(source)
    command = [sys.executable, "-m", "flatpatch", *words]
    with os.fdopen(target, "wb") as gone:
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert ended.returncode == (2 if words == ["nonsense"] else 0)
    assert b"Broken" not in ended.stderr and b"Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["compare", "--help"], ["patches", "--help"]])
def test_full_standard_output_is_named_without_a_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "flatpatch", *words]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert ended.returncode == 85  # as of any full disk
    assert ended.stderr == "flatpatch: cannot write to standard output: no space left on device.\n"


def test_full_standard_error_changes_no_exit_code() -> None:
    command = [sys.executable, "-m", "flatpatch", "nonsense"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stderr=full, stdout=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")

"""What a machine may lack: each is one message that names it, without a traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.patches.gitcalls import run_git
from flatpatch.runner.own_code import own_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.usefixtures("without_git")
def test_reference_run_needs_no_git(capsys: pytest.CaptureFixture[str]) -> None:
    assert patches.is_available("N-LoRA") == (
        False,
        "there is no git on PATH, which reads the authors' repositories. Install git.",
    )
    assert own_code()["commit"] is None
    assert main(["run", "method=nlora", "profile=quick", "device=cpu", "--dry-run"]) == 0
    assert "engine reference: N-LoRA cannot be had: there is no git on PATH" in capsys.readouterr().out


@pytest.mark.usefixtures("without_git")
@pytest.mark.parametrize(
    "words", [["run", "method=nlora", "profile=quick", "engine=upstream", "device=cpu"], ["patches", "verify"]]
)
def test_command_that_needs_git_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("flatpatch: there is no git on PATH")


def test_package_can_be_imported_without_git(tmp_path: Path) -> None:
    """GitPython looks for git while it is imported."""
    code = "import flatpatch.patches"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PATH": str(tmp_path)}, check=False)
    assert ended.returncode == 0


def test_python_without_the_libraries_is_told_which_script_to_use() -> None:
    """It has nothing but the standard library: -S leaves out what is installed."""
    command = [sys.executable, "-S", "-m", "flatpatch", "run", "method=nlora"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"flatpatch: {sys.executable} (Python ")
    assert "bash run_scripts/run.sh run" in ended.stderr and "Traceback" not in ended.stderr


def test_missing_part_of_the_package_itself_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'flatpatch.lost'", name="flatpatch.lost")

    monkeypatch.setattr("flatpatch.__main__._dispatch", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["run"])


def test_full_folder_of_temporary_files_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=f"the folder of temporary files, {tmp_path}: No space left .* TMPDIR=FOLDER"):
        run_git("version", folder=tmp_path)

    def broken(words: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flatpatch.__main__._dispatch", broken)
    assert main(["run"]) == 85
    assert f"the disk is full: nothing can be written into the folder of temporary files, {tmp_path}" in (
        capsys.readouterr().err
    )


@pytest.mark.third_party
def test_copies_folder_that_cannot_be_written_is_named(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    upstream("N-LoRA")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"the copies' folder {tmp_path / 'file' / 'build'} cannot be written"):
        patches.build("N-LoRA", into=tmp_path / "file" / "build")

"""A run goes on with the flatpatch that began it, and with no other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flatpatch.runner import own_code as module
from flatpatch.runner.own_code import other_code, own_code

OURS = {"version": "0.1.0", "commit": "a" * 40, "code": "1" * 64}


def test_same_code_is_no_other_whatever_is_edited_outside_the_package() -> None:
    assert other_code(OURS, OURS) == ""
    assert other_code(OURS | {"commit": "a" * 40 + "-dirty"}, OURS) == ""


def test_another_commit_is_named_with_the_command_that_checks_it_out() -> None:
    text = other_code(OURS | {"commit": "b" * 40}, OURS, Path("/project"))
    assert text.endswith(f"run: git -C /project checkout {'b' * 40}; then the same command")
    assert "edits" not in text
    text = other_code(OURS | {"commit": "b" * 40 + "-dirty"}, OURS, Path("/project"))
    assert f"checkout {'b' * 40} and make the same edits, which are not kept" in text


def test_edited_package_at_the_same_commit_is_another_code() -> None:
    text = other_code(OURS | {"code": "2" * 64}, OURS, Path("/project"))
    assert "222222222222 there and 111111111111 here" in text
    assert "git -C /project status" in text


def test_without_git_the_files_are_compared() -> None:
    bare = OURS | {"commit": None}
    assert other_code(bare, bare) == ""
    text = other_code(bare | {"code": "2" * 64}, bare)
    assert "222222222222 there and 111111111111 here" in text
    assert "git" not in text
    assert "and this is no git checkout" in other_code(OURS, bare)


def test_record_of_an_earlier_version_is_of_another_code() -> None:
    assert "not recorded there" in other_code({"version": "0.1.0", "commit": "a" * 40}, OURS)
    assert other_code(None, OURS)


def test_hash_follows_the_packages_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flatpatch"
    (package / "__pycache__").mkdir(parents=True)
    (package / "a.py").write_text("1")

    def digest() -> str:
        module._digest.cache_clear()
        return module._digest(package)

    first = digest()
    (package / "__pycache__" / "a.pyc").write_text("anything")
    assert digest() == first
    (package / "a.py").write_text("2")
    assert digest() != first
    module._digest.cache_clear()


def test_commit_is_the_projects_own_and_none_without_its_own_git(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert module._commit(tmp_path) == head
    (tmp_path / "unpacked").mkdir()
    assert module._commit(tmp_path / "unpacked") is None


def test_no_git_on_the_path_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert module._commit(tmp_path) is None
    assert set(own_code()) == {"version", "commit", "code"}

"""The disposable copy: what is in it, when it is made again, and the round trips of applying a patch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatpatch.errors import UserError
from flatpatch.patches import Built, Workspace, build, verify
from flatpatch.patches.copies import MANIFEST
from flatpatch.patches.patchfile import Insertion
from flatpatch.patches.workspace import VARIABLE
from tests.patches_project import CALL, REPO, UPSTREAM, Project, git, make_project


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def built(project: Project, *, patched: bool = True, into: Path | None = None) -> Built:
    return build(REPO, patched=patched, into=into, workspace=project.workspace)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.lstat().st_mtime_ns, file.lstat().st_ino) for file in folder.rglob("*")}


def test_the_copy_is_the_pin_with_the_lines_inserted(project: Project) -> None:
    copy = built(project)
    assert copy.path == project.root / f"build/{REPO}-{project.lock['patched_tree'][:12]}"
    assert (copy.tree, copy.repo, copy.pin) == (project.lock["patched_tree"], REPO, project.pin)
    lines = UPSTREAM["run.py"].decode().splitlines(keepends=True)
    expected = "".join([*lines[:5], *(f"{line}\n" for line in CALL.lines), *lines[5:]]).encode()
    assert files_of(copy.path) == UPSTREAM | {"run.py": expected}


def test_the_unpatched_copy_is_the_pin_and_stands_beside_the_patched_one(project: Project) -> None:
    patched, plain = built(project), built(project, patched=False)
    assert files_of(plain.path) == UPSTREAM
    assert plain.tree == project.lock["base_tree"]
    assert plain.path.parent == patched.path.parent
    assert plain.path != patched.path
    assert built(project) == patched


def test_building_touches_nothing_in_the_checkout_even_if_it_is_read_only(project: Project) -> None:
    (project.checkout / "run.py").touch()
    before = snapshot(project.checkout)
    subprocess.run(["chmod", "-R", "a-w", str(project.checkout)], check=True)
    try:
        built(project)
        assert snapshot(project.checkout) == before
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(project.checkout)], check=True)


def test_building_twice_reuses_the_copy(project: Project) -> None:
    first = built(project)
    before = snapshot(first.path)
    assert built(project) == first
    assert snapshot(first.path) == before


def test_running_in_a_copy_does_not_make_it_stale(project: Project) -> None:
    first = built(project)
    (first.path / "__pycache__").mkdir()
    (first.path / "__pycache__/run.cpython-311.pyc").write_bytes(b"")
    (first.path / "logs").mkdir()
    (first.path / "logs/0.log").write_text("step 1")
    (first.path / "run.py").touch()
    assert built(project).set_aside is None
    assert (first.path / "logs/0.log").exists()


@pytest.mark.parametrize("edit", ["same size", "longer", "deleted", "added", "half-made"])
def test_an_edited_or_half_made_copy_is_made_again_and_the_old_one_kept(project: Project, edit: str) -> None:
    path = built(project).path
    expected = files_of(path)
    run = path / "run.py"
    if edit == "same size":
        run.write_bytes(run.read_bytes().replace(b"trainer = os", b"trainer = so"))
    elif edit == "longer":
        run.write_bytes(run.read_bytes() + b"# mine\n")
    elif edit == "deleted":
        run.unlink()
    elif edit == "added":
        (path / "torch.py").write_text("# shadows a library\n")
    else:
        (path / MANIFEST).unlink()
    edited = files_of(path)
    again = built(project)
    assert files_of(again.path) == expected
    assert again.set_aside == path.with_name(f"{path.name}.edited-1")
    assert files_of(again.set_aside) == edited
    assert built(project).set_aside is None


def test_a_build_that_was_killed_leaves_nothing_that_counts_as_a_copy(project: Project) -> None:
    path = built(project).path
    leftover = path.parent / f".{path.name}.killed.tmp" / path.name
    leftover.parent.mkdir()
    path.rename(leftover)
    (leftover / MANIFEST).unlink()
    assert files_of(built(project).path)
    assert not leftover.exists()


def test_files_that_a_partial_checkout_lacks_are_left_out_until_they_are_there(project: Project) -> None:
    git("sparse-checkout", "set", "--no-cone", "/*", "!/data/", folder=project.checkout)
    blob = git("rev-parse", "HEAD:data/big.json", folder=project.checkout)
    stored = project.checkout / ".git/objects" / blob[:2] / blob[2:]
    stored.rename(project.root / "object")
    partial = built(project)
    assert "data/big.json" not in files_of(partial.path)
    assert partial.tree == project.lock["patched_tree"]
    assert built(project) == partial
    (project.root / "object").rename(stored)
    assert "data/big.json" in files_of(built(project).path)


def test_a_checkout_that_does_not_verify_is_not_built(project: Project) -> None:
    (project.checkout / "torch.py").write_text("")
    with pytest.raises(UserError, match="torch.py"):
        built(project)
    assert not (project.root / "build").exists()


def test_the_working_directory_and_the_users_configuration_do_not_change_the_copy(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = built(project, into=tmp_path / "first")
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n\teol = crlf\n[apply]\n\twhitespace = error\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.chdir(tmp_path)
    found = built(project, into=Path("second"))
    assert found.path == tmp_path / "second" / expected.path.name
    assert files_of(found.path) == files_of(expected.path)


def test_the_copy_keeps_executable_bits_links_and_odd_names(tmp_path: Path) -> None:
    odd = {"run.py": UPSTREAM["run.py"], "a b/ü [x].py": b"x\n", "script.sh": b"#!/bin/sh\n"}
    project = make_project(tmp_path, odd)
    (project.checkout / "script.sh").chmod(0o755)
    (project.checkout / "link").symlink_to("run.py")
    project.commit_upstream({".gitattributes": b"* text eol=crlf\n"})
    project.record_pin()
    project.refresh()
    copy = built(project)
    assert os.readlink(copy.path / "link") == "run.py"
    assert (copy.path / "script.sh").stat().st_mode & stat.S_IXUSR
    assert (copy.path / "a b/ü [x].py").read_bytes() == b"x\n", "byte for byte, whatever .gitattributes says"
    assert built(project).set_aside is None


def build_in_child(root: Path, gate: multiprocessing.synchronize.Barrier, answers: multiprocessing.Queue) -> None:
    gate.wait()
    copy = build(REPO, workspace=Workspace(root))
    answers.put((copy, files_of(copy.path)))


def test_builds_at_the_same_time_share_one_complete_copy(project: Project) -> None:
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(3), context.Queue()
    children = [context.Process(target=build_in_child, args=(project.root, gate, answers)) for _ in range(3)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found[0] == found[1] == found[2]
    assert found[0][0].set_aside is None
    visible = [path.name for path in (project.root / "build").iterdir() if not path.name.endswith(".lock")]
    assert visible == [found[0][0].path.name]


# Lines that look alike make it matter where exactly a line is inserted.
old_line = st.sampled_from([b"", b"a", b"    a", b"b", b"a\r", b"\x0c", b"\xff"])
new_line = st.sampled_from(["", "a", "b", "    x", "+y", "@@ -1,0 +1,1 @@", "a\r", "ü"])


@st.composite
def upstream_and_insertions(draw: st.DrawFn) -> tuple[bytes, list[Insertion]]:
    count = draw(st.integers(0, 6))
    content = b"".join(draw(old_line) + b"\n" for _ in range(count))
    if draw(st.booleans()):
        content += b"no newline at the end"
    # The start, the end, or anywhere between.
    places = sorted(draw(st.sets(st.integers(0, count), min_size=1, max_size=3)))
    return content, [Insertion(place, tuple(draw(st.lists(new_line, min_size=1, max_size=3)))) for place in places]


@settings(max_examples=8, deadline=None)
@given(upstream_and_insertions())
@pytest.mark.slow
def test_applying_inserts_the_lines_and_reversing_restores_the_pinned_tree(case: tuple[bytes, list[Insertion]]) -> None:
    content, insertions = case
    lines = content.split(b"\n")
    expected = []
    for number in range(len(lines)):
        expected += [line.encode() for insertion in insertions if insertion.after == number for line in insertion.lines]
        expected.append(lines[number])
    with tempfile.TemporaryDirectory() as name:
        project = make_project(Path(name), {"run.py": content, "other.py": b"x\n"}, {"run.py": insertions})
        verified = verify(REPO, workspace=project.workspace)
        copy = built(project)
        assert (copy.path / "run.py").read_bytes() == b"\n".join(expected)
        patch = str(project.folder / "attach-the-trainer.patch")

        index = {"GIT_INDEX_FILE": str(project.root / "index")}
        git("read-tree", verified.pin, folder=project.checkout, **index)
        git("apply", "--cached", "--unidiff-zero", patch, folder=project.checkout, **index)
        assert git("write-tree", folder=project.checkout, **index) == verified.patched_tree
        git("apply", "--cached", "--unidiff-zero", "--reverse", patch, folder=project.checkout, **index)
        assert git("write-tree", folder=project.checkout, **index) == verified.base_tree

        again = built(project)
        assert again == copy, "applying twice equals applying once"
        shutil.rmtree(copy.path)
        assert files_of(built(project).path) == {"run.py": b"\n".join(expected), "other.py": b"x\n"}

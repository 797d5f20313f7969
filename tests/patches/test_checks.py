"""Verifying: what is sound passes, offline and fast; each bad state is refused by a message that says what to do."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.patches import (
    checks,
    cli,
    find_checkout,
    inserted_lines,
    is_available,
    skipped_checkouts,
    verify,
    verify_patches,
)
from flatpatch.patches.patchfile import Insertion
from flatpatch.patches.workspace import CONFIG, VARIABLE
from tests.patches_project import CALL, REPO, Project, best_seconds, git, make_project

CALL_LINES = CALL.lines
REFRESH = f"Run: python -m flatpatch patches refresh repo={REPO}"


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gitconfig").touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def refusal(project: Project) -> str:
    with pytest.raises(UserError) as caught:
        verify(REPO, workspace=project.workspace)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_sound_project_verifies_within_a_second(project: Project) -> None:
    verified = verify(REPO, workspace=project.workspace)
    assert best_seconds(lambda: verify(REPO, workspace=project.workspace)) < 1
    assert verified.pin == project.pin
    assert verified.base_tree == git("rev-parse", "HEAD^{tree}", folder=project.checkout)
    assert verified.patched_tree == project.lock["patched_tree"] != verified.base_tree
    assert verified.checkout == project.checkout
    assert verified.absent == ()


def test_inserted_lines_have_their_numbers_in_the_file_with_all_patches_applied(project: Project) -> None:
    later = (Insertion(0, ("# top",)), Insertion(6, ("    # between",)), Insertion(8, ("    # below",)))
    project.write_patch("second.patch", {"run.py": later})
    lines = (project.checkout / "run.py").read_text().splitlines()
    for insertions in ((Insertion(5, CALL_LINES),), later):
        for insertion in reversed(insertions):
            lines[insertion.after : insertion.after] = insertion.lines
    found = inserted_lines(REPO, workspace=project.workspace)
    assert [line for _, _, line in found] == ["# top", CALL_LINES[0], "    # between", CALL_LINES[1], "    # below"]
    assert all(path == "run.py" and lines[number - 1] == line for path, number, line in found)


def test_verifying_writes_nothing_into_the_checkout(project: Project) -> None:
    (project.checkout / "run.py").touch()  # git would like to refresh its index
    before = {file: file.lstat().st_mtime_ns for file in project.checkout.rglob("*")}
    verify(REPO, workspace=project.workspace)
    assert {file: file.lstat().st_mtime_ns for file in project.checkout.rglob("*")} == before


def test_verifying_ignores_the_variables_of_a_running_git_hook(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify(REPO, workspace=project.workspace)
    monkeypatch.setenv("GIT_DIR", str(project.root / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(project.root / ".git/index"))
    assert verify(REPO, workspace=project.workspace) == before


def test_another_commit_is_refused(project: Project) -> None:
    pin = project.pin
    found = project.commit_upstream({"run.py": b"nothing\n"})
    message = refusal(project)
    assert f"{project.checkout} is at another commit: expected the pin {pin}, found {found}." in message
    assert (
        f"Run: git -C {project.checkout} fetch --depth 1 origin {pin} && git -C {project.checkout} checkout" in message
    )


def test_an_edited_file_of_the_checkout_is_refused(project: Project) -> None:
    project.edit(project.checkout / "run.py", lambda text: text + "# mine\n")
    message = refusal(project)
    assert f"{project.checkout} has edits that are in no patch: run.py (edited)" in message
    assert f"git -C {project.checkout} checkout {project.pin} -- ." in message


def test_a_staged_edit_of_the_checkout_is_refused(project: Project) -> None:
    project.edit(project.checkout / "run.py", lambda text: text + "# mine\n")
    git("add", "run.py", folder=project.checkout)
    assert "run.py (edited)" in refusal(project)


def test_a_deleted_file_of_the_checkout_is_refused(project: Project) -> None:
    (project.checkout / "data/big.json").unlink()
    assert "data/big.json (deleted)" in refusal(project)


def test_an_untracked_file_of_the_checkout_is_refused_even_if_the_user_ignores_it(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "ignore").write_text("torch.py\n")
    (tmp_path / "gitconfig").write_text(f"[core]\n\texcludesFile = {tmp_path / 'ignore'}\n")
    (project.checkout / "torch.py").write_text("")
    assert "torch.py (untracked)" in refusal(project)


def test_byte_code_and_files_that_upstream_ignores_are_accepted(project: Project) -> None:
    for name in ("__pycache__/run.cpython-311.pyc", "data/__pycache__/x.pyc", "logs/0.log"):
        (project.checkout / name).parent.mkdir(exist_ok=True)
        (project.checkout / name).write_text("")
    verify(REPO, workspace=project.workspace)


def test_an_edited_patch_is_refused(project: Project) -> None:
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("hooks.attach", "hooks.detach"))
    message = refusal(project)
    assert f"patches/{REPO}/attach-the-trainer.patch is not the patch in patches/lock.json: expected sha256 " in message
    assert REFRESH.removeprefix("Run: ") in message
    assert "attach-the-trainer.patch:5 leads to another run.py than it says: expected blob " in message


def test_a_patch_in_no_series_is_refused(project: Project) -> None:
    (project.folder / "more.patch").write_text("")
    assert f"patches/{REPO}/more.patch is in no series. Add a line more.patch to patches/{REPO}/series" in refusal(
        project
    )


def test_a_patch_that_is_not_utf_8_is_refused(project: Project) -> None:
    (project.folder / "attach-the-trainer.patch").write_bytes(b"Why: caf\xe9\n")
    assert "attach-the-trainer.patch is not UTF-8 text (byte 8)." in refusal(project)


def test_a_series_with_a_missing_patch_is_refused(project: Project) -> None:
    (project.folder / "attach-the-trainer.patch").unlink()
    assert f"patches/{REPO}/series:1 names attach-the-trainer.patch, but there is no" in refusal(project)


def test_a_series_with_a_repeated_patch_is_refused(project: Project) -> None:
    project.edit(project.folder / "series", lambda text: "# twice\n" + text + text)
    assert f"patches/{REPO}/series:3 names attach-the-trainer.patch a second time" in refusal(project)


def test_a_patch_dropped_from_the_series_and_the_folder_is_refused(project: Project) -> None:
    (project.folder / "attach-the-trainer.patch").unlink()
    (project.folder / "series").write_text("")
    assert f"patches/lock.json has attach-the-trainer.patch, which patches/{REPO}/series does not name" in refusal(
        project
    )


def test_a_patch_that_deletes_a_line_is_refused(project: Project) -> None:
    change = "@@ -5,1 +6,2 @@\n-    trainer = os\n"
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("@@ -5,0 +6,2 @@\n", change))
    message = refusal(project)
    assert f"patches/{REPO}/attach-the-trainer.patch:9 takes in lines of upstream" in message
    assert "attach-the-trainer.patch:10 deletes a line of upstream" in message


@pytest.mark.parametrize("field", ["Why", "Touches", "Remove when"])
def test_a_header_that_lacks_a_field_is_refused(project: Project, field: str) -> None:
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace(f"{field}:", f"{field}"))
    assert f"attach-the-trainer.patch has no '{field}:' in its header." in refusal(project)


@pytest.mark.parametrize("tree", ["base_tree", "patched_tree"])
def test_another_tree_in_the_lock_file_is_refused(project: Project, tree: str) -> None:
    expected, wrong = project.lock[tree], "1" * 40
    project.edit(
        project.root / "patches/lock.json", lambda text: text.replace(f'"{tree}": "{expected}"', f'"{tree}": "{wrong}"')
    )
    message = refusal(project)
    assert (
        f"{tree} of {REPO} at pin {project.pin} is not what git computes: expected {wrong}, found {expected}" in message
    )


def test_a_submodule_recorded_at_another_commit_is_refused(project: Project) -> None:
    wrong = "1" * 40
    git("update-index", "--cacheinfo", f"160000,{wrong},third_party/{REPO}", folder=project.root)
    message = refusal(project)
    assert f"commit recorded for the submodule is {wrong}, patches/lock.json expects {project.pin}" in message


def test_another_address_in_gitmodules_is_refused(project: Project) -> None:
    project.edit(project.root / ".gitmodules", lambda text: text.replace("upstream.git", "fork.git"))
    assert "address in .gitmodules is " in refusal(project)


def test_a_lock_file_without_an_entry_is_refused(project: Project) -> None:
    (project.root / "patches/lock.json").write_text("{}")
    assert f"patches/lock.json has no complete entry for {REPO}. {REFRESH}" in refusal(project)


def test_a_lock_file_that_is_no_json_is_refused(project: Project) -> None:
    (project.root / "patches/lock.json").write_text("{\n<<<<<<<\n}")
    assert "lock.json:2 is not JSON" in refusal(project)


def test_all_problems_are_named_at_once(project: Project) -> None:
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("Why:", "Because:"))
    project.edit(project.checkout / "run.py", lambda text: text + "# mine\n")
    (project.checkout / "torch.py").write_text("")
    message = refusal(project)
    for part in ("has no 'Why:'", "is not the patch in patches/lock.json", "run.py (edited)", "torch.py (untracked)"):
        assert part in message


def test_a_patch_made_for_another_version_of_the_file_is_refused_without_fuzz(project: Project) -> None:
    blob = git("rev-parse", "HEAD:run.py", folder=project.checkout)
    found = project.commit_upstream({"run.py": b"# one line more\n" + (project.checkout / "run.py").read_bytes()})
    project.record_pin()
    lock = project.lock
    tree = git("rev-parse", "HEAD^{tree}", folder=project.checkout)
    project.edit(
        project.root / "patches/lock.json",
        lambda text: text.replace(lock["pin"], found).replace(lock["base_tree"], tree),
    )
    message = refusal(project)
    assert f"attach-the-trainer.patch:5 does not apply: its line numbers are those of run.py at blob {blob}" in message
    assert f"found {git('rev-parse', 'HEAD:run.py', folder=project.checkout)} there (pin {found}" in message
    assert REFRESH in message


def test_a_patch_of_a_file_that_upstream_lacks_is_refused(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("run.py", "walk.py"))
    assert f"does not apply: walk.py is not in pin {project.pin}" in refusal(project)


def test_a_hunk_with_a_wrong_number_is_refused(project: Project) -> None:
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("+6,2 @@", "+7,2 @@"))
    assert "attach-the-trainer.patch:9 expected '@@ -5,0 +6,2 @@', found '@@ -5,0 +7,2 @@'" in refusal(project)


def delete_object(project: Project, path: str) -> None:
    blob = git("rev-parse", f"HEAD:{path}", folder=project.checkout)
    (project.checkout / ".git/objects" / blob[:2] / blob[2:]).unlink()


def test_a_partial_copy_with_missing_objects_verifies_and_names_what_is_absent(project: Project) -> None:
    git("sparse-checkout", "set", "--no-cone", "/*", "!/data/", folder=project.checkout)
    delete_object(project, "data/big.json")
    delete_object(project, "open-end.py")  # beside the patched file
    assert not (project.checkout / "data").exists()
    assert verify(REPO, workspace=project.workspace).absent == ("data/big.json", "open-end.py")


def test_a_sparse_checkout_that_has_all_objects_lacks_nothing(project: Project) -> None:
    git("sparse-checkout", "set", "--no-cone", "/*", "!/data/", folder=project.checkout)
    assert verify(REPO, workspace=project.workspace).absent == ()


def test_a_partial_copy_without_the_patched_file_is_refused(project: Project) -> None:
    delete_object(project, "run.py")
    message = refusal(project)
    assert "this partial checkout lacks the content of run.py" in message


def advised(message: str) -> str:
    """Return the commands that a message says to run."""
    found = re.search(r"run: (git -C .*?)(?=\. Without|$)", message, re.MULTILINE)
    assert found is not None, message
    return found[1]


def test_edits_are_dropped_by_the_command_that_is_told(project: Project) -> None:
    (project.checkout / "run.py").write_text("edited\n")
    (project.checkout / "data/big.json").unlink()
    subprocess.run(advised(refusal(project)), shell=True, check=True, capture_output=True)
    verify(REPO, workspace=project.workspace)


def test_deleted_files_of_a_partial_clone_come_back_by_the_command_that_is_told(
    project: Project, tmp_path: Path
) -> None:
    """A mere checkout of contents that were never cloned cannot work, and a mere fetch keeps the clone's filter."""
    source, partial = project.checkout.rename(tmp_path / "source"), project.checkout
    git("config", "uploadpack.allowFilter", "true", folder=source)
    git("config", "uploadpack.allowAnySHA1InWant", "true", folder=source)
    git("clone", "--filter=blob:none", "--no-checkout", source.as_uri(), str(partial), folder=tmp_path)
    git("read-tree", "HEAD", folder=partial)
    message = refusal(project)
    assert f"run: git -C {partial} checkout" not in message
    assert "This checkout is partial and does not hold the content of .gitignore, data/big.json" in message
    subprocess.run(advised(message), shell=True, check=True, capture_output=True)
    source.rename(tmp_path / "gone")  # all of it is here now
    assert verify(REPO, workspace=project.workspace).absent == ()


@pytest.mark.parametrize("source", [VARIABLE, CONFIG])
def test_folder_that_is_itself_the_repository_is_told_the_one_around_it(
    source: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone into it, which was the advice, would lie inside another repository."""
    holder = tmp_path / "shared"
    holder.mkdir()
    project.checkout.rename(holder / REPO)
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    if source == VARIABLE:
        monkeypatch.setenv(VARIABLE, str(holder / REPO))
    else:
        git("config", "--global", CONFIG, str(holder / REPO), folder=tmp_path)
    message = refusal(project)
    assert f"{holder / REPO} is itself a git checkout; name the folder that holds it, {holder}" in message
    assert "git clone" not in message
    command = f"export {VARIABLE}={holder}" if source == VARIABLE else f"{CONFIG} {holder}"
    assert command in message
    monkeypatch.setenv(VARIABLE, str(holder))
    verify(REPO, workspace=project.workspace)


def test_patches_are_verified_without_a_checkout(project: Project, tmp_path: Path) -> None:
    project.checkout.rename(tmp_path / "elsewhere")
    verify_patches(REPO, workspace=project.workspace)
    project.edit(project.folder / "attach-the-trainer.patch", lambda text: text.replace("Why:", "Because:"))
    with pytest.raises(UserError, match="has no 'Why:'"):
        verify_patches(REPO, workspace=project.workspace)


def test_the_checkout_is_looked_for_in_the_variable_then_the_configuration_then_third_party(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkout_in(folder: Path) -> Path:
        git("clone", "--quiet", str(project.checkout), str(folder / REPO), folder=tmp_path)
        return folder / REPO

    assert find_checkout(REPO, workspace=project.workspace) == project.checkout
    git("config", "--global", CONFIG, str(tmp_path / "shared"), folder=tmp_path)
    assert find_checkout(REPO, workspace=project.workspace) == project.checkout, "nothing there: the next place"
    configured = checkout_in(tmp_path / "shared")
    assert find_checkout(REPO, workspace=project.workspace) == configured
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    assert find_checkout(REPO, workspace=project.workspace) == configured
    own = checkout_in(tmp_path / "own")
    assert find_checkout(REPO, workspace=project.workspace) == own
    assert verify(REPO, workspace=project.workspace).checkout == own


@pytest.mark.parametrize("verb", ["verify", "apply", "show"])
def test_a_named_folder_without_the_checkout_is_told_and_the_next_place_is_used(
    verb: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert skipped_checkouts(REPO, workspace=project.workspace) == []
    shared, own = tmp_path / "shared", tmp_path / "own"
    (shared / REPO).mkdir(parents=True)
    git("config", "--global", CONFIG, str(shared), folder=tmp_path)
    configured = f"git config {CONFIG}={shared} has no {REPO}: {shared / REPO} is not a git checkout"
    assert skipped_checkouts(REPO, workspace=project.workspace) == [configured]
    monkeypatch.setenv(VARIABLE, str(own))
    named = f"{VARIABLE}={own} has no {REPO}: {own / REPO} does not exist, nor does {own}"
    assert skipped_checkouts(REPO, workspace=project.workspace) == [named, configured]
    assert cli([verb], workspace=project.workspace) == 0
    notes, shown = (f"note: {named}", f"note: {configured}"), capsys.readouterr().out.splitlines()
    assert tuple(shown[:2]) == notes
    assert "not here" not in shown[2]
    git("clone", "--quiet", str(project.checkout), str(own / REPO), folder=tmp_path)
    assert skipped_checkouts(REPO, workspace=project.workspace) == [], "what is named but not asked is nobody's concern"


@pytest.mark.parametrize("where", ["variable", "configuration"])
def test_the_projects_own_folder_is_filled_when_it_is_named_too(
    where: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "file")
    project.checkout.rename(tmp_path / "elsewhere")
    project.checkout.mkdir()
    if where == "variable":
        monkeypatch.setenv(VARIABLE, str(project.checkout.parent))
    else:
        git("config", CONFIG, "third_party", folder=project.root)
    assert cli(["verify"], workspace=project.workspace) == 0
    assert capsys.readouterr().out.startswith(f"{REPO}: ok"), "no note: the folder that is named has it now"
    assert skipped_checkouts(REPO, workspace=project.workspace) == []


@pytest.mark.parametrize("scope", ["--global", "--local", "included", "command line"])
def test_the_advice_changes_the_setting_where_it_lies(
    scope: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = str(tmp_path / "no thing")
    if scope == "command line":
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", CONFIG)
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", nothing)
    elif scope == "included":
        git("config", "--global", "include.path", str(tmp_path / "more"), folder=tmp_path)
        git("config", "--file", str(tmp_path / "more"), CONFIG, nothing, folder=tmp_path)
    else:
        git("config", scope, CONFIG, nothing, folder=project.root)
    project.checkout.rename(tmp_path / "elsewhere")
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    message = refusal(project)
    assert f"git config {CONFIG}={nothing}: {nothing}/{REPO} does not exist" in message
    (forget,) = re.findall("To forget a folder that is named, run: (.*)", message)
    shown = f"{forget}; cd '{project.root}' && git config {CONFIG} || echo unset"
    done = subprocess.run(["bash", "-ec", shown], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("unset\n", "")
    if scope == "command line":
        return
    (change,) = re.findall("or, once for all: (.*) <the folder", message)
    subprocess.run(["bash", "-ec", f"{change} '{tmp_path / 'shared'}'"], check=True)
    git("clone", "--quiet", str(tmp_path / "gone.git"), str(tmp_path / "shared" / REPO), folder=tmp_path)
    assert find_checkout(REPO, workspace=project.workspace) == tmp_path / "shared" / REPO


def test_the_advice_for_a_named_folder_ends_at_the_pinned_commit(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = project.pin
    project.commit_upstream({"run.py": b"newer\n"})
    git("push", "--quiet", str(tmp_path / "upstream.git"), "HEAD", folder=project.checkout)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own place"))
    project.checkout.rename(tmp_path / "elsewhere")  # the file protocol is forbidden to submodules: not filled
    message = refusal(project)
    assert f"unset {VARIABLE}" in message
    (clone,) = re.findall("or, for the folder that is named: (.*)", message)
    subprocess.run(["bash", "-ec", clone], check=True, capture_output=True)
    verified = verify(REPO, workspace=project.workspace)
    assert (verified.checkout, verified.pin) == (tmp_path / "own place" / REPO, pin)


def test_an_empty_submodule_is_filled_with_the_pinned_commit(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "file")
    upstream = tmp_path / "upstream.git"
    git("config", "uploadpack.allowAnySHA1InWant", "true", folder=upstream)
    url = f"file://{upstream}"  # a bare path would ignore --depth
    project.edit(project.root / ".gitmodules", lambda text: text.replace(str(upstream), url))
    project.refresh()
    pin = project.pin
    project.commit_upstream({"run.py": b"newer\n"})
    git("push", "--quiet", str(upstream), "HEAD", folder=project.checkout)
    project.checkout.rename(tmp_path / "elsewhere")
    project.checkout.mkdir()
    assert find_checkout(REPO, workspace=project.workspace) == project.checkout
    assert project.pin == pin
    assert git("rev-parse", "--is-shallow-repository", folder=project.checkout) == "true"
    verify(REPO, workspace=project.workspace)


def test_an_absent_checkout_is_refused_with_all_places_and_the_next_command(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    (tmp_path / "shared" / REPO).mkdir(parents=True)
    git("config", "--global", CONFIG, str(tmp_path / "shared"), folder=tmp_path)
    project.checkout.rename(tmp_path / "elsewhere")
    project.checkout.mkdir()
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    start = time.perf_counter()
    message = refusal(project)
    assert time.perf_counter() - start < 5
    assert f"{REPO} is not here." in message
    assert f"{VARIABLE}={tmp_path / 'own'}: {tmp_path / 'own' / REPO} does not exist" in message
    assert f"git config {CONFIG}={tmp_path / 'shared'}: {tmp_path / 'shared' / REPO} is not a git checkout" in message
    assert f"{project.checkout}: empty, and it could not be filled: " in message
    assert f"git -C {project.root} submodule update --init --depth 1 third_party/{REPO}" in message
    assert f"export {VARIABLE}=<the folder that holds {REPO}/>" in message
    here, reason = is_available(REPO, workspace=project.workspace)
    assert (here, reason) == (False, message)


def test_an_upstream_that_never_answers_is_given_up(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.patches.workspace.PROBE_SECONDS", 0.5)
    shutil.rmtree(project.checkout)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        git(
            "config",
            f"submodule.third_party/{REPO}.url",
            f"git://127.0.0.1:{silent.getsockname()[1]}/x",
            folder=project.root,
        )
        start = time.perf_counter()
        here, reason = is_available(REPO, workspace=project.workspace)
    assert time.perf_counter() - start < 10
    assert not here
    assert "did not complete in 0.5 secs" in reason


def test_availability_says_where_and_never_raises(project: Project) -> None:
    assert is_available(REPO, workspace=project.workspace) == (True, str(project.checkout))
    here, reason = is_available("Tyo", workspace=project.workspace)
    assert not here
    assert "unknown repository 'Tyo'. Did you mean 'Toy'?" in reason


def test_verifying_asks_no_remote(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "none")
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    verify(REPO, workspace=project.workspace)


def test_the_working_directory_does_not_matter(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify(REPO, workspace=project.workspace)
    monkeypatch.chdir(tmp_path)
    assert verify(REPO, workspace=project.workspace) == before


def test_two_patches_of_one_file_apply_in_the_order_of_the_series(project: Project) -> None:
    second = project.write_patch("count-the-lines.patch", {"run.py": [Insertion(0, ("# first",))]})
    # It was made for the pin's file; refreshing makes it fit on the file that the first patch leaves.
    project.refresh()
    verify(REPO, workspace=project.workspace)
    assert "@@ -0,0 +1,1 @@" in second.read_text()
    project.edit(project.folder / "series", lambda text: "".join(reversed(text.splitlines(keepends=True))))
    assert "count-the-lines.patch:5 does not apply: its line numbers are those of" in refusal(project)


def test_many_plans_check_a_repository_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def count(repo: str, workspace: object) -> str:
        checked.append(repo)
        return f"verified {len(checked)}"

    monkeypatch.setattr(checks, "_verify", count)
    with checks.verified_once():
        assert [checks.verify("one"), checks.verify("one"), checks.verify("two")] == [
            *("verified 1", "verified 1", "verified 2"),
        ]
    assert checks.verify("one") == "verified 3", "outside of the block it is checked anew"

"""Looking after patches: show, refresh after an edit or a new pin, drift, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.patches import build, cli, drift, show, verify
from flatpatch.patches.patchfile import Insertion
from flatpatch.patches.workspace import VARIABLE
from tests.patches_project import CALL, REPO, UPSTREAM, Project, git, make_project


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def patch_of(project: Project) -> Path:
    return project.folder / "attach-the-trainer.patch"


def copy_of(project: Project) -> Path:
    return build(REPO, workspace=project.workspace).path


def files_of_patches(project: Project) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (project.root / "patches").rglob("*") if path.is_file()}


def refusal(project: Project) -> str:
    before = files_of_patches(project)
    with pytest.raises(UserError) as caught:
        project.refresh()
    assert files_of_patches(project) == before, "a refused refresh writes nothing"
    return str(caught.value)


# show


def test_show_prints_header_insertion_and_upstreams_lines_around_it(project: Project) -> None:
    before = files_of_patches(project)
    shown = show(REPO, workspace=project.workspace)
    assert f"patches/{REPO}/attach-the-trainer.patch" in shown
    assert "Why:     a test needs it." in shown
    inserted = "".join(f"+{line}\n" for line in CALL.lines)
    assert f"\n def main():\n     trainer = os\n{inserted} \n     return trainer\n" in shown
    assert files_of_patches(project) == before


def test_the_users_configuration_of_git_changes_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = show(REPO, workspace=project.workspace)
    (tmp_path / "gitconfig").write_text("[diff]\n\texternal = false\n\tnoprefix = true\n[color]\n\tui = always\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert show(REPO, workspace=project.workspace) == shown
    new_pin(project, b"# licence\n" + UPSTREAM["run.py"])
    project.refresh()
    assert "@@ -6,0 +7,2 @@" in patch_of(project).read_text()


# refresh


def test_refreshing_without_an_edit_changes_no_byte(project: Project) -> None:
    copy_of(project)
    before = files_of_patches(project)
    assert project.refresh() == []
    assert files_of_patches(project) == before


def test_an_edit_of_the_copy_becomes_the_patch(project: Project) -> None:
    copy = copy_of(project)
    project.edit(copy / "run.py", lambda text: "import early\n" + text.replace("(trainer)", "(trainer, 1)"))
    assert project.refresh() == [f"patches/{REPO}/attach-the-trainer.patch", "patches/lock.json"]
    text = patch_of(project).read_text()
    assert text.startswith("Why:     a test needs it.\nTouches: run.py.\n"), "the header is kept"
    assert "@@ -0,0 +1,1 @@\n+import early\n@@ -5,0 +7,2 @@\n+    import flatpatch.hooks\n" in text
    assert (copy_of(project) / "run.py").read_bytes() == (copy / "run.py").read_bytes()
    assert project.refresh() == []


def test_an_edit_that_undoes_one_of_two_insertions_drops_it(project: Project) -> None:
    project.edit(copy_of(project) / "run.py", lambda text: text.replace("    import flatpatch.hooks\n", ""))
    project.refresh()
    assert "@@ -5,0 +6,1 @@\n+    flatpatch.hooks.attach_trainer(trainer)\n" in patch_of(project).read_text()


def test_an_edit_of_a_second_file_is_taken_once_the_header_names_it(project: Project) -> None:
    copy = copy_of(project)
    project.edit(copy / "open-end.py", lambda text: "import early\n" + text)
    assert "'Touches:' does not name open-end.py" in refusal(project)
    project.edit(patch_of(project), lambda text: text.replace("Touches: run.py.", "Touches: run.py, open-end.py."))
    project.refresh()
    assert (copy_of(project) / "open-end.py").read_bytes() == b"import early\nfirst\nsecond"


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        (
            "run.py",
            "trainer = os",
            "trainer = None",
            "upstream's line 5 is changed or deleted; patches only insert lines",
        ),
        ("run.py", "import os\n", "", "upstream's line 1 is changed or deleted"),
        ("open-end.py", "second", "second\nthird\n", "upstream's line 2 is changed or deleted"),
        ("run.py", "return trainer\n", "return trainer\n# end", "the last inserted line does not end in a newline"),
    ],
)
def test_an_edit_that_does_more_than_insert_lines_is_refused(
    project: Project, path: str, old: str, new: str, expected: str
) -> None:
    copy = copy_of(project)
    project.edit(copy / path, lambda text: text.replace(old, new))
    assert f"{copy / path}: {expected}" in refusal(project)


def test_added_and_deleted_files_of_the_copy_are_refused_together(project: Project) -> None:
    copy = copy_of(project)
    (copy / "new.py").write_text("")
    (copy / "open-end.py").unlink()
    message = refusal(project)
    assert f"{copy / 'new.py'} is new; a patch only inserts lines into files that upstream has." in message
    assert f"{copy / 'open-end.py'} is deleted" in message


def test_hand_edited_lines_get_their_numbers_and_hashes(project: Project) -> None:
    project.edit(patch_of(project), lambda text: text + "+    print(trainer)\n")
    project.refresh()
    assert "@@ -5,0 +6,3 @@" in patch_of(project).read_text()
    verify(REPO, workspace=project.workspace)


def test_a_hand_edited_place_beyond_the_end_is_refused(project: Project) -> None:
    project.edit(patch_of(project), lambda text: text.replace("@@ -5,0", "@@ -50,0"))
    assert "inserts after line 50 of run.py, which has 7 lines" in refusal(project)


def test_edits_of_a_patch_and_of_the_copy_at_once_are_refused(project: Project) -> None:
    copy = copy_of(project)
    project.edit(copy / "run.py", lambda text: "import early\n" + text)
    project.edit(patch_of(project), lambda text: text + "+    print(trainer)\n")
    assert f"{copy} was edited, and so were the patches of {REPO}" in refusal(project)


def test_edits_go_into_the_last_patch_of_the_series(project: Project) -> None:
    second = project.write_patch("count-the-lines.patch", {"open-end.py": [Insertion(0, ("# one",))]})
    project.refresh()
    first = patch_of(project).read_bytes()
    project.edit(copy_of(project) / "open-end.py", lambda text: text.replace("# one", "# two"))
    assert project.refresh() == [f"patches/{REPO}/count-the-lines.patch", "patches/lock.json"]
    assert second.read_text().endswith("+# two\n")
    assert patch_of(project).read_bytes() == first


def test_a_header_alone_is_filled_from_the_copy(tmp_path: Path) -> None:
    project = make_project(tmp_path, changes={"open-end.py": [Insertion(0, ("# one",))]})
    copy = copy_of(project)
    (project.folder / "call.patch").write_text("Why: x\nTouches: run.py\nRemove when: y\n\n")
    project.edit(project.folder / "series", lambda text: text + "call.patch\n")
    assert f"patches/{REPO}/call.patch inserts nothing." in refusal(project)
    project.edit(copy / "run.py", lambda text: text.replace("os\n\n    return", "os\n    print(1)\n\n    return"))
    project.refresh()
    assert (project.folder / "call.patch").read_text().endswith("@@ -5,0 +6,1 @@\n+    print(1)\n")


def test_an_edited_copy_without_any_patch_is_refused(project: Project) -> None:
    patch_of(project).unlink()
    (project.folder / "series").write_text("")
    project.refresh()
    project.edit(copy_of(project) / "run.py", lambda text: "import early\n" + text)
    assert f"{REPO} has no patch to put it into. Write patches/{REPO}/<verb-what>.patch with a header alone" in refusal(
        project
    )


def new_pin(project: Project, content: bytes) -> str:
    commit = project.commit_upstream({"run.py": content})
    project.record_pin()
    return commit


def test_after_a_new_pin_the_lines_move_with_their_surroundings(project: Project) -> None:
    pin = new_pin(project, b"# licence\n# text\n" + UPSTREAM["run.py"])
    project.refresh()
    assert "@@ -7,0 +8,2 @@" in patch_of(project).read_text()
    assert verify(REPO, workspace=project.workspace).pin == pin
    assert b"trainer = os\n    import flatpatch.hooks\n" in (copy_of(project) / "run.py").read_bytes()


def test_after_a_new_pin_that_leaves_the_file_alone_only_the_lock_file_changes(project: Project) -> None:
    project.commit_upstream({"other.py": b"x\n"})
    project.record_pin()
    assert project.refresh() == ["patches/lock.json"]
    verify(REPO, workspace=project.workspace)


def test_a_new_pin_that_changes_the_very_place_is_refused(project: Project) -> None:
    new_pin(project, UPSTREAM["run.py"].replace(b"trainer = os", b"trainer = None"))
    assert "attach-the-trainer.patch:5 clashes: upstream changed run.py:5, next to the inserted lines" in refusal(
        project
    )


def test_a_new_pin_that_has_the_lines_already_is_refused(project: Project) -> None:
    new_pin(project, (copy_of(project) / "run.py").read_bytes())
    assert "inserts nothing: upstream's run.py has these lines now. Delete the patch." in refusal(project)


def test_a_new_pin_without_the_file_is_refused(project: Project) -> None:
    git("rm", "--quiet", "run.py", folder=project.checkout)
    new_pin(project, b"x\n")
    git("rm", "--quiet", "run.py", folder=project.checkout)
    project.commit_upstream({})
    assert "clashes: upstream has no run.py any more. Change or delete the patch." in refusal(project)


def test_a_new_pin_in_a_checkout_that_lost_the_old_one_is_refused(project: Project) -> None:
    blob = git("rev-parse", "HEAD:run.py", folder=project.checkout)
    new_pin(project, b"# licence\n" + UPSTREAM["run.py"])
    (project.checkout / ".git/objects" / blob[:2] / blob[2:]).unlink()
    assert f"cannot be carried over: the checkout lacks blob {blob} of run.py" in refusal(project)


def test_a_dirty_checkout_is_not_refreshed(project: Project) -> None:
    project.edit(project.checkout / "run.py", lambda text: text + "# mine\n")
    assert "has edits that are in no patch: run.py (edited)" in refusal(project)


# drift


def push(project: Project, tmp_path: Path) -> None:
    git("push", "--quiet", str(tmp_path / "upstream.git"), "HEAD", folder=project.checkout)
    git("checkout", "--quiet", "--detach", project.lock["pin"], folder=project.checkout)


def test_drift_tries_the_head_of_upstream_and_changes_nothing(project: Project, tmp_path: Path) -> None:
    head = project.commit_upstream({"run.py": b"# licence\n" + UPSTREAM["run.py"]})
    push(project, tmp_path)
    before = files_of_patches(project)
    found = drift(REPO, workspace=project.workspace)
    assert (found.applies, found.commit, found.pin) == (True, head, project.pin)
    assert found.report == (
        f"patches/{REPO}/attach-the-trainer.patch:5 can be carried over: "
        "run.py has changed; the lines go after line 6.",
    )
    assert files_of_patches(project) == before
    verify(REPO, workspace=project.workspace)


def test_drift_on_the_pin_itself_applies_as_it_is(project: Project) -> None:
    found = drift(REPO, workspace=project.workspace)
    assert found.applies
    assert found.report[0].endswith("applies as it is: run.py has not changed.")


def test_drift_says_where_a_patch_fails(project: Project, tmp_path: Path) -> None:
    commit = project.commit_upstream({"run.py": UPSTREAM["run.py"].replace(b"trainer = os", b"trainer = None")})
    push(project, tmp_path)
    found = drift(REPO, commit=commit, workspace=project.workspace)
    assert not found.applies
    assert "clashes: upstream changed run.py:5" in found.report[0]


def test_drift_without_network_says_what_it_needs(project: Project, tmp_path: Path) -> None:
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    with pytest.raises(FlatpatchError) as caught:
        drift(REPO, workspace=project.workspace)
    assert f"could not fetch HEAD from {tmp_path / 'upstream.git'}" in str(caught.value)
    assert "This needs network" in str(caught.value)
    assert drift(REPO, commit=project.pin, workspace=project.workspace).applies, "a commit that is here needs none"


# command line


def run(project: Project, *words: str) -> int:
    return cli(words, workspace=project.workspace)


def test_verify_prints_one_line_per_repository(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "verify") == 0
    lock = project.lock
    line = f"{REPO}: ok, pin {lock['pin'][:12]}, patched tree {lock['patched_tree'][:12]}, {project.checkout}\n"
    assert capsys.readouterr().out == line


def test_verify_without_a_checkout_checks_the_patches_alone_unless_the_repository_was_named(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.checkout.rename(tmp_path / "elsewhere")
    (tmp_path / "upstream.git").rename(tmp_path / "gone.git")
    assert run(project, "verify") == 0
    assert f"{REPO}: not here, patches checked alone" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{REPO} is not here"):
        run(project, "verify", f"repo={REPO}")
    project.edit(patch_of(project), lambda text: text.replace("Why:", "Because:"))
    with pytest.raises(UserError, match="has no 'Why:'"):
        run(project, "verify")


def test_apply_prints_where_the_copy_is(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "apply", f"repo={REPO}", "patched=false") == 0
    path = Path(capsys.readouterr().out.removeprefix(f"{REPO}: ").strip())
    assert (path / "run.py").read_bytes() == UPSTREAM["run.py"]
    project.edit(copy_of(project) / "run.py", lambda text: text + "# mine\n")
    assert run(project, "apply") == 0
    assert "an edited copy stood in the way; it is now " in capsys.readouterr().out


def test_show_refresh_and_drift_run_from_the_command_line(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "show") == 0
    assert CALL.lines[1] in capsys.readouterr().out
    assert run(project, "refresh", f"repo={REPO}") == 0
    assert capsys.readouterr().out == f"{REPO}: all up to date\n"
    assert run(project, "drift") == 0
    assert f"tried on {project.pin}: applies" in capsys.readouterr().out


def test_drift_that_fails_ends_with_exit_code_1(project: Project, tmp_path: Path) -> None:
    project.commit_upstream({"run.py": b"all new\n"})
    push(project, tmp_path)
    with pytest.raises(FlatpatchError, match=f"patches of {REPO} do not apply") as caught:
        run(project, "drift")
    assert caught.value.exit_code == 1


def test_drift_to_a_short_hash_that_is_not_here_asks_no_network(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.patches.upkeep._fetch", lambda *_: pytest.fail("it fetches"))
    with pytest.raises(UserError, match="commit=abcd12: the checkout .* has no such commit"):
        run(project, "drift", f"repo={REPO}", "commit=abcd12")
    with pytest.raises(UserError, match="commit=abc is no commit"):
        run(project, "drift", f"repo={REPO}", "commit=abc")
    assert run(project, "drift", f"repo={REPO}", f"commit={project.pin[:7]}") == 0


@pytest.mark.parametrize("words", [(), ("--help",), ("verify", "--help")])
def test_help_shows_examples(project: Project, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert run(project, *words) == 0
    assert "python -m flatpatch patches drift repo=N-LoRA commit=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("verfy",), "unknown verb 'verfy'. Did you mean 'verify'?"),
        (("verify", "rep=Toy"), "unknown setting 'rep' of patches verify. Did you mean 'repo'?"),
        (("verify", "repo=Tyo"), "unknown repository 'Tyo'. Did you mean 'Toy'?"),
        (("verify", "Toy"), "'Toy' is not a setting. Settings are written key=value, e.g. repo=VALUE."),
        (("verify", "patched=true"), "unknown setting 'patched' of patches verify."),
        (("apply", "patched=maybe"), "patched=maybe is neither true nor false."),
        (("refresh",), "patches refresh needs repo=NAME, one of Toy."),
        (("drift", "commit=abcd"), "commit= is a commit of one repository; give repo=NAME too."),
    ],
)
def test_a_mistake_on_the_command_line_is_named(project: Project, words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        run(project, *words)
    assert expected in str(caught.value)


def test_all_mistakes_on_the_command_line_are_named_at_once(project: Project) -> None:
    with pytest.raises(UserError, match=r"(?s)'rep'.*patched=maybe"):
        run(project, "apply", "rep=x", "patched=maybe")

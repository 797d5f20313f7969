"""Look after the patches: show one with its surroundings, write them anew, try them on upstream's next commit.

To change a patch, edit files in the disposable copy and refresh; the edits go into the last patch of the series. To
change its header, or an earlier patch, edit the patch file and refresh. After a new pin, just refresh.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.files import write_atomically
from flatpatch.patches.checks import (
    apply_series,
    checkout_problems,
    digest,
    load_patches,
    refresh_command,
    verify,
)
from flatpatch.patches.copies import copy_path, edited_files, read_manifest
from flatpatch.patches.gitcalls import GitFailed, Scratch, has_commit, in_checkout, scratch
from flatpatch.patches.patchfile import FileChange, Patch, content_problems
from flatpatch.patches.workspace import PROJECT, Workspace, check_name, find_checkout

SURROUNDINGS = 5  # lines shown above and below an insertion
FETCH_SECONDS = 120


def show(repo: str, *, workspace: Workspace = PROJECT) -> str:
    """Return each patch with the upstream lines around it, read from the checkout at this moment.

    Args:
        repo: Name of the repository.
        workspace: The project.

    Returns:
        A header and a diff per patch.

    Raises:
        UserError: If the repository does not verify.
    """
    verified = verify(repo, workspace=workspace)
    patches, _ = load_patches(repo, workspace)
    shown = []
    with scratch(verified.checkout) as git:
        git.read_tree(verified.pin)
        before = git.write_tree()
        for patch in patches:
            apply_series(git, [patch], verified.pin)
            after = git.write_tree()
            diff = git.git("diff", f"--unified={SURROUNDINGS}", "--no-color", "--no-renames", before, after)
            shown.append(f"{patch.name}\n\n{patch.header.strip()}\n\n{diff}")
            before = after
    return "\n".join(shown) or f"{repo} has no patches.\n"


def refresh(repo: str, *, workspace: Workspace = PROJECT) -> list[str]:
    """Write the patches and the lock file anew, from the checkout as it is and the edits in the disposable copy.

    Args:
        repo: Name of the repository.
        workspace: The project.

    Returns:
        The files that changed; empty if all was up to date.

    Raises:
        UserError: If the checkout is not clean, a patch clashes with upstream, or an edit does more than insert lines.
            Nothing is written then.
    """
    check_name(repo, workspace)
    checkout = find_checkout(repo, workspace=workspace)
    patches, problems = load_patches(repo, workspace)
    problems += checkout_problems(checkout, pin="")
    if problems:
        raise UserError.collect(problems)
    pin = in_checkout(checkout, "rev-parse", "HEAD").strip()
    lock = workspace.lock()
    with scratch(checkout) as git:
        git.read_tree(pin)
        base_tree = before_last = git.write_tree()
        for number, patch in enumerate(patches):
            before_last = git.write_tree()
            patches[number], found, _ = port(git, patch)
            problems += found
        if problems:
            raise UserError.collect(problems)
        copy = copy_path(repo, lock.get(repo, {}).get("patched_tree", base_tree), workspace.root / "build")
        edits = edited_files(copy) if read_manifest(copy) else []
        if edits and copy != copy_path(repo, git.write_tree(), workspace.root / "build"):
            raise UserError(
                f"{copy} was edited, and so were the patches of {repo} or its pin; one at a time. "
                f"Move the copy away, run: {refresh_command(repo)} and then edit a new copy."
            )
        if edits:
            patches = [*patches[:-1], _take_edits(git, repo, patches, edits, copy, before_last)]
        patched_tree = git.write_tree()
    # Not earlier: a patch with a header alone is filled from the copy.
    if problems := [problem for patch in patches for problem in content_problems(patch)]:
        raise UserError.collect(problems)
    lock[repo] = {
        "url": workspace.recorded_url(repo),
        "pin": pin,
        "base_tree": base_tree,
        "patched_tree": patched_tree,
        "patches": {Path(patch.name).name: digest(patch.text) for patch in patches},
    }
    texts = {patch.name: patch.text for patch in patches}
    texts["patches/lock.json"] = json.dumps(dict(sorted(lock.items())), indent=2) + "\n"
    return [name for name, text in texts.items() if _write(workspace.root / name, text)]


@dataclass(frozen=True)
class Drift:
    """How the series fares on another commit of upstream."""

    repo: str
    pin: str
    commit: str
    applies: bool
    report: tuple[str, ...]  # one line per file that a patch touches


def drift(repo: str, *, commit: str | None = None, workspace: Workspace = PROJECT) -> Drift:
    """Try the series on another commit of upstream; changes nothing.

    Args:
        repo: Name of the repository.
        commit: Hash of the commit, whole where the checkout lacks it; by default the head of upstream's repository,
            fetched now.
        workspace: The project.

    Returns:
        Whether all patches can be carried over, and how each file fares.

    Raises:
        FlatpatchError: If the commit cannot be fetched.
        UserError: If the repository does not verify, or a short hash is of no commit here.
    """
    verified = verify(repo, workspace=workspace)
    patches, _ = load_patches(repo, workspace)
    report: list[str] = []
    applies = True
    with scratch(user_config=True) as git:
        if commit is None or not has_commit(verified.checkout, commit):
            if commit and len(commit) < 40:
                raise UserError(
                    f"commit={commit}: the checkout {verified.checkout} has no such commit, and one that it lacks can "
                    "be fetched by its whole hash alone. Give all 40 hex digits."
                )
            commit = _fetch(git, repo, verified.url, commit or "HEAD")
        git.borrow(verified.checkout)
        git.read_tree(commit)
        for patch in patches:
            _, problems, moves = port(git, patch)
            report += problems or moves
            applies = applies and not problems
    return Drift(repo, verified.pin, commit, applies, tuple(report))


def port(git: Scratch, patch: Patch) -> tuple[Patch, list[str], list[str]]:
    """Carry a patch over to the files in the index, wherever its places have moved to, and insert its lines there.

    Args:
        git: Holds the files to insert into, and the blobs that the patch was made for.
        patch: The patch; hashes of its results and derived line numbers need not be right.

    Returns:
        The patch with its new places, what clashed, and a line per file that says how it fared.
    """
    changes, problems, moves = [], [], []
    for change in patch.changes:
        where = f"{patch.name}:{change.line}"
        entry = git.entry(change.path)
        if entry is None:
            problems.append(f"{where} clashes: upstream has no {change.path} any more. Change or delete the patch.")
            continue
        if missing := git.missing({change.before, entry.blob}):
            problems.append(
                f"{where} cannot be carried over: the checkout lacks blob {min(missing)} of {change.path}. Fetch "
                "the commit that the patch was made for into the checkout (its pin is in patches/lock.json)."
            )
            continue
        length = git.content(change.before).count(b"\n")
        if too_far := [insertion.after for insertion in change.insertions if insertion.after > length]:
            problems.append(f"{where} inserts after line {too_far[0]} of {change.path}, which has {length} lines.")
            continue
        git.set_entry(replace(entry, blob=change.before))
        git.apply(change.text)
        applied = git.entry(change.path)
        assert applied is not None
        if entry.blob == change.before:
            changes.append(replace(change, mode=entry.mode, after=applied.blob))
            moves.append(f"{where} applies as it is: {change.path} has not changed.")
            continue
        merged, clashes = git.merge(entry.blob, change.before, applied.blob)
        if clashes:
            problems.append(
                f"{where} clashes: upstream changed {change.path}:{clashes[0]}, next to the inserted lines."
            )
            continue
        git.set_entry(replace(entry, blob=merged))
        insertions = tuple(git.insertions(entry.blob, merged))
        if not insertions:
            problems.append(f"{where} inserts nothing: upstream's {change.path} has these lines now. Delete the patch.")
            continue
        changes.append(replace(change, mode=entry.mode, before=entry.blob, after=merged, insertions=insertions))
        lines = ", ".join(str(insertion.after) for insertion in insertions)
        moves.append(f"{where} can be carried over: {change.path} has changed; the lines go after line {lines}.")
    return replace(patch, changes=tuple(changes)), problems, moves


def _take_edits(
    git: Scratch, repo: str, patches: list[Patch], edits: list[tuple[str, str]], copy: Path, before_last: str
) -> Patch:
    """Return the last patch of the series with the copy's edits in it, and put the edited files into the index."""
    if not patches:
        raise UserError(
            f"{copy} was edited, but {repo} has no patch to put it into. Write patches/{repo}/<verb-what>.patch "
            f"with a header alone (Why, Touches, Remove when), name it in patches/{repo}/series, then run: "
            f"{refresh_command(repo)}"
        )
    last = patches[-1]
    changes = {change.path: change for change in last.changes}
    problems = []
    after_last = git.write_tree()
    git.read_tree(before_last)
    entries = {entry.path: entry for entry in git.entries(*(path for _, path in edits))}
    git.read_tree(after_last)
    for what, path in edits:
        if what != "edited":
            problems.append(f"{copy / path} is {what}; a patch only inserts lines into files that upstream has.")
            continue
        before = entries[path].blob
        edited = git.store((copy / path).read_bytes())
        git.set_entry(replace(entries[path], blob=edited))
        try:
            insertions = tuple(git.insertions(before, edited))
        except ValueError as error:
            problems.append(f"{copy / path}: {error}.")
            continue
        changes[path] = FileChange(path, entries[path].mode, before, edited, insertions)
    if problems:
        raise UserError.collect(problems)
    return replace(last, changes=tuple(change for change in changes.values() if change.insertions))


def _write(path: Path, text: str) -> bool:
    """Write a file if it would change; say whether it did."""
    if path.exists() and path.read_bytes() == text.encode():
        return False
    write_atomically(path, text)
    return True


def _fetch(git: Scratch, repo: str, url: str, commit: str) -> str:
    # Only the touched files' contents are needed; git fetches them when they are read.
    git.git("config", "remote.origin.url", url)
    try:
        git.git(
            *("fetch", "--quiet", "--no-tags", "--depth", "1", "--filter=blob:none", "origin", commit),
            seconds=FETCH_SECONDS,
        )
    except GitFailed as error:
        raise FlatpatchError(
            f"{repo}: could not fetch {commit} from {url}: {str(error).splitlines()[-1]}. This needs network; "
            f"without it, name a commit that the checkout has: "
            f"python -m flatpatch patches drift repo={repo} commit=<hash>"
        ) from error
    return git.git("rev-parse", "FETCH_HEAD").strip()

"""Check that patches, lock file and checkout are what they should be. Offline, and in well under a second."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from flatpatch.errors import UserError
from flatpatch.patches.gitcalls import GitFailed, Scratch, has_commit, in_checkout, scratch
from flatpatch.patches.patchfile import Patch, content_problems, parse, spelling_problems
from flatpatch.patches.workspace import PROJECT, VARIABLE, Workspace, check_name, find_checkout

LOCK_KEYS = {"url", "pin", "base_tree", "patched_tree", "patches"}
SHOWN = 5  # files named in one message


@dataclass(frozen=True)
class Verified:
    """What is known to hold of a repository."""

    repo: str
    url: str
    pin: str
    base_tree: str  # of the pinned commit
    patched_tree: str  # with the series applied
    checkout: Path
    absent: tuple[str, ...]  # files of the pin whose content a partial checkout lacks


def verify_patches(repo: str, *, workspace: Workspace = PROJECT) -> None:
    """Check a repository's patches alone: series, form, headers, hashes, recorded pin. Needs no checkout.

    Args:
        repo: Name of the repository.
        workspace: The project.

    Raises:
        UserError: If anything is wrong; names it all.
    """
    check_name(repo, workspace)
    if problems := patch_problems(repo, workspace):
        raise UserError.collect(problems)


_verified: ContextVar[dict[tuple[str, Path], Verified] | None] = ContextVar("verified", default=None)


@contextlib.contextmanager
def verified_once() -> Iterator[None]:
    """Check each repository once inside the block: for many plans that are made within seconds."""
    token = _verified.set({})
    try:
        yield
    finally:
        _verified.reset(token)


def verify(repo: str, *, workspace: Workspace = PROJECT) -> Verified:
    """Check that a repository's checkout is clean and at its pin, and that the patches lead to the recorded tree.

    Args:
        repo: Name of the repository.
        workspace: The project.

    Returns:
        What was checked.

    Raises:
        UserError: If anything is wrong; names it all.
    """
    known = _verified.get()
    if known is None:
        return _verify(repo, workspace)
    key = (repo, workspace.root)
    if key not in known:
        known[key] = _verify(repo, workspace)
    return known[key]


def _verify(repo: str, workspace: Workspace) -> Verified:
    check_name(repo, workspace)
    problems = patch_problems(repo, workspace)
    try:
        checkout = find_checkout(repo, workspace=workspace)
    except UserError as error:
        raise UserError.collect([*problems, str(error)]) from error
    lock = workspace.lock().get(repo, {})
    pin = lock.get("pin", "")
    try:
        problems += checkout_problems(checkout, pin)
        absent: tuple[str, ...] = ()
        patches, malformed = load_patches(repo, workspace)
        if lock.keys() >= LOCK_KEYS and not malformed and has_commit(checkout, pin):
            with scratch(checkout) as git:
                git.read_tree(pin)
                absent = absent_files(git)
                problems += compare(repo, "base_tree", git.write_tree(), lock)
                problems += apply_series(git, patches, pin) or compare(repo, "patched_tree", git.write_tree(), lock)
    except GitFailed as error:
        problems.append(f"git could not read {checkout}: {error}")
    if problems:
        raise UserError.collect(problems)
    return Verified(repo, lock["url"], pin, lock["base_tree"], lock["patched_tree"], checkout, absent)


def refresh_command(repo: str) -> str:
    """Return the command that writes patches and lock file anew."""
    return f"python -m flatpatch patches refresh repo={repo}"


def read_series(repo: str, workspace: Workspace) -> list[tuple[int, str]]:
    """Return line number and name of each patch in a series; blank lines and comments (``#``) are left out."""
    lines = enumerate((workspace.folder(repo) / "series").read_text().splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip() and not line.strip().startswith("#")]


def load_patches(repo: str, workspace: Workspace) -> tuple[list[Patch], list[str]]:
    """Return the patches of a series in order, and what is wrong with the series or their form."""
    folder = workspace.folder(repo)
    patches: list[Patch] = []
    problems: list[str] = []
    listed: list[str] = []
    for number, name in read_series(repo, workspace):
        where = f"patches/{repo}/series:{number}"
        if name in listed:
            problems.append(f"{where} names {name} a second time. Delete the line.")
        elif not (folder / name).is_file():
            problems.append(
                f"{where} names {name}, but there is no patches/{repo}/{name}. Restore it or delete the line."
            )
        else:
            patch, found = parse(f"patches/{repo}/{name}", read_text(folder / name))
            patches.append(patch)
            problems += found
        listed.append(name)
    problems += [
        f"patches/{repo}/{path.name} is in no series. "
        f"Add a line {path.name} to patches/{repo}/series or delete the file."
        for path in sorted(folder.glob("*.patch"))
        if path.name not in listed
    ]
    return patches, problems


def inserted_lines(repo: str, *, workspace: Workspace = PROJECT) -> list[tuple[str, int, str]]:
    """Return each line that the series inserts, with its file and its number there once all patches are applied.

    Args:
        repo: Name of the repository.
        workspace: The project.

    Raises:
        UserError: If a patch cannot be read.
    """
    patches, problems = load_patches(repo, workspace)
    if problems:
        raise UserError.collect(problems)
    found: dict[str, list[tuple[int, str]]] = {}
    for change in (change for patch in patches for change in patch.changes):
        earlier = found.get(change.path, [])
        # A later patch counts the lines of the file that the earlier ones made, and moves those below its own.
        moved = [
            (number + sum(len(new.lines) for new in change.insertions if new.after < number), line)
            for number, line in earlier
        ]
        inserted = 0
        for insertion in change.insertions:
            start = insertion.after + inserted + 1
            moved += [(start + offset, line) for offset, line in enumerate(insertion.lines)]
            inserted += len(insertion.lines)
        found[change.path] = sorted(moved)
    return [(path, number, line) for path, lines in found.items() for number, line in lines]


def read_text(path: Path) -> str:
    """Read a text file, keeping its line ends as they are."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def digest(text: str) -> str:
    """Return the hash by which the lock file knows a patch."""
    return hashlib.sha256(text.encode()).hexdigest()


def patch_problems(repo: str, workspace: Workspace) -> list[str]:
    """Return all that is wrong with a repository's patches and lock entry, as far as no checkout is needed."""
    patches, problems = load_patches(repo, workspace)
    malformed = bool(problems)
    problems += [problem for patch in patches for problem in content_problems(patch)]
    lock = workspace.lock().get(repo, {})
    if not lock.keys() >= LOCK_KEYS:
        return [*problems, f"patches/lock.json has no complete entry for {repo}. Run: {refresh_command(repo)}"]
    locked = dict(lock["patches"])
    for patch in patches:
        text = read_text(workspace.root / patch.name)
        if not malformed:
            problems += [f"{line} Run: {refresh_command(repo)}" for line in spelling_problems(patch, text)]
        expected, found = locked.pop(Path(patch.name).name, "no entry"), digest(text)
        if found != expected:
            problems.append(
                f"{patch.name} is not the patch in patches/lock.json: expected sha256 {expected}, found {found}. "
                f"Undo the edit (git checkout {patch.name}) or, if it is meant, run: {refresh_command(repo)}"
            )
    listed = {name for _, name in read_series(repo, workspace)}
    problems += [
        f"patches/lock.json has {name}, which patches/{repo}/series does not name. "
        f"Put it back into the series or run: {refresh_command(repo)}"
        for name in locked
        if name not in listed
    ]
    for what, recorded, locked_value in (
        ("address in .gitmodules", workspace.recorded_url(repo), lock["url"]),
        ("commit recorded for the submodule", workspace.recorded_pin(repo), lock["pin"]),
    ):
        if recorded and recorded != locked_value:
            problems.append(
                f"third_party/{repo}: the {what} is {recorded}, patches/lock.json expects {locked_value}. "
                f"If the new one is meant, check it out and run: {refresh_command(repo)}; "
                f"else: git checkout HEAD -- .gitmodules && git reset -- third_party/{repo}"
            )
    return problems


def checkout_problems(checkout: Path, pin: str) -> list[str]:
    """Return what keeps a checkout from being the clean pinned commit; an empty ``pin`` accepts any commit."""
    problems = []
    head = in_checkout(checkout, "rev-parse", "HEAD").strip()
    if pin and head != pin:
        problems.append(
            f"{checkout} is at another commit: expected the pin {pin}, found {head}. "
            f"Run: git -C {checkout} fetch --depth 1 origin {pin} && git -C {checkout} checkout --detach {pin}"
        )
    status = in_checkout(
        checkout,
        *("-c", "core.fsmonitor=false", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=no"),
    )
    # What upstream's .gitignore names may lie there, and so may Python's caches; a person's own ignore file counts not.
    untracked = in_checkout(
        checkout,
        *("-c", "core.excludesFile=/dev/null", "ls-files", "-z", "--others", "--directory", "--no-empty-directory"),
        *("--exclude-standard", "--exclude=__pycache__/"),
    )
    changed = [("deleted" if "D" in line[:2] else "edited", line[3:]) for line in status.split("\0")[:-1]]
    if changed:
        problems.append(
            f"{checkout} has edits that are in no patch: {_named(changed)}. Only copies under build/ are patched. "
            f"{_restore(checkout, head, [path for _, path in changed])}"
        )
    if new := [("untracked", path) for path in untracked.split("\0")[:-1]]:
        problems.append(
            f"{checkout} has files that are not upstream's: {_named(new)}. Move them elsewhere or, if they are data to "
            f"be kept there, name them in the checkout's .git/info/exclude. To see all: git -C {checkout} status"
        )
    return problems


def fetch_command(checkout: Path, commit: str) -> str:
    """Return what brings all of a commit into a checkout that was cloned with a filter, which a mere fetch keeps."""
    where = shlex.quote(str(checkout))
    return (
        f"git -C {where} fetch --refetch --no-filter --depth 1 origin {commit} && git -C {where} checkout {commit} -- ."
    )


def _restore(checkout: Path, head: str, paths: Sequence[str]) -> str:
    """Say what brings files back as they were committed; of a partial checkout git alone may not have them."""
    with scratch(checkout) as git:
        git.read_tree(head)
        entries = git.entries(*paths)
        missing = git.missing(entry.blob for entry in entries)
    lost = [entry.path for entry in entries if entry.blob in missing]
    if not lost:
        return f"To drop the edits, run: git -C {shlex.quote(str(checkout))} checkout {head} -- ."
    return (
        f"This checkout is partial and does not hold the content of {', '.join(lost[:SHOWN])}"
        + (f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else "")
        + f". With network, run: {fetch_command(checkout, head)}. Without it, name a whole checkout: export {VARIABLE}="
        "<the folder that holds it>"
    )


def _named(files: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{path} ({what})" for what, path in files[:SHOWN])
    return shown + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")


def absent_files(git: Scratch) -> tuple[str, ...]:
    """Return the files of the index whose content is not to be had."""
    entries = [entry for entry in git.entries() if entry.mode != "160000"]
    missing = git.missing(entry.blob for entry in entries)
    return tuple(entry.path for entry in entries if entry.blob in missing)


def apply_series(git: Scratch, patches: list[Patch], pin: str) -> list[str]:
    """Apply patches to the index, each only where its line numbers hold; return why one does not fit."""
    for patch in patches:
        problems = []
        repo = Path(patch.name).parent.name
        for change in patch.changes:
            where = f"{patch.name}:{change.line}"
            entry = git.entry(change.path)
            if entry is None:
                problems.append(f"{where} does not apply: {change.path} is not in pin {pin}.")
            elif entry.blob != change.before:
                problems.append(
                    f"{where} does not apply: its line numbers are those of {change.path} at blob {change.before}, but "
                    f"found {entry.blob} there (pin {pin} and the patches before). Run: {refresh_command(repo)}"
                )
            elif git.missing([entry.blob]):
                problems.append(
                    f"{where} does not apply: this partial checkout lacks the content of {change.path} (blob "
                    f"{entry.blob} of pin {pin}). In the checkout, run: "
                    f"git fetch --refetch --no-filter --depth 1 origin {pin}"
                )
        if problems:
            return problems
        try:
            git.apply(patch.text)
        except GitFailed as error:
            return [f"{patch.name} does not apply to pin {pin}: {error}"]
        for change in patch.changes:
            entry = git.entry(change.path)
            if entry is None or entry.blob != change.after:
                found = entry.blob if entry else "no file"
                problems.append(
                    f"{patch.name}:{change.line} leads to another {change.path} than it says: expected blob "
                    f"{change.after}, found {found}. Run: {refresh_command(repo)}"
                )
        if problems:
            return problems
    return []


def compare(repo: str, what: str, found: str, lock: dict[str, str]) -> list[str]:
    """Return a message if a recomputed tree is not the one in the lock file."""
    if found == lock[what]:
        return []
    return [
        f"patches/lock.json: {what} of {repo} at pin {lock['pin']} is not what git computes: expected {lock[what]}, "
        f"found {found}. Undo the edit of the lock file or run: {refresh_command(repo)}"
    ]

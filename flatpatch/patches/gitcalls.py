"""How this package calls git: one function, and a throwaway git directory to work in.

A checkout is only ever read. Trees are made in a ``Scratch``: a temporary git directory with its own index and its
own objects, which borrows the checkout's objects. So a shared, read-only or partial checkout works as well.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from flatpatch.errors import FlatpatchError, UserError, no_room
from flatpatch.patches.patchfile import Insertion

# Without git GitPython would fail while it is imported; here the first call of git says what is missing.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
from git import Git  # noqa: E402

# No question may be asked on the terminal, and no file of the checkout may be rewritten by a mere look at it.
QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GIT_OPTIONAL_LOCKS": "0"}
# What a person has configured for himself must not change the trees we compute.
NO_USER_CONFIG = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


class GitFailed(FlatpatchError):
    """A git command failed; the message is git's own."""


def check_git() -> None:
    """Let a machine without git stop the work.

    Raises:
        UserError: If there is no git.
    """
    if shutil.which("git") is None:
        raise UserError("there is no git on PATH, which reads the authors' repositories. Install git.")


def run_git(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    allowed: Collection[int] = (0,),
    seconds: float | None = None,
) -> bytes:
    """Run one git command and return what it printed.

    Args:
        *arguments: The command line after ``git``.
        folder: Where it runs.
        environment: Variables to add to the process's own.
        stdin: What it reads.
        allowed: Exit statuses that are no failure.
        seconds: How long it may take.

    Returns:
        Its standard output.

    Raises:
        GitFailed: If it ended with another status or took too long.
        UserError: If there is no git, or no room for what it reads.
    """
    check_git()
    with _temporary(stdin) as given:
        status, printed, complaint = Git(str(folder)).execute(
            ["git", *arguments],
            istream=given,
            env={**QUIET, **(environment or {})},
            with_extended_output=True,
            with_exceptions=False,
            stdout_as_string=False,
            strip_newline_in_stdout=False,
            kill_after_timeout=seconds,
        )
    if status not in allowed:
        raise GitFailed(str(complaint).strip() or f"git {' '.join(arguments)} ended with status {status}")
    assert isinstance(printed, bytes)
    return printed


def _temporary(content: bytes) -> BinaryIO:
    try:
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        file.write(content)
        file.seek(0)
    except OSError as error:
        raise UserError(no_room(error)) from error
    return cast(BinaryIO, file)


def _git_directory(checkout: Path) -> Path:
    marker = checkout / ".git"
    # In a submodule and in a linked work tree, .git is a file that names the directory.
    return checkout / marker.read_text().removeprefix("gitdir: ").strip() if marker.is_file() else marker


def in_checkout(checkout: Path, *arguments: str) -> str:
    """Ask git about a checkout.

    Naming the git directory and the index keeps out what git sets while it runs a hook of another repository, and
    lets a shared checkout belong to another user.
    """
    git_directory = _git_directory(checkout)
    return run_git(
        *("--git-dir", str(git_directory), "--work-tree", str(checkout), *arguments),
        folder=checkout,
        environment={"GIT_INDEX_FILE": f"{git_directory}/index"},
    ).decode(errors="surrogateescape")


def has_commit(checkout: Path, commit: str) -> bool:
    """Say whether a checkout has a commit's object."""
    try:
        in_checkout(checkout, "cat-file", "-e", f"{commit}^{{commit}}")
    except GitFailed:
        return False
    return True


@dataclass(frozen=True)
class Entry:
    """One file of a tree."""

    mode: str
    blob: str
    path: str


@dataclass(frozen=True)
class Scratch:
    """A throwaway git directory with one index; ``entry``, ``apply`` and the like work on that index."""

    folder: Path
    user_config: bool = False

    def git(
        self, *arguments: str, stdin: bytes = b"", allowed: Collection[int] = (0,), seconds: float | None = None
    ) -> str:
        """Run a git command in here."""
        return self.raw(*arguments, stdin=stdin, allowed=allowed, seconds=seconds).decode(errors="surrogateescape")

    def raw(
        self, *arguments: str, stdin: bytes = b"", allowed: Collection[int] = (0,), seconds: float | None = None
    ) -> bytes:
        """Run a git command in here and return its bytes."""
        environment = {
            "GIT_DIR": f"{self.folder}/git",
            "GIT_INDEX_FILE": f"{self.folder}/index",
            "GIT_WORK_TREE": f"{self.folder}",
            **({} if self.user_config else NO_USER_CONFIG),
        }
        return run_git(
            *arguments, folder=self.folder, environment=environment, stdin=stdin, allowed=allowed, seconds=seconds
        )

    def borrow(self, checkout: Path) -> None:
        """Read the checkout's objects from now on."""
        objects = in_checkout(checkout, "rev-parse", "--path-format=absolute", "--git-path", "objects")
        (self.folder / "git/objects/info/alternates").write_text(objects)

    def read_tree(self, tree: str) -> None:
        """Fill the index with the files of a tree or a commit."""
        self.git("read-tree", tree)

    def write_tree(self) -> str:
        """Return the hash of the tree that the index describes; its blobs may be missing."""
        return self.git("write-tree", "--missing-ok").strip()

    def entries(self, *paths: str) -> list[Entry]:
        """Return the index's files, or those of them that are named."""
        listed = self.git("--literal-pathspecs", "ls-files", "-s", "-z", "--", *paths)
        found = []
        for line in listed.split("\0")[:-1]:
            numbers, path = line.split("\t", 1)
            mode, blob, _ = numbers.split(" ")
            found.append(Entry(mode, blob, path))
        return found

    def entry(self, path: str) -> Entry | None:
        """Return one file of the index, if it is there."""
        return next((entry for entry in self.entries(path) if entry.path == path), None)

    def set_entry(self, entry: Entry) -> None:
        """Put a blob into the index."""
        self.git("update-index", "--add", "--cacheinfo", f"{entry.mode},{entry.blob},{entry.path}")

    def missing(self, blobs: Iterable[str]) -> set[str]:
        """Return the blobs that are not to be had."""
        asked = "".join(f"{blob}\n" for blob in blobs).encode()
        answers = self.git("cat-file", "--batch-check", "--buffer", stdin=asked)
        return {line.split()[0] for line in answers.splitlines() if line.endswith(" missing")}

    def content(self, blob: str) -> bytes:
        """Return a blob's bytes."""
        return self.raw("cat-file", "blob", blob)

    def store(self, content: bytes) -> str:
        """Store bytes as a blob and return its hash."""
        return self.git("hash-object", "-w", "--stdin", stdin=content).strip()

    def apply(self, patch: str) -> None:
        """Apply a zero-context patch to the index."""
        self.git("apply", "--cached", "--unidiff-zero", "--whitespace=nowarn", "-", stdin=patch.encode())

    def check_out(self, paths: Iterable[str], into: Path) -> None:
        """Write the named files of the index below a folder."""
        names = "\0".join(paths).encode(errors="surrogateescape")
        self.git("checkout-index", "-z", "--stdin", f"--prefix={into}/", stdin=names)

    def insertions(self, before: str, after: str) -> list[Insertion]:
        """Return the lines that lead from one blob to another.

        Args:
            before: Hash of the upstream blob.
            after: Hash of the edited blob.

        Returns:
            The inserted lines, from top to bottom.

        Raises:
            ValueError: If a line of ``before`` was changed or deleted, or a line is no text; says which.
        """
        diff = self.git("diff", "--unified=0", "--minimal", "--no-color", "--no-ext-diff", "--text", before, after)
        lines = self.content(after).split(b"\n")
        found = []
        for hunk in re.finditer(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", diff, re.MULTILINE):
            old_start, old_count, new_start, new_count = (1 if part is None else int(part) for part in hunk.groups())
            if old_count:
                raise ValueError(f"upstream's line {old_start} is changed or deleted; patches only insert lines")
            if new_start + new_count > len(lines):
                raise ValueError("the last inserted line does not end in a newline")
            try:
                inserted = tuple(line.decode() for line in lines[new_start - 1 : new_start - 1 + new_count])
            except UnicodeDecodeError as error:
                raise ValueError(f"the lines inserted at line {new_start} are not UTF-8") from error
            found.append(Insertion(old_start, inserted))
        return found

    def merge(self, ours: str, base: str, theirs: str) -> tuple[str, list[int]]:
        """Carry the change from ``base`` to ``theirs`` over to ``ours``.

        Returns:
            The merged blob, and the lines at which both sides had changed the same place.
        """
        names = []
        for name, blob in (("ours", ours), ("base", base), ("theirs", theirs)):
            (self.folder / name).write_bytes(self.content(blob))
            names.append(name)
        # The exit status is the number of conflicts, at most 127.
        merged = self.raw("merge-file", "-p", "-q", *names, allowed=range(128))
        clashes = [number for number, line in enumerate(merged.split(b"\n"), 1) if line.startswith(b"<<<<<<< ours")]
        return self.store(merged), clashes


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="flatpatch-")
    except OSError as error:
        raise UserError(no_room(error)) from error


@contextmanager
def scratch(checkout: Path | None = None, *, user_config: bool = False) -> Iterator[Scratch]:
    """Make a ``Scratch`` that lasts as long as the block.

    Args:
        checkout: Whose objects to borrow.
        user_config: Whether git may read the user's own configuration (a proxy, say), as a fetch needs.

    Yields:
        The empty scratch directory.
    """
    with _temporary_folder() as name:
        folder = Path(name)
        (folder / "git/objects/info").mkdir(parents=True)
        (folder / "git/refs").mkdir()
        (folder / "git/info").mkdir()
        (folder / "git/HEAD").write_text("ref: refs/heads/none\n")
        # Files leave a tree byte for byte, whatever upstream's .gitattributes say about line ends and filters.
        (folder / "git/info/attributes").write_text("* -text -filter -ident -working-tree-encoding\n")
        here = Scratch(folder, user_config)
        if checkout is not None:
            here.borrow(checkout)
        yield here

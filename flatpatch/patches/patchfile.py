"""What a patch file may look like: a header that says why, and lines that are inserted. Nothing else.

A patch carries no line of upstream: no context, nothing behind the second ``@@``. It finds its place by line number
alone, so it names the one blob (``index <before>..<after>``) in which these numbers hold. Only one spelling of a patch
is accepted, the one that ``Patch.text`` writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

HEADER_FIELDS = ("Why", "Touches", "Remove when")


@dataclass(frozen=True)
class Insertion:
    """Lines inserted after upstream's line ``after``, counted from 1; 0 is the start of the file."""

    after: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FileChange:
    """What is inserted into one file: ``before`` and ``after`` are hashes of the whole file's blob."""

    path: str
    mode: str
    before: str
    after: str
    insertions: tuple[Insertion, ...]
    line: int = 0  # of the patch file, for messages

    @property
    def text(self) -> str:
        """The change as git reads it."""
        lines = [
            f"diff --git a/{self.path} b/{self.path}",
            f"index {self.before}..{self.after} {self.mode}",
            f"--- a/{self.path}",
            f"+++ b/{self.path}",
        ]
        inserted = 0
        for insertion in self.insertions:
            start = insertion.after + inserted + 1
            lines.append(f"@@ -{insertion.after},0 +{start},{len(insertion.lines)} @@")
            lines += [f"+{line}" for line in insertion.lines]
            inserted += len(insertion.lines)
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Patch:
    """One patch file; ``name`` is how messages call it."""

    name: str
    header: str
    changes: tuple[FileChange, ...]

    @property
    def text(self) -> str:
        """The patch file, in the only spelling that is accepted."""
        return self.header + "".join(change.text for change in self.changes)


def parse(name: str, text: str) -> tuple[Patch, list[str]]:
    """Read a patch file.

    Args:
        name: How to call it in messages.
        text: What is in it.

    Returns:
        The patch as far as it could be read, and one message per line that has no place in a patch. Numbers that
        follow from others (of hunks, of lines) are not looked at; see ``spelling_problems``.
    """
    header: list[str] = []
    changes: list[FileChange] = []
    problems: list[str] = []
    in_hunk = False
    for number, line in enumerate(text.split("\n")[:-1], 1):
        where = f"{name}:{number}"
        change = changes[-1] if changes else None
        if found := re.fullmatch(r"diff --git a/(.+) b/\1", line):
            changes.append(FileChange(found[1], "", "", "", (), number))
            in_hunk = False
        elif change is None:
            header.append(line + "\n")
        elif in_hunk and line.startswith("+"):
            last = change.insertions[-1]
            grown = replace(last, lines=(*last.lines, line[1:]))
            changes[-1] = replace(change, insertions=(*change.insertions[:-1], grown))
        elif found := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@(.*)", line):
            in_hunk = True
            changes[-1] = replace(change, insertions=(*change.insertions, Insertion(int(found[1]), ())))
            if found[2] != "0":
                problems.append(
                    f"{where} takes in lines of upstream; patches only insert (expected '@@ -{found[1]},0 ...')."
                )
            if found[3]:
                problems.append(f"{where} carries text after the second @@, which is a line of upstream. Delete it.")
        elif in_hunk:
            kind = {"-": "deletes a line of upstream", " ": "carries a line of upstream as context"}.get(line[:1])
            problems.append(f"{where} {kind or 'is no inserted line'}; after @@ each line starts with '+'.")
        elif found := re.fullmatch(r"index ([0-9a-f]{40})\.\.([0-9a-f]{40}) (100644|100755)", line):
            changes[-1] = replace(change, before=found[1], after=found[2], mode=found[3])
        elif line not in (f"--- a/{change.path}", f"+++ b/{change.path}"):
            problems.append(
                f"{where} has no place in a patch: {line!r}. Expected 'index <40 hex>..<40 hex> <mode>', '--- a/...', "
                "'+++ b/...' or '@@ -N,0 +M,K @@'; files are neither made, deleted nor renamed."
            )
    problems += [
        f"{name}:{change.line} has no index line with the two full blob hashes of {change.path}."
        for change in changes
        if not change.before
    ]
    if not text.endswith("\n"):
        problems.append(f"{name} does not end in a newline.")
    return Patch(name, "".join(header), tuple(changes)), problems


def content_problems(patch: Patch) -> list[str]:
    """Return what the patch lacks: a reason, the files it touches, something to insert."""
    problems = []
    for field in HEADER_FIELDS:
        if not re.search(rf"^{field}:[ \t]*\S", patch.header, re.MULTILINE):
            problems.append(
                f"{patch.name} has no '{field}:' in its header. Say it in a line before the first 'diff --git'."
            )
    touches = re.search(r"^Touches:.*(?:\n[ \t]+\S.*)*", patch.header, re.MULTILINE)
    for change in patch.changes:
        if touches and change.path not in touches[0]:
            problems.append(f"{patch.name}: 'Touches:' does not name {change.path}, into which it inserts lines.")
        starts = [insertion.after for insertion in change.insertions]
        if starts != sorted(set(starts)):
            problems.append(f"{patch.name}:{change.line}: the hunks of {change.path} are out of order.")
        if not starts or not all(insertion.lines for insertion in change.insertions):
            problems.append(f"{patch.name}:{change.line} inserts nothing into {change.path}.")
    if not patch.changes:
        problems.append(f"{patch.name} inserts nothing.")
    return problems


def spelling_problems(patch: Patch, text: str) -> list[str]:
    """Return the first line of a well-formed patch whose numbers or order are not as we write them."""
    for number, (line, expected) in enumerate(zip(text.split("\n"), patch.text.split("\n"), strict=False), 1):
        if line != expected:
            return [f"{patch.name}:{number} expected {expected!r}, found {line!r}."]
    return []

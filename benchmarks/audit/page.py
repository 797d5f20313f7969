"""The findings as text: a matrix for the terminal, tables for the page, and what each number means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.audit.checks import Finding
from flatpatch.errors import UserError
from flatpatch.files import write_atomically

BEGIN, END = "<!-- the tables, written by python -m benchmarks.audit -->", "<!-- the end of the tables -->"
Findings = Mapping[str, Mapping[str, Finding]]  # by check, then by implementation


def matrix(findings: Findings, names: Sequence[str]) -> str:
    """Return the matrix in as few characters as it takes, a column for each implementation."""
    columns = [chr(ord("A") + place) for place in range(len(names))]
    lines = [f"  {column} {name}" for column, name in zip(columns, names, strict=True)]
    lines += ["", " " * 14 + "".join(f"{column:8}" for column in columns).rstrip()]
    words = {"by design": "design", "not offered": "-"}
    for check, row in findings.items():
        cells = [words.get(row[name].verdict, row[name].verdict) for name in names]
        lines.append(f"{check:14}" + "".join(f"{cell:8}" for cell in cells).rstrip())
    return "\n".join(lines)


def cell(finding: Finding) -> str:
    """Return a cell of a table of the page."""
    verdict = "**fail**" if finding.verdict == "fail" else finding.verdict
    return " ".join(filter(None, [verdict, finding.number]))


def table(findings: Findings, names: Sequence[str]) -> str:
    """Return the matrix as a table of the page."""
    head = ["", *names]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line([check, *(cell(row[name]) for name in names)]) for check, row in findings.items()]
    return "\n".join(lines)


def meanings(findings: Findings, names: Sequence[str]) -> str:
    """Return what the numbers mean, those that say the same together."""
    lines = []
    for check, row in findings.items():
        alike: dict[tuple[str, str, str], list[str]] = {}
        for name in names:
            found = row[name]
            if found.text:
                alike.setdefault((found.verdict, found.number, found.text), []).append(name)
        for (verdict, number, text), those in alike.items():
            what = f"{verdict}: {' '.join(filter(None, [number, text]))}"
            lines.append(f"- {check}, {what} ({', '.join(those)})")
    return "\n".join(lines)


def demands(checks: Mapping[str, str]) -> str:
    """Return what each check demands, as a table of the page."""
    return "\n".join([_line(["check", "passes where"]), "|---|---|", *(_line([*pair]) for pair in checks.items())])


def write(page: Path, text: str) -> None:
    """Put the text between the page's marks.

    Raises:
        UserError: If the page has no such marks.
    """
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, mark, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise UserError(f"{page} has no lines {BEGIN!r} and {END!r} to write the tables between. Name docs/audit.md.")
    write_atomically(page, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

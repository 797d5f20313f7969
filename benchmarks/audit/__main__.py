"""Run the audit: ``python -m benchmarks.audit --checkouts FOLDER``."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.audit import page, ranks, variants
from benchmarks.audit.checks import CHECKS, Finding, Maker, run_check
from benchmarks.audit.implementations import ROWS
from benchmarks.audit.rows import MissingError, Row
from flatpatch.errors import UserError, did_you_mean

EXAMPLES = """examples:
  python -m benchmarks.audit --checkouts ../audit                         # what is there; how to get the rest
  python -m benchmarks.audit --checkouts ../audit --only flatpatch temperon
  python -m benchmarks.audit --checkouts ../audit --page docs/audit.md    # all, and the page's tables

FOLDER holds a checkout of each repository, called owner-name, and in packages/ what pip put there. Keep it outside this
project: the audit reads it and writes nothing into it. Their code is run as it is.
"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description="Hold implementations of SAM, other people's and ours, to closed forms and properties.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkouts", metavar="FOLDER", type=Path, required=True, help="where their code is")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="audit these alone")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the tables into this page")
    arguments = parser.parse_args(words)
    try:
        audit(arguments.checkouts.expanduser().resolve(), arguments.only, arguments.page)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def audit(checkouts: Path, only: Sequence[str] | None, target: Path | None) -> None:
    """Audit what is there, print it, and write the page.

    Raises:
        UserError: If the folder or a name is unknown, or a page is wanted and something is missing.
    """
    if not checkouts.is_dir():
        raise UserError(
            f"--checkouts: there is no folder {checkouts}. Make it, and run this again: it says what goes there."
        )
    if target is not None and only is not None:
        raise UserError("--page wants all implementations: leave out --only.")
    chosen = _chosen(only)
    there, missing = _load(chosen, checkouts)
    relatives = [v for v in variants.VARIANTS if only is None or v.name in only]
    modules = {}
    for variant in relatives:
        try:
            modules[variant] = variant.source.load(checkouts)
        except MissingError as error:
            missing[variant.name] = str(error)
    if missing:
        print(f"{len(missing)} not here:", *(f"  {name}: {reason}" for name, reason in missing.items()), "", sep="\n")
        if target is not None:
            raise UserError(f"{target} was not written: not all implementations are here (see above).")
    if not (there or modules):
        raise UserError(f"nothing to audit in {checkouts}: the commands above bring it there.")
    names = [row.name for row in there]
    findings = {check.name: {row.name: run_check(check, Maker(row, there[row])) for row in there} for check in CHECKS}
    findings[ranks.NAME] = ranks.audit([*there], checkouts) if there else {}
    related = [(variant, variants.audit(variant, module)) for variant, module in modules.items()]
    print(page.matrix(findings, names), "", page.meanings(findings, names), sep="\n")
    for variant, found in related:
        print(f"- {variant.method} of {variant.name}: {page.cell(found)} {found.text}".rstrip())
    if target is not None:
        page.write(target, _text(findings, there, related, checkouts))
        print(f"written into {target}")


def _chosen(only: Sequence[str] | None) -> list[Row]:
    known = [row.name for row in ROWS]
    names = {*known, *(variant.name for variant in variants.VARIANTS)}
    problems = [f"--only {name}: not audited.{did_you_mean(name, names)}" for name in only or () if name not in names]
    if problems:
        raise UserError.collect([*problems, f"known: {', '.join(sorted(names))}"])
    return [row for row in ROWS if only is None or row.name in only]


def _load(rows: Sequence[Row], checkouts: Path) -> tuple[dict[Row, object], dict[str, str]]:
    there, missing = {}, {}
    for row in rows:
        try:
            there[row] = row.source.load(checkouts)
        except MissingError as error:
            missing[row.name] = str(error)
    return there, missing


def _text(
    findings: page.Findings,
    there: dict[Row, object],
    related: Sequence[tuple[variants.Variant, Finding]],
    checkouts: Path,
) -> str:
    names = [row.name for row in there]
    sources = ["| implementation | version | code's licence | called |", "|---|---|---|---|"]
    for row in there:
        name = f"[{row.name}]({row.source.url})" if row.source.package or row.source.repository else row.name
        sources.append(f"| {name} | {row.source.version(checkouts)} | {row.licence} | {row.note} |")
    relatives = ["| method | implementation | version | outcome | |", "|---|---|---|---|---|"]
    for variant, found in related:
        version = variant.source.version(checkouts)
        relatives.append(f"| {variant.method} | {variant.name} | {version} | {page.cell(found)} | {found.text} |")
    when, python = datetime.date.today(), platform.python_version()
    return "\n".join(
        [
            f"Run on {when} with torch {torch.__version__} and Python {python}, on a CPU.",
            "",
            *sources,
            "",
            "## The matrix",
            "",
            page.table(findings, names),
            "",
            page.demands({**{check.name: check.demand for check in CHECKS}, ranks.NAME: ranks.DEMAND}),
            "",
            "## What the numbers mean",
            "",
            page.meanings(findings, names),
            "",
            "## Relatives of SAM",
            "",
            "Six steps beside a twin written from the paper.",
            "",
            *relatives,
        ]
    )


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing is written into their folders
    warnings.filterwarnings("ignore")
    sys.exit(main())

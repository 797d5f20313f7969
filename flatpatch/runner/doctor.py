"""The verb ``doctor``: what a run would find here, by the checks of the runner itself; changes and fetches nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flatpatch import patches
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.base import BYTES_NEEDED
from flatpatch.files import ROOT
from flatpatch.runner.estimate import seconds_taken
from flatpatch.runner.record import check_continues
from flatpatch.runner.resolve import cuda_devices, headline, make_plan, parse
from flatpatch.settings import Request
from flatpatch.upstreams import UPSTREAMS

USAGE = """usage: python -m flatpatch doctor [key=value ...] [--json]

Says on one screen what is here and what is missing, by the checks of the runner itself; changes nothing and fetches
nothing. With settings it says whether that run could start, else whether profile quick could. Exit code 1 if something
stands in the way. --json prints the same for a program.

  [ok]  as it should be
  [--]  missing, and not needed for what was asked; the line says what would bring it
  [NO]  a run is refused because of it, or its numbers would not be those of the locked versions

examples:
  python -m flatpatch doctor
  python -m flatpatch doctor --json
  python -m flatpatch doctor method=inflora benchmark=imagenet_r_10 profile=upstream data=/datasets
"""
OK, ABSENT, WRONG = "ok", "--", "NO"
Finding = tuple[str, str]  # one of the three above, and what was found
OLDEST_DRIVER = 525  # of NVIDIA's, for the CUDA of the locked torch: pyproject.toml says why
_IN_JSON = {OK: "ok", ABSENT: "missing", WRONG: "wrong"}


def doctor(words: Sequence[str]) -> int:
    """Print the findings; returns 1 if something stands in the way."""
    if "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    request = parse(words) if words else None
    sections: dict[str, Iterator[Finding]] = {"environment": _environment(), "machine": _machine()}
    if request:
        sections["this run"] = _of_run(request, words)
    else:
        sections |= {"the authors' code": _repositories(), "models and data": _inputs(), "time": _times()}
    with patches.nothing_fetched():
        found = [(section, mark, text) for section, part in sections.items() for mark, text in part]
    wrong = sum(mark == WRONG for _, mark, _ in found)
    if as_json:
        rows = [{"section": section, "state": _IN_JSON[mark], "finding": text} for section, mark, text in found]
        print(json.dumps(rows, indent=2))
        return 1 if wrong else 0
    for section in dict.fromkeys(section for section, _, _ in found):
        print(section)
        for _, mark, text in (each for each in found if each[0] == section):
            print(f"[{mark}] " + text.replace("\n", "\n     "))
    print(f"\n{wrong} thing(s) to put right." if wrong else "\nNothing stands in the way.")
    if not request:
        print("What one run needs: python -m flatpatch doctor method=NAME profile=upstream ...")
    return 1 if wrong else 0


def _environment() -> Iterator[Finding]:
    right = (3, 10) <= sys.version_info[:2] < (3, 12)
    yield OK if right else WRONG, f"Python {platform.python_version()} (expected 3.10 or 3.11)"
    problems = lock_problems(ROOT, Path(sys.prefix))
    for problem in problems:
        yield WRONG, problem
    if not problems:
        yield OK, "libraries as locked"
    try:
        patches.check_git()
    except UserError as error:
        yield WRONG, str(error)
    else:
        yield OK, "git"


def _machine() -> Iterator[Finding]:
    """Cores, memory, disk and GPUs, beside what runs need of them."""
    memory = psutil.virtual_memory()
    yield OK, f"{os.cpu_count()} cores, {memory.total / 2**30:.0f} GiB of memory, {memory.available / 2**30:.0f} free"
    free = shutil.disk_usage(ROOT).free
    yield OK if free >= BYTES_NEEDED else WRONG, f"{free / 2**30:.1f} GiB of disk free"
    needs = {name: row.gpu_memory for name, row in UPSTREAMS.items() if row.gpu_memory is not None}
    measured = ", ".join(f"{name} {need.gib:g} GiB ({need.of})" for name, need in needs.items())
    count, driver = cuda_devices(), _driver()
    if driver and int(driver.partition(".")[0]) < OLDEST_DRIVER:
        yield ABSENT, f"NVIDIA driver {driver}: the locked torch takes GPUs from driver {OLDEST_DRIVER} on"
    if not count:
        why = f"torch sees none of the GPUs of driver {driver}" if driver else "no CUDA device"
        yield ABSENT, f"{why}: quick and small runs take the CPU. Profile upstream needs one; measured: {measured}"
    for number in range(count):
        import torch

        about = torch.cuda.get_device_properties(number)
        gib = about.total_memory / 2**30
        small = [name for name, need in needs.items() if need.gib > gib]
        yield (
            ABSENT if small else OK,
            f"GPU {number}: {about.name}, {gib:.0f} GiB, driver {driver or 'unknown'}; measured of profile upstream: "
            f"{measured}{'; too little for ' + ', '.join(small) if small else ''}",
        )


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty where there is none."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.match(r"\s*(\d+[\d.]*)", asked.stdout)
    return found[1] if found else ""


def _repositories() -> Iterator[Finding]:
    for repo in sorted({method.repository for method in UPSTREAMS.values() if method.repository}):
        yield from _of_repository(repo)


def _inputs() -> Iterator[Finding]:
    """What the authors' own settings lack here, each lack once with the methods that it stops."""
    lacks: dict[str, list[str]] = {}
    for name, row in UPSTREAMS.items():
        if row.repository is None or not patches.is_available(row.repository)[0]:
            continue
        try:
            found = make_plan(parse([f"method={name}", "profile=upstream", "device=cpu"]), dry_run=True).lacks
        except UserError as error:
            found = (str(error),)
        if not found:
            yield OK, f"{name}, profile upstream: weights and data are here"
        for lack in found:
            lacks.setdefault(lack, []).append(name)
    for lack, names in lacks.items():
        yield ABSENT, f"{', '.join(names)}, profile upstream: {lack}"


def _times() -> Iterator[Finding]:
    """How long finished runs of each kind took here."""
    took = seconds_taken(Path("runs"))
    if took:
        said = (
            f"{method} ({profile}, {engine}) {statistics.fmean(times):.0f} s"
            for (method, profile, engine), times in took.items()
        )
        yield OK, "finished runs here took, on average: " + "; ".join(said)
    else:
        yield OK, "no run has finished here yet; quick runs take one to five minutes on two cores"


def _of_repository(repo: str) -> Iterator[Finding]:
    here, why = patches.is_available(repo)
    if not here:
        alone = [name for name, row in UPSTREAMS.items() if row.repository == repo and not row.reference]
        need = f"method={', '.join(alone)} needs it in every profile" if alone else "profile quick runs without it"
        yield ABSENT, f"{repo} is not here; {need}. It comes with: git submodule update --init third_party/{repo}"
        return
    try:
        verified = patches.verify(repo)
    except UserError as error:
        yield WRONG, f"{repo}: every run of its code is refused: {error}"
    else:
        partial = f"; a partial checkout without {len(verified.absent)} of its files" if verified.absent else ""
        yield OK, f"{repo}: {verified.checkout}, clean and at its pin{partial}"
    for lack in patches.skipped_checkouts(repo):
        yield ABSENT, f"{lack}; the one above is used"


def _of_run(request: Request, words: Sequence[str]) -> Iterator[Finding]:
    try:
        plan = make_plan(request, dry_run=True)
        for lack in plan.lacks:
            yield WRONG, lack
        if not plan.lacks:
            plan = make_plan(request)
            check_continues(plan.folder, plan)
    except UserError as error:
        yield WRONG, str(error)
        return
    if not plan.lacks:
        yield OK, f"{headline(plan)}\nThis run can start: python -m flatpatch run {' '.join(words)}"


def lock_problems(root: Path, prefix: Path) -> list[str]:
    """Return what is wrong with the lock file, and how an environment differs from it.

    Args:
        root: The project, with ``requirements.lock`` and ``pyproject.toml``.
        prefix: The environment; its stamp, where the run scripts made it, holds the lock that it was made from.
    """
    lock = root / "requirements.lock"
    undo = f"To undo an edit that is not meant: git -C {root} checkout -- {lock.name}"
    if not lock.is_file():
        return [f"{lock} is missing. {undo}"]
    text = lock.read_text(encoding="utf-8")
    problems = []
    if not text.endswith("\n"):
        problems.append(f"{lock} ends in the middle of a line: it is cut. {undo}")
    if edited(root, lock.name):
        problems.append(f"{lock} is not the committed one. {undo}")
    stamp = prefix / "flatpatch-stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").partition("\n")[2] != text:
        problems.append(f"{prefix} was made from another {lock.name}; the next script of run_scripts/ makes it again")
    locked: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)(?:\s*;\s*(.+))?", line):
            name, version, marker = match.groups()
            if marker is None or Marker(marker).evaluate():
                locked[canonicalize_name(name)] = version
            if marker is None or _installed(name) is not None:
                problems += _another_version(name, version) if canonicalize_name(name) in locked else []
    lacking = {name: needed for name, needed in _needed(root, locked) if name not in locked}
    if lacking:
        said = ", ".join(f"{name} (for {needed})" for name, needed in sorted(lacking.items()))
        problems.append(f"{lock} is cut or out of date; it lacks {said}. {undo}, or lock anew: make lock")
    return problems


def _another_version(name: str, locked: str) -> list[str]:
    here = _installed(name) or "missing"
    return [] if here.split("+")[0] == locked else [f"{name} is {here}, locked is {locked}"]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed(root: Path, locked: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each package that the project, or a locked and installed package, asks for, and which of them does."""
    for name in _direct_dependencies(root / "pyproject.toml"):
        yield name, "pyproject.toml"
    for package in locked:
        if _installed(package) is None:
            continue
        for text in importlib.metadata.requires(package) or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                yield canonicalize_name(wanted.name), package


def _direct_dependencies(file: Path) -> list[str]:
    # Python 3.10 has no reader of TOML; each dependency of this file stands in a line of its own.
    block = re.search(r"^dependencies = \[\n(.*?)^\]", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = block[1].splitlines() if block else []
    found = (re.match(r'\s*"([A-Za-z0-9_.-]+)', line) for line in lines)
    return [canonicalize_name(match[1]) for match in found if match]


def edited(root: Path, name: str) -> bool:
    """Tell whether a file differs from the commit that is checked out; false where there is no git to ask."""
    if not (root / ".git").exists():
        return False
    try:
        return bool(patches.in_checkout(root, "diff", "--name-only", "HEAD", "--", name))
    except FlatpatchError:  # no git, or no commit
        return False

"""Say in one screen what a run would find here, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Sequence

from flatpatch import patches
from flatpatch.errors import UserError
from flatpatch.methods import METHODS
from flatpatch.runs.choices import cuda_devices
from flatpatch.runs.plan import BYTES_NEEDED, ROOT
from flatpatch.runs.vision_data import DATASETS


def doctor(words: Sequence[str]) -> int:
    """Print the findings; returns 1 if something that every run needs is wrong."""
    if words and words[0] in ("-h", "--help"):
        print(
            "usage: python -m flatpatch doctor\n\nSays what is here and what is missing: code, libraries, CUDA, disk."
        )
        return 0
    if words:
        raise UserError(f"doctor takes no settings (got {' '.join(words)}).")
    bad = 0
    version = platform.python_version()
    ok = (3, 10) <= sys.version_info[:2] < (3, 12)
    bad += not ok
    print(f"[{'ok' if ok else 'NO'}] Python {version} (expected 3.10 or 3.11)")
    different = _different_libraries()
    bad += bool(different)
    print(f"[{'NO' if different else 'ok'}] libraries as locked{': ' + ', '.join(different) if different else ''}")
    needed = []
    for repo in sorted({method.repository for method in METHODS.values() if method.repository}):
        here, why = patches.is_available(repo)
        print(f"[{'ok' if here else '--'}] {repo}: {why}")
        if here:
            for lack in patches.passed_over(repo):
                print(f"[--] {lack}; the one above is used")
            continue
        without = [name for name, row in METHODS.items() if row.repository == repo and not row.reference]
        needed += [f"; method={name} needs {repo} in every profile" for name in without]
    for dataset in sorted({dataset.folder for dataset in DATASETS.values()}):
        here = (ROOT / "data" / dataset).is_dir()
        print(
            f"[{'ok' if here else '--'}] data/{dataset}: "
            f"{'here' if here else 'no such folder; data=FOLDER names another'}"
        )
    count = cuda_devices()
    print(f"[{'ok' if count else '--'}] {count} CUDA device(s)" + ("" if count else ": profile quick runs on the CPU"))
    free = shutil.disk_usage(ROOT).free
    bad += free < BYTES_NEEDED
    print(f"[{'ok' if free >= BYTES_NEEDED else 'NO'}] {free / 2**30:.1f} GiB of disk free")
    print(f"\n'--' is not needed for profile=quick engine=auto{''.join(needed)}. The README says how to get it.")
    return 1 if bad else 0


def _different_libraries() -> list[str]:
    lock = ROOT / "requirements.lock"
    if not lock.is_file():
        return [f"{lock.name} is missing"]
    found = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)(.*)", line)
        if not match or ";" in match[3]:
            continue
        try:
            here = importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            here = "missing"
        if here.split("+")[0] != match[2]:
            found.append(f"{match[1]} {here} (locked {match[2]})")
    return found

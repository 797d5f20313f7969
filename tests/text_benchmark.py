"""The quick benchmark of texts, cut to a few steps."""

from __future__ import annotations

import json
from pathlib import Path

from flatpatch.families.text import quick


def small_benchmark(folder: Path, train: int = 48, test: int = 8) -> Path:
    """Write it, with so many training texts of each task, and so many of each other split."""
    quick.write_benchmark(folder)
    for path in folder.rglob("*.json"):
        if path.name != "labels.json":
            rows = json.loads(path.read_text())
            path.write_text(json.dumps(rows[: train if path.name == "train.json" else test]))
    return folder

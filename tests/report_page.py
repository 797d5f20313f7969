"""Runs in folders, and readers of the page and the figures made of them, for the tests of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flatpatch.metrics import from_lists, summarise
from tests.report_records import ORDER_1, make_record, make_steps

VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


def write_run(folder: Path, record: dict[str, Any], steps: list[dict[str, Any]] | None = None) -> Path:
    """Write a run's folder as the runner leaves it."""
    (folder / "figures").mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    if steps is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps), encoding="utf-8")
    return folder


def seeded(seed: int, *, sam: str = "sam", tasks: tuple[str, ...] = ORDER_1, **changes: Any) -> dict[str, Any]:
    """Return one of several records that differ by seed and SAM alone."""
    record = make_record(tasks, **changes)
    record["settings"]["sam"]["value"] = sam
    record["settings"]["seed"] = {"value": seed, "source": "command line"}
    record["seeds"] = [seed]
    return record


def with_average(record: dict[str, Any], value: float) -> dict[str, Any]:
    """Return the record with another average accuracy: the accuracies after the last task are moved to give it."""
    matrix = record["accuracy_matrix"]
    shift = value - sum(matrix[-1]) / len(matrix[-1])
    matrix[-1] = [entry + shift for entry in matrix[-1]]
    found = summarise(from_lists(matrix)) | {"average_accuracy": value}  # without the last digit's rounding
    record["metrics"] = {**record["metrics"], **{key: number for key, number in found.items() if number is not None}}
    return record


def flatness_entry(
    index: int, when: str, scope: str, values: dict[str, float | None], **changes: Any
) -> dict[str, Any]:
    """Return one entry of a record's ``flatness``."""
    entry = {
        "task": ORDER_1[index],
        "task_index": index,
        "when": when,
        "scope": scope,
        "samples": 64,
        "loss": 0.5,
        "values": values,
        "file": f"flatness/{index + 1}-{ORDER_1[index]}-{when}.json",
        "arrays": None,
        "seconds": 1.0,
    }
    return entry | changes


def make_four(folder: Path) -> list[Path]:
    """Write SAM off with seeds 0, 1 and 2, and SAM with 0, 1 (finished) and 2 (interrupted); return the folders."""
    folders = []
    averages = {"off": (70.0, 72.0, 77.0), "sam": (80.0, 81.0, 82.0)}
    for sam, values in averages.items():
        for seed, average in enumerate(values):
            done = 2 if (sam, seed) == ("sam", 2) else None
            record = seeded(seed, sam=sam, done=done)
            if done is None:
                with_average(record, average)
                factor = 1.0 if sam == "off" else 0.5
                record["flatness"] = [
                    flatness_entry(k, when, "adapter", {"top_eigenvalue": factor * (10 + k + seed), "trace": None})
                    for k in range(4)
                    for when in ("before", "after")
                ]
            record["training"] = [row | {"steps": 12} for row in record["training"]]
            steps = make_steps(steps=12, sam=sam == "sam")
            folders.append(write_run(folder / f"nlora-{sam}-seed{seed}", record, steps))
    return folders


class Reader(HTMLParser):
    """Read a page into tables, headings and attributes; note every tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[int, str]] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._in_a_word = False
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_a_word = tag == "wbr"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes {self._open[-3:]}")
            return
        self._open.pop()
        if tag == "table":
            self.tables[" ".join(self._caption.split())] = [
                [" ".join(cell.split()) for cell in row] for row in self._rows
            ]

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "title" in self._open:
            return
        if self._in_a_word and self.text:
            self.text[-1] += data
        else:
            self.text.append(data)
        self._in_a_word = False
        if "caption" in self._open:
            self._caption += data
        elif "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += data
        if self._open and any(tag in self._open for tag in ("h1", "h2", "h3")):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def table(self, start: str) -> list[list[str]]:
        """Return the rows of the one table whose caption begins so."""
        found = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        assert len(found) == 1, [caption for caption in self.tables]
        return found[0]

    def row(self, table: str, *start: str) -> list[str]:
        """Return the one row of a table that begins with these cells."""
        found = [row for row in self.table(table) if row[: len(start)] == list(start)]
        assert len(found) == 1, self.table(table)
        return found[0]

    @property
    def words(self) -> str:
        """All text that is shown."""
        return " ".join(" ".join(self.text).split())


def small_print(figure: Figure) -> str:
    """Return what stands below a figure, in one line."""
    texts = [text.get_text() for text in figure.texts if text.get_text() != figure.get_suptitle()]
    return " ".join(" ".join(texts).split())

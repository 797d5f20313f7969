"""Write ``docs/settings.md``: every setting of a run, and the methods, from the tables that the parser reads.

python -m flatpatch.runner.settings_page > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterable

from flatpatch.settings import CHOICES, FIELDS
from flatpatch.upstreams import UPSTREAMS

INTRODUCTION = """\
# Settings

Settings are `key=value` words. They are the same for every script in `run_scripts/`, and for the verbs `run`, `sweep`
and `doctor`. `bash run_scripts/nlora_sam.sh --help` prints them too. [running.md](running.md) explains the ones that
need it.

This page is written by `python -m flatpatch.runner.settings_page > docs/settings.md`.

The column "for" says which methods have the setting: all, or those of some families. Another family's is refused.
The column "role" says what the setting does for a run:

| role | meaning |
|---|---|
| `identity` | another value makes another run |
| `sam` | the same, where SAM is on; without SAM it has no effect |
| `measure` | what is measured in the run; the training stays the same, bit for bit |
| `machine` | what the run runs on |
| `place` | where its files are, and how often it writes them |
"""

AFTER = """\
`upstream.<argument>=<value>` overrides one argument of upstream's script or configuration file. The record keeps it.
"""


def render() -> str:
    """Return the whole page."""
    settings = [
        (
            f"`{name}`",
            _code(str(next(iter(UPSTREAMS)) if name == "method" else field.default)),
            ", ".join(map(_code, UPSTREAMS if name == "method" else CHOICES.get(name, ()))),
            field.metadata["help"],
            ", ".join(field.metadata["family"].split()) or "all",
            field.metadata["role"],
        )
        for name, field in FIELDS.items()
    ]
    methods = [
        (
            f"`{row.name}`",
            row.title,
            row.family,
            row.repository or "-",
            ", ".join(["upstream"] * (row.repository is not None) + ["reference"] * row.reference),
            str(row.seed),
        )
        for row in UPSTREAMS.values()
    ]
    parts = [
        INTRODUCTION,
        "## All settings\n",
        _table(("setting", "default", "choices", "meaning", "for", "role"), settings),
        AFTER,
        "## Methods\n",
        _table(("`method=`", "name", "family", "repository", "engines", "default of `seed=`"), methods),
    ]
    return "\n".join(parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


BAR = r"\|"  # inside a cell


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


if __name__ == "__main__":
    print(render(), end="")

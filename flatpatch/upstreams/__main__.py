"""Write ``DEVIATIONS.md``: where papers and their repositories disagree, from the methods' own files.

python -m flatpatch.upstreams > DEVIATIONS.md
"""

from __future__ import annotations

from flatpatch.upstreams import UPSTREAMS


def render() -> str:
    """Return the whole of ``DEVIATIONS.md``."""
    lines = [
        "# Where papers and their repositories disagree",
        "",
        "flatpatch runs the repositories. Where a paper says something else, the row says what runs here and how to",
        "follow the paper instead. CL-LoRA's paper was read in full; what InfLoRA's, O-LoRA's and N-LoRA's papers say",
        "was taken from secondary sources and must be held against the papers before it is quoted. Where a paper was",
        "not read, the row says so. The files named are the repository's. Every run lists its own deviations from",
        "upstream in its `record.json`.",
        "",
        "This page is written from `flatpatch/upstreams/` by `python -m flatpatch.upstreams > DEVIATIONS.md`.",
    ]
    for upstream in UPSTREAMS.values():
        if not upstream.conflicts:
            continue
        lines += ["", f"## {upstream.title}", "", "| | paper | repository | here | source |", "|---|---|---|---|---|"]
        for row in upstream.conflicts:
            cells = [row.subject, row.paper, row.repository, row.here, row.source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")

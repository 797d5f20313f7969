"""Print the verdicts of studies as the tables of a document: ``docs/studies.md`` has them.

python -m flatpatch.studies [folder of runs, such as runs ...]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError
from flatpatch.report.verdicts import AS_RECORDED, CORRECT, STUDIES, VERDICTS
from flatpatch.studies.result import ConclusionResult


def tables(folders: Sequence[Path]) -> str:
    """Return two tables in Markdown, of hypotheses and of conclusions.

    Args:
        folders: Those that hold ``studies``; of the same study and form in two the later folder counts.

    Raises:
        UserError: If a folder has no verdicts, or some cannot be read.
    """
    found = {(path.parts[-3], path.parts[-2]): path for folder in folders for path in _verdicts(folder)}
    studies = [_read(path) for _, path in sorted(found.items())]
    lines = [
        "| study | form | hypothesis | seeds | effect, 95 % interval | verdict | controls | as recorded |",
        "|---|---|---|---|---|---|---|---|",
        *(row for study in studies for row in _hypotheses(study)),
        "",
        "| study | form | the record's conclusion | measured correctly | as recorded |",
        "|---|---|---|---|---|",
    ]
    for study in studies:
        for each in (ConclusionResult(**own) for own in study["conclusions"]):
            lines.append(_row(study, each.text, each.outcome, each.as_recorded or "-"))
    return "\n".join(lines) + "\n"


def _verdicts(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"{STUDIES}/*/*/{VERDICTS}"))
    if not found:
        raise UserError(f"{folder} has no verdicts of studies. Name the folder of runs that a study was run in.")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = [study[key] for key in ("study", "form", "hypotheses", "conclusions")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Run the study again.") from None
    return study


def _hypotheses(study: Mapping[str, Any]) -> Iterator[str]:
    recorded = {each["hypothesis"]: each["tested"] for each in study["hypotheses"] if each["arm"] == AS_RECORDED}
    for each in study["hypotheses"]:
        if each["arm"] == CORRECT:
            tested = each["tested"]
            controls = "; ".join(f"{name}: {test['verdict']}" for name, test in each["controls"].items())
            other = recorded.get(each["hypothesis"])
            yield _row(
                study,
                each["statement"],
                tested["n"],
                _effect(tested, each["unit"]),
                tested["verdict"],
                controls or "-",
                "-" if other is None else f"{_effect(other)}: {other['verdict']}",
            )


def _effect(tested: Mapping[str, Any], unit: str = "") -> str:
    if tested["effect"] is None:
        return "no number"
    ends = [tested["low"], tested["high"]]
    interval = (
        "" if any(end is None or not math.isfinite(end) for end in ends) else " ({:+.3g} to {:+.3g})".format(*ends)
    )
    return f"{tested['effect']:+.3g}{interval} {unit}".rstrip()


def _row(study: Mapping[str, Any], *cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in (study["study"], study["form"], *cells)) + " |"


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print((__doc__ or "").replace("``", ""))
        sys.exit()
    try:
        print(tables([Path(word) for word in sys.argv[1:] or ["runs"]]), end="")
    except UserError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""One self-contained HTML page about a study, or about several: question, verdicts, figures, and what they rest on.

Everything on it comes from verdicts' files and from the runs that these name; nothing is tested anew. Figures are
embedded, and written beside the page as PNG and PDF.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from flatpatch.files import write_atomically
from flatpatch.report.drawing import save
from flatpatch.report.page import embedded, heat, page_environment
from flatpatch.report.page_figures import COLOURS
from flatpatch.report.study_data import Study, read_verdicts
from flatpatch.report.study_pictures import Picture, pictures
from flatpatch.report.titles import warning
from flatpatch.report.verdicts import AS_RECORDED, CORRECT
from flatpatch.settings import without_effect

PAGE = "report.html"
FIGURES = "figures"
_DPI = 150
_TONES = {
    "supported": "yes",
    "contradicted": "no",
    "survives": "yes",
    "does not survive": "no",
    "yes": "yes",
    "no": "no",
}


def write_study_page(verdicts: Path) -> Path:
    """Write the page of one study beside its verdicts, and its figures into ``figures/`` there.

    Args:
        verdicts: The verdicts' file.

    Returns:
        The page.

    Raises:
        UserError: If the file is missing, damaged or of another version.
    """
    return write_studies_page([verdicts], verdicts.with_name(PAGE))


def write_studies_page(
    files: Sequence[Path], page: Path, *, advance: Callable[[int, int], object] = lambda done, total: None
) -> Path:
    """Write one page about several studies, or about several forms of one.

    Args:
        files: Their verdicts' files, at least one.
        page: Where the page goes. Each study's figures go into ``figures/`` beside its own verdicts.
        advance: Called with the studies done and all of them, for a progress bar.

    Returns:
        The page.

    Raises:
        UserError: If a file is missing, damaged or of another version.
    """
    studies = [read_verdicts(path) for path in files]  # a damaged one is said before anything is drawn
    shown = []
    for done, study in enumerate(studies):
        advance(done, len(studies))
        with rc_context({"svg.hashsalt": "flatpatch", "svg.fonttype": "path"}):
            made, missing = pictures(study)
            _save(made, study.folder / FIGURES)
            shown.append(_context(study, made, missing))
    advance(len(studies), len(studies))
    write_atomically(page, _render(shown))
    return page


def _save(made: Sequence[Picture], folder: Path) -> None:
    """Write the figures anew; those of an earlier page would tell of runs that are no longer there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in made:
        save(picture.figure, folder / picture.name, dpi=_DPI)


def _render(shown: Sequence[Mapping[str, Any]]) -> str:
    context = {
        "title": shown[0]["title"] if len({one["title"] for one in shown}) == 1 else f"{len(shown)} studies",
        "studies": shown,
        "colours": COLOURS,
        "heat": heat(),
        "tones": _TONES,
        "as_recorded": AS_RECORDED,
    }
    return page_environment().get_template("study.html.jinja").render(context)


def _context(study: Study, made: Sequence[Picture], missing: Sequence[str]) -> dict[str, Any]:
    """Return what the template shows of one study."""
    verdicts = study.verdicts
    hypotheses = verdicts["hypotheses"]
    pairs = {own["hypothesis"]: own for own in hypotheses if own["arm"] != AS_RECORDED}
    return {
        **{key: verdicts[key] for key in ("title", "question", "form", "where", "conclusions", "hypotheses")},
        "key": study.key,
        "name": verdicts["study"],
        "warnings": list(dict.fromkeys(text for run in study.runs if (text := warning(run.record)))),
        "facts": _facts(study),
        "rows": [row for own in hypotheses for row in _rows(own, own["hypothesis"] in pairs)],
        "both": {own["arm"] for own in hypotheses} >= {CORRECT, AS_RECORDED},
        "writing": any(own.get("writing") for own in hypotheses),
        "pictures": [
            {"caption": picture.caption, "file": f"{FIGURES}/{picture.name}", "source": embedded(picture.figure)}
            for picture in made
        ],
        "missing": [*missing, *study.unreadable],
        "left_out": verdicts.get("left_out", ()),
        "runs": verdicts["runs"],
    }


def _facts(study: Study) -> list[tuple[str, str]]:
    """Return the study's setting in a few lines."""
    verdicts = study.verdicts
    runs = verdicts["runs"]
    finished = sum(run["status"] == "finished" for run in runs)
    settings: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run["settings"].items():
            settings.setdefault(key, {})[str(value)] = None
    facts = [
        ("form", f"{verdicts['form']}{f', {where}' if (where := verdicts['where']) else ''}"),
        ("part of the record", verdicts.get("record") or "none"),
        ("runs", f"{finished} finished of {len(runs)}; seeds {', '.join(map(str, verdicts['seeds']))}"),
        (
            "they differ in",
            "; ".join(f"{key} {', '.join(values)}" for key, values in settings.items()) or "seeds alone",
        ),
        ("measured", _measured(verdicts["measure"])),
    ]
    facts += [("our own choices", "; ".join(ours))] if (ours := verdicts.get("ours")) else []
    facts += [("training and measuring", _hours(seconds))] if (seconds := verdicts.get("seconds")) else []
    return facts


def _measured(settings: Mapping[str, str]) -> str:
    if not settings.get("measure"):
        return "accuracy alone"
    idle = {"measure_at_loss"} if settings.get("measure_at_loss") == "0.0" else set()  # no loss to wait for
    idle |= without_effect("off", settings["measure"])
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key not in idle)


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min in all runs" if minutes >= 60 else f"{minutes} min in all runs"


def _rows(found: Mapping[str, Any], has_correct: bool) -> list[dict[str, Any]]:
    """Return a hypothesis's lines of the table of verdicts, by one way of measuring: itself, then its controls."""
    recorded = found["arm"] == AS_RECORDED
    same = {"unit": found["unit"], "direction": found["direction"], "smallest": found["smallest"], "recorded": recorded}
    # The same hypothesis by the record's own way stands below it.
    statement = f"{AS_RECORDED}" if recorded and has_correct else found["statement"]
    main = {**same, "id": found["hypothesis"], "statement": statement, "tested": found["tested"], "control": False}
    return [
        {
            **main,
            "statement": statement,
            "full": found["statement"],
            "quantity": found.get("quantity", ""),
            "writing": "" if recorded and has_correct else found.get("writing", ""),
        },
        *(
            {
                **main,
                "statement": f"against {name}",
                "full": "",
                "quantity": "",
                "writing": "",
                "tested": tested,
                "control": True,
            }
            for name, tested in found["controls"].items()
        ),
    ]

"""One self-contained HTML page about two or three models measured together; see ``page`` for that of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from flatpatch.report import page_figures
from flatpatch.report.flatness_figures import picture_words
from flatpatch.report.page import embedded, heat, page_environment
from flatpatch.report.records import setting
from flatpatch.report.titles import describe, warning
from flatpatch.report.writing import writing_sentence

# What is drawn between the models; every other figure sets their own values side by side.
_BETWEEN = ("connectivity", "plane", "surface")


def make_joint_page(
    found: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Mapping[str, Any]]],
    figures: Mapping[str, Figure],
) -> str:
    """Return the page as HTML.

    Args:
        found: What lies between the models, as ``comparison.json`` holds it.
        records: The runs' records, by the name of each.
        results: For each run by scope its ``loss`` and ``values``.
        figures: By their files' names without suffix.
    """
    values = {}
    for scope in dict.fromkeys(scope for own in results for scope in own):
        columns = [{"loss": own[scope]["loss"], **own[scope]["values"]} if scope in own else {} for own in results]
        names = dict.fromkeys(name for column in columns for name in column)
        values[scope] = [(name, [column.get(name) for column in columns]) for name in names]
    pictures = [
        {
            "between": name.split("-")[0] in _BETWEEN,
            "caption": picture_words(name),
            "file": f"{name}.png",
            "source": embedded(figure),
        }
        for name, figure in figures.items()
    ]
    context = {
        "title": f"{' and '.join(records)} after task {found['task']}",
        "found": found,
        "warnings": list(dict.fromkeys(text for record in records.values() if (text := warning(record)))),
        "runs": [(name, describe(record)) for name, record in records.items()],
        "barriers": all("barrier" in row for row in found["scopes"].values()),
        "values": values,
        "writing": {
            scope: writing_sentence(scope, [own[scope]["values"] for own in results if scope in own])
            for scope in values
        }
        if all(setting(record, "tuning", "lora") == "lora" for record in records.values())
        else {},
        "pictures": pictures,
        "colours": page_figures.COLOURS,
        "heat": heat(),
    }
    return page_environment().get_template("joint.html.jinja").render(context)

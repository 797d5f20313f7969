"""Several runs on one screen: a line each. What else there is stands on their page and in their folders."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from flatpatch.metrics import IN_A_LINE, METRICS
from flatpatch.report.groups import spread
from flatpatch.report.titles import short_warning
from flatpatch.settings import HOW_MEASURED, explicit_settings

_COLUMNS = tuple((METRICS[name].words.title, name) for name in IN_A_LINE)
_NAME_WIDTH, _SPREAD_WIDTH = 60, 18  # of the means over seeds


def overview(records: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return one line per run, under the labels that say how far the numbers carry.

    Args:
        records: Names and records of the runs.

    Returns:
        Plain text. Percent with two decimals, ``-`` where there is no number; behind a run that is not finished its
        state and how many of its tasks have results.
    """
    lines = list(dict.fromkeys(text for _, record in records if (text := short_warning(record))))
    width = max(len("run"), *(len(name) for name, _ in records))
    lines.append(f"{'run':<{width}}" + "".join(f"  {title:>{len(title)}}" for title, _ in _COLUMNS))
    for name, record in records:
        cells = "".join(f"  {_number(record['metrics'].get(key)):>{len(title)}}" for title, key in _COLUMNS)
        lines.append(f"{name:<{width}}{cells}{_state(record)}")
    return "\n".join(lines)


def seeds_table(records: Sequence[dict[str, Any]]) -> str:
    """Return mean, standard deviation (n - 1) and n over runs that differ by their seed, or by what was measured.

    Measuring changes no training. A seed that was run twice counts once, as on the page.
    """
    groups: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for record in records:
        settings = {key: entry["value"] for key, entry in record["settings"].items()}
        shown = [
            record["method"],
            f"order {settings['order']}" if "order" in settings else record["benchmark"],
            record["profile"],
            record["engine"],
            settings["sam"],
        ]
        shown += [f"rho={settings['rho']:g}"] if settings["sam"] != "off" else []
        shown += [
            f"{key}={value}"
            for key, value in explicit_settings(record).items()
            if key not in ("method", "order", "benchmark", "profile", "engine", "sam", "rho", "seed", "run", "output")
            and key not in ("measure", *HOW_MEASURED)
        ]
        groups.setdefault(" ".join(shown), {}).setdefault(tuple(record["seeds"]), record)
    titles = "".join(f" {title:>{_SPREAD_WIDTH}}" for title, _ in _COLUMNS)
    lines = [f"{'mean and standard deviation over seeds':<{_NAME_WIDTH}}{titles}   n"]
    for name, own in groups.items():
        cells = "".join(
            f" {_spread([member['metrics'].get(key) for member in own.values()]):>{_SPREAD_WIDTH}}"
            for _, key in _COLUMNS
        )
        first, *more = textwrap.wrap(name, _NAME_WIDTH, subsequent_indent="  ")
        lines += [f"{first:<{_NAME_WIDTH}}{cells} {len(own):>3}", *more]
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    found = spread(values)
    if found is None:
        return "-"
    return _number(found.mean) + ("" if found.standard_deviation is None else f" ± {found.standard_deviation:.2f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _state(record: Mapping[str, Any]) -> str:
    if record["status"] == "finished":
        return ""
    done = sum(any(x is not None for x in row) for row in record["accuracy_matrix"])
    return f"  {record['status'].upper()}: results of {done} of {len(record['tasks'])} tasks"

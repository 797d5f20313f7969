"""One self-contained HTML page about one or many runs: no script, no network, no other file.

Everything on it comes from the runs' folders (``groups.read_run``) and from comparisons made elsewhere; whatever text a
record holds is escaped. Figures are embedded as images: SVG, or PNG where that is smaller.
"""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from flatpatch.errors import in_one_line
from flatpatch.families import family_of, of_record
from flatpatch.metrics import IN_A_LINE, MARGIN, METRICS
from flatpatch.report import page_figures as drawing
from flatpatch.report.drawing import HEAT, printed
from flatpatch.report.effects import effects_of_sam, sentences
from flatpatch.report.flatness_figures import picture_words
from flatpatch.report.groups import (
    Group,
    Run,
    Spread,
    flatten,
    forgetting_per_task,
    gaps,
    matrix_spread,
    mean_accuracies,
    other_conditions,
    spread,
    where,
)
from flatpatch.report.layers import layer_tables
from flatpatch.report.ledger import SUMS, ledger_rows
from flatpatch.report.live import live_sentence
from flatpatch.report.predicting import make_predictors_figure, predictors
from flatpatch.report.records import fork_command, setting, settings_of
from flatpatch.report.titles import radius_note, warning
from flatpatch.report.writing import writing_sentence
from flatpatch.settings import MINIATURES, OF_PLACES, idle_settings, sam_title, shown
from flatpatch.upstreams import UPSTREAMS

LARGEST_SVG = 150_000  # bytes
# Of an embedded picture, in pixels, and of all of them on a page, in bytes.
LARGEST_SIDE = 1400
LARGEST_TOTAL = 12 * 2**20
_TASKS_NAMED = 8
_PNG_DPI = 200
_LONG_WORD = re.compile(r"(\S{24})(?=\S)")  # of a hash or a path
_MISSING = "–"
# Variables of the caller, which a rerun must set again; flatpatch sets the others itself.
_CALLERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
_NOT_REPEATED = frozenset({"seed", "profile", "engine", *OF_PLACES})


def make_page(
    groups: Sequence[Group],
    *,
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
    unreadable: Sequence[str] = (),
    advance: Callable[[], object] = lambda: None,
) -> str:
    """Return the page as HTML.

    Args:
        groups: The runs, as ``groups.group_runs`` put them together; at least one.
        comparisons: By a group's letter: how it stands to published numbers, as ``baseline``, ``verdict``, ``why`` and
            ``metrics``; or ``refused``, the reason why it must not be compared.
        unreadable: One sentence for each run that was asked for and could not be read.
        advance: Called once for each of ``work(groups)`` pieces of drawing, for a progress bar.

    Returns:
        A whole HTML document, UTF-8 text. The same runs give the same text.
    """
    # Names of tasks are text: a dollar sign in one does not begin a formula.
    with rc_context({"text.parse_math": False, "svg.hashsalt": "flatpatch", "svg.fonttype": "path"}):
        figures = _figures(groups, advance)
    runs = [run for group in groups for run in group.runs]
    context = {
        "title": _title(groups),
        "groups": groups,
        "runs": runs,
        "common": _common(groups),
        "bands": {group.letter: _bands(members) for members in _by_tasks(groups) for group in members},
        "warnings": _warnings(groups),
        "gaps": gaps(groups),
        "unreadable": unreadable,
        "conditions": other_conditions(groups),
        "headline": _metric_rows(groups, _headline(groups)),
        "metrics": _metric_rows(groups, _metric_names(groups)),
        "effects": [(f"{one.here.title} minus {one.there.title}", sentences(one)) for one in effects_of_sam(groups)],
        "margin": f"{MARGIN:g}",
        "in_a_line": [(METRICS[name].words.title, name) for name in IN_A_LINE],
        "lost": METRICS["forgetting"].words.title,
        "matrices": {group.letter: _matrix(group) for group in groups},
        "finals": {group.letter: _finals(group) for group in groups},
        "radius_notes": dict.fromkeys(note for group in groups if (note := radius_note(group.record))),
        "ascent": [(group, _ascent(group)) for group in groups],
        "flatness": _flatness(groups),
        "layers": layer_tables(groups),
        "ledger": ledger_rows(groups),
        "ledger_columns": SUMS.values(),
        "pictures": _pictures(groups),
        "live": [(group, text) for group in groups if (text := live_sentence([run.folder for run in group.counted]))],
        "predictors": predictors(groups),
        "comparisons": comparisons or {},
        "settings": _by_group(groups, _settings),
        "deviations": _deviations(groups),
        "environment": _by_group(groups, lambda run: flatten(run.record["environment"])),
        "pins": _by_group(groups, _pins),
        "reruns": [(group, _rerun(group)) for group in groups],
        "figures": figures,
        "heat": heat(),
        "colours": drawing.COLOURS,
        "few_tasks": drawing.FEW_TASKS,
        "missing": _MISSING,
    }
    return page_environment().get_template("page.html.jinja").render(context)


def page_environment() -> Environment:
    """Return where the pages' templates are rendered: everything is escaped, and nothing may be missing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "signed": _signed,
        "number": _number,
        "effect": _effect,
        "seconds": _seconds,
        "pieces": pieces,
    }
    return environment


def pieces(text: object) -> list[str]:
    """Return text cut where a line may break: behind a sign, never within a word or number, unless it is very long.

    >>> pieces("model_name, rho=0.05")
    ['model_', 'name, rho=', '0.05']
    """
    parts = re.split(r"(?<=[_/=])|(?<=[.,:-])(?=[^\W\d])", str(text))
    return [cut for part in parts for cut in _LONG_WORD.split(part) if cut]


def work(groups: Sequence[Group]) -> int:
    """Return how many pieces of drawing ``make_page`` has to do."""
    return sum(1 for _ in _drawings(groups))


def _title(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(group.record["method"] for group in groups)
    methods = [UPSTREAMS[name].title if name in UPSTREAMS else name for name in names]
    benchmarks = list(dict.fromkeys(group.record["benchmark"] for group in groups))
    return f"{', '.join(methods)} on {'; '.join(benchmarks)}"


def _bands(groups: Sequence[Group]) -> str:
    """Return what a caption says of bands: nothing where every group has a single seed."""
    return "; bands: one standard deviation over seeds" if any(len(group.counted) > 1 for group in groups) else ""


def _common(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return what was run, in a few lines."""
    records = [run.record for group in groups for run in group.runs]

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    tasks = list(dict.fromkeys(_chain(record["tasks"]) for record in records))
    return [
        ("method", all_of(record["method"] for record in records)),
        ("benchmark", "; ".join(dict.fromkeys(record["benchmark"] for record in records))),
        ("tasks", "; ".join(tasks)),
        ("SAM", all_of(sam_title(settings_of(record), told=("scope",)) for record in records)),
        ("seeds", all_of(seed for record in records for seed in record["seeds"]) or "none"),
        ("profile", "; ".join(dict.fromkeys(_reasoned(record, "profile") for record in records))),
        ("engine", "; ".join(dict.fromkeys(_reasoned(record, "engine") for record in records))),
    ]


def _chain(tasks: Sequence[str]) -> str:
    if len(tasks) <= _TASKS_NAMED:
        return " › ".join(tasks)
    return f"{len(tasks)}: {' › '.join(tasks[: _TASKS_NAMED - 2])} › … › {tasks[-1]} (all in the matrix below)"


def _reasoned(record: Mapping[str, Any], key: str) -> str:
    reason = in_one_line(record.get(f"{key}_reason") or "")
    return f"{record[key]} ({reason})" if reason else str(record[key])


def _warnings(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return each label to show loudly, with the letters of the groups it holds for."""
    letters: dict[str, list[str]] = {}
    for group in groups:
        if text := warning(group.record):
            letters.setdefault(text, []).append(group.letter)
    return [(text, "" if len(own) == len(groups) else ", ".join(own)) for text, own in letters.items()]


def _metric_names(groups: Sequence[Group]) -> list[str]:
    values = [run.record["metrics"] for group in groups for run in group.counted]
    present = [name for name in dict.fromkeys(name for row in values for name in row)]
    known = [name for name in METRICS if name in present]
    return known + [name for name in present if name not in METRICS]


def _learn_classes(groups: Sequence[Group]) -> bool:
    return all(of_record(run.record).learns_classes for group in groups for run in group.runs)


def _headline(groups: Sequence[Group]) -> list[str]:
    classes = _learn_classes(groups)
    return [name for name, metric in METRICS.items() if metric.say(classes).headline]


def _metric_rows(groups: Sequence[Group], names: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    classes, headline = _learn_classes(groups), _headline(groups)
    families = {family_of(run.record) for group in groups for run in group.runs}
    for name in names:
        cells = [spread(run.record["metrics"].get(name) for run in group.counted) for group in groups]
        if not any(cells) and name not in headline:
            continue
        row: dict[str, Any] = {"title": name.replace("_", " "), "better": "", "meaning": "", "cells": cells}
        if metric := METRICS.get(name):
            words = metric.say(classes)
            meaning = "; ".join([words.meaning, *_upstreams_words(name, families)])
            row |= {"title": f"{words.title} ({metric.unit})", "better": metric.better, "meaning": meaning}
        rows.append(row)
    return rows


def _upstreams_words(metric: str, families: Collection[str]) -> list[str]:
    """Return what the methods of some families call a metric, those with one word for it together."""
    titles: dict[str, list[str]] = {}
    for upstream in UPSTREAMS.values():
        if upstream.family in families and (word := upstream.metric_words.get(metric)):
            titles.setdefault(word, []).append(upstream.title)
    return [f"{' and '.join(own)}: {word}" for word, own in titles.items()]


def _matrix(group: Group) -> dict[str, Any]:
    """Return the heat table's cells, the mean over the tasks seen behind each row, and what was lost below."""
    means = [mean_accuracies(run) for run in group.counted]
    losses = [forgetting_per_task(run) for run in group.counted]
    size = len(group.tasks)
    return {
        "rows": [
            [(cell, "" if cell is None else f"h{min(20, int(cell.mean / 5))}") for cell in row]
            for row in matrix_spread(group)
        ],
        "means": [spread(row[i] for row in means) for i in range(size)],
        "lost": [*(spread(row[j] for row in losses) for j in range(size - 1)), None],
    }


def _finals(group: Group) -> list[tuple[Run, Sequence[float | None]]]:
    """Return each run's accuracies after the last task it finished."""
    rows = []
    for run in group.runs:
        done = [row for row in run.record["accuracy_matrix"] if any(x is not None for x in row)]
        rows.append((run, done[-1] if done else [None] * len(group.tasks)))
    return rows


def _ascent(group: Group) -> dict[str, Spread | None]:
    summaries = [drawing.step_summary(run) for run in group.counted]
    return {key: spread(summary[key] for summary in summaries) for key in summaries[0]}


def _flatness(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one table per list of tasks and scope: a row per scalar, time and group, a column per task."""
    tables = []
    for members in _by_tasks(groups):
        entries = [entry for group in members for run in group.counted for entry in run.record["flatness"]]
        for scope in dict.fromkeys(entry["scope"] for entry in entries):
            names = _scalars(members, scope)
            rows = []
            for name in names:
                for when in dict.fromkeys(entry["when"] for entry in entries):
                    for group in members:
                        measured = [drawing.measured(run, scope, when, name) for run in group.counted]
                        cells = [
                            spread(None if math.isnan(row[j]) else row[j] for row in measured)
                            for j in range(len(group.tasks))
                        ]
                        if any(cells):
                            rows.append({"name": name, "when": when, "group": group, "cells": cells})
            facts = [entry for entry in entries if entry["scope"] == scope]
            tables.append(
                {
                    "scope": scope,
                    "bands": _bands(members),
                    "tasks": members[0].tasks,
                    "letters": "" if len(members) == len(groups) else ", ".join(group.letter for group in members),
                    "rows": rows,
                    "samples": sorted({entry["samples"] for entry in facts}),
                    "figure": f"flatness-{scope}-{members[0].letter}",
                    "writing": writing_sentence(scope, [entry["values"] for entry in facts])
                    if _has_lora(members)
                    else "",
                    "undefined": sum(value is None for entry in facts for value in entry["values"].values()),
                }
            )
    return tables


def _has_lora(groups: Sequence[Group]) -> bool:
    return any(setting(run.record, "tuning", "lora") == "lora" for group in groups for run in group.counted)


def _scalars(groups: Sequence[Group], scope: str) -> list[str]:
    entries = [entry for group in groups for run in group.counted for entry in run.record["flatness"]]
    own = [entry for entry in entries if entry["scope"] == scope]
    return list(dict.fromkeys(name for entry in own for name in ("loss", *entry["values"])))


def _by_tasks(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups, those with the same tasks together."""
    members: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        members.setdefault(group.tasks, []).append(group)
    return list(members.values())


def _drawings(groups: Sequence[Group]) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """Yield each figure's name, its description for those who cannot see it, and how to draw it."""
    letters = [group.letter for group in groups]
    for members in _by_tasks(groups):
        first = members[0].letter
        names = "; ".join(f"{group.letter}: {group.title}" for group in members)

        def draw(
            make: Callable[[Sequence[Group], Sequence[str]], Figure | None], members: Sequence[Group] = members
        ) -> Callable[[], Figure | None]:
            return lambda: make(members, letters)

        yield f"means-{first}", f"Mean accuracy over the tasks seen so far. {names}", draw(drawing.make_mean_figure)
        yield (
            f"losses-{first}",
            f"Training loss and perturbed loss over the optimizer steps. {names}",
            draw(drawing.make_losses_figure),
        )
        yield (
            f"ascent-{first}",
            f"Gradient norm, the perturbation before and after rounding, and their cosine. {names}",
            draw(drawing.make_ascent_figure),
        )
        for table in _flatness(members):
            scope, scalars = table["scope"], _scalars(members, table["scope"])
            yield (
                table["figure"],
                f"Flatness in scope {scope} over the tasks: {', '.join(scalars)}. {names}",
                lambda members=members, scope=scope, scalars=scalars: drawing.make_flatness_figure(  # type: ignore[misc]
                    members, letters, scope, scalars
                ),
            )
    if found := predictors(groups):
        yield (
            "predictors",
            f"Rank correlation with forgetting: {'; '.join(each.title for each in found)}",
            lambda: make_predictors_figure(found),
        )
    for group in groups:
        yield (
            f"tasks-{group.letter}",
            f"Accuracy on each task as training goes on. {group.letter}: {group.title}",
            lambda group=group: drawing.make_tasks_figure(group),  # type: ignore[misc]
        )


def _figures(groups: Sequence[Group], advance: Callable[[], object]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for name, description, make in _drawings(groups):
        figure = make()
        if figure is not None:
            figures[name] = {
                "source": embedded(figure),
                "alt": description,
                "panels": [axes.get_ylabel() for axes in figure.axes],
            }
        advance()
    return figures


def embedded(figure: Figure) -> str:
    """Return a figure as a data address: SVG, or PNG where the lines are so many that it is smaller."""
    vector = io.BytesIO()
    printed(figure, vector, "svg", metadata={"Date": None, "Creator": None})
    if len(vector.getvalue()) > LARGEST_SVG:
        pixels = io.BytesIO()
        printed(figure, pixels, "png", dpi=_PNG_DPI)
        small = _as_png(Image.open(pixels))
        if len(small) < len(vector.getvalue()):
            return _address("image/png", small)
    return _address("image/svg+xml", vector.getvalue())


def _as_png(image: Image.Image, side: int = 0) -> bytes:
    """Return a picture as PNG with at most 256 colours, no side longer than ``side``."""
    plain = image.convert("RGB")
    if side and max(plain.size) > side:
        plain.thumbnail((side, side))
    buffer = io.BytesIO()
    plain.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _pictures(groups: Sequence[Group]) -> dict[str, Any]:
    """Return what was drawn of the measured flatness: of one run per group, as long as there is room."""
    shown: list[dict[str, Any]] = []
    left_out: list[str] = []
    total = 0
    for group in groups:
        run = next((run for run in group.counted if run.images), None)
        for other in group.runs:
            if other is not run and other.images:
                left_out.append(f"{len(other.images)} of {other.name}: one run of each setting is shown")
        for path in run.images if run else ():
            name = str(path.relative_to(path.parents[0] if path.parent.name == "figures" else path.parents[1]))
            try:
                with Image.open(path) as image:
                    content = _as_png(image, LARGEST_SIDE)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
                left_out.append(f"{name} of {run.name if run else ''} cannot be read: {type(error).__name__}")
                continue
            if total + len(content) > LARGEST_TOTAL:
                left_out.append(f"{name} of {run.name if run else ''}: the page would grow too large")
                continue
            total += len(content)
            title = picture_words(path.stem, group.tasks)
            shown.append(
                {"group": group, "run": run, "title": title, "file": name, "source": _address("image/png", content)}
            )
    return {"shown": shown, "left_out": left_out}


def _by_group(groups: Sequence[Group], read: Callable[[Run], Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return one row per name: the value all runs share, or each group's own values."""
    tables = {group.letter: [read(run) for run in group.runs] for group in groups}
    names = dict.fromkeys(name for rows in tables.values() for row in rows for name in row)
    found = []
    for name in names:
        values = {
            letter: list(dict.fromkeys(row.get(name, _MISSING) for row in rows)) for letter, rows in tables.items()
        }
        same = {value for own in values.values() for value in own}
        row: dict[str, Any] = {"name": name, "same": next(iter(same)) if len(same) == 1 else None, "values": []}
        if len(same) > 1:
            row["values"] = [(letter, ", ".join(own)) for letter, own in values.items()]
        found.append(row)
    return found


def _settings(run: Run) -> dict[str, str]:
    """Return the settings that had an effect, with where each came from."""
    left_out = idle_settings(run.record) | {"run", "output"}
    if run.record["environment"].get("launcher") != "deepspeed":
        left_out |= {"port"}
    shown = {}
    for key, entry in run.record["settings"].items():
        value = "(empty)" if entry["value"] == "" else entry["value"]
        if key == "threads" and not entry["value"]:
            profile = run.record["profile"]
            chosen_by = f"by profile {profile}" if profile in MINIATURES else "left to the machine"
            value = f"{_threads(run.record)}, {chosen_by}"
        if key not in left_out:
            shown[key] = f"{value} ({entry['source']})"
    return shown


def _threads(record: Mapping[str, Any]) -> str:
    """Return how many threads the training had, as it told itself; else as was expected before it."""
    told = dict.fromkeys(str(row["threads"]) for row in record["training"] if row.get("threads"))
    return ", ".join(told) or str(record["environment"].get("threads") or "not recorded")


def _pins(run: Run) -> dict[str, str]:
    record = run.record
    pins: dict[str, str] = {}
    if record["upstream"]:
        names = {
            "repo": "repository",
            "url": "address",
            "pin": "pinned commit",
            "base_tree": "tree at the pin (git hash)",
            "patched_tree": "patched tree (git hash)",
            "absent_files": "files absent from the checkout",
        }
        upstream = {key: value for key, value in record["upstream"].items() if value not in (None, [], "")}
        pins |= flatten({names.get(key, key): value for key, value in upstream.items()}, "upstream")
    else:
        pins["upstream"] = "none of its code ran (engine reference)"
    pins |= {f"input {key} (SHA-256)": str(value or "no folder") for key, value in record.get("inputs", {}).items()}
    return pins


def _deviations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return each deviation once, with the groups it holds for; a reason that stands at the top is not told again."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for group in groups:
        for run in group.runs:
            for row in run.record["deviations"]:
                if row["why"] == run.record.get("engine_reason"):
                    row = {**row, "why": "see engine, at the top"}
                key = tuple(str(row.get(name)) for name in ("what", "upstream", "here", "why", "tasks"))
                entry = found.setdefault(key, {**row, "tasks": row.get("tasks", []), "holders": []})
                entry["holders"].append((group, run))
    count = sum(len(group.runs) for group in groups)
    return [
        {**entry, "where": "all" if len(entry["holders"]) == count else where(groups, entry["holders"])}
        for entry in found.values()
    ]


def _rerun(group: Group) -> dict[str, Any]:
    """Return the commands that make the group's runs again, and what they need."""
    record = group.record
    environment = record["environment"]
    words = [f"method={record['method']}", f"profile={record['profile']}", f"engine={record['engine']}"]
    words += [
        f"{key}={shown(entry['value'])}"
        for key, entry in record["settings"].items()
        if entry["source"] != "default" and key not in _NOT_REPEATED and key != "method" and entry["value"] != "auto"
    ]
    # What "auto" came to here might be something else on another machine.
    words += [
        f"{key}={environment[key]}"
        for key in ("device", "launcher")
        if environment.get(key) and record["settings"].get(key, {}).get("value") == "auto"
    ]
    seeds = list(dict.fromkeys(str(seed) for run in group.runs for seed in run.record["seeds"]))
    verb = "sweep" if len(seeds) > 1 else "run"
    words += [f"seed={','.join(seeds)}"] if seeds else []
    variables = environment.get("variables", {})
    of_run = "threads" in record["settings"] and (record["profile"] in MINIATURES or setting(record, "threads"))
    callers = [
        f"{name}={shlex.quote(str(variables[name]))} "
        for name in _CALLERS
        if name in variables and not (of_run and name.endswith("_NUM_THREADS"))  # the run sets those itself
    ]
    code = environment.get("flatpatch", {})
    commit = str(code.get("commit") or "")
    steps = [f"git checkout {shlex.quote(commit.removesuffix('-dirty'))}"] if commit else []
    if upstream := record["upstream"]:
        steps.append(f"git submodule update --init {shlex.quote('third_party/' + upstream['repo'])}")
    command = "".join(callers) + f"bash run_scripts/run.sh {verb} " + shlex.join([*words, "output=runs-again"])
    if "forked" in record:
        command = "".join(callers) + shlex.join(fork_command(record))
    return {
        "commands": [*steps, command],
        "edited": commit.endswith("-dirty"),
        "threads": _threads(record),
        "pin": upstream["pin"] if upstream else "",
        "patched_tree": upstream["patched_tree"] if upstream else "",
    }


def heat() -> list[str]:
    """Return the backgrounds of a heat table's cells, from 0 to 100 in steps of five."""
    return [_heat(level) for level in range(21)]


def _heat(level: int) -> str:
    """Return a cell's background, as in the run's own figure."""
    return to_hex(HEAT(level / 20))


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return _MISSING if value is None else f"{value:+.2f}"


def _number(value: float | None, digits: int = 4) -> str:
    return _MISSING if value is None else f"{value:.{digits}g}"


def _effect(value: float | None) -> str:
    return _MISSING if value is None else f"{value:+.3g}" if value else "0"


def _seconds(value: float | None) -> str:
    if value is None:
        return _MISSING
    whole = round(value)
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"

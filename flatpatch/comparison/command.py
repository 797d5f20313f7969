"""The verb ``compare``: its words, and the table it prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flatpatch import families, patches
from flatpatch.comparison.compare import COMPARED, REPRODUCED, compare_logged, compare_runs, signed
from flatpatch.comparison.sides import is_source, subject_of
from flatpatch.comparison.two_groups import compare_groups
from flatpatch.errors import UserError, named_path
from flatpatch.families.base import Family, LoggedRun
from flatpatch.metrics import IN_A_LINE, MARGIN
from flatpatch.report.baselines import find_baselines, list_baselines, load_baseline
from flatpatch.report.effects import effects_text
from flatpatch.report.records import RECORD_FILE, read_record, run_folder
from flatpatch.settings import named_runs, read_words, repeated
from flatpatch.terminal import say
from flatpatch.upstreams import UPSTREAMS

USAGE = """usage: python -m flatpatch compare run=FOLDER[,FOLDER...] [key=value ...] [--require reproduced]
       python -m flatpatch compare log=FILE [key=value ...] [--require reproduced]
       python -m flatpatch compare run=FOLDER[,FOLDER...] with=FOLDER[,FOLDER...] [metric=...] [margin=...]

Compares finished runs that differ by their seed alone, or the runs in a log of upstream's, with numbers that
upstream or a paper published. Gives the difference, its 95 % interval and the smallest difference that so few
seeds can show. Quick, reference and off-protocol runs are not compared.
With with= it asks instead whether the runs of run= are better than those of with=, quick ones too: the difference
paired by seed, its 95 % interval, and a verdict.

settings:
  baseline=NAME     default: the first that speaks of such runs, upstream's own runs before papers
  metric=NAME,...   default: those of {metrics}
                    that both sides have; with with=: {paired}
  margin={margin:<10g} how large a difference, in points, still counts as reproduced, or is too small to matter

verdicts:
  reproduced                  the whole interval lies within the margin, or the runs are the same
  within the paper's spread   the mean lies within one printed standard deviation of the paper's
  off by x                    the interval leaves out 0
  undecided                   none of these: too few seeds
  equivalent                  as reproduced, but of runs with SAM, which is another method
  not comparable because ...
  the same file               the log is the one that the baseline was read from
With --require reproduced the exit code is 1 for anything but "reproduced".

verdicts with with=, on the hypothesis that run= is better:
  supported, contradicted     the interval leaves out 0, on one side or the other
  too small to matter         the whole interval lies within the margin
  undecided                   none of these, with the number of seeds that would decide

baselines:
{baselines}

examples:
  python -m flatpatch compare run=runs/NAME-seed0,runs/NAME-seed1,runs/NAME-seed2
  python -m flatpatch compare run=runs/NAME baseline={baseline}
  python -m flatpatch compare run=NAME metric=forgetting margin=0.5 --require reproduced
  python -m flatpatch compare run=runs/SAM-seed0,runs/SAM-seed1 with=runs/OFF-seed0,runs/OFF-seed1 margin=0.5
  python -m flatpatch compare log=third_party/REPOSITORY/logs/FOLDERS/0.log
"""

SAME_FILE = "the same file"
_KEYS = ("run", "with", "log", "baseline", "metric", "margin")
_WIDTH = 110


def compare(words: Sequence[str]) -> int:
    """Run the verb and return the exit code: 1 if ``--require reproduced`` was not met."""
    if not words or "--help" in words or "-h" in words:
        known = list_baselines()
        names = textwrap.fill(", ".join(known), 100, initial_indent="  ", subsequent_indent="  ")
        texts = {"metrics": ", ".join(COMPARED), "paired": ", ".join(IN_A_LINE), "baselines": names}
        print(USAGE.format(margin=MARGIN, baseline=known[-1], **texts))
        return 0
    given, required = _parse(words)
    baseline = given.get("baseline")
    if baseline is not None:
        load_baseline(baseline)  # a wrong name is said before anything is read
    options: dict[str, Any] = {
        "metrics": _metrics(given["metric"]) if "metric" in given else None,
        "margin": _margin(given.get("margin", str(MARGIN))),
    }
    if "with" in given:
        print(_render_groups(given, options), end="")
        return 0
    also: list[str] = []
    if "log" in given:
        result = _compare_log(named_path("log", given["log"]), baseline, options)
    else:
        folders = [run_folder(name) for name in named_runs(given["run"])]
        records = [read_record(folder) for folder in folders]
        result = compare_runs(records, baseline, names=[folder.name for folder in folders], **options)
        also = find_baselines(subject_of(records[0]))
    print(render(result), end="")
    if baseline is None and (others := [name for name in also if name != (result["baseline"] or {}).get("name")]):
        say(f"\nalso known of such runs: {', '.join(others)} (baseline=NAME)")
    return 1 if required and result["verdict"] != REPRODUCED else 0


def render(result: Mapping[str, Any], *, width: int = _WIDTH) -> str:
    """Return a comparison as text.

    Args:
        result: What ``compare_runs`` returned.
        width: Characters per line at which prose is wrapped.

    Returns:
        Plain text, ending with a newline.
    """
    lines = _wrapped(f"runs      {', '.join(result['runs'])}", width)
    if baseline := result["baseline"]:
        lines += _wrapped(f"baseline  {baseline['name']}, {baseline['kind']}: {baseline['source']}", width)
        lines += _wrapped(f"checked   {baseline['verification']}", width)
    shown = [entry for entry in result["metrics"] if entry["difference"] is not None]
    if shown:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("metric (percent)", no_wrap=True)
        for title in ("here (n)", "there (n)", "difference", "95 % interval", "can show", "test"):
            table.add_column(title, justify="left" if title == "test" else "right", no_wrap=True)
        for entry in shown:
            interval, detectable = entry["interval"], entry["detectable"]
            table.add_row(
                entry["metric"],
                _side(entry["here"]),
                _side(entry["there"]),
                signed(entry["difference"]),
                "-" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}",
                "-" if detectable is None else f"{detectable:.2f}",
                entry["test"],
            )
        console = Console(file=StringIO(), width=200, color_system=None)
        with console.capture() as capture:
            console.print(table)
        lines += ["", *(line.rstrip() for line in capture.get().splitlines()), ""]
    for entry in result["metrics"]:
        lines += _wrapped(f"{entry['metric']}: {entry['verdict']} ({entry['why']})", width)
    for note in result["notes"]:
        lines += _wrapped(f"note      {note}", width)
    lines += ["", *_wrapped(f"verdict   {result['verdict']}", width)]
    return "\n".join(lines) + "\n"


def _render_groups(given: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """Compare the runs of ``run=`` with those of ``with=`` and return what is said of them."""
    folders = {word: [run_folder(name, word) for name in named_runs(given[word], word)] for word in ("run", "with")}
    paths = [str(folder.resolve()) for side in folders.values() for folder in side]
    if twice := repeated(paths):
        raise UserError(f"run= and with= name {twice} twice. Name each run once, on one side.")
    # Runs of two output folders may have one name.
    plain = len({Path(path).name for path in paths}) == len(paths)
    sides = [
        {folder.name if plain else str(folder): read_record(folder) for folder in side} for side in folders.values()
    ]
    found = compare_groups(*sides, **options)
    lines = [f"{word:<9} {', '.join(side)}" for word, side in zip(("runs", "with"), sides, strict=True)]
    lines += [f"differ in {', '.join(found.differ_in) or 'nothing'}"]
    shown = [part for line in lines for part in _wrapped(line, _WIDTH)]
    shown += ["", effects_text([found.contrast], margin=options["margin"])]
    for note in found.notes:
        shown += ["", *_wrapped(f"note      {note}", _WIDTH)]
    return "\n".join(shown) + "\n"


def _parse(words: Sequence[str]) -> tuple[dict[str, str], bool]:
    rest, required, problems = list(words), False, []
    for i, word in enumerate(words):
        if word.startswith("--require"):
            value = word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else "")
            used = [word] if "=" in word else [word, *words[i + 1 : i + 2]]
            if value != REPRODUCED:
                problems.append(f"--require takes the word {REPRODUCED} (got '{value}').")
            required, rest = True, [*words[:i], *words[i + len(used) :]]
            break
    given, mistakes = read_words("compare", rest, _KEYS)
    problems += mistakes
    if "with" in given:
        problems += [
            f"{word} has no meaning beside with=, which names what is compared with. Leave one out."
            for word in ("log=", "baseline=", "--require")
            if word.strip("=") in given or (word == "--require" and required)
        ]
        if "run" not in given:
            problems.append("with= needs run= beside it: compare run=FOLDER[,FOLDER...] with=FOLDER[,FOLDER...].")
    elif ("run" in given) == ("log" in given):
        problems.append("compare takes either run=FOLDER[,FOLDER...] or log=FILE. See compare --help.")
    if problems:
        raise UserError.collect(problems)
    return given, required


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if twice := repeated(names):
        raise UserError(f"metric={text} names {twice} twice. Name each once.")
    return names


def _margin(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"margin='{text}' is not a number (expected points of accuracy, e.g. margin=0.5).") from None


def _compare_log(path: Path, baseline: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    # A log in one of our run folders looks like upstream's own, also if the run was quick or took SAM steps.
    for folder in path.absolute().parents:
        if (folder / RECORD_FILE).is_file():
            raise UserError(f"{path} is the log of the run {folder}. Compare the run itself: run={folder}.")
    if not path.exists() and (place := _in_named_checkout(path)):
        raise UserError(f"there is no log {path}. The checkouts are elsewhere here: log={place}")
    runs = read_log(path)
    if not runs:
        raise UserError(f"{path} holds no run that can be read. Expected a log that upstream's own code left.")
    result = compare_logged(runs, baseline, **options)
    if result["metrics"] and is_source(path, result["baseline"]["name"]):
        why = f"{result['baseline']['name']} was read from this very file"
        verdict = f"{SAME_FILE}: {why}, so that equal numbers say nothing of a new run"
        result |= {"verdict": verdict, "why": why}
        for entry in result["metrics"]:
            entry |= {"verdict": SAME_FILE, "why": why}
    return result


def read_log(path: Path) -> list[LoggedRun]:
    """Read every run in a log that upstream's code left, in the file's order.

    Raises:
        UserError: If the file cannot be read, or a line of it is damaged.
    """
    return [
        run
        for family in families.NAMES
        for run in Family(family).read_log(path, [row for row in UPSTREAMS.values() if row.family == family])
    ]


def _in_named_checkout(path: Path) -> Path | None:
    """Return where a file of ``third_party/`` lies if another folder is named for the checkouts; None if nowhere."""
    _, found, inside = path.absolute().as_posix().partition("/third_party/")
    repo, _, rest = inside.partition("/")
    if not found or not rest:
        return None
    with patches.nothing_fetched():
        here, where = patches.is_available(repo)
    place = Path(where) / rest
    return place if here and place.exists() else None


def _side(side: Mapping[str, Any]) -> str:
    spread = "" if side["standard_deviation"] is None else f" ± {side['standard_deviation']:.2f}"
    return f"{side['mean']:.2f}{spread} ({side['n'] or '?'})"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * 10)

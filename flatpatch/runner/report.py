"""The verb ``report``: finished runs shown again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.errors import UserError, named_path
from flatpatch.files import unwritable
from flatpatch.progress import Progress
from flatpatch.report.copies import copied_records
from flatpatch.report.effects import effects_of_sam, effects_text
from flatpatch.report.groups import Run, group_runs
from flatpatch.report.overview import overview, seeds_table
from flatpatch.report.records import RECORD_FILE, lacking_steps, read_record, read_step_metrics, run_folder
from flatpatch.report.study_data import find_studies, read_verdicts, verdicts_text
from flatpatch.report.study_page import PAGE, write_studies_page
from flatpatch.report.table import summary_table
from flatpatch.runner.figures import leave_figures, tell_figures
from flatpatch.runner.pages import place_of, write_page
from flatpatch.settings import named_runs, read_words, repeated
from flatpatch.terminal import say

# What has a meaning beside study= alone.
_OF_STUDIES = ("output", "form")
USAGE = """usage: python -m flatpatch report run=FOLDER[,FOLDER...] [page=FILE]
       python -m flatpatch report study=NAME|all [output=FOLDER] [form=NAME] [page=FILE]

Prints one run's table again, or of several the means over seeds and a line each; redraws the figures of finished ones,
and writes one HTML page about all of them that needs no other file and no network. A folder of runs stands for all runs
in it. Runs that differ by their seed alone are put together as mean, standard deviation and n; missing, unfinished and
unreadable ones are named.

The page is FOLDER/report.html for one run, report.html in the folder that holds the first run for several.

With study= it makes the page of a study anew, or one page for all of them: their verdicts, as the verb study left
them below output=runs, and figures of their runs side by side, as PNG and PDF too. A study that has been run in several
forms has them on one page, each labelled, unless form= names one. The page is report.html beside the verdicts of one
form, in the study's folder for several, and in runs/studies for all.

examples:
  python -m flatpatch report run=runs/NAME
  python -m flatpatch report run=runs/NAME,runs/OTHER page=both.html
  python -m flatpatch report run=runs
  python -m flatpatch report study=exp4
  python -m flatpatch report study=all output=runs
"""


def show(words: Sequence[str]) -> int:
    """Show runs or studies again: what the terminal shows of them, their figures, and one HTML page about all."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE)
        return 0
    given, problems = read_words("report", words, ("run", "study", "output", "form", "page"))
    if ("run" in given) == ("study" in given):
        problems.append("report needs either run=FOLDER, e.g. report run=runs/NAME, or study=NAME.")
    if "study" not in given:
        problems += [f"{key}= has a meaning beside study= alone. Leave it out." for key in _OF_STUDIES if key in given]
    if problems:
        raise UserError.collect(problems)
    return _show_studies(given) if "study" in given else _show_runs(given)


def _show_studies(given: Mapping[str, str]) -> int:
    """Write the page about a study, or about all, and print its verdicts."""
    output = named_path("output", given.get("output", "runs"))
    files = find_studies(output, given["study"], given.get("form", ""))
    home = files[0].parents[2] if given["study"] == "all" else files[0].parents[len(files) > 1]
    page = _writable(named_path("page", given["page"]) if "page" in given else home / PAGE)
    with Progress("studies", "study") as shown:
        write_studies_page(files, page, advance=lambda done, total: shown.update("", done, total))
    print("\n\n".join(verdicts_text(read_verdicts(path)) for path in files))
    say(f"page     {page}")
    return 0


def _show_runs(given: Mapping[str, str]) -> int:
    """Print runs' tables again, redraw their figures and write one HTML page about all of them."""
    folders, unreadable = _find_runs(named_runs(given["run"]))
    page = _page_file(given.get("page", ""), folders)
    named = [(folder.name, read_record(folder)) for folder in folders]
    finished = [(name, record) for name, record in named if record["status"] == "finished"]
    if len(named) == 1:
        print(summary_table(named[0][1], folders[0]))
    else:
        names, records = [name for name, _ in finished], [record for _, record in finished]
        print(f"{seeds_table(records)}\n" if finished else "", end="")
        contrasts = effects_of_sam(group_runs([Run(Path(name), record) for name, record in finished]))
        print(f"\n{effects_text(contrasts)}\n\n" if contrasts else "", end="")
        print("\n".join([overview(named), *copied_records(names, records)]))
    for folder, (_, record) in zip(folders, named, strict=True):
        unreadable += _missing_steps(folder, record)
    for text in unreadable:
        print(f"left out {text}")
    say()
    for folder, (_, record) in zip(folders, named, strict=True):
        if record["status"] == "finished":
            tell_figures(leave_figures(folder, record))
    write_page(folders, page, unreadable)
    return 0


def _missing_steps(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Say which of a run's steps cannot be shown, for whatever reason."""
    said: list[str] = []
    steps = read_step_metrics(folder / "metrics.jsonl", said)
    if not said and (lack := lacking_steps(record, len(steps))):
        said.append(f"{lack} ({folder})")
    return said


def _find_runs(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the run folders that are meant, and a sentence for each damaged one in a folder of runs."""
    folders: list[Path] = []
    unreadable: list[str] = []
    for name in names:
        place = run_folder(name).absolute()
        inside = sorted(path.parent for path in place.glob(f"*/{RECORD_FILE}"))
        if (place / RECORD_FILE).exists() or not inside:
            read_record(place)  # a run that is named must be sound
            folders.append(place)
            continue
        for folder in inside:
            try:
                read_record(folder)
            except UserError as error:
                unreadable.append(str(error))
            else:
                folders.append(folder)
    if not folders:
        raise UserError.collect(unreadable)
    if twice := repeated([str(folder.resolve()) for folder in folders]):
        raise UserError(f"run={','.join(names)} names {twice} twice. Name each run once.")
    return folders, unreadable


def _page_file(name: str, folders: Sequence[Path]) -> Path:
    """Return where the page goes; checked before anything is drawn."""
    return _writable(named_path("page", name) if name else place_of(folders))


def _writable(page: Path) -> Path:
    """Refuse a page that could not be written, or would replace another file."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"page={page}: expected a name that ends in .html, so that no other file is replaced.")
    if page.is_dir() or not page.parent.is_dir():
        raise UserError(f"page={page}: expected a file in a folder that exists, e.g. page=report.html.")
    if problem := unwritable(page.parent):
        raise UserError(
            f"the page cannot be written into {page.parent.absolute()}: {problem}. Choose another place with page=FILE."
        )
    return page

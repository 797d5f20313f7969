"""The verb ``measure``: flatness of finished runs' models, and of what lies between two or three of them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flatpatch.errors import DiskFull, FlatpatchError, UserError, named_path
from flatpatch.families.base import Family, FinishedRun
from flatpatch.families.sample import Sample
from flatpatch.files import folder_problems, is_disk_full, unwritable, write_atomically
from flatpatch.flatness import (
    Problem,
    find_scope,
    linear_connectivity,
    model_point,
    plane_landscape,
    plane_through,
)
from flatpatch.flatness.guard import working_copy
from flatpatch.flatness.landscape import save_landscape
from flatpatch.flatness.points import Point, loss_at, moving, weights_of
from flatpatch.measurement import files, in_run
from flatpatch.measurement.suite import ScopeResult, measure_model
from flatpatch.measuring import EFFORTS, IN_MINIATURE, Request
from flatpatch.progress import Progress
from flatpatch.report.drawing import SUFFIXES, save
from flatpatch.report.flatness_figures import (
    make_connectivity_figure,
    make_contour_figure,
    make_density_figure,
    make_eigenvalues_figure,
    make_landscapes_figure,
    make_surface_figure,
    read_grid,
)
from flatpatch.report.flatness_run import draw_flatness, flatness_table
from flatpatch.report.joint_page import make_joint_page
from flatpatch.report.records import read_record, run_folder, setting
from flatpatch.report.titles import short_warning
from flatpatch.runner.execute import only_runner
from flatpatch.runner.figures import or_warn, tell_figures
from flatpatch.runner.measure_words import Asked
from flatpatch.runner.pages import PAGE, leave_page, place_of
from flatpatch.runner.record import write_record
from flatpatch.settings import MINIATURES, SCOPE_WITHOUT_LORA
from flatpatch.terminal import say
from flatpatch.upstreams import UPSTREAMS

SCHEMA = 1
COMPARISON = "comparison.json"
JOINT_SCOPES = ("adapter", "merged")
LINE_POINTS = 25
BYTES_NEEDED = 2**20


def measure(asked: Asked) -> int:
    """Measure as asked; returns 1 if a part of it failed."""
    runs = [find_run(name) for name in asked.runs]
    small = all(run.record["profile"] in MINIATURES for run in runs)
    if small and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more are no faster for small models, and much slower where they wait for cores
    asked = _as_in_runs(asked, runs, small=small)
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError(f"run={','.join(asked.runs)} names a run twice. Name different runs.")
    names = runs[0].record["tasks"] if asked.task == "all" else [name for name in asked.task.split(",") if name] or [""]
    indices = [[run.task_index(name) for name in names] for run in runs]
    for other in runs[1:]:
        runs[0].check_companion(other)
    _check_folders(runs)
    with runs[0].working():
        joint = _prepare_joint(asked, runs, [each[0] for each in indices]) if len(runs) > 1 else None
        for run, own in zip(runs, indices, strict=True):
            for index in own:
                _check_model(run, index, asked.request)
        found = [_measure_run(run, own, asked.request) for run, own in zip(runs, indices, strict=True)]
        failed = any(files.failures(content) for contents in found for content, _ in contents)
        if joint is not None:
            joint.measure([contents[0][0] for contents in found])
    for run in runs:
        if place_of([run.folder]).is_file():  # it would tell of the run as it was before
            leave_page([run.folder])
    return 1 if failed else 0


def find_run(name: str) -> FinishedRun:
    """Find a finished run.

    Args:
        name: Its folder, or its folder's name inside ``runs``.

    Raises:
        UserError: If there is no such run, it is not finished, or it is not one that can be rebuilt.
    """
    folder = run_folder(name).absolute()
    record = read_record(folder)
    if record["status"] != "finished":
        raise UserError(
            f"run={name} is not finished ({record['status']}): only a finished run can be measured afterwards. "
            "The command that started it continues it."
        )
    upstream = UPSTREAMS.get(record["method"])
    if upstream is None:
        raise UserError(f"run={name} is of method {record['method']}, which this version does not have.")
    return Family(upstream.family).reopen(upstream, folder, record)


def check_against_run(run: FinishedRun, index: int, samples: int, loss: float) -> None:
    """Compare a rebuilt model's loss with the one measured in the run right after the task, if it was.

    Raises:
        UserError: If they differ.
    """
    for entry in run.record["flatness"]:
        there = entry["loss"]
        same = (entry["task_index"], entry["when"], entry["samples"]) == (index, "after", samples)
        if same and there is not None and abs(loss - there) > 1e-3 * max(abs(loss), abs(there)):
            raise UserError(
                f"{run.name}: rebuilt after task {index + 1}, the model has loss {loss:.6g} on the sample; in the "
                f"run it had {there:.6g}. The checkpoint or the data is not the run's."
            )


def names_of(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a name for each run, told apart where folders' names are equal."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        return [f"{run.folder.parent.name}/{run.name}" for run in runs]
    return names


def _as_in_runs(asked: Asked, runs: Sequence[FinishedRun], *, small: bool) -> Asked:
    """Let what was left out be what it is inside such runs."""
    own: dict[str, Any] = {}
    if "measure_scope" not in asked.given and any(setting(run.record, "tuning", "lora") != "lora" for run in runs):
        own["scopes"] = (SCOPE_WITHOUT_LORA,)
    if small:
        left_out = [key for key in IN_MINIATURE if key not in asked.given]
        own |= {key.removeprefix("measure_"): IN_MINIATURE[key] for key in left_out}
    return replace(asked, request=replace(asked.request, **own))


def _check_folders(runs: Sequence[FinishedRun]) -> None:
    """Let a run folder that cannot be written stop the work before it begins.

    Raises:
        UserError: With every folder that cannot be written, or if another process holds one.
    """
    problems = [
        f"{run.name}: {place} cannot be written: {problem}. What is measured goes there."
        for run in runs
        for place in (run.folder, run.folder / files.FOLDER)
        if os.path.lexists(place) and (problem := unwritable(place))
    ]
    if problems:
        raise UserError.collect(problems)
    for run in runs:
        with only_runner(run.folder):
            pass


def _check_model(run: FinishedRun, index: int, request: Request) -> None:
    """Let a scope that chooses nothing, or a model that is not the run's, stop the work before anything is written."""
    sample = run.draw_sample(index, request)
    model, _ = working_copy(run.rebuild(index))
    for scope in request.scopes:
        check_against_run(run, index, sample.size, Problem(model, sample.batches, run.loss, scope=scope).loss())


def _measure_run(
    run: FinishedRun, indices: Sequence[int], request: Request
) -> list[tuple[dict[str, Any], dict[str, ScopeResult]]]:
    """Measure one run's models, and add each to its record as soon as it is done."""
    made = []
    for index in indices:
        name = run.record["tasks"][index]
        sample = run.draw_sample(index, request)
        copied, weights = working_copy(run.rebuild(index))
        began = time.perf_counter()
        title = f"{run.name} after task {index + 1} {name}"
        with Progress(title, "percent") as shown:
            results, terms = measure_model(
                copied,
                sample.batches,
                request,
                loss=run.loss,
                title=title,
                say=shown.tell,
                progress=_in_percent(shown),
            )
        for scope, result in results.items():
            if result.loss is None:
                raise FlatpatchError(f"{title}, {scope}: {result.errors.get('loss', 'not measured')}")
        content = in_run.describe(
            request,
            results,
            task=name,
            task_index=index,
            when="finished",
            sample=sample,
            terms=terms,
            weights=weights,
            loss_name=run.loss_name,
            error=None,
            seconds=time.perf_counter() - began,
        )
        made.append((content, results))
        _add_to_run(run, content, results)
    _show(run, made)
    return made


def _add_to_run(run: FinishedRun, content: dict[str, Any], results: dict[str, ScopeResult]) -> None:
    with _writing(run.folder), only_runner(run.folder):
        record = read_record(run.folder)
        name = files.stem(content["task_index"], content["task"], content["when"])
        entries = in_run.write(run.folder / files.FOLDER, name, content, results)
        places = {(entry["task_index"], entry["when"], entry["scope"]) for entry in entries}
        record["flatness"] = [
            *(e for e in record["flatness"] if (e["task_index"], e["when"], e["scope"]) not in places),
            *entries,
        ]
        if new := [text for text in files.shortage(content) if text not in record.get("notes", [])]:
            record["notes"] = [*record.get("notes", []), *new]
        write_record(run.folder, record)


def _show(run: FinishedRun, made: Sequence[tuple[dict[str, Any], dict[str, ScopeResult]]]) -> None:
    """Draw the figures and print the table of what the run's record now holds."""
    with _writing(run.folder), only_runner(run.folder):
        record = read_record(run.folder)
        figures = or_warn(run.folder, lambda: draw_flatness(record, run.folder))
    print("\n".join([f"\n{run.folder}", *flatness_table(record)]))
    for content, _ in made:
        for failure in files.failures(content):
            print(f"WARNING: not measured: {content['task']}: {failure}")
        for text in files.shortage(content):
            print(f"WARNING: {text}")
    tell_figures(figures)


class _Joint:
    """What two or three runs give together: lines or a plane between their models, and their spectra side by side."""

    def __init__(self, asked: Asked, runs: Sequence[FinishedRun], indices: Sequence[int], output: Path) -> None:
        self.asked = asked
        self.runs = runs
        self.indices = indices
        self.output = output
        self.names = names_of(runs)
        self.task = runs[0].record["tasks"][indices[0]]
        self.sample: Sample = runs[0].draw_sample(indices[0], asked.request)
        self.problems: dict[str, Problem] = {}
        self.points: dict[str, list[Tensor | Point]] = {}

    def find_points(self) -> None:
        """Read every model as a point of each space.

        Raises:
            UserError: If the models lie in no common space, or on no line or plane of their own, or one of them has
                another loss than its point.
        """
        batches = self.sample.batches
        own = [
            Problem(run.rebuild(index), batches, run.loss, scope=self.asked.request.scopes[0]).loss()
            for run, index in zip(self.runs, self.indices, strict=True)
        ]
        models = [run.rebuild(index, joined=True) for run, index in zip(self.runs, self.indices, strict=True)]
        for scope in [scope for scope in JOINT_SCOPES if scope in self.asked.request.scopes]:
            # All that was trained moves, a classifier too: else the line would not end at the second model.
            problems = [
                Problem(model, batches, self.runs[0].loss, scope=find_scope(model, scope, others=True))
                for model in models
            ]
            first = problems[0]
            points: list[Tensor | Point] = [first.flatten(first.variables, torch.float64)]
            points += [
                model_point(first, other, name=name) for other, name in zip(problems[1:], self.names[1:], strict=True)
            ]
            try:
                if len(points) == 3:
                    plane_through(*points)
                elif torch.equal(*map(weights_of, points)):
                    raise ValueError("the two models are the same point")
            except ValueError as error:
                raise UserError(f"{', '.join(self.names)}, scope {scope}: {error}. Name other runs.") from None
            self._check_losses(scope, first, points, own)
            self.problems[scope], self.points[scope] = first, points

    def _check_losses(
        self, scope: str, problem: Problem, points: Sequence[Tensor | Point], own: Sequence[float]
    ) -> None:
        """Equal shapes do not make two models of one kind: what is not in the weights may differ."""
        with moving(problem) as objective:
            for name, point, loss in zip(self.names, points, own, strict=True):
                there = loss_at(objective, point)
                # Apart by no more than rounding in float32; equal, or both not finite, is fine.
                if math.isclose(there, loss, rel_tol=1e-4, abs_tol=1e-5) or not (
                    math.isfinite(there) or math.isfinite(loss)
                ):
                    continue
                raise UserError(
                    f"{name}, scope {scope}: the model has loss {loss:.6g} on the sample, but {there:.6g} when its "
                    f"weights are put into the model of {self.names[0]}. The two are put together differently, so that "
                    "nothing lies between them. Name runs that differ only in how they were trained."
                )

    def measure(self, contents: Sequence[Mapping[str, Any]]) -> None:
        """Measure, draw, and put all of it into the output folder at once."""
        with _writing(self.output):
            self._measure(contents)

    def _measure(self, contents: Sequence[Mapping[str, Any]]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=self.output.parent, prefix=f".{self.output.name}."))
        try:
            found: dict[str, Any] = {
                "schema": SCHEMA,
                "runs": [{"name": n, "folder": str(r.folder)} for n, r in zip(self.names, self.runs, strict=True)],
                "task": self.task,
                "samples": self.sample.size,
                "indices": self.sample.indices,
                "request": self.asked.request.as_dict(),
                "scopes": {},
            }
            labels = dict.fromkeys(text for run in self.runs if (text := short_warning(run.record)))
            note = ". ".join([f"Models after task {self.task} of {' and '.join(self.names)}", *labels])
            figures: dict[str, Figure] = {}
            if len(self.runs) == 2:
                self._lines(made, found, figures, note)
            else:
                self._planes(made, found, figures, note)
            self._side_by_side(contents, figures, note)
            files.write_json(made / COMPARISON, found)
            for name, figure in figures.items():
                save(figure, made / name, dpi=150)
            records = {name: run.record for name, run in zip(self.names, self.runs, strict=True)}
            page = make_joint_page(found, records, [content["scopes"] for content in contents], figures)
            write_atomically(made / PAGE, page)
            made.chmod(0o755)
            if self.output.exists():
                shutil.rmtree(self.output)
            made.rename(self.output)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        print(f"\n{self.output}")
        for scope, result in found["scopes"].items():
            if "barrier" in result:
                print(
                    f"{scope:<9} {result['space']}: barrier {_number(result['barrier'])} at "
                    f"{result['barrier_alpha']:.2f}"
                )
        tell_figures([self.output / f"{name}{suffix}" for name in figures for suffix in SUFFIXES])
        say(f"page     {self.output / PAGE}")

    def _lines(self, folder: Path, found: dict[str, Any], figures: dict[str, Figure], note: str) -> None:
        grids = {}
        for scope, problem in self.problems.items():
            path = folder / f"connectivity-{scope}.npz"
            first, second = self.points[scope]
            with _bar(f"line, {scope}") as progress:
                line = linear_connectivity(
                    problem,
                    first,
                    second,
                    points=LINE_POINTS,
                    names=(self.names[0], self.names[1]),
                    progress=progress,
                )
            save_landscape(line.landscape, path)
            found["scopes"][scope] = {**line.as_dict(), "arrays": path.name}
            grids[scope] = read_grid(path)
        figures["connectivity"] = make_connectivity_figure(grids, note=note)

    def _planes(self, folder: Path, found: dict[str, Any], figures: dict[str, Figure], note: str) -> None:
        points = EFFORTS[self.asked.request.effort].grid_points
        for scope, problem in self.problems.items():
            path = folder / f"plane-{scope}.npz"
            with _bar(f"plane, {scope}") as progress:
                plane = plane_landscape(
                    problem, dict(zip(self.names, self.points[scope], strict=True)), points=points, progress=progress
                )
            save_landscape(plane, path)
            losses = dict(zip(self.names, plane.mark_losses.tolist(), strict=True))
            found["scopes"][scope] = {"coordinates": plane.marks.tolist(), "losses": losses, "arrays": path.name}
            grid = read_grid(path)
            figures[f"plane-{scope}"] = make_contour_figure(grid, title="Plane through three models", note=note)
            figures[f"surface-{scope}"] = make_surface_figure(grid, title="Plane through three models", note=note)

    def _side_by_side(self, contents: Sequence[Mapping[str, Any]], figures: dict[str, Figure], note: str) -> None:
        for scope in self.asked.request.scopes:
            results = {
                name: content["scopes"][scope]["results"] for name, content in zip(self.names, contents, strict=True)
            }
            for kind, make in (("eigenvalues", make_eigenvalues_figure), ("density", make_density_figure)):
                if all(kind in result for result in results.values()):
                    spectra = {name: result[kind] for name, result in results.items()}
                    figures[f"{kind}-{scope}"] = make(spectra, scope=scope, note=note)
            if all("landscape" in result for result in results.values()):
                grids = {
                    name: read_grid(run.folder / content["scopes"][scope]["arrays"])
                    for name, run, content in zip(self.names, self.runs, contents, strict=True)
                }
                figures[f"landscapes-{scope}"] = make_landscapes_figure(grids, title="Loss landscapes", note=note)


def _prepare_joint(asked: Asked, runs: Sequence[FinishedRun], indices: Sequence[int]) -> _Joint:
    """Find out whether the runs can be measured together, before anything is measured or written.

    Raises:
        UserError: If they cannot.
    """
    if not set(JOINT_SCOPES) & set(asked.request.scopes):
        raise UserError(
            f"measure_scope={','.join(asked.request.scopes)}: between runs lie the spaces "
            f"{' and '.join(JOINT_SCOPES)}. "
            "Add one of them, or measure one run at a time."
        )
    tasks = [run.record["tasks"][index] for run, index in zip(runs, indices, strict=True)]
    if len(set(tasks)) > 1:
        raise UserError(
            f"the runs end with different tasks ({', '.join(tasks)}). Name the one to compare after: task=."
        )
    for run, index in zip(runs[1:], indices[1:], strict=True):
        if run.learned(index) != runs[0].learned(indices[0]):
            raise UserError(
                f"{runs[0].name} and {run.name} learned their classes in different orders (another seed where classes "
                "are shuffled, or other tasks before), so that their models do not answer the same question. Name runs "
                "of one order."
            )
    output = (
        named_path("output", asked.output) if asked.output else Path("runs") / f"comparison-{'-'.join(names_of(runs))}"
    )
    if asked.output == "":
        output = output.with_name(output.name.replace("/", "_")[:200])
    output = output.absolute()
    there = os.path.exists(output)  # False, too, for a name that is too long
    if there and not (output / COMPARISON).is_file():
        raise UserError(f"output={output} is there and is no comparison of this verb's. Choose another folder.")
    # One that is there is replaced as a whole, so what matters is the folder around it.
    if problems := folder_problems(output.parent if there else output, BYTES_NEEDED, "output"):
        raise UserError.collect(problems)
    joint = _Joint(asked, runs, indices, output)
    joint.find_points()
    return joint


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say in one message that a file could not be written, as far as that could not be seen beforehand.

    Raises:
        DiskFull: If the disk is full.
        FlatpatchError: If a file cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"the disk is full: {error}. What the record names is whole. Make room and run the same command again."
            ) from error
        raise FlatpatchError(
            f"{folder} could not be written: {error}. What the record names is whole. Make room there and run the same "
            "command again."
        ) from error


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield what the progress over evaluated points is told with."""
    with Progress(title, "point") as shown:
        yield lambda done, total, text: shown.update("", done, total, text)


def _in_percent(shown: Progress) -> Callable[[str, float, float, str], None]:
    return lambda scope, done, total, text: shown.update(f"measuring {scope}", round(100 * done / total), 100, text)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

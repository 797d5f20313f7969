"""Carry out a plan: one subprocess per stage, which goes on at every stage's end and from checkpoints within one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from flatpatch import metrics, patches
from flatpatch.checkpoints import Checkpoint, newest_checkpoint
from flatpatch.errors import DiskFull, FlatpatchError, Interrupted, UserError
from flatpatch.families.base import Family, Plan, Stage
from flatpatch.files import digest, is_disk_full, locked, made_whole, read_json, write_atomically
from flatpatch.measurement import files as measurements
from flatpatch.measuring import AT_LOSS, LEDGER, LIVE, LOSSES_AVERAGED, WHENS
from flatpatch.progress import Progress, in_words
from flatpatch.report.table import summary_table
from flatpatch.runner.figures import leave_figures, tell_figures
from flatpatch.runner.record import (
    LOCK,
    begins_fork,
    check_continues,
    finish_record,
    keep_room,
    made_by,
    new_record,
    note_restart,
    write_last_record,
    write_record,
)
from flatpatch.runner.resolve import command_of, headline
from flatpatch.runner.supervise import Supervised
from flatpatch.runner.tracking import Tracking
from flatpatch.settings import effective_settings, options_of
from flatpatch.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LOG_LINES_SHOWN = 15
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
STOP = "stop"
STEPS = "metrics.jsonl"
SPENT = "seconds.txt"  # of all processes that worked at a stage, as far as this one saw them end
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 60.0  # seconds that a process has to come to its step's end and write a checkpoint
MEASURER = "flatpatch.measurement.in_run:Measurer"
NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "the disk is full")
BYTES_OF_LAST_WORDS = 5000
_NOTHING_KEPT = "One process learns all tasks of this run, and it has kept no checkpoint:"
_NONE_KEPT = "No task was finished before: the run starts anew with its first task."


def execute(plan: Plan, *, show: bool = True) -> dict[str, Any]:
    """Run every stage of a plan that is not finished yet, then write the record, the table and the figures.

    Args:
        plan: The plan.
        show: Whether table and figures are wanted; the verb ``report`` makes them at any later time.

    Returns:
        The finished record.

    Raises:
        UserError: If the run folder holds another run.
        FlatpatchError: If a stage fails.
        Interrupted: If a signal asks to stop; says what the same command will do then.
        DiskFull: If the disk fills up.
    """
    old = check_continues(plan.folder, plan)
    if old is not None and old["status"] == "finished":
        say(f"{plan.folder} is finished; nothing to do. Another seed= or run= makes another run.\n")
        if show:
            _show(plan.folder, old)
        return old
    say("\n".join([headline(plan), *(f"  note: {note}" for note in plan.notes)]))
    plan.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as at_the_end:
        with only_runner(plan.folder), _Stop() as stop:
            record = new_record(plan)
            kept = _kept(plan)
            begun = _begun(plan, kept) if old is not None else None
            if old is not None and not begins_fork(record, old):
                done, step = _gone_on(begun)
                done += sum(len(stage.tasks) for stage in plan.stages[:kept])
                for note in note_restart(record, old, done, step):
                    print(f"WARNING: {note}", flush=True)
                if not kept and not begun:
                    say(_NONE_KEPT if plan.resumes else f"{_NOTHING_KEPT} the run starts anew.")
            write_record(plan.folder, record)
            tracking = at_the_end.enter_context(Tracking(plan.folder, record, plan.request.settings.track))
            problem: BaseException | None = None
            try:
                keep_room(plan.folder)
                _run_stages(plan, record, kept, begun, stop, tracking)
            except BaseException as error:
                problem = _with_full_disk_named(plan, error)
            _conclude(plan, record, problem)
        if show:
            say()
            tracking.figures = _show(plan.folder, record)
    return record


def _with_full_disk_named(plan: Plan, error: BaseException) -> BaseException:
    if isinstance(error, DiskFull) or not is_disk_full(error):
        return error
    named = DiskFull(f"the disk is full: {error}. {_room_left(plan.folder)} {_way_on(plan)}")
    named.__cause__ = error
    return named


def _room_left(folder: Path) -> str:
    """Say how much room there is where a run writes: its folder, and the one for temporary files."""
    places = dict.fromkeys((folder, Path(tempfile.gettempdir())))
    free = ", ".join(f"{place} {shutil.disk_usage(place).free / 2**20:.1f} MiB" for place in places)
    return f"Free are: {free}. Make room, or move the folder to a disk that has some."


def _conclude(plan: Plan, record: dict[str, Any], problem: BaseException | None) -> None:
    """Write the record of a run that has ended, and raise what ended it."""
    if problem is not None and (isinstance(problem, DiskFull) or not isinstance(problem, Interrupted)):
        record["error"] = str(problem)
    status = "finished" if problem is None else "interrupted" if isinstance(problem, Interrupted) else "failed"
    finish_record(record, status)
    try:
        write_last_record(plan.folder, record)
    except (OSError, FlatpatchError) as error:
        if not is_disk_full(error):
            raise
        said = f"{problem}\n" if problem else ""
        raise DiskFull(
            f"{said}the disk is full, and {plan.folder / 'record.json'} could not be written: it does not say how the "
            f"run ended. {_room_left(plan.folder)} {_way_on(plan)}"
        ) from error
    if problem is not None:
        raise problem


def _show(folder: Path, record: dict[str, Any]) -> list[Path]:
    """Print the table and draw the figures; return their files."""
    print(summary_table(record, folder))
    say(f"record   {folder / 'record.json'}\nsteps    {folder / STEPS}")
    figures = leave_figures(folder, record)
    tell_figures(figures)
    return figures


def _kept(plan: Plan) -> int:
    """Return how many stages, from the first on, an earlier call finished and left whole."""
    kept = 0
    while kept < len(plan.stages) and _is_done(plan, plan.stages[kept]):
        kept += 1
    return kept


def _begun(plan: Plan, kept: int) -> Checkpoint | None:
    """Return the checkpoint that the first stage which is not finished goes on from, None where it starts anew."""
    if kept == len(plan.stages) or plan.request.settings.checkpointing is None:
        return None
    stage = plan.stages[kept]

    def tell(line: str) -> None:
        print(f"WARNING: {line}", flush=True)

    place = _stage_folder(plan, stage) / CHECKPOINTS
    return newest_checkpoint(place, made_by=made_by(plan, stage), tell=tell)


def _gone_on(begun: Checkpoint | None) -> tuple[int, int]:
    """Return after how many tasks of a process a checkpoint is, and after which step of the next one."""
    if begun is None:
        return 0, 0
    # A process that learns several tasks keeps one after each, and none within.
    tasks = begun.facts.get("tasks")
    return (0, begun.step) if tasks is None else (tasks, 0)


def _in_words(begun: Checkpoint) -> str:
    tasks, step = _gone_on(begun)
    return f"from step {step}" if step else f"after task {tasks}"


def _run_stages(
    plan: Plan, record: dict[str, Any], kept: int, begun: Checkpoint | None, stop: _Stop, tracking: Tracking
) -> None:
    prepare_work(plan, plan.folder / "work")
    # From the first stage that is not whole, later ones started from something else: none of their files may stay.
    for stage in plan.stages[kept:]:
        _end_leftovers(_stage_folder(plan, stage) / "hook.json")
        (_stage_folder(plan, stage) / "done.json").unlink(missing_ok=True)
    for index, stage in enumerate(plan.stages[kept:], kept):
        if index == kept and begun is not None:
            _clear_end(plan, stage, begun)
            continue
        shutil.rmtree(_stage_folder(plan, stage), ignore_errors=True)
        shutil.rmtree(_output(plan, stage), ignore_errors=True)
        for path in _measured(plan, stage):
            path.unlink(missing_ok=True)
    for index, stage in enumerate(plan.stages):
        own = _stage_folder(plan, stage)
        if index < kept:
            say(f"{stage.title}: finished before, kept")
        else:
            if index == kept and begun is not None:
                say(f"{stage.title}: goes on {_in_words(begun)}")
            _run_stage(plan, stage, stop, tracking)
        record["timing"]["total_seconds"] += read_json(own / "done.json")["seconds"]
        _collect(plan, record, index + 1)
        tracking.follow(own / STEPS)
        tracking.tasks()
        lost = [*_lost_models(plan, stage), *_short_samples(plan, stage), *_never_at_loss(plan, stage)]
        record["notes"] += lost
        write_record(plan.folder, record)
        if index >= kept:
            _say_failures(plan, stage)
            for note in lost:
                print(f"WARNING: {note}", flush=True)


def _clear_end(plan: Plan, stage: Stage, begun: Checkpoint) -> None:
    """Take away what a process that was cut off leaves at its end; what it learned by its checkpoint stays.

    What it measured after the checkpoint is measured again, into the same files.
    """
    for name in (STOP, "progress.json", "summary.json"):
        (_stage_folder(plan, stage) / name).unlink(missing_ok=True)
    if not _gone_on(begun)[0]:  # else the tasks that it has learned left their results there
        shutil.rmtree(_output(plan, stage), ignore_errors=True)


def _say_failures(plan: Plan, stage: Stage) -> None:
    for path in _measured(plan, stage):
        if path.suffix == ".json":
            for failure in measurements.failures(read_json(path)):
                print(f"WARNING: not measured: {path.stem}: {failure}", flush=True)


def _short_samples(plan: Plan, stage: Stage) -> list[str]:
    """Say where fewer examples were measured than were asked for."""
    contents = [read_json(path) for path in _measured(plan, stage) if path.suffix == ".json"]
    return list(dict.fromkeys(text for content in contents for text in measurements.shortage(content)))


def _never_at_loss(plan: Plan, stage: Stage) -> list[str]:
    """Say which tasks' trainings never came down to the loss at which they were to be measured."""
    request = plan.request.settings.measuring
    if request is None or request.at_loss == 0:
        return []
    return [
        f"measure_at_loss={request.at_loss:g}: the mean loss of {LOSSES_AVERAGED} steps of task {index + 1} "
        f"{plan.tasks[index]} never came down to it, so nothing is measured there"
        for index in stage.tasks
        if not (
            plan.folder / measurements.FOLDER / f"{measurements.stem(index, plan.tasks[index], AT_LOSS)}.json"
        ).is_file()
    ]


def _lost_models(plan: Plan, stage: Stage) -> list[str]:
    """Say which models a process could not keep; its training went on without."""
    log = (_stage_folder(plan, stage) / LOG).relative_to(plan.folder)
    return [
        f"the model after task {index + 1} {plan.tasks[index]} was not kept, so that the verb measure cannot rebuild "
        f"it: see {log} in the run's folder"
        for index, name in stage.models.items()
        if not (plan.folder / name).is_file()
    ]


def prepare_work(plan: Plan, work: Path, *, patched: bool = True) -> None:
    """Lay out a working directory in which upstream's own relative arguments are right.

    Args:
        plan: What is to run there.
        work: The directory; made if it is missing.
        patched: False lays out upstream's code as its authors wrote it, for comparisons.
    """
    work.mkdir(parents=True, exist_ok=True)
    links = dict(plan.links)
    for name, text in plan.files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(work / name, text)
    if plan.verified is not None:
        built = patches.build(plan.verified.repo, patched=patched)
        for entry in sorted(built.path.iterdir()):
            if not entry.name.startswith(".") and entry.name not in plan.own_folders:
                links.setdefault(entry.name, entry)
    for name, target in links.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.symlink_to(target, target_is_directory=target.is_dir())
    for name, fill in plan.made.items():
        if not (work / name).is_dir():
            with made_whole(work / name) as unfinished:
                fill(unfinished)


def _stage_folder(plan: Plan, stage: Stage) -> Path:
    return plan.folder / "tasks" / stage.folder


def _output(plan: Plan, stage: Stage) -> Path:
    """Return the folder that upstream's process fills."""
    return plan.folder / "work" / stage.output


def _measurements(plan: Plan, stage: Stage) -> list[str]:
    """Return the names of the measuring points that a process of the run may have."""
    whens = (*WHENS, AT_LOSS, LEDGER, LIVE)
    return [measurements.stem(index, plan.tasks[index], when) for index in stage.tasks for when in whens]


def _measured(plan: Plan, stage: Stage) -> list[Path]:
    """Return the files of what was measured in a process of the run."""
    folder = plan.folder / measurements.FOLDER
    names = _measurements(plan, stage)
    return sorted(path for name in names for path in folder.glob(f"{glob.escape(name)}[.-]*"))


def _is_done(plan: Plan, stage: Stage) -> bool:
    """Tell whether a process ended well and what it left is still whole."""
    marker = _stage_folder(plan, stage) / "done.json"
    if not marker.is_file():
        return False
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"]
        return all(digest(plan.folder / name) == noted for name, noted in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # gone, cut short or of another kind
        return False


def brought(plan: Plan, source: Path, kept: int) -> list[Path]:
    """Return the files that a finished run left of its first tasks, for another run that begins with them.

    Args:
        plan: The other run's; each of its processes learns one task.
        source: The finished run's folder.
        kept: How many tasks.

    Raises:
        UserError: If the files of one are not all there and whole.
    """
    there = dataclasses.replace(plan, folder=source)
    files: list[Path] = []
    for stage in plan.stages[:kept]:
        if not _is_done(there, stage):
            raise UserError(f"{source} no longer holds {stage.title} whole. Make the run anew.")
        own = _stage_folder(there, stage)
        for folder in (own, _output(there, stage)):
            files += (path for path in sorted(folder.rglob("*")) if path.is_file())
        files += _measured(there, stage)
        files += (source / name for name in stage.models.values())
    return list(dict.fromkeys(files))


def _run_stage(plan: Plan, stage: Stage, stop: _Stop, tracking: Tracking) -> None:
    if stop.asked:
        raise Interrupted(f"stopped by {stop.asked} before {stage.title}. {_way_on(plan)}")
    own = _stage_folder(plan, stage)
    hook = own / "hook.json"
    own.mkdir(parents=True, exist_ok=True)
    write_atomically(hook, json.dumps(_contract(plan, stage, own), indent=2))
    port = plan.request.settings.port or _free_port()
    command = command_of(stage, sys.executable, port)
    variables = {**os.environ, **plan.environment, "FLATPATCH_RUN": str(hook)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    started = time.monotonic()
    with (own / LOG).open("ab") as log:
        log_begins = log.tell()
        process = Supervised(command, folder=plan.folder / "work", variables=variables, output=log)
        try:
            _watch(process, stage.title, own, stop, _shown_names(plan), tracking)
        finally:
            process.end()
            _end_leftovers(hook)
            _free_shared_memory(port)
            seconds = _spent(own) + time.monotonic() - started
            with contextlib.suppress(OSError):  # on a full disk it is told too little
                (own / SPENT).write_text(f"{seconds:.2f}\n", encoding="utf-8")
    if code := process.poll():
        if stop.asked or (own / STOP).exists():
            by = stop.asked or f"the file {own / STOP}"
            raise Interrupted(f"stopped by {by} during {stage.title}. {_way_on(plan, stage)}")
        said = _failure(plan, stage, code, own / LOG)
        if _had_no_room(own / LOG, log_begins):
            raise DiskFull(f"the disk is full: {said}\n{_room_left(plan.folder)}")
        raise FlatpatchError(said)
    if not (own / "summary.json").is_file():
        raise FlatpatchError(
            f"{stage.title} ended, but flatpatch's hook in {plan.upstream.title} never ran: not the run asked for. "
            f"See {own / 'log.txt'}, and check the patches: python -m flatpatch patches verify"
        )
    files = [
        *_results(plan, stage),
        *(path for name in stage.models.values() if (path := plan.folder / name).is_file()),
    ]
    files += [own / STEPS, own / "summary.json", *_measured(plan, stage)]
    # What cannot be read would be kept, and fail every later call too.
    Family(plan.upstream.family).collect(plan, plan.stages.index(stage) + 1)
    kept = {str(path.relative_to(plan.folder)): digest(path) for path in files}
    write_atomically(own / "done.json", json.dumps({"files": kept, "seconds": round(seconds, 2)}, indent=2))
    shutil.rmtree(own / CHECKPOINTS, ignore_errors=True)


def _spent(own: Path) -> float:
    """Return the seconds that earlier processes of a stage took, whose work this one goes on with."""
    try:
        return float((own / SPENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _results(plan: Plan, stage: Stage) -> list[Path]:
    """Return the files that a process had to leave.

    Raises:
        FlatpatchError: If one is missing.
    """
    found: list[Path] = []
    for pattern in stage.results:
        files = sorted(path for path in plan.folder.glob(pattern) if path.is_file())
        if not files:
            raise FlatpatchError(f"{stage.title} ended without its results: there is no {plan.folder / pattern}.")
        found += files
    return found


def _contract(plan: Plan, stage: Stage, own: Path) -> dict[str, Any]:
    """Return what the hooks in a process are told; :mod:`flatpatch.contract` says what it means."""
    settings = plan.request.settings
    measure = None
    if settings.measuring is not None:
        folder = str(plan.folder / measurements.FOLDER)
        measure = {"request": settings.measuring.as_dict(), "folder": folder, "by": MEASURER}
    checkpoints = None
    if (every := settings.checkpointing) is not None:
        places = {"folder": str(own / CHECKPOINTS), "stop": str(own / STOP)}
        checkpoints = {**places, **every, "made_by": made_by(plan, stage)}
    return {
        "schema": 1,
        "command": stage.command,
        "metrics": str(own / STEPS),
        "progress": str(own / "progress.json"),
        "summary": str(own / "summary.json"),
        "sam": {
            "kind": settings.sam,
            "rho": settings.rho,
            "eta": settings.eta,
            "scope": settings.scope,
            "sync": settings.sync,
            "ascent_loss": effective_settings(settings).ascent_loss,
            "ascent_batch": effective_settings(settings).ascent_batch,
            "radius": effective_settings(settings).sam_radius,
            "seed": settings.seed,
            "options": options_of(settings),
        },
        "adapters": settings.adapters,
        "measure": measure,
        "checkpoints": checkpoints,
        **stage.contract,
    }


def _shown_names(plan: Plan) -> dict[str, str]:
    """Return how the tasks of a process that learns several are called on the terminal."""
    return {name: f"task {number}/{len(plan.tasks)} {name}" for number, name in enumerate(plan.tasks, 1)}


def _watch(
    process: Supervised, title: str, own: Path, stop: _Stop, names: Mapping[str, str], tracking: Tracking
) -> None:
    """Show a stage's progress until it ends, or is ended because it does not stop when asked to."""
    started = time.monotonic()
    with Progress(title, "step", leave=True) as shown:
        note = ""
        last: tuple[Any, ...] = ("starting",)
        asked_at: float | None = None
        heeds = False
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                state = json.loads((own / "progress.json").read_text(encoding="utf-8"))
                heeds = bool(state.get("heeds_stop"))
                if state.get("note", note) != note:
                    note = state["note"]
                    shown.tell(f"{title}: {note}")
                task = state.get("task") or ""
                doing = f"{in_words(state['phase'])} {names.get(task, task)}".strip()
                loss = "" if state.get("loss") is None else f"loss {state['loss']:.3f}"
                last = (doing, state["step"], state["total"], loss)
                # By now it has taken away the steps that an earlier process took after the checkpoint.
                tracking.follow(own / STEPS)
            if stop.asked:
                if not heeds or stop.again or (asked_at and time.monotonic() - asked_at > PATIENCE):
                    return
                if asked_at is None:
                    asked_at = time.monotonic()
                    (own / STOP).touch()
                    shown.tell(
                        f"{title}: {stop.asked}: waiting for the end of a step and its checkpoint, at most "
                        f"{PATIENCE:.0f} s; a second signal ends it at once"
                    )
            shown.update(*last)
            time.sleep(0.2)
        shown.end()
    say(f"{title}: {time.monotonic() - started:.0f} s")


def _failure(plan: Plan, stage: Stage, code: int, log: Path) -> str:
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    shown = "\n".join(f"  | {line}" for line in tail)
    reason = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"{stage.title} {reason}. The end of {log}:\n{shown}\n{_way_on(plan, stage)}"


def _had_no_room(log: Path, begins: int = 0) -> bool:
    """Tell whether a process failed for want of room: by its last words, or by what is left where they were to go.

    Args:
        log: What it said.
        begins: At which byte its words begin, behind those of an earlier process.
    """
    last = log.read_bytes()[begins:][-BYTES_OF_LAST_WORDS:].decode("utf-8", errors="replace")
    return any(words in last for words in NO_ROOM) or shutil.disk_usage(log).free < 2**20


def _way_on(plan: Plan, stage: Stage | None = None) -> str:
    """Return what the same command will do with a run that has stopped.

    Args:
        plan: The run.
        stage: The process that was cut off, which may have kept a checkpoint.
    """
    if stage is not None and (begun := _begun(plan, plan.stages.index(stage))):
        tasks, step = _gone_on(begun)
        return f"The same command continues the run {_in_words(begun)}{f' of {stage.title}' if step else ''}."
    if plan.resumes:
        return "The same command continues the run; finished tasks are kept."
    if stage is not None:
        return f"{_NOTHING_KEPT} the same command starts the run anew."
    return "The same command continues the run from its last checkpoint; without one it starts the run anew."


def _collect(plan: Plan, record: dict[str, Any], count: int) -> None:
    """Put what the first ``count`` tasks measured into the record and into ``metrics.jsonl``."""
    lines = []
    for stage in plan.stages[:count]:
        path = _stage_folder(plan, stage) / STEPS
        if path.is_file():
            lines.append(path.read_text(encoding="utf-8"))
    write_atomically(plan.folder / STEPS, "".join(lines))
    record["training"] = [read_json(_stage_folder(plan, stage) / "summary.json") for stage in plan.stages[:count]]
    names = [name for stage in plan.stages[:count] for name in _measurements(plan, stage)]
    record["flatness"] = measurements.read_entries(plan.folder, names)
    results = Family(plan.upstream.family).collect(plan, count)
    record["accuracy_matrix"] = [list(row) for row in results.accuracy]
    for key in ("train_seconds", "predict_seconds"):
        if seconds := getattr(results, key):
            record["timing"][key] = list(seconds)
    if results.before_training:
        record["accuracy_before_training"] = list(results.before_training)
    if count == len(plan.stages):
        accuracy = metrics.from_lists(results.accuracy)
        record["metrics"] = metrics.summarise(accuracy, sample_weighted=results.sample_weighted)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _free_shared_memory(port: int, place: Path = SHARED_MEMORY) -> None:
    """Remove what DeepSpeed's processes of a port leave in this machine's memory on a CPU: 69 MB each."""
    for buffer in place.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        with contextlib.suppress(OSError):
            buffer.unlink()


def _end_leftovers(hook: Path) -> None:
    """End processes of this stage that outlived a runner killed with SIGKILL."""
    for _ in range(50):  # one that is being ended may still have started another
        running = psutil.process_iter(["environ"])
        left = [process for process in running if (process.info["environ"] or {}).get("FLATPATCH_RUN") == str(hook)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.1)


def only_runner(folder: Path) -> AbstractContextManager[None]:
    """Hold the run folder's lock, which the system lets go when this process ends, however it ends."""
    return locked(folder / LOCK, f"another process is running {folder}. Wait for it, or choose another run=NAME.")


class _Stop:
    """Remembers the first signal that asks to stop, and whether another came; puts the old handlers back."""

    def __init__(self) -> None:
        self.asked = ""
        self.again = False
        self._old: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.again = bool(self.asked)
        self.asked = self.asked or signal.Signals(number).name

    def __enter__(self) -> _Stop:
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

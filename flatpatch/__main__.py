"""The command line: ``python -m flatpatch <verb> key=value ...``."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from flatpatch.errors import DiskFull, FlatpatchError, UserError, did_you_mean, no_room, unprintable
from flatpatch.terminal import Lasting, quietly, without_quiet

USAGE = """usage: python -m flatpatch <verb> key=value ...

verbs:
  run      train one method over its tasks; the same command continues a stopped run
  sweep    several runs: a=1,2 takes each value in turn, seed=0..4 a range
  study    an experiment: its runs, what is measured, and a verdict on each of its hypotheses; alone: lists them
  compare  finished runs beside published numbers, or beside other runs: compare run=FOLDER[,...] [with=FOLDER[,...]]
  report   tables and figures again, and one HTML page about them: report run=FOLDER[,FOLDER...], report study=NAME
  measure  flatness of finished runs' models, and of what lies between two or three: measure run=FOLDER[,FOLDER...]
  fork     continuations of a finished run from the state after one of its tasks: fork run=FOLDER task=2 sam=off,sam
  diff     what two runs' records differ in: diff run=FOLDER with=FOLDER
  rerun    the run of a record once more: rerun record=runs/NAME/record.json
  patches  verify | apply | show | refresh | drift: the lines inserted into upstream's code
  doctor   say what is here and what is missing: upstream code, libraries, CUDA, disk

With --quiet every verb prints its result, warnings and errors alone.

examples:
  python -m flatpatch run method=nlora sam=sam rho=0.05
  python -m flatpatch run method=inflora sam=sam rho=0.05
  python -m flatpatch run method=olora order=2 profile=upstream model=models/t5-large --dry-run
  python -m flatpatch sweep method=nlora sam=off,sam seed=0..2
  python -m flatpatch study name=exp4
  python -m flatpatch run --help
"""

RUN_USAGE = """usage: python -m flatpatch run key=value ... [--dry-run]

Trains one method over its tasks and ends with an accuracy matrix, a record, figures and an HTML page in runs/<run>/.
--dry-run prints the exact commands and how they differ from upstream's own script or configuration, and starts nothing.

settings:
{settings}

examples:
  bash run_scripts/nlora_sam.sh rho=0.05
  bash run_scripts/nlora_sam.sh order=1 profile=upstream --dry-run
  bash run_scripts/olora_sam.sh sam=asam rho=0.5 seed=1 run=asam-try
  bash run_scripts/inflora_sam.sh rho=0.05 benchmark=imagenet_r_10 profile=upstream data=/datasets --dry-run
  bash run_scripts/cllora_sam.sh rho=0.05 sam_on=task
  bash run_scripts/nlora_sam.sh profile=upstream model=models/t5-large upstream.num_train_epochs=1
"""


SWEEP_USAGE = """usage: python -m flatpatch sweep key=value[,value...] ... [--dry-run]

One run for every combination; finished ones are kept, so the same command goes on where it stopped.
seed=0..4 is short for seed=0,1,2,3,4. Before the start it says how many runs are missing and how long they will take;
a run that fails stops no other. Ends with mean, standard deviation and n over the seeds, with what SAM changes,
paired by seed, where there are runs with it and without, and one HTML page about
its runs, report.html in the folder that holds them, in place of one that is there. output=FOLDER gives a sweep its own.

  executor=local     on this machine; slurm: a job array, one element for each run; print: prints the commands, one a
                     line, for another scheduler, and starts nothing
  parallel=0         how many runs go at once; 0: as many as fit: a GPU each, or on a CPU as their threads leave room
                     (slurm: as many as it gives)
  slurm.<name>=      an option of sbatch by its long name: slurm.partition=gpu slurm.time=08:00:00
                     slurm.gpus_per_node=1; true for one without a value
  yes=true           needed for more than 200 runs, and for more than a day

examples:
  python -m flatpatch sweep method=nlora sam=off,sam seed=0..2
  python -m flatpatch sweep method=nlora sam=sam rho=0.01,0.05 seed=0..4 parallel=1
  python -m flatpatch sweep method=nlora sam=off,sam seed=0..2 executor=print > commands.txt
  python -m flatpatch sweep method=nlora profile=upstream seed=0..4 executor=slurm slurm.gpus_per_node=8

settings:
{settings}
"""


# What a verb cannot do without; doctor can do without any word.
NEEDS = {
    "run": "at least one setting, e.g. run method=nlora",
    "sweep": "at least one setting, e.g. sweep method=nlora seed=0..2",
    "compare": "run=FOLDER or log=FILE",
    "report": "run=FOLDER, e.g. report run=runs/NAME, or study=NAME",
    "measure": "run=FOLDER, e.g. measure run=runs/NAME",
    "fork": "run=FOLDER, task=N and what to do otherwise, e.g. fork run=runs/NAME task=2 sam=off,sam",
    "diff": "run=FOLDER and with=FOLDER",
    "rerun": "record=FILE, e.g. rerun record=runs/NAME/record.json",
    "patches": "one of its own verbs, e.g. patches verify",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; a FlatpatchError becomes one message."""
    arguments = list(sys.argv[1:] if words is None else words)
    arguments, quiet = without_quiet(arguments)
    try:
        with quietly(quiet):
            code = _dispatch(arguments)
            sys.stdout.flush()  # what cannot be written is said here, not by Python when it ends
            return code
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"flatpatch: the disk is full: {no_room(error)}", file=sys.stderr)
        return DiskFull.exit_code
    except ImportError as error:
        print(f"flatpatch: {_no_environment(error)}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("flatpatch: interrupted.", file=sys.stderr)
        return 85


def _dispatch(arguments: list[str]) -> int:
    for word in arguments:
        if bad := unprintable(word):
            raise UserError(f"{ascii(word)} holds the character {bad}. Write it without control characters, in UTF-8.")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    verb, rest = arguments[0], arguments[1:]
    verbs: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "sweep": _sweep,
        "study": _study,
        "compare": _compare,
        "report": _report,
        "measure": _measure,
        "fork": _fork,
        "diff": _diff,
        "rerun": _rerun,
        "patches": _patches,
        "doctor": _doctor,
    }
    if verb not in verbs:
        raise UserError(f"unknown verb '{verb}'.{did_you_mean(verb, verbs)} Verbs: {', '.join(verbs)}. See --help.")
    if not rest and verb in NEEDS:  # nothing said must not start hours of training
        print(f"{verb} needs {NEEDS[verb]}\n")
        verbs[verb](["--help"])
        return UserError.exit_code
    return verbs[verb](rest)


def _no_environment(error: ImportError) -> str:
    """Say that this is another Python than the one that is made for this package.

    Raises:
        ImportError: If what is missing is a part of this package: then that is its own fault.
    """
    if error.name is None or error.name.partition(".")[0] == "flatpatch":
        raise error
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{sys.executable} (Python {version}) cannot load {error.name}: {error}. Use the environment of this project, "
        "which the scripts make on first use: bash run_scripts/run.sh takes the same words, e.g. "
        f"bash run_scripts/run.sh {' '.join(sys.argv[1:2]) or '--help'}"
    )


def _asks_for_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def _described() -> str:
    from flatpatch.settings import describe
    from flatpatch.upstreams import UPSTREAMS

    return describe(tuple(UPSTREAMS))


def _run(words: list[str]) -> int:
    if _asks_for_help(words):
        print(RUN_USAGE.format(settings=_described()))
        return 0
    from flatpatch.runner import resolve

    dry_run = "--dry-run" in words
    request = resolve.parse([word for word in words if word != "--dry-run"])
    plan = resolve.make_plan(request, dry_run=dry_run)
    if dry_run:
        print(resolve.render(plan))
        return 0
    from flatpatch.runner.execute import execute
    from flatpatch.runner.pages import leave_page

    execute(plan)
    leave_page([plan.folder])
    return 0


def _sweep(words: list[str]) -> int:
    if _asks_for_help(words):
        print(SWEEP_USAGE.format(settings=_described()))
        return 0
    from flatpatch.runner import sweep

    return sweep.sweep(words)


def _study(words: list[str]) -> int:
    from flatpatch.studies import command

    return command.study(words)


def _compare(words: list[str]) -> int:
    from flatpatch.comparison import command

    return command.compare(words)


def _report(words: list[str]) -> int:
    from flatpatch.runner import report

    return report.show(words)


def _measure(words: list[str]) -> int:
    from flatpatch.runner import measure_words

    if _asks_for_help(words):
        print(measure_words.usage())
        return 0
    asked = measure_words.parse_words(words)
    measure_words.silence_imports()
    from flatpatch.runner import measure

    return measure.measure(asked)


def _fork(words: list[str]) -> int:
    from flatpatch.runner import fork

    return fork.fork(words)


def _diff(words: list[str]) -> int:
    from flatpatch.comparison import two_runs

    return two_runs.diff(words)


def _rerun(words: list[str]) -> int:
    from flatpatch.runner import rerun

    return rerun.rerun(words)


def _patches(words: list[str]) -> int:
    from flatpatch import patches

    return patches.cli(words)


def _doctor(words: list[str]) -> int:
    from flatpatch.runner import doctor

    return doctor.doctor(words)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Lasting(sys.stdout, "standard output"), Lasting(sys.stderr)
    sys.exit(main())

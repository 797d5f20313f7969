"""The words of the verb ``measure``: its help, and what is asked for. Light, so that both are there at once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from flatpatch.errors import UserError
from flatpatch.measuring import EFFORTS, FOLLOWED_KINDS, IN_MINIATURE, KINDS, SCOPES, Request, make_request
from flatpatch.settings import DEFAULTS, check_folder, named_runs, read_words, repeated

USAGE = """usage: python -m flatpatch measure run=FOLDER[,FOLDER[,FOLDER]] [key=value ...]

Measures the models that finished runs left, on a fixed sample of the training data of the task after which they were
saved, and adds the results to each run's record. With two runs also the straight line between their models, with its
barrier, in the space of the factors A and B (adapter) and of W + s B A (merged); with three the plane through them.
Quick runs are measured with one thread on the CPU, as small models are no faster with more; OMP_NUM_THREADS=N sets N.

  run=                    one to three runs: folders, or names inside runs/
  task=                   after which task: a name of the order, several with commas, or all; default: the last
  measure=all             {kinds}
  measure_scope=adapter,merged   over which weights: some of {scopes}
  measure_samples=64      training examples to measure on, the same for every run; of small models' runs {samples}
  measure_batch=16        examples in a batch of them; likewise {batch}
  measure_rho=0.05        radius of SAM's ball to measure in
  measure_effort=quick    {efforts}; likewise {effort}
  output=                 where the results of several runs together go; default: runs/comparison-NAMES;
                          report.html there shows them

examples:
  python -m flatpatch measure run=runs/nlora-sam
  python -m flatpatch measure run=nlora-sam measure=eigenvalues,trace measure_samples=256 task=all
  python -m flatpatch measure run=nlora-off,nlora-sam measure=eigenvalues,density
  python -m flatpatch measure run=seed0,seed1,seed2 measure=loss measure_scope=merged output=runs/three-seeds
"""


@dataclass(frozen=True)
class Asked:
    """What the words ask for."""

    runs: tuple[str, ...]
    task: str
    request: Request
    output: str
    given: frozenset[str] = frozenset()


def usage() -> str:
    """Return the help."""
    return USAGE.format(
        kinds="all, curvature, recorded (as the experiment record's code does it, faults\n"
        f"                          included), or some of {', '.join(KINDS)}",
        scopes=", ".join(SCOPES),
        efforts="|".join(EFFORTS),
        **{key.removeprefix("measure_"): value for key, value in IN_MINIATURE.items()},
    )


def silence_imports() -> None:
    """Keep back what libraries say of themselves when they are imported, and say nothing of what is measured."""
    logging.getLogger("DeepSpeed").addFilter(_not_of_devices)
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)


def _not_of_devices(entry: logging.LogRecord) -> bool:
    return entry.module != "real_accelerator"


def parse_words(words: Sequence[str]) -> Asked:
    """Read the verb's words.

    Raises:
        UserError: With every mistake.
    """
    defaults = {
        **{"run": "", "task": "", "output": "", "measure": "all", "measure_scope": "adapter,merged"},
        **{key: str(DEFAULTS[key]) for key in (*IN_MINIATURE, "measure_rho")},
    }
    given, problems = read_words("measure", words, tuple(defaults))
    values = defaults | {key: value for key, value in given.items() if value}
    numbers: dict[str, float] = {}
    for key, kind in (("measure_samples", int), ("measure_batch", int), ("measure_rho", float)):
        try:
            numbers[key] = kind(values[key])
        except ValueError:
            example = f"{key}={defaults[key]}"
            problems.append(
                f"{key}='{values[key]}' is not a {'whole ' * (kind is int)}number (expected e.g. {example})."
            )
            numbers[key] = float(defaults[key])
    runs: tuple[str, ...] = ()
    try:
        runs = tuple(named_runs(values["run"])) if values["run"] else ()
    except UserError as error:
        problems.append(str(error))
    if "run" not in given or len(runs) > 3:
        problems.append(f"run='{values['run']}' names {len(runs)} runs (expected one to three, e.g. run=runs/NAME).")
    for key in ("run", "task"):
        if twice := repeated([name.strip() for name in values[key].split(",")]):
            problems.append(f"{key}={values[key]} names {twice} twice. Name each once.")
    problems += check_folder("output", values["output"]) if values["output"] else []
    if values["output"] and len(runs) == 1:
        problems.append("output= is for several runs together; one run's results go into its own folder.")
    if len(runs) > 1 and ("," in values["task"] or values["task"] == "all"):
        problems.append(f"task={values['task']}: several runs are compared after one task. Name one.")
    request = None
    try:
        request = make_request(
            values["measure"],
            values["measure_scope"],
            samples=int(numbers["measure_samples"]),
            batch=int(numbers["measure_batch"]),
            rho=numbers["measure_rho"],
            effort=values["measure_effort"],
        )
    except UserError as error:
        problems.append(str(error))
    if request is not None and (followed := [kind for kind in request.kinds if kind in FOLLOWED_KINDS]):
        problems.append(
            f"measure={','.join(followed)} follows a training, and a finished run has none left. Measure it in a run: "
            f"bash run_scripts/run.sh run ... measure={','.join(followed)}"
        )
    if problems:
        raise UserError.collect(problems)
    if request is None:
        raise UserError("measure= is empty: name what to measure, e.g. measure=eigenvalues,trace or measure=all.")
    return Asked(runs, values["task"], request, values["output"], frozenset(given))

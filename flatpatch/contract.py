"""What passes between the runner and a patched process: the description that the hooks read.

``FLATPATCH_RUN`` names a JSON file that holds a :class:`Description`; a family's own part stands in it under the
family's name. Without the variable every hook does nothing. Loading this file loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from flatpatch.errors import UserError, did_you_mean
from flatpatch.kinds import KINDS

VARIABLE = "FLATPATCH_RUN"
SCHEMA = 1


if TYPE_CHECKING:
    KindOrOff = str
else:
    _CHOICES = ("off", *KINDS)
    KindOrOff = Literal[_CHOICES]


class Part(BaseModel):
    """A part of the description: every key is known, and every value is of the kind that it says."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Sam(Part):
    """The SAM of the run; ``kind`` is off where there is none. ``seed`` is the run's, for random directions.

    ``options`` has the settings that some kinds alone have, by their names.
    """

    kind: KindOrOff
    rho: float = Field(ge=0, allow_inf_nan=False)
    eta: float = Field(ge=0, allow_inf_nan=False)
    scope: Literal["lora", "A", "B", "head", "all"]
    sync: Literal["local", "global"]
    ascent_loss: Literal["total", "task"]
    ascent_batch: float = Field(default=1.0, gt=0, le=1)
    radius: Literal["factors", "effective"] = "factors"
    seed: int = Field(ge=0)
    options: dict[str, int | float] = {}


class Measure(Part):
    """What is measured in the run: what, into which folder, and the class that does it, as ``package.module:Class``."""

    request: dict[str, Any]
    folder: str
    by: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")


class Keep(Part):
    """What is kept of the network after each task: in which folder, and which weights.

    ``names`` is a pattern of the weights' names, with ``{task}`` for the task's number from 0.
    """

    folder: str
    names: str


class Checkpoints(Part):
    """Where a process keeps checkpoints of its training, how often, and how it is asked to stop.

    ``every_seconds`` and ``every_steps`` are as for :class:`flatpatch.checkpoints.Pace`. ``made_by`` is what the
    training is. Where the file ``stop`` is there, the process writes a checkpoint at its next step's end and ends with
    exit code 85. While it can be asked so, the file ``progress`` says ``"heeds_stop": true``; otherwise it is ended.
    """

    folder: str
    every_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    every_steps: int | None = Field(default=None, gt=0)
    made_by: dict[str, Any]
    stop: str


class Description(Part):
    """All that every process of a run is told.

    ``task_index`` and ``task`` are those of the one task that the process trains, or null where it trains all of
    ``tasks``. ``command`` is what Python was given. ``metrics``, ``progress`` and ``summary`` are the files to write.
    """

    schema_: Literal[1] = Field(alias="schema")
    command: list[str] = []
    task_index: int | None
    task: str | None
    tasks: list[str] = []
    metrics: str
    progress: str
    summary: str
    sam: Sam
    adapters: Literal["upstream", "fp32"]
    measure: Measure | None = None
    keep: Keep | None = None
    checkpoints: Checkpoints | None = None


TITLES: Mapping[str, str] = {
    "off": "SAM off",
    **{name: kind.title for name, kind in KINDS.items()},
}
"""By ``kind``: what it is called."""

PARTS: Mapping[str, type[Part]] = {"sam": Sam, "measure": Measure, "keep": Keep, "checkpoints": Checkpoints}


def read_description(path: Path, **own: Any) -> dict[str, Any]:
    """Read and check a run's description, reporting all its mistakes at once.

    Args:
        path: The file.
        own: What the family that reads it takes by its keys, a part of its own or a narrower kind; all must be there.

    Returns:
        Its content.

    Raises:
        UserError: With every mistake and its place.
    """
    where = f"{VARIABLE}={path}"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} cannot be read as JSON: {error}. Unset {VARIABLE} to train without flatpatch."
        ) from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        found = run.get("schema") if isinstance(run, dict) else type(run).__name__
        raise UserError(f"{where} has schema {found!r}, expected {SCHEMA}. Start the run again with this flatpatch.")
    fields: dict[str, Any] = {name: (part, ...) for name, part in own.items()}
    model = create_model("Description", __base__=Description, **fields)
    try:
        model.model_validate(run)
    except ValidationError as error:
        raise UserError.collect([_said(problem, {**PARTS, **own}, where) for problem in error.errors()]) from None
    return run


def _said(problem: Mapping[str, Any], parts: Mapping[str, type[Part]], where: str) -> str:
    """Return one of pydantic's findings as a sentence with its place."""
    *outer, last = (part for part in problem["loc"] if not str(part).startswith("function-"))
    place = f"{where}: {'.'.join(map(str, outer))}" if outer else where
    if problem["type"] == "missing":
        return f"{place} has no {last!r}"
    if problem["type"] == "extra_forbidden":
        part = parts.get(str(outer[-1])) if outer else Description
        hint = did_you_mean(str(last), part.model_fields) if part is not None else ""  # none inside a part's parts
        return f"{place} has an unknown key {last!r}.{hint}"
    return f"{place}{'.' if outer else ': '}{last}={problem['input']!r}: {problem['msg']}"

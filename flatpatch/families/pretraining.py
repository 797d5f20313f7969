"""What the scripts share that build the small pre-trained models of profile ``quick``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatpatch.errors import UserError
from flatpatch.progress import Progress

if TYPE_CHECKING:
    import torch


def read_build(words: list[str], settings: Mapping[str, Any], example: str) -> tuple[Path, dict[str, Any]]:
    """Read ``out=<folder>`` and other values of the settings.

    Args:
        words: The command line.
        settings: The values where none is given, whose kinds others must be of.
        example: A whole command, for the message.

    Returns:
        The folder, made if it was not there, and the settings.

    Raises:
        UserError: If a word is unknown or no value of its kind, or no folder is named; nothing is made then.
    """
    given = dict(word.partition("=")[::2] for word in words)
    unknown = set(given) - {"out", *settings}
    if unknown or not given.get("out"):
        raise UserError(
            f"build takes out=<folder> and any of {', '.join(settings)}; got {' '.join(words) or 'nothing'}. "
            f"Example: {example}"
        )
    try:
        chosen = {**settings, **{key: type(settings[key])(value) for key, value in given.items() if key != "out"}}
    except ValueError as error:
        raise UserError(f"{error}. Expected numbers, e.g. steps=100.") from error
    folder = Path(given["out"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder, chosen


def pretrain(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    settings: Mapping[str, Any],
    *,
    floor: float,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train a model in place: gradients clipped to norm 1, the rate warmed up, then falling linearly.

    Args:
        model: What the optimizer steps.
        optimizer: Its rate is the highest of the schedule.
        loss: Draws a batch and returns its mean loss, a scalar.
        settings: ``steps`` and ``warmup`` are read from here.
        floor: Share of the rate below which it does not fall.
        after_step: Called after each step.

    Returns:
        The mean loss of each hundred steps.
    """
    import torch

    steps, warmup = settings["steps"], settings["warmup"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(floor, 1 - step / steps))
    )
    losses: list[float] = []
    total = 0.0
    with Progress("pre-training", "step") as shown:
        for step in range(steps):
            found = loss()
            optimizer.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            after_step()
            total += found.item()
            if step % 100 == 99:
                losses.append(round(total / 100, 4))
                total = 0.0
            shown.update("", step + 1, steps, f"loss {losses[-1]}" if losses else "")
    return losses


def run_build(main: Callable[[list[str]], None]) -> None:
    """Call a build script's ``main`` with the command line; a mistake becomes its message and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

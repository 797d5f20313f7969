"""The checkpoints that a process keeps of its training, and how it goes on from one.

A training's state is in parts, each with two functions: one returns the part, as tensors, numbers, strings, lists and
dictionaries of them, and one puts it back. The random generators are put back last, since going on may draw from them.
Loading this file loads no torch.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatpatch.checkpoints import Pace, newest_checkpoint, write_checkpoint
from flatpatch.errors import Interrupted
from flatpatch.families.recording import announce

STATE = "state.pt"


class Keeper:
    """Keeps the checkpoints of one training, and ends the process after a step where the runner asks it to.

    Attributes:
        step: After which step the newest usable checkpoint was written; 0 without one.
    """

    def __init__(self, part: Mapping[str, Any], *, tell: Callable[[str], object] = announce) -> None:
        """Look for a checkpoint.

        Args:
            part: What the run's description says of ``checkpoints``.
            tell: Called with each line that a reader of the run should see, and not of its log alone.
        """
        self._place, self._stop, self._made_by = Path(part["folder"]), Path(part["stop"]), part["made_by"]
        self._pace = Pace(every_seconds=part["every_seconds"], every_steps=part["every_steps"])
        self._tell = tell
        self._parts: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {}
        self._before: Callable[[], object] = lambda: None
        self._found = newest_checkpoint(self._place, made_by=self._made_by, tell=announce)
        self.step = self._written = 0 if self._found is None else self._found.step
        self._pace.begin(self.step)

    def add(self, name: str, take: Callable[[], Any], put_back: Callable[[Any], object]) -> None:
        """Make something a part of the training's state."""
        self._parts[name] = (take, put_back)

    def go_on(self) -> None:
        """Put back every part as the newest checkpoint has it; does nothing without one."""
        if self._found is None:
            return
        import torch

        state = torch.load(self._found.folder / STATE, map_location="cpu", weights_only=True)
        for name, (_, put_back) in self._parts.items():
            put_back(state[name])
        set_random_state(state["random"])
        self._pace.begin(self.step)
        announce(f"goes on after step {self.step}, from a checkpoint")

    def step_ended(self, step: int, *, last: bool = False) -> None:
        """Write a checkpoint where one is due, and end the process where it is asked to.

        Args:
            step: The one that has ended: the weights are its result, and no gradient or perturbation is left of it.
            last: Whether it is the training's last one.

        Raises:
            SystemExit: If the process is asked to stop; the exit code says that it can go on.
        """
        asked = self._stop.exists()
        if step != self._written and (asked or self._pace.due(step, last=last)):
            self._write(step)
        if asked:
            announce(f"stopped after step {step}, as asked")
            raise SystemExit(Interrupted.exit_code)

    def _write(self, step: int) -> None:
        import torch

        began = time.monotonic()
        state = {name: take() for name, (take, _) in self._parts.items()} | {"random": random_state()}
        # Into memory first: torch reports a full disk as another error than Python does.
        content = io.BytesIO()
        torch.save(state, content)

        def fill(folder: Path) -> None:
            (folder / STATE).write_bytes(content.getbuffer())

        try:
            write_checkpoint(self._place, step, fill, made_by=self._made_by, facts={})
            self._written = step
        except OSError as error:
            self._tell(
                f"WARNING: the checkpoint after step {step} was not written: {error}. The training goes on; a restart "
                f"would go on {f'from the one after step {self._written}' if self._written else 'from the start'}."
            )
        self._pace.wrote(step, time.monotonic() - began)


def random_state() -> dict[str, Any]:
    """Return where the global random generators stand: Python's, numpy's, torch's on the CPU and on all GPUs."""
    import random

    import numpy as np
    import torch

    version, numbers, following = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), following],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put every global random generator to where :func:`random_state` found it."""
    import random

    import numpy as np
    import torch

    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def trained_weights(model: Any) -> dict[str, Any]:
    """Return the weights that are trained, by name; they are the model's own tensors."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def put_weights(model: Any, kept: Mapping[str, Any]) -> None:
    """Give a model's trained weights the values that they were kept with."""
    for name, value in trained_weights(model).items():
        value.copy_(kept[name])

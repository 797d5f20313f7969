"""The checkpoints that a process keeps of its training, and how it goes on from one.

A training's state is in parts, each with two functions: one returns the part, as tensors, numbers, strings, lists and
dictionaries of them, and one puts it back. The random generators are put back last, since going on may draw from them.
Loading this file loads no torch.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatpatch.checkpoints import Pace, newest_checkpoint, write_checkpoint
from flatpatch.errors import Interrupted
from flatpatch.families.recording import announce

AGREED = 5
"""Several processes agree on a checkpoint, or to stop, at every so many steps: to agree they wait for each other."""
_GATHERED = ".gathered"


class Alone:
    """The processes of a training that has one."""

    rank = 0
    count = 1

    def agree(self, asked: bool, due: bool) -> tuple[bool, bool]:
        """Return what the first process found."""
        return asked, due

    def wait(self) -> None:
        """Wait until all processes have come here."""


class Several(Alone):
    """The processes of a training under torch.distributed, which has begun."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._device = "cuda" if dist.get_backend() == "nccl" else "cpu"

    def agree(self, asked: bool, due: bool) -> tuple[bool, bool]:
        """Return what the first process found."""
        import torch

        found = torch.tensor([asked, due], dtype=torch.uint8, device=self._device)
        torch.distributed.broadcast(found, src=0)
        asked, due = map(bool, found.tolist())
        return asked, due

    def wait(self) -> None:
        """Wait until all processes have come here."""
        import torch

        torch.distributed.barrier()


class Keeper:
    """Keeps the checkpoints of one training, and ends the process after a step where the runner asks it to.

    Attributes:
        step: After which step the newest usable checkpoint was written; 0 without one.
    """

    def __init__(
        self, part: Mapping[str, Any], *, tell: Callable[[str], object] = announce, processes: Alone | None = None
    ) -> None:
        """Look for a checkpoint.

        Args:
            part: What the run's description says of ``checkpoints``.
            tell: Called with each line that a reader of the run should see, and not of its log alone.
            processes: Those of the training. Each keeps its own state, and all share the checkpoints' folder.
        """
        self._processes = processes or Alone()
        self._place, self._stop, self._made_by = Path(part["folder"]), Path(part["stop"]), part["made_by"]
        self._pace = Pace(every_seconds=part["every_seconds"], every_steps=part["every_steps"])
        self._tell = tell
        self._parts: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {}
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

        state = torch.load(self._found.folder / state_file(self._processes.rank), map_location="cpu", weights_only=True)
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
        if self._processes.count > 1 and step % AGREED and not last:
            return
        asked = self._stop.exists()
        due = step != self._written and (asked or self._pace.due(step, last=last))
        asked, due = self._processes.agree(asked, due)
        if due:
            self._write(step)
        if asked:
            announce(f"stopped after step {step}, as asked")
            raise SystemExit(Interrupted.exit_code)

    def _write(self, step: int) -> None:
        began = time.monotonic()
        state = {name: take() for name, (take, _) in self._parts.items()} | {"random": random_state()}
        problem = self._put_down(state)
        self._processes.wait()
        if self._processes.rank == 0:
            problem = problem or self._gather(step)
            shutil.rmtree(self._place / _GATHERED, ignore_errors=True)
        self._processes.wait()
        if problem is None:
            self._written = step
        else:
            before = f"from the one after step {self._written}" if self._written else "from the start"
            self._tell(
                f"WARNING: the checkpoint after step {step} was not written: {problem}. The training goes on; a "
                f"restart would go on {before}."
            )
        self._pace.wrote(step, time.monotonic() - began)

    def _put_down(self, state: Mapping[str, Any]) -> OSError | None:
        """Write this process's state where the first one gathers them all; return what went wrong."""
        import torch

        # Into memory first: torch reports a full disk as another error than Python does.
        content = io.BytesIO()
        torch.save(state, content)
        path = self._place / _GATHERED / state_file(self._processes.rank)
        try:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getbuffer())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            return error
        return None

    def _gather(self, step: int) -> OSError | None:
        """Make a checkpoint of the states of all processes; return what went wrong."""

        def fill(folder: Path) -> None:
            for rank in range(self._processes.count):
                name = state_file(rank)
                (self._place / _GATHERED / name).rename(folder / name)

        try:
            write_checkpoint(self._place, step, fill, made_by=self._made_by, facts={})
        except OSError as error:
            return error
        return None


def state_file(rank: int) -> str:
    """Return the name of a process's file in a checkpoint."""
    return f"state-{rank}.pt"


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
    # There may be fewer GPUs than there were: the run is then another one's in its last bits, which its record says.
    for number, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, number)


def trained_weights(model: Any) -> dict[str, Any]:
    """Return the weights that are trained, by name; they are the model's own tensors."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def put_weights(model: Any, kept: Mapping[str, Any]) -> None:
    """Give a model's trained weights the values that they were kept with."""
    for name, value in trained_weights(model).items():
        value.copy_(kept[name])

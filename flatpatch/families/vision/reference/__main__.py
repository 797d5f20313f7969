"""All tasks of an image method by the reference engine, in a process of its own, as upstream's main.py does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flatpatch.contract import VARIABLE
from flatpatch.errors import FlatpatchError
from flatpatch.families.reference import StepRecorder
from flatpatch.families.sample import images_sample_of
from flatpatch.families.task_checkpoints import TaskCheckpoints
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.measuring import IMAGE_LOSS
from flatpatch.families.vision.places import vision_run
from flatpatch.families.vision.reference.options import read_reference
from flatpatch.flatness import supervised_loss


def loss_of(index: int, task: str) -> Callable[[Any, Any], Tensor]:
    """Return a task's loss: the cross-entropy of its own head."""
    return lambda model, batch: F.cross_entropy(model(batch[0], index), batch[1])


def main(words: Sequence[str]) -> int:
    """Train and evaluate all tasks as a configuration says, with the SAM of the hook's settings."""
    config = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    try:
        run = vision_run()
        if run is None:
            raise FlatpatchError(f"{VARIABLE} names no description of a run: this process is started by flatpatch.")
        reference = read_reference(config, run["vision"])
        names = run["tasks"]
        checkpoints = TaskCheckpoints(run)
        with StepRecorder(run) as recorder:
            before = checkpoints.restore()
            if before is not None:
                recorder.take_up(before["counted"])

            def measure(when: str, state: vision.TaskState) -> None:
                task = state.tasks[state.index]
                recorder.measure(
                    when,
                    state.model,
                    images_sample_of(task.train, task.classes.start),
                    state.index,
                    names[state.index],
                    loss=supervised_loss(F.cross_entropy),
                    loss_name=IMAGE_LOSS,
                    loss_of=loss_of,
                )

            vision.run(
                reference,
                make_gradients=recorder.make_gradients,
                on_step=lambda state: recorder.on_step(state, names[state["task"]]),
                on_predict=lambda state: recorder.on_predict(state, names[state["task"]]),
                before_task=lambda state: measure("before", state),
                after_task=lambda state: measure("after", state),
                before=before,
                task_done=lambda tasks, state: checkpoints.write(tasks, state | {"counted": recorder.counted()}),
            )
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

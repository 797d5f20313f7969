"""All tasks of a CLIP method by the reference engine, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flatpatch.contract import VARIABLE, read_description
from flatpatch.errors import FlatpatchError
from flatpatch.families.clip import reference as clip
from flatpatch.families.clip.measuring import loss_name
from flatpatch.families.clip.results import compare_zero_shot
from flatpatch.families.reference import StepRecorder
from flatpatch.families.sample import images_sample_of
from flatpatch.families.task_checkpoints import TaskCheckpoints
from flatpatch.flatness import supervised_loss


def main(words: Sequence[str]) -> int:
    """Train and evaluate all tasks as a configuration says, with the SAM of the hook's settings."""
    config = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    try:
        if VARIABLE not in os.environ:
            raise FlatpatchError(f"{VARIABLE} names no description of a run: this process is started by flatpatch.")
        run = read_description(Path(os.environ[VARIABLE]))
        reference = clip.read_reference(config, Path(), config["device"])
        loss = supervised_loss(clip.criterion(reference.arguments))
        names = run["tasks"]
        checkpoints = TaskCheckpoints(run)
        with StepRecorder(run) as recorder:
            before = checkpoints.restore()
            if before is not None:
                recorder.take_up(before["counted"])

            def measure(when: str, state: clip.TaskState) -> None:
                recorder.measure(
                    when,
                    state.model,
                    images_sample_of(state.task.train),
                    state.index,
                    names[state.index],
                    loss=loss,
                    loss_name=loss_name(reference.arguments),
                )

            def tell_zero_shot(accuracies: dict[str, float]) -> None:
                if reference.data is not None:
                    recorder.tell(compare_zero_shot(accuracies))

            clip.run(
                reference,
                make_gradients=recorder.make_gradients,
                on_step=lambda state: recorder.on_step(state, names[state["task"]]),
                on_predict=lambda state: recorder.on_predict(state, names[state["task"]]),
                on_zero_shot=tell_zero_shot,
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

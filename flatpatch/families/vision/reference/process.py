"""All tasks of an image method by the reference engine, in a process of its own, as upstream's main.py does."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatpatch.contract import read_description
from flatpatch.errors import FlatpatchError
from flatpatch.families.text.reference.process import StepRecorder
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.planning import REFERENCE_DEFAULTS
from flatpatch.families.vision.results import LOGS

METHODS = {"inflora": "inflora", "seqlora_vit": "seqlora"}
# Where the reference engine's word for a setting is not InfLoRA's.
NAMES = {"lrate": "learning_rate", "optim": "optimizer"}


def main(words: Sequence[str]) -> int:
    """Train and evaluate all tasks as a configuration says, with the SAM of the hook's settings."""
    config = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    try:
        run = read_description(Path(os.environ["FLATPATCH_RUN"]))
        reference = read_reference(config, run["vision"])
        names = config["tasks"]
        with StepRecorder(run) as recorder:
            vision.run(
                reference,
                make_gradients=recorder.make_gradients,
                on_step=lambda state: recorder.on_step(state, names[state["task"]]),
                on_predict=lambda state: recorder.on_predict(state, names[state["task"]]),
                before_task=lambda state: recorder.measure_images("before", state, names[state.index]),
                after_task=lambda state: recorder.measure_images("after", state, names[state.index]),
            )
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_reference(config: Mapping[str, Any], description: Mapping[str, Any]) -> vision.VisionReference:
    """Turn a configuration in InfLoRA's spelling into the reference engine's own."""
    module, name = description["dataset"]["class"].split(":")
    images = getattr(importlib.import_module(module), name)
    seed = description["dataset"]["seed"]
    return vision.VisionReference(
        method=METHODS[config["method"]],
        dataset=lambda settings: images(settings, seed=seed),
        output_dir=Path(LOGS),
        model=description["model"],
        weights=Path(description["weights"]),
        seed=config["seed"][0],
        device="cpu" if description["device"] == "cpu" else "cuda",
        **{NAMES.get(key, key): config[key] for key in REFERENCE_DEFAULTS},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Trains on several ranks, cut off and going on, and without that: a script, run once per rank.

python tests/resumed_ranks.py '{"some name": {"sam": "sam"}}' results.pt
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from flatpatch import hooks
from tests.sam_training import make_trainer

STEPS, CUT = 10, 8


class Cut(Exception):
    """Ends a training, as a kill would."""


class Cutter(TrainerCallback):
    """Cuts a training off after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Cut


def train(folder, *, kept, cut, sam, **settings):
    """Train with the hook; return what must not differ, or where it was cut off nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {"folder": str(folder / "checkpoints"), "stop": str(folder / "stop"), "made_by": {}}
    files = {name: str(folder / f"{name}.jsonl") for name in ("metrics", "progress", "summary")}
    sam = {"kind": sam, "rho": 0.5, "eta": 0.01, "scope": "lora", "sync": "local", "ascent_loss": "total", "seed": 0}
    run = {"schema": 1, "task_index": 1, "task": "amazon", **files, "sam": sam, "adapters": "upstream"}
    if kept:
        run["checkpoints"] = {**places, "every_seconds": None, "every_steps": 3}
    description = folder / f"hook-{os.environ['RANK']}.json"
    description.write_text(json.dumps(run))
    os.environ["FLATPATCH_RUN"] = str(description)
    trainer = make_trainer(
        folder / "out",
        steps=STEPS,
        callbacks=[Cutter(CUT)] if cut else [],
        xpu_backend="gloo",
        local_rank=int(os.environ["LOCAL_RANK"]),
        **{"logging_steps": 3, **settings},
    )
    hooks.attach_trainer(trainer)
    try:
        trainer.train()
    except Cut:
        return {}
    engine = trainer.deepspeed
    optimizer = engine.optimizer.optimizer if engine and hasattr(engine.optimizer, "optimizer") else trainer.optimizer
    state = optimizer.state_dict()["state"]
    lines = [json.loads(line) for line in Path(files["metrics"]).read_text().splitlines()]
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return {
        "weights": {n: p.detach().float().tolist() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "optimizer": [[torch.as_tensor(v).tolist() for v in entry.values()] for entry in state.values()],
        "random": torch.get_rng_state().tolist(),
        "told": [{k: v for k, v in row.items() if k not in times} for row in trainer.state.log_history],
        "lines": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "passes": len(trainer.passes),
    }


def main():
    runs, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    for name, settings in runs.items():
        place = path.parent / name.replace(" ", "-")
        undisturbed = train(place / "undisturbed", kept=False, cut=False, **settings)
        assert not train(place / "resumed", kept=True, cut=True, **settings)
        resumed = train(place / "resumed", kept=True, cut=False, **settings)
        each = undisturbed["passes"] // STEPS
        results[name] = {
            "undisturbed": undisturbed,
            "resumed": resumed,
            "passed": STEPS - resumed["passes"] // each,
        }
    torch.save(results, path)


if __name__ == "__main__":
    main()

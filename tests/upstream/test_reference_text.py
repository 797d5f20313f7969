"""The reference engine against the authors' own code: same starting weights, same losses, task after task.

Upstream runs as it does for its users, by its own script in a process of its own (it starts warm: tests/warm.py); all
we add is a recorder around ``UIETrainer``. Both sides draw the same batches and the same dropout masks from the same
seed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatpatch.families.text.reference import adapters, learn, prepare
from flatpatch.families.text.reference.data import INSTRUCTIONS, load_examples, read_instructions
from flatpatch.families.text.reference.evaluate import predict
from flatpatch.sam import SAM
from tests.reference_cases import TASKS, make_data, make_model, make_task
from tests.warm import TEXT

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"nlora": ("N-LoRA", "src/run_N_lora.py"), "olora": ("O-LoRA", "src/run_uie_lora.py")}
RANK, STEPS, RHO = 3, 20, 0.05

# Runs upstream's script with a recorder around its trainer: argv[1] is where to write, argv[2] the script.
RECORDER = """
import json, os, runpy, sys
import torch
torch.set_num_threads(1)
record, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(script)
import peft
assert peft.__file__.startswith(sys.path[0]), peft.__file__
import uie_trainer_lora
trainer_class = uie_trainer_lora.UIETrainer
build, step = trainer_class.__init__, trainer_class.training_step
losses = []
def recorded_build(trainer, *args, **kwargs):
    build(trainer, *args, **kwargs)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save(start, os.path.join(record, "start.pt"))
    if "FLATPATCH_RUN" in os.environ:
        import flatpatch.hooks
        flatpatch.hooks.attach_trainer(trainer)
def recorded_step(trainer, model, inputs):
    loss = step(trainer, model, inputs)
    losses.append(loss.item())
    return loss
trainer_class.__init__, trainer_class.training_step = recorded_build, recorded_step
runpy.run_path(script, run_name="__main__")
with open(os.path.join(record, "losses.json"), "w") as file:
    json.dump(losses, file)
"""


class Upstream:
    """Upstream's script on the tiny T5, one task after the other."""

    def __init__(self, python: Path, method: str, checkout: Path, folder: Path, sam: bool) -> None:
        self.python = python
        self.script = checkout / METHODS[method][1]
        self.folder = folder
        self.sam = sam
        self.data = make_data(folder / "data")
        self.model = make_model(folder / "tiny-t5")
        self.instructions = folder / "instructions.json"
        entries = {k: [{"instruction_type": "zero-shot", "instruction": v}] for k, v in INSTRUCTIONS.items()}
        self.instructions.write_text(json.dumps(entries))

    def run(self, index: int, extra: Mapping[str, object]) -> tuple[list[float], dict[str, Tensor], list[str]]:
        """Return the losses, the new adapter at the start, and the answers given in the end."""
        place = self.folder / f"upstream-{index}"
        configs = place / "configs"
        configs.mkdir(parents=True)
        for split, tasks in (("train", TASKS[index : index + 1]), ("dev", ()), ("test", TASKS[: index + 1])):
            config = {kind: [{"sampling strategy": "full", "dataset name": dataset}] for kind, dataset in tasks}
            (configs / f"{split}_tasks.json").write_text(json.dumps(config))
        arguments: dict[str, object] = {
            "model_name_or_path": self.adapter(index - 1) if index else self.model,
            "data_dir": self.data,
            "task_config_dir": configs,
            "instruction_file": self.instructions,
            "instruction_strategy": "single",
            "output_dir": place / "output",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 16,
            "num_train_epochs": 4,
            "learning_rate": 1e-3,
            "max_source_length": 512,
            "max_target_length": 5,
            "generation_max_length": 5,
            "add_task_name": True,
            "add_dataset_name": True,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "evaluation_strategy": "no",
            "save_strategy": "no",
            "lora_dim": RANK,
            **extra,
        }
        words = [f"--{name}={value}" for name, value in arguments.items()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if self.sam:
            environment["FLATPATCH_RUN"] = str(self.hook_settings(place, index))
        recorder = place / "recorder.py"
        recorder.write_text(RECORDER)
        done = subprocess.run(
            [self.python, recorder, place, self.script, "--do_train", "--do_predict", "--predict_with_generate"]
            + ["--no_cuda", "--overwrite_output_dir", *words],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        if self.sam:
            losses = [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()]
        else:
            losses = json.loads((place / "losses.json").read_text())
        rows = (place / "output" / "predict_eval_predictions.jsonl").read_text().splitlines()
        return losses, torch.load(place / "start.pt"), [json.loads(row)["Prediction"] for row in rows]

    def hook_settings(self, place: Path, index: int) -> Path:
        sam = {
            "kind": "sam",
            "rho": RHO,
            "eta": 0.01,
            "scope": "lora",
            "sync": "local",
            "ascent_loss": "total",
            "seed": 0,
        }
        settings = {"schema": 1, "task_index": index, "task": TASKS[index][1], "sam": sam, "adapters": "upstream"}
        outputs = {name: str(place / file) for name, file in OUTPUTS.items()}
        path = place / "hook.json"
        path.write_text(json.dumps({**settings, **outputs}))
        return path

    def adapter(self, index: int) -> Path:
        return self.folder / f"upstream-{index}" / "output" / "adapter"


OUTPUTS = {"metrics": "metrics.jsonl", "progress": "progress.json", "summary": "summary.json"}


def as_reference_adapter(upstream_adapter: Path, folder: Path, method: str) -> Path:
    """Rewrite an adapter that upstream saved (old and new joined, as here) in the reference engine's format."""
    tensors = torch.load(upstream_adapter / "adapter_model.bin")
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    pairs = {
        name: adapters.Pair(*(tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB"))
        for name in sorted(names)
    }
    adapters.save(folder, adapters.Adapter(pairs, {"method": method, "lora_r": RANK, "lora_alpha": 32}))
    return folder


def has_new_adapter(model: Any, start: Mapping[str, Tensor]) -> bool:
    ours = [matrix for layer in adapters.layer_matrices(model) for matrix in (layer.A, layer.B)]
    return all(torch.equal(matrix, value) for matrix, value in zip(ours, start.values(), strict=True))


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.parametrize("sam", [False, True], ids=["plain", "sam"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_equal_upstreams_over_two_tasks(
    method: str, sam: bool, warm: Callable[..., Path], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    theirs = Upstream(warm(TEXT), method, upstream(METHODS[method][0]), tmp_path, sam)
    lamdas = {"lamda_1": 0.4} if method == "nlora" else {"lamda_1": 0.5, "lamda_2": 0.1}
    previous = None
    for index in (0, 1):
        expected, start, answers = theirs.run(index, lamdas)
        task = make_task(
            theirs.model,
            theirs.data,
            tmp_path / f"reference-{index}",
            index,
            method=method,
            num_train_epochs=4,
            instruction_file=theirs.instructions,
            previous=previous,
            **lamdas,
        )
        model, tokenizer = prepare(task)
        assert has_new_adapter(model, start)  # bit for bit: the same seed, drawn in the same order
        losses: list[float] = []
        learn(
            model,
            tokenizer,
            task,
            make_gradients=(lambda optimizer: SAM(optimizer, rho=RHO).gradients) if sam else None,
            on_step=lambda step, losses=losses: losses.append(step["loss"]),
        )
        assert len(losses) == len(expected) >= STEPS
        assert losses == pytest.approx(expected, rel=1e-5)  # 3e-7 seen
        questions = load_examples(task.data_dir, task.eval_tasks, "test", read_instructions(task.instruction_file))
        assert predict(model, tokenizer, questions, task) == answers
        # The second task starts, on both sides, from the adapter that upstream saved.
        previous = as_reference_adapter(theirs.adapter(index), tmp_path / f"adapter-{index}", method)
        for key, pair in adapters.load(previous).pairs.items():
            torch.testing.assert_close(tuple(adapters.joined(model)[key]), tuple(pair), rtol=1e-4, atol=1e-5)

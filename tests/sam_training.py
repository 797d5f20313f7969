"""A tiny T5 with LoRA and a Trainer whose ``training_step`` adds a penalty; also a script, run once per rank.

python tests/sam_training.py '{"some name": {"steps": 3, "sam": {"rho": 0.05}}}' results.pt
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
PENALTY = 0.1


def tiny_t5(dropout=0.1, seed=0, **lora):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        use_cache=False,
    )
    adapters = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q", "v"], **lora
    )
    model = get_peft_model(T5ForConditionalGeneration(config), adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at its initialisation, which would hide half of the perturbation
                parameter.normal_(std=0.1)
    return model


def examples(count=32):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(2, 40, (count, 11), generator=generator)
    return [
        {"input_ids": row[:7], "attention_mask": torch.ones(7, dtype=torch.long), "labels": row[7:]} for row in rows
    ]


class PenaltyTrainer(Trainer):
    """Adds to the loss inside ``training_step``, as N-LoRA and O-LoRA do, so that ``compute_loss`` is not the whole."""

    scaler = None
    do_grad_scaling = False
    penalty = PENALTY
    shuffled = True

    def _get_train_sampler(self):
        if self.shuffled:
            return super()._get_train_sampler()
        # Every rank takes its part of what one process would take as one batch.
        size, ranks = self.args.per_device_train_batch_size, self.args.world_size
        starts = range(self.args.process_index * size, len(self.train_dataset), size * ranks)
        return [index for start in starts for index in range(start, start + size)]

    def training_step(self, model, inputs):
        self.passes = [*getattr(self, "passes", []), self.state_before_pass()]
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        steps = self.args.gradient_accumulation_steps
        loss = loss if self.deepspeed else loss / steps
        adapters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        loss = loss + self.penalty * sum(p.abs().sum() for p in adapters)
        if self.do_grad_scaling:
            self.scaler.scale(loss).backward()
        elif self.deepspeed:
            loss = self.deepspeed.backward(loss)
        else:
            loss.backward()
        return loss.detach()

    def state_before_pass(self):
        """What an ascent pass must leave alone: gradients, and DeepSpeed's counters and gradient buffers."""
        state = {"grads": [p.grad is not None for p in self.model.parameters()], "draw": torch.get_rng_state()}
        if self.deepspeed:
            optimizer = self.deepspeed.optimizer
            state["micro_steps"] = self.deepspeed.micro_steps
            state["micro_step_id"] = getattr(optimizer, "micro_step_id", None)
            state["reduced"] = list(getattr(optimizer, "params_already_reduced", []))
            state["averaged"] = {
                key: None if value is None else [v.clone() for v in value]
                for key, value in getattr(optimizer, "averaged_gradients", {}).items()
            }
            state["in_cpu"] = {k: v.clone() for k, v in getattr(optimizer, "accumulated_grads_in_cpu", {}).items()}
            state["in_bucket"] = getattr(optimizer, "elements_in_ipg_bucket", 0)
        return state


class Losses(TrainerCallback):
    """Keeps the loss of every step, unrounded."""

    def __init__(self, trainer):
        self.values = []
        plain = trainer.training_step

        def step(model, inputs):
            loss = plain(model, inputs)
            self.values.append(loss.item())
            return loss

        trainer.training_step = step


def make_trainer(folder, *, steps=3, gas=1, batch=4, dropout=0.1, model=None, callbacks=(), **arguments):
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": gas,
        "learning_rate": 0.01,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "no_cuda": True,
        "logging_steps": 1000,
        "seed": 5,
    }
    return PenaltyTrainer(
        model=tiny_t5(dropout) if model is None else model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=examples(),
        callbacks=list(callbacks),
    )


def train(folder, *, sam=None, adapters="upstream", penalty=PENALTY, shuffled=True, **settings):
    """Train, wrapped with SAM when its settings are given, and return everything that must not differ."""
    from flatpatch.kinds import make_kind
    from flatpatch.sam import SAMTrainingStep, keep_adapters_fp32

    trainer = make_trainer(folder, **settings)
    trainer.penalty, trainer.shuffled = penalty, shuffled
    if adapters == "fp32":
        keep_adapters_fp32(trainer.model)
    step = None
    if sam is not None:
        kind = {"kind": make_kind({"kind": sam["kind"]})} if "kind" in sam else {}
        trainer.training_step = step = SAMTrainingStep(trainer, **{**sam, **kind})
    losses = Losses(trainer)
    trainer.train()
    engine = trainer.deepspeed
    optimizer = engine.optimizer.optimizer if engine and hasattr(engine.optimizer, "optimizer") else trainer.optimizer
    state = optimizer.state_dict()["state"]
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "optimizer": {f"{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()},
        "random": torch.get_rng_state(),
        "losses": losses.values,
        "passes": trainer.passes,
        "report": {k: v.item() for k, v in vars(step.last_step).items()} if step and step.last_step else None,
    }


def train_with_closure(*, sam, share_model=False, whole_batch=False):
    """Train two layers with a closure; under ``torch.distributed`` every rank takes its half of the batch."""
    from flatpatch.sam import SAM

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(3, 8, 5, dtype=torch.float64)
    if not whole_batch:
        rank = torch.distributed.get_rank()
        data = data[:, rank * 4 : rank * 4 + 4]
        model = DistributedDataParallel(model)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model if share_model else None, **sam)
    norms = []
    for inputs in data:

        def closure(inputs=inputs):
            sam.zero_grad()
            loss = model(inputs).pow(4).mean()
            loss.backward()
            return loss

        sam.step(closure)
        norms.append(sam.last_step.grad_norm.item())
    return {"weights": [p.detach().clone() for p in model.parameters()], "norms": norms}


def assert_same(ours, theirs):
    """Bit for bit the same training: losses, weights, optimizer state, random state."""
    assert ours["losses"] == theirs["losses"]
    assert torch.equal(ours["random"], theirs["random"])
    for part in ("weights", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        assert ours[part]
        differing = [name for name in ours[part] if not torch.equal(ours[part][name], theirs[part][name])]
        assert not differing, differing


def run_ranks(folder, world_size, runs, script=__file__, python=sys.executable):
    """Run this file, or a like one, once per rank and return each run's results by rank.

    One launch, as imports take the longest.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [python, str(script), json.dumps(runs), str(folder / f"rank{rank}.pt")]
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=280) == 0, (folder / f"rank{rank}.log").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]
    return {name: [result[name] for result in results] for name in runs}


def main():
    runs, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    for name, settings in runs.items():
        if "closure" in settings:
            results[name] = train_with_closure(**settings["closure"])
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = train(folder, xpu_backend="gloo", local_rank=int(os.environ["LOCAL_RANK"]), **settings)
    torch.save(results, path)


if __name__ == "__main__":
    main()

"""Time one training step: the base optimizer, our SAM, and pytorch_optimizer's SAM, in one run.

    python benchmarks/sam_step.py                          # a small T5 with LoRA, on CPU
    python benchmarks/sam_step.py family=true clock=cpu    # all kinds of SAM instead of others' SAM
    python benchmarks/sam_step.py size=t5-large batch=48   # 737 million random weights; wants a GPU
    python benchmarks/sam_step.py deepspeed=true           # adds a Trainer step under ZeRO-2, without and with SAM

Every round times each of them once, on the same batch, in a changing order, so that whatever else the machine
does falls on all alike. Ratios are taken within a round; the median and the quartiles over all rounds are shown, and
the ratio of the sums over all rounds, since not every step of a kind takes as many passes (rounds=30 is six times
LookSAM's five steps).

The limit: SAM runs forward and backward twice, and the optimizer step once, so a step cannot cost less than
"two passes" does (the closure called twice, then the base optimizer), a little under 2. What exceeds that is
SAM's own work: saving, perturbing, measuring and restoring the weights, and replaying the random numbers.

Settings (key=value): size=small|medium|t5-large  device=cpu|cuda  batch=8  length=64  rank=8  rounds=30  warmup=3
threads=1  rho=0.05  adaptive=false  diagnostics=true  deepspeed=false  family=false  out=runs/benchmarks/sam_step.json
clock=wall|cpu (cpu: this process's own time, for a CPU shared with others)
"""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from key_values import CLOCKS, read_settings

DEFAULTS: dict[str, Any] = {
    "size": "small",
    "device": "",
    "batch": 8,
    "length": 64,
    "rank": 8,
    "rounds": 30,
    "warmup": 3,
    "threads": 1,
    "clock": "wall",
    "rho": 0.05,
    "adaptive": False,
    "diagnostics": True,
    "deepspeed": False,
    "family": False,
    "out": "runs/benchmarks/sam_step.json",
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4, "vocab_size": 2000},
    "medium": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128},
}


def make_model(settings: SimpleNamespace, torch: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = SIZES[settings.size]
    config = T5Config(**shape, num_decoder_layers=shape["num_layers"], decoder_start_token_id=0, use_cache=False)
    lora = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=settings.rank, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "v"]
    )
    model = get_peft_model(T5ForConditionalGeneration(config), lora).to(settings.device).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def make_steps(settings: SimpleNamespace, torch: Any) -> dict[str, Callable[[dict[str, Any]], None]]:
    """One function per competitor, each with its own model and optimizer, from the same weights."""
    from flatpatch.sam import SAM

    original = make_model(settings, torch)

    def fresh(build: Callable[[list[Any]], Any]) -> tuple[Any, Any]:
        model = copy.deepcopy(original)
        return model, build([p for p in model.parameters() if p.requires_grad])

    def adamw(parameters: list[Any]) -> Any:
        return torch.optim.AdamW(parameters, lr=1e-4)

    def closure_of(model: Any, optimizer: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            return loss

        return closure

    base_model, base = fresh(adamw)
    twice_model, twice = fresh(adamw)
    sam_model, sam = fresh(
        lambda p: SAM(adamw(p), rho=settings.rho, adaptive=settings.adaptive, diagnostics=settings.diagnostics)
    )

    def two_passes(inputs: dict[str, Any]) -> None:
        closure = closure_of(twice_model, twice, inputs)
        closure()
        closure()
        twice.step()

    steps = {
        "base": lambda inputs: base.step(closure_of(base_model, base, inputs)),
        "two passes": two_passes,
        "flatpatch SAM": lambda inputs: sam.step(closure_of(sam_model, sam, inputs)),
    }
    if settings.family:
        return steps | family_steps(settings, fresh, adamw)
    try:
        from pytorch_optimizer import SAM as TheirSAM  # noqa: N811
    except ImportError:
        print("pytorch_optimizer is not installed: left out")
    else:
        their_model, theirs = fresh(
            lambda p: TheirSAM(p, torch.optim.AdamW, rho=settings.rho, adaptive=settings.adaptive, lr=1e-4)
        )

        def their_step(inputs: dict[str, Any]) -> None:
            closure = closure_of(their_model, theirs, inputs)
            closure()
            theirs.step(closure)

        steps["pytorch_optimizer SAM"] = their_step
    if settings.deepspeed:
        steps |= deepspeed_steps(settings, original)
    return steps


def family_steps(settings: SimpleNamespace, fresh: Any, adamw: Any) -> dict[str, Callable[[dict[str, Any]], None]]:
    """The kinds of SAM with the defaults of their settings, SAM on a quarter of the batch, and its effective radius."""
    from flatpatch.kinds import KINDS, make_kind
    from flatpatch.sam import SAM, first_examples, lora_pairs

    def step_of(name: str, share: float = 1.0, radius: str = "factors") -> Callable[[dict[str, Any]], None]:
        kind = make_kind({"kind": name})
        model, sam = fresh(lambda p: SAM(adamw(p), rho=settings.rho, diagnostics=settings.diagnostics, kind=kind))
        sam.pairs, sam.radius = lora_pairs(model), radius

        def step(inputs: dict[str, Any]) -> None:
            def closure() -> Any:
                loss = model(**first_examples(inputs, share if sam.climbing else 1)).loss
                loss.backward()
                return loss

            sam.zero_grad()
            sam.step(closure)

        return step

    steps = {name: step_of(name) for name in KINDS if name not in ("sam", "recorded")}
    variants = {
        "sam ascent_batch=0.25": step_of("sam", 0.25),
        "sam sam_radius=effective": step_of("sam", radius="effective"),
    }
    return variants | steps


def deepspeed_steps(settings: SimpleNamespace, original: Any) -> dict[str, Callable[[dict[str, Any]], None]]:
    """A Trainer-like step on a ZeRO-2 engine, without and with SAM around it."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
    }.items():
        os.environ.setdefault(name, value)
    import deepspeed

    from flatpatch.sam import SAMTrainingStep

    deepspeed.init_distributed("nccl" if settings.device.startswith("cuda") else "gloo")

    def trainer_for() -> Any:
        model = copy.deepcopy(original)
        engine = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config={
                "train_micro_batch_size_per_gpu": settings.batch,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            },
        )[0]

        def training_step(model: Any, inputs: dict[str, Any]) -> Any:
            return engine.backward(model(**inputs).loss).detach()

        return SimpleNamespace(
            model=model,
            deepspeed=engine,
            training_step=training_step,
            args=SimpleNamespace(gradient_accumulation_steps=1),
        )

    plain, sharp = trainer_for(), trainer_for()
    sam_step = SAMTrainingStep(sharp, rho=settings.rho, adaptive=settings.adaptive)

    def plain_step(inputs: dict[str, Any]) -> None:
        plain.training_step(plain.deepspeed, inputs)
        plain.deepspeed.step()

    def sharp_step(inputs: dict[str, Any]) -> None:
        sam_step(sharp.deepspeed, inputs)
        sharp.deepspeed.step()

    return {"ZeRO-2": plain_step, "ZeRO-2 flatpatch SAM": sharp_step}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    settings = read_settings(sys.argv[1:], DEFAULTS, __doc__, {"size": SIZES, "clock": CLOCKS})
    warnings.filterwarnings("ignore")
    import torch

    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(settings.threads)
    steps = make_steps(settings, torch)
    names = list(steps)

    def wait() -> None:
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()

    now = time.process_time if settings.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()  # a collection would fall on whichever step happens to run
    for round_ in range(-settings.warmup, settings.rounds):
        generator = torch.Generator().manual_seed(round_ + settings.warmup)
        shape, vocabulary = (settings.batch, settings.length), SIZES[settings.size]["vocab_size"]
        tokens = torch.randint(2, vocabulary, shape, generator=generator).to(settings.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, :16].contiguous()}
        gc.collect()
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            wait()
            began = now()
            steps[name](inputs)
            wait()
            if round_ >= 0:
                seconds[name].append(now() - began)

    results = {}
    print(f"{'step':24}{'median ms':>10}   ratio to base: median (quartiles)   to two passes         of the sums")
    for name in names:
        reference = "ZeRO-2" if name.startswith("ZeRO-2") else "base"
        to_base = quartiles([a / b for a, b in zip(seconds[name], seconds[reference], strict=True)])
        to_two = quartiles([a / b for a, b in zip(seconds[name], seconds["two passes"], strict=True)])
        of_sums = sum(seconds[name]) / sum(seconds[reference])
        milliseconds = 1000 * statistics.median(seconds[name])
        results[name] = {
            "milliseconds": milliseconds,
            f"ratio to {reference}": to_base,
            "ratio to two passes": to_two,
            "ratio of the sums": of_sums,
            "all seconds": seconds[name],
        }
        spread = f"{to_base[1]:.3f} ({to_base[0]:.3f} to {to_base[2]:.3f})"
        of_two = f"{to_two[1]:.3f} ({to_two[0]:.3f} to {to_two[2]:.3f})"
        print(f"{name:24}{milliseconds:10.1f}   {spread:36}{of_two:26}{of_sums:.3f}")
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else "cpu",
    }
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"settings": vars(settings), "environment": environment, "results": results}, indent=2))
    print(f"saved to {out}")


if __name__ == "__main__":
    main()

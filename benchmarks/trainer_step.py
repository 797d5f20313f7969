"""Where a training step's time goes inside the real trainer, without SAM and with it, in one run.

    python benchmarks/trainer_step.py                                       # a small T5 with LoRA, on a CPU
    python benchmarks/trainer_step.py size=t5-large batch=48                # 737 million random weights; wants a GPU
    python benchmarks/trainer_step.py size=t5-large batch=48 deepspeed=true # upstream's ZeRO-2 with CPU offload, bf16

The trainer is N-LoRA's own, from the patched checkout, with its LoRA and its penalty; without a checkout it is
transformers' Trainer around peft's LoRA. One training alternates: a step without SAM, a step with it, and so on, on the
same model and batches of one shape, so that whatever else the machine does falls on both alike.

Each part of a step is timed where it is called: on the host (until the call returns) and, on a GPU, on the device
(between two events in its stream; parts that wait for the host have gaps inside). N-LoRA's penalty is in the rest of
the loop. The steps are waited for, after the passes and at the end, so "waiting for the device" is what the host had
to wait: near nothing means that the host is what limits. "excess" is SAM's time less the base step's, of forward and
backward less twice the base step's: what SAM costs beyond its two passes. Medians over the steps; the quartiles of the
whole are shown.

Settings (key=value): size=small|medium|t5-large  device=cpu|cuda  batch=8  length=64  rank=8  steps=40  warmup=6
threads=1  rho=0.05  adaptive=false  deepspeed=false  trainer=auto|upstream|transformers
out=runs/benchmarks/trainer_step.json
clock=wall|cpu (cpu: this process's own time instead of the host's, for a CPU shared with others)
"""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from key_values import CLOCKS, read_settings
from sam_step import SIZES, quartiles

DEFAULTS: dict[str, Any] = {
    "size": "small",
    "device": "",
    "batch": 8,
    "length": 64,
    "rank": 8,
    "steps": 40,
    "warmup": 6,
    "threads": 1,
    "clock": "wall",
    "rho": 0.05,
    "adaptive": False,
    "deepspeed": False,
    "trainer": "auto",
    "out": "runs/benchmarks/trainer_step.json",
}
PASSES = ("forward", "backward")
PARTS = (
    "data",
    "random state",
    *PASSES,
    "ascent step",
    "restore",
    "optimizer",
    "waiting for the device",
    "the rest of the loop",
)


CHOICES = {"size": SIZES, "trainer": ("auto", "upstream", "transformers"), "clock": CLOCKS}


class Times:
    """The time of each part of each step, on the host and on the device."""

    def __init__(self, device: Any, wait: Callable[[], None], now: Callable[[], float]) -> None:
        self.steps: list[tuple[str, float, list[tuple[str, float, Any]]]] = []
        self._device, self._wait, self._now = device, wait, now
        self._parts: list[tuple[str, float, Any]] = []
        self._inside = False
        self._began = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to a part, unless it is already charged to another."""
        from flatpatch.timing import Moment, Span

        if self._inside:
            yield
            return
        self._inside, moment, began = True, Moment(self._device), self._now()
        try:
            yield
        finally:
            host = self._now() - began
            self._inside = False
            self._parts.append((name, host, Span(moment, Moment(self._device))))

    def charged(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls charged to a part."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    def wait(self) -> None:
        """Wait for the device."""
        with self.part("waiting for the device"):
            self._wait()

    def end_step(self, kind: str) -> None:
        """Keep the parts of a step of this kind."""
        self.wait()
        now = self._now()
        self.steps.append((kind, now - self._began, self._parts))
        self._parts = []
        gc.collect()  # else a collection would fall on whichever step happens to run
        self._began = self._now()


def upstream_sources(wanted: str) -> Path | None:
    """The sources of N-LoRA's patched copy; None where transformers' Trainer is to stand in."""
    from flatpatch.errors import FlatpatchError
    from flatpatch.patches import build

    if wanted == "transformers":
        return None
    try:
        return Path(build("N-LoRA").path)
    except FlatpatchError as error:
        if wanted == "upstream":
            raise SystemExit(str(error)) from error
        print(f"transformers' own Trainer stands in for N-LoRA's: {str(error).splitlines()[0]}")
        return None


def make_trainer(settings: SimpleNamespace, upstream: Path | None, folder: str) -> Any:
    import torch
    import transformers

    if upstream is not None:
        sys.path.insert(0, str(upstream / "src"))
        from uie_trainer_lora import UIETrainer as Trainer
    else:
        from transformers import Seq2SeqTrainer as Trainer
    from peft import LoraConfig, get_peft_model  # N-LoRA's own, if its sources are there

    torch.manual_seed(0)
    shape = SIZES[settings.size]
    config = transformers.T5Config(
        **shape, num_decoder_layers=shape["num_layers"], decoder_start_token_id=0, use_cache=False
    )
    lora = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=settings.rank, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "v"]
    )
    model = get_peft_model(transformers.T5ForConditionalGeneration(config), lora)
    if upstream is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("loranew_" in name)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, shape["vocab_size"], (64 * settings.batch, settings.length), generator=generator)
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:16]} for row in rows]
    configuration: Any = None
    if settings.deepspeed:
        configuration = json.loads((upstream / "configs/ds_configs/stage2.config").read_text()) if upstream else ZERO_2
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=folder,
        max_steps=settings.warmup + settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        no_cuda=settings.device == "cpu",
        logging_steps=10**6,
        deepspeed=configuration,
        xpu_backend="gloo" if settings.deepspeed and settings.device == "cpu" else None,
    )
    arguments.lamda_1 = 0.4  # upstream's weight of its penalty
    return Trainer(model=model, args=arguments, train_dataset=examples)


ZERO_2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bfloat16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def instrument(trainer: Any, settings: SimpleNamespace, times: Times) -> None:
    """Let every second step take SAM, and charge what is called to the parts of a step."""
    import torch
    from transformers import TrainerCallback

    import flatpatch.sam.steps as sam
    from flatpatch.sam import RandomState, SAMTrainingStep, perturbed

    loader = trainer.get_train_dataloader

    class Fetching:
        """The trainer's loader of batches, its waiting charged to the data."""

        def __init__(self) -> None:
            self._loader = loader()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

        def __len__(self) -> int:
            return len(self._loader)

        def __iter__(self) -> Iterator[Any]:
            batches = iter(self._loader)
            while True:
                with times.part("data"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    class TimedRandomState(RandomState):
        __init__ = times.charged("random state", RandomState.__init__)  # type: ignore[assignment]
        restore = times.charged("random state", RandomState.restore)  # type: ignore[assignment]

    @contextmanager
    def timed_perturbed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        ascent = perturbed(*args, **kwargs)
        with times.part("ascent step"):
            report = ascent.__enter__()
        try:
            yield report
        finally:
            with times.part("restore"):
                ascent.__exit__(*sys.exc_info())

    trainer.get_train_dataloader = Fetching
    trainer._prepare_inputs = times.charged("data", trainer._prepare_inputs)
    trainer.compute_loss = times.charged("forward", trainer.compute_loss)
    torch.Tensor.backward = times.charged("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    torch.autograd.grad = times.charged("backward", torch.autograd.grad)
    torch.nn.utils.clip_grad_norm_ = times.charged("optimizer", torch.nn.utils.clip_grad_norm_)
    sam.RandomState, sam.perturbed = TimedRandomState, timed_perturbed  # type: ignore[misc,assignment]
    plain_step = trainer.training_step
    sharp_step = SAMTrainingStep(trainer, rho=settings.rho, adaptive=settings.adaptive)
    kinds = {0: ("base", plain_step), 1: ("SAM", sharp_step)}

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = kinds[trainer.state.global_step % 2][1](*args, **kwargs)
        times.wait()  # the trainer's loop does so too, to see whether the loss is finite
        return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            for owner, name, part in (
                (trainer.deepspeed, "backward", "backward"),
                (trainer.deepspeed, "step", "optimizer"),
                (None if trainer.deepspeed else trainer.optimizer, "step", "optimizer"),
            ):
                if owner is not None:
                    setattr(owner, name, times.charged(part, getattr(owner, name)))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.end_step(kinds[(state.global_step - 1) % 2][0])

    trainer.training_step = training_step
    trainer.add_callback(Steps())


def summarise(times: Times, warmup: int) -> dict[str, Any]:
    """Per kind of step and part: milliseconds of every step, on the host and on the device."""
    found: dict[str, Any] = {}
    for kind, whole, parts in times.steps[warmup:]:
        host, device = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        for name, seconds, span in parts:
            host[name] += 1000 * seconds
            device[name] += 1000 * float(span)
        host["the rest of the loop"] = 1000 * whole - sum(host.values())
        device["the rest of the loop"] = 1000 * whole - sum(device.values())
        entry = found.setdefault(kind, {"whole": [], "host": {p: [] for p in PARTS}, "device": {p: [] for p in PARTS}})
        entry["whole"].append(1000 * whole)
        for part in PARTS:
            entry["host"][part].append(host[part])
            entry["device"][part].append(device[part])
    return found


def print_table(found: dict[str, Any], clocks: tuple[str, ...]) -> None:
    base, sharp = found["base"], found["SAM"]
    heads = [f"{kind} {clock}" for clock in clocks for kind in ("base", "SAM", "excess")]
    print(f"{'milliseconds':24}" + "".join(f"{head:>15}" for head in heads))
    passes = {}
    for part in PARTS:
        row = []
        for clock in clocks:
            plain, with_sam = (statistics.median(entry[clock][part]) for entry in (base, sharp))
            passes[clock, part] = plain
            row += [plain, with_sam, with_sam - (2 if part in PASSES else 1) * plain]
        print(f"{part:24}" + "".join(f"{value:15.2f}" for value in row))
    for name, entry in found.items():
        low, middle, high = quartiles(entry["whole"])
        print(
            f"{'whole ' + name + ' step':24}{middle:15.2f}   quartiles {low:.2f} to {high:.2f}, n={len(entry['whole'])}"
        )
    floor = statistics.median(base["whole"]) + sum(passes["host", part] for part in PASSES)
    if len(clocks) == 2:
        floor = statistics.median(base["whole"]) + sum(passes["device", part] for part in PASSES)
    whole = statistics.median(sharp["whole"])
    print(
        f"two passes and the rest of a base step: {floor:.2f} ms; SAM takes {whole:.2f}, {whole - floor:+.2f}; "
        f"ratio to base {whole / statistics.median(base['whole']):.3f}"
    )


def main() -> None:
    settings = read_settings(sys.argv[1:], DEFAULTS, __doc__, CHOICES)
    if settings.warmup < 2 or settings.steps < 4:
        raise SystemExit("warmup= is at least 2 and steps= at least 4, half of them without SAM")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("WANDB_DISABLED", "true")
    import torch

    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(settings.threads)
    if settings.deepspeed:
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": 29556}
        for name, value in variables.items():
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    on_gpu = settings.device.startswith("cuda")
    now = time.process_time if settings.clock == "cpu" else time.perf_counter
    times = Times(torch.device(settings.device), torch.cuda.synchronize if on_gpu else lambda: None, now)
    upstream = upstream_sources(settings.trainer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, upstream, folder)
        instrument(trainer, settings, times)
        gc.disable()
        trainer.train()
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "trainer": f"{type(trainer).__module__}.{type(trainer).__name__}",
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    found = summarise(times, settings.warmup)
    print_table(found, ("host", "device") if on_gpu else ("host",))
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"settings": vars(settings), "environment": environment, "results": found}, indent=2))
    print(f"saved to {out}")


if __name__ == "__main__":
    main()

"""Time a loss landscape beside the forward passes it needs, and beside loss-landscape's way of doing it, in one run.

    python benchmarks/landscape.py                      # a 1 M-parameter transformer with LoRA, 25 x 25 points
    python benchmarks/landscape.py scope=model side=9 rounds=3

All evaluate the same loss of the same sequences at as many points, in float32. Every round runs each once, in a
changing order, so that whatever else the machine does falls on all alike; the ratios are of medians. On a CPU the time
is that of the processor, which others' programs disturb less than the clock's.

- forward: the passes alone, with the weights where they are; one more than there are points, as ours measures the loss
  at the weights too.
- ours: ``flatpatch.flatness.landscape`` with two filter-normalised random directions.
- loss-landscape: as its plotter goes over a grid: new tensors for all parameters at every point, frozen ones too.

Settings (key=value): scope=adapter|merged|model  side=25  samples=256  batch=64  rounds=3  threads=1  device=cpu|cuda
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from key_values import DEVICES, read_settings
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flatpatch.flatness.directions import random_direction
from flatpatch.flatness.landscape import landscape
from flatpatch.flatness.problem import Problem, supervised_loss

DEFAULTS = {
    "scope": "adapter",
    "side": 25,
    "samples": 256,
    "batch": 64,
    "rounds": 3,
    "threads": 1,
    "device": "cpu",
}
CHOICES = {"scope": ("adapter", "merged", "model"), "device": DEVICES}
WIDTH, HEADS, LAYERS, VOCABULARY, CLASSES, RANK, LENGTH = 128, 4, 4, 1000, 10, 8, 32


class LoraLinear(nn.Linear):
    """W x + 2 B A x."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, WIDTH, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + 2 B A x, (..., width)."""
        return super().forward(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = LoraLinear(), nn.Linear(WIDTH, WIDTH), LoraLinear(), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a batch of sequences, (batch, length, width)."""
        y = self.first(x)
        q, k, v = (f(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class Classifier(nn.Module):
    """The mean of the last block's outputs, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes) of tokens (batch, length)."""
        return self.head(self.blocks(self.table(x)).mean(dim=1))


def main(words: list[str]) -> None:
    """Run the rounds and print the ratios."""
    settings = read_settings(words, DEFAULTS, __doc__, CHOICES)
    side, samples, batch, rounds = settings.side, settings.samples, settings.batch, settings.rounds
    device = torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = Classifier().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    inputs = torch.randint(VOCABULARY, (samples, LENGTH), device=device).split(batch)
    targets = torch.randint(CLASSES, (samples,), device=device).split(batch)
    batches = list(zip(inputs, targets, strict=True))
    problem = Problem(model, batches, supervised_loss(F.cross_entropy), scope=settings.scope)
    directions = [random_direction(problem, seed=seed) for seed in (0, 1)]
    axis = np.linspace(-1, 1, side)

    @torch.no_grad()
    def mean_loss() -> float:
        return sum(F.cross_entropy(model(x), y).item() * len(y) for x, y in batches) / samples

    def forward() -> None:
        model.eval()
        for _ in range(side * side + 1):
            mean_loss()

    def ours() -> None:
        landscape(problem, directions, [axis, axis])

    def peer() -> None:
        model.eval()
        weights = [parameter.data for parameter in model.parameters()]
        u, v = ([torch.randn_like(weight) for weight in weights] for _ in range(2))
        for a in axis:
            for b in axis:
                for parameter, weight, d1, d2 in zip(model.parameters(), weights, u, v, strict=True):
                    parameter.data = weight + d1 * a + d2 * b
                mean_loss()
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    jobs: dict[str, Callable[[], None]] = {"forward": forward, "ours": ours, "loss-landscape": peer}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    mean_loss()
    for turn in range(rounds):
        names = list(jobs)
        for name in names[turn % 3 :] + names[: turn % 3]:
            start = clock()
            jobs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    base = statistics.median(seconds["forward"])
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {problem.size:,} varied, {side} x {side} points, {samples} samples")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:15s} {middle:8.2f} s   {middle / base:6.3f} x forward   (rounds: {min(times):.2f}-{max(times):.2f})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

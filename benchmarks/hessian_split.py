"""Say where the time of a Hessian product, and of a search for eigenvalues, goes: on a CPU or a GPU, in one run.

    python benchmarks/hessian_split.py                       # a small T5 with LoRA, on the CPU
    python benchmarks/hessian_split.py device=cuda size=large batch=16 length=128

The model is a T5 of random weights with LoRA of rank 8 on queries and values, in float32. Timed are, in turn within
every round: a naive product that builds its graph anew (two calls of torch.autograd.grad); our product with the graph
kept, and with memory_budget=0; then the search for ``values`` eigenvalues with each of the ``blocks``. Of all but the
naive one the seconds are split by what they went into; on a GPU each part waits for the device, which makes the whole
a little slower than undisturbed (the column "undisturbed" is without). The last lines say which block would have been
the fastest by the products that it needed and the seconds that a product took in it.

Settings (key=value): device=cpu|cuda  size=tiny|small|large  batch=8  length=32  values=5  blocks=1,4,8  rounds=3
threads=1  clock=wall|cpu (the process's own time, for a CPU shared with others)
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from key_values import CLOCKS, DEVICES, read_settings

DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "size": "small",
    "batch": 8,
    "length": 32,
    "values": 5,
    "blocks": "1,4,8",
    "rounds": 3,
    "threads": 1,
    "clock": "wall",
}
SIZES = {
    "tiny": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    "small": {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 6, "num_heads": 6, "vocab_size": 512},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128},
}
CHOICES: dict[str, Any] = {"device": DEVICES, "size": SIZES, "clock": CLOCKS}
# Where each part's work is done: module, class (or none), function.
PARTS = {
    "content sums": [("operator", "HessianOperator", "_sums")],
    "building graphs": [("operator", "HessianOperator", "_build")],
    "products": [("operator", "HessianOperator", "_vector_products")],
    "orthogonalising": [
        ("basis", "Basis", "remove_from"),
        ("basis", "Basis", "append"),
        ("basis", "Basis", "replace"),
        ("basis", "Basis", "combine"),
        ("eigenvalues", "", "orthonormal_columns"),
    ],
    "small eigenproblem": [("eigenvalues", "_Search", "ritz_pairs")],
    "rest of products": [("operator", "HessianOperator", "matmat")],
}
STATE, REST = "model's state", "rest"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Split:
    """Exclusive times by part: what a part's work calls for in another part counts for that one alone."""

    def __init__(self, device: str, clock: str) -> None:
        self._wait = device == "cuda"
        self._clock = time.process_time if clock == "cpu" else time.perf_counter
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        if self._wait:
            import torch

            torch.cuda.synchronize()
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for a part."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Time a piece of work as a whole, without parts."""
        self._switch()
        start = self._since
        result = work()
        self._switch()
        return self._since - start, result


@contextmanager
def watched(split: Split) -> Iterator[None]:
    """Let the parts of flatpatch's flatness tell the split when they begin and end."""
    import importlib

    from flatpatch.flatness.problem import Problem

    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def within(name: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            with split.part(name):
                return function(*arguments, **options)

        return run

    active = Problem.active

    @contextmanager
    def timed_active(self: Problem) -> Iterator[None]:
        block = active(self)
        with split.part(STATE):
            block.__enter__()
        try:
            yield
        finally:
            with split.part(STATE):
                block.__exit__(*sys.exc_info())

    replace(Problem, "active", timed_active)
    for name, places in PARTS.items():
        for module, owner, function in places:
            found = importlib.import_module(f"flatpatch.flatness.{module}")
            place = getattr(found, owner) if owner else found
            replace(place, function, within(name, getattr(place, function)))
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def make_problem(settings: SimpleNamespace) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    from flatpatch.flatness import Problem

    torch.manual_seed(0)
    config = T5Config(**SIZES[settings.size], decoder_start_token_id=0)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=["q", "v"])
    model = get_peft_model(T5ForConditionalGeneration(config), lora).to(settings.device).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # as if trained for a while
    shape = (settings.batch, settings.length)
    tokens = torch.randint(1, config.vocab_size, shape)
    labels = torch.randint(1, config.vocab_size, (settings.batch, max(settings.length // 8, 1)))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return Problem(model, [batch], scope="trainable")


def print_split(name: str, undisturbed: float, split: dict[str, float], products: int) -> None:
    total = sum(split.values())
    print(f"\n{name}: {undisturbed:.3f} s undisturbed, {total:.3f} s while split, {products} products")
    for part, seconds in sorted(split.items(), key=lambda item: -item[1]):
        each = 1e3 * seconds / products
        print(f"  {part:<20} {seconds:9.3f} s {100 * seconds / total:5.1f} %  {each:8.1f} ms a product")


def main(words: list[str]) -> None:
    settings = read_settings(words, DEFAULTS, __doc__, CHOICES)
    import torch

    torch.set_num_threads(settings.threads)
    from flatpatch.flatness import HessianOperator, best_block_size, lanczos

    problem = make_problem(settings)
    name = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    print(
        f"T5 {settings.size}, {problem.size:,} weights varied, {settings.batch} x {settings.length} tokens, float32; "
        f"torch {torch.__version__}, {name}, {settings.threads} threads, {settings.rounds} rounds"
    )
    v = torch.randn(problem.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(settings.device)
    kept = HessianOperator(problem, compile=False)
    rebuilt = HessianOperator(problem, memory_budget=0, compile=False)
    batch, pieces = problem.batches[0], problem.unflatten(v)

    def naive() -> Any:
        gradients = torch.autograd.grad(problem.model(**batch).loss, problem.variables, create_graph=True)
        return torch.autograd.grad(gradients, problem.variables, pieces)

    ways: dict[str, Callable[[], Any]] = {
        "naive product, graph rebuilt": naive,
        "our product, graph kept": lambda: kept.matvec(v),
        "our product, graph rebuilt": lambda: rebuilt.matvec(v),
    }
    plain = Split(settings.device, settings.clock)
    times: dict[str, list[float]] = {way: [] for way in ways}
    splits: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for way in ways.values():
        way()
    for _ in range(settings.rounds):
        for way, work in ways.items():
            times[way].append(plain.timed(work)[0])
            split = Split(settings.device, settings.clock)
            with watched(split), split.part(REST):
                work()
            splits[way].append(split.seconds)
    for way, rounds in splits.items():
        parts = {part for each in rounds for part in each}
        medians = {part: statistics.median(each.get(part, 0.0) for each in rounds) for part in parts}
        print_split(way, statistics.median(times[way]), medians, 1)

    needed, seconds = {}, {}
    for block in map(int, settings.blocks.split(",")):
        operator = HessianOperator(problem, compile=False)
        operator.matmat(v.unsqueeze(1).repeat(1, block))  # the graph, and on a GPU how many vectors fit
        vectors = torch.randn(problem.size, block, dtype=torch.float64).to(settings.device)
        took = statistics.median(
            plain.timed(lambda operator=operator, vectors=vectors: operator.matmat(vectors))[0]
            for _ in range(settings.rounds)
        )
        undisturbed, pairs = plain.timed(
            lambda operator=operator, block=block: lanczos(operator, settings.values, block_size=block)
        )
        split = Split(settings.device, settings.clock)
        with watched(split), split.part(REST):
            lanczos(operator, settings.values, block_size=block)
        print_split(f"{settings.values} eigenvalues, block of {block}", undisturbed, split.seconds, pairs.products)
        needed[block], seconds[block] = pairs.products, took / block
        operator.release()
    print("\nblock  products needed  seconds a product  both together")
    for block in needed:
        print(f"{block:5d} {needed[block]:16d} {seconds[block]:18.4f} {needed[block] * seconds[block]:14.2f} s")
    best = min(needed, key=lambda block: needed[block] * seconds[block])
    print(f"fastest here: block_size={best}; by the times of a product alone: {best_block_size(seconds)}")


if __name__ == "__main__":
    main(sys.argv[1:])

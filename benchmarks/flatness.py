"""Time eigenvalues, trace and density of a Hessian: ours, and those of the peers that are installed, in one run.

    python benchmarks/flatness.py                       # a 1 M-parameter transformer with LoRA, on CPU
    python benchmarks/flatness.py scope=model           # all of its parameters
    python benchmarks/flatness.py jobs=eigenvalues rounds=3 compile=1
    python benchmarks/flatness.py width=64 rank=4 layers=1 samples=16 length=16 rounds=5  # small enough for the truth

All measure the same loss, weights and samples in float32: 256 sequences of 32 tokens, labels of 2 classes; the weights
have had 20 steps of Adam on 32 of them. Every round runs each tool once, in a changing order and with other random
vectors, so that whatever else the machine does falls on all alike; the ratios are of medians. With compile=1 our
compiled products are a tool of their own, whose time for compiling is printed apart and not part of its seconds.
Accuracy is printed beside the time, since a time alone says nothing: for eigenvalues the largest relative residual |H
x - theta x| / |theta| of the five, by our own operator in float64, and the largest relative error of the five values,
both of the last round. Of at most 2,048 numbers that vary the whole Hessian is made once, and trace and density are
held to its eigenvalues, as root mean squares over the rounds: the trace's error over the trace, and the area between
the two distribution functions over the mean magnitude (1 would be all eigenvalues taken as zero). Of more numbers it
is the trace's standard error over the estimate, as the samples of ours and of plain tell it.

- eigenvalues: the five of largest magnitude, which all can find. Ours: Lanczos to a residual of 1e-3. curvlinops:
  scipy's eigsh with tol=1e-3. hessian-eigenthings: 50 Lanczos steps, the most it reorthogonalises (its default of 10
  does not converge). PyHessian: its default.
- trace: 30 random vectors of signs (Hutchinson), tol=0, so that all take as many products; plain is our way of doing
  that. Ours: XTrace by 16 products.
- density: 4 probes of 50 Lanczos steps; plain is our way of doing that. curvlinops looks for the ends of the spectrum
  first, as it must. Ours: eight eigenvalues of largest magnitude, to a residual of 5 %, then one probe of 30 steps
  beside them.

A peer that is missing, or that fails, is named with the reason. PyHessian must be newer than its release 0.1, whose
density calls a function that torch no longer has.

clock=cpu counts this process's own time, for a CPU shared with others; use it with threads=1. Compiling is left out of
either clock, and its seconds, printed apart, are always those of the wall's.

Settings (key=value): jobs=eigenvalues,trace,density  tools=all (or some of ours,plain,compiled,eigenthings,
curvlinops,pyhessian)  scope=adapter|model  width=128  rank=8  layers=4  samples=256  length=32  batch=256  training=20
rounds=1  threads=1  compile=0  device=cpu|cuda  clock=wall|cpu  out=runs/benchmarks/flatness.json
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from key_values import CLOCKS, DEVICES, read_settings

DEFAULTS: dict[str, Any] = {
    "jobs": "eigenvalues,trace,density",
    "tools": "all",
    "scope": "adapter",
    "samples": 256,
    "length": 32,
    "batch": 256,
    "layers": 4,
    "width": 128,
    "rank": 8,
    "training": 20,
    "rounds": 1,
    "compile": 0,
    "threads": 1,
    "clock": "wall",
    "device": "cpu",
    "out": "runs/benchmarks/flatness.json",
}
CHOICES = {"scope": ("adapter", "model"), "device": DEVICES, "clock": CLOCKS}
HEADS, VOCABULARY, CLASSES = 4, 1000, 2
VALUES, PROBES, STEPS, VECTORS = 5, 4, 50, 30
XTRACE, LEADING, STEPS_BESIDE = 16, 8, 30
DENSE = 2048

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make_model(layers: int, width: int = 128, rank: int = 8) -> Any:
    """Build a small transformer with LoRA on its queries and values; plain attention, which all peers can take."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(width, width)
            self.lora_A = nn.Linear(width, rank, bias=False)
            self.lora_B = nn.Linear(rank, width, bias=False)
            nn.init.normal_(self.lora_B.weight, std=0.1)  # as if trained for a while

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 2 * self.lora_B(self.lora_A(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.out = Lora(), nn.Linear(width, width), Lora(), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            split = (*h.shape[:2], HEADS, width // HEADS)
            q, k, v = (layer(h).reshape(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
            attention = torch.softmax(q @ k.transpose(-1, -2) * split[-1] ** -0.5, dim=-1)
            x = x + self.out((attention @ v).transpose(1, 2).reshape(h.shape))
            return x + self.down(F.gelu(self.up(self.second(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.blocks(self.embedding(tokens))).mean(dim=1))

    torch.manual_seed(0)
    return Model().eval()


class _Bench:
    """The problem, and for each job the tools that do it: functions that return products, values and vectors."""

    def __init__(self, settings: SimpleNamespace) -> None:
        import torch
        import torch.nn.functional as F

        from flatpatch import flatness

        self.settings, self.torch, self.flatness = settings, torch, flatness
        self.compile_seconds = self.compile_clock = 0.0
        self.seed = 3
        self.clock = time.process_time if settings.clock == "cpu" else time.perf_counter
        self.model = make_model(settings.layers, settings.width, settings.rank).to(settings.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(settings.scope == "model" or "lora_" in name)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (settings.samples, settings.length), generator=generator)
        labels = (tokens[:, 0] < VOCABULARY // 2).long()
        pairs = zip(tokens.split(settings.batch), labels.split(settings.batch), strict=True)
        self.batches = [(x.to(settings.device), y.to(settings.device)) for x, y in pairs]
        self.criterion = torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(settings.training):  # at random weights the spectrum says nothing
            x, y = self.batches[0]
            optimizer.zero_grad()
            F.cross_entropy(self.model(x[:32]), y[:32]).backward()
            optimizer.step()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        double = copy.deepcopy(self.model).double()
        self.exact = flatness.HessianOperator(self.problem(double), compile=False)

    def problem(self, model: Any) -> Any:
        return self.flatness.Problem(
            model, self.batches, self.flatness.supervised_loss(self.criterion), scope="trainable", check=False
        )

    def operator(self, compile: bool = False) -> Any:
        return self.flatness.HessianOperator(self.problem(self.model), compile=compile)

    def eigenthings(self, peer: ModuleType) -> Any:
        def loss(model: Any, batch: Any) -> Any:
            return self.criterion(model(batch[0]), batch[1])

        return peer.HessianOperator(self.model, self.batches, loss)

    def curvlinops(self, peer: ModuleType) -> Any:
        return peer.HessianLinearOperator(
            self.model, self.criterion, self.parameters, self.batches, check_deterministic=False
        )

    def pyhessian(self, peer: ModuleType) -> Any:
        data = {"data": self.batches[0]} if len(self.batches) == 1 else {"dataloader": self.batches}
        return peer.hessian(self.model, self.criterion, cuda=self.settings.device == "cuda", **data)

    def compiled(self, job: str, peer: ModuleType) -> Any:
        operator = self.operator(compile=True)
        compile_batch = operator._compile

        def timed_apart(*arguments: Any) -> None:
            start = self.clock()
            compile_batch(*arguments)
            self.compile_clock += self.clock() - start

        operator._compile = timed_apart
        result = getattr(self, f"{job}_ours")(peer, operator)
        self.compile_seconds = operator.compile_seconds
        return result

    # --- the five largest eigenvalues: (products, values, vectors as columns)

    def eigenvalues_ours(self, peer: ModuleType, operator: Any = None) -> Any:
        pairs = self.flatness.lanczos(operator or self.operator(), VALUES, which="magnitude", tol=1e-3, seed=self.seed)
        return pairs.products, pairs.values, pairs.vectors

    def eigenvalues_eigenthings(self, peer: ModuleType) -> Any:
        operator = self.eigenthings(peer)
        found = peer.lanczos(operator, k=VALUES, max_iter=50, which="LM", reorthogonalize=True, seed=self.seed)
        return found.iterations, found.eigenvalues, found.eigenvectors.T

    def eigenvalues_curvlinops(self, peer: ModuleType) -> Any:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = self.curvlinops(peer).to_scipy(dtype=np.float32)
        products = [0]

        def multiply(v: Any) -> Any:
            products[0] += 1
            return operator @ v

        counted = LinearOperator(operator.shape, matvec=multiply, dtype=np.float32)
        start = np.random.default_rng(self.seed).standard_normal(operator.shape[0]).astype(np.float32)
        values, vectors = eigsh(counted, VALUES, which="LM", tol=1e-3, v0=start)
        return products[0], self.torch.from_numpy(values), self.torch.from_numpy(vectors)

    def eigenvalues_pyhessian(self, peer: ModuleType) -> Any:
        operator = self.pyhessian(peer)
        values, vectors = operator.eigenvalues(top_n=VALUES)
        flat = [self.torch.cat([part.flatten() for part in vector]) for vector in vectors]
        return None, self.torch.tensor(values), self.torch.stack(flat, dim=1)

    def spectrum(self) -> Any:
        """Return all eigenvalues of the whole Hessian, or None where it is too large."""
        operator = self.operator()
        if operator.size > DENSE:
            return None
        unit = self.torch.eye(operator.size, dtype=self.torch.float64)
        parts = [operator.matmat(columns) for columns in unit.split(64, dim=1)]
        dense = self.torch.cat(parts, dim=1)
        return self.torch.linalg.eigvalsh((dense + dense.T) / 2).cpu()

    # --- the trace: (products, estimate, standard error)

    def trace_ours(self, peer: ModuleType, operator: Any = None) -> Any:
        found = self.flatness.xtrace(operator or self.operator(), num_products=XTRACE, seed=self.seed)
        return found.products, found.value, found.standard_error

    def trace_plain(self, peer: ModuleType) -> Any:
        found = self.flatness.hutchinson(self.operator(), num_probes=VECTORS, seed=self.seed)
        return found.products, found.value, found.standard_error

    def trace_eigenthings(self, peer: ModuleType) -> Any:
        found = peer.trace(self.eigenthings(peer), num_matvecs=VECTORS, method="hutchinson", seed=self.seed)
        return VECTORS, found.estimate

    def trace_curvlinops(self, peer: ModuleType) -> Any:
        return VECTORS, peer.hutchinson_trace(self.curvlinops(peer), VECTORS)

    def trace_pyhessian(self, peer: ModuleType) -> Any:
        found = self.pyhessian(peer).trace(maxIter=VECTORS, tol=0)
        return len(found), sum(found) / len(found)

    # --- the density: (products, nodes and weights, or None from a tool that gives a curve alone)

    def density_ours(self, peer: ModuleType, operator: Any = None) -> Any:
        operator = operator or self.operator()
        known = self.flatness.lanczos(operator, LEADING, which="magnitude", tol=5e-2, seed=self.seed + 1000)
        found = self.flatness.quadrature(operator, num_probes=1, num_steps=STEPS_BESIDE, known=known, seed=self.seed)
        return known.products + found.products, (found.nodes, found.weights)

    def density_plain(self, peer: ModuleType) -> Any:
        found = self.flatness.quadrature(self.operator(), num_probes=PROBES, num_steps=STEPS, seed=self.seed)
        return found.products, (found.nodes, found.weights)

    def density_eigenthings(self, peer: ModuleType) -> Any:
        peer.spectral_density(self.eigenthings(peer), num_runs=PROBES, lanczos_steps=STEPS, seed=self.seed)
        return PROBES * STEPS, None

    def density_curvlinops(self, peer: ModuleType) -> Any:
        peer.lanczos_approximate_spectrum(self.curvlinops(peer), STEPS, num_repeats=PROBES)
        return None, None

    def density_pyhessian(self, peer: ModuleType) -> Any:
        found = self.pyhessian(peer).density(iter=STEPS, n_v=PROBES)
        rows = [self.torch.tensor([[complex(x).real for x in row] for row in part]).double() for part in found]
        return PROBES * STEPS, rows


TOOLS = {
    "ours": "flatpatch.flatness",
    "plain": "flatpatch.flatness",
    "compiled": "flatpatch.flatness",
    "eigenthings": "hessian_eigenthings",
    "curvlinops": "curvlinops",
    "pyhessian": "pyhessian",
}


def timed(bench: _Bench, job: str, tool: str) -> tuple[float, Any]:
    peer = importlib.import_module(TOOLS[tool])
    call: Callable[[ModuleType], Any]
    call = functools.partial(bench.compiled, job) if tool == "compiled" else getattr(bench, f"{job}_{tool}")
    bench.compile_seconds = bench.compile_clock = 0.0
    bench.torch.manual_seed(bench.seed)
    if bench.settings.device == "cuda":
        bench.torch.cuda.synchronize()
    start = bench.clock()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        result = call(peer)
    if bench.settings.device == "cuda":
        bench.torch.cuda.synchronize()
    seconds = bench.clock() - start - bench.compile_clock
    if bench.compile_seconds:
        print(f"({job}: {bench.compile_seconds:.1f} s of compiling)")
    for parameter in bench.model.parameters():
        parameter.grad = None
    return seconds, result


def distance(torch: Any, nodes: Any, weights: Any, spectrum: Any) -> float:
    """Return the area between two distribution functions over the eigenvalues' mean magnitude."""
    points = torch.cat([nodes.flatten(), spectrum])
    shares = torch.cat([weights.flatten() / len(weights), torch.full_like(spectrum, -1 / len(spectrum))])
    order = points.argsort()
    apart = shares[order].cumsum(0).abs()[:-1]
    return float((apart * points[order].diff()).sum() / spectrum.abs().mean())


def accuracy(bench: _Bench, job: str, results: list[Any], reference: Any) -> dict[str, float]:
    def over_rounds(errors: list[float]) -> float:
        return statistics.fmean(error**2 for error in errors) ** 0.5

    if job == "trace" and reference is not None:
        truth = float(reference.sum())
        return {"error": over_rounds([float(result[1]) / truth - 1 for result in results])}
    if job == "trace":
        told = [result[2] / result[1] for result in results if len(result) > 2]
        return {"estimate": float(results[-1][1]), **({"standard_error": over_rounds(told)} if told else {})}
    if job == "density":
        if reference is None or results[-1][1] is None:
            return {}
        return {"distance": over_rounds([distance(bench.torch, *result[1], reference) for result in results])}
    _, values, vectors = results[-1]
    values, vectors = values.double().cpu(), vectors.detach().double().to(bench.settings.device)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order] / vectors[:, order].norm(dim=0)
    rest = (bench.exact.matmat(vectors) - vectors * values.to(vectors.device)).norm(dim=0).cpu()
    return {
        "residual": float((rest / values.abs()).max()),
        "error": float(((values - reference) / reference).abs().max()),
    }


def main(words: list[str]) -> None:
    settings = read_settings(words, DEFAULTS, __doc__, CHOICES)
    chosen = list(TOOLS) if settings.tools == "all" else settings.tools.split(",")
    if unknown := set(chosen) - set(TOOLS):
        sys.exit(f"unknown tools {sorted(unknown)}; known: {', '.join(TOOLS)}")
    import torch

    torch.set_num_threads(settings.threads)
    bench = _Bench(settings)
    print(
        f"{sum(p.numel() for p in bench.model.parameters()):,} parameters, {sum(p.numel() for p in bench.parameters):,}"
        f" of them varied; {settings.samples} x {settings.length} tokens in {len(bench.batches)} batches; "
        f"torch {torch.__version__}, {settings.device}, {settings.threads} threads, {settings.rounds} rounds"
    )
    rows = []
    spectrum = bench.spectrum()
    for job in settings.jobs.split(","):
        reference = spectrum
        if job == "eigenvalues":
            reference = bench.flatness.lanczos(bench.exact, VALUES, which="magnitude", tol=1e-5, seed=9).values.cpu()
            bench.exact.release()
            print(f"\neigenvalues: {', '.join(f'{v:.5g}' for v in reference)}")
        seconds: dict[str, list[float]] = {}
        results: dict[str, list[Any]] = {}
        failures: dict[str, str] = {}
        for number in range(settings.rounds):
            bench.seed = 3 + number
            tools = [tool for tool in chosen if tool != "compiled" or settings.compile]
            tools = [tool for tool in tools if tool != "plain" or job != "eigenvalues"]
            for tool in tools[number % len(tools) :] + tools[: number % len(tools)]:
                if tool in failures:
                    continue
                try:
                    took, result = timed(bench, job, tool)
                    results.setdefault(tool, []).append(result)
                    print(f"({job}, {tool}: {took:.2f} s)", file=sys.stderr, flush=True)
                    seconds.setdefault(tool, []).append(took)
                except Exception as error:  # one peer's failure must not lose the others' times
                    failures[tool] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        base = "ours" if "ours" in chosen else chosen[0]
        if base in failures:
            raise RuntimeError(failures[base])
        ours = statistics.median(seconds[base])
        print(f"\n{job:<12} {'seconds':>8} {'ratio':>6} {'products':>9}")
        for tool, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
            found = accuracy(bench, job, results[tool], reference)
            bench.exact.release()
            row = {
                "job": job,
                "tool": tool,
                "seconds": statistics.median(times),
                "ratio": statistics.median(times) / ours,
                "products": results[tool][-1][0],
                **found,
            }
            rows.append(row)
            extra = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            products = row["products"] if row["products"] is not None else "-"
            print(f"{tool:<12} {row['seconds']:8.2f} {row['ratio']:6.2f} {products:>9}  {extra}")
        for tool, reason in failures.items():
            print(f"{tool:<12} not measured: {reason}")
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"settings": vars(settings), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

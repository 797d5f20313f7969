"""Two processes of DistributedDataParallel: does each perturb by its own gradient, or all by the mean?

With the loss ``L_r`` on rank r, the paper's way (Foret et al. 2021, Sec. 4.1) is ``e_r = rho g_r / |g_r|``, and the
descent takes the mean of ``grad L_r(w + e_r)``. The other way takes one ``e`` from the mean of all ``g_r``: SAM of the
whole batch, with less effect as there are more ranks. Both are SAM; a mixture of them, or ranks that part, are not.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.audit.checks import CLOSE, Finding, Quadratic, raised, relative, short
from benchmarks.audit.rows import NotOfferedError, Order, Row

RANKS = 2
MANY = 100
NAME, DEMAND = "two ranks", "Perturbs per rank or by the mean gradient, and ranks stay equal (gloo, CPU)"


def audit(rows: Sequence[Row], checkouts: Path) -> dict[str, Finding]:
    """Take one step of each implementation on two ranks; returns a finding for each row's name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(_rank, args=(tuple(rows), checkouts, folder), nprocs=RANKS)
        ended = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {row.name: _finding([ranks[row.name] for ranks in ended]) for row in rows}


def _rank(rank: int, rows: Sequence[Row], checkouts: Path, folder: Path) -> None:
    sys.dont_write_bytecode = True
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    ended = {}
    for row in rows:
        try:
            ended[row.name] = _step(row, checkouts, rank)
        except NotOfferedError as error:
            ended[row.name] = Finding("not offered", "", str(error))
        except Exception as error:
            ended[row.name] = raised(error)
    torch.save(ended, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _step(row: Row, checkouts: Path, rank: int) -> tuple[Tensor, Tensor]:
    """Return the weights after one step in float64, and after many in float32."""
    module = row.source.load(checkouts)
    ended = []
    for steps, dtype in ((1, torch.float64), (MANY, torch.float32)):
        problem = Quadratic(seed=rank, dtype=dtype)
        model = DistributedDataParallel(problem)
        stepper = row.make(module, Order(model, [{"params": [problem.first_weight, problem.second_weight]}]))

        def passes(model: DistributedDataParallel = model) -> Tensor:
            loss: Tensor = model()
            loss.backward()
            return loss

        for _ in range(steps):
            stepper.step(passes)
        ended.append(problem.flat().detach())
    return ended[0], ended[1]


def _finding(ended: Sequence[tuple[Tensor, Tensor] | Finding]) -> Finding:
    for end in ended:
        if isinstance(end, Finding):
            return end
    problems = [Quadratic(seed=rank) for rank in range(RANKS)]
    start = problems[0].flat().detach()
    gradients = [problem.gradient(start) for problem in problems]
    ways = {"per rank": gradients, "by the mean": [torch.stack(gradients).mean(0)] * RANKS}
    errors = {}
    for way, directions in ways.items():
        moved = [start + 0.1 * direction / direction.norm() for direction in directions]
        final = torch.stack([p.gradient(w) for p, w in zip(problems, moved, strict=True)]).mean(0)
        errors[way] = max(relative(weights, start - 0.1 * final, start) for weights, _ in ended)
    way = min(errors, key=lambda name: errors[name])
    if not errors[way] <= CLOSE:
        return Finding("fail", short(errors[way]), f"of the step's length away from either way; the nearer is {way}")
    first, second = (weights for _, weights in ended)
    if torch.equal(first, second):
        return Finding("pass", way)
    apart = short(float((first - second).norm() / first.norm()))
    return Finding("fail", f"{way}; {apart}", f"relative, is how far the ranks' float32 weights part in {MANY} steps")

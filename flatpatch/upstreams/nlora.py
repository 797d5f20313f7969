"""N-LoRA: LoRA factors kept apart by an l1 penalty."""

from __future__ import annotations

from flatpatch.families.base import AS_SHIPPED, PAPER_PROFILE, Argument, Conflict, GpuMemory
from flatpatch.families.text.upstream import DECLARED_ALONE, TextUpstream

_PAPER = "N-LoRA's paper (arXiv:2410.10179), by secondary sources"

UPSTREAM = TextUpstream(
    name="nlora",
    gpu_memory=GpuMemory(30.1, "T5-large, ZeRO-2 with offload, SAM off or on"),
    title="N-LoRA",
    repository="N-LoRA",
    default=True,
    scripts={
        **{str(n): f"scripts/order_{n}.sh" for n in range(1, 7)},
        **{f"llama{n}": f"scripts_llama/order_{n}.sh" for n in range(1, 4)},
    },
    unused=("lamda_2", *DECLARED_ALONE),
    # Upstream's is 0.4. At that strength the small model stays below 60 % on the first task after 100 steps.
    quick={"lamda_1": 0.05},
    metric_words={"sample_weighted_accuracy": "predict_exact_match"},
    conflicts=(
        Conflict(
            "order 1: batch",
            "32",
            "48 (32 in the other orders)",
            PAPER_PROFILE,
            f"{_PAPER}; scripts/order_1.sh",
            (Argument(("1",), "per_device_train_batch_size", "32"),),
        ),
        Conflict(
            "penalty",
            "L1 norm of the weight update BA",
            "L1 norm of the r x r product AB: another regulariser, on another scale",
            AS_SHIPPED,
            f"{_PAPER}; src/",
        ),
        Conflict(
            "seeds",
            "not said",
            "no seed passed, which means 42; no repeats",
            "seed 42 unless `seed=` says otherwise; `sweep` runs several",
            "scripts/",
        ),
        Conflict(
            "budget beside O-LoRA",
            "O-LoRA's rows are quoted",
            "10 epochs a task, O-LoRA 1",
            "as the repositories: the two are not runs of equal budget",
            f"{_PAPER}; scripts/",
        ),
        Conflict(
            "weight of the penalty, learning rate",
            "not said",
            "chosen per order, in order 4 per task",
            AS_SHIPPED,
            "scripts/order_4.sh to order_6.sh",
        ),
        Conflict(
            "versions",
            "-",
            "deepspeed 0.15.4; O-LoRA, whose numbers it quotes, 0.10.0",
            "requirements.lock; each difference is in the run's record",
            "requirements.txt",
        ),
    ),
)

"""Where a paper and its own repository disagree, and what flatpatch runs: one row each, with the source.

``DEVIATIONS.md`` is written from these rows (``python -m flatpatch.upstreams.conflicts > DEVIATIONS.md``), and
``profile=paper`` takes its changes from them, so the page and the runs cannot say different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperArgument:
    """An argument that ``profile=paper`` sets.

    ``where`` holds the task orders (N-LoRA, O-LoRA) or the shipped configuration files (InfLoRA, CL-LoRA) concerned;
    ``value`` is a word for a command line, or any JSON value for a configuration file.
    """

    where: tuple[str, ...]
    argument: str
    value: Any


@dataclass(frozen=True)
class Conflict:
    """One disagreement between a paper and its repository."""

    subject: str
    paper: str
    repository: str
    here: str
    source: str
    arguments: tuple[PaperArgument, ...] = ()


_AS_SHIPPED = "as the repository"
_PAPER_PROFILE = "as the repository; `profile=paper`: as the paper"
_INFLORA = "InfLoRA's paper (arXiv:2404.00228), by secondary sources"
_CLLORA = "CL-LoRA's paper (arXiv:2505.24816), read in full"
_OLORA = "O-LoRA's paper (arXiv:2310.14152), by secondary sources"
_NLORA = "N-LoRA's paper (arXiv:2410.10179), by secondary sources"
_DOMAINNET = ("configs/domainnet_inflora.json", "configs/domainnet_inflorab5.json")

CONFLICTS: Mapping[str, tuple[Conflict, ...]] = {
    "InfLoRA": (
        Conflict(
            "DomainNet: optimizer, learning rate, rank",
            "Adam, 5e-4, rank 20",
            "SGD, 5e-3 (head 1e-2), rank 30",
            _PAPER_PROFILE
            + " (with Adam the code gives the head the same learning rate and takes its cosine schedule, not "
            "MultiStep)",
            f"{_INFLORA}; {', '.join(_DOMAINNET)}",
            (
                PaperArgument(_DOMAINNET, "optim", "adam"),
                PaperArgument(_DOMAINNET, "lrate", 0.0005),
                PaperArgument(_DOMAINNET, "rank", 20),
            ),
        ),
        Conflict(
            "InfLoRA-b5, ImageNet-R in 5 tasks: threshold",
            "0.99",
            "0.98",
            _PAPER_PROFILE,
            f"{_INFLORA}; configs/mimg5_inflorab5.json",
            (PaperArgument(("configs/mimg5_inflorab5.json",), "lamb", 0.99),),
        ),
        Conflict(
            "InfLoRA with classifier alignment (`variant=infloraca`): optimizer",
            "Adam everywhere",
            "SGD",
            "as the repository, in `profile=paper` too",
            f"{_INFLORA}; configs/cifar100_infloraca.json, configs/mimg10_infloraca.json",
        ),
        Conflict(
            "InfLoRA with classifier alignment (`variant=infloraca`): second stage, from task 2 on",
            "-",
            "the classifier is trained again after each task, in a loop with its own SGD",
            "as the repository: SAM does not perturb there, no step of it is recorded, and `measure_when=after` "
            "measures the model before it",
            "methods/inflora_ca.py, methods/inflora_ca1.py",
        ),
        Conflict(
            "trials",
            "5 trials",
            "seeds 0 to 4, class order not shuffled, in two configurations alone; elsewhere seed 0",
            "one seed a run, the first listed unless `seed=` says otherwise; `sweep seed=0..4` for five",
            f"{_INFLORA}; the author in InfLoRA's issue 9; configs/*.json",
        ),
        Conflict(
            "accuracy after task t",
            "mean over the t tasks' accuracies",
            "printed total: share of all test images, so larger tasks weigh more (differs on ImageNet-R)",
            "both, each under its own name: `average_accuracy`, `sample_weighted_accuracy`",
            f"{_INFLORA}; utils/toolkit.py",
        ),
        Conflict(
            "dimensionality reduction matrix B",
            "the leading left singular vectors",
            "the same vectors divided by the square root of 3",
            _AS_SHIPPED,
            f"{_INFLORA}; methods/inflora.py",
        ),
        Conflict(
            "threshold of the old tasks' subspace",
            "a constant per benchmark",
            "rises from `lamb` towards `lame` over the tasks; of the squared spectrum of the second moments",
            _AS_SHIPPED,
            f"{_INFLORA}; methods/inflora.py",
        ),
        Conflict(
            "network's mode while training; what the optimizer holds",
            "not said",
            "evaluation mode; all parameters, the frozen ones without a gradient",
            "as the repository; SAM's perturbation and its norm leave out weights without a gradient",
            "methods/inflora.py",
        ),
        Conflict(
            "k-means over features after each task",
            "not part of the method",
            "runs within each task's timed training, its result unused",
            "as the repository: times include it",
            "methods/inflora.py",
        ),
        Conflict(
            "learning-rate schedule",
            "not said",
            "with Adam lr * cos(99 pi e / (200 (K - 1))) after epoch e of K",
            _AS_SHIPPED,
            "utils/schedulers.py",
        ),
        Conflict(
            "ImageNet-R: split into training and test images",
            "not said",
            "drawn by the code in the data folder itself, on first use, with the random numbers of that run's seed; "
            "its shipped logs fit the one that seed 40 draws (all their accuracies are whole numbers of its test "
            "images, and of no other seed's below 3000), not the one in utils/splits/, which the code does not read",
            "a folder split beforehand (the error gives the command that draws the logs' split, with the repository's "
            "own code); a run on any other split is warned, has it in its record, and is compared with the paper alone",
            "utils/data.py; utils/splits/; logs/ImageNet_R/",
        ),
        Conflict(
            "logs of several seeds",
            "-",
            "all seeds of a call land in 0.log; 1.log to 4.log stay empty",
            "one process a seed, so each seed has its own log",
            "trainer.py; logs/",
        ),
        Conflict(
            "versions",
            "-",
            "Python 3.8, torch 1.10.0, torchvision 0.11.1, timm 0.6.7",
            "requirements.lock; each difference is in the run's record",
            "README.md",
        ),
    ),
    "CL-LoRA": (
        Conflict(
            "ImageNet-R: pretrained weights",
            "ImageNet-21k, 'across all experiments'",
            "timm's vit_base_patch16_224, fine-tuned on ImageNet-1k",
            _PAPER_PROFILE,
            f"{_CLLORA}; exps/inr.json",
            (PaperArgument(("exps/inr.json",), "backbone_type", "vit_base_patch16_224_in21k_cllora"),),
        ),
        Conflict(
            "CIFAR-100: rank",
            "10",
            "8 (`ffn_num`)",
            _PAPER_PROFILE,
            f"{_CLLORA}; exps/cifar.json",
            (PaperArgument(("exps/cifar.json",), "ffn_num", 10),),
        ),
        Conflict(
            "ImageNet-R, ImageNet-A, VTAB: split into training and test images",
            "-",
            "reads train/ and test/ of folders that LAMDA-PILOT's README links; no list of their files",
            "the record has the hash of the lists found, and says of ImageNet-R whether it is one that InfLoRA uses; "
            "`compare` says that it could not be checked. ImageNet-A's 5,981 training and 1,519 test images and VTAB's "
            "1,796 and 8,619 are those of arXiv:2303.07338, not checked here against the paper or the data: other "
            "counts are noted, not refused",
            "utils/data.py; LAMDA-PILOT's README",
        ),
        Conflict(
            "runs",
            "10 runs with grid search",
            "one seed (1993) with fixed values",
            "one seed a run, 1993 unless `seed=` says otherwise; one run is not comparable with the paper's spread",
            f"{_CLLORA}; the author in CL-LoRA's issue 2; exps/*.json",
        ),
        Conflict(
            "the loss",
            "one joint loss (Eq. 13)",
            "two optimizer steps a batch: distillation, then cross-entropy with the orthogonality term",
            "as the repository; each step gets its own perturbation, `sam_on=task` or `distillation` picks one",
            f"{_CLLORA}; models/cllora.py",
        ),
        Conflict(
            "gradient of the task loss",
            "of one joint loss (Eq. 13)",
            "forward pass before the distillation step, backward pass after it, so it mixes the weights from before "
            "and after; newer versions of torch than its own (2.0.1, on CUDA) refuse that",
            "as the repository with torch 2.0.1, and so is SAM's second pass; only torch's count of writes is put back",
            f"{_CLLORA}; models/cllora.py",
        ),
        Conflict(
            "orthogonality of block weights",
            "sum of norms (Eq. 12)",
            "mean absolute cosine of the flattened block weights",
            _AS_SHIPPED,
            f"{_CLLORA}; models/cllora.py",
        ),
        Conflict(
            "block weights",
            "one scalar a block",
            "three a block: query, key, value",
            _AS_SHIPPED,
            f"{_CLLORA}; backbone/vit_cllora.py",
        ),
        Conflict(
            "learning rate, epochs, batch, optimizer",
            "not in the main text",
            "SGD with momentum 0.9 and the values of exps/*.json",
            _AS_SHIPPED,
            f"{_CLLORA}; exps/*.json",
        ),
        Conflict(
            "names of LoRA's factors",
            "-",
            "`lora_A` is the up-projection that starts at zero, which other repositories call B",
            "`scope=A` and `scope=B` go by the repository's names",
            "backbone/vit_cllora.py",
        ),
        Conflict(
            "positions of the task-specific blocks",
            "-",
            "README: `specific_pos`; configurations and code: `specfic_pos`",
            "`upstream.specfic_pos=`; the other spelling is told so",
            "README.md; exps/*.json",
        ),
        Conflict(
            "versions",
            "-",
            "Python 3.9.4, torch 2.0.1, timm 0.6.12",
            "requirements.lock; each difference is in the run's record",
            "README.md",
        ),
    ),
    "O-LoRA": (
        Conflict(
            "orthogonality loss",
            "a squared norm",
            "sums absolute values",
            _AS_SHIPPED,
            f"{_OLORA}; src/uie_trainer_lora.py",
        ),
        Conflict(
            "norm of the new LoRA weights",
            "not in the main text (appendix only)",
            "added with weight `lamda_2`",
            _AS_SHIPPED,
            f"{_OLORA}; O-LoRA's issue 40; src/uie_trainer_lora.py",
        ),
        Conflict(
            "runs",
            "mean of 3 runs",
            "no seed passed, which means 42",
            "seed 42 unless `seed=` says otherwise; `sweep` runs several",
            f"{_OLORA}; scripts/",
        ),
        Conflict(
            "processes",
            "not said",
            "scripts: 8 GPUs, batch 8; shipped results of order 1: 2 GPUs, batch 8, accumulation 4",
            "as the scripts; other numbers keep the global batch and are labelled off-protocol",
            "scripts/order_1.sh; the author in O-LoRA's issue 32",
        ),
        Conflict(
            "sequential fine-tuning: learning rate",
            "not said",
            "shipped results: 1e-3 for the first task, 1e-4 after",
            "not run: no script is shipped",
            "logs_and_outputs/",
        ),
        Conflict(
            "average accuracy",
            "mean over tasks",
            "printed: share of all test samples (differs on the long sequence: 73.88 and 72.17)",
            "both, each under its own name",
            f"{_OLORA}; src/",
        ),
        Conflict(
            "weights of the penalties",
            "not in the main text",
            "chosen per task in scripts/long.sh, after a search in 0 to 5 and 0 to 0.5",
            _AS_SHIPPED,
            "the author in O-LoRA's issue 33; scripts/long.sh",
        ),
        Conflict(
            "versions",
            "-",
            "transformers 4.28.0, deepspeed 0.10.0, accelerate 0.20.3",
            "requirements.lock; each difference is in the run's record",
            "requirements.txt",
        ),
    ),
    "N-LoRA": (
        Conflict(
            "order 1: batch",
            "32",
            "48 (32 in the other orders)",
            _PAPER_PROFILE,
            f"{_NLORA}; scripts/order_1.sh",
            (PaperArgument(("1",), "per_device_train_batch_size", "32"),),
        ),
        Conflict(
            "penalty",
            "L1 norm of the weight update BA",
            "L1 norm of the r x r product AB: another regulariser, on another scale",
            _AS_SHIPPED,
            f"{_NLORA}; src/",
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
            f"{_NLORA}; scripts/",
        ),
        Conflict(
            "weight of the penalty, learning rate",
            "not said",
            "chosen per order, in order 4 per task",
            _AS_SHIPPED,
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
}


def render() -> str:
    """Return the whole of ``DEVIATIONS.md``."""
    lines = [
        "# Where papers and their repositories disagree",
        "",
        "flatpatch runs the repositories. Where a paper says something else, the row says what runs here and how to",
        "follow the paper instead. CL-LoRA's paper was read in full; what InfLoRA's, O-LoRA's and N-LoRA's papers say",
        "was taken from secondary sources and must be held against the papers before it is quoted. The files named are",
        "the repository's. Every run lists its own deviations from upstream in its `record.json`.",
        "",
        "This page is written from `flatpatch/upstreams/conflicts.py` by "
        "`python -m flatpatch.upstreams.conflicts > DEVIATIONS.md`.",
    ]
    for repository, rows in CONFLICTS.items():
        lines += ["", f"## {repository}", "", "| | paper | repository | here | source |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [row.subject, row.paper, row.repository, row.here, row.source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")

"""InfLoRA: each task's LoRA in a subspace that leaves the tasks before it alone."""

from __future__ import annotations

from flatpatch.families.base import AS_SHIPPED, PAPER_PROFILE, Argument, Conflict
from flatpatch.families.vision.upstream import VisionUpstream

_PAPER = "InfLoRA's paper (arXiv:2404.00228), by secondary sources"
_DOMAINNET = ("configs/domainnet_inflora.json", "configs/domainnet_inflorab5.json")

UPSTREAM = VisionUpstream(
    name="inflora",
    title="InfLoRA",
    repository="InfLoRA",
    configs={
        **{
            variant: {
                "cifar100": f"configs/cifar100_{variant}.json",
                **{f"imagenet_r_{n}": f"configs/mimg{n}_{variant}.json" for n in (5, 10, 20)},
                "domainnet": f"configs/domainnet_{variant}.json",
            }
            for variant in ("inflora", "inflorab5")
        },
        "infloraca": {
            "cifar100": "configs/cifar100_infloraca.json",
            "imagenet_r_10": "configs/mimg10_infloraca.json",
        },
    },
    config_flag=("--config",),
    seed=0,
    conflicts=(
        Conflict(
            "DomainNet: optimizer, learning rate, rank",
            "Adam, 5e-4, rank 20",
            "SGD, 5e-3 (head 1e-2), rank 30",
            PAPER_PROFILE
            + " (with Adam the code gives the head the same learning rate and takes its cosine schedule, not "
            "MultiStep)",
            f"{_PAPER}; {', '.join(_DOMAINNET)}",
            (
                Argument(_DOMAINNET, "optim", "adam"),
                Argument(_DOMAINNET, "lrate", 0.0005),
                Argument(_DOMAINNET, "rank", 20),
            ),
        ),
        Conflict(
            "InfLoRA-b5, ImageNet-R in 5 tasks: threshold",
            "0.99",
            "0.98",
            PAPER_PROFILE,
            f"{_PAPER}; configs/mimg5_inflorab5.json",
            (Argument(("configs/mimg5_inflorab5.json",), "lamb", 0.99),),
        ),
        Conflict(
            "InfLoRA with classifier alignment (`variant=infloraca`): optimizer",
            "Adam everywhere",
            "SGD",
            "as the repository, in `profile=paper` too",
            f"{_PAPER}; configs/cifar100_infloraca.json, configs/mimg10_infloraca.json",
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
            f"{_PAPER}; the author in InfLoRA's issue 9; configs/*.json",
        ),
        Conflict(
            "accuracy after task t",
            "mean over the t tasks' accuracies",
            "printed total: share of all test images, so larger tasks weigh more (differs on ImageNet-R)",
            "both, each under its own name: `average_accuracy`, `sample_weighted_accuracy`",
            f"{_PAPER}; utils/toolkit.py",
        ),
        Conflict(
            "dimensionality reduction matrix B",
            "the leading left singular vectors",
            "the same vectors divided by the square root of 3",
            AS_SHIPPED,
            f"{_PAPER}; methods/inflora.py",
        ),
        Conflict(
            "threshold of the old tasks' subspace",
            "a constant per benchmark",
            "rises from `lamb` towards `lame` over the tasks; of the squared spectrum of the second moments",
            AS_SHIPPED,
            f"{_PAPER}; methods/inflora.py",
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
            AS_SHIPPED,
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
)

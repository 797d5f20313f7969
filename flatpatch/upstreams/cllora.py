"""CL-LoRA: shared and task-specific adapters, with a distillation step of their own in each batch."""

from __future__ import annotations

from flatpatch.families.base import AS_SHIPPED, PAPER_PROFILE, Argument, Conflict
from flatpatch.families.vision.upstream import VisionUpstream

_PAPER = "CL-LoRA's paper (arXiv:2505.24816), read in full"

UPSTREAM = VisionUpstream(
    name="cllora",
    title="CL-LoRA",
    repository="CL-LoRA",
    configs={
        "cllora": {
            "cifar100": "exps/cifar.json",
            "imagenet_r": "exps/inr.json",
            "imagenet_a": "exps/ina.json",
            "vtab": "exps/vtab.json",
        }
    },
    seed=1993,
    reference=False,
    conflicts=(
        Conflict(
            "ImageNet-R: pretrained weights",
            "ImageNet-21k, 'across all experiments'",
            "timm's vit_base_patch16_224, fine-tuned on ImageNet-1k",
            PAPER_PROFILE,
            f"{_PAPER}; exps/inr.json",
            (Argument(("exps/inr.json",), "backbone_type", "vit_base_patch16_224_in21k_cllora"),),
        ),
        Conflict(
            "CIFAR-100: rank",
            "10",
            "8 (`ffn_num`)",
            PAPER_PROFILE,
            f"{_PAPER}; exps/cifar.json",
            (Argument(("exps/cifar.json",), "ffn_num", 10),),
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
            f"{_PAPER}; the author in CL-LoRA's issue 2; exps/*.json",
        ),
        Conflict(
            "the loss",
            "one joint loss (Eq. 13)",
            "two optimizer steps a batch: distillation, then cross-entropy with the orthogonality term",
            "as the repository; each step gets its own perturbation, `sam_on=task` or `distillation` picks one",
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "gradient of the task loss",
            "of one joint loss (Eq. 13)",
            "forward pass before the distillation step, backward pass after it, so it mixes the weights from before "
            "and after; newer versions of torch than its own (2.0.1, on CUDA) refuse that",
            "as the repository with torch 2.0.1, and so is SAM's second pass; only torch's count of writes is put back",
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "orthogonality of block weights",
            "sum of norms (Eq. 12)",
            "mean absolute cosine of the flattened block weights",
            AS_SHIPPED,
            f"{_PAPER}; models/cllora.py",
        ),
        Conflict(
            "block weights",
            "one scalar a block",
            "three a block: query, key, value",
            AS_SHIPPED,
            f"{_PAPER}; backbone/vit_cllora.py",
        ),
        Conflict(
            "learning rate, epochs, batch, optimizer",
            "not in the main text",
            "SGD with momentum 0.9 and the values of exps/*.json",
            AS_SHIPPED,
            f"{_PAPER}; exps/*.json",
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
)

"""O-LoRA: a new adapter per task, whose rows are pushed to be orthogonal to those of the earlier tasks.

The paper (Wang et al., Findings of EMNLP 2023, arXiv:2310.14152) sums the squares of the entries of ``A_old
A^T``. Its code (src/uie_trainer_lora.py, ``training_step``) sums their absolute values and adds a second
term that the paper's text does not have: ``lamda_2`` times the sum of the (unsquared) Euclidean norms of
every new A and every new B. We do as the code does, so that
the two can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatpatch.families.text.reference.adapters import LayerMatrices

KEEPS_OLD = True


def penalty(layers: Sequence[LayerMatrices], lamda_1: float, lamda_2: float) -> Tensor:
    """Return ``lamda_1 * sum |A_old A^T|_1 + lamda_2 * sum (|A|_2 + |B|_2)``, a scalar.

    Args:
        layers: The adapter matrices of each layer; without an old one the first term is zero.
        lamda_1: Weight of the orthogonality.
        lamda_2: Weight of the norms.
    """
    zero = torch.zeros((), dtype=layers[0].A.dtype, device=layers[0].A.device)
    overlap, norms = zero, zero
    for A, B, A_old in layers:
        if A_old is not None:
            overlap = overlap + (A_old @ A.T).abs().sum()
        # At B = 0, where each task starts, torch's gradient of the norm is zero, not NaN.
        norms = norms + torch.linalg.vector_norm(A) + torch.linalg.vector_norm(B)
    return lamda_1 * overlap + lamda_2 * norms

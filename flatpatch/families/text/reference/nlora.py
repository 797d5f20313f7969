"""N-LoRA: a new adapter per task, kept sparse so that it collides with few entries of the others.

The paper (Yang et al., COLING 2025, arXiv:2410.10179) penalises the l1 norm of the update,
``lambda |B A|_1``. Its code (src/uie_trainer_lora.py at 7301afe, ``training_step``) takes the product the
other way round: with A ``(r, in)`` and B ``(out, r)`` it sums the absolute entries of the r x r matrix ``A B``, which
exists only where in = out. We do as the code does, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatpatch.families.text.reference.adapters import LayerMatrices

KEEPS_OLD = True


def penalty(layers: Sequence[LayerMatrices], lamda_1: float, lamda_2: float) -> Tensor:
    """Return ``lamda_1 * sum over layers of |A B|_1``, a scalar.

    Args:
        layers: The adapter matrices of each layer.
        lamda_1: Weight of the sparsity.
        lamda_2: Not used by this method.

    Raises:
        ValueError: If a layer's input and output sizes differ, so that A B does not exist.
    """
    del lamda_2
    total = torch.zeros((), dtype=layers[0].A.dtype, device=layers[0].A.device)
    for A, B, _ in layers:
        if A.shape[1] != B.shape[0]:
            raise ValueError(f"N-LoRA needs layers with in = out, got in={A.shape[1]}, out={B.shape[0]}")
        total = total + (A @ B).abs().sum()
    return lamda_1 * total

"""Sharpness-aware minimisation: the perturbation, an optimizer wrapper and a Trainer adapter."""

from flatpatch.sam.optimizer import SAM
from flatpatch.sam.passes import RandomState, batch_norm_statistics_kept
from flatpatch.sam.perturbation import AscentStep, mixed_seed, perturbed
from flatpatch.sam.radii import group_radii
from flatpatch.sam.scope import SCOPES, is_adapter, select_parameters
from flatpatch.sam.trainer import SAMTrainingStep, keep_adapters_fp32

__all__ = [
    "SAM",
    "SCOPES",
    "AscentStep",
    "RandomState",
    "SAMTrainingStep",
    "batch_norm_statistics_kept",
    "group_radii",
    "is_adapter",
    "keep_adapters_fp32",
    "mixed_seed",
    "perturbed",
    "select_parameters",
]

"""Sharpness-aware minimisation: the perturbation, an optimizer wrapper and a Trainer adapter."""

from flatpatch.kinds import mixed_seed
from flatpatch.sam.optimizer import SAM
from flatpatch.sam.pairs import LoraPair, lora_pairs, trained_lora_pairs
from flatpatch.sam.passes import RandomState, batch_norm_statistics_kept
from flatpatch.sam.perturbation import AscentStep, perturbed
from flatpatch.sam.radii import group_radii
from flatpatch.sam.scope import SCOPES, is_adapter, select_parameters
from flatpatch.sam.steps import Combine, Gradients, StepPasses, first_examples, kept, put_gradients
from flatpatch.sam.trainer import SAMTrainingStep, keep_adapters_fp32

__all__ = [
    "SAM",
    "SCOPES",
    "AscentStep",
    "Combine",
    "Gradients",
    "LoraPair",
    "RandomState",
    "SAMTrainingStep",
    "StepPasses",
    "batch_norm_statistics_kept",
    "first_examples",
    "group_radii",
    "is_adapter",
    "keep_adapters_fp32",
    "kept",
    "lora_pairs",
    "mixed_seed",
    "perturbed",
    "put_gradients",
    "select_parameters",
    "trained_lora_pairs",
]

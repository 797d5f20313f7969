"""How flat a minimum is: Hessian spectra, sharpness and landscapes of any PyTorch model, LoRA in particular.

For example, the five largest eigenvalues of the loss over the LoRA factors of a model::

    problem = Problem(model, loader, supervised_loss(F.cross_entropy), scope="adapter")
    print(lanczos(HessianOperator(problem), k=5))
"""

from flatpatch.flatness.as_recorded import recorded_eigenvalues, recorded_keskar, recorded_landscape
from flatpatch.flatness.batchwise import BatchEigenvalues, batch_eigenvalues
from flatpatch.flatness.blocks import BlockCurvature, BlockOperator, block_curvature, factor_blocks, layer_blocks
from flatpatch.flatness.connectivity import Connectivity, checkpoint_point, linear_connectivity, model_point
from flatpatch.flatness.density import Quadrature, kernel_width, quadrature, spectral_density, spectral_distribution
from flatpatch.flatness.directions import Direction, given_direction, random_direction
from flatpatch.flatness.eigenvalues import Eigenpairs, best_block_size, lanczos, power_iteration
from flatpatch.flatness.following import Followed, follow
from flatpatch.flatness.gauss_newton import EmpiricalFisherOperator, FisherOperator, GaussNewtonOperator
from flatpatch.flatness.invariance import Invariance, certify
from flatpatch.flatness.landscape import Landscape, Mark, Plane, landscape, plane_landscape, plane_through
from flatpatch.flatness.operator import HessianOperator, LinearOperator, MatrixOperator
from flatpatch.flatness.points import Point
from flatpatch.flatness.problem import Loss, Problem, WeightedLoss, model_loss, supervised_loss
from flatpatch.flatness.scope import SCOPES, Scope, find_scope
from flatpatch.flatness.sharpness import (
    BallSharpness,
    KeskarSharpness,
    MSharpness,
    ball_sharpness,
    keskar_sharpness,
    m_sharpness,
)
from flatpatch.flatness.statistics import SpectrumStatistics, first_to_fifth, spectrum_statistics
from flatpatch.flatness.taylor import taylor_terms
from flatpatch.flatness.terms import count_terms
from flatpatch.flatness.trace import Trace, hutch_plus_plus, hutchinson, xtrace

__all__ = [
    "SCOPES",
    "BallSharpness",
    "BatchEigenvalues",
    "BlockCurvature",
    "BlockOperator",
    "Connectivity",
    "Direction",
    "Eigenpairs",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "Followed",
    "HessianOperator",
    "Invariance",
    "KeskarSharpness",
    "Landscape",
    "LinearOperator",
    "Loss",
    "MSharpness",
    "Mark",
    "MatrixOperator",
    "Plane",
    "Point",
    "Problem",
    "Quadrature",
    "Scope",
    "SpectrumStatistics",
    "Trace",
    "WeightedLoss",
    "ball_sharpness",
    "batch_eigenvalues",
    "best_block_size",
    "block_curvature",
    "certify",
    "checkpoint_point",
    "count_terms",
    "factor_blocks",
    "find_scope",
    "first_to_fifth",
    "follow",
    "given_direction",
    "hutch_plus_plus",
    "hutchinson",
    "keskar_sharpness",
    "kernel_width",
    "lanczos",
    "landscape",
    "layer_blocks",
    "linear_connectivity",
    "m_sharpness",
    "model_loss",
    "model_point",
    "plane_landscape",
    "plane_through",
    "power_iteration",
    "quadrature",
    "random_direction",
    "recorded_eigenvalues",
    "recorded_keskar",
    "recorded_landscape",
    "spectral_density",
    "spectral_distribution",
    "spectrum_statistics",
    "supervised_loss",
    "taylor_terms",
    "xtrace",
]

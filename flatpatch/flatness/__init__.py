"""How flat a minimum is: Hessian spectra, sharpness and landscapes of any PyTorch model, LoRA in particular.

For example, the five largest eigenvalues of the loss over the LoRA factors of a model::

    problem = Problem(model, loader, supervised_loss(F.cross_entropy), scope="adapter")
    print(lanczos(HessianOperator(problem), k=5))
"""

# The loss and what it is a function of.
from flatpatch.flatness.batchwise import BatchEigenvalues, batch_eigenvalues
from flatpatch.flatness.density import Quadrature, kernel_width, quadrature, spectral_density, spectral_distribution
from flatpatch.flatness.eigenvalues import Eigenpairs, lanczos, power_iteration

# Its Hessian, and what can be asked of it.
from flatpatch.flatness.operator import HessianOperator, LinearOperator, MatrixOperator
from flatpatch.flatness.problem import Loss, Problem, count_terms, model_loss, supervised_loss
from flatpatch.flatness.scope import SCOPES, Scope, find_scope
from flatpatch.flatness.statistics import SpectrumStatistics, first_to_fifth, spectrum_statistics
from flatpatch.flatness.trace import Trace, hutch_plus_plus, hutchinson

__all__ = [
    "SCOPES",
    "BatchEigenvalues",
    "Eigenpairs",
    "HessianOperator",
    "LinearOperator",
    "Loss",
    "MatrixOperator",
    "Problem",
    "Quadrature",
    "Scope",
    "SpectrumStatistics",
    "Trace",
    "batch_eigenvalues",
    "count_terms",
    "find_scope",
    "first_to_fifth",
    "hutch_plus_plus",
    "hutchinson",
    "kernel_width",
    "lanczos",
    "model_loss",
    "power_iteration",
    "quadrature",
    "spectral_density",
    "spectral_distribution",
    "spectrum_statistics",
    "supervised_loss",
]

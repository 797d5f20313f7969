"""How flat a minimum is: Hessian spectra, sharpness and landscapes of any PyTorch model, LoRA in particular."""

from flatpatch.flatness.problem import Loss, Problem, count_terms, model_loss, supervised_loss
from flatpatch.flatness.scope import SCOPES, Scope, find_scope

__all__ = ["SCOPES", "Loss", "Problem", "Scope", "count_terms", "find_scope", "model_loss", "supervised_loss"]

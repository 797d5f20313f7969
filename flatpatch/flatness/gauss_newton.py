r"""The Gauss-Newton matrix and Fisher's information of a loss as operators.

With the model's outputs :math:`z_t` (logits of one term: an example, a token), their Jacobian :math:`J_t` by the
weights, and the loss a function of the outputs, all three are :math:`\sum_t J_t^T C_t J_t`:

- Gauss-Newton (Schraudolph 2002; Martens 2020, arXiv:1412.1193, Sec. 8): C is the loss's Hessian by the outputs. It is
  the Hessian without the curvature of the outputs themselves, and positive semidefinite for a convex loss.
- Fisher's information (Martens 2020, Sec. 5): the mean over labels that the *model* draws of the gradient's outer
  product. For softmax and cross-entropy :math:`C_t = w_t\,(\mathrm{diag}(p_t) - p_t p_t^T)` with the
  probabilities p and the term's weight w in the mean; for squared errors, of normal outputs with variance 1/2,
  :math:`C = 2 I` over their number. Both are those of Gauss-Newton, without label smoothing or with.
- The *empirical* Fisher: the outer product of the gradients at the *given* labels, :math:`C_t = w_t\,r_t r_t^T` with
  the gradient r of term t's own loss by its outputs. It is no estimate of the others (Kunstner et al. 2019,
  arXiv:1905.12558), and zero where the labels are fitted.

A loss is split into outputs and their loss by listening for the one cross-entropy or squared error that it computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatpatch.errors import UserError
from flatpatch.flatness.content import problem_content
from flatpatch.flatness.operator import free_memory, graph_memory
from flatpatch.flatness.problem import Problem
from flatpatch.flatness.terms import IGNORED

_LOSSES = (F.cross_entropy, F.mse_loss)


@dataclass(frozen=True)
class _Call:
    """One call of a loss of torch's.

    Attributes:
        function: ``cross_entropy`` or ``mse_loss``.
        outputs: What the model gave it, with its graph.
        target: The labels, or the values to meet.
        options: Its keyword arguments.
        value: What it returned, without its graph.
    """

    function: Callable[..., Tensor]
    outputs: Tensor
    target: Tensor
    options: dict[str, Any]
    value: Tensor

    def require_plain_mean(self, what: str) -> None:
        """Refuse terms that are weighted by their class, or anything but averaged."""
        is_mean = self.options.get("weight") is None and self.options.get("reduction", "mean") == "mean"
        if not is_mean or self.outputs.ndim < (1 if self.function is F.mse_loss else 2):
            raise UserError(
                f"{what} needs a loss that is the plain mean over its terms, without class weights or a mask of its "
                "own. Use measure=gauss_newton, which takes any."
            )

    def term_weights(self, what: str) -> Tensor:
        """Return each term's share of a mean cross-entropy, with one entry where the outputs have classes."""
        self.require_plain_mean(what)
        if self.target.is_floating_point():  # probabilities
            counted = torch.ones_like(self.outputs[:, 0])
        else:
            counted = (self.target != self.options.get("ignore_index", IGNORED)).to(self.outputs.dtype)
        return (counted / counted.sum()).unsqueeze(1)


class _Listener(TorchFunctionMode):
    """Notes the calls of torch's losses that are made inside, and lets them through as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if function in _LOSSES:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            self.calls.append(_Call(function, given.pop("input"), given.pop("target"), dict(given), found.detach()))
        return found


@dataclass(frozen=True)
class _Split:
    """One batch's outputs with their graph, and what products need of them."""

    outputs: Tensor
    curve: Callable[[Tensor], Tensor]  # C u, shaped like the outputs
    dummy: Tensor  # zeros like the outputs, by which the pulled-back gradient is linear
    pulled: list[Tensor]  # J' dummy, by variable


class _OutputOperator:
    """J' C J, with C given by a subclass.

    Args:
        problem: The loss and its variables.
        memory_budget: Bytes that may be used for graphs of batches that are kept from product to product; the other
            batches' are built anew for each. By default as the Hessian's; zero keeps nothing.

    Attributes:
        products: Number of matrix-vector products so far.
        kept_bytes: Memory of the kept graphs.

    Raises:
        UserError: At the first product, if the loss is not made of one cross-entropy or squared error, or not of
            its outputs alone.
    """

    _name = ""
    _is_of_a_distribution = False  # which a factor before the loss would be no part of

    def __init__(self, problem: Problem, *, memory_budget: int | None = None) -> None:
        self.problem = problem
        self.size = problem.size
        self.device = problem.device
        self.dtype = problem.dtype
        self.products = 0
        self.kept_bytes = 0
        self._budget = memory_budget
        self._may_keep = memory_budget != 0
        self._splits: dict[int, _Split] = {}

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of all that the loss is made of."""
        return {**problem_content(self.problem), "matrix": type(self).__name__}

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``V`` ``(n, p)``; the result ``(n, p)`` is float64.

        Raises:
            ValueError: If ``V`` has another shape.
        """
        if V.ndim != 2 or V.shape[0] != self.size:
            raise ValueError(f"V must have shape ({self.size}, p), got {tuple(V.shape)}")
        total = torch.zeros(self.size, V.shape[1], dtype=torch.float64, device=self.device)
        with self.problem.active(), torch.set_grad_enabled(True):
            for index, weight in enumerate(self.problem.weights):
                split = self._splits.get(index) or self._build_and_keep(index)
                for column in range(V.shape[1]):
                    product = self._product(split, V[:, column].to(self.device, self.dtype))
                    total[:, column].add_(product, alpha=weight)
        self.products += V.shape[1]
        return total

    def _product(self, split: _Split, v: Tensor) -> Tensor:
        pieces = self.problem.unflatten(v)
        along = [(g, piece) for g, piece in zip(split.pulled, pieces, strict=True) if g.requires_grad]
        # The pulled-back gradient J' u is linear in u, so its derivative by u along v is J v.
        (pushed,) = torch.autograd.grad(
            [g for g, _ in along], split.dummy, [piece for _, piece in along], retain_graph=True
        )
        curved = split.curve(pushed).detach()
        found = torch.autograd.grad(
            split.outputs, self.problem.variables, curved, retain_graph=True, materialize_grads=True
        )
        return self.problem.flatten(found, torch.float64)

    def _build_and_keep(self, index: int) -> _Split:
        if not self._may_keep:
            return self._build(index)
        if self._budget is None:
            self._budget = free_memory(self.device) // 2
        with graph_memory(self.problem) as size:
            split = self._build(index)
        if self.kept_bytes + size() <= self._budget:
            self._splits[index] = split
            self.kept_bytes += size()
        else:
            self._may_keep = False
        return split

    def _build(self, index: int) -> _Split:
        problem = self.problem
        with _Listener() as heard:
            loss = problem.batch_loss(index, twice_differentiable=True)
        if len(heard.calls) != 1 or not heard.calls[0].outputs.requires_grad:
            raise UserError(
                f"{self._name} needs a loss made of one cross-entropy or squared error of torch's that depends on the "
                f"weights; batch {index}'s computes {len(heard.calls)}. Leave out measure=gauss_newton and fisher."
            )
        call = heard.calls[0]
        (slope,) = torch.autograd.grad(loss, call.outputs, create_graph=True)
        self._check_whole(loss, call.outputs, slope, index)
        dummy = torch.zeros_like(call.outputs, requires_grad=True)
        pulled = torch.autograd.grad(call.outputs, problem.variables, dummy, create_graph=True, materialize_grads=True)
        curve = self._curve(call, slope)
        if self._is_of_a_distribution:
            self._check_scale(float(loss.detach()), float(call.value), index)
        return _Split(call.outputs, curve, dummy, list(pulled))

    def _check_whole(self, loss: Tensor, outputs: Tensor, slope: Tensor, index: int) -> None:
        """A penalty on the weights would be left out without a word."""
        variables = self.problem.variables
        whole = torch.autograd.grad(loss, variables, retain_graph=True, materialize_grads=True)
        full = self.problem.flatten(whole, torch.float64)
        through = torch.autograd.grad(outputs, variables, slope.detach(), retain_graph=True, materialize_grads=True)
        missing = float((full - self.problem.flatten(through, torch.float64)).norm())
        if missing > 1e-3 * float(full.norm()) + torch.finfo(self.dtype).eps:
            raise UserError(
                f"{self._name} needs a loss that is a function of the outputs alone; of batch {index}'s gradient "
                f"{missing:.3g} of {float(full.norm()):.3g} (norms) comes another way, as from a penalty."
            )

    def _check_scale(self, loss: float, own: float, index: int) -> None:
        if not abs(loss - own) <= 1e-3 * abs(own):
            raise UserError(
                f"{self._name} needs a loss that is its cross-entropy or squared error itself; batch {index}'s is "
                f"{loss:.6g} of {own:.6g}, as by a factor before it. Use measure=gauss_newton, which takes any."
            )

    def _curve(self, call: _Call, slope: Tensor) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


class GaussNewtonOperator(_OutputOperator):
    """The generalised Gauss-Newton matrix, for any loss of one cross-entropy or squared error.

    Class weights, label smoothing, ignored labels and weights of the terms are in it as they are in the loss.
    """

    _name = "the Gauss-Newton matrix"

    def _curve(self, call: _Call, slope: Tensor) -> Callable[[Tensor], Tensor]:
        if not slope.requires_grad:
            return torch.zeros_like
        return lambda u: torch.autograd.grad(slope, call.outputs, u, retain_graph=True)[0]


class FisherOperator(_OutputOperator):
    """Fisher's information of the model's own distribution: of its classes, or of normal outputs of variance 1/2."""

    _name = "Fisher's information"
    _is_of_a_distribution = True

    def _curve(self, call: _Call, slope: Tensor) -> Callable[[Tensor], Tensor]:
        if call.function is F.mse_loss:
            call.require_plain_mean(self._name)
            return lambda u: 2 * u / u.numel()
        weights = call.term_weights(self._name)
        p = torch.softmax(call.outputs.detach(), dim=1)
        return lambda u: weights * (p * u - p * (p * u).sum(dim=1, keepdim=True))


class EmpiricalFisherOperator(_OutputOperator):
    """The empirical Fisher: outer products of the gradients of single terms, at the labels that are given.

    A term is a label (an example, a token); of squared errors a row, whose loss is the mean over its entries.
    """

    _name = "the empirical Fisher"
    _is_of_a_distribution = True

    def _curve(self, call: _Call, slope: Tensor) -> Callable[[Tensor], Tensor]:
        slope = slope.detach()  # w_t r_t
        if call.function is F.mse_loss:
            call.require_plain_mean(self._name)
            shares = slope.new_full((len(slope), 1), 1 / len(slope))
            rows = slope.reshape(len(slope), -1)
            return lambda u: (rows / shares * (rows * u.reshape(rows.shape)).sum(dim=1, keepdim=True)).reshape(u.shape)
        weights = call.term_weights(self._name)
        inverse = torch.where(weights > 0, 1 / weights, 0.0)
        return lambda u: inverse * slope * (slope * u).sum(dim=1, keepdim=True)

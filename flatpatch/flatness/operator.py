r"""The Hessian of a loss as an operator: its products with vectors, without ever forming it.

For a loss :math:`L = \sum_b w_b L_b` over batches, :math:`H v = \sum_b w_b \nabla \langle \nabla L_b, v \rangle`
(Pearlmutter 1994). Building the graph of :math:`\nabla L_b` costs as much as a product or more, so it is kept from
product to product for as many batches as a memory budget allows, and rebuilt for the rest.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.flatness.compiled import CompileError, Compiler, Product, expected_gain, graph_size
from flatpatch.flatness.content import digest, problem_content, sums_of, tensors_in
from flatpatch.flatness.differences import Differences
from flatpatch.flatness.problem import Problem, differentiate, graph_nodes

MODES = ("autograd", "finite-difference")

_CPU_DEFAULT = 8 * 2**30  # a batch system may grant a job less than the machine has free
_MAX_VECTORS = 16  # on an H200, 107 ms a vector in batches of 16 and 112 ms in batches of 8


class LinearOperator(Protocol):
    """A real symmetric matrix that is only known by its products. All algorithms here take one."""

    @property
    def size(self) -> int:
        """Number of rows and columns, n."""

    @property
    def device(self) -> torch.device:
        """Where vectors live."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision products are computed in; vectors are rounded to it."""

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``V`` ``(n, p)``; the result ``(n, p)`` is float64."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the matrix is made of, part by part, for a checkpoint: the same in every process."""


def plan(operator: LinearOperator, products: int) -> None:
    """Tell an operator that can use it how many products an algorithm is about to ask for."""
    if isinstance(operator, HessianOperator):
        operator.plan(products)


def compile_seconds(operator: LinearOperator) -> float:
    """Return the seconds that an operator has spent on compiling, 0 for one that cannot."""
    return operator.compile_seconds if isinstance(operator, HessianOperator) else 0.0


def product_errors(operator: LinearOperator) -> Tensor | None:
    """Return the estimated errors of an operator's last products, as columns, or None for mere rounding."""
    return operator.errors if isinstance(operator, HessianOperator) else None


def form_errors(operator: LinearOperator, V: Tensor) -> list[float]:
    """Return how far <v, H v> may be off for each column of the vectors that were multiplied last."""
    errors = product_errors(operator)
    return [0.0] * V.shape[1] if errors is None else (V * errors).sum(dim=0).abs().tolist()


def checkpoint_key(
    operator: LinearOperator, algorithm: str, settings: Sequence[Any], checkpoint: Path | None
) -> dict[str, Any]:
    """Return what a checkpoint must have been made with, empty if none is wanted."""
    if checkpoint is None:
        return {}
    return {"algorithm": algorithm, "settings": list(settings), **operator.fingerprint()}


class MatrixOperator:
    """A given symmetric matrix as an operator.

    Args:
        matrix: Dense and symmetric, ``(n, n)``, float32 or float64.

    Raises:
        ValueError: If it is not square.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        self.matrix = matrix
        self.size = len(matrix)
        self.device = matrix.device
        self.dtype = matrix.dtype
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of ``V`` ``(n, p)``."""
        self.products += V.shape[1]
        return (self.matrix @ V.to(self.dtype)).double()

    def fingerprint(self) -> dict[str, Any]:
        """Return a hash of the matrix."""
        return {"matrix": digest(self.matrix)}


class HessianOperator:
    """The Hessian of a problem's loss with respect to its variables, at their present values.

    Args:
        problem: The loss and its variables.
        mode: "autograd", or "finite-difference" for models that have no second derivative (fused attention that
            cannot be replaced, custom kernels): central differences of the gradient, by a step that is sought for
            each product: see :mod:`flatpatch.flatness.differences`. A product takes four gradients or more, mostly
            ten. In float32 its error on small networks was 1e-4 to 3e-2 of it, in 16 bits a fiftieth of it to more
            than all. ``errors`` has an estimate, in float32 one to ten times the error, and what is computed from it
            counts as converged only beyond that. Where the loss has kinks (ReLU), a step that crosses one measures its
            bend, which autograd leaves out; where no step is both short enough to cross none and long enough for
            rounding, as always in 16 bits, the estimate need not show it: a warning names the kinks. It moves the
            weights during a product and puts them back bit for bit.
        memory_budget: Bytes that may be used for kept graphs and, on a GPU, for products with several vectors at
            once. By default half of what is free at the first product (on a CPU 8 GiB at most). Zero keeps nothing.
        compile: Whether to compile the products of kept batches, which takes half a minute or more and then saves
            about two fifths of each product's time on a CPU; needs a C++ compiler (on a GPU Triton). The compiled code
            is compared with the plain product once. By default it is done, on a CPU, when the products that an
            algorithm plans save more than it is expected to cost; if it then fails, a warning says so and the plain
            product goes on. Either way products differ in rounding alone, but by that: set it to True or False where
            runs are to be equal bit for bit.
        vectors_per_pass: How many vectors one backward pass takes. By default one on a CPU, where batching gains
            nothing, and on a GPU as many as fit the budget, 16 at most.

    Attributes:
        products: Number of matrix-vector products so far.
        compile_seconds: Time spent on compiling so far.
        errors: The estimated errors of the last products as columns ``(n, p)``, for finite differences; else None.

    Raises:
        ValueError: If the mode or a number is not one of those allowed.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        mode: str = "autograd",
        memory_budget: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        vectors_per_pass: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget must be at least 0 bytes, got {memory_budget}")
        if vectors_per_pass is not None and vectors_per_pass < 1:
            raise ValueError(f"vectors_per_pass must be at least 1, got {vectors_per_pass}")
        self.problem = problem
        self.mode = mode
        self.size = problem.size
        self.device = problem.device
        self.dtype = problem.dtype
        self.products = 0
        self.compile_seconds = 0.0
        self._compiler = Compiler() if compile is True else None
        self._may_compile = compile == "auto" and self.device.type == "cpu" and vectors_per_pass in (None, 1)
        self._planned = 0
        self._seconds = 0.0  # of one product, once all graphs were there
        self._compiled: dict[int, Product] = {}
        self._budget = memory_budget
        self._vectors = vectors_per_pass if self.device.type == "cuda" else vectors_per_pass or 1
        self._graphs: dict[int, list[Tensor]] = {}
        self._bytes: dict[int, int] = {}
        self._may_keep = memory_budget != 0
        self._is_checked = False
        self.errors: Tensor | None = None
        self._differences = Differences(problem) if mode == "finite-difference" else None
        self._content = self._sums()

    @property
    def kept_batches(self) -> int:
        """For how many batches the graph of the gradient is being kept."""
        return len(self._bytes)

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept graphs in bytes, apart from the weights they refer to."""
        return sum(self._bytes.values())

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of all that the loss is made of, and the batches' losses for what has no hash."""
        with self.problem.active(), torch.no_grad():
            losses = [float(self.problem.batch_loss(index)) for index in range(len(self.problem.batches))]
        return {**problem_content(self.problem), "mode": self.mode, "precision": str(self.dtype), "losses": losses}

    def _sums(self) -> dict[str, list[int]]:
        """Return numbers that change with any weight, buffer or batch, also one written through ``.data``."""
        model = self.problem.model
        weights = {id(t): t for t in (*model.parameters(), *model.buffers(), *self.problem.variables)}
        return {"weights": sums_of(weights.values()), "data": sums_of(tensors_in(self.problem.batches))}

    def plan(self, products: int) -> None:
        """Say how many products are to come, by which ``compile="auto"`` decides."""
        self._planned = self.products + products

    def release(self) -> None:
        """Free the kept graphs. Later products build them anew."""
        self._graphs.clear()
        self._compiled.clear()
        self._bytes.clear()

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply with one vector ``(n,)``; the result is float64."""
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with several vectors.

        Args:
            V: The vectors as columns, ``(n, p)``.

        Returns:
            The products as columns, ``(n, p)``, summed over batches in float64.

        Raises:
            ValueError: If ``V`` has another shape, if weights, buffers or batches have changed since the operator was
                made, or if a product is not finite. A model's plain attributes, what the loss function holds and
                batches that are objects of other types than mappings, sequences, tensors and arrays are not looked at.
            UserError: If the model has no second derivative.
        """
        if V.ndim != 2 or V.shape[0] != self.size:
            raise ValueError(f"V must have shape ({self.size}, p), got {tuple(V.shape)}")
        content = self._sums()
        if changed := [name for name in content if content[name] != self._content[name]]:
            self.release()
            what = " and ".join(changed)
            raise ValueError(f"{what} have changed since this operator was made: make a new one (and a new Problem).")
        rows = V.T.to(self.device, self.dtype).contiguous()
        with self.problem.active(), torch.set_grad_enabled(True):
            if self._may_compile and self._compiling_pays():
                self._compile_all()
            # The processor's time, as other programs' load says nothing about what compiling costs.
            start, had_graphs = time.process_time(), len(self._graphs) == len(self.problem.weights)
            if self._differences:
                total, errors = self._differences.products(rows)
                self.errors = errors.T
            else:
                total = self._by_autograd(rows)
        if had_graphs and len(rows):
            self._seconds = (time.process_time() - start) / torch.get_num_threads() / len(rows)
        self.products += len(rows)
        if total.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(total)).tolist())):
            raise ValueError("a Hessian-vector product is not finite; the loss overflows near these weights.")
        return total.T

    def disagreement_with_differences(self, seed: int = 0) -> float:
        """Compare a product with differences of the gradient along a random direction.

        A custom operation whose second derivative is missing or wrong need not raise an error. In float64 the two
        agree to about 1e-6 and in float32 to about 1e-2; far more is a reason to look for one, unless the loss has
        kinks that no step avoids (see ``mode``).

        Args:
            seed: Of the direction.

        Returns:
            Length of the difference over that of the differences' product; 0 if both are zero.
        """
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(self.size, 1, generator=generator, dtype=torch.float64).to(self.device)
        differences = HessianOperator(self.problem, mode="finite-difference").matmat(v)
        error = float((self.matmat(v) - differences).norm())
        return error / float(differences.norm()) if error else 0.0

    def _by_autograd(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows, dtype=torch.float64)
        with _explaining_missing_derivatives():
            for index, weight in enumerate(self.problem.weights):
                if index in self._compiled:
                    for row, result in zip(rows, total, strict=True):
                        result.add_(self._compiled[index](row), alpha=weight)
                    continue
                gradients = self._graphs.get(index)
                if gradients is None:
                    gradients = self._build(index)
                    if self._compiler and index in self._graphs:
                        self._compile(index, gradients)
                if self._vectors is None and len(rows) > 1:
                    self._vectors = self._fitting_vectors(gradients)
                self._add_products(total, rows, gradients, weight, free=index not in self._graphs)
        return total

    def _add_products(self, total: Tensor, rows: Tensor, gradients: list[Tensor], weight: float, *, free: bool) -> None:
        start = 0
        while start < len(rows):
            chosen = slice(start, start + (self._vectors or 1))
            # A graph that nothing asks for again is freed on the way, unless a failure may need it for another try.
            last = free and start + 1 == len(rows) and not self._bytes
            try:
                products = self._vector_products(gradients, rows[chosen], retain_graph=not last)
            except RuntimeError as error:
                if len(rows[chosen]) > 1:  # too little memory for as many, or an operation that cannot be batched
                    self._vectors = len(rows[chosen]) // 2
                elif not self._make_room(error):
                    raise
                continue
            total[chosen].add_(products, alpha=weight)
            start = chosen.stop

    def _vector_products(self, gradients: list[Tensor], rows: Tensor, *, retain_graph: bool = True) -> Tensor:
        """Differentiate <gradients, row> for every row: (p, n) to (p, n) in float64."""
        variables = self.problem.variables
        single = len(rows) == 1
        pieces = self.problem.unflatten(rows[0] if single else rows)
        curved = [(g, piece) for g, piece in zip(gradients, pieces, strict=True) if g.requires_grad]
        if not curved:
            return torch.zeros_like(rows, dtype=torch.float64)
        found = torch.autograd.grad(
            [g for g, _ in curved],
            variables,
            [piece for _, piece in curved],
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=not single,
        )
        flat = [
            rows.new_zeros(len(rows), variable.numel())
            if product is None
            else product.detach().reshape(len(rows), -1).to(rows.device, rows.dtype)
            for product, variable in zip(found, variables, strict=True)
        ]
        return torch.cat(flat, dim=1).double()

    def _build(self, index: int) -> list[Tensor]:
        """Compute one batch's gradient with its graph, and keep it if the budget allows."""
        if self._budget is None:
            self._budget = free_memory(self.device) // 2
        # On a GPU half of the budget is left for products with several vectors at once.
        room = self._budget // 2 if self.device.type == "cuda" else self._budget
        counts = self.problem.num_terms
        per_term = max((self._bytes[kept] / counts[kept] for kept in self._bytes), default=0.0)
        expected = self.kept_bytes + per_term * counts[index]
        keep = self._may_keep and expected <= room
        try:
            with graph_memory(self.problem) if keep else nullcontext(lambda: 0) as size:
                loss = self.problem.batch_loss(index, twice_differentiable=True)
                gradients = differentiate(loss, self.problem.variables, create_graph=True)
        except torch.OutOfMemoryError as error:
            if not self._make_room(error):
                raise
            return self._build(index)
        if not self._is_checked:
            _refuse_delayed_errors(gradients)
            self._is_checked = True
        if keep and self.kept_bytes + size() <= room:
            self._graphs[index], self._bytes[index] = gradients, size()
        elif keep:
            self._may_keep = False
        return gradients

    def _compiling_pays(self) -> bool:
        """Whether the products still planned save more than compiling costs; only if all graphs are kept."""
        remaining = self._planned - self.products
        if not self._seconds or remaining <= 0 or len(self._graphs) < len(self.problem.weights):
            return False
        if expected_gain(self._seconds, remaining, []) <= 0:
            return False
        graphs = [graph_size(self._graphs[index], self.problem.num_terms[index]) for index in self._graphs]
        return expected_gain(self._seconds, remaining, graphs) > 0

    def _compile_all(self) -> None:
        self._may_compile = False
        self._compiler = Compiler()
        try:
            for index, gradients in list(self._graphs.items()):
                self._compile(index, gradients)
        except CompileError as error:
            warnings.warn(f"{error} Going on without.", stacklevel=3)
            self._compiler = None

    def _compile(self, index: int, gradients: list[Tensor]) -> None:
        """Let compiled code take over from a batch's next product on; it holds what it needs of the graph."""
        assert self._compiler
        start = time.perf_counter()
        graph = graph_size(gradients, self.problem.num_terms[index])
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.size, generator=generator).to(self.device, self.dtype)

        def product(vector: Tensor) -> Tensor:
            return self._vector_products(gradients, vector.unsqueeze(0)).squeeze(0)

        try:
            if any(gradient.requires_grad for gradient in gradients):
                self._compiled[index] = self._compiler.compile(product, v, graph)
                del self._graphs[index]
        finally:
            self.compile_seconds += time.perf_counter() - start

    def _make_room(self, error: RuntimeError) -> bool:
        """Give up the kept graphs when memory ran out; False if that was not the error, or there were none."""
        if not isinstance(error, torch.OutOfMemoryError) or not self._bytes:
            return False
        self.release()
        self._may_keep = False
        torch.cuda.empty_cache()
        return True

    def _fitting_vectors(self, gradients: list[Tensor]) -> int:
        """Find how many vectors a backward pass on the GPU can take, from the memory that one and two of them take."""
        peaks = []
        before = torch.cuda.memory_allocated(self.device)
        for count in (1, 2):
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                self._vector_products(gradients, torch.ones(count, self.size, dtype=self.dtype, device=self.device))
            except RuntimeError:
                return 1
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        each = max(peaks[1] - peaks[0], 1)
        room = (self._budget or 0) - self.kept_bytes - peaks[0]
        return int(min(max(1 + room // each, 1), _MAX_VECTORS))


@contextmanager
def graph_memory(problem: Problem) -> Iterator[Callable[[], int]]:
    """Measure the memory of the graph that is built inside; the function gives it in bytes afterwards."""
    device = problem.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.memory_allocated(device) - before
        return
    weights = (*problem.model.parameters(), *problem.variables)
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would make a circle with the node that it came from

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def _refuse_delayed_errors(gradients: list[Tensor]) -> None:
    """Look for operations marked as once differentiable.

    Torch leaves an error in the graph for them, but one that is not on the way to any variable, so that it is passed
    over and the product comes out wrong without a word.
    """
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradients)):
        raise RuntimeError("an operation is marked as once_differentiable")


@contextmanager
def _explaining_missing_derivatives() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" in str(error) or "once_differentiable" in str(error):
            raise UserError(
                f"the model has no second derivative: {error}\nLoad it with plain attention "
                "(attn_implementation='eager'), or use mode='finite-difference'."
            ) from error
        raise


def free_memory(device: torch.device) -> int:
    """Return the memory that can be had on a device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = _CPU_DEFAULT
    return min(free, 2 * _CPU_DEFAULT)

"""Hessian-vector products as compiled code.

``torch.compile`` does not take second derivatives. What does work is to record what autograd does with a kept graph
for one vector: a plain list of tensor operations, in which everything that does not depend on the vector (the loss,
its gradient, what they saved) is already a number. That list is compiled. The numbers are its inputs, so one piece of
code serves all batches of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flatpatch.errors import UserError
from flatpatch.flatness.problem import graph_nodes

Product = Callable[[Tensor], Tensor]

# Compiled code by what was recorded: one process often measures one model again and again.
_CODE: dict[Any, Any] = {}
_COMPILED: set[tuple[float, ...]] = set()

# Measured with torch 2.8 on one thread of a Xeon, for a graph of 620 nodes: 43 s at first, 3 s for every further batch
# of its shape; products took 0.50 s instead of 0.87 s.
_SECONDS_AT_FIRST, _SECONDS_A_NODE, _SECONDS_A_NODE_AGAIN = 10.0, 0.05, 0.005
_SHARE_SAVED = 0.4


class CompileError(UserError):
    """A product could not be compiled, or the compiled one is wrong."""


def expected_gain(seconds: float, products: int, graphs: Sequence[tuple[float, ...]]) -> float:
    """Estimate what compiling would save, from measured times on one machine: a guide, not a promise.

    Args:
        seconds: What one product takes.
        products: How many are still to come.
        graphs: For each batch, what identifies its graph, first the number of its nodes; see :func:`graph_size`.

    Returns:
        Seconds saved on all of them less those for compiling; negative if it does not pay.
    """
    cost, known = 0.0, set(_COMPILED)
    for graph in graphs:
        cost += _SECONDS_A_NODE_AGAIN * graph[0]
        if graph not in known:
            cost += _SECONDS_AT_FIRST + (_SECONDS_A_NODE - _SECONDS_A_NODE_AGAIN) * graph[0]
            known.add(graph)
    return _SHARE_SAVED * seconds * products - cost


def graph_size(gradients: Sequence[Tensor], num_terms: float) -> tuple[float, ...]:
    """Return the number of autograd's nodes behind some gradients, and what else tells one graph from another."""
    return len(graph_nodes(gradients)), num_terms, sum(gradient.numel() for gradient in gradients)


class Compiler:
    """Compiles the products of several batches, each shape once in a process.

    Attributes:
        compiled: How many pieces of code it has used.
    """

    def __init__(self) -> None:
        self._used: set[Any] = set()

    @property
    def compiled(self) -> int:
        """How many pieces of code its products run."""
        return len(self._used)

    def compile(self, product: Product, v: Tensor, graph: tuple[float, ...] | None = None) -> Product:
        """Record and compile a function that is linear in its vector.

        Args:
            product: From a vector ``(n,)`` to a vector ``(n,)``, by torch operations; called within this call alone.
            v: A vector to record it with, and to compare the result with.
            graph: What identifies it to :func:`expected_gain` later.

        Returns:
            A function that gives the same up to rounding, and holds the tensors it needs.

        Raises:
            CompileError: If it cannot be compiled, or the compiled code gives something else.
        """
        expected = product(v).detach()
        try:
            # Imported here, as it takes seconds, and there may be no compiler.
            from torch._inductor.decomposition import select_decomp_table
            from torch.fx.experimental.proxy_tensor import make_fx

            recorded = make_fx(product, decomposition_table=select_decomp_table())(v)
            constants = _make_inputs_of_constants(recorded)
            shapes = tuple((c.shape, c.stride(), c.dtype, c.device) for c in constants)
            key = (recorded.code, shapes)
            with torch.no_grad():
                if key not in _CODE:
                    _CODE[key] = torch._inductor.compile(recorded, [v, *constants])
                code = _CODE[key]
                found = _only(code(v, *constants))
        except Exception as error:  # whatever a compiler and its tools may raise
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CompileError(f"the Hessian could not be compiled ({line}). Set compile=False.") from error
        limit = 1e4 * torch.finfo(v.dtype).eps * float(expected.double().norm())
        if not float((found.double() - expected.double()).norm()) <= limit:
            raise CompileError("the compiled Hessian gives other products than the plain one. Set compile=False.")
        self._used.add(key)
        if graph is not None:
            _COMPILED.add(graph)

        def run(vector: Tensor) -> Tensor:
            with torch.no_grad():
                return _only(code(vector, *constants))

        return run


def _only(result: Any) -> Tensor:
    tensor: Tensor = result[0] if isinstance(result, Sequence) else result
    return tensor


def _make_inputs_of_constants(recorded: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that the recorded operations hold into further inputs, equal ones into one."""
    constants: list[Tensor] = []
    places: dict[Any, fx.Node] = {}
    last = next(reversed([node for node in recorded.graph.nodes if node.op == "placeholder"]))
    for node in list(recorded.graph.nodes):
        if node.op != "get_attr":
            continue
        value: Tensor = getattr(recorded, str(node.target)).detach()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in places:
            with recorded.graph.inserting_after(last):
                last = recorded.graph.placeholder(f"constant_{len(constants)}")
            places[key] = last
            constants.append(value)
        node.replace_all_uses_with(places[key])
        recorded.graph.erase_node(node)
    recorded.recompile()
    return constants

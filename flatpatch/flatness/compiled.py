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

Product = Callable[[Tensor], Tensor]


class Compiler:
    """Compiles the products of several batches, each shape once.

    Attributes:
        compiled: How many pieces of code have been compiled.
    """

    def __init__(self) -> None:
        self._code: dict[Any, Any] = {}

    @property
    def compiled(self) -> int:
        """How many pieces of code there are."""
        return len(self._code)

    def compile(self, product: Product, v: Tensor) -> Product:
        """Record and compile a function that is linear in its vector.

        Args:
            product: From a vector ``(n,)`` to a vector ``(n,)``, by torch operations; called within this call alone.
            v: A vector to record it with, and to compare the result with.

        Returns:
            A function that gives the same up to rounding, and holds the tensors it needs.

        Raises:
            UserError: If it cannot be compiled, or the compiled code gives something else.
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
                if key not in self._code:
                    self._code[key] = torch._inductor.compile(recorded, [v, *constants])
                code = self._code[key]
                found = _only(code(v, *constants))
        except Exception as error:  # whatever a compiler and its tools may raise
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"the Hessian could not be compiled ({line}). Leave out compile=True.") from error
        limit = 1e4 * torch.finfo(v.dtype).eps * float(expected.double().norm())
        if not float((found.double() - expected.double()).norm()) <= limit:
            raise UserError("the compiled Hessian gives other products than the plain one. Leave out compile=True.")

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

"""Small problems with known curvature, and the slow obvious way to a Hessian: one second derivative after another."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatpatch.flatness import Problem

SPECTRA = {
    "identity": [1.0] * 12,
    "rank two": [3.0, 1.0] + [0.0] * 10,
    "zero": [0.0] * 12,
    "indefinite": [float(x) for x in range(-6, 7)],
    "repeated": [5.0, 5.0, 5.0, 2.0, 2.0, 1.0, 0.7, 0.5, 0.2, 0.1, 0.0, -1.0],
    "negative": [-4.0, -3.0, -2.0, -1.0, -0.5, -0.1],
    "gaps": [1000.0, 100.0, 10.0, 1.0] + [0.01 * k for k in range(60)],
}


def symmetric(values: Sequence[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make a dense matrix with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return ((Q * torch.tensor(values, dtype=torch.float64)) @ Q.T).to(dtype)


class Quadratic(nn.Module):
    """The loss 1/2 w'Aw, whose Hessian is A; the forward adds up one number per row of the input, all the same."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = A
        self.w = nn.Parameter(torch.linspace(-1, 1, len(A), dtype=A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.w @ (self.A @ self.w)) * torch.ones_like(x)


def quadratic_problem(values: Sequence[float], **options: Any) -> Problem:
    """A quadratic bowl (or saddle) with these curvatures; the batch only says how often to count it."""
    batch = torch.zeros(3, dtype=torch.float64)
    return Problem(Quadratic(symmetric(values)), [batch], lambda m, x: m(x).mean(), terms=len, **options)


def rows(*sizes: int, inputs: int = 4, classes: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random examples with class labels, in batches of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(sum(sizes), inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (sum(sizes),), generator=generator)
    return list(zip(X.split(list(sizes)), y.split(list(sizes)), strict=True))


def joined(batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LoRALinear(nn.Module):
    """A linear layer with its factors in the places where peft keeps them."""

    def __init__(self, inputs: int, outputs: int, r: int = 2, scaling: float = 1.5, bias: bool = True) -> None:
        super().__init__()
        base = nn.Linear(inputs, outputs, bias=bias)
        self.in_features = inputs
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False) if bias else None
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, outputs, bias=False)})
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        change = self.lora_B["default"](self.lora_A["default"](x))
        return F.linear(x, self.weight, self.bias) + self.scaling * change

    def merged(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, len(self.weight), bias=self.bias is not None, dtype=self.weight.dtype)
        W = self.weight + self.scaling * self.lora_B["default"].weight @ self.lora_A["default"].weight
        with torch.no_grad():
            layer.weight.copy_(W)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer


class TinyTransformer(nn.Module):
    """Embedding, one block with LayerNorm, fused attention, RMSNorm and GELU, and a tied head; (N, 5) tokens."""

    def __init__(self, *, lora: bool, width: int = 4, vocabulary: int = 6) -> None:
        super().__init__()
        make = LoRALinear if lora else nn.Linear
        self.embedding = nn.Embedding(vocabulary, width)
        self.first = nn.LayerNorm(width)
        self.q, self.k, self.v = make(width, width), nn.Linear(width, width), make(width, width)
        self.second = RMSNorm(width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.double()
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.first(x)
        q, k, v = (layer(h).reshape(*h.shape[:2], 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        x = x + self.dropout(self.down(F.gelu(self.up(self.second(x)))))
        return self.head(x)


def token_batches(*sizes: int, seed: int = 0, vocabulary: int = 6) -> list[dict[str, Tensor]]:
    """Token sequences with labels, about a third of them ignored, differently many in each batch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        labels = torch.randint(vocabulary, (size, 5), generator=generator)
        labels[torch.rand(size, 5, generator=generator) < 0.35] = -100
        labels[0, 0] = 1
        batches.append({"tokens": torch.randint(vocabulary, (size, 5), generator=generator), "labels": labels})
    return batches


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def mlp(seed: int = 0, inputs: int = 4, hidden: int = 5, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(0.3), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers).double()


def dense_hessian(problem: Problem, model: nn.Module | None = None, names: Sequence[str] | None = None) -> Tensor:
    """Differentiate the mean over all loss terms twice, row by row, as one function of one flat vector.

    It shares nothing with the package but the loss function: batches are joined by their numbers of terms here.

    Args:
        problem: For its batches and loss.
        model: Another model than the problem's, that computes the same.
        names: The parameters to vary, in this order; by default the problem's.
    """
    model = model or problem.model
    names = list(names or problem.scope.names)
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return problem._loss(self.model, batch)

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        chosen = {f"model.{n}": p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        total = sum(
            functional_call(module, chosen, (batch,)) * terms
            for batch, terms in zip(problem.batches, problem.num_terms, strict=True)
        )
        return total / sum(problem.num_terms)

    module = Loss()
    was_training = model.training
    model.eval()
    # Not torch.func.hessian, nor jacrev twice: in torch 2.8 both are wrong for LayerNorm's weight, where neither
    # gives a symmetric matrix nor the differences of the gradient. One row at a time is right.
    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(loss, torch.cat([parameters[name].detach().flatten() for name in names]))
    model.train(was_training)
    return H


def all_products(operator: Any) -> Tensor:
    """The whole matrix, column by column."""
    return operator.matmat(torch.eye(operator.size, dtype=torch.float64))


def import_folder(folder: Path, alias: str) -> ModuleType:
    """Import a package from its folder under another name, so that it does not replace an installed one."""
    spec = importlib.util.spec_from_file_location(
        alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def import_file(path: Path, alias: str) -> ModuleType:
    """Import one file under another name."""
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module

"""Sums and hashes of contents: what they tell apart, and that they are the same for equal contents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flatpatch.flatness.content import digest, sums_of


def swap(x: Tensor) -> None:
    x[[3, 70_003]] = x[[70_003, 3]]


def trade_a_bit(x: Tensor) -> None:
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    bits[5] += 1
    bits[9] -= 1


def turn_two_signs(x: Tensor) -> None:
    x[[1, 3]] *= -1


def turn_one_sign(x: Tensor) -> None:
    x[70_001] *= -1


def move_round(x: Tensor) -> None:
    x.copy_(x.roll(1))


CHANGES = [swap, trade_a_bit, turn_two_signs, turn_one_sign, move_round]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_sums_differ_after_any_change(change: Callable[[Tensor], None], dtype: torch.dtype) -> None:
    x = torch.randn(70_005, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = sums_of([x])
    assert sums_of([x.clone()]) == before
    change(x)
    assert sums_of([x]) != before


def test_sums_differ_by_the_order_and_the_bounds_of_the_tensors() -> None:
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    assert len({tuple(sums_of(t)) for t in ([a, b], [b, a], [torch.cat([a, b])], [a[:5], torch.cat([a[5:], b])])}) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, 2.0]), "n": 4},
        {"x": torch.tensor([2.0, 1.0]), "n": 3},
        {"x": torch.tensor([1.0, 2.0], dtype=torch.float64), "n": 3},
        {"x": torch.tensor([[1.0, 2.0]]), "n": 3},
        {"y": torch.tensor([1.0, 2.0]), "n": 3},
        {"x": np.array([1.0, 2.0], dtype=np.float32), "n": 3},
        {"x": [1.0, 2.0], "n": 3},
        {"x": torch.tensor([1.0, 2.0]), "n": "3"},
    ],
)
def test_digests_differ_by_values_names_types_and_shapes(other: Any) -> None:
    value = {"x": torch.tensor([1.0, 2.0]), "n": 3}
    assert digest(value) == digest({"x": torch.tensor([1.0, 2.0]), "n": 3})
    assert digest(other) != digest(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([True, False, True]),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor([1 + 2j]),
        torch.empty(0),
        torch.tensor(3.0),
        torch.eye(3).to_sparse(),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(9, dtype=torch.bfloat16)[1:],
        torch.arange(1, 6, dtype=torch.float64)[::2][:1],
        torch.tensor([1 + 2j]).conj().imag,
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_any_tensor_has_a_digest_that_its_copy_shares(tensor: Tensor) -> None:
    assert digest(tensor) == digest(tensor.clone())
    if tensor.numel():
        assert digest(tensor) != digest(torch.zeros_like(tensor))


def test_an_array_without_entries_has_a_digest() -> None:
    assert digest(np.zeros((0, 3))) == digest(np.zeros((0, 3))) != digest(np.zeros((0, 4)))


def test_quantised_tensors_are_told_apart_by_their_integers() -> None:
    one, same, other = (torch.quantize_per_tensor(torch.arange(4.0) + k, 0.1, 0, torch.quint8) for k in (0, 0, 1))
    assert digest(one) == digest(same) != digest(other)


def test_a_digest_is_the_same_in_another_process() -> None:
    code = "import torch; from flatpatch.flatness.content import digest; print(digest([torch.arange(70_000.0), 'a']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == digest([torch.arange(70_000.0), "a"])

r"""What tensors and data hold, in few numbers, so that a change can be told without keeping a copy.

A tensor's bits are read as words :math:`w_i` of 32 bits, in rows of 65,536, and of each row the sum
:math:`\sum_i c_i w_i \bmod 2^{64}` is kept, with fixed random coefficients of 64 bits (multilinear hashing, Lemire
and Kaser 2014, arXiv:1202.4961). Two rows that differ in whatever way - values swapped, a sign, one up and one down -
have the same sum with a probability of at most :math:`2^{-32}`, provided that they were not made to. It reads the
memory once where the tensor is; a cryptographic hash of a GPU's tensors would have to copy them first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatpatch.flatness.problem import Problem

_ROW = 2**16
_ROWS_AT_ONCE = {"cpu": 1, "cuda": 64}  # what a CPU's cache holds; on a GPU 32 MiB


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings and sequences, such as a batch's, and numpy's arrays as their bytes."""
    if isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else [value]
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)


def sums_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return numbers that change when a bit of the tensors does, or their order, or where one ends."""
    rows: dict[torch.device, list[Tensor]] = {}
    small: dict[torch.device, list[Tensor]] = {}
    sizes = []
    for tensor in tensors:
        words = _words(tensor)
        sizes.append(len(words))
        whole = len(words) // _ROW * _ROW
        if whole:
            rows.setdefault(words.device, []).extend(_row_sums(words[:whole]))
        small.setdefault(words.device, []).append(words[whole:])
    # One piece of what is left of all tensors: a GPU takes longer to start on many small ones than to read them.
    for device, pieces in small.items():
        rest = torch.cat(pieces)
        whole = len(rest) // _ROW * _ROW
        rows.setdefault(device, []).extend(_row_sums(rest[:whole]))
        rows[device].append((rest[whole:] * _coefficients(device)[: len(rest) - whole]).sum().reshape(1))
    return [*sizes, *(number for sums in rows.values() for number in torch.cat(sums).tolist())]


def digest(value: Any) -> str:
    """Return a hash of tensors, arrays, numbers and strings, nested in mappings and sequences as they may be.

    Args:
        value: What to tell from other values, by names, order, types, shapes and contents. Of an object of any other
            type only the type counts.

    Returns:
        32 hexadecimal digits, the same in every process.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for word in _description(value):
        hashed.update(f"{len(word)}:{word}".encode())
    hashed.update(repr(sums_of(tensors_in(value))).encode())
    return hashed.hexdigest()


def problem_content(problem: Problem) -> dict[str, str]:
    """Return what a problem's loss is made of, part by part, as far as it can be seen.

    The loss function is known by its name alone, and a model's plain attributes (a scaling, a tensor that is neither
    parameter nor buffer) not at all: compare the losses' values as well.
    """
    model, scope, loss = problem.model, problem.scope, problem._loss
    varied = {id(variable) for variable in scope.variables}
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return {
        "weights": digest([scope.name, scope.names, scope.variables]),
        "other weights": digest({name: p for name, p in model.named_parameters() if id(p) not in varied}),
        "buffers": digest(dict(model.named_buffers())),
        "data": digest([problem.batches, problem.weights]),
        "loss": f"{named.__module__}.{named.__qualname__}",
    }


def _description(value: Any) -> Iterator[str]:
    """Yield all but the tensors' contents."""
    yield type(value).__qualname__
    if isinstance(value, Tensor):
        yield f"{value.dtype} {[tuple(part.shape) for part in tensors_in(value)]}"
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key)
            yield from _description(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield str(len(value))
        for item in value:
            yield from _description(item)
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        yield repr(value)


def _words(tensor: Tensor) -> Tensor:
    """View a tensor's bits as 32-bit integers, filled up with zero bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg()
    if flat.is_quantized:
        flat = flat.int_repr()
    if flat.layout != torch.strided:
        flat = flat.to_dense()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    if len(flat) < 2:  # whose stride may be any number
        flat = flat.as_strided((len(flat),), (1,))
    size = flat.element_size()
    if size >= 4:
        return flat.view(torch.int32)
    words = 4 // size
    if flat.numel() % words or flat.storage_offset() % words:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % words)]).clone()
    return flat.view(torch.int32)


def _row_sums(words: Tensor) -> list[Tensor]:
    coefficients = _coefficients(words.device)
    together = _ROWS_AT_ONCE.get(words.device.type, 1)
    products = torch.empty(together, _ROW, dtype=torch.int64, device=words.device)  # once: to allocate takes longer
    parts = torch.split(words.view(-1, _ROW), together)
    return [torch.mul(part, coefficients, out=products[: len(part)]).sum(dim=1) for part in parts]


@cache
def _coefficients(device: torch.device) -> Tensor:
    numbers = np.random.PCG64(20131).random_raw(_ROW)  # the raw stream is the same in every version of numpy
    return torch.from_numpy(numbers.view(np.int64)).to(device)

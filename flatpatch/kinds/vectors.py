"""Arithmetic on vectors of which every weight has a tensor, or None for zero."""

from __future__ import annotations

from typing import Any

from flatpatch.kinds.base import Vector


def dot(one: Vector, other: Vector) -> Any:
    """Return the inner product over all weights, in float64; 0.0 where no weight has both."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    products = [_product(a, b) for a, b in pairs]
    return sum((product.to(products[0].device) for product in products[1:]), products[0]) if products else 0.0


def _product(a: Any, b: Any) -> Any:
    # A complex weight counts as its real and imaginary parts.
    return (a.conj() * b).real.double().sum() if a.is_complex() else (a.double() * b.double()).sum()


def plus(one: Vector, factor: Any, other: Vector) -> Vector:
    """Return ``one + factor * other``, None where both are."""
    found: Vector = []
    for a, b in zip(one, other, strict=True):
        if b is None:
            found.append(a)
            continue
        scaled = b * (factor.to(b.device) if hasattr(factor, "to") else factor)
        found.append(scaled if a is None else a + scaled)
    return found


def where(usable: Any, one: Vector) -> Vector:
    """Return the vector, or zeros if ``usable`` is false."""
    return [None if a is None else a.where(usable.to(a.device), a.new_zeros(())) for a in one]


def over(one: Any, other: Any) -> Any:
    """Return ``one / other`` of two inner products, and 0 where that is not a finite number."""
    return (one / other).nan_to_num(0.0, 0.0, 0.0)


def is_finite(*vectors: Vector) -> Any:
    """Return whether every entry is finite, as far as a norm in float64 can tell; on the device."""
    return sum(dot(vector, vector) for vector in vectors).isfinite()


def only_where(present: Vector, one: Vector) -> Vector:
    """Return the vector with None where another one has None."""
    return [None if a is None else b for a, b in zip(present, one, strict=True)]

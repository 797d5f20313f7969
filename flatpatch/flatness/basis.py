"""Orthonormal vectors too long to be joined into float64 at once, and what the algorithms share around them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatpatch.files import written_atomically

Progress = Callable[[int, int, str], None]
"""Called with the products done, the most that will be needed, and one line on how far it has come."""

# Elements that are turned into float64 at a time: 2 MiB, for a CPU's cache; on a GPU 128 MiB, for few calls.
_CHUNKS = {"cpu": 2**18}
_CHUNK = 2**24


class Basis:
    """Orthonormal vectors, kept in the operator's precision and multiplied in float64.

    Args:
        size: Length of a vector, n.
        dtype: How the vectors are stored.
        device: Where they are stored; the vectors given to the methods may be elsewhere.
        capacity: The most vectors there will be. Memory is taken as they come.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._store = torch.empty(0, size, dtype=dtype, device=device)

    @property
    def rows(self) -> Tensor:
        """The vectors as rows, (count, n)."""
        return self._store[: self.count]

    def append(self, columns: Tensor) -> Tensor:
        """Add unit vectors (n, p) and return them rounded as they are stored."""
        needed = self.count + columns.shape[1]
        if needed > self.capacity:
            raise ValueError(f"the basis holds {self.capacity} vectors, {needed} were asked for")
        if needed > len(self._store):
            grown = min(self.capacity, max(needed, 2 * len(self._store)))
            store = self._store.new_empty(grown, self._store.shape[1])
            store[: self.count] = self.rows
            self._store = store
        self._store[self.count : needed] = columns.T.to(self._store.device, self._store.dtype)
        self.count = needed
        return self._store[needed - columns.shape[1] : needed].T.to(columns.device)

    def coefficients(self, W: Tensor) -> Tensor:
        """Multiply the vectors with the columns of W (n, p): (count, p) in float64, on W's device."""
        total = torch.zeros(self.count, W.shape[1], dtype=torch.float64, device=W.device)
        for part in self._parts(W.device):
            total += self.rows[:, part].to(W.device, torch.float64) @ W[part].double()
        return total

    def gram(self) -> Tensor:
        """Multiply the vectors with each other as they are stored: (count, count), parts summed in float64."""
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self._store.device)
        for part in self._parts(self._store.device):
            total += self.rows[:, part] @ self.rows[:, part].T
        return total

    def combine(self, C: Tensor) -> Tensor:
        """Combine the vectors by the columns of C (count, p): (n, p) in float64, on C's device."""
        result = torch.empty(self._store.shape[1], C.shape[1], dtype=torch.float64, device=C.device)
        for part in self._parts(C.device):
            result[part] = self.rows[:, part].to(C.device, torch.float64).T @ C
        return result

    def remove_from(self, W: Tensor, passes: int = 2) -> Tensor:
        """Make the columns of W (n, p) orthogonal to the vectors, in place, by default twice.

        Once is not enough: what is left of a nearly dependent vector is mostly rounding (Giraud et al. 2005).

        Returns:
            The coefficients that were removed, (count, p).
        """
        removed = torch.zeros(self.count, W.shape[1], dtype=torch.float64, device=W.device)
        for _ in range(passes):
            coefficients = self.coefficients(W)
            for part in self._parts(W.device):
                W[part] -= self.rows[:, part].to(W.device, torch.float64).T @ coefficients
            removed += coefficients
        return removed

    def replace(self, C: Tensor) -> None:
        """Replace the vectors by the combinations C (count, p) of themselves, p <= count, in place."""
        for part in self._parts(self._store.device):
            combined = C.T.to(self._store.device) @ self.rows[:, part].double()
            self._store[: C.shape[1], part] = combined.to(self._store.dtype)
        self.count = C.shape[1]

    def _parts(self, device: torch.device) -> list[slice]:
        """Cut the vectors' length into what is multiplied at a time on a device."""
        size = self._store.shape[1]
        width = max(_CHUNKS.get(device.type, _CHUNK) // max(self.count, 1), 1)
        return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def orthonormal_columns(W: Tensor, basis: Basis, threshold: float, seed: int) -> tuple[Tensor, int]:
    """Turn the columns of W into unit vectors orthogonal to each other and to a basis.

    A column of which no more than ``threshold`` is left has no direction of its own: what is left of it is rounding.
    A random direction takes its place while the space has one left.

    Args:
        W: Float64 ``(n, p)``, already orthogonal to the basis.
        basis: What the result is to be orthogonal to.
        threshold: Length below which a column counts as lost.
        seed: Of the random directions.

    Returns:
        Unit vectors ``(n, q)``, q <= p, and how many of the p columns were lost.
    """
    n, count = W.shape
    room = n - basis.count
    while True:
        Q, R = _factor(W)
        short = (R.diagonal().abs() <= threshold).nonzero().flatten().tolist()
        if not short and W.shape[1] <= room:
            break
        # A lost column's direction is arbitrary, and has been taken out of those after it: begin again without it.
        dropped = short[0] if short else room
        W = torch.cat([W[:, :dropped], W[:, dropped + 1 :]], dim=1)
    lost = count - Q.shape[1]
    for index in range(lost):
        if Q.shape[1] < room:
            column = random_vectors(n, [index], seed=seed, device=W.device)
            Q = torch.cat([Q, column / column.norm()], dim=1)
    # To scale a short column to length 1 has also scaled up what rounding left of the basis; hence once more.
    for _ in range(1 + (lost > 0)):
        basis.remove_from(Q, passes=1)
        Q, _ = _factor(Q)
    return Q, lost


def _factor(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (n, p) as Q (n, p) times R (p, p). A column alone has only to be scaled, in a fourth of the time."""
    if W.shape[1] != 1:
        Q, R = torch.linalg.qr(W)
        return Q, R
    length = W.norm()
    return W / length, length.reshape(1, 1)


def random_vectors(
    n: int, indices: list[int], *, seed: int, device: torch.device, law: str = "gaussian", scale: float = 1.0
) -> Tensor:
    """Draw vectors that depend on the seed and their index alone, not on what is drawn with them.

    Args:
        n: Their length.
        indices: Which ones.
        seed: Of the whole family.
        device: Where the result goes. The numbers are drawn on the CPU, so they are the same everywhere.
        law: "gaussian", or "rademacher": plus or minus one.
        scale: A factor.

    Returns:
        One column per index, float64 ``(n, p)``.
    """
    columns = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        if law == "rademacher":
            column = torch.randint(2, (n,), generator=generator).double() * 2 - 1
        else:
            column = torch.randn(n, generator=generator, dtype=torch.float64)
        columns.append(column * scale)
    return torch.stack(columns, dim=1).to(device)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def load_state(path: Path | None, key: dict[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint, if there is one.

    Args:
        path: Where, or None.
        key: What it must have been made with: the algorithm's settings and the operator's fingerprint, whose losses
            may differ by as much as sums in another order.

    Returns:
        The state, or None if there is no file.

    Raises:
        ValueError: If the file is of another problem or other settings, or is no checkpoint.
    """
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["key"].items()
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, TypeError, KeyError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint ({line}): delete it, or name another file.") from error
    differing = sorted(
        name for name in {*key, *state["key"]} if not _agree(name, state["key"].get(name), key.get(name))
    )
    if differing:
        raise ValueError(
            f"{path} is of another problem (differing: {', '.join(differing)}). Delete it, or name another."
        )
    return state


def _agree(name: str, before: Any, now: Any) -> bool:
    if name != "losses" or before is None or now is None:
        return bool(before == now)
    return len(before) == len(now) and bool(np.allclose(before, now, rtol=1e-5, atol=0, equal_nan=True))

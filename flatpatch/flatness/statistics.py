"""Numbers that sum up a spectrum, from all its eigenvalues or from a quadrature of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from flatpatch.flatness.density import Quadrature


@dataclass(frozen=True)
class SpectrumStatistics:
    """A spectrum of n eigenvalues in a few numbers; from a quadrature they are estimates.

    Attributes:
        largest: Largest eigenvalue (or node), with sign.
        smallest: Smallest eigenvalue (or node), with sign.
        trace: Sum of all.
        negative_mass: Share of the eigenvalues below ``-threshold``, 0 to 1.
        negative_weight: Their share in the sum of all magnitudes, 0 to 1.
        outliers: How many eigenvalues are larger than ``outlier_fraction`` times the largest magnitude.
        outlier_fraction: What an outlier was taken to be.
        effective_rank: (sum of magnitudes)^2 / (sum of squares): how many equal eigenvalues would spread as wide.
        threshold: Magnitudes up to this one were taken to be rounding, in eigenvalue units.
    """

    largest: float
    smallest: float
    trace: float
    negative_mass: float
    negative_weight: float
    outliers: float
    outlier_fraction: float
    effective_rank: float
    threshold: float

    def as_dict(self) -> dict[str, float]:
        """Return all numbers, for a file."""
        return asdict(self)


def spectrum_statistics(
    spectrum: Tensor | Quadrature, *, outlier_fraction: float = 0.1, rounding: float = 1e-6
) -> SpectrumStatistics:
    """Sum up a spectrum.

    Args:
        spectrum: All eigenvalues ``(n,)``, or a quadrature, whose probes are averaged.
        outlier_fraction: Share of the largest magnitude above which an eigenvalue counts as an outlier. Being
            relative, it gives the same count for a rescaled loss.
        rounding: Share of the largest magnitude below which an eigenvalue counts as zero; so does one below a
            quadrature's ``error``.

    Returns:
        The numbers.

    Raises:
        ValueError: If the spectrum is empty, or a share is not between 0 and 1.
    """
    for name, share in (("outlier_fraction", outlier_fraction), ("rounding", rounding)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {share}")
    if isinstance(spectrum, Quadrature):
        values = spectrum.nodes.flatten().double()
        counts = spectrum.weights.flatten().double() * spectrum.size / len(spectrum.nodes)
        values, counts = values[counts > 0], counts[counts > 0]
    else:
        values = spectrum.flatten().double().cpu()
        counts = torch.ones_like(values)
    if len(values) == 0:
        raise ValueError("the spectrum is empty")
    size = float(counts.sum())
    scale = float(values.abs().max())
    threshold = max(rounding * scale, spectrum.error if isinstance(spectrum, Quadrature) else 0.0)
    magnitudes = float((counts * values.abs()).sum())
    squares = float((counts * values**2).sum())
    negative = values < -threshold
    return SpectrumStatistics(
        largest=float(values.max()),
        smallest=float(values.min()),
        trace=float((counts * values).sum()),
        negative_mass=float(counts[negative].sum()) / size,
        negative_weight=float((counts * values.abs())[negative].sum()) / magnitudes if magnitudes else 0.0,
        outliers=float(counts[values > outlier_fraction * scale].sum()),
        outlier_fraction=outlier_fraction,
        effective_rank=magnitudes**2 / squares if squares else 0.0,
        threshold=threshold,
    )


def first_to_fifth(values: Tensor) -> float:
    """Return the largest eigenvalue over the fifth largest, as Foret et al. 2021 (arXiv:2010.01412) report it.

    Args:
        values: At least the five largest eigenvalues, in any order.

    Returns:
        The ratio; infinite if the fifth is zero, NaN if the first is too.

    Raises:
        ValueError: If there are fewer than five.
    """
    if len(values) < 5:
        raise ValueError(f"the ratio of first to fifth needs five eigenvalues, got {len(values)}")
    largest = torch.sort(values.double(), descending=True).values
    first, fifth = float(largest[0]), float(largest[4])
    if fifth == 0:
        return math.copysign(math.inf, first) if first else math.nan
    return first / fifth

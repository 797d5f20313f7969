r"""The ascent step of SAM and ASAM, in place and undone exactly.

With the weights :math:`w`, the gradient :math:`g` and the radius :math:`\rho`,

- SAM (Foret et al. 2021, arXiv:2010.01412, Eq. 2) adds :math:`\epsilon = \rho\, g / \lVert g \rVert_2`,
- ASAM (Kwon et al. 2021, arXiv:2102.11600, Eq. 11) adds
  :math:`\epsilon = \rho\, T^2 g / \lVert T g \rVert_2`, element by element, with
  :math:`T = \lvert w \rvert + \eta`.

In the place of the gradient a control may have a random direction (``random_seed``): then
:math:`\epsilon = \rho\, z / \lVert z \rVert_2` with :math:`z` normal, of the same norm over the same weights.

The norms run over all the given parameters together, also where parameters have radii of their own: then
the step of parameter k is :math:`\rho_k\, g_k / \lVert g \rVert_2`. A complex parameter counts as its real
and imaginary parts, and its :math:`\lvert w \rvert` is the modulus. ASAM's radius is on another scale than
SAM's. Nothing here waits for a GPU: guards and measurements stay on the device. With the pairs of LoRA factors
given, :math:`\rho` is the length of the change of the weights that they add to (:mod:`flatpatch.sam.effective`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.kinds import mixed_seed
from flatpatch.sam.effective import length, make_steepest
from flatpatch.sam.pairs import LoraPair

SYNCS = ("local", "global")
ADAPTIVE_AT_RANDOM = "a random direction has no adaptive form: give adaptive=True or random_seed, not both"
ADAPTIVE_AND_EFFECTIVE = "ASAM scales each entry by itself, so its radius cannot be that of the merged weight"

# float64 work areas hold at most this many elements (8 MiB), whatever the model's size.
_CHUNK = 2**20


@dataclass(frozen=True)
class AscentStep:
    """What one ascent step did. Every field is a 0-dimensional tensor on the parameters' device.

    Attributes:
        grad_norm: Norm of the ascent gradient, before any scaling by the weights (ASAM).
        perturbation_norm: Norm of the intended perturbation; ``rho`` for SAM if all parameters share it, 0 when
            there was no step.
        effective_perturbation_norm: Norm of what the weights really moved by, after rounding to their type.
        perturbation_cosine: Cosine between the effective and the intended perturbation; NaN if one is zero.
        finite: Whether the ascent gradient was finite. If not, the weights did not move.
    """

    grad_norm: Tensor  # (), float64
    perturbation_norm: Tensor  # (), float64
    effective_perturbation_norm: Tensor  # (), float64
    perturbation_cosine: Tensor  # (), float64
    finite: Tensor  # (), bool


class _Group:
    """Parameters of one device, type and radius, with a flat perturbation and their saved values.

    Complex parameters are held as real ones with a last dimension of 2, in the same memory.
    """

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor | None], rho: float) -> None:
        self.rho = rho
        self.complex = parameters[0].is_complex()
        self.parameters = [torch.view_as_real(p) for p in parameters] if self.complex else parameters
        first = self.parameters[0]
        self.work_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.step = torch.empty(sum(self.sizes), dtype=self.work_dtype, device=first.device)
        if any(gradient is None or gradient.is_sparse for gradient in gradients):
            self.step.zero_()
        present = [(view, g) for view, g in zip(self.views(self.step), gradients, strict=True) if g is not None]
        dense = [(view, _real(g)) for view, g in present if not g.is_sparse]
        if dense:
            torch._foreach_copy_([view for view, _ in dense], [g for _, g in dense])
        for view, gradient in present:
            if gradient.is_sparse:
                (torch.view_as_complex(view) if self.complex else view).add_(gradient)
        self.saved = self.step.new_empty(0, dtype=first.dtype)

    def views(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat, self.sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def flat_weights(self, dtype: torch.dtype) -> Tensor:
        flat = torch.empty(sum(self.sizes), dtype=dtype, device=self.step.device)
        torch._foreach_copy_(self.views(flat), self.parameters)
        return flat

    def magnitudes(self) -> Tensor:
        saved = self.saved.to(self.work_dtype, copy=True)
        if not self.complex:
            return saved.abs_()
        moduli: Tensor = torch.linalg.vector_norm(saved.view(-1, 2), dim=1)
        return moduli.repeat_interleave(2)

    def move(self) -> None:
        if self.step.dtype == self.saved.dtype:
            torch._foreach_add_(self.parameters, self.views(self.step))
        else:
            # 16-bit weights: the sum is taken in float32 and rounded once.
            torch._foreach_copy_(self.parameters, self.views(self.step + self.saved))

    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self.views(self.saved))


@contextmanager
def perturbed(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
    *,
    rho: float | Sequence[float],
    adaptive: bool = False,
    eta: float = 0.01,
    sync: str = "local",
    random_seed: int | None = None,
    pairs: Sequence[LoraPair] | None = None,
    diagnostics: bool = True,
) -> Iterator[AscentStep]:
    """Hold the weights at ``w + epsilon`` inside the block; leaving it always restores them, bit for bit.

    Weights are only written in place, so parameters may be views into another buffer (DeepSpeed's flat
    groups are). Norms are accumulated in float64; 16-bit weights get ``w + epsilon`` computed in float32
    and rounded once. A zero gradient gives a zero step; so does a gradient with an infinity or a NaN,
    which ``AscentStep.finite`` tells. Beyond the weights and the gradients this takes at most three
    float32 copies of the perturbed weights and 8 MiB (float64 weights: three float64 copies); inside the
    block one copy.

    Args:
        parameters: The weights to perturb; the same tensor given twice counts once.
        gradients: One per parameter, dense or sparse, None where there is none. Their common scale does not matter.
        rho: Radius in weight units, or one radius per parameter (then the norm is still one over all of
            them). 0 leaves every weight as it is.
        adaptive: ASAM instead of SAM.
        eta: ASAM's addition to ``|w|``. 0 makes it invariant to rescaling A by c and B by 1/c, but
            weights that are zero (a new LoRA B) then never move.
        sync: "local": this process's own gradient (m-sharpness, the paper's choice); "global": the
            gradient is averaged over all processes of ``torch.distributed`` first.
        random_seed: Take a normal direction drawn from this seed instead of the gradient's: a control, of the same
            norm over the same weights. The gradients then say only which weights have one, and whether to move.
            No global random generator is touched. Of several processes each has a direction of its own, and with
            ``sync="global"`` all have one.
        pairs: Let rho be the length of the change of the weights that these factors add to, to first order, and take
            the steepest step of that length, see :mod:`flatpatch.sam.effective`; this waits for a GPU. By default rho
            is the norm of the factors' own step.
        diagnostics: Whether to measure the effective perturbation; else those fields are NaN.

    Yields:
        What the step did.

    Raises:
        ValueError: If rho or eta is negative or not finite, sync is unknown, or the numbers of parameters,
            gradients and radii differ, or a random direction is to be adaptive, or ASAM to have ``pairs``.
        UserError: If a parameter is itself sparse.
    """
    parameters = list(parameters)
    radii = list(rho) if isinstance(rho, Sequence) else [rho] * len(parameters)
    for radius in {0.0, *radii}:
        check_settings(radius, eta, sync)
    if adaptive and random_seed is not None:
        raise ValueError(ADAPTIVE_AT_RANDOM)
    if adaptive and pairs is not None:
        raise ValueError(ADAPTIVE_AND_EFFECTIVE)
    with torch.no_grad():
        groups = _grouped(parameters, gradients, radii, keep_missing=sync == "global")
        del parameters, gradients
        if sync == "global" and dist.is_available() and dist.is_initialized():
            for group in groups:
                dist.all_reduce(group.step)
                group.step.div_(dist.get_world_size())
        if random_seed is not None and sync == "local" and dist.is_available() and dist.is_initialized():
            random_seed = mixed_seed(random_seed, dist.get_rank())
        grad_norm, finite = _scale_to_steps(groups, eta if adaptive else None, random_seed, pairs)
    try:
        with torch.no_grad():
            for group in groups:
                group.move()
            # A surrounding autocast keeps 16-bit casts of the weights, which writing in place does not renew.
            torch.clear_autocast_cache()
            step = _measured(groups, grad_norm, finite, diagnostics)
            for group in groups:
                group.step = group.step.new_empty(0)
        yield step
    finally:
        with torch.no_grad():
            for group in groups:
                group.restore()
            torch.clear_autocast_cache()


def check_settings(rho: float, eta: float, sync: str) -> None:
    """Raise ValueError for settings no ascent step can have."""
    for name, value in (("rho", rho), ("eta", eta)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if sync not in SYNCS:
        raise ValueError(f"sync must be one of {', '.join(SYNCS)}, got {sync!r}")


def _grouped(
    parameters: Iterable[Tensor],
    gradients: Iterable[Tensor | None],
    radii: Iterable[float],
    *,
    keep_missing: bool,
) -> list[_Group]:
    """Collect by device, type and radius; missing gradients are dropped, or zeros if other processes may have them."""
    buckets: dict[tuple[torch.device, torch.dtype, float], tuple[list[Tensor], list[Tensor | None]]] = {}
    seen: set[int] = set()
    for parameter, gradient, rho in zip(parameters, gradients, radii, strict=True):
        if parameter.layout is not torch.strided:
            raise UserError(
                f"SAM cannot perturb a weight that is itself sparse (layout {parameter.layout}, shape "
                f"{tuple(parameter.shape)}). Keep the weight dense; its gradient may be sparse."
            )
        if id(parameter) in seen or (gradient is None and not keep_missing):
            continue
        seen.add(id(parameter))
        bucket = buckets.setdefault((parameter.device, parameter.dtype, rho), ([], []))
        bucket[0].append(parameter)
        bucket[1].append(gradient)
    return [_Group(*bucket, rho) for (_, _, rho), bucket in buckets.items()]


def _real(gradient: Tensor) -> Tensor:
    if not gradient.is_complex():
        return gradient
    return torch.view_as_real(gradient.resolve_conj().resolve_neg())


def _norm(vectors: Sequence[Tensor]) -> Tensor:
    """The norm of all vectors together, in float64, a piece at a time to bound the float64 copies."""
    norms: list[Tensor] = [
        torch.linalg.vector_norm(piece, dtype=torch.float64).to(vectors[0].device)
        for vector in vectors
        for piece in torch.split(vector, _CHUNK)
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _scale_to_steps(
    groups: list[_Group], eta: float | None, random_seed: int | None, pairs: Sequence[LoraPair] | None
) -> tuple[Tensor, Tensor]:
    """Save the weights, turn the gradients into perturbations; return the gradient's norm and whether finite."""
    if not groups:
        return torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.bool)
    grad_norm = norm = _norm([group.step for group in groups])
    for group in groups:
        group.saved = group.flat_weights(group.parameters[0].dtype)
    scales: list[Tensor] = []
    if eta is not None:
        scales = [group.magnitudes().add_(eta) for group in groups]
        for group, scale in zip(groups, scales, strict=True):
            group.step.mul_(scale)
        norm = _norm([group.step for group in groups])
    finite = norm.isfinite()
    usable = finite & (norm > 0)
    if random_seed is not None:
        for place, group in enumerate(groups):
            generator = torch.Generator(group.step.device).manual_seed(mixed_seed(random_seed, place))
            group.step.normal_(generator=generator)
        norm = _norm([group.step for group in groups])
    if pairs is not None:
        _divide(groups, norm, usable)
        steps = {
            id(p): view for group in groups for p, view in zip(group.parameters, group.views(group.step), strict=True)
        }
        if random_seed is None:
            make_steepest(pairs, steps, smallest=max(group.rho for group in groups))
        norm = length(pairs, steps).to(norm.device)
        usable = usable & (norm > 0)
    _divide(groups, norm, usable)
    for group in groups:
        group.step.mul_(group.rho)
    for group, scale in zip(groups, scales, strict=False):
        group.step.mul_(scale)
    return grad_norm, finite


def _divide(groups: list[_Group], norm: Tensor, usable: Tensor) -> None:
    """Divide all steps by a norm, or make them zero where it is not usable."""
    divisor = torch.where(usable, norm, 1.0)
    for group in groups:
        device = group.step.device
        # Dividing first keeps every entry within [-1, 1], so no gradient is too small or too large to scale.
        group.step.masked_fill_(~usable.to(device), 0.0).div_(divisor.to(device))


def _measured(groups: list[_Group], grad_norm: Tensor, finite: Tensor, diagnostics: bool) -> AscentStep:
    nan = torch.full_like(grad_norm, math.nan)
    if not groups:
        zero = torch.zeros_like(grad_norm)
        return AscentStep(grad_norm, zero, zero, nan, finite)
    if not diagnostics:
        return AscentStep(grad_norm, nan, nan, nan, finite)
    intended = _norm([group.step for group in groups])
    moved = [group.flat_weights(group.work_dtype).sub_(group.saved) for group in groups]
    effective = _norm(moved)
    # The law of cosines: unlike a dot product of near-equal vectors it is exact close to 1.
    lost = _norm([vector.sub_(group.step) for vector, group in zip(moved, groups, strict=True)])
    product = 2 * intended * effective
    cosine = (intended.square() + effective.square() - lost.square()) / product
    return AscentStep(grad_norm, intended, effective, torch.where(product > 0, cosine.clamp(-1.0, 1.0), nan), finite)

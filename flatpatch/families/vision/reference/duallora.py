r"""DualLoRA (arXiv:2411.00623), a reconstruction: an orthogonal and a residual LoRA beside each frozen projection.

The paper's text could not be read. What follows is sourced from its abstract and from summaries where marked [S], the
usual construction of GPM where marked [G], and a decision of ours where marked [D]; :mod:`.dual_choices` has the
choices that are settings. Its numbers are of the reconstruction, never of the paper.

For each block, with its input x, class token c, and :math:`\Psi_\tau` the directions that task :math:`\tau` added to
:math:`\Phi = [\Psi_1, \dots]` (orthonormal columns, d in all at most):

- orthogonal adapter: :math:`B_o A_o P` with :math:`P = I - \Phi \Phi^T` of the tasks before [S; P within the forward
  pass D]. Nothing that lies in :math:`\Phi` passes through it, whatever optimizer and SAM do: the gradient of
  :math:`A_o` is the projected one, and so is SAM's ascent step. At the task's end it is merged [D];
- residual adapter: :math:`R \Psi^T` on some tasks' directions [S], its R from zero, unconstrained [D];
- trained are both, with the cross-entropy over the task's own classes [D];
- answered is with the merged orthogonal parts and every task's residual adapter, weighted for each image by how much
  of c lies in the directions, :math:`a_\tau = |\Psi_\tau^T c| / |c|`, over what is usual for the task's own images
  [S that they are scaled by similarity; D how];
- the same similarities guess the task, and the guess changes the logits [S that; D how].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatpatch.families.dualgpm import Subspace, input_covariances, threshold
from flatpatch.families.vision.dual_choices import NEW, DualChoices
from flatpatch.families.vision.reference.options import VisionReference
from flatpatch.families.vision.reference.vit import KeyValueLoRA, LoRALinear, LoRAViT, build

Batches = Iterable[tuple[Tensor, Tensor]]
NOBODY = -1


class Memory(nn.Module):
    """What the keys and values of a block share; nothing of it is trained.

    Attributes:
        bases: Orthonormal columns, zero where there is none yet, ``(d, d)``.
        energy: Of the class tokens of the task that added each column, the share that lay along it, ``(d,)``.
        owner: The task that added each column, from 0, or ``NOBODY``, ``(d,)``.
        active: 1 for the columns that the present task's residual adapter works on, else 0, ``(d,)``.
        projection: P, out of the tasks before, ``(d, d)``.
    """

    bases: Tensor
    energy: Tensor
    owner: Tensor
    active: Tensor
    projection: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("bases", torch.zeros(width, width))
        self.register_buffer("energy", torch.zeros(width))
        self.register_buffer("owner", torch.full((width,), NOBODY))
        self.register_buffer("active", torch.zeros(width))
        self.register_buffer("projection", torch.eye(width))

    @property
    def directions(self) -> Tensor:
        """The columns there are, ``(d, K)``."""
        return self.bases[:, self.owner != NOBODY]

    def add(self, directions: Tensor, task: int, energy: Tensor) -> None:
        """Keep a task's directions, ``(d, k)``, orthonormal and orthogonal to those there are, with their energies."""
        start = int((self.owner != NOBODY).sum())
        end = start + directions.shape[1]
        self.bases[:, start:end] = directions.to(self.bases)
        self.energy[start:end] = energy.to(self.energy)
        self.owner[start:end] = task

    def project_out(self) -> None:
        """Keep the orthogonal adapter out of the directions there are."""
        unit = torch.eye(len(self.bases), device=self.bases.device)
        self.projection.copy_(unit - self.directions @ self.directions.T)

    def activate(self, task: int, basis: str) -> None:
        """Let a task's residual adapter work where ``residual_basis`` says."""
        before = (self.owner != NOBODY) & (self.owner < task)
        chosen = {NEW: self.owner == task, "previous": before & (self.owner == task - 1), "old": before}[basis]
        self.active.copy_(chosen)

    def knows(self, tasks: int) -> bool:
        """Tell whether each of so many tasks added a direction."""
        return {*range(tasks)} <= {*self.owner.tolist()}

    def similarities(self, c: Tensor, tasks: int, *, relative: bool) -> tuple[Tensor, Tensor]:
        """Return how much of class tokens lies in each task's directions and in each column's.

        Args:
            c: ``(n, d)``.
            tasks: How many have been seen.
            relative: Over the root mean square of the task's own class tokens, so that these are about 1.

        Returns:
            ``(n, tasks)`` and ``(n, d)``: lengths of the projections over the length of c, in [0, 1] unless relative.
        """
        tiny = torch.finfo(c.dtype).tiny
        energy = (c @ self.bases).square() / c.square().sum(1, keepdim=True).clamp_min(tiny)
        mine = F.one_hot(self.owner + 1, tasks + 1)[:, 1:].to(c.dtype)
        of_task, of_direction = energy @ mine, energy
        if relative:
            of_task = of_task / (self.energy.to(mine) @ mine).clamp_min(tiny)
            of_direction = of_direction / self.energy.to(energy).clamp_min(tiny)
        return of_task.sqrt(), of_direction.sqrt()


def recall_weights(similarity: Tensor, rule: str) -> Tensor:
    """Return the weights of a dynamic memory for each image.

    Args:
        similarity: a, not negative, ``(n, m)``.
        rule: "max": a over its largest; "share": its square over the sum of the squares; "off": 1.

    Returns:
        ``(n, m)``; zeros where nothing is similar.
    """
    if rule == "off":
        return torch.ones_like(similarity)
    found = similarity.square() if rule == "share" else similarity
    most = found.sum(1, keepdim=True) if rule == "share" else found.amax(1, keepdim=True)
    return found / most.clamp_min(torch.finfo(found.dtype).tiny)


def calibrated(logits: Tensor, scores: Tensor, task_of: Tensor, choices: DualChoices) -> Tensor:
    """Return logits that know which task the image may be of.

    Args:
        logits: Of all classes seen, ``(n, classes)``.
        scores: Of the tasks, u, ``(n, tasks)``.
        task_of: The task of each class, ``(classes,)``.
        choices: ``calibration`` and its numbers.
    """
    if choices.calibration == "off":
        return logits
    logs = (scores / choices.temperature).log_softmax(1)
    if choices.calibration == "soft":
        return logits + choices.calibration_weight * logs[:, task_of]
    best, guess = logs.exp().max(1)
    others = (best >= choices.confidence)[:, None] & (task_of != guess[:, None])
    return logits.masked_fill(others, -torch.inf)


def new_directions(moment: Tensor, Phi: Tensor, share: float, energy: str) -> Tensor:
    """Return the directions that a task adds.

    Those of the most energy outside ``Phi``, as few as let both together hold the share, but one at least; none where
    nothing is left outside but rounding errors.

    Args:
        moment: M, the mean of c c^T over the task's class tokens, ``(d, d)``.
        Phi: ``(d, K)`` with orthonormal columns.
        share: Of the energy, in (0, 1].
        energy: "sigma2": the trace of M; "sigma4": the sum of its squared eigenvalues.

    Returns:
        ``(d, k)`` in M's dtype, orthonormal and orthogonal to ``Phi``.
    """
    M, Q = moment.double(), Phi.double()
    outside = torch.eye(len(M), dtype=M.dtype, device=M.device) - Q @ Q.T
    values, vectors = torch.linalg.eigh(outside @ M @ outside)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    real = values > len(M) * torch.finfo(moment.dtype).eps * M.trace()
    vectors = vectors[:, : min(int(real.sum()), Q.shape[0] - Q.shape[1])]
    added = values if energy == "sigma2" else values.square()
    total = M.trace() if energy == "sigma2" else M.square().sum()
    # What Phi holds already: in squares, whatever is not outside it on both sides.
    held = (Q * (M @ Q)).sum() if energy == "sigma2" else total - added.sum()
    count = int((held + added.cumsum(0) < share * total).sum()) + 1
    vectors = vectors[:, :count]
    found: Tensor = torch.linalg.qr(vectors - Q @ (Q.T @ vectors)).Q.to(moment.dtype)
    return found


class DualLoRALinear(LoRALinear):
    """A linear layer with both adapters: ``(W + B (A_kept + A P) + R Psi^T + old) x + b`` in training.

    The orthogonal adapter's factors are ``lora_A["new"]`` and ``lora_B["new"]``; R is ``lora_B["residual"]``, with a
    column for each column of the block's bases, of which the inactive ones meet zeros.

    Attributes:
        kept: A_kept, what an orthogonal adapter that all tasks share was before this one, ``(rank, in)``.
        residual: R of the tasks before, which only :meth:`recall` uses, ``(out, in)``.
    """

    kept: Tensor
    residual: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, memory: Memory) -> None:
        super().__init__(weight, bias, rank)
        self.memory = memory
        R = nn.Linear(self.in_features, self.out_features, bias=False)
        nn.init.zeros_(R.weight)
        self.lora_B["residual"] = R
        self.register_buffer("kept", torch.zeros_like(self.factor("A").data))
        self.register_buffer("residual", torch.zeros_like(weight))

    @property
    def up(self) -> nn.Parameter:
        """The present residual adapter, ``(out, in)``."""
        return self.lora_B["residual"].get_parameter("weight")

    def orthogonal(self) -> Tensor:
        """Return what the orthogonal adapter adds to W: ``(out, in)``."""
        return self.factor("B") @ (self.kept + self.factor("A") @ self.memory.projection)

    def update(self) -> Tensor:
        """Return what the present task adds to W: ``(out, in)``."""
        return self.orthogonal() + (self.up * self.memory.active) @ self.memory.bases.T

    def recall(self, x: Tensor, weights: Tensor) -> Tensor:
        """Map ``(n, tokens, in)`` with every task's residual adapter, its columns weighted by ``(n, in)``."""
        learned = self.residual + self.up * self.memory.active
        coordinates = (x @ self.memory.bases) * weights[:, None]
        return F.linear(x, self.weight + self.orthogonal() + self.old, self.bias) + F.linear(coordinates, learned)

    @torch.no_grad()
    def start(self, *, shared: bool) -> None:
        """Store the last task's adapters and begin others, which change nothing yet."""
        self.residual += self.up * self.memory.active
        self.up.zero_()
        if shared:
            self.kept += self.factor("A") @ self.memory.projection
            self.factor("A").zero_()
        else:
            self.old += self.orthogonal()
            self.factor("B").zero_()
            nn.init.kaiming_uniform_(self.factor("A"), a=math.sqrt(5))  # as torch begins a linear layer


class DualKeyValueLoRA(KeyValueLoRA):
    """An attention's joint projection whose keys and values have both adapters.

    Attributes:
        answers: None while a task is learned; else how, and how many tasks have been seen.
        similarity: While answering: of the last images to each task, ``(n, tasks)``.
        plain: Whether the adapters are left out.
    """

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__(qkv, rank)
        self.memory = Memory(qkv.in_features)
        self.k, self.v = (
            DualLoRALinear(part.weight.data, None if part.bias is None else part.bias.data, rank, self.memory)
            for part in (self.k, self.v)
        )
        self.answers: tuple[DualChoices, int] | None = None
        self.similarity = torch.empty(0)
        self.plain = False

    @property
    def parts(self) -> tuple[DualLoRALinear, DualLoRALinear]:
        """Keys and values."""
        return self.k, self.v  # type: ignore[return-value]

    def factors(self, which: str) -> list[nn.Parameter]:
        """Return the orthogonal A, or both adapters' B, of keys and of values."""
        more = [part.up for part in self.parts] if which == "B" else []
        return [*super().factors(which), *more]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, d)`` to queries, keys and values ``(n, tokens, 3 d)``."""
        if self.plain:
            return torch.cat([F.linear(x, part.weight, part.bias) for part in (self.q, *self.parts)], dim=-1)
        if self.answers is None:
            return super().forward(x)
        choices, tasks = self.answers
        self.similarity, by_direction = self.memory.similarities(
            x[:, 0], tasks, relative=choices.similarity == "relative"
        )
        if choices.memory_by == "direction":
            weights = recall_weights(by_direction, choices.memory)
        else:
            of_task = recall_weights(self.similarity, choices.memory)
            weights = F.pad(of_task, (1, 0))[:, self.memory.owner + 1]
        return torch.cat([self.q(x), *(part.recall(x, weights) for part in self.parts)], dim=-1)


class DualLoRAViT(LoRAViT):
    """The model, whose answers recall all tasks; its logits of one task are those that the task was learned with."""

    projection = DualKeyValueLoRA
    choices = DualChoices()

    @property
    def dual_layers(self) -> list[DualKeyValueLoRA]:
        """The adapted projections, from the first block to the last."""
        return [layer for layer in self.layers if isinstance(layer, DualKeyValueLoRA)]

    def recalled_logits(self, images: Tensor) -> Tensor:
        """Return calibrated logits of all classes seen so far: ``(n, classes)``."""
        layers, tasks = self.dual_layers, self.task + 1
        for layer in layers:
            layer.answers = (self.choices, tasks)
        try:
            features = self.vit(images)
            # A block says nothing of the task where some task added no direction, as the first block, whose class
            # token is the same for all images.
            telling = [layer.similarity for layer in layers if layer.memory.knows(tasks)]
        finally:
            for layer in layers:
                layer.answers = None
        logits = torch.cat([head(features) for head in self.heads[:tasks]], dim=1)
        if not telling:
            return logits
        scores = torch.stack(telling).square().mean(0)
        counts = torch.tensor([head.get_parameter("bias").numel() for head in self.heads[:tasks]], device=images.device)
        task_of = torch.arange(tasks, device=images.device).repeat_interleave(counts)
        return calibrated(logits, scores, task_of, self.choices)

    def predict(self, images: Tensor) -> Tensor:
        """Return for each image the most likely of all classes seen so far: ``(n,)``."""
        return self.recalled_logits(images).argmax(dim=1)


class DualLoRA:
    """What DualLoRA does before and after each task.

    Attributes:
        subspaces: The directions of the tasks so far, one per layer.
    """

    def __init__(self, reference: VisionReference, model: DualLoRAViT, tasks: int) -> None:
        self.reference = reference
        self.model = model
        self.tasks = tasks
        self.subspaces: list[Subspace] = []

    def begin(self, batches: Batches) -> None:
        """Merge the last task's adapters, and say where the new ones may work."""
        choices, task = self.reference.dual, self.model.task
        for layer in self.model.dual_layers:
            if task:
                for part in layer.parts:
                    part.start(shared=choices.orthogonal == "shared")
            layer.memory.project_out()
        if choices.basis_time == "before":
            self._look(batches)
        for layer in self.model.dual_layers:
            layer.memory.activate(task, choices.residual_basis)

    def end(self, batches: Batches) -> None:
        """Keep the directions of the learned task's inputs, unless they were kept before it."""
        if self.reference.dual.basis_time == "after":
            self._look(batches)

    @torch.no_grad()
    def _look(self, batches: Batches) -> None:
        """Add the directions of the task's class tokens to the bases."""
        layers: list[DualKeyValueLoRA] = self.model.dual_layers

        def show_all() -> None:
            for images, _ in batches:
                self.model(images.to(self.reference.device))

        for layer in layers:
            layer.plain = self.reference.dual.basis_features == "pretrained"
        try:
            moments = input_covariances(layers, show_all, tokens=slice(1))
        finally:
            for layer in layers:
                layer.plain = False
        share = threshold(self.reference.lamb, self.reference.lame, self.model.task, self.tasks)
        for layer, moment in zip(layers, moments, strict=True):
            found = new_directions(moment, layer.memory.directions.cpu(), share, self.reference.dual.basis_energy)
            energy = (found * (moment @ found)).sum(0) / moment.trace()
            layer.memory.add(found, self.model.task, energy)
        self.subspaces = [Subspace(layer.memory.directions.cpu().numpy()) for layer in layers]


def make_model(reference: VisionReference, classes: Sequence[int]) -> LoRAViT:
    """Make a method's model; see `build`."""
    if reference.method != "duallora":
        return build(reference, classes)
    model = cast(DualLoRAViT, build(reference, classes, DualLoRAViT))
    model.choices = reference.dual
    return model

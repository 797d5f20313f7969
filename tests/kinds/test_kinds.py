"""Each kind of SAM against a plain implementation of its formula, in every place where SAM enters a training."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.families.vision.passes import LoopPasses
from flatpatch.kinds import KINDS, Kind, make_kind
from flatpatch.sam import SAM, RandomState, SAMTrainingStep, first_examples
from flatpatch.settings import DEFAULTS, FIELDS

RHO, RATE, MOMENTUM, STEPS = 0.3, 0.1, 0.5, 7
OPTIONS: dict[str, dict[str, Any]] = {
    "sam": {},
    "gsam": {"gsam_alpha": 0.6},
    "fsam": {"fsam_sigma": 0.8, "fsam_lambda": 0.7},
    "looksam": {"looksam_k": 3, "looksam_alpha": 0.5},
    "cflat": {"cflat_lambda": 0.4},
    "msam": {},
}
# What makes a kind SAM itself.
AS_SAM = {
    "gsam": {"gsam_alpha": 0.0},
    "fsam": {"fsam_sigma": 0.0},
    "looksam": {"looksam_k": 1},
    "cflat": {"cflat_lambda": 0.0},
}


class Problem(nn.Module):
    """A smooth loss without symmetry over three weights, of which the last has no gradient, and a batch of inputs."""

    def __init__(self, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.lora_A = nn.Parameter(drawn(3, 2))
        self.lora_B = nn.Parameter(drawn(3))
        self.unused = nn.Parameter(drawn(2))
        self.inputs, self.dropout = drawn(5, 2), nn.Dropout(dropout)

    def forward(self, inputs: Tensor | None = None) -> Tensor:
        inputs = self.inputs if inputs is None else inputs
        hidden = torch.tanh(self.dropout(inputs) @ self.lora_A.T)
        return ((hidden @ self.lora_B - inputs.sum(1)) ** 2).mean() + 0.1 * self.lora_B.pow(4).sum()


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


# Where SAM enters: each returns a function that takes a step.


def by_closure(model: Problem, kind: Kind, rho: float, chosen: list[Tensor] | None = None) -> Callable[[], Any]:
    sam = SAM(optimizer_of(model), rho=rho, kind=kind, parameters=chosen)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return lambda: sam.step(closure)


def by_trainer(model: Problem, kind: Kind, rho: float, chosen: list[Tensor] | None = None) -> Callable[[], Any]:
    optimizer = optimizer_of(model)

    def training_step(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = model(**inputs)
        loss.backward()
        return loss.detach()

    trainer = SimpleNamespace(model=model, training_step=training_step, optimizer=optimizer)
    scope = "all" if chosen is None or len(chosen) == 3 else "lora"
    step = SAMTrainingStep(trainer, rho=rho, kind=kind, scope=scope)

    def take() -> Any:
        optimizer.zero_grad()
        loss = step(model, {})
        optimizer.step()
        return loss

    return take


def by_loop(model: Problem, kind: Kind, rho: float, chosen: list[Tensor] | None = None) -> Callable[[], Any]:
    optimizer, trained = optimizer_of(model), list(model.parameters())
    chosen = chosen or trained

    def take() -> Any:
        random_state = RandomState()
        loss = model()
        optimizer.zero_grad()
        loss.backward()
        after = RandomState()
        rest = {"radii": [rho] * len(chosen), "place": (0,), "optimizer": optimizer, "random_state": random_state}
        kind.step(LoopPasses(chosen, trained, loss=loss, again=model, at=nullcontext, **rest))
        after.restore()
        optimizer.step()
        return loss.detach()

    return take


PLACES = {"closure": by_closure, "trainer": by_trainer, "loop": by_loop}


# The formulas once more, on one flat vector, with nothing of the package.


def twin(
    name: str, options: dict[str, Any], scope: slice, start: Tensor, gradient: Callable[[Tensor], Tensor]
) -> Tensor:
    w, v = start.clone(), torch.zeros_like(start)
    mean: Tensor | None = None
    across = torch.zeros_like(start)

    def ball(direction: Tensor) -> Tensor:
        inside = torch.zeros_like(direction)
        inside[scope] = direction[scope]
        norm = inside.norm()
        return RHO * inside / norm if norm > 0 else inside

    for step in range(STEPS):
        g = gradient(w)
        if name == "sam":
            u = gradient(w + ball(g))
        elif name == "gsam":
            p = gradient(w + ball(g))
            u = p - options["gsam_alpha"] * (g - (g @ p) / (p @ p) * p)
        elif name == "fsam":
            u = gradient(w + ball(g if mean is None else g - options["fsam_sigma"] * mean))
            rate = options["fsam_lambda"]
            mean = g if mean is None else rate * mean + (1 - rate) * g
        elif name == "looksam":
            if step % options["looksam_k"] == 0:
                u = gradient(w + ball(g))
                across = u - (u @ g) / (g @ g) * g
            else:
                u = g + options["looksam_alpha"] * g.norm() / across.norm() * across
        elif name == "cflat":
            g1 = gradient(w + ball(g))
            w1 = w + ball(g1 - g)
            g2 = gradient(w1)
            u = g1 + options["cflat_lambda"] * (gradient(w1 + ball(g2)) - g2)
        else:
            u = gradient(w - ball(v))
        v = MOMENTUM * v + u
        w = w - RATE * v
    return w


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scope", ["all", "lora"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_formula(name: str, scope: str, place: str) -> None:
    model, reference = Problem(), Problem()
    start = flat(model)
    if scope == "lora":  # the weight that is not perturbed has a gradient too
        model.head, reference.head = model.lora_B, reference.lora_B
        del model.lora_B, reference.lora_B
        model.forward = lambda inputs=None: headed(model)  # type: ignore[method-assign]
        reference.forward = lambda inputs=None: headed(reference)  # type: ignore[method-assign]
        start = flat(model)
    sizes = [weight.numel() for weight in reference.parameters()]

    def gradient(w: Tensor) -> Tensor:
        for weight, values in zip(reference.parameters(), w.split(sizes), strict=True):
            weight.data = values.view(weight.shape).clone()
        found = torch.autograd.grad(reference(), list(reference.parameters()), allow_unused=True)
        return torch.cat(
            [torch.zeros(n, dtype=w.dtype) if g is None else g.flatten() for g, n in zip(found, sizes, strict=True)]
        )

    options = OPTIONS[name]
    kind = make_kind({"kind": name, "options": options})
    chosen = [model.lora_A] if scope == "lora" else None
    take = PLACES[place](model, kind, RHO, chosen)
    losses = [float(take()) for _ in range(STEPS)]
    expected = twin(name, options, slice(0, 6) if scope == "lora" else slice(None), start, gradient)
    torch.testing.assert_close(flat(model), expected, rtol=1e-11, atol=1e-13)
    if name != "msam":
        assert losses[0] == pytest.approx(Problem()().item(), rel=1e-12)


def headed(model: Any) -> Tensor:
    hidden = torch.tanh(model.inputs @ model.lora_A.T)
    return ((hidden @ model.head - model.inputs.sum(1)) ** 2).mean() + 0.1 * model.head.pow(4).sum()


def trained(place: str, kind: Kind | None, rho: float) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = Problem(dropout=0.3, dtype=torch.float32)
    if kind is None:
        optimizer = optimizer_of(model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    else:
        take = PLACES[place](model, kind, rho)
        for _ in range(STEPS):
            take()
    return {**{name: weight.detach() for name, weight in model.named_parameters()}, "random": torch.get_rng_state()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", sorted(name for name, kind in KINDS.items() if not kind.of_pairs))
def test_radius_zero_is_the_plain_training_bit_for_bit_with_dropout_on(name: str, place: str) -> None:
    options = OPTIONS.get(name, {})
    torch.testing.assert_close(
        trained(place, make_kind({"kind": name, "options": options}), 0.0), trained(place, None, 0.0), rtol=0, atol=0
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", AS_SAM)
def test_kind_is_sam_bit_for_bit_where_its_own_part_is_nothing(name: str, place: str) -> None:
    found = trained(place, make_kind({"kind": name, "options": AS_SAM[name]}), RHO)
    torch.testing.assert_close(found, trained(place, make_kind({"kind": "sam"}), RHO), rtol=0, atol=0)
    assert not torch.equal(found["lora_A"], trained(place, None, 0.0)["lora_A"])


@pytest.mark.parametrize(
    ("name", "known"), [("sam", [0, 1, 2, 3]), ("random", [0, 1, 2, 3]), ("looksam", [0, 3]), ("msam", [])]
)
def test_a_perturbed_loss_is_known_where_a_step_has_a_pass_at_the_weights_themselves(
    name: str, known: list[int]
) -> None:
    model = Problem()
    sam = SAM(optimizer_of(model), rho=RHO, kind=make_kind({"kind": name, "options": OPTIONS.get(name, {})}))
    found = []
    for step in range(4):
        sam.zero_grad()
        sam.step(lambda: backward(model))
        found += [step] if sam.perturbed_loss is not None else []
    assert found == known


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_that_goes_on_remembers_what_it_needs(name: str) -> None:
    def halves(remembers: bool) -> Tensor:
        model, kind = Problem(), make_kind({"kind": name, "options": OPTIONS[name]})
        sam = SAM(optimizer_of(model), rho=RHO, kind=kind)
        for half in range(2):
            if half == 1:
                content = io.BytesIO()
                torch.save((sam.state_dict(), kind.state() if remembers else None), content)
                content.seek(0)
                before, state = torch.load(content, weights_only=True)
                kind = make_kind({"kind": name, "options": OPTIONS[name]})
                if state is not None:
                    kind.put_back(state)
                sam = SAM(optimizer_of(model), rho=RHO, kind=kind)
                sam.load_state_dict(before)
            for _ in range(4):
                sam.zero_grad()
                sam.step(lambda: backward(model))
        return flat(model)

    whole = Problem()
    take = by_closure(whole, make_kind({"kind": name, "options": OPTIONS[name]}), RHO)
    for _ in range(8):
        take()
    assert torch.equal(halves(True), flat(whole))
    assert torch.equal(halves(False), flat(whole)) == (name not in ("fsam", "looksam"))


def backward(model: Problem) -> Tensor:
    loss = model()
    loss.backward()
    return loss


@pytest.mark.parametrize("name", OPTIONS)
def test_a_zero_gradient_moves_nothing(name: str) -> None:
    model = Problem()
    model.forward = lambda inputs=None: 0.0 * model.lora_A.sum()  # type: ignore[method-assign]
    before = flat(model)
    take = by_closure(model, make_kind({"kind": name, "options": OPTIONS[name]}), RHO)
    for _ in range(4):
        take()
    assert torch.equal(flat(model), before)


def test_a_third_pass_of_cflat_that_is_not_finite_leaves_sams_step() -> None:
    model, plain = Problem(), Problem()
    plain.load_state_dict(model.state_dict())
    taken = iter(range(100))

    def closure() -> Tensor:
        loss = backward(model)
        if next(taken) == 2:
            model.lora_A.grad.mul_(torch.inf)  # type: ignore[union-attr]
        return loss

    kind = make_kind({"kind": "cflat", "options": {"cflat_lambda": 0.2}})
    SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, kind=kind).gradients(closure)
    SAM(torch.optim.SGD(plain.parameters(), lr=0.1), rho=RHO).gradients(lambda: backward(plain))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", ["gsam", "fsam", "looksam"])
def test_a_gradient_that_is_not_finite_is_not_remembered(name: str) -> None:
    model, calls = Problem(), iter(range(100))
    kind = make_kind({"kind": name, "options": OPTIONS[name] | ({"looksam_k": 2} if name == "looksam" else {})})
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=RHO, kind=kind)

    def closure() -> Tensor:
        loss = backward(model)
        if next(calls) == 0:
            model.lora_A.grad.mul_(torch.inf)  # type: ignore[union-attr]
        return loss

    sam.gradients(closure)
    assert torch.isfinite(model.lora_A.grad).all()  # of the second pass, at the same weights
    for _ in range(3):
        sam.gradients(closure)
        assert torch.isfinite(model.lora_A.grad).all()
        remembered = [
            part for part in (kind.state().get("mean") or kind.state().get("across") or []) if part is not None
        ]
        assert all(torch.isfinite(part).all() for part in remembered)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sam", [2] * 4),
        ("gsam", [2] * 4),
        ("fsam", [2] * 4),
        ("looksam", [2, 1, 1, 2]),
        ("cflat", [4] * 4),
        ("msam", [1] * 4),
    ],
)
def test_step_takes_as_many_passes_as_it_says(name: str, expected: list[int]) -> None:
    model, counts = Problem(), []
    sam = SAM(optimizer_of(model), rho=RHO, kind=make_kind({"kind": name, "options": OPTIONS[name]}))
    climbing = []

    def closure() -> Tensor:
        climbing.append(sam.climbing)
        return backward(model)

    for _ in expected:
        before = len(climbing)
        sam.step(closure)
        counts.append(len(climbing) - before)
        assert climbing[-1] is False
        assert all(climbing[before:-1])
        assert (sam.last_step is None) == (name == "looksam" and counts[-1] == 1)
    assert counts == expected


def test_momentum_sam_is_refused_without_momentum_and_where_the_momentum_is_partitioned() -> None:
    model = Problem()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=RATE), rho=RHO, kind=make_kind({"kind": "msam"}))
    with pytest.raises(UserError, match="SGD has none"):
        sam.step(lambda: backward(model))
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, optimizer=None)
    optimizer = SimpleNamespace(optimizer=optimizer_of(model))
    trainer = SimpleNamespace(model=model, training_step=None, optimizer=optimizer, deepspeed=engine)
    step = SAMTrainingStep(trainer, rho=RHO, kind=make_kind({"kind": "msam"}), scope="all")
    with pytest.raises(UserError, match="DeepSpeed"):
        step(model, {})


def test_gradients_of_micro_batches_add_up_in_a_trainer() -> None:
    """Two micro-batches of one step, each with a combination of its own."""
    model, parts = Problem(), []
    for halves in ((0, 1), (0,), (1,)):
        model.zero_grad()
        optimizer = optimizer_of(model)
        trainer = SimpleNamespace(model=model, training_step=None, optimizer=optimizer)
        trainer.training_step = lambda model, inputs: backward_of(model(**inputs))
        step = SAMTrainingStep(trainer, rho=RHO, kind=make_kind({"kind": "gsam"}), scope="all")
        for half in halves:
            step(model, {"inputs": model.inputs[2 * half : 2 * half + 2]})
        parts.append(model.lora_A.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(parts[0], parts[1] + parts[2], rtol=1e-13, atol=0)


def test_trainer_climbs_on_the_first_examples_where_that_is_all_that_they_are_for() -> None:
    model, twin = Problem(), Problem()
    examples = model.inputs  # five, of which two fifths are the first two

    def gradients(share: Tensor, name: str, ascent_batch: float) -> list[Tensor]:
        model.zero_grad()
        trainer = SimpleNamespace(model=model, optimizer=optimizer_of(model))
        trainer.training_step = lambda model, inputs: backward_of(model(**inputs))
        kind = make_kind({"kind": name})
        step = SAMTrainingStep(trainer, rho=RHO, kind=kind, scope="all", ascent_batch=ascent_batch)
        loss = step(model, {"inputs": examples})
        assert float(loss) == pytest.approx(twin(share).item(), rel=1e-14)
        return [model.lora_A.grad.clone(), model.lora_B.grad.clone()]  # type: ignore[union-attr]

    found = gradients(examples[:2], "sam", 0.3)
    weights = [twin.lora_A, twin.lora_B]
    up = torch.autograd.grad(twin(examples[:2]), weights)
    norm = torch.cat([part.flatten() for part in up]).norm()
    with torch.no_grad():
        for weight, part in zip(weights, up, strict=True):
            weight.add_(RHO * part / norm)
    expected = list(torch.autograd.grad(twin(examples), weights))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    twin = Problem()
    assert all(map(torch.equal, gradients(examples, "gsam", 0.3), gradients(examples, "gsam", 1.0)))


@pytest.mark.parametrize("batch", [{"x": torch.ones(4), "y": torch.ones(3)}, {"x": torch.ones(4), "weight": 1.0}])
def test_a_batch_that_is_no_list_of_examples_is_not_cut(batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^ascent_batch=0.5: a batch here is no list of examples"):
        first_examples(batch, 0.5)
    assert first_examples(batch, 1) is batch


def backward_of(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def test_settings_of_each_kind_are_declared_with_its_defaults() -> None:
    for name, kind in KINDS.items():
        for setting, argument in kind.arguments.items():
            assert vars(make_kind({"kind": name}))[argument] == DEFAULTS[setting], setting
            assert FIELDS[setting].metadata["role"] == "sam"

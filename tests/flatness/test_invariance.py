"""The certificate: what passes, what is flagged, what is refused, and that it leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from flatpatch.errors import UserError
from flatpatch.flatness import HessianOperator, Problem, ball_sharpness, certify, keskar_sharpness, lanczos
from flatpatch.flatness.invariance import lora_pairs, written
from flatpatch.measuring import writing_mark
from tests.flatness.test_scope import TaskAttention, adapted, after_two_tasks
from tests.flatness_cases import all_products
from tests.flatness_lora import assert_same_state, factors, make_model, make_problem, state_of

MEASURES = {
    "top_eigenvalue": lambda problem: float(lanczos(HessianOperator(problem, compile=False), 1, tol=1e-7).values[0]),
    "trace": lambda problem: float(all_products(HessianOperator(problem)).trace()),
    "keskar": lambda problem: keskar_sharpness(problem, ascent_steps=0, random_starts=0).phi,
    "sam": lambda problem: ball_sharpness(problem, 0.05, ascent_steps=2, random_starts=0).ascent,
}


@pytest.mark.parametrize("scope", ["merged", "tangent", "adapter"])
def test_what_does_not_depend_on_the_factors_passes_and_the_factors_own_flatness_is_flagged(scope: str) -> None:
    model = make_model()
    problem, before = make_problem(model, scope), state_of(model)
    found = certify(problem, MEASURES)
    assert_same_state(model, before)
    assert list(found.values) == ["c = 1", "c = 0.25", "c = 0.5", "c = 2", "c = 4", "rotation 1", "rotation 2"]
    assert max(abs(loss - found.losses["c = 1"]) for loss in found.losses.values()) < 1e-12
    assert (found.tolerance, found.pairs) == (1e-4, 2)
    if scope == "adapter":
        assert min(found.changes.values()) > 0.1 and not found.is_invariant
        # A rotation of the rank indices is one of the space: nothing but the box, which has corners, feels it.
        turned, own = found.values["rotation 1"], found.values["c = 1"]
        assert [turned[key] for key in ("top_eigenvalue", "trace", "sam")] == pytest.approx(
            [own[key] for key in ("top_eigenvalue", "trace", "sam")], rel=1e-6
        )
        assert turned["keskar"] != pytest.approx(own["keskar"], rel=1e-3)
    else:
        assert found.change < 1e-6 and found.is_invariant


def test_the_factors_trace_is_its_closed_form_in_c() -> None:
    """With B = 0 only B's block is there, and along B / c's scale: the trace goes as 1 / c^2."""
    found = certify(make_problem(make_model(zero_b=True)), {"trace": MEASURES["trace"]})
    own = found.values["c = 1"]["trace"]
    for c in (0.25, 0.5, 2.0, 4.0):
        assert found.values[f"c = {c:g}"]["trace"] == pytest.approx(own / c**2, rel=1e-9)
    assert found.change == pytest.approx(15, rel=1e-9)


def test_every_kind_of_lora_is_written_differently() -> None:
    """Lists of tasks, and CL-LoRA's names, where A is next to the output; the products stay."""

    def products(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> list[Tensor]:
        return [(up @ down).detach() for up, down in pairs]

    for model, count in ((after_two_tasks(TaskAttention()), 6), (adapted(), None)):
        pairs = lora_pairs(model)
        assert count is None or len(pairs) == count
        before, downs = products(pairs), [down.detach().clone() for _, down in pairs]
        with written(pairs, scale=4.0, rotation=1):
            for now, then in zip(products(pairs), before, strict=True):
                torch.testing.assert_close(now, then, rtol=1e-12, atol=1e-13)
            for (_, down), then in zip(pairs, downs, strict=True):
                assert float(down.detach().norm()) == pytest.approx(float(then.norm()) / 4)
        assert all(torch.equal(down, then) for (_, down), then in zip(pairs, downs, strict=True))


def test_a_change_from_zero_or_to_what_is_no_number_is_beyond_all_bounds() -> None:
    seen = iter([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    found = certify(make_problem(make_model()), {"one": lambda _: next(seen), "other": lambda _: 0.0})
    assert found.changes == {"one": math.inf, "other": 0.0}
    assert found.as_dict()["changes"]["one"] is None
    later = iter([1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert certify(make_problem(make_model()), {"one": lambda _: next(later)}).change == math.inf


def test_a_model_that_is_no_function_of_the_products_is_refused() -> None:
    model = make_model()

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            (A, _), _ = factors(self.model)
            return self.model(x) * A.norm()

    batches = make_problem(model).batches
    problem = Problem(Penalised(), batches, make_problem(model)._loss, scope="adapter")
    before = state_of(model)
    with pytest.raises(UserError, match="the model is no function of the products B A"):
        certify(problem, {"loss": lambda each: each.loss()})
    assert_same_state(model, before)


@pytest.mark.parametrize("scope", ["merged", "tangent"])
def test_merged_matrices_are_read_anew_for_each_way_of_writing(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing could change: written so that the product differs, the loss tells."""

    @contextmanager
    def wrongly(
        pairs: list[tuple[nn.Parameter, nn.Parameter]], *, scale: float, rotation: int | None
    ) -> Iterator[None]:
        with torch.no_grad():
            for up, _ in pairs:
                up.mul_(scale)
        yield

    monkeypatch.setattr("flatpatch.flatness.invariance.written", wrongly)
    with pytest.raises(UserError, match=r"written differently \(c = 0.25\)"):
        certify(make_problem(make_model(), scope), {"loss": lambda problem: problem.loss()})


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(UserError, match="there is no LoRA pair to write differently"):
        lora_pairs(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("scope", "values", "mark"),
    [
        ("merged", {}, "invariant by construction"),
        ("tangent", {}, "invariant by construction"),
        ("adapter", {}, "depends on writing"),
        ("trainable", {}, "depends on writing"),
        ("merged", {"trace": 1.0, "invariance_change": None}, "not certified: refused"),
        ("tangent", {"invariance_change": 3e-9, "invariance_tolerance": 1e-4}, "invariant (to 3e-09)"),
        ("merged", {"invariance_change": 2e-3, "invariance_tolerance": 1e-4}, "depends on writing (by 0.002)"),
        ("adapter", {"invariance_change": 14.96, "invariance_tolerance": 1e-2}, "depends on writing (by 15)"),
        (
            "adapter",
            {"invariance_change": None, "invariance_tolerance": 1e-2},
            "depends on writing (beyond all bounds)",
        ),
    ],
)
def test_the_mark_is_by_the_certificate_where_there_is_one(
    scope: str, values: dict[str, float | None], mark: str
) -> None:
    assert writing_mark(scope, values) == mark

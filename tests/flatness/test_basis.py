"""A checkpoint goes on only with what it was made with: every algorithm, and everything that its result depends on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatpatch.errors import UserError
from flatpatch.flatness import (
    HessianOperator,
    Problem,
    batch_eigenvalues,
    hutch_plus_plus,
    hutchinson,
    lanczos,
    landscape,
    power_iteration,
    quadrature,
    random_direction,
    supervised_loss,
    xtrace,
)
from flatpatch.flatness.basis import Basis, orthonormal_columns, random_vectors
from tests.flatness_cases import Quadratic, symmetric

CROSS_ENTROPY = supervised_loss(F.cross_entropy)
SQUARES = supervised_loss(lambda output, labels: output.pow(2).mean())


class Case:
    """What a problem is made of, to be changed before it is made."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        ).double()
        self.model[0].requires_grad_(False)
        self.batches = [
            {"x": torch.randn(5, 4, dtype=torch.float64), "y": torch.randint(3, (5,))},
            {"x": torch.randn(3, 4, dtype=torch.float64), "y": torch.randint(3, (3,))},
        ]
        self.loss: Any = CROSS_ENTROPY
        self.mode = "autograd"
        self.seed = 0

    def problem(self) -> Problem:
        def loss(model: nn.Module, batch: Any) -> Any:
            return self.loss(model, (batch["x"], batch["y"]))

        return Problem(self.model, self.batches, loss, terms=lambda batch: len(batch["y"]))

    def operator(self) -> HessianOperator:
        return HessianOperator(self.problem(), mode=self.mode)


def other_inputs(case: Case) -> None:
    for batch in case.batches:
        batch["x"] += 3


def inputs_in_another_order(case: Case) -> None:
    case.batches[0]["x"] = case.batches[0]["x"].flip(0)


def batches_in_another_order(case: Case) -> None:
    case.batches.reverse()


def other_labels(case: Case) -> None:
    case.batches[1]["y"] = (case.batches[1]["y"] + 1) % 3


def a_permuted_weight(case: Case) -> None:
    weight = case.model[3].weight.data
    weight.copy_(weight.T.clone())


def two_weights_swapped(case: Case) -> None:
    weight = case.model[4].weight.data
    weight[0, [0, 1]] = weight[0, [1, 0]]


def a_bit_up_and_one_down(case: Case) -> None:
    bits = case.model[4].weight.data.view(torch.int64)
    bits[0, 0] += 1 << 45
    bits[1, 1] -= 1 << 45


def a_frozen_weight(case: Case) -> None:
    weight = case.model[0].weight.data
    weight[[0, 1]] = weight[[1, 0]]


def a_buffer(case: Case) -> None:
    case.model[1].running_mean[[0, 1]] = torch.tensor([0.5, -0.5], dtype=torch.float64)


def another_loss(case: Case) -> None:
    case.loss = SQUARES


def another_mode(case: Case) -> None:
    case.mode = "finite-difference"


def single_precision(case: Case) -> None:
    case.model.float()
    for batch in case.batches:
        batch["x"] = batch["x"].float()


def another_seed(case: Case) -> None:
    case.seed = 1


CHANGES: dict[Callable[[Case], None], str] = {
    other_inputs: "data",
    inputs_in_another_order: "data",
    batches_in_another_order: "data",
    other_labels: "data",
    a_permuted_weight: "weights",
    two_weights_swapped: "weights",
    a_bit_up_and_one_down: "weights",
    a_frozen_weight: "other weights",
    a_buffer: "buffers",
    another_loss: "losses",
    another_mode: "mode",
    single_precision: "precision",
    another_seed: "settings",
}

ALGORITHMS: dict[str, Callable[[Case, Path], Any]] = {
    "lanczos": lambda case, path: lanczos(case.operator(), 2, seed=case.seed, checkpoint=path),
    "power iteration": lambda case, path: power_iteration(
        case.operator(), 1, max_products=20, seed=case.seed, checkpoint=path
    ),
    "hutchinson": lambda case, path: hutchinson(case.operator(), num_probes=3, seed=case.seed, checkpoint=path),
    "hutch++": lambda case, path: hutch_plus_plus(case.operator(), num_products=9, seed=case.seed, checkpoint=path),
    "xtrace": lambda case, path: xtrace(case.operator(), num_products=6, seed=case.seed, checkpoint=path),
    "quadrature": lambda case, path: quadrature(
        case.operator(), num_probes=1, num_steps=4, seed=case.seed, checkpoint=path
    ),
    "batches": lambda case, path: batch_eigenvalues(
        case.problem(), mode=case.mode, restarts=0, max_products=20, seed=case.seed, checkpoint=path
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_of_another_problem_is_refused(
    algorithm: str, change: Callable[[Case], None], tmp_path: Path
) -> None:
    path = tmp_path / "kept.pt"
    found = ALGORITHMS[algorithm](Case(), path)
    # What was made anew from equal parts is the same problem.
    assert ALGORITHMS[algorithm](Case(), path).as_dict() == found.as_dict()
    kept = path.read_bytes()
    case = Case()
    change(case)
    with pytest.raises(ValueError, match=rf"\(differing: [\w ,]*\b{CHANGES[change]}\b"):
        ALGORITHMS[algorithm](case, path)
    assert path.read_bytes() == kept


def test_a_checkpoint_is_refused_for_a_change_that_only_the_losses_show(tmp_path: Path) -> None:
    """The matrix of the quadratic is a plain attribute: neither parameter nor buffer nor data."""

    def search(values: list[float]) -> float:
        batch = torch.zeros(3, dtype=torch.float64)
        problem = Problem(Quadratic(symmetric(values)), [batch], lambda m, x: m(x).mean(), terms=len)
        return float(lanczos(HessianOperator(problem), 1, checkpoint=tmp_path / "kept.pt").values)

    assert search([3.0, 2.0, 1.0]) == pytest.approx(3)
    with pytest.raises(ValueError, match="differing: losses"):
        search([5.0, 2.0, 1.0])


def test_losses_that_were_summed_in_another_order_are_the_same_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.pt"
    found = ALGORITHMS["lanczos"](Case(), path)
    true = HessianOperator.fingerprint
    monkeypatch.setattr(
        HessianOperator,
        "fingerprint",
        lambda self: {**true(self), "losses": [loss * (1 + 1e-7) for loss in true(self)["losses"]]},
    )
    assert ALGORITHMS["lanczos"](Case(), path).as_dict() == found.as_dict()


def test_another_start_or_other_known_vectors_are_other_settings(tmp_path: Path) -> None:
    operator = Case().operator()
    start = torch.arange(operator.size, dtype=torch.float64)
    path = tmp_path / "power.pt"
    power_iteration(operator, max_products=5, start=start, checkpoint=path)
    with pytest.raises(ValueError, match="differing: settings"):
        power_iteration(operator, max_products=5, start=start.flip(0), checkpoint=path)
    known = lanczos(operator, 2)
    path = tmp_path / "trace.pt"
    hutchinson(operator, num_probes=2, known=known, checkpoint=path)
    turned = copy.copy(known)
    object.__setattr__(turned, "vectors", known.vectors.flip(1))
    with pytest.raises(ValueError, match="differing: settings"):
        hutchinson(operator, num_probes=2, known=turned, checkpoint=path)
    with pytest.raises(ValueError, match="differing: settings"):
        hutchinson(operator, num_probes=2, known=known, tol=0.5, checkpoint=path)


def test_known_vectors_are_settings_of_a_quadrature(tmp_path: Path) -> None:
    operator = Case().operator()
    known, path = lanczos(operator, 2), tmp_path / "density.pt"
    found = quadrature(operator, num_probes=1, num_steps=4, known=known, checkpoint=path)
    assert quadrature(operator, num_probes=1, num_steps=4, known=known, checkpoint=path).as_dict() == found.as_dict()
    for other in (None, lanczos(operator, 1)):
        with pytest.raises(ValueError, match="differing: settings"):
            quadrature(operator, num_probes=1, num_steps=4, known=other, checkpoint=path)


def test_fewer_probes_than_a_checkpoint_holds_are_as_if_no_more_had_been_taken(tmp_path: Path) -> None:
    operator = Case().operator()
    for estimate in (hutchinson, quadrature):
        path = tmp_path / f"{estimate.__name__}.pt"
        fewer = estimate(operator, num_probes=2).as_dict()
        estimate(operator, num_probes=4, checkpoint=path)
        assert estimate(operator, num_probes=2, checkpoint=path).as_dict() == fewer


@pytest.mark.parametrize("change", [other_inputs, other_labels, a_frozen_weight, a_buffer])
def test_a_landscapes_file_of_another_problem_is_refused_even_where_its_origin_has_the_same_loss(
    change: Callable[[Case], None], tmp_path: Path
) -> None:
    def draw(case: Case) -> Any:
        nn.init.zeros_(case.model[4].weight)  # so that nothing before it shows in the loss
        nn.init.zeros_(case.model[4].bias)
        problem = case.problem()
        return landscape(
            problem,
            [random_direction(problem, normalisation="l2")],
            [np.linspace(-1, 1, 3)],
            path=tmp_path / "grid.npz",
        )

    first = draw(Case())
    assert np.array_equal(draw(Case()).losses, first.losses)
    case = Case()
    change(case)
    with pytest.raises(UserError, match="holds a landscape of other"):
        draw(case)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "change", [change for change, part in CHANGES.items() if part in ("weights", "other weights", "buffers")]
)
def test_an_operator_notices_every_change_of_a_weight_or_buffer(
    change: Callable[[Case], None], budget: int | None
) -> None:
    case = Case()
    operator = HessianOperator(case.problem(), memory_budget=budget)
    operator.matvec(torch.ones(operator.size))
    change(case)
    with pytest.raises(ValueError, match="weights have changed"):
        operator.matvec(torch.ones(operator.size))


def test_an_operator_notices_a_batch_that_was_changed_in_place() -> None:
    case = Case()
    operator = case.operator()
    operator.matvec(torch.ones(operator.size))
    case.batches[1]["x"].data[[0, 1]] = case.batches[1]["x"][[1, 0]]
    with pytest.raises(ValueError, match="data have changed"):
        operator.matvec(torch.ones(operator.size))


def test_an_operator_notices_an_array_of_numpys_that_was_changed_in_place() -> None:
    batch = {"x": np.ones((3, 4)), "y": torch.tensor([0, 1, 2])}

    def loss(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(torch.from_numpy(batch["x"])), batch["y"])

    operator = HessianOperator(Problem(nn.Linear(4, 3).double(), [batch], loss, terms=lambda batch: 3))
    operator.matvec(torch.ones(operator.size))
    batch["x"][1] += 3
    with pytest.raises(ValueError, match="data have changed"):
        operator.matvec(torch.ones(operator.size))


@pytest.mark.parametrize("size", [7, 2**17 + 3])  # in one part and in several
def test_gram_matrix_is_the_products_of_all_pairs(size: int) -> None:
    vectors = random_vectors(size, list(range(5)), seed=0, device=torch.device("cpu"))
    basis = Basis(size, torch.float64, torch.device("cpu"), 6)
    basis.append(vectors)
    torch.testing.assert_close(basis.gram(), vectors.T @ vectors, rtol=1e-12, atol=1e-12 * size)


def test_a_column_alone_is_scaled_and_a_lost_one_replaced() -> None:
    basis = Basis(6, torch.float64, torch.device("cpu"), 3)
    column = torch.arange(6, dtype=torch.float64).reshape(6, 1)
    found, lost = orthonormal_columns(column.clone(), basis, 1e-9, seed=0)
    torch.testing.assert_close(found, column / column.norm())
    assert lost == 0
    basis.append(found)
    other, lost = orthonormal_columns(torch.zeros_like(column), basis, 1e-9, seed=0)
    assert lost == 1 and float(other.norm()) == pytest.approx(1) and abs(float(found.T @ other)) < 1e-12

"""The reconstruction of DualLoRA: its algebra beside dense float64 formulas, its invariants in whole runs, its labels.

The formulas are the reconstruction's own (docs/duallora.md): that it is the paper's method is not shown, here or
anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatpatch.comparison.compare import compare_runs
from flatpatch.errors import UserError
from flatpatch.families.resuming import random_state
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.dual_choices import DualChoices
from flatpatch.families.vision.reference.duallora import (
    DualKeyValueLoRA,
    Memory,
    calibrated,
    new_directions,
    recall_weights,
)
from flatpatch.flatness.scope import find_scope
from flatpatch.report.titles import warning
from flatpatch.runner.resolve import headline, make_plan, parse
from flatpatch.sam import SAM
from tests.reference_images import make_reference
from tests.report_records import make_record

D, RANK = 6, 2
OTHER = DualChoices(
    residual_basis="old",
    basis_time="after",
    basis_features="pretrained",
    basis_energy="sigma4",
    orthogonal="shared",
    similarity="plain",
    memory="share",
    memory_by="direction",
    calibration="hard",
)


def orthonormal(columns: int, *, generator: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(generator)
    return torch.linalg.qr(torch.randn(D, columns, dtype=torch.float64, generator=made)).Q


def moment(spectrum: list[float], directions: Tensor) -> Tensor:
    return (directions * torch.tensor(spectrum, dtype=torch.float64)) @ directions.T


@pytest.fixture
def layer() -> DualKeyValueLoRA:
    """Return a layer of float64 with three directions of two tasks, in the midst of the second."""
    made = DualKeyValueLoRA(torch.nn.Linear(D, 3 * D), RANK).double()
    basis = orthonormal(3)
    made.memory.add(basis[:, :2], 0, torch.tensor([0.5, 0.25]))
    made.memory.project_out()
    made.memory.add(basis[:, 2:], 1, torch.tensor([0.0625]))
    made.memory.activate(1, "new")
    for part in made.parts:
        for value in (part.factor("B"), part.up, part.residual, part.old):
            torch.nn.init.normal_(value)
    return made


# The bases


@pytest.mark.parametrize("energy", ["sigma2", "sigma4"])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.97, 1.0])
def test_new_directions_are_the_fewest_that_hold_the_share(energy: str, share: float) -> None:
    Q = orthonormal(D)
    spectrum = [5.0, 3.0, 2.0, 1.0, 0.5, 0.0]
    M = moment(spectrum, Q)
    found = new_directions(M, Q[:, 1:2], share, energy)  # the second largest is known
    powers = torch.tensor(spectrum) ** (1 if energy == "sigma2" else 2)
    left = [0, 2, 3, 4]  # from the largest down; the last has no energy
    expected = next(n for n in range(1, 5) if powers[1] + powers[left[:n]].sum() >= share * powers.sum() - 1e-9)
    assert found.shape == (D, expected)
    torch.testing.assert_close(found @ found.T, Q[:, left[:expected]] @ Q[:, left[:expected]].T)


def test_a_task_adds_one_direction_at_least_and_none_where_nothing_is_left() -> None:
    Q = orthonormal(D)
    M = moment([9.0, 1.0, 0, 0, 0, 0], Q)
    found = new_directions(M, Q[:, :1], 0.5, "sigma2")
    torch.testing.assert_close(found.abs().T @ Q[:, 1:2].abs(), (found.abs().T @ Q[:, 1:2].abs()).clamp(max=1.0))
    torch.testing.assert_close(found @ found.T, Q[:, 1:2] @ Q[:, 1:2].T)
    assert new_directions(M, Q[:, :2], 1.0, "sigma2").shape == (D, 0)
    assert new_directions(M, Q, 1.0, "sigma2").shape == (D, 0)


@pytest.mark.parametrize(("basis", "expected"), [("new", [0, 0, 1]), ("previous", [0, 1, 0]), ("old", [1, 1, 0])])
def test_residual_adapter_works_on_the_directions_that_are_asked_for(basis: str, expected: list[int]) -> None:
    memory = Memory(D)
    for task in range(3):
        memory.add(orthonormal(3).float()[:, task : task + 1], task, torch.ones(1))
    memory.activate(2, basis)
    assert memory.active.tolist() == [*expected, 0, 0, 0]
    memory.activate(0, basis)
    assert memory.active.tolist() == [int(basis == "new"), 0, 0, 0, 0, 0]


# The layer


def test_layer_equals_the_dense_formula_of_training(layer: DualKeyValueLoRA) -> None:
    x = torch.randn(4, 3, D, dtype=torch.float64)
    basis = orthonormal(3)
    P = torch.eye(D, dtype=torch.float64) - basis[:, :2] @ basis[:, :2].T
    queries, *found = layer(x).chunk(3, dim=-1)
    torch.testing.assert_close(queries, layer.q(x))
    for part, values in zip(layer.parts, found, strict=True):
        A, B, Psi = part.factor("A"), part.factor("B"), basis[:, 2:]
        dense = part.weight + part.old + B @ A @ P + part.up[:, 2:3] @ Psi.T
        torch.testing.assert_close(values, x @ dense.T + part.bias)
        torch.testing.assert_close(part.update(), dense - part.weight - part.old)


@pytest.mark.parametrize("by", ["task", "direction"])
@pytest.mark.parametrize("rule", ["max", "share", "off"])
def test_layer_equals_the_dense_formula_of_recall_image_by_image(layer: DualKeyValueLoRA, by: str, rule: str) -> None:
    x = torch.randn(4, 3, D, dtype=torch.float64)
    basis = orthonormal(3)
    layer.answers = (DualChoices(similarity="plain", memory=rule, memory_by=by), 2)
    found = layer(x)
    for image, rows in zip(x, found, strict=True):
        c = image[0]
        of_direction = [float((basis[:, i] @ c).abs() / c.norm()) for i in range(3)]
        a = of_direction
        if by == "task":
            a = [(of_direction[0] ** 2 + of_direction[1] ** 2) ** 0.5, of_direction[2]]
        w = {"max": [v / max(a) for v in a], "share": [v * v / sum(u * u for u in a) for v in a], "off": [1] * len(a)}
        each = torch.tensor(w[rule] if by == "direction" else [w[rule][0], w[rule][0], w[rule][1]]).double()
        for part, values in zip(layer.parts, rows.chunk(3, dim=-1)[1:], strict=True):
            P = layer.memory.projection
            R = part.residual[:, :3] + part.up[:, :3] * torch.tensor([0, 0, 1])
            dense = part.weight + part.old + part.factor("B") @ part.factor("A") @ P + (R * each) @ basis.T
            torch.testing.assert_close(values, image @ dense.T + part.bias)


@pytest.mark.parametrize("relative", [False, True])
def test_relative_similarity_is_over_what_a_tasks_own_images_have(layer: DualKeyValueLoRA, relative: bool) -> None:
    c = torch.randn(5, D, dtype=torch.float64)
    of_task, of_direction = layer.memory.similarities(c, 2, relative=relative)
    energy = (c @ orthonormal(3)).square() / c.square().sum(1, keepdim=True)
    own = torch.tensor([0.5, 0.25, 0.0625] if relative else [1.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(of_direction[:, :3], (energy / own).sqrt())
    whole = torch.tensor([0.75, 0.0625] if relative else [1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(of_task, (torch.stack([energy[:, :2].sum(1), energy[:, 2]], 1) / whole).sqrt())


def test_similarity_is_one_for_what_lies_in_a_tasks_directions_alone(layer: DualKeyValueLoRA) -> None:
    c = layer.memory.bases[:, :2] @ torch.tensor([0.6, -3.0], dtype=torch.float64)
    similarity, _ = layer.memory.similarities(c[None], 2, relative=False)
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    nothing = torch.zeros(1, D, dtype=torch.float64)
    assert not recall_weights(layer.memory.similarities(nothing, 2, relative=True)[0], "max").any()


def test_gradients_and_sams_ascent_stay_out_of_the_directions_of_earlier_tasks(layer: DualKeyValueLoRA) -> None:
    """Invariants 2 and 7: nothing that is protected passes through A, before, on and after SAM's step."""
    weights = [value for which in "AB" for value in layer.factors(which)]
    optimizer = SAM(torch.optim.Adam(weights, lr=0.1), rho=0.5)
    x = torch.randn(4, 3, D, dtype=torch.float64)
    Phi = layer.memory.bases[:, :2].clone()
    memory = copy.deepcopy(layer.memory.state_dict())
    protected: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        protected.extend(part.orthogonal() @ Phi for part in layer.parts)
        protected.extend(A.grad @ Phi for A in layer.factors("A") if A.grad is not None)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(protected) == 16
    assert all(value.abs().max() < 1e-12 for value in protected)
    assert all(value.abs().max() > 1e-3 for value in layer.factors("B"))
    assert all(torch.equal(value, memory[name]) for name, value in layer.memory.state_dict().items())
    # Directions that the residual adapter does not work on have no weights that move.
    assert all(not part.up.grad[:, layer.memory.active == 0].any() for part in layer.parts)


@pytest.mark.parametrize("shared", [False, True])
def test_beginning_a_task_changes_nothing_but_that_residual_adapters_wait_to_be_recalled(
    layer: DualKeyValueLoRA, shared: bool
) -> None:
    before = [part.weight + part.old + part.orthogonal() for part in layer.parts]
    learned = [part.residual + part.up * layer.memory.active for part in layer.parts]
    for part in layer.parts:
        part.start(shared=shared)
    layer.memory.project_out()
    for part, whole, R in zip(layer.parts, before, learned, strict=True):
        torch.testing.assert_close(part.weight + part.old + part.update(), whole)
        torch.testing.assert_close(part.residual, R)
        assert not part.up.any()


def test_merged_scope_measures_both_adapters(layer: DualKeyValueLoRA) -> None:
    scope = find_scope(layer, "merged")
    for part, matrix in zip(layer.parts, scope.variables, strict=True):
        torch.testing.assert_close(matrix, part.weight + part.old + part.update())
    named = find_scope(layer, "adapter").names
    assert {name.split(".", 1)[1] for name in named} == {
        f"lora_{which}.weight" for which in ("A.new", "B.new", "B.residual")
    }


# What the guess of the task does


def test_soft_calibration_adds_the_logarithm_of_the_tasks_probability() -> None:
    logits, scores = torch.randn(3, 5).double(), torch.rand(3, 2).double()
    task_of = torch.tensor([0, 0, 1, 1, 1])
    found = calibrated(logits, scores, task_of, DualChoices(temperature=0.3, calibration_weight=2.0))
    p = torch.exp(scores / 0.3) / torch.exp(scores / 0.3).sum(1, keepdim=True)
    torch.testing.assert_close(found, logits + 2.0 * torch.log(p)[:, task_of])
    assert torch.equal(calibrated(logits, scores, task_of, DualChoices(calibration="off")), logits)


def test_hard_calibration_leaves_the_classes_of_a_confident_guess() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.45]])
    choices = DualChoices(calibration="hard", temperature=0.1, confidence=0.9)
    found = calibrated(torch.zeros(2, 3), scores, torch.tensor([0, 1, 1]), choices)
    assert found.tolist() == [[0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]]


# Whole runs


@pytest.fixture(scope="module", params=[DualChoices(), OTHER], ids=["variant A", "variant B"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[vision.VisionReference, list[vision.TaskState], list[Any]]:
    reference = make_reference(
        tmp_path_factory.mktemp("run"), method="duallora", dual=request.param, lamb=0.9, learning_rate=5e-3, tasks=3
    )
    after: list[vision.TaskState] = []
    held: list[Any] = []
    vision.run(
        reference,
        after_task=lambda state: after.append(dataclasses.replace(state, model=copy.deepcopy(state.model))),
        task_done=lambda tasks, state: held.append(copy.deepcopy({**state, "random": random_state()})),
    )
    return reference, after, held


def test_bases_are_orthonormal_and_those_of_tasks_apart(finished: Any) -> None:
    _, after, _ = finished
    for state in after:
        for layer in state.model.dual_layers:
            Phi, owner = layer.memory.directions, layer.memory.owner
            assert (Phi.T @ Phi - torch.eye(Phi.shape[1])).abs().max() < 1e-5
            assert owner.max() <= state.index
    assert after[-1].model.dual_layers[-1].memory.knows(3)
    dimensions = [[space.dimension for space in state.subspaces] for state in after]
    assert all(a <= b for one, other in pairwise(dimensions) for a, b in zip(one, other, strict=True))


def test_logits_of_an_image_do_not_depend_on_its_companions(finished: Any) -> None:
    _, after, _ = finished
    model = after[-1].model
    images = torch.cat([next(task.batches(4))[0] for task in after[-1].tasks])
    with torch.no_grad():
        torch.testing.assert_close(
            model.recalled_logits(images),
            torch.cat([model.recalled_logits(image[None]) for image in images]),
            rtol=1e-4,
            atol=1e-5,
        )


def test_model_without_adapters_is_the_backbone_with_its_classifiers(finished: Any) -> None:
    _, after, _ = finished
    model = copy.deepcopy(after[-1].model)
    model.choices = dataclasses.replace(model.choices, calibration="off")
    images = next(after[-1].tasks[0].batches(4))[0]
    with torch.no_grad():
        for layer in model.dual_layers:
            for part in layer.parts:
                for value in (part.old, part.residual, part.up, part.factor("B")):
                    value.zero_()
        recalled = model.recalled_logits(images)
        for layer in model.dual_layers:
            layer.plain = True
        plain = torch.cat([head(model.vit(images)) for head in model.heads[:3]], dim=1)
    torch.testing.assert_close(recalled, plain)


def test_checkpoints_bring_each_tasks_model_back(finished: Any) -> None:
    reference, after, _ = finished
    images = next(after[0].tasks[0].batches(4))[0]
    for state in after:
        restored = vision.restore(reference, state.index)
        mine, theirs = dict(state.model.named_parameters()), dict(restored.named_parameters())
        assert {n for n, p in theirs.items() if p.requires_grad} == {n for n, p in mine.items() if p.requires_grad}
        with torch.no_grad():
            assert torch.equal(restored(images), state.model(images))
            assert torch.equal(restored.recalled_logits(images), state.model.recalled_logits(images))
    with pytest.raises(UserError, match="was made with"):
        vision.restore(dataclasses.replace(reference, dual=DualChoices(memory="off")), 0)


def test_run_taken_up_after_a_task_ends_as_the_whole_one(finished: Any, tmp_path: Path) -> None:
    reference, _, held = finished
    whole = json.loads((reference.output_dir / "results.json").read_text())
    vision.run(dataclasses.replace(reference, output_dir=tmp_path), before=copy.deepcopy(held[0]))
    again = json.loads((tmp_path / "results.json").read_text())
    assert {**again, "train_seconds": 0} == {**whole, "train_seconds": 0}


# Settings, labels, refusals


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("upstream.residual_basis=newest", "is unknown here. Expected: new, previous, old"),
        ("upstream.basis_time=after", "a task's own directions are not known while it is learned"),
        ("upstream.temperature=0", "temperature=0: expected a number over 0"),
        ("upstream.confidence=1.5", "confidence=1.5: expected a probability"),
        ("upstream.memry=off", "no key 'memry'. Did you mean 'memory'?"),
        ("upstream.rank=65", "more than the model's width"),
        ("profile=upstream", "is a reference implementation and runs in profile quick alone"),
    ],
)
def test_choice_that_cannot_be_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_plan(parse(["method=duallora", "device=cpu", word]))


def test_plan_says_that_it_is_a_reconstruction_and_what_it_chose(tmp_path: Path) -> None:
    plan = make_plan(parse(["method=duallora", "device=cpu", "upstream.residual_basis=previous", f"output={tmp_path}"]))
    assert plan.labels == ("quick", "reference", "reconstruction", "off-protocol")
    said = headline(plan)
    assert "DualLoRA (reconstruction)" in said
    assert "reconstruction" in next(line for line in said.splitlines() if "not comparable" in line)
    assert any("no formula, setting or number" in note for note in plan.notes)
    assert any('residual_basis = "previous"' in line for line in plan.recipe)


def test_report_and_comparison_name_the_reconstruction() -> None:
    record = make_record(method="duallora", family="vision", engine="reference", labels=["reconstruction"])
    assert "RECONSTRUCTION" in warning(record)
    assert "whose text was not read" in warning(record)
    result = compare_runs([record])
    assert result["verdict"].startswith("not comparable because it is a reconstruction: of the paper")
    assert result["metrics"] == []

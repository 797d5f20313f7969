"""The reference engine on a tiny CLIP: what it leaves, what its methods promise, and that it repeats."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.clip.quick import DOMAINS
from flatpatch.families.clip.reference import ClipReference, TaskState, criterion, rate_at, restore, run
from flatpatch.families.clip.reference.checkpoints import checkpoint_file
from flatpatch.families.clip.reference.inflora import InfLoRA
from flatpatch.families.clip.reference.model import build, factor
from flatpatch.families.clip.reference.tasks import load_tasks
from flatpatch.families.dualgpm import input_covariances
from flatpatch.families.resuming import random_state
from flatpatch.sam import SAM
from tests.clip_cases import CLASSES, SMALL, few_images, make_clip, make_reference, results_of

__all__ = ["few_images"]
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


def weights_of(reference: ClipReference) -> list[dict[str, torch.Tensor]]:
    return [load_file(checkpoint_file(reference, task)) for task in range(len(reference.arguments.datasets))]


def same(one: ClipReference, other: ClipReference) -> bool:
    pairs = zip(weights_of(one), weights_of(other), strict=True)
    return all(torch.equal(first[name], second[name]) for first, second in pairs for name in first)


@pytest.mark.parametrize("design", ["sequential", "per_task", "inflora"])
def test_run_leaves_a_full_matrix_that_its_checkpoints_give_again(design: str, folder: Path, tmp_path: Path) -> None:
    reference = make_reference(folder, tmp_path / "out", design)
    seen: list[dict[str, float]] = []
    predicted: list[dict[str, int]] = []
    run(reference, on_zero_shot=seen.append, on_predict=predicted.append)
    results = results_of(reference)
    matrix = np.array(results["accuracy_matrix"])
    assert matrix.shape == (2, 2) and not np.isnan(matrix).any()
    assert list(seen[0].values()) == results["zero_shot"]
    assert results["images"] == {name: {"train": 3 * CLASSES, "test": 2 * CLASSES} for name in SMALL.datasets}
    # All test images are as many for each task, so that sample-weighted is the mean over those learned.
    assert results["sample_weighted"] == pytest.approx([matrix[0, 0], matrix[1].mean()])
    assert {each["total"] for each in predicted} == {2} and predicted[-1]["step"] == 2
    tasks = load_tasks(SMALL, data=None, model=folder, size=32, skipped=())
    for index in range(2):
        model = restore(reference, index)
        for place, task in enumerate(tasks):
            embedded = model.embed(task.classes, task.templates, 16)
            images = torch.stack([task.test[number][0] for number in range(len(task.test))])
            labels = torch.tensor([task.test[number][1] for number in range(len(task.test))])
            right = (model.predict(images, embedded) == labels).double().mean().item()
            assert 100 * right == pytest.approx(matrix[index, place])


def test_same_arguments_give_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    first, again = (make_reference(folder, tmp_path / name) for name in ("first", "again"))
    other = replace(make_reference(folder, tmp_path / "other"), seed=4)
    for reference in (first, again, other):
        run(reference)
    assert same(first, again)
    assert not same(first, other)


def test_rho_zero_trains_as_without_sam_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    plain, zero, some = (make_reference(folder, tmp_path / name) for name in ("plain", "zero", "some"))
    run(plain)
    for reference, rho in ((zero, 0.0), (some, 0.5)):

        def with_sam(optimizer: torch.optim.Optimizer, rho: float = rho) -> Any:
            return SAM(optimizer, rho=rho).gradients

        run(reference, make_gradients=with_sam)
    assert same(plain, zero)
    assert not same(plain, some)


def test_measuring_between_tasks_changes_nothing_of_the_run(folder: Path, tmp_path: Path) -> None:
    quiet, watched = (make_reference(folder, tmp_path / name) for name in ("quiet", "watched"))
    seen: list[tuple[str, int, str]] = []

    def look(when: str, state: TaskState) -> None:
        images = torch.stack([state.task.train[number][0] for number in range(4)])
        assert state.model(images).shape == (4, len(state.task.classes))
        assert state.model.clip.logit_scale.requires_grad is False
        torch.rand(3)
        seen.append((when, state.index, state.task.name))

    run(quiet)
    run(watched, before_task=lambda state: look("before", state), after_task=lambda state: look("after", state))
    assert seen == [(when, index, name) for index, name in enumerate(SMALL.datasets) for when in ("before", "after")]
    assert same(quiet, watched)


def test_each_adapter_of_one_per_task_starts_from_the_pretrained_model(folder: Path, tmp_path: Path) -> None:
    starts: list[float] = []

    def look(state: TaskState) -> None:
        starts.append(max(parameter.abs().max().item() for parameter in state.model.factors("B")))

    run(make_reference(folder, tmp_path / "apart", "per_task"), before_task=look)
    run(make_reference(folder, tmp_path / "one"), before_task=look)
    assert starts[:3] == [0, 0, 0]
    assert starts[3] > 0, "one LoRA goes on from the task before"


def test_optimizer_steps_with_the_tasks_own_rate_along_warm_up_and_cosine(folder: Path, tmp_path: Path) -> None:
    rates: list[tuple[int, int, float]] = []
    reference = make_reference(folder, tmp_path / "out", iterations=5, warmup=2, learning_rate=(0.1, 0.4))
    run(reference, on_step=lambda state: rates.append((state["task"], state["step"], state["learning_rate"])))
    factors = [0.5, 1.0, 1.0, 0.75, 0.25]  # two steps up, then (1 + cos(pi k / 3)) / 2
    expected = [
        (task, step, rate * share)
        for task, rate in enumerate((0.1, 0.4))
        for step, share in enumerate(factors, start=1)
    ]
    assert [each[:2] for each in rates] == [each[:2] for each in expected]
    assert [each[2] for each in rates] == pytest.approx([each[2] for each in expected])


def test_schedule_without_warm_up_is_a_cosine() -> None:
    arguments = replace(SMALL, iterations=4, warmup=0)
    assert [rate_at(arguments, step) for step in range(5)] == pytest.approx(
        [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    )
    assert [rate_at(replace(SMALL, iterations=3, warmup=3), step) for step in range(3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_adamw_trains_too(folder: Path, tmp_path: Path) -> None:
    sgd, adamw = make_reference(folder, tmp_path / "sgd"), make_reference(folder, tmp_path / "w", optimizer="adamw")
    for reference in (sgd, adamw):
        run(reference)
    assert not same(sgd, adamw)


def test_loss_is_the_smoothed_cross_entropy() -> None:
    logits, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    log = logits.log_softmax(1)
    own = -log[torch.arange(5), targets]
    expected = (0.8 * own - 0.2 * log.mean(1)).mean()
    torch.testing.assert_close(criterion(replace(SMALL, label_smoothing=0.2))(logits, targets), expected)


def test_diverging_run_says_what_to_change(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlatpatchError, match=r"the loss is .* Try a smaller learning_rate or rho"):
        run(make_reference(folder, tmp_path / "out", learning_rate=(1e30,), iterations=20, warmup=0))


def test_adapter_for_another_base_model_is_refused(folder: Path, tmp_path: Path) -> None:
    reference = make_reference(folder, tmp_path / "out")
    run(reference)
    other = make_clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"0\.safetensors is an adapter for another base model: it was trained on the"):
        restore(replace(reference, model=other, base="0123456789abcdef"), 0)
    with pytest.raises(UserError, match=r"was made with rank 2 \(asked: 3\). Ask with the run's arguments"):
        restore(replace(reference, arguments=replace(SMALL, rank=3)), 0)
    checkpoint_file(reference, 1).write_bytes(b"torn")
    with pytest.raises(UserError, match="no whole adapter of task 2"):
        restore(reference, 1)


# InfLoRA's design


def test_new_updates_of_inflora_do_not_reach_inputs_of_old_tasks(folder: Path) -> None:
    """Of inputs in the protected directions A makes nothing, so that B A x = 0 whatever B is."""
    arguments = replace(SMALL, lamb=1.0, targets=("q",), tower="vision", rank=2)
    model = build(folder, arguments, seed=0, device="cpu").double()
    model.ask(DOMAINS["shapes"], "{}")
    # Four images of 5 tokens give at most 10 directions of 16: the rest is free for the second task.
    first, second = (torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    inflora = InfLoRA(arguments, model)
    inflora.begin(0, [(first, first)])
    inflora.end(0, [(first, first)])
    space = inflora.subspaces[0]
    projection = torch.from_numpy(space.projection)
    protected = torch.eye(16, dtype=torch.float64) - projection if space.of_complement else projection
    (old, _) = input_covariances(list(model.layers.values()), lambda: model(first))
    assert (protected @ old).norm() > 0.99 * old.norm()
    inflora.begin(1, [(second, second)])
    (A, _) = model.factors("A")
    assert (A @ protected).abs().max() < 1e-10
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64) / 3, atol=1e-10, rtol=0)


def test_inflora_trains_b_alone_and_protects_more_with_each_task(folder: Path, tmp_path: Path) -> None:
    reference = make_reference(folder, tmp_path / "out", "inflora")
    begun: list[list[torch.Tensor]] = []
    run(reference, before_task=lambda state: begun.append([a.detach().clone() for a in state.model.factors("A")]))
    for task, factors in enumerate(begun):
        kept = weights_of(reference)[task]
        assert all(
            torch.equal(a, kept[f"{name}.A"]) for a, name in zip(factors, restore(reference, task).layers, strict=True)
        )
    first, second = results_of(reference)["protected_dimensions"]
    assert len(first) == 8 and all(old <= new for old, new in zip(first, second, strict=True))


def test_joined_model_of_inflora_has_the_factors_of_all_tasks_and_the_same_logits(folder: Path, tmp_path: Path) -> None:
    reference = make_reference(folder, tmp_path / "out", "inflora")
    run(reference)
    apart, joined = restore(reference, 1), restore(reference, 1, joined=True)
    images = torch.randn(4, 3, 32, 32)
    for model in (apart, joined):
        model.ask(DOMAINS["shapes"], "this is {}")
    torch.testing.assert_close(joined(images), apart(images), rtol=1e-4, atol=1e-4)
    layer = next(iter(joined.layers.values()))
    assert factor(layer, "A").shape[0] == 2 * SMALL.rank
    assert {name.split(".")[-3] for name, p in joined.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name.split(".")[-3] for name, p in apart.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.parametrize("design", ["sequential", "per_task", "inflora"])
def test_run_that_was_stopped_goes_on_after_its_last_task(design: str, folder: Path, tmp_path: Path) -> None:
    whole, parts = (make_reference(folder, tmp_path / name, design) for name in ("whole", "parts"))
    run(whole)
    held: dict[str, Any] = {}

    def stop(tasks: int, state: dict[str, Any]) -> None:
        held.update(copy.deepcopy(state), random=random_state())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parts, task_done=stop)
    seen: list[int] = []
    run(parts, before=held, after_task=lambda state: seen.append(state.index))
    assert seen == [1]
    assert same(whole, parts)
    ours, theirs = (
        {name: value for name, value in results_of(each).items() if "seconds" not in name} for each in (parts, whole)
    )
    assert ours == theirs

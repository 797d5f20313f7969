"""The reference engine for images: the adapted layer, the tasks, and whole runs of a tiny Vision Transformer.

The ladder: dense formulas for a layer and for covariances, exact equalities for what must stay or repeat, and in
test_reference_vision_upstream.py the authors' own code.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from flatpatch.errors import UserError
from flatpatch.families.dualgpm import input_covariances
from flatpatch.families.resuming import random_state
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.reference import checkpoints
from flatpatch.families.vision.reference.images import load_tasks
from flatpatch.families.vision.reference.vit import KeyValueLoRA, build
from flatpatch.flatness.scope import find_scope
from flatpatch.sam import SAM
from tests.reference_images import CLASSES, SIZES, TinyImages, make_reference

METHODS = ("inflora", "seqlora")
TASKS = 4


class Run(NamedTuple):
    """A finished run, with copies of the model before and after each task."""

    reference: vision.VisionReference
    before: list[vision.LoRAViT]
    after: list[vision.TaskState]
    steps: list[dict[str, Any]]

    @property
    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.reference.output_dir / "results.json").read_text())
        return {name: value for name, value in found.items() if name != "train_seconds"}


def do_run(reference: vision.VisionReference, **options: Any) -> Run:
    before: list[vision.LoRAViT] = []
    after: list[vision.TaskState] = []
    steps: list[dict[str, Any]] = []

    def learned(state: vision.TaskState) -> None:
        torch.rand(7)  # a measurement may draw random numbers
        after.append(vision.TaskState(state.index, copy.deepcopy(state.model), state.tasks, state.subspaces))

    def ready(state: vision.TaskState) -> None:
        torch.rand(5)
        before.append(copy.deepcopy(state.model))

    vision.run(reference, on_step=steps.append, before_task=ready, after_task=learned, **options)
    return Run(reference, before, after, steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        method: do_run(make_reference(folder / method, method=method, lamb=0.99, learning_rate=5e-3))
        for method in METHODS
    }


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


# The model


def random_layer(bias: bool = True) -> KeyValueLoRA:
    """Return a layer of width 5 with an update, and another of earlier tasks."""
    layer = KeyValueLoRA(torch.nn.Linear(5, 15, bias=bias).double(), rank=2).double()
    for part in (layer.k, layer.v):
        torch.nn.init.normal_(part.factor("B"))
        part.old.normal_()
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_layer_adds_old_and_present_updates_to_keys_and_values_alone(bias: bool) -> None:
    qkv = torch.nn.Linear(5, 15, bias=bias).double()
    layer = KeyValueLoRA(qkv, rank=2).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), qkv(x))
    for part in (layer.k, layer.v):
        torch.nn.init.normal_(part.factor("B"))
        part.old.normal_()
    (A_k, A_v), (B_k, B_v) = layer.factors("A"), layer.factors("B")
    changes = [torch.zeros(5, 5, dtype=torch.float64), B_k @ A_k + layer.k.old, B_v @ A_v + layer.v.old]
    torch.testing.assert_close(layer(x), qkv(x) + x @ torch.cat(changes).T)


def test_folding_an_update_changes_no_output_and_leaves_a_new_one_of_zero() -> None:
    layer = random_layer()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = layer(x)
    for _ in range(2):
        layer.fold()
        torch.testing.assert_close(layer(x), expected)
        assert not layer.k.update().any() and not layer.v.update().any()


def test_flatness_measures_the_merged_keys_and_values(runs: dict[str, Run]) -> None:
    state = runs["inflora"].after[1]
    scope = find_scope(state.model, "merged")
    parts = [part for layer in state.model.layers for part in (layer.k, layer.v)]
    for part, matrix in zip(parts, scope.variables, strict=True):
        torch.testing.assert_close(matrix, part.weight + part.update() + part.old)
    images, targets = next(state.tasks[1].batches(22))
    with scope.installed():
        loss = F.cross_entropy(state.model(images), targets)
        gradients = torch.autograd.grad(loss, scope.variables)
    torch.testing.assert_close(loss, F.cross_entropy(state.model(images), targets))
    # The chain rule: what reaches B is the merged gradient times A^T.
    trained = [part.factor("B") for part in parts]
    through_B = torch.autograd.grad(F.cross_entropy(state.model(images), targets), trained)
    for G, found, part in zip(gradients, through_B, parts, strict=True):
        torch.testing.assert_close(found, G @ part.factor("A").T, rtol=1e-4, atol=1e-7)


def test_fresh_adapters_leave_timms_model_as_it_is(tmp_path: Path) -> None:
    plain = VisionTransformer(num_classes=9, **SIZES).eval()
    save_file(plain.state_dict(), tmp_path / "vit.safetensors")
    model = build(make_reference(tmp_path, weights=tmp_path / "vit.safetensors"), [2, 3])
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model.vit(images), plain.forward_features(images)[:, 0])
    assert model(images).shape == (4, 2) and model(images, 1).shape == (4, 3)


def test_prediction_is_among_the_classes_seen_so_far(tmp_path: Path) -> None:
    model = build(make_reference(tmp_path), [2, 3, 2])
    images = torch.randn(50, 3, 16, 16)
    with torch.no_grad():
        model.heads[1].bias += 9  # type: ignore[operator]
        model.heads[2].bias += 99  # type: ignore[operator]
    assert set(model.predict(images).tolist()) <= {0, 1}
    model.task = 1
    torch.testing.assert_close(model.predict(images), 2 + model(images).argmax(1))


def test_input_covariances_equal_dense_ones_on_uneven_batches(tmp_path: Path) -> None:
    model = build(make_reference(tmp_path), [2]).double()
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    found = input_covariances(model.layers, lambda: (model(images[:4]), model(images[4:])))
    block = model.vit.blocks[0]
    inputs = block.norm1(model.vit._pos_embed(model.vit.patch_embed(images))).flatten(0, 1)
    torch.testing.assert_close(found[0], (inputs.T @ inputs / len(inputs)).detach())
    inputs = model.vit.blocks[1].norm1(block(model.vit._pos_embed(model.vit.patch_embed(images)))).flatten(0, 1)
    torch.testing.assert_close(found[1], (inputs.T @ inputs / len(inputs)).detach())
    assert not any(layer._forward_pre_hooks for layer in model.layers)


# The data


def test_tasks_hold_each_image_of_their_classes_once() -> None:
    dataset = TinyImages({})
    tasks = load_tasks(dataset, init_cls=3, increment=2)
    assert [task.classes for task in tasks] == [range(0, 3), range(3, 5), range(5, 7), range(7, 8)]
    assert [len(task.train) for task in tasks] == [33, 22, 22, 11]
    for task in tasks:
        for place, name in enumerate(task.names):
            number = task.classes[place]
            for split, images in (("train", task.train), ("train", task.measure), ("test", task.test)):
                own = getattr(dataset, f"{split}_data")[getattr(dataset, f"{split}_targets") == name]
                np.testing.assert_array_equal(images.images[images.targets == number], own)


def test_shuffled_classes_are_numbered_by_numpys_permutation() -> None:
    tasks = load_tasks(TinyImages({}), init_cls=4, increment=4, shuffle_seed=3)
    np.random.seed(3)
    assert [name for task in tasks for name in task.names] == np.random.permutation(CLASSES).tolist()


def test_measuring_batches_are_not_augmented_and_count_from_the_tasks_first_class() -> None:
    task = load_tasks(TinyImages({}), init_cls=2, increment=2)[1]
    (images, targets), *rest = task.batches(16)
    again, _ = next(task.batches(16))
    assert torch.equal(images, again) and len(rest) == 1
    assert targets.tolist() == [0] * 11 + [1] * 5
    first = (torch.from_numpy(task.train.images[0]).permute(2, 0, 1) / 255 - 0.45) / 0.2
    torch.testing.assert_close(images[0], first)


def test_images_are_read_from_files_when_the_dataset_holds_paths(tmp_path: Path) -> None:
    class OnDisk(TinyImages):
        use_path = True

        def download_data(self) -> None:
            super().download_data()
            for split in ("train", "test"):
                paths = []
                for index, image in enumerate(getattr(self, f"{split}_data")):
                    paths.append(str(tmp_path / f"{split}{index}.png"))
                    Image.fromarray(image).save(paths[-1])
                setattr(self, f"{split}_data", np.array(paths))

    there, here = (load_tasks(kind({}), init_cls=4, increment=4)[1].test for kind in (OnDisk, TinyImages))
    assert torch.equal(there[9][0], here[9][0]) and there[9][1] == here[9][1]


# Whole runs


@pytest.mark.parametrize("method", METHODS)
def test_only_the_methods_factors_and_the_tasks_classifier_move(method: str, runs: dict[str, Run]) -> None:
    for task, (before, state) in enumerate(zip(runs[method].before, runs[method].after, strict=True)):
        moved = differing(weights_of(before), weights_of(state.model))
        trained = {name for name, weight in state.model.named_parameters() if weight.requires_grad}
        factors = ("lora_B.",) if method == "inflora" else ("lora_A.", "lora_B.")
        expected = {name for name in weights_of(before) if any(factor in name for factor in factors)}
        assert moved == trained == expected | {f"heads.{task}.weight", f"heads.{task}.bias"}


def test_sequential_lora_goes_on_where_it_left(runs: dict[str, Run]) -> None:
    run = runs["seqlora"]
    for state, then in zip(run.after, run.before[1:], strict=False):
        assert not differing(weights_of(state.model), weights_of(then))


def test_a_new_task_of_inflora_starts_from_the_same_function(runs: dict[str, Run]) -> None:
    run = runs["inflora"]
    images, _ = next(run.after[0].tasks[0].batches(22))
    for state, then in zip(run.after, run.before[1:], strict=False):
        torch.testing.assert_close(then(images, 0), state.model(images, 0), rtol=1e-4, atol=1e-5)


def test_inflora_does_not_change_what_a_layer_makes_of_protected_inputs(runs: dict[str, Run]) -> None:
    run = runs["inflora"]
    for task in range(1, TASKS):
        known = run.after[task - 1].subspaces
        for layer, space in enumerate(known):
            assert not space.of_complement and space.dimension + run.reference.rank <= SIZES["embed_dim"]
            before, after = run.before[task].layers[layer], run.after[task].model.layers[layer]
            protected = torch.from_numpy(space.basis.T)
            free = torch.randn(20, SIZES["embed_dim"])
            # Rounding in float32: B A x with A x = 1e-7. The same update moves other inputs by far more.
            assert (after(protected) - before(protected)).abs().max() < 2e-6
            assert (after(free) - before(free)).abs().max() > 1e-3


def test_sequential_lora_does_interfere(runs: dict[str, Run]) -> None:
    run = runs["seqlora"]
    protected = torch.from_numpy(runs["inflora"].after[0].subspaces[0].basis.T)
    change = run.after[1].model.layers[0](protected) - run.before[1].layers[0](protected)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_matrix_counts_answers_among_all_classes_seen(method: str, runs: dict[str, Run]) -> None:
    run = runs[method]
    for row, state in enumerate(run.after):
        right = []
        for column in range(row + 1):
            task = state.tasks[column]
            images = torch.stack([task.test[index][0] for index in range(len(task.test))])
            logits = torch.cat([state.model(images, seen) for seen in range(row + 1)], dim=1)
            right.append((logits.argmax(1) == torch.tensor([task.test[index][1] for index in range(14)])).sum().item())
        matrix = run.results["accuracy_matrix"][row]
        assert matrix[: row + 1] == pytest.approx([100 * count / 14 for count in right])
        assert matrix[row + 1 :] == [None] * (TASKS - 1 - row)
        assert run.results["top1_curve"][row] == pytest.approx(100 * sum(right) / (14 * (row + 1)))
    assert run.results["classes"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert run.results["test_images"] == [14, 28, 42, 56]


def test_protected_dimensions_are_recorded_and_never_shrink(runs: dict[str, Run]) -> None:
    found = runs["inflora"].results["protected_dimensions"]
    assert found == [[space.dimension for space in state.subspaces] for state in runs["inflora"].after]
    assert all(
        1 <= a <= b for one, other in zip(found, found[1:], strict=False) for a, b in zip(one, other, strict=True)
    )
    assert "protected_dimensions" not in runs["seqlora"].results


@pytest.mark.parametrize("method", METHODS)
def test_restored_model_equals_the_one_that_was_saved(method: str, runs: dict[str, Run]) -> None:
    run = runs[method]
    for state in run.after[1:3]:
        restored = vision.restore(run.reference, state.index)
        expected = {
            name: value
            for name, value in weights_of(state.model).items()
            if not any(name.startswith(f"heads.{later}.") for later in range(state.index + 1, TASKS))
        }
        assert not differing(weights_of(restored), expected) and restored.task == state.index
        trained = {name for name, weight in restored.named_parameters() if weight.requires_grad}
        assert trained == {name for name, weight in state.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_same_arguments_give_the_same_run_measured_or_not(method: str, runs: dict[str, Run], tmp_path: Path) -> None:
    reference = vision.VisionReference(**{**vars(runs[method].reference), "output_dir": tmp_path})
    losses: list[float] = []
    vision.run(reference, on_step=lambda step: losses.append(step["loss"]))  # nothing is measured here
    assert losses == [step["loss"] for step in runs[method].steps]
    assert Run(reference, [], [], []).results == runs[method].results
    saved, other = (
        load_file(folder / "tasks" / "3.safetensors") for folder in (tmp_path, runs[method].reference.output_dir)
    )
    assert not differing(saved, other)


def test_another_seed_gives_another_run(runs: dict[str, Run], tmp_path: Path) -> None:
    other = vision.VisionReference(
        **{**vars(runs["seqlora"].reference), "output_dir": tmp_path, "seed": 1, "epochs": 1}
    )
    assert do_run(other).steps[0]["loss"] != runs["seqlora"].steps[0]["loss"]


def test_batches_come_in_new_orders_that_do_not_depend_on_the_weights(tmp_path: Path) -> None:
    class Plain(TinyImages):
        train_trsf: list[Any] = []

    orders: list[list[int]] = []
    task = load_tasks(Plain({}), init_cls=8, increment=1)[0]
    numbers = {task.train[number][0].numpy().tobytes(): number for number in range(len(task.train))}
    for rank in (2, 3):
        seen: list[Tensor] = []

        def watch(state: vision.TaskState, seen: list[Tensor] = seen) -> None:
            state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        reference = make_reference(
            tmp_path, method="seqlora", dataset=Plain, init_cls=8, rank=rank, epochs=3, batch_size=30
        )
        vision.run(reference, before_task=watch)
        assert [len(images) for images in seen] == [30, 30, 28] * 3
        orders.append([numbers[image.numpy().tobytes()] for images in seen for image in images])
    assert orders[0] == orders[1]
    epochs = [orders[0][start : start + 88] for start in (0, 88, 176)]
    everything = list(range(88))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert everything not in epochs and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("optimizer", "factors"),
    [
        ("adam", [1.0, 1.0, *(math.cos(0.495 * math.pi * epoch / 4) for epoch in (1, 2, 3))]),
        ("sgd", [(1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]),
    ],
)
def test_learning_rate_follows_the_authors_cosine(optimizer: str, factors: list[float], tmp_path: Path) -> None:
    reference = make_reference(
        tmp_path, method="seqlora", optimizer=optimizer, init_cls=8, batch_size=44, epochs=5, learning_rate=1e-2
    )
    steps = do_run(reference).steps
    rates = [step["learning_rate"] for step in steps]
    assert rates == pytest.approx([1e-2 * factor for factor in factors for _ in range(2)])
    assert [(step["task"], step["step"], step["total"]) for step in steps] == [(0, i + 1, 10) for i in range(10)]


def test_first_sgd_step_is_the_gradient_of_the_mean_loss(tmp_path: Path) -> None:
    reference = make_reference(
        tmp_path, method="seqlora", optimizer="sgd", init_cls=8, batch_size=88, epochs=1, learning_rate=0.1
    )
    gradients: dict[str, Tensor] = {}

    def make_gradients(optimizer: torch.optim.Optimizer) -> Any:
        assert [group["name"] for group in optimizer.param_groups] == ["A", "B", "head"]
        assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4, 2]

        def once(closure: Any) -> Tensor:
            loss: Tensor = closure()
            gradients["bias"] = optimizer.param_groups[2]["params"][1].grad.clone()
            return loss

        return once

    run = do_run(reference, make_gradients=make_gradients)
    before, after = (model.heads[0].bias for model in (run.before[0], run.after[0].model))
    torch.testing.assert_close(after, before - 0.1 * gradients["bias"])
    assert gradients["bias"].abs().max() > 0


def test_sam_climbs_with_norm_rho_and_steps_from_where_it_was(tmp_path: Path) -> None:
    reports = []

    def make_gradients(optimizer: torch.optim.Optimizer) -> Any:
        sam = SAM(optimizer, rho=0.1)

        def gradients(closure: Any) -> Tensor:
            loss = sam.gradients(closure)
            reports.append(sam.last_step)
            return loss

        return gradients

    plain = do_run(make_reference(tmp_path / "plain", epochs=1))
    sharp = do_run(make_reference(tmp_path / "sam", epochs=1), make_gradients=make_gradients)
    assert len(reports) == len(sharp.steps) == 3 * TASKS
    assert all(float(report.perturbation_norm) == pytest.approx(0.1, rel=1e-5) for report in reports)
    assert sharp.steps[0]["loss"] == plain.steps[0]["loss"]
    assert sharp.steps[-1]["loss"] != plain.steps[-1]["loss"]


def test_prediction_is_reported_batch_by_batch(tmp_path: Path) -> None:
    seen: list[dict[str, int]] = []
    reference = make_reference(tmp_path, method="seqlora", init_cls=5, increment=3, epochs=1, batch_size=32)
    vision.run(reference, on_predict=seen.append)
    assert [tuple(each.values()) for each in seen] == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]


# Mistakes and interruptions


def test_every_mistake_in_the_arguments_is_named_at_once(tmp_path: Path) -> None:
    reference = make_reference(
        tmp_path / "out", method="inflore", optimizer="adamw", rank=33, epochs=0, lamb=1.2, weights=tmp_path / "no"
    )
    with pytest.raises(UserError) as caught:
        vision.run(reference)
    text = str(caught.value)
    for words in ("Did you mean 'inflora'", "'adamw'", "rank=33", "epochs=0", "lamb=1.2", f"no weights at {tmp_path}"):
        assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"not safetensors"), "cannot be read as safetensors"),
        (lambda path: save_file({"pos_embed": torch.zeros(1)}, path), "is not of a Vision Transformer of these sizes"),
        (
            lambda path: save_file(VisionTransformer(num_classes=0, **{**SIZES, "img_size": 32}).state_dict(), path),
            "1 tensors are missing, unknown or of another shape, the first pos_embed",
        ),
    ],
)
def test_unusable_weights_are_refused(write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=message):
        vision.run(make_reference(tmp_path / "out", weights=tmp_path / "vit.safetensors"))
    assert not (tmp_path / "out").exists()


def test_more_classes_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init_cls=9, but the dataset has 8 classes"):
        vision.run(make_reference(tmp_path / "out", init_cls=9))


def test_a_class_without_test_images_is_refused(tmp_path: Path) -> None:
    class Incomplete(TinyImages):
        def download_data(self) -> None:
            super().download_data()
            self.test_data, self.test_targets = (
                values[self.test_targets != 5] for values in (self.test_data, self.test_targets)
            )

    with pytest.raises(UserError, match="no example of class 5"):
        vision.run(make_reference(tmp_path / "out", dataset=Incomplete))


def test_an_interrupted_run_leaves_no_results_and_the_same_command_finishes_it(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    reference = vision.VisionReference(**{**vars(runs["inflora"].reference), "output_dir": tmp_path})
    (tmp_path / "results.json").write_text("of an earlier run")

    def stop(step: dict[str, Any]) -> None:
        if step["task"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vision.run(reference, on_step=stop)
    assert not (tmp_path / "results.json").exists()
    assert do_run(reference).results == runs["inflora"].results


def test_checkpoint_of_another_run_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    reference = runs["inflora"].reference
    with pytest.raises(UserError, match="was made with"):
        vision.restore(vision.VisionReference(**{**vars(reference), "rank": 4}), 1)
    with pytest.raises(UserError, match="no checkpoint of task 4"):
        vision.restore(reference, 4)


def test_an_interrupted_save_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_reference(tmp_path)
    model = build(reference, [2])
    checkpoints.save(reference, model)

    def broken(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(reference, model)
    assert not differing(weights_of(vision.restore(reference, 0)), weights_of(model))


# What is trained, of how many tasks and images


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("tuned")
    return {
        tuning: do_run(make_reference(folder / tuning, method="seqlora", tuning=tuning, epochs=1, tasks=2))
        for tuning in ("lora", "head", "full")
    }


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_tuning_moves_what_it_names_and_the_tasks_classifier(tuning: str, tuned: dict[str, Run]) -> None:
    for task, (before, state) in enumerate(zip(tuned[tuning].before, tuned[tuning].after, strict=True)):
        assert not state.model.layers
        moved = differing(weights_of(before), weights_of(state.model))
        trained = {name for name, weight in state.model.named_parameters() if weight.requires_grad}
        body = {name for name in weights_of(before) if name.startswith("vit.")} if tuning == "full" else set()
        assert moved == trained == body | {f"heads.{task}.weight", f"heads.{task}.bias"}


def test_every_tuning_begins_with_one_loss_on_one_batch(tuned: dict[str, Run]) -> None:
    """Classifiers and batches are those beside LoRA, whose fresh update is zero."""
    first = {tuning: run.steps[0]["loss"] for tuning, run in tuned.items()}
    assert first["head"] == first["full"] == pytest.approx(first["lora"], rel=1e-6)
    assert len({run.steps[1]["loss"] for run in tuned.values()}) == 3


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_restored_model_of_a_tuning_equals_the_one_that_was_saved(tuning: str, tuned: dict[str, Run]) -> None:
    run = tuned[tuning]
    for state in run.after:
        for joined in (False, True):
            restored = vision.restore(run.reference, state.index, joined=joined)
            seen = {k: v for k, v in weights_of(state.model).items() if k in weights_of(restored)}
            assert not differing(weights_of(restored), seen)
            trained = {name for name, weight in restored.named_parameters() if weight.requires_grad}
            assert trained == {name for name, weight in state.model.named_parameters() if weight.requires_grad}
    with pytest.raises(UserError, match="was made with .*this asks for"):
        vision.restore(dataclasses.replace(run.reference, tuning="lora"), 0)


@pytest.mark.parametrize("method", METHODS)
def test_first_tasks_alone_are_learned_as_in_a_run_of_all(method: str, runs: dict[str, Run], tmp_path: Path) -> None:
    whole = runs[method]
    part = do_run(dataclasses.replace(whole.reference, output_dir=tmp_path, tasks=2))
    count = len(part.steps)
    assert [step["loss"] for step in part.steps] == [step["loss"] for step in whole.steps[:count]]
    assert {step["task"] for step in part.steps} == {0, 1} and whole.steps[count]["task"] == 2
    assert part.results["accuracy_matrix"] == [row[:2] for row in whole.results["accuracy_matrix"][:2]]
    assert part.results["top1_curve"] == whole.results["top1_curve"][:2]


def test_share_of_the_images_is_the_same_for_training_and_measuring_and_leaves_the_test(tmp_path: Path) -> None:
    reference = make_reference(tmp_path, fraction=0.3, seed=3)
    whole = vision.tasks_of(dataclasses.replace(reference, fraction=1.0))
    for part, every in zip(vision.tasks_of(reference), whole, strict=True):
        assert len(part.train) == round(0.3 * 22) == 7  # of two classes with 11 images each
        assert sorted(Counter(part.train.targets.tolist()).values()) == [3, 4]
        assert np.array_equal(part.train.images, part.measure.images)
        assert np.array_equal(part.test.images, every.test.images)
        assert {image.tobytes() for image in part.train.images} < {image.tobytes() for image in every.train.images}
    tiny = vision.tasks_of(dataclasses.replace(reference, fraction=1e-6))
    assert [len(task.train) for task in tiny] == [1] * 4


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32])
def test_adapters_of_every_rank_train(rank: int, tmp_path: Path) -> None:
    run = do_run(make_reference(tmp_path, method="seqlora", rank=rank, epochs=1, tasks=1, fraction=0.3))
    assert all(factor.shape[0] == rank for layer in run.after[0].model.layers for factor in layer.factors("A"))
    assert all(factor.any() for layer in run.after[0].model.layers for factor in layer.factors("B"))


def test_tuning_tasks_and_fraction_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        vision.run(make_reference(tmp_path, tuning="full", tasks=0, fraction=0.0))
    for words in ("tuning=full: inflora is a method of LoRA factors", "tasks=0: expected at least 1", "fraction=0.0"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="unknown tuning 'hed'. Did you mean 'head'"):
        vision.run(make_reference(tmp_path, method="seqlora", tuning="hed"))
    with pytest.raises(UserError, match="tasks=5, but there are 4"):
        vision.run(make_reference(tmp_path, tasks=5))


# Going on after a task


@pytest.mark.parametrize(("method", "done"), [("inflora", 2), ("inflora", TASKS), ("seqlora", 1)])
def test_run_that_was_stopped_goes_on_after_its_last_task(
    method: str, done: int, runs: dict[str, Run], tmp_path: Path
) -> None:
    undisturbed = runs[method]
    reference = dataclasses.replace(undisturbed.reference, output_dir=tmp_path)
    held: dict[str, Any] = {}

    def stop(tasks: int, state: dict[str, Any]) -> None:
        if tasks == done:
            held.update(copy.deepcopy(state), random=random_state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do_run(reference, task_done=stop)
    assert not (tmp_path / "results.json").exists()
    again = do_run(reference, before=held)
    assert again.results == undisturbed.results
    assert [state.index for state in again.after] == [*range(done, TASKS)]
    for task in range(TASKS):
        ours, theirs = (
            load_file(run.reference.output_dir / "tasks" / f"{task}.safetensors") for run in (again, undisturbed)
        )
        assert differing(ours, theirs) == set()

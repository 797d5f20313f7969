"""The quick benchmark's images: the same bytes everywhere, upstream's interface, no class of pre-training's."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from flatpatch.families.vision import quick as quick_vision
from flatpatch.families.vision.quick import generator
from flatpatch.families.vision.quick.build import generator as pretraining_generator

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
PER_TASK = quick_vision.CLASSES // quick_vision.TASKS


@pytest.fixture(scope="module")
def dataset() -> quick_vision.QuickImages:
    images = quick_vision.QuickImages()
    images.download_data()
    return images


def task_images(targets: NDArray[np.int64], task: int) -> NDArray[np.bool_]:
    return targets // PER_TASK == task


def test_benchmark_bytes_are_the_pinned_ones(dataset: quick_vision.QuickImages) -> None:
    """Another machine or library version must not change the benchmark unnoticed."""
    digest = hashlib.sha256(dataset.train_data.tobytes() + dataset.test_data.tobytes()).hexdigest()
    assert digest == "29c00d6a7900137afa2b63901d0c3b1dba52498ccea11906dc88347abadb3efa"


def test_pretraining_images_are_those_the_shipped_model_was_made_from() -> None:
    """A changed drawing needs a new model: rebuild it, then pin the new value."""
    images = generator.draw(np.array(generator.PRETRAINING), pretraining_generator(0))
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "ed18e6bd822f3998db5d6e13628c91ee410774983a418c47d19ba2634a3996b5"
    )


def test_drawing_again_gives_the_same_images_and_another_seed_others(dataset: quick_vision.QuickImages) -> None:
    again = generator.benchmark_images(seed=0)
    assert np.array_equal(again[0], dataset.train_data)
    assert np.array_equal(again[2], dataset.test_data)
    other = quick_vision.QuickImages({}, seed=1)
    other.download_data()
    assert not np.array_equal(other.train_data, dataset.train_data)
    assert np.array_equal(other.train_targets, dataset.train_targets)


def test_splits_have_their_sizes_and_balanced_classes(dataset: quick_vision.QuickImages) -> None:
    for data, targets, per_class in (
        (dataset.train_data, dataset.train_targets, generator.TRAIN_IMAGES),
        (dataset.test_data, dataset.test_targets, generator.TEST_IMAGES),
    ):
        assert data.shape == (quick_vision.CLASSES * per_class, 32, 32, 3)
        assert data.dtype == np.uint8
        assert Counter(targets.tolist()) == dict.fromkeys(range(quick_vision.CLASSES), per_class)


def test_no_image_stands_twice(dataset: quick_vision.QuickImages) -> None:
    images = [image.tobytes() for image in (*dataset.train_data, *dataset.test_data)]
    assert len(set(images)) == len(images)


def test_every_combination_is_a_class_of_the_benchmark_or_of_pretraining() -> None:
    assert len(set(generator.BENCHMARK)) == quick_vision.CLASSES
    assert not set(generator.BENCHMARK) & set(generator.PRETRAINING)
    assert len({*generator.BENCHMARK, *generator.PRETRAINING}) == 5**3


@pytest.mark.parametrize("task", range(quick_vision.TASKS))
def test_no_single_kind_names_a_class_of_a_task_and_any_two_do(task: int) -> None:
    classes = generator.BENCHMARK[PER_TASK * task : PER_TASK * (task + 1)]
    for kind in range(3):
        assert sorted(Counter(one[kind] for one in classes).values()) == [2, 2]
    for kinds in combinations(range(3), 2):
        assert len({tuple(one[kind] for kind in kinds) for one in classes}) == PER_TASK


def test_pretraining_shows_every_shape_texture_and_hue_equally() -> None:
    for kind in range(3):
        assert set(Counter(one[kind] for one in generator.PRETRAINING).values()) == {21}


def test_neighbouring_tasks_have_classes_that_differ_in_one_kind_alone() -> None:
    """This is what one task has to unlearn from another."""
    for task in range(quick_vision.TASKS):
        following = (task + 1) % quick_vision.TASKS
        pairs = [
            sum(a != b for a, b in zip(one, other, strict=True))
            for one in generator.BENCHMARK[PER_TASK * task : PER_TASK * (task + 1)]
            for other in generator.BENCHMARK[PER_TASK * following : PER_TASK * (following + 1)]
        ]
        assert min(pairs) == 1


@pytest.mark.parametrize("task", range(quick_vision.TASKS))
def test_no_pixels_colour_decides_the_class(dataset: quick_vision.QuickImages, task: int) -> None:
    """The best of 64 pixels, by nearest neighbours among the training images; chance is 25 %, hue alone gives 50 %."""
    train, test = task_images(dataset.train_targets, task), task_images(dataset.test_targets, task)
    best = 0.0
    for row in range(2, 32, 4):
        for column in range(2, 32, 4):
            model = KNeighborsClassifier(15).fit(dataset.train_data[train, row, column], dataset.train_targets[train])
            best = max(best, model.score(dataset.test_data[test, row, column], dataset.test_targets[test]))
    assert best < 0.65


def test_dataset_has_what_upstreams_data_manager_asks_for() -> None:
    for images in (quick_vision.QuickImages(), quick_vision.QuickImages({"dataset": "flatpatch_quick"}, seed=3)):
        assert images.use_path is False
        assert images.class_order == list(range(quick_vision.CLASSES))
        for transforms in (images.train_trsf, images.test_trsf, images.common_trsf):
            assert isinstance(transforms, list)
        assert not hasattr(images, "train_data")

"""What a logged run of an image method is a run of."""

from __future__ import annotations

import pytest

from flatpatch.families.base import LoggedRun
from tests.comparison_cases import logged_runs


def first(**settings: str) -> LoggedRun:
    return logged_runs(**settings)[0]


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({}, {"method": "inflora", "dataset": "cifar100", "tasks": 10}),
        ({"model_name": "InfLoRA_CA1"}, {"method": "inflora_ca1", "dataset": "cifar100", "tasks": 10}),
        ({"dataset": "ImageNet_R"}, {"method": "inflora", "dataset": "imagenet_r", "tasks": 10}),
        ({"shuffle": "True"}, {"method": "inflora", "dataset": "cifar100", "tasks": 10, "shuffled": True}),
        (
            {"model_name": "cllora", "dataset": "imagenetr", "shuffle": "True"},
            {"method": "cllora", "dataset": "imagenet_r", "tasks": 10},
        ),
    ],
)
def test_subject_has_the_words_of_the_baselines(settings, subject):
    assert first(**settings).subject == subject


def test_settings_that_change_no_number_are_left_out():
    assert {"rank", "lamb", "epochs"} <= first(rank="10", device="[1]", data_path="there").settings.keys()
    assert (
        not {"device", "data_path", "dataset", "shuffle", "seed"}
        & first(device="[1]", data_path="there").settings.keys()
    )


@pytest.mark.parametrize(
    ("settings", "kind", "shipped", "said"),
    [
        ({}, "paper", False, []),
        ({"dataset": "ImageNet_R"}, "shipped run", True, []),
        ({"dataset": "ImageNet_R"}, "shipped run", False, ["a log does not say which images a run had"]),
        ({"dataset": "ImageNet_R"}, "paper", True, ["which one the paper's runs had is not known"]),
        ({"dataset": "imagenetr", "model_name": "cllora"}, "paper", False, []),
    ],
)
def test_split_is_doubted_where_several_are_in_use(settings, kind, shipped, said):
    doubts = first(**settings).doubt_data(kind, shipped=shipped)
    assert len(doubts) == len(said)
    assert all(words in doubt for words, doubt in zip(said, doubts, strict=True))

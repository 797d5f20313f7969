"""What ``upstream.<argument>=`` of a CLIP run takes, and what a mistake is told."""

from __future__ import annotations

import pytest

from flatpatch.errors import UserError
from flatpatch.families.clip.arguments import FIELDS, OF_THE_PROTOCOL, OURS, Arguments, from_dict, override
from flatpatch.families.clip.datasets import DATASETS

BASE = Arguments()


def read(**words: str) -> Arguments:
    return override(BASE, words, tuple(DATASETS))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"rank": "0"},
            "upstream.rank=0 is out of range (expected a whole number of at least 1, e.g. upstream.rank=8)",
        ),
        ({"rank": "1.5"}, "upstream.rank=1.5: '1.5' is not a whole number (expected e.g. upstream.rank=8)"),
        ({"rank": "1_0"}, "'1_0' is not a whole number"),
        ({"momentum": "many"}, "'many' is not a number"),
        ({"alpha": "0"}, "upstream.alpha=0 leaves nothing of the factors"),
        ({"alpha": "nan"}, "upstream.alpha=nan is out of range (expected a finite number of at least 0"),
        ({"rnk": "4"}, "CLIP runs have no argument 'rnk'. Did you mean 'rank'?"),
        ({"tower": "vison"}, "upstream.tower=vison is unknown. Did you mean 'vision'? Expected: vision, text, both."),
        ({"targets": "q,w"}, "upstream.targets=q,w: unknown 'w'. Expected: q, k, v, out."),
        ({"targets": "q,q"}, "upstream.targets=q,q names q twice"),
        ({"targets": ""}, "unknown ''"),
        ({"datasets": "aircraft,shapes"}, "unknown 'shapes'. Expected: aircraft, caltech101, cifar100, dtd."),
        ({"datasets": "dtd,dtd"}, "names dtd twice"),
        ({"optimizer": "adam"}, "upstream.optimizer=adam is unknown. Did you mean 'adamw'?"),
        ({"label_smoothing": "1"}, "expected a share under 1"),
        ({"momentum": "1"}, "expected a number under 1"),
        ({"lamb": "0"}, "upstream.lamb=0: expected a share over 0"),
        ({"iterations": "10"}, "upstream.warmup=100 is more than upstream.iterations=10"),
        (
            {"learning_rate": "0.1,0.2"},
            "upstream.learning_rate=0.1,0.2 has 2 values for 4 tasks (aircraft, caltech101, cifar100, dtd): expected "
            "one for all, or one for each.",
        ),
        ({"learning_rate": "0.1,-1,inf,0.1"}, "upstream.learning_rate has -1, inf: expected finite numbers over 0"),
        ({"learning_rate": "0.1,"}, "'' is not a number"),
        ({"on_bad_image": "ignore"}, "Expected: stop, skip"),
    ],
)
def test_bad_value_is_told_what_was_expected(words: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(**words)
    assert said in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"3 problems(.|\n)*rank=0(.|\n)*tower=x|3 problems(.|\n)*tower=x"):
        read(rank="0", tower="x", batch_size="0")


def test_record_gives_each_data_set_its_own_learning_rate_in_any_order() -> None:
    assert [BASE.rate(task) for task in range(4)] == [0.55, 0.03, 0.03, 0.12]
    assert [read(datasets="dtd,aircraft").rate(task) for task in range(2)] == [0.12, 0.55]


def test_learning_rate_is_one_for_all_or_one_for_each() -> None:
    assert [read(learning_rate="0.2").rate(task) for task in range(4)] == [0.2] * 4
    assert [read(learning_rate="1,2,3,4").rate(task) for task in range(4)] == [1, 2, 3, 4]
    assert read(datasets="dtd", learning_rate="0.5").rate(0) == 0.5


def test_arguments_come_back_from_json() -> None:
    found = read(targets="q,k", learning_rate="1,2,3,4", rank="3", tower="text")
    assert from_dict(found.as_dict()) == found


def test_values_that_the_record_does_not_state_are_named() -> None:
    assert {*OF_THE_PROTOCOL} < {*OURS} < {*FIELDS}
    stated = {"datasets", "learning_rate", "optimizer"}  # rho is a setting of its own
    assert {*FIELDS} - {*OURS} == stated | {"on_bad_image"}

"""What every family offers, and of which one a recorded run is."""

from __future__ import annotations

import inspect

import pytest

from flatpatch import families
from flatpatch.families.base import Family
from flatpatch.upstreams import UPSTREAMS
from tests.report_records import make_record

ASKED_FOR = [name for name in (*vars(Family), *Family.__annotations__) if not name.startswith("_")]


@pytest.mark.parametrize("name", families.NAMES)
def test_family_has_all_that_is_asked_of_one(name: str) -> None:
    family = families.load(name)
    for asked in ASKED_FOR:
        offered, wanted = getattr(family, asked), getattr(Family, asked, None)
        if wanted is not None:
            own, theirs = (list(inspect.signature(function).parameters) for function in (wanted, offered))
            assert own[1:] == theirs, asked  # the first one is the protocol's self
    assert isinstance(family.LEARNS_CLASSES, bool)


def test_every_method_is_of_a_family_that_is_there() -> None:
    assert {row.family for row in UPSTREAMS.values()} <= set(families.NAMES)


def test_record_of_an_earlier_version_names_no_family() -> None:
    record = make_record()
    assert families.family_of(record) == "text"
    record["settings"]["benchmark"] = {"value": "", "source": "default"}
    assert families.family_of(record) == "vision"
    assert families.family_of(record | {"family": "text"}) == "text"


def test_one_method_is_meant_where_none_is_named() -> None:
    assert [name for name, row in UPSTREAMS.items() if row.default] == [next(iter(UPSTREAMS))]

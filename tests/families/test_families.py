"""What every family offers, and of which one a recorded run is."""

from __future__ import annotations

import importlib
import inspect

import pytest

from flatpatch import families
from flatpatch.families.base import Family
from flatpatch.upstreams import UPSTREAMS
from tests.report_records import make_record

ROOMS = {
    "planning": {"make_plan": "plan"},
    "results": {"collect": "collect"},
    "reopening": {"reopen": "reopen"},
    "comparing": {name: name for name in ("subject", "knows_data", "compare_data", "read_log")},
}


def test_rooms_are_those_that_a_family_asks() -> None:
    asked = {name for name, value in vars(Family).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert asked == {name for functions in ROOMS.values() for name in functions.values()}


@pytest.mark.parametrize("name", families.NAMES)
def test_family_has_all_that_is_asked_of_one(name: str) -> None:
    for room, functions in ROOMS.items():
        module = importlib.import_module(f"flatpatch.families.{name}.{room}")
        for own, asked in functions.items():
            there = list(inspect.signature(getattr(module, own)).parameters)
            assert there == list(inspect.signature(getattr(Family, asked)).parameters)[1:], (room, own)
    assert isinstance(importlib.import_module(f"flatpatch.families.{name}.comparing").LEARNS_CLASSES, bool)


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

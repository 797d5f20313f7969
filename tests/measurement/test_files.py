"""The names of what is measured."""

from __future__ import annotations

from flatpatch.measurement.files import GIVEN_BY, VALUES
from flatpatch.measuring import KINDS, UPDATE


def test_every_value_is_given_by_one_kind() -> None:
    """An entry of the record has the loss beside its values."""
    named = [name for names in GIVEN_BY.values() for name in names]
    assert sorted(named) == sorted([*VALUES, "loss"])
    assert set(GIVEN_BY) == {*KINDS, UPDATE}

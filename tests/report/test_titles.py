"""Every table and figure says which run it shows, and whether its numbers may stand beside a paper's."""

from __future__ import annotations

import pytest

from flatpatch.errors import in_one_line
from flatpatch.report.titles import describe, labels, short_warning, warning
from tests.report_records import make_quick_record, make_record


def test_quick_and_reference_runs_are_labelled_even_if_the_record_forgets():
    assert labels(make_quick_record(labels=[])) == ["quick", "reference"]


def test_a_full_upstream_run_needs_no_label():
    record = make_record()
    assert labels(record) == []
    assert warning(record) == short_warning(record) == ""


@pytest.mark.parametrize(
    ("record", "kinds"),
    [
        (make_quick_record(engine="upstream", labels=[]), "QUICK RUN"),
        (make_quick_record(), "QUICK AND REFERENCE RUN"),
        (make_record(labels=["off-protocol"]), "OFF-PROTOCOL RUN"),
    ],
)
def test_labelled_runs_say_that_they_are_not_comparable(record, kinds):
    for text in (warning(record), short_warning(record)):
        assert text.startswith(kinds)
        assert "ot comparable with the paper's numbers" in text


def test_description_names_method_order_sam_seed_profile_and_engine():
    expected = "nlora, order 1, SAM rho=0.05, seed 42, profile upstream, engine upstream"
    assert describe(make_record()) == expected


def test_description_says_when_sam_is_off_and_names_several_seeds():
    record = make_record(seeds=[1, 2])
    record["settings"]["sam"]["value"] = "off"
    assert describe(record) == "nlora, order 1, SAM off, seeds 1, 2, profile upstream, engine upstream"


def test_description_names_what_makes_the_sam_another_one_and_not_what_changes_nothing():
    record = make_record()
    record["settings"] |= {"sam_radius": {"value": "effective"}, "gsam_alpha": {"value": 0.2}}
    assert ", SAM rho=0.05 sam_radius=effective, seed" in describe(record)
    record["settings"]["sam"]["value"] = "flatlora"
    record["settings"]["scope"] = {"value": "all"}
    assert ", Flat-LoRA rho=0.05, seed" in describe(record)


def test_description_of_a_record_with_few_settings_leaves_them_out():
    record = make_record(settings={}, seeds=[])
    assert describe(record) == "nlora, SAM off, profile upstream, engine upstream"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("as asked", "as asked"),
        ("", ""),
        ("N-LoRA is here: /data/N-LoRA", "N-LoRA is here: /data/N-LoRA"),
        ("It is not here. Looked in\n  a: empty\n  b: empty", "It is not here (details: python -m flatpatch doctor)"),
        ("It is damaged:\n  no file", "It is damaged (details: python -m flatpatch doctor)"),
    ],
)
def test_reason_is_told_in_one_line(reason: str, expected: str) -> None:
    assert in_one_line(reason) == expected

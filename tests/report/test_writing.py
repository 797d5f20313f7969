"""Marks and the certificate's table in the report."""

from __future__ import annotations

from typing import Any

import pytest

from flatpatch.report.flatness_run import flatness_table
from flatpatch.report.writing import writing_sentence

CERTIFICATE: dict[str, float | None] = {
    "invariance_change": 15.0,
    "invariance_tolerance": 1e-2,
    "invariance_change_top_eigenvalue": 15.0,
    "invariance_change_trace": 14.5,
    "invariance_change_keskar_sharpness": None,
    "invariance_change_sam_sharpness_ascent": 1.25,
}


def entry(scope: str, values: dict[str, float | None]) -> dict[str, Any]:
    return {"task_index": 0, "task": "a", "when": "after", "scope": scope, "loss": 1.0, "values": values}


def test_each_row_of_the_flatness_table_has_its_mark_and_each_certificate_a_row_of_its_own() -> None:
    values = {**CERTIFICATE, "trace": 2.0}
    lines = flatness_table({"flatness": [entry("adapter", values), entry("tangent", {"trace": 3.0})]})
    head, adapter, tangent, blank, title, columns, certificate = lines
    assert head.endswith("LoRA's writing")
    assert adapter.endswith("2  depends on writing (by 15)") and tangent.endswith("3  invariant by construction")
    assert blank == "" and title.startswith("relative change when A, B are written A/c, cB")
    assert columns.split() == ["scope", "top", "eigenv.", "trace", "Keskar", "SAM", "ball"]
    assert certificate.split()[3:] == [
        *("adapter", "15", "14", "beyond", "1.2"),
        *(["depends", "on", "writing", "(by", "15)"]),
    ]


def test_a_loss_alone_has_no_mark_whatever_the_certificate_says() -> None:
    lines = flatness_table({"flatness": [entry("adapter", {}), entry("merged", CERTIFICATE)]})
    head, adapter, merged, _, _, _, certificate = lines
    assert head.endswith(" loss") and adapter.endswith(" 1") and merged.endswith(" 1")
    assert certificate.endswith("depends on writing (by 15)")
    assert writing_sentence("adapter", [{}, {}]) == ""


def test_a_run_without_lora_has_no_mark() -> None:
    record = {"flatness": [entry("model", {})], "settings": {"tuning": {"value": "full"}}}
    assert all("writing" not in line and "invariant" not in line for line in flatness_table(record))


@pytest.mark.parametrize(
    ("scope", "values", "said"),
    [
        ("tangent", [{"trace": 3.0}], "These numbers do not depend on how LoRA's factors are written"),
        ("adapter", [{"trace": 3.0}, {}], "These numbers, the loss apart, depend on how LoRA's factors are written"),
        (
            "adapter",
            [{}, CERTIFICATE],
            "depend on how LoRA's factors are written (A / c and c B are the same function). "
            "Measured: largest relative change 15 (passes up to 0.01).",
        ),
        (
            "tangent",
            [{"invariance_change": 2e-6, "invariance_tolerance": 1e-2}],
            "Measured: largest relative change 2e-06",
        ),
        ("merged", [{"invariance_change": None, "invariance_tolerance": 1e-2}], "numbers, the loss apart, depend on"),
        (
            "merged",
            [{"trace": 3.0}, {"invariance_change": None}],
            "is not certified: of 2 measuring points 1 had the certificate",
        ),
    ],
)
def test_a_scopes_table_says_what_its_numbers_depend_on(scope: str, values: list[Any], said: str) -> None:
    assert said in writing_sentence(scope, values)

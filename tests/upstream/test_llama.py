"""The authors' LLaMA scripts through their own code, on the small random LLaMA that ships with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.upstream.test_neutrality_text import Runs, Warm, assert_same

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(1500)]
WORDS = ("order=llama1", "upstream.max_target_length=2", "upstream.generation_max_length=2")
MEASURED = ("measure=loss,eigenvalues", "measure_scope=adapter", "measure_when=after", "measure_samples=4")


# The tests' names are in the run folders, where upstream's code may not see what its models are called.
def test_decoder_run_that_is_measured_equals_the_authors_own_bit_for_bit(
    upstream: Callable[[str], Path], warm: Warm, tmp_path: Path
) -> None:
    upstream("N-LoRA")
    runs = Runs(warm, tmp_path, "method=nlora", *WORDS)
    unpatched = runs.unpatched()
    assert_same(runs.patched("off", "sam=off", *MEASURED), unpatched)
    record = json.loads((tmp_path / "off" / "record.json").read_text())
    assert record["labels"] == ["quick", "off-protocol"]
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "off" / "flatness").glob("*.json"))]
    assert len(found) == 2
    perturbed = runs.patched("sam", "sam=sam", "rho=0.05", "tasks=dbpedia")
    assert perturbed.losses[0] != unpatched.losses[0]  # the comparison can fail
    steps = [json.loads(line) for line in (tmp_path / "sam" / "metrics.jsonl").read_text().splitlines()]
    assert [step["perturbation_norm"] for step in steps] == pytest.approx([0.05] * len(steps), rel=1e-4)
    assert all(step["perturbed_loss"] > step["loss"] for step in steps)


def test_decoder_run_with_sam_of_radius_zero_equals_the_authors_own_bit_for_bit(
    upstream: Callable[[str], Path], warm: Warm, tmp_path: Path
) -> None:
    upstream("O-LoRA")
    runs = Runs(warm, tmp_path, "method=olora", *WORDS)
    assert_same(runs.patched("zero", "sam=sam", "rho=0"), runs.unpatched())

"""The benchmark that splits the time of Hessian products and searches: parts make the whole, and it undoes itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flatpatch.flatness import HessianOperator, Problem
from tests.flatness_cases import import_file

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hessian_split.py"


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)  # as Python does for a script


@pytest.mark.slow
def test_the_split_of_every_way_adds_up_and_nothing_stays_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = import_file(BENCHMARK, "benchmark_hessian_split")
    before = (HessianOperator.matmat, Problem.active, torch.get_num_threads())
    benchmark.main(["size=tiny", "batch=2", "length=16", "values=2", "blocks=1,2", "rounds=1", f"threads={before[2]}"])
    assert (HessianOperator.matmat, Problem.active, torch.get_num_threads()) == before
    printed = capsys.readouterr().out
    sections = re.split(r"\n\n", printed)
    assert len(sections) == 7  # what is measured, three ways of a product, two searches, the choice of a block
    for section in sections[2:6]:
        head, *parts = section.splitlines()
        total = float(re.search(r"([\d.]+) s while split", head)[1])
        assert sum(float(re.search(r"([\d.]+) s", part)[1]) for part in parts) == pytest.approx(total, abs=0.01)
    for part in ("products", "content sums", "orthogonalising", "small eigenproblem", "model's state"):
        assert f"  {part} " in sections[5]
    assert "building graphs" in sections[3]
    assert "fastest here: block_size=" in sections[-1]


def test_a_mistyped_setting_of_the_benchmark_is_named() -> None:
    benchmark = import_file(BENCHMARK, "benchmark_hessian_split")
    with pytest.raises(SystemExit, match="'blcoks=1' is not one of the settings device, size"):
        benchmark.main(["blcoks=1"])


@pytest.mark.parametrize("name", ["hessian_split", "flatness", "landscape"])
@pytest.mark.parametrize("word", ["scope=huge", "size=huge", "device=tpu", "rounds=some"])
def test_a_value_that_the_benchmark_cannot_use_is_named(name: str, word: str) -> None:
    benchmark = import_file(BENCHMARK.with_name(f"{name}.py"), f"benchmark_{name}")
    with pytest.raises(SystemExit, match=f"{word}'? is not (one of|a whole number)"):
        benchmark.main([word])

"""What the build scripts share: their words, and the loop that pre-trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatpatch.errors import UserError
from flatpatch.families.pretraining import pretrain, read_build


@pytest.mark.parametrize("words", [[], ["steps=5"], ["out="], ["out=x", "step=5"], ["out=x", "steps=many"]])
def test_words_that_cannot_be_followed_make_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="steps"):
        read_build(words, {"steps": 10, "rate": 0.1}, "build out=x")
    assert list(tmp_path.iterdir()) == []


def test_values_have_the_kinds_of_the_settings(tmp_path: Path) -> None:
    found = read_build([f"out={tmp_path / 'x'}", "steps=5", "rate=1"], {"steps": 10, "rate": 0.1}, "")
    assert found == (tmp_path / "x", {"steps": 5, "rate": 1.0})
    assert isinstance(found[1]["rate"], float) and (tmp_path / "x").is_dir()


def test_rate_warms_up_falls_and_stops_at_its_floor_and_long_gradients_are_clipped() -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    seen: list[float] = []
    losses = pretrain(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda: -7 * model.weight.sum(),  # its gradient of norm 7 is clipped to 1: a step is as long as the rate
        {"steps": 200, "warmup": 2},
        floor=0.25,
        after_step=lambda: seen.append(model.weight.item()),
    )
    lengths = [after - before for before, after in zip([0.0, *seen], seen, strict=False)]
    expected = [min((step + 1) / 2, max(0.25, 1 - step / 200)) for step in range(200)]
    assert lengths == pytest.approx(expected, rel=1e-5)
    means = [sum(-7 * w for w in [0.0, *seen][k : k + 100]) / 100 for k in (0, 100)]
    assert losses == pytest.approx(means, abs=1e-4)

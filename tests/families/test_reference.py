"""What the reference engines' processes tell the runner while they work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatpatch.families.reference import StepRecorder


def test_what_is_told_stays_in_the_progress_until_it_has_been_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runner looks now and then: a line that the next step overwrites would be lost."""
    files = {name: str(tmp_path / name) for name in ("metrics", "progress", "summary")}
    recorder = StepRecorder({**files, "task": None, "sam": {"kind": "off"}, "measure": None})
    recorder.tell("zero-shot accuracy 24.0")
    recorder.on_predict({"step": 2, "total": 2}, "dtd")
    progress = json.loads((tmp_path / "progress").read_text())
    assert (progress["note"], progress["task"], progress["step"]) == ("zero-shot accuracy 24.0", "dtd", 2)
    assert "flatpatch: zero-shot accuracy 24.0" in capsys.readouterr().out

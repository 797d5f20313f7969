"""The lines that a dry run names are those at which SAM enters the code that runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.files import ROOT
from flatpatch.upstreams import UPSTREAMS


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("words", "calls"),
    [
        (("method=inflora",), 1),
        (("method=inflora", "variant=inflorab5"), 1),
        (("method=inflora", "variant=infloraca"), 1),
        (("method=cllora",), 2),
        (("method=cllora", "sam_on=task"), 1),
        (("method=cllora", "sam_on=distillation"), 1),
        (("method=sdlora",), 2),
        (("method=nlora",), 1),
        (("method=olora",), 1),
    ],
    ids=str,
)
def test_dry_run_names_the_lines_of_the_patched_tree_at_which_sam_enters(
    words: tuple[str, ...],
    calls: int,
    upstream: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = str(UPSTREAMS[words[0].removeprefix("method=")].repository)
    upstream(repo)
    assert main(["run", *words, "sam=sam", "profile=upstream", "device=0", "--dry-run"]) == 0
    text = capsys.readouterr().out
    copy = patches.build(repo, into=tmp_path).path
    assert f"SAM enters in the patched tree, build/{copy.name}:\n" in text
    found = re.findall(r"^  (\S+):(\d+)  (flatpatch\.hooks\.\w+): (.*)$", text, flags=re.MULTILINE)
    assert len(found) == calls
    for path, number, call, what in found:
        line = (copy / path).read_text().splitlines()[int(number) - 1].strip()
        assert line.startswith(f"{call}(")
        assert ('"distillation"' in line) == ("distillation" in what)


def test_dry_run_names_the_line_of_the_reference_engine_at_which_sam_enters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "method=seqlora_vit", "--dry-run", "profile=quick"]) == 0
    said = capsys.readouterr().out
    assert "SAM is off; it would enter in flatpatch's own code:" in said
    [(path, number)] = re.findall(r"^  (flatpatch/\S+):(\d+)  self\.sam\.gradients$", said, flags=re.MULTILINE)
    assert "self.sam.gradients(" in (ROOT / path).read_text().splitlines()[int(number) - 1]

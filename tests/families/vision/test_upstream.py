"""A method's row that leaves something unsaid stops with a message: no method is ever taken for another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flatpatch.errors import FlatpatchError
from flatpatch.families.base import Machine
from flatpatch.families.vision.data import PILOT
from flatpatch.families.vision.planning import make_plan
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.runner.resolve import parse

SAID: dict[str, Any] = {
    "configs": {"new": {"cifar100": "exps/cifar.json"}},
    "command": ("main.py", "--config", "{config}"),
    "datasets": PILOT,
    "epochs": ("epochs",),
    "kept": "fc.*",
}


class New(VisionUpstream):
    """All of whose keys reach a run."""

    def why_unread(self, config: Mapping[str, Any], key: str, *, quick: bool) -> str:
        """See the base class."""
        return ""


def row(**said: Any) -> VisionUpstream:
    return New(name="cllora", title="New", repository="CL-LoRA", reference=False, **said)


@pytest.mark.parametrize("fact", SAID)
def test_a_row_of_a_repository_says_what_a_run_needs(fact: str) -> None:
    with pytest.raises(NotImplementedError, match=f"New: its row does not say {fact}$"):
        row(**{key: value for key, value in SAID.items() if key != fact})


def test_what_a_row_does_not_do_is_not_done_in_its_place(tmp_path: Path) -> None:
    new = row(**SAID)
    with pytest.raises(NotImplementedError, match="New: which keys do not reach a run is not said"):
        VisionUpstream.why_unread(new, {}, "rank", quick=True)
    with pytest.raises(NotImplementedError, match="New: which pretrained weights"):
        new.pretrained({})
    with pytest.raises(NotImplementedError, match="New: how its network grows"):
        new.grow(None, 0, 10)
    with pytest.raises(NotImplementedError, match="New: what its network holds"):
        new.complete(None, 0, 10, lambda task: {}, joined=False)
    (tmp_path / "README.md").write_text("Install torch.")
    with pytest.raises(FlatpatchError, match="names no versions of libraries; New's row must say where they are"):
        new.named_versions(tmp_path)
    (tmp_path / "README.md").write_text("- python == 3.9.4\n - `timm==0.6.12`\n")
    assert new.named_versions(tmp_path) == {"python": "3.9.4", "timm": "0.6.12"}


@pytest.mark.third_party
def test_a_row_alone_makes_the_command_and_refuses_images_of_which_it_says_nothing(
    upstream: Callable[[str], Path],
) -> None:
    """The patched repository is CL-LoRA's; all that is said of it comes from a row that is not."""
    upstream("CL-LoRA")
    request = parse(["method=cllora", "profile=quick", "engine=upstream", "device=cpu", "upstream.init_cls=10"])
    made = make_plan(row(**SAID, quick={"increment": 10}), request, Machine(0), dry_run=True)
    assert made.stages[0].command == ("main.py", "--config", "flatpatch-config.json")
    assert made.stages[0].contract["keep"]["names"] == "fc.*"
    assert made.tasks == ("0-9", "10-19")
    assert json.loads(made.files["flatpatch-config.json"])["general_pos"] != [0, 1, 2], "CL-LoRA's own quick settings"
    request = parse(["method=cllora", "profile=upstream", "device=cpu"])
    with pytest.raises(FlatpatchError, match="New: the row does not say what must be there of the data set 'cifar224'"):
        make_plan(row(**{**SAID, "datasets": {"vtab": PILOT["vtab"]}}), request, Machine(0), dry_run=True)

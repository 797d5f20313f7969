"""The shipped patches on the real upstream repositories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.patches import PROJECT, build, show, verify
from tests.patches_project import best_seconds, git

pytestmark = pytest.mark.third_party
SCRIPTS = {"N-LoRA": "src/run_N_lora.py", "O-LoRA": "src/run_uie_lora.py"}


@pytest.mark.parametrize("repo", PROJECT.repositories())
def test_an_upstream_verifies_within_a_second(repo: str, upstream: Callable[[str], Path]) -> None:
    upstream(repo)
    verified = verify(repo)
    assert best_seconds(lambda: verify(repo)) < 1
    assert verified.base_tree == git("rev-parse", f"{verified.pin}^{{tree}}", folder=verified.checkout)
    assert verified.patched_tree == PROJECT.lock()[repo]["patched_tree"]


@pytest.mark.parametrize("repo", SCRIPTS)
def test_the_copies_differ_in_the_run_script_alone_and_only_by_added_lines(
    repo: str, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream(repo)
    plain, patched = build(repo, patched=False, into=tmp_path), build(repo, into=tmp_path)
    assert patched.path.name == f"{repo}-{PROJECT.lock()[repo]['patched_tree'][:12]}"
    differing = [
        file.relative_to(plain.path).as_posix()
        for file in plain.path.rglob("*")
        if file.is_file()
        and file.name[0] != "."
        and file.read_bytes() != (patched.path / file.relative_to(plain.path)).read_bytes()
    ]
    assert differing == [SCRIPTS[repo]]
    before, after = ((copy.path / SCRIPTS[repo]).read_text().splitlines() for copy in (plain, patched))
    place = after.index("    import flatpatch.hooks")
    assert after[place + 1] == "    flatpatch.hooks.attach_trainer(trainer)"
    assert after[:place] + after[place + 2 :] == before
    compile("\n".join(after), SCRIPTS[repo], "exec")


@pytest.mark.parametrize("repo", SCRIPTS)
def test_the_trainer_is_built_right_above_the_insertion(repo: str, upstream: Callable[[str], Path]) -> None:
    upstream(repo)
    above, _ = show(repo).split("+    import flatpatch.hooks")
    assert above.endswith("\n     )\n")
    assert "compute_metrics" in above

"""The form of a patch file: one spelling, inserted lines alone, and none of upstream's text in the patches we ship."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatpatch.patches import PROJECT, verify_patches
from flatpatch.patches.patchfile import FileChange, Insertion, Patch, content_problems, parse, spelling_problems

SHIPPED = sorted((PROJECT.root / "patches").glob("*/*.patch"))
GOOD = f"""\
Why:     a test needs it.
Touches: a.py, b.py.
Remove when: the test goes.

diff --git a/a.py b/a.py
index {"1" * 40}..{"2" * 40} 100644
--- a/a.py
+++ b/a.py
@@ -0,0 +1,1 @@
+import x
@@ -7,0 +9,2 @@
+
+x.call()
diff --git a/b.py b/b.py
index {"3" * 40}..{"4" * 40} 100755
--- a/b.py
+++ b/b.py
@@ -3,0 +4,1 @@
+x.call()
"""


def problems_of(text: str) -> list[str]:
    patch, problems = parse("x.patch", text)
    return problems or content_problems(patch) + spelling_problems(patch, text)


def test_a_good_patch_has_no_problems_and_reads_back() -> None:
    assert problems_of(GOOD) == []
    patch, _ = parse("x.patch", GOOD)
    assert patch.text == GOOD
    assert patch.changes[0].insertions == (Insertion(0, ("import x",)), Insertion(7, ("", "x.call()")))
    assert (patch.changes[1].path, patch.changes[1].mode, patch.changes[1].after) == ("b.py", "100755", "4" * 40)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "+import x\n",
            "-import y\n+import x\n",
            "x.patch:10 deletes a line of upstream; after @@ each line starts with '+'.",
        ),
        ("+import x\n", "+import x\n import y\n", "x.patch:11 carries a line of upstream as context"),
        ("+import x\n", "+import x\n\\ No newline at end of file\n", "x.patch:11 is no inserted line"),
        ("@@ -0,0 +1,1 @@", "@@ -0,0 +1,1 @@ def main():", "x.patch:9 carries text after the second @@"),
        ("@@ -7,0 +9,2 @@", "@@ -7,3 +9,5 @@", "x.patch:11 takes in lines of upstream; patches only insert"),
        ("@@ -7,0 +9,2 @@", "@@ -7 +9,5 @@", "x.patch:11 takes in lines of upstream; patches only insert"),
        ("@@ -7,0 +9,2 @@", "@@ -7,0 +8,2 @@", "x.patch:11 expected '@@ -7,0 +9,2 @@', found '@@ -7,0 +8,2 @@'."),
        ("@@ -7,0 +9,2 @@", "@@ -7,0 +9,3 @@", "x.patch:11 expected '@@ -7,0 +9,2 @@', found '@@ -7,0 +9,3 @@'."),
        ("@@ -3,0 +4,1 @@", "@@ -3,0 +4 @@", "x.patch:18 expected '@@ -3,0 +4,1 @@', found '@@ -3,0 +4 @@'."),
        ("@@ -7,0 +9,2 @@", "@@ -0,0 +2,2 @@", "x.patch:5: the hunks of a.py are out of order."),
        ("@@ -3,0 +4,1 @@\n+x.call()\n", "", "x.patch:14 inserts nothing into b.py."),
        ("+x.call()\ndiff", "+x.call()\nnew file mode 100644\ndiff", "x.patch:14 is no inserted line"),
        ("--- a/a.py\n", "new file mode 100644\n", "x.patch:7 has no place in a patch: 'new file mode 100644'."),
        ("--- a/a.py\n", "", "x.patch:7 expected '--- a/a.py', found '+++ b/a.py'."),
        ("--- a/a.py\n", "--- /dev/null\n", "x.patch:7 has no place in a patch: '--- /dev/null'."),
        (
            f"index {'1' * 40}..{'2' * 40} 100644\n",
            "index 1111111..2222222 100644\n",
            "x.patch:6 has no place in a patch",
        ),
        (
            f"index {'1' * 40}..{'2' * 40} 100644\n",
            "",
            "x.patch:5 has no index line with the two full blob hashes of a.py.",
        ),
        (
            "Touches: a.py, b.py.",
            "Touches: a.py.",
            "x.patch: 'Touches:' does not name b.py, into which it inserts lines.",
        ),
        ("Why:     a test needs it.", "Why:", "x.patch has no 'Why:' in its header."),
        ("Remove when: the test goes.\n", "", "x.patch has no 'Remove when:' in its header."),
        (GOOD[GOOD.index("diff") :], "", "x.patch inserts nothing."),
    ],
)
def test_a_bad_patch_is_named_by_file_and_line(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    problems = problems_of(GOOD.replace(old, new, 1))
    assert any(problem.startswith(expected) for problem in problems), problems


def test_a_patch_without_a_last_newline_is_refused() -> None:
    assert "x.patch does not end in a newline." in problems_of(GOOD.removesuffix("\n"))


lines = st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), max_size=8)
insertions = st.dictionaries(st.integers(0, 99), st.lists(lines, min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["a.py", "b c.py", "d/e.py"]), insertions, min_size=1))
def test_any_patch_reads_back_as_it_was_written(files: dict[str, dict[int, list[str]]]) -> None:
    changes = tuple(
        FileChange(
            path, "100644", "1" * 40, "2" * 40, tuple(Insertion(at, tuple(text)) for at, text in sorted(found.items()))
        )
        for path, found in files.items()
    )
    text = Patch("x.patch", f"Why: x\nTouches: {', '.join(files)}\nRemove when: y\n\n", changes).text
    assert problems_of(text) == []
    assert parse("x.patch", text)[0].text == text


def test_there_are_patches_for_the_two_t5_repositories() -> None:
    assert {path.parent.name for path in SHIPPED} >= {"N-LoRA", "O-LoRA"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_patch_carries_no_text_of_upstream(path: Path) -> None:
    # Read anew, without the package's own parser.
    _, *files = re.split(r"^diff --git .*\n", path.read_text(), flags=re.MULTILINE)
    assert files
    for file in files:
        head, *hunks = re.split(r"^(?=@@)", file, flags=re.MULTILINE)
        assert re.fullmatch(r"index \w{40}\.\.\w{40} 100644\n--- a/\S+\n\+\+\+ b/\S+\n", head)
        assert hunks
        for hunk in hunks:
            first, *body = hunk.splitlines()
            assert re.fullmatch(r"@@ -\d+,0 \+\d+,\d+ @@", first)
            assert body
            assert all(line.startswith("+") for line in body)
            assert all("flatpatch.hooks" in line for line in body), "a patch only calls the hooks"


@pytest.mark.parametrize("repo", PROJECT.repositories())
def test_the_shipped_patches_pass_the_checks_that_need_no_checkout(repo: str) -> None:
    verify_patches(repo)


def test_there_is_a_series_for_each_submodule() -> None:
    recorded = re.findall(r"path = third_party/(\S+)", (PROJECT.root / ".gitmodules").read_text())
    assert sorted(recorded) == PROJECT.repositories() == sorted(PROJECT.lock())

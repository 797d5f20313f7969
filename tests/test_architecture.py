"""Which parts may know of which, and what no file of the repository may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flatpatch"
SUBJECTS = ("patches", "sam", "flatness")
# What every part may use.
GROUND = tuple(
    f"flatpatch.{name}"
    for name in ("contract", "errors", "files", "measuring", "metrics", "progress", "settings", "terminal", "timing")
)


def files_of(part: str) -> list[Path]:
    """Return the files of a module or sub-package; none while it does not exist."""
    return [path for path in [PACKAGE / f"{part}.py", *sorted((PACKAGE / part).rglob("*.py"))] if path.exists()]


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def breaches(part: str, allowed: tuple[str, ...]) -> list[str]:
    """Return the imports of a part that are neither allowed, nor its own, nor the standard library's."""
    allowed = (*allowed, f"flatpatch.{part}", *sys.stdlib_module_names)
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(part)
        for name in imports(path)
        if not any(name == known or name.startswith(known + ".") for known in allowed)
    ]


def test_imports_are_found_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "flatpatch" / "sam" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b, c\nfrom d import e\nfrom . import f\nfrom ..report import g\ndef h():\n    import i\n")
    assert sorted(imports(path)) == ["a.b", "c", "d.e", "flatpatch.report.g", "flatpatch.sam.f", "i"]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_subject_imports_nothing_of_flatpatch_but_the_ground(subject: str) -> None:
    foreign = [breach for breach in breaches(subject, GROUND) if " imports flatpatch" in breach]
    assert foreign == []


@pytest.mark.parametrize(
    ("part", "libraries"),
    [
        ("errors", ()),
        ("timing", ("torch",)),
        ("sam", ("torch",)),
        ("flatness", ("torch", "numpy", "scipy")),
        ("patches", ("git", "gitdb")),
        ("report", ("matplotlib", "numpy", "scipy", "rich", "jinja2", "PIL")),
        ("measurement", ("torch", "numpy", "flatpatch.flatness")),
        (
            "hooks",
            (
                "torch",
                "safetensors",
                "flatpatch.timing",
                "flatpatch.sam",
                "flatpatch.flatness",
                "flatpatch.measurement",
            ),
        ),
    ],
)
def test_part_imports_its_own_libraries_alone(part: str, libraries: tuple[str, ...]) -> None:
    assert breaches(part, (*libraries, *GROUND)) == []


@pytest.mark.parametrize(
    "part", ["errors", "timing", "settings", "methods", "patches", "report", "comparison", "measurement"]
)
def test_part_does_not_load_torch(part: str) -> None:
    """Loading it takes seconds, which a mistyped setting or a report should not cost."""
    assert files_of(part), f"there is no flatpatch.{part}"
    code = f"import sys, flatpatch.{part}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_git_is_called_in_one_place() -> None:
    """There a missing git is named, and the user's own configuration is kept out of what is computed."""
    callers = set()
    for path in PACKAGE.rglob("*.py"):
        lists = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.List))
        calls = any(isinstance(word, ast.Constant) and word.value == "git" for node in lists for word in node.elts[:1])
        if calls or any(name.partition(".")[0] == "git" for name in imports(path)):
            callers.add(path.relative_to(PACKAGE).as_posix())
    assert callers == {"patches/gitcalls.py"}


def tracked(*patterns: str) -> list[Path]:
    """Return the tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


FORBIDDEN = {
    "a folder of one machine": re.compile(r"(?<![\w.])/(home|root|Users|work)/"),
    "the address of a package index": re.compile(
        r"(pypi[.]org/simple|pythonhosted[.]org|index-url[= ]|find-links[= ])"
    ),
}


def test_no_file_names_a_machines_folder_or_a_package_index() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image or weights
        for number, line in enumerate(lines, start=1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}" for what, form in FORBIDDEN.items() if form.search(line)
            ]
    assert found == []


def test_patches_only_insert() -> None:
    """Of upstream's text they hold none: no context, no deleted line, no function name behind the @@."""
    for path in tracked("patches/*.patch"):
        in_hunk = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.startswith("diff --git "):
                in_hunk = False
            elif line.startswith("@@"):
                in_hunk = True
                assert re.fullmatch(r"@@ -\d+,0 \+\d+(,\d+)? @@", line), f"{path}:{number}"
            elif in_hunk:
                assert line.startswith("+"), f"{path}:{number}"


def test_the_linter_sees_every_file_of_the_package() -> None:
    """A folder excluded by name, as `runs` for results once was, hides every folder of that name."""
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    unseen = set(tracked("*.py")) - {Path(line) for line in listed.splitlines()}
    assert unseen == set()

"""Which parts may know of which, and what no file of the repository may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatpatch.upstreams import UPSTREAMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flatpatch"
# From the ground up. A part may use the layers below its own, and in its own layer what stands before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "timing",
        "terminal",
        "progress",
        "files",
        "checkpoints",
        "kinds",
        "measuring",
        "settings",
        "contract",
        "metrics",
        "statistics",
    ),
    ("sam", "flatness", "patches"),
    ("families",),
    ("upstreams",),
    ("measurement", "report", "comparison"),
    ("runner", "hooks"),
    ("studies",),
    ("__main__",),
)
# Parts of a layer that know nothing of each other.
BLIND = (
    {"sam", "flatness", "patches"},
    {"families.text", "families.vision", "families.clip"},
    {"measurement", "report"},
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


def part_of(name: str) -> str:
    """Return the part of the package that a module is of: its first name below ``flatpatch``."""
    return (name.split(".") + [""])[1]


def arrows() -> dict[str, set[str]]:
    """Return for each module of the package the modules of the package that it imports, type checking included."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for name in imports(path) if name.startswith("flatpatch.")}
        whole = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[module] = (whole & modules.keys()) - {module}
    return found


def test_each_part_has_its_layer() -> None:
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__"} == {part for layer in LAYERS for part in layer}


def test_imports_point_down() -> None:
    print("\n".join(f"{number}  {', '.join(layer)}" for number, layer in enumerate(LAYERS)))
    height = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    breaches = [
        f"{module} (layer {height[part_of(module)]}) imports {name} (layer {height[part_of(name)]})"
        for module, names in arrows().items()
        for name in names
        if module != "flatpatch" and name != "flatpatch" and height[part_of(name)] > height[part_of(module)]
    ]
    assert breaches == []


@pytest.mark.parametrize("blind", BLIND, ids=lambda blind: "-".join(sorted(blind)))
def test_parts_that_are_blind_to_each_other_do_not_import_each_other(blind: set[str]) -> None:
    def of(name: str) -> str:
        return next((part for part in blind if f"{name}.".startswith(f"flatpatch.{part}.")), "")

    breaches = [
        f"{module} imports {name}"
        for module, names in arrows().items()
        for name in names
        if of(module) and of(name) and of(module) != of(name)
    ]
    assert breaches == []


def test_no_import_circle() -> None:
    """Imports inside functions count, those for type checking alone do not: they are never carried out."""
    found: list[list[str]] = []
    graph = {module: sorted(names) for module, names in running_arrows().items()}

    def walk(module: str, path: list[str], done: set[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
            return
        if module not in done:
            for name in graph[module]:
                walk(name, [*path, module], done)
            done.add(module)

    done: set[str] = set()
    for module in graph:
        walk(module, [], done)
    assert found == []


def running_arrows() -> dict[str, set[str]]:
    """As ``arrows``, without imports for type checking, and without a package's own files importing the package."""
    drawn = arrows()
    for module in drawn:
        base = PACKAGE.parent / Path(*module.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        checked = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                block = ast.unparse(node.body)  # type: ignore[arg-type]
                checked |= {
                    name for name in drawn[module] if re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", block)
                }
        drawn[module] = {name for name in drawn[module] - checked if not module.startswith(f"{name}.")}
    return drawn


# A formula may be named for the code that defines it; settings say for which family they have a meaning.
NAMED_ALONE = ("families", "upstreams", "settings.py", "metrics.py")


def test_no_code_outside_families_and_upstreams_asks_for_a_method_or_a_family() -> None:
    """Sentences may mention them, in help and in what a number means; no name is compared, looked up or imported."""
    families = {path.parent.name for path in (PACKAGE / "families").glob("*/__init__.py")}
    names = families | set(UPSTREAMS) | {row.repository for row in UPSTREAMS.values() if row.repository}
    room = re.compile(rf"flatpatch\.families\.({'|'.join(families)})\b")
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in NAMED_ALONE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{place}:{node.lineno}: {node.value!r}")
            elif isinstance(node, ast.Name | ast.FunctionDef | ast.ClassDef | ast.arg | ast.Attribute):
                word = (
                    getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "arg", None) or node.attr
                )
                if set(re.split(r"_|(?<=[a-z])(?=[A-Z])", word.lower())) & set(UPSTREAMS):
                    found.append(f"{place}:{node.lineno}: {word}")
            elif isinstance(node, ast.ImportFrom) and place.parts[0] != "hooks" and room.match(node.module or ""):
                found.append(f"{place}:{node.lineno}: {node.module}")
    assert found == []


@pytest.mark.parametrize(
    ("part", "libraries"),
    [
        ("errors", ()),
        ("statistics", ("scipy",)),
        ("kinds", ()),
        ("timing", ("torch",)),
        ("sam", ("torch",)),
        ("flatness", ("torch", "numpy", "scipy")),
        ("patches", ("git", "gitdb")),
        ("report", ("matplotlib", "numpy", "scipy", "rich", "jinja2", "PIL")),
        ("measurement", ("torch", "numpy")),
        ("hooks", ()),
        ("contract", ("pydantic",)),
    ],
)
def test_part_imports_its_own_libraries_alone(part: str, libraries: tuple[str, ...]) -> None:
    assert breaches(part, (*libraries, "flatpatch")) == []


@pytest.mark.parametrize(
    "part",
    [
        *(
            "errors",
            "timing",
            "files",
            "kinds",
            "settings",
            "contract",
            "statistics",
            "upstreams",
            "patches",
            "report",
            "comparison",
        ),
        *("measurement", "hooks", "runner.resolve", "studies.schema"),
    ],
)
def test_part_does_not_load_torch(part: str) -> None:
    """Loading it takes seconds, which a mistyped setting or a report should not cost."""
    assert files_of(part.replace(".", "/")), f"there is no flatpatch.{part}"
    code = f"import sys, flatpatch.{part}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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

"""README.md and docs/: commands that can be typed, links that lead somewhere, code that runs, and a short README."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from flatpatch import hooks, patches
from flatpatch.__main__ import NEEDS, main
from flatpatch.families.base import Upstream
from flatpatch.files import write_atomically
from flatpatch.report.records import RECORD_FILE
from flatpatch.report.table import summary_table
from flatpatch.runner import measure_words, resolve, settings_page
from flatpatch.runner.sweep import expand, read_options
from flatpatch.studies import command as study_command
from flatpatch.upstreams import UPSTREAMS
from flatpatch.upstreams import __main__ as deviations
from tests.comparison_cases import inflora_record, olora_record
from tests.report_records import make_quick_record, make_record
from tests.vision_log_text import log_text, run_lines

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "DEVIATIONS.md", ROOT / "patches" / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = ("bash run_scripts/", "python -m flatpatch")
MADE_UP = {"Some-LoRA": "CL-LoRA", "somelora": "cllora"}  # the example of a method to add, and one that is there
GPU, NETWORK = "needs a GPU", "needs the network"


@dataclass(frozen=True)
class Command:
    """A command in a page: its words, and the comment behind it."""

    page: Path
    words: tuple[str, ...]
    comment: str

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def verb_words(self) -> list[str]:
        """What ``python -m flatpatch`` is given, a script's own words first; empty for another program."""
        if self.words[0] == "python":
            return list(self.words[3:]) if self.words[2] == "flatpatch" else []
        script = (ROOT / self.words[1]).read_text(encoding="utf-8")
        forwards = re.search(r'^exec python -m flatpatch(.*) "\$@"$', script, re.MULTILINE)
        return [*forwards[1].split(), *self.words[2:]] if forwards else []


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, each with its language."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[Command]:
    """Yield our own commands in a page's blocks; a loop's variables take each of their values."""
    for language, block in blocks(page):
        if language != "bash":
            continue
        loops: dict[str, list[str]] = {}
        for line in block.replace("\\\n", " ").splitlines():
            loops |= {name: values.split() for name, values in re.findall(r"for (\w+) in ([^;]+);", line)}
            if not line.strip().startswith(OURS):
                continue
            for values in itertools.product(*loops.values()):
                text = line
                for name, value in (*zip((f"${name}" for name in loops), values, strict=True), *MADE_UP.items()):
                    text = text.replace(name, value)
                words = shlex.split(text.partition(">")[0], comments=True)
                yield Command(page, tuple(words), line.partition("#")[2].strip())


ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page says must not depend on the machine that checks it."""
    monkeypatch.setattr(resolve, "cuda_devices", lambda: 0)


def check_plan(words: list[str], upstream: Callable[[str], Path]) -> bool:
    """Plan a run without starting it; returns whether it needs a GPU."""
    request = resolve.parse([word for word in words if word != "--dry-run"])
    row = UPSTREAMS[request.settings.method]
    if row.repository:
        upstream(row.repository)
    plan = resolve.make_plan(request, dry_run=True)
    assert resolve.render(plan)
    return plan.device == "cuda"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page.name}: {command.text}")
def test_a_command_of_the_pages_can_be_typed(
    command: Command, upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not command.verb_words:
        check_program(command.words)
        return
    verb, *words = command.verb_words
    if "--help" in words:
        assert main([verb, *words]) == 0
    elif verb == "run":
        starts = "--dry-run" not in words
        assert (check_plan(words, upstream) and starts) == (GPU in command.comment)
    elif verb == "sweep":
        for combination in expand(read_options([word for word in words if word != "--dry-run"])[1]):
            check_plan(combination, upstream)
    elif verb == "doctor":
        resolve.parse(words)
    elif verb == "study":
        if own := [word for word in words if word not in ("--dry-run", "file=mine.yaml")]:
            study_command.parse_words(own if any(word.startswith("name=") for word in own) else [*own, "name=exp4"])
    elif verb == "measure":
        measure_words.parse_words(words)
    elif verb in ("diff", "fork", "rerun"):
        assert main([verb, *words]) == 2  # its words are sound, and its runs are made up
        assert "there is no run" in capsys.readouterr().err
    elif verb == "patches":
        check_patches(words, upstream, capsys)
    elif any(word.startswith("study=") for word in words):
        chosen = [word for word in words if not word.startswith(("output=", "page="))]
        assert main([verb, *chosen, f"output={tmp_path}"]) == 2
        assert "has no verdicts of it" in capsys.readouterr().err
    else:
        assert verb in ("report", "compare")
        assert main([verb, *stand_ins(words, upstream, tmp_path)]) in (0, int("--require" in words))


def check_program(words: tuple[str, ...]) -> None:
    """See that a module can be run, or that a script hands its words to pytest."""
    if words[0] == "python":
        folder = ROOT / words[2].replace(".", "/")
        path = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
    else:
        assert "\nexec python -m pytest" in (ROOT / words[1]).read_text(encoding="utf-8")


def check_patches(words: list[str], upstream: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Run what only reads; of the others see that verb and settings are known."""
    for word in words[1:]:
        if word.startswith("repo="):
            upstream(word.removeprefix("repo="))
    if words[0] in ("show", "verify"):
        with patches.nothing_fetched():
            assert main(["patches", *words]) == 0
        return
    main(["patches", "--help"])
    known = capsys.readouterr().out
    assert f"\n  {words[0]} " in known
    assert all(f"{word.partition('=')[0]}=" in known for word in words[1:])


def stand_ins(words: list[str], upstream: Callable[[str], Path], folder: Path) -> list[str]:
    """Return a verb's words with runs that are there in place of those that it names."""
    found = []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("run", "with"):
            names = value.split(",")
            for seed, name in enumerate(names):
                (folder / name).mkdir(parents=True)
                write_atomically(folder / name / RECORD_FILE, json.dumps(stand_in(name, seed)))
            word = f"{key}={','.join(str(folder / name) for name in names)}"
        elif key == "page":
            word = f"page={folder / value}"
        elif key == "log":
            _, repo, rest = value.split("/", 2)
            checkout = upstream(repo)
            listed = subprocess.run(
                ["git", "-C", checkout, "ls-tree", "--name-only", "HEAD", rest], capture_output=True, check=True
            )
            assert listed.stdout, f"{repo} has no {rest}"
            path = checkout / rest
            if not path.exists():  # a partial checkout
                path = folder / "stand-in.log"
                path.write_text(log_text(run_lines()), encoding="utf-8")
            word = f"log={path}"
        found.append(word)
    return found


def stand_in(name: str, seed: int) -> dict[str, Any]:
    """Return the record of a finished run of the method that its name tells."""
    if "inflora" in name:
        return inflora_record(seed)
    return olora_record() if "olora" in name else make_record(seeds=[seed])


def test_every_verb_is_shown_somewhere() -> None:
    assert {command.verb_words[0] for command in ALL if command.verb_words} >= {*NEEDS, "doctor"}


def test_every_command_that_fetches_says_so() -> None:
    lines = [
        line for page in PAGES for language, block in blocks(page) if language == "bash" for line in block.splitlines()
    ]
    fetching = [line for line in lines if re.match(r"(git submodule update|huggingface-cli|curl|wget)", line)]
    assert fetching
    assert [line for line in fetching if NETWORK not in line] == []


def test_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_readme_shows_the_table_that_a_run_ends_with() -> None:
    shown = next(block for _, block in blocks(README) if "average accuracy" in block)
    printed = summary_table(make_quick_record())
    for line in re.sub(r" +-?[\d.]+$", "", shown, flags=re.MULTILINE).splitlines():
        if not re.match(r"\d ", line):  # a row of the matrix
            assert line in printed


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_readme_links_every_page_of_docs() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in text] == []


def test_files_that_pages_name_are_there() -> None:
    """By their paths in the project; the method that is made up as an example has none."""
    form = re.compile(
        r"(?<![\w./-])((?:flatpatch|tests|benchmarks|run_scripts|docs)/[\w./-]+\.(?:py|sh|md|json|png))\b"
    )
    named = {name for page in PAGES for name in form.findall(page.read_text(encoding="utf-8"))}
    assert [name for name in sorted(named) if not (ROOT / name).exists() and not any(x in name for x in MADE_UP)] == []


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "how-it-works.md"], ids=lambda page: page.name)
def test_tree_names_every_room_of_the_house(page: Path) -> None:
    tree = next(block for _, block in blocks(page) if "upstreams/" in block)
    rooms = {path.parent.name for path in (ROOT / "flatpatch").glob("*/__init__.py")}
    assert {room for room in rooms if f"{room}/" not in tree} == set()


@pytest.mark.parametrize(("page", "writer"), [("docs/settings.md", settings_page), ("DEVIATIONS.md", deviations)])
def test_written_pages_are_as_the_package_writes_them(page: str, writer: ModuleType) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == writer.render()


def test_hooks_that_pages_name_are_there() -> None:
    named = {
        name for page in PAGES for name in re.findall(r"flatpatch\.hooks\.(\w+)", page.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= {*hooks.__all__}


PYTHON = [(page, code) for page in PAGES for language, code in blocks(page) if language == "python"]


@pytest.mark.parametrize(
    ("page", "code"), PYTHON, ids=[f"{page.name}-{number}" for number, (page, _) in enumerate(PYTHON)]
)
def test_code_of_the_pages_runs(page: Path, code: str) -> None:
    inputs, targets = torch.randn(12, 3), torch.randint(0, 4, (12,))
    names: dict[str, Any] = {
        "__name__": __name__,
        "torch": torch,
        "model": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)),
        "criterion": nn.CrossEntropyLoss(),
        "inputs": inputs,
        "targets": targets,
        "batches": [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])],
    }
    exec(compile(code, str(page), "exec"), names)
    if "UPSTREAM" in names:
        assert isinstance(names["UPSTREAM"], Upstream)
    elif "optimizer" in names:
        assert names["loss"].isfinite()
    else:
        assert len(names["pairs"].values) == 5

"""The verb ``study``: its words, what it refuses before anything starts, and one whole study."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.files import ROOT
from flatpatch.runner.executors import local
from flatpatch.studies.schema import read_study
from tests.study_cases import HYPOTHESIS, write_study
from tests.text_benchmark import small_benchmark


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["study", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("flatpatch: ")
    return captured.err


def test_alone_it_lists_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    assert "exp5_2   Five continual-learning methods" in capsys.readouterr().out


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    assert "python -m flatpatch study name=exp4 seeds=0..4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds=0"], "study needs one of name= and file=. Studies: exp1, "),
        (["name=exp44"], "name=exp44: there is no such study. Did you mean 'exp4'?"),
        (["file=no.yaml"], "there is no study no.yaml"),
        (["name=exp4", "sedes=0"], "unknown setting 'sedes' of study. Did you mean 'seeds'?"),
        (["name=exp4", "seeds=a,b"], "seeds=a,b: 'a' is not a whole number."),
        (["name=exp4", "seeds=3..1"], "the range is empty"),
        (["name=exp4", "profile=quik"], "unknown profile 'quik'. Did you mean 'quick'?"),
        (["name=exp3_2", "profile=small"], "study exp3_2 has no form small. It has: quick, record."),
        (["name=exp4", "grid=half"], "unknown grid 'half'. Expected: short, full."),
        (["name=exp4", "parallel=x"], "parallel='x' is not a whole number"),
    ],
)
def test_a_mistake_in_the_words_is_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(words, capsys)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("metric: average_accuracy", "metric: acuracy", "unknown metric 'acuracy'"),
        ("direction: higher", "direction: up", "direction is 'up'. Expected: 'higher' or 'lower'."),
        ("{sam: sam}", "{sam: asam}", "its runs are not in the grid"),
        ("{settings: {sam: sam}}", "{settings: {smm: sam}}", "unknown setting 'smm'. Did you mean 'sam'?"),
        (
            "{metric: average_accuracy}",
            "{value: top_eigenvalue, scope: adapter, when: midway}",
            "do not measure at the time 'midway'",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told_before_anything_starts(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, hypotheses=HYPOTHESIS.replace(old, new))
    output = tmp_path / "runs"
    found = refused([f"file={path}", f"output={output}"], capsys)
    assert said in found and str(path) in found
    assert not output.exists()


def test_names_that_nothing_has_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = HYPOTHESIS.replace("average_accuracy", "acuracy").replace("{sam: off}", "{smm: off}")
    path = write_study(tmp_path, hypotheses=wrong, grid="{sam: [off, sam], rhoo: [1]}")
    found = refused([f"file={path}", f"output={tmp_path / 'runs'}"], capsys)
    assert "3 problems" in found
    assert all(name in found for name in ("'acuracy'", "'smm'", "'rhoo'"))


def test_a_dry_run_names_the_runs_and_starts_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs"
    assert main(["study", f"file={write_study(tmp_path)}", f"output={output}", "seeds=5", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 2 of them missing" in said and len(re.findall(r"seed5-\w{6}\n", said)) == 2
    assert not output.exists()


def test_the_example_of_the_page_on_studies_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    assert main(["study", f"file={path}", f"output={tmp_path / 'runs'}", "--dry-run"]) == 0
    assert "12 runs" in capsys.readouterr().out
    assert {each.id for each in read_study(path).hypotheses} == {"flatter", "accuracy"}


@pytest.mark.slow  # four trainings in processes of their own
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm_text_runs")
def test_a_whole_study_ends_with_verdicts_and_again_trains_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_benchmark(tmp_path / "data", train=32)
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("{profile: quick}", "{profile: quick, upstream.num_train_epochs: 1}"))
    path.write_text(
        path.read_text().replace("[before, after]}", "[before, after], samples: 4, batch: 2, effort: brief}")
    )
    words = ["study", f"file={path}", "seeds=0,1", f"data={data}", f"output={tmp_path / 'runs'}", "device=cpu"]
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "accuracy: SAM raises the average accuracy" in said and "in the miniature" in said
    folder = tmp_path / "runs" / "studies" / "small" / "quick"
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert [run["status"] for run in verdicts["runs"]] == ["finished"] * 4
    assert verdicts["hypotheses"][0]["tested"]["n"] == 2
    assert (folder / "report.html").is_file(), said
    monkeypatch.setattr(local, "execute", lambda *_, **__: pytest.fail("nothing is missing"))
    assert main([*words, "parallel=1"]) == 0
    assert json.loads((folder / "verdicts.json").read_text()) == verdicts

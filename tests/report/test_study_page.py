"""The page of a study: its verdicts as they are, both arms, figures that need no other file, no markup of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.report.study_page import write_studies_page, write_study_page
from tests.report.study_case import make_study
from tests.report_page import Reader

FEW = [
    {"kind": "forest"},
    {"kind": "landscape", "panels": ["sam", "task"], "when": ["after"]},
    {"kind": "statistics", "value": "top_eigenvalue", "when": ["after"]},
    {"kind": "plane"},
]
HOSTILE = """<img src=x onerror="alert(1)">'</title><script>alert(2)</script>&amp;"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reader]:
    page = write_study_page(make_study(tmp_path_factory.mktemp("study"), figures=FEW))
    return page, Reader(page.read_text(encoding="utf-8"))


def table(reader: Reader, start: str) -> list[list[str]]:
    return next(rows for caption, rows in reader.tables.items() if caption.startswith(start))


def test_page_lies_beside_the_verdicts_with_its_figures_in_two_forms(made) -> None:
    page, reader = made
    assert page.name == "report.html" and (page.parent / "verdicts.json").is_file()
    files = sorted(path.name for path in (page.parent / "figures").iterdir())
    assert files == [
        f"{name}.{form}"
        for name in ("01_effects_1", "02_landscape", "03_landscape_as_recorded", "04_values")
        for form in ("pdf", "png")
    ]
    assert reader.problems == []
    assert {attributes["src"].partition(";")[0] for tag, attributes in reader.tags if tag == "img"} <= {
        "data:image/svg+xml",
        "data:image/png",
    }
    assert not [tag for tag, _ in reader.tags if tag == "script"]


def test_question_setting_and_labels_are_said(made) -> None:
    text = " ".join(made[1].text)
    assert "Does SAM help here?" in text
    assert "4 finished of 5; seeds 0, 1" in text
    assert "QUICK AND REFERENCE RUN" in text
    assert "rank 8" in text and "Q5.2" in text
    assert "measure=all, measure_samples=8" in text


def test_study_that_measures_nothing_says_so(tmp_path: Path) -> None:
    idle = {"measure": "", "measure_scope": "adapter", "measure_at_loss": "0.0"}
    page = write_study_page(make_study(tmp_path, measure=idle, figures=[{"kind": "forest"}]))
    text = page.read_text(encoding="utf-8")
    assert "accuracy alone" in text and "measure_scope" not in text


def test_every_verdict_stands_in_the_table_with_its_numbers(made) -> None:
    rows = table(made[1], "Effects with Student's")
    assert rows[1] == [
        *("▲ SAM raises the average accuracy", "+1.1 points", "+0.852 to +1.35", "3", "0.0027 (Holm 0.014)"),
        *("supported in the miniature", "–"),
    ]
    assert rows[2][0] == "against twice" and rows[2][5].startswith("undecided")
    assert [row[5].removesuffix(" in the miniature") for row in rows[3:6]] == [
        "too small to matter",
        "contradicted",
        "supported",
    ]
    assert rows[4][0] == "▲ the model is sharper after training than before (depends on writing)"
    assert rows[5][0] == "▲ as recorded"  # below the same hypothesis, measured correctly
    assert rows[7][1:5] == ["+2 points", "none", "1", "–"]


def test_both_ways_of_measuring_answer_what_the_record_concluded(made) -> None:
    text = " ".join(" ".join(made[1].text).split())
    assert "does not survive measured correctly" in text
    assert "survives by the record's own way of measuring" in text
    assert "sharper after training does not survive when measured correctly, in the miniature." in text


def test_captions_say_what_is_equal_and_what_is_not_drawn_is_named(made) -> None:
    text = " ".join(" ".join(made[1].text).split())
    assert (
        "batch: 8 training examples, each of its own task; directions: random, seeds 0, 1, scaled in the same" in text
    )
    assert "levels: the same in every panel" in text
    assert "plane: no finished run has what it is made of" in text


def test_pairs_behind_a_verdict_can_be_looked_up(made) -> None:
    rows = table(made[1], "SAM raises the average accuracy, against sam=off")
    assert rows[1:] == [["seed 0", "71", "70", "+1"], ["seed 1", "72", "70", "+2"]]


def test_of_many_missing_numbers_three_are_named_and_the_rest_counted(tmp_path) -> None:
    path = make_study(tmp_path, figures=[{"kind": "forest"}])
    content = json.loads(path.read_text())
    for number, hypothesis in enumerate(content["hypotheses"][:2]):
        hypothesis["tested"]["missing"] = [f"run {k}: no number" for k in range(3 + 4 * number)]
    path.write_text(json.dumps(content), encoding="utf-8")
    text = " ".join(write_study_page(path).read_text(encoding="utf-8").split())
    assert "(run 0: no number; run 1: no number; run 2: no number)" in text
    assert "run 2: no number; 4 more in verdicts.json)" in text and "run 3" not in text


def test_the_same_verdicts_give_the_same_page(tmp_path) -> None:
    verdicts = make_study(tmp_path, figures=[{"kind": "forest"}])
    page = write_study_page(verdicts)
    assert write_studies_page([verdicts], tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_texts_of_a_study_are_no_markup(tmp_path) -> None:
    changes = {"question": HOSTILE, "title": HOSTILE, "left_out": [HOSTILE], "ours": [HOSTILE]}
    page = write_study_page(make_study(tmp_path, figures=[{"kind": "forest"}], **changes))
    reader = Reader(page.read_text(encoding="utf-8"))
    assert reader.problems == []
    assert not [attributes for _, attributes in reader.tags if "onerror" in attributes]


def test_report_makes_one_page_for_all_studies_and_prints_the_verdicts(tmp_path, capsys) -> None:
    for name, form in (("made-up", "small"), ("another", "quick")):
        make_study(tmp_path, name=name, form=form, figures=[{"kind": "forest"}])
    assert main(["report", "study=all", f"output={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("SAM raises the average accuracy: supported in the miniature") == 2
    reader = Reader((tmp_path / "studies" / "report.html").read_text(encoding="utf-8"))
    assert reader.problems == []
    rows = table(reader, "Each hypothesis by the correct way")
    assert [row[1] for row in rows[1:] if row[0] == "SAM raises the average accuracy"] == [
        "another, quick",
        "made-up, small",
    ]
    rows = table(reader, "What the record concluded, and")
    assert rows[1] == ["sharper after training", "another, quick", "does not survive in the miniature", "survives"]
    assert main(["report", "study=made-up", f"output={tmp_path}", "form=small"]) == 0
    assert (tmp_path / "studies" / "made-up" / "small" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study=exp4"], "has no verdicts of it. None has been run there. Run it first"),
        (["study=exp4", "run=runs"], "either run=FOLDER, e.g. report run=runs/NAME, or study=NAME"),
        (["run=runs", "output=runs"], "output= has a meaning beside study= alone"),
        (["study="], "study= is empty"),
        (["page=all.html"], "either run=FOLDER"),
    ],
)
def test_wrong_words_are_refused_in_one_message(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_would_replace_another_file_is_refused_before_anything_is_drawn(tmp_path, capsys) -> None:
    path = make_study(tmp_path)
    assert main(["report", "study=made-up", f"output={tmp_path}", f"page={path}"]) == 2
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert not (path.parent / "figures").exists()
    assert json.loads(path.read_text())["schema"] == 1

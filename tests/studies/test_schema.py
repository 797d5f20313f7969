"""A study's file: what is read from it, and what a mistake in it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch.errors import UserError
from flatpatch.studies.schema import find_study, library, named_file, read_study
from tests.study_cases import HYPOTHESIS, write_study

STUDIES = ("exp1", "exp1_2", "exp2", "exp3_1", "exp3_2", "exp3_3", "exp4", "exp5_1", "exp5_2", "exp_e5")


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_study(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_records_ten_experiments_and_the_family_of_sam_are_there() -> None:
    assert tuple(library()) == (*STUDIES, "sam_family")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_ours_loads_and_says_all_that_its_page_needs(name: str) -> None:
    study = read_study(find_study(name))
    assert study.name == name
    assert study.record and study.conclusions and study.figures
    quick = study.forms["quick"]
    assert quick.seeds == ("0", "1", "2") and quick.ours
    assert quick.minutes is not None and quick.minutes <= (25 if name == "exp5_2" else 12)
    judged = {key for conclusion in study.conclusions for key in conclusion.hypotheses}
    assert judged <= {each.id for each in study.hypotheses}


def test_what_yaml_takes_for_a_truth_value_or_a_number_stays_as_it_is_written(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, grid="{sam: [off, sam], rho: [0.10, 1e-2]}"))
    assert study.runs[0].grid == {"sam": ("off", "sam"), "rho": ("0.10", "1e-2")}
    assert study.hypotheses[0].against is not None
    assert study.hypotheses[0].against.settings == {"sam": "off"}


def test_a_list_may_be_written_as_a_sweep_writes_it(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, grid='{sam: "off,sam"}'))
    assert study.runs[0].grid == {"sam": ("off", "sam")}
    assert study.forms["quick"].seeds == ("0", "1", "2")


def test_every_mistake_is_told_with_the_file_and_its_place(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        hypotheses=HYPOTHESIS.replace("direction: higher", "direction: upwards").replace("smallest: 0.5", "smalest: 1"),
    )
    said = message(path)
    assert said.startswith("3 problems, nothing was started:")
    assert said.count(str(path)) == 3
    assert "hypotheses.0.direction is 'upwards'. Expected: 'higher' or 'lower'." in said
    assert "hypotheses.0 has an unknown key 'smalest'. Did you mean 'smallest'?" in said
    assert "hypotheses.0 has no 'smallest'." in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: small", "name: ../small", "name is '../small'"),
        ("name: small", "name: small\nname: other", "the key 'name' twice"),
        ("    seeds: 0..2", "    seeds: 3..1", "the range is empty"),
        ("    seeds: 0..2", "    seeds: 0-2", "forms.quick.seeds has '0-2', which is no whole number. Expected e.g."),
        ("    seeds: 0..2", "    seeds: 0..2\n    without: [accuracy]", "does not say why. Add why_without."),
        ("    seeds: 0..2", "    seeds: 0..2\n    runs: {mian: {}}", "runs 'mian', which the study does not have. Did"),
        ("  quick:", "  quik:", "'quik'"),
        ("hypotheses:\n", "hypotheses: []\nfigures:\n", "figures.0 has no 'kind'"),
        ("{metric: average_accuracy}", "{}", "none of 'metric', 'accuracy' and 'value'. Give one."),
        ("{metric: average_accuracy}", "{metric: forgetting, value: trace}", "has metric and value of"),
        (
            "    side: {settings: {sam: sam}}",
            "    side: {run: mian}",
            "names runs 'mian', which the study does not have",
        ),
        ("    against: {settings: {sam: off}}\n", "", "has neither 'against' nor 'slope', so there is nothing to test"),
        ("    unit: points", "    unit: points\n    slope: {scale: log2}", "needs one of 'over', a setting, and"),
        ("    smallest: 0.5", "    smallest: -1", "hypotheses.0.smallest is '-1'"),
        ("against: {settings: {sam: off}}", "against: {constant: nan}", "hypotheses.0.against.constant is 'nan'"),
        ("id: accuracy", "id: accuracy[1]", "hypotheses.0.id is 'accuracy[1]'"),
        ("{metric: average_accuracy}", "{metric: forgetting, reduce: spread}", "has one number of a run. Leave out"),
        ("name: small", "? [name]\n: small", "is not YAML"),
    ],
)
def test_a_mistake_is_one_message(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert said in message(path)


def test_a_conclusion_names_hypotheses_that_are_there(tmp_path: Path) -> None:
    path = write_study(tmp_path, conclusions="conclusions: [{text: it works, hypotheses: [acuracy]}]")
    assert "conclusions: 'acuracy' is no hypothesis. Did you mean 'accuracy'?" in message(path)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    assert "there is no study" in message(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "holds no keys" in message(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "is not YAML" in message(tmp_path / "bad.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    assert "nested too deeply" in message(tmp_path / "deep.yaml")
    assert "is not text in UTF-8" in message(tmp_path / "bytes.yaml")
    with pytest.raises(UserError, match="is a folder"):
        named_file(str(tmp_path))
    with pytest.raises(UserError, match="Did you mean 'exp4'"):
        find_study("exp_4")

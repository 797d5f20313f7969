"""Verdicts' files and the runs that they name: what is read, what is refused, and what landscapes share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flatpatch.errors import UserError
from flatpatch.report.study_data import (
    _PARTS,
    RECORDED,
    StudyRun,
    fairness,
    find_studies,
    planes,
    points_of,
    read_verdicts,
    verdicts_text,
    words,
)
from tests.report.study_case import arrays, make_study


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


def test_a_study_has_its_finished_runs_and_their_measuring_points(path: Path) -> None:
    study = read_verdicts(path)
    assert study.name == "made-up, quick form"
    assert [(run.settings["sam"], run.seed) for run in study.runs] == [("off", 0), ("off", 1), ("sam", 0), ("sam", 1)]
    point = points_of(study.runs[0])[1]
    assert (point.entry["task"], point.entry["when"]) == ("amazon", "after")
    assert point.landscape().origin_loss == 0.5
    # The bowls of both arms differ: at a corner 1.5 times as high as the sharpness, and 1.5 times 1.5 as recorded.
    assert point.landscape().losses[0, 0] - 0.5 == pytest.approx(1.5 * 2.0)
    assert point.landscape(RECORDED).losses[0, 0] - 0.5 == pytest.approx(1.5 * 1.5)
    assert point.slice().losses.shape == (17,)


def test_a_damaged_run_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = make_study(tmp_path)
    (tmp_path / "run-off-1" / "record.json").write_text("{", encoding="utf-8")
    study = read_verdicts(path)
    assert len(study.runs) == 3
    assert len(study.unreadable) == 1 and "run-off-1" in study.unreadable[0]


def test_a_damaged_landscape_is_left_out(tmp_path: Path) -> None:
    study = read_verdicts(make_study(tmp_path))
    (tmp_path / "run-off-0" / "flatness" / "1-amazon-after-adapter.npz").write_bytes(b"PK cut short")
    assert points_of(study.runs[0])[1].landscape() is None
    assert points_of(study.runs[0])[3].landscape() is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "it holds no object"),
        ('{"schema": 2}', "it has schema 2, this version reads 1"),
        ('{"schema": 1}', "it lacks study, title"),
        (json.dumps(dict.fromkeys(_PARTS[""], 5) | {"schema": 1}), "cannot be read"),
    ],
)
def test_damaged_verdicts_are_refused_in_one_message(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "verdicts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_verdicts(path)
    with pytest.raises(UserError, match="there are no verdicts"):
        read_verdicts(tmp_path / "none.json")


def test_a_part_that_lacks_a_key_is_named(path: Path, tmp_path: Path) -> None:
    content = json.loads(path.read_text())
    del content["hypotheses"][2]["tested"]
    other = tmp_path / "verdicts.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="hypotheses lacks tested"):
        read_verdicts(other)


def test_studies_are_found_by_name_and_form(tmp_path: Path) -> None:
    one, other = make_study(tmp_path), make_study(tmp_path, form="small")
    third = make_study(tmp_path, name="another")
    assert find_studies(tmp_path, "made-up") == [one, other]
    assert find_studies(tmp_path, "made-up", "small") == [other]
    assert find_studies(tmp_path, "all") == [third, one, other]
    with pytest.raises(UserError, match="no verdicts of it. Did you mean 'made-up'\\? There are: another, made-up"):
        find_studies(tmp_path, "mad-up")
    with pytest.raises(UserError, match="in form=record"):
        find_studies(tmp_path, "made-up", "record")
    with pytest.raises(UserError, match="None has been run there"):
        find_studies(tmp_path / "nowhere", "all")


def test_settings_of_sam_are_no_words_of_a_run_without_it(path: Path) -> None:
    run = read_verdicts(path).runs[0]
    for sam, expected in (("off", ("sam=off",)), ("sam", ("sam=sam", "rho=0.05", "scope=A"))):
        record = {**run.record, "settings": {"sam": {"value": sam, "source": "command line"}}}
        one = replace(run, record=record, settings={"sam": sam, "rho": "0.05", "scope": "A"})
        assert words(one, ("sam", "rho", "scope")) == expected


def points(run: StudyRun, other: StudyRun, index: int = 1, its: int = 1) -> dict[str, object]:
    return {"a": points_of(run)[index], "b": points_of(other)[its]}


def test_what_landscapes_share_is_said_and_what_they_do_not_too(path: Path) -> None:
    runs = read_verdicts(path).runs
    own = points(runs[0], runs[2])
    grids = {name: point.landscape() for name, point in own.items()}
    assert fairness(own, grids) == [
        "batch: the same 8 training examples for every panel",
        "directions: random, seeds 0, 1, scaled in the same way to the weights of each panel",
        "the loss at the centre is not equal: 0.5 (a) to 0.6 (b)",
    ]
    equal = points(runs[0], runs[1])
    assert fairness(equal, {name: point.landscape() for name, point in equal.items()})[2] == (
        "the loss at the centre is equal, 0.5"
    )
    tasks = points(runs[0], runs[0], 1, 3)
    assert fairness(tasks, {})[0] == "batch: 8 training examples, each of its own task"
    assert fairness({"a": own["a"]}, {}) == ["batch: 8 training examples"]


def test_other_directions_or_examples_are_said_loudly(path: Path) -> None:
    runs = read_verdicts(path).runs
    own = points(runs[0], runs[2])
    grids = {name: point.landscape() for name, point in own.items()}
    about = {**grids["b"].about, "axes": [{**axis, "seed": 7} for axis in grids["b"].about["axes"]]}
    said = fairness(own, {**grids, "b": replace(grids["b"], about=about)})
    assert said[1] == "DIRECTIONS DIFFER from panel to panel: filter"
    other = replace(own["b"], content={**own["b"].content, "indices": [4, 5, 6]})
    assert fairness({**own, "b": other}, {})[0] == "batch: 8 training examples, NOT THE SAME for every panel"


def test_a_plane_through_three_of_the_studys_runs_is_found(tmp_path: Path) -> None:
    study = read_verdicts(make_study(tmp_path))
    folder = tmp_path / "comparison-of-three"
    folder.mkdir()
    np.savez(folder / "plane-adapter.npz", **arrays(1.0, 0.5))
    content = {"runs": [{"folder": str(run.folder)} for run in study.runs[:3]], "task": "agnews", "samples": 8}
    content["scopes"] = {"adapter": {"arrays": "plane-adapter.npz"}, "merged": {"arrays": "gone.npz"}}
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    assert [(scope, file) for scope, file, _ in planes(study)] == [("adapter", folder / "plane-adapter.npz")]
    content["runs"][0]["folder"] = str(tmp_path / "another-run")
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    assert planes(study) == []


def test_verdicts_can_be_read_on_the_terminal(path: Path) -> None:
    said = " ".join(verdicts_text(read_verdicts(path)).split())
    assert "- SAM raises the average accuracy: supported in the miniature: +1.1 points (95 % interval" in said
    assert said.count("(as recorded)") == 1
    assert "=> sharper after training does not survive when measured correctly" in said

"""Which figures a study's file gets, and what stands side by side in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatpatch.report import study_pictures
from flatpatch.report.study_data import Study, read_verdicts
from flatpatch.report.study_pictures import Picture, effect_rows, pictures
from tests.report.study_case import arrays, make_study


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


def study_with(path: Path, folder: Path, *figures: dict[str, Any], **changes: Any) -> Study:
    """Return the study with other figures in its file; the runs stay where they are."""
    content = json.loads(path.read_text()) | {"figures": list(figures)} | changes
    other = path.parents[3] / "studies" / folder.name / "quick" / "verdicts.json"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text(json.dumps(content), encoding="utf-8")
    return read_verdicts(other)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note what the makers of figures are given, and draw nothing."""
    calls: list[dict[str, Any]] = []
    for name in ("landscapes", "slices", "density", "eigenvalues", "values", "matrices", "slope", "forest"):
        attribute = f"make_{name}_figure"

        def note(shown: Any, *_: Any, name: str = name, **options: Any) -> str:
            calls.append({"kind": name, "shown": shown, **options})
            return "a figure"

        monkeypatch.setattr(study_pictures, attribute, note)
    # Makers of spectra are bound when the module is loaded.
    for kind, name, words in (("density", "density", "Density"), ("spectrum", "eigenvalues", "Largest")):
        make = study_pictures._spectra(name, words, getattr(study_pictures, f"make_{name}_figure"))
        monkeypatch.setitem(study_pictures._MAKERS, kind, make)
    return calls


def test_landscapes_of_one_task_stand_side_by_side_and_each_arm_alone(path, tmp_path, drawn) -> None:
    study = study_with(path, tmp_path, {"kind": "landscape", "panels": ["sam"], "when": ["after"]})
    made, missing = pictures(study)
    shown = [call for call in drawn if call["kind"] == "landscapes"]
    assert [list(call["shown"]) for call in shown] == [["sam=off", "sam=sam"]] * 4
    assert [call["title"].endswith("(as recorded)") for call in shown] == [False, False, True, True]
    assert "task amazon, after, seed 0" in shown[0]["title"]
    assert "the loss at the centre is not equal: 0.5 (sam=off) to 0.6 (sam=sam)" in shown[0]["note"]
    # Both tasks' landscapes share their levels, those as recorded theirs.
    assert [len(call["level_with"]) for call in shown] == [4] * 4
    assert "levels: the same in all 2 figures of LoRA factors A and B" in made[1].caption
    assert missing == []


def test_where_tasks_are_panels_they_stand_in_one_figure(path, tmp_path, drawn) -> None:
    entry = {"kind": "landscape", "panels": ["task", "when"], "scopes": ["adapter"]}
    pictures(study_with(path, tmp_path, entry))
    shown = [call for call in drawn if call["kind"] == "landscapes"]
    # Two tasks, two times and two settings are more than one figure takes: those of one setting stay together.
    assert [list(call["shown"]) for call in shown[:2]] == [
        ["amazon, before", "amazon, after", "agnews, before", "agnews, after"]
    ] * 2
    assert ["sam=off" in shown[0]["title"], "sam=sam" in shown[1]["title"]] == [True, True]
    assert "each of its own task" in shown[0]["note"]


def test_lines_keep_their_colour_before_and_after(path, tmp_path, drawn) -> None:
    pictures(study_with(path, tmp_path, {"kind": "slice", "panels": ["sam"]}))
    first = next(call for call in drawn if call["kind"] == "slices")
    assert first["places"] == {
        "sam=off, before": (0, "before"),
        "sam=off, after": (0, "after"),
        "sam=sam, before": (1, "before"),
        "sam=sam, after": (1, "after"),
    }


def test_values_have_a_panel_for_each_panel_setting_and_a_row_for_each_other(path, tmp_path, drawn) -> None:
    entry = {"kind": "statistics", "value": "top_eigenvalue", "panels": ["task"], "when": ["after"]}
    pictures(study_with(path, tmp_path, entry))
    (call,) = (call for call in drawn if call["kind"] == "values")
    correct = [strip for strip in call["shown"] if not strip.recorded]
    assert [strip.title.split(", ")[1] for strip in correct] == ["amazon", "agnews"]
    # 30 times a sharpness of 2, and of 2.2 with seed 1; 0.4 of it with SAM.
    assert correct[0].values["sam=off"] == [(0, pytest.approx(60.0)), (1, pytest.approx(66.0))]
    assert correct[0].values["sam=sam"] == [(0, pytest.approx(24.0)), (1, pytest.approx(26.4))]
    assert [strip.title.startswith("as recorded: ") for strip in call["shown"]] == [False, False, True, True]


def test_a_metric_may_be_the_value(path, tmp_path, drawn) -> None:
    pictures(study_with(path, tmp_path, {"kind": "statistics", "value": "average_accuracy", "panels": ["sam"]}))
    (call,) = (call for call in drawn if call["kind"] == "values")
    (strip,) = call["shown"]
    # After the last task 70 and 88, with seed 1 a point more on the first, and with SAM three.
    assert strip.values == {"sam=off": [(0, 79.0), (1, 79.5)], "sam=sam": [(0, 80.5), (1, 81.0)]}
    assert strip.title == "average accuracy (%)"


def test_matrices_are_means_over_seeds(path, tmp_path, drawn) -> None:
    pictures(study_with(path, tmp_path, {"kind": "accuracy_matrix", "panels": ["sam"]}))
    (call,) = (call for call in drawn if call["kind"] == "matrices")
    assert list(call["shown"]) == ["sam=off\nn = 2", "sam=sam\nn = 2"]
    assert call["shown"]["sam=off\nn = 2"][1].tolist() == [70.5, 88.0]


def test_matrices_of_one_method_stay_in_one_figure() -> None:
    names = [f"method={method}, rho={rho}" for method in "abcd" for rho in range(3)]
    assert study_pictures._kept_together(names, 6) == [names[:6], names[6:]]
    assert study_pictures._kept_together(names[:5], 4) == [names[:3], names[3:5]]
    assert study_pictures._kept_together([], 4) == []


def test_panels_are_named_by_what_tells_them_apart() -> None:
    names = ["method=a, engine=x, sam=off, rank=-, tasks=", "method=a, engine=x, sam=sam, rank=-, tasks="]
    assert study_pictures._apart(names) == (
        {names[0]: "sam=off", names[1]: "sam=sam"},
        "method=a, engine=x",
    )
    assert study_pictures._apart(names[:1]) == ({names[0]: names[0]}, "")
    assert study_pictures._apart(["sam=off", "sam=off, rho=1"])[0] == {"sam=off": "sam=off", "sam=off, rho=1": "rho=1"}


def test_effects_come_first_whatever_the_file_says_and_have_every_arm_and_control(path, tmp_path, drawn) -> None:
    made, _ = pictures(study_with(path, tmp_path, {"kind": "slope"}, {"kind": "forest", "title": "All effects"}))
    assert [picture.name for picture in made] == ["01_effects_1", "02_slope"]
    assert drawn[0]["title"] == "All effects"
    assert [row.kind for row in effect_rows(read_verdicts(path))].count("as recorded") == 1
    assert [row.label for row in drawn[0]["shown"]][:2] == ["SAM raises the average accuracy", "against twice"]
    assert drawn[0]["notes"][-1] == "effects in the miniature"


def test_what_cannot_be_drawn_is_said(path, tmp_path, drawn) -> None:
    entries = ({"kind": "plane", "title": "Three seeds"}, {"kind": "density", "scopes": ["model"]})
    made, missing = pictures(study_with(path, tmp_path, *entries))
    assert len(made) == 1
    assert missing == [
        "Three seeds: no finished run has what it is made of",
        "density: no finished run has what it is made of",
    ]


def test_a_measured_plane_is_drawn_with_its_three_models(tmp_path) -> None:
    path = make_study(tmp_path, figures=[{"kind": "plane"}])
    folder = tmp_path / "comparison-of-three"
    folder.mkdir()
    made = arrays(1.0, 0.5)
    about = json.loads(str(made["about"])) | {"marks": ["one", "two", "three"]}
    about["axes"] = [{"label": f"direction {k}", "normalisation": "l2"} for k in range(2)]
    made |= {"about": np.array(json.dumps(about)), "marks": np.array([[0, 0], [0.5, 0], [0, 0.5]])}
    np.savez(folder / "plane-adapter.npz", **made | {"mark_losses": np.array([0.5, 0.7, 0.6])})
    runs = [{"folder": str(run.folder)} for run in read_verdicts(path).runs[:3]]
    content = {"runs": runs, "task": "agnews", "samples": 8, "scopes": {"adapter": {"arrays": "plane-adapter.npz"}}}
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    picture = pictures(read_verdicts(path))[0][1]
    assert picture.caption == (
        "Plane through three models: LoRA factors A and B; models after task agnews, 8 training examples of it, the "
        "same for all."
    )
    assert {"one: 0.5", "two: 0.7", "three: 0.6"} <= {text.get_text() for text in picture.figure.axes[0].texts}


def test_a_dollar_sign_in_a_name_begins_no_formula(path, tmp_path) -> None:
    content = json.loads(path.read_text())
    first = content["hypotheses"][0] | {"statement": "costs $a$ and $b$", "controls": {}}
    study = study_with(path, tmp_path, hypotheses=[first])
    made, _ = pictures(study)
    assert isinstance(made[0], Picture)
    labels = [label.get_text() for label in made[0].figure.axes[0].get_yticklabels()]
    assert labels == ["costs \\$a\\$ and \\$b\\$\u00a0▶"]

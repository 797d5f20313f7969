"""Two groups of runs beside each other: what is refused, what is said, and the verb's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatpatch.__main__ import main
from flatpatch.comparison.two_groups import compare_groups
from flatpatch.errors import UserError
from tests.comparison_cases import imagenet_r_record, inflora_record, olora_record, with_setting
from tests.report_records import make_quick_record

GAINS = (1.0, 2.0, 3.0)


def side(*records: dict[str, Any], word: str) -> dict[str, dict[str, Any]]:
    return {f"{word}-{k}": record for k, record in enumerate(records)}


@pytest.fixture
def off() -> dict[str, dict[str, Any]]:
    return side(*(olora_record(-5.0, seed=seed) for seed in range(3)), word="off")


@pytest.fixture
def on() -> dict[str, dict[str, Any]]:
    return side(
        *(with_setting(olora_record(gain - 5.0, seed=seed), sam="sam") for seed, gain in enumerate(GAINS)), word="on"
    )


def test_groups_are_paired_by_seed_and_named_by_what_they_differ_in(on, off):
    found = compare_groups(on, dict(reversed(off.items())))
    assert found.differ_in == ("sam",)
    assert (found.contrast.here.title, found.contrast.there.title) == ("sam=sam", "sam=off")
    average, forgetting = found.contrast.effects
    assert average.difference.effect == pytest.approx(2.0)
    # Every accuracy is higher by as much, so that nothing else is forgotten.
    assert forgetting.difference.effect == pytest.approx(0.0, abs=1e-9)


def test_an_unknown_metric_is_refused(on, off):
    with pytest.raises(UserError, match="unknown metric 'forgeting'. Did you mean 'forgetting'?"):
        compare_groups(on, off, metrics=["forgeting"])


def test_any_metric_may_be_asked_for(on, off):
    found = compare_groups(on, off, metrics=["learning_accuracy"], margin=5.0)
    assert [effect.metric.name for effect in found.contrast.effects] == ["learning_accuracy"]
    assert found.contrast.effects[0].difference.verdict == "too small to matter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "interrupted"}, "run= on-1 is interrupted, not finished"),
        ({"profile": "quick"}, "run= the runs differ in more than their seed: profile"),
        ({"seeds": [0]}, "run= on-0 and on-1 have the same seed, 0"),
    ],
)
def test_a_side_that_is_no_set_of_seeds_is_refused(on, off, change, message):
    on["on-1"] |= change
    with pytest.raises(UserError, match=message):
        compare_groups(on, off)


def test_groups_without_a_common_meaning_are_refused(on, off):
    other_tasks = side(inflora_record(0), word="images")
    with pytest.raises(UserError, match="their tasks are others: dbpedia,amazon,yahoo,agnews here, 0-9,10-19"):
        compare_groups(on, other_tasks)
    quick = side(make_quick_record(seeds=[0]), word="quick")
    with pytest.raises(UserError, match="profile quick here, upstream there"):
        compare_groups(quick, off)
    with pytest.raises(UserError, match="off-0 is on both sides"):
        compare_groups(off, off)
    images = [side(imagenet_r_record(0, split=split), word=split) for split in ("logged", "own")]
    with pytest.raises(UserError, match="had other images"):
        compare_groups(*images)


def test_groups_without_a_difference_and_copied_runs_are_told(off):
    found = compare_groups(side(olora_record(-4.0, seed=1), word="again"), off)
    assert any("the same settings" in note for note in found.notes)
    copied = compare_groups(side(with_setting(olora_record(-5.0), sam="sam"), word="copy"), off)
    assert any("copy-0 and off-0 have the same 4 x 4 accuracy matrix" in note for note in copied.notes)


def test_a_run_on_both_sides_or_nowhere_is_refused(off, tmp_path, capsys):
    folders = write(tmp_path, off)
    assert main(["compare", f"run={folders}", f"with={folders.partition(',')[0]}"]) == 2
    assert "Name each run once, on one side" in capsys.readouterr().err
    assert main(["compare", f"run={folders}", f"with={tmp_path / 'nowhere'}"]) == 2
    assert f"with={tmp_path / 'nowhere'}: there is no run" in capsys.readouterr().err


def write(folder: Path, records: dict[str, dict[str, Any]]) -> str:
    for name, record in records.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return ",".join(str(folder / name) for name in records)


def test_the_verb_prints_the_verdicts(on, off, tmp_path, capsys):
    words = [f"run={write(tmp_path, on)}", f"with={write(tmp_path, off)}"]
    assert main(["compare", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "differ in sam" in said
    assert "sam=sam minus sam=off average accuracy is higher: undecided: +2 points (95 % interval -0.4841 to" in said
    assert main(["compare", *words, "margin=5", "metric=average_accuracy"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "What lies within 5 points is too small to matter" in said
    assert "too small to matter: +2 points" in said and "forgetting" not in said


def test_runs_of_one_name_in_two_folders_are_told_apart(off, tmp_path, capsys):
    here = write(tmp_path / "here", {"run": with_setting(olora_record(1.0, seed=0), sam="sam")})
    assert main(["compare", f"run={here}", f"with={write(tmp_path / 'there', {'run': off['off-0']})}"]) == 0
    assert str(tmp_path / "there" / "run") in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["with=B"], "with= needs run= beside it"),
        (["run=A", "with=B", "log=C"], "log= has no meaning beside with="),
        (["run=A", "with=B", "baseline=paper_olora"], "baseline= has no meaning beside with="),
        (["run=A", "with=B", "--require", "reproduced"], "--require has no meaning beside with="),
        (["run=A", "with=B"], "run=A: there is no run"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("flatpatch:") == 1

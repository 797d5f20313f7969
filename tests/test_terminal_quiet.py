"""With --quiet a verb prints its result alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch import progress, terminal
from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.progress import Progress
from flatpatch.runner import pages, report
from flatpatch.runner.figures import tell_figures
from tests.report_page import make_four


def test_what_is_said_is_kept_back_inside_the_block_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), terminal.quietly(True):
        terminal.say("inside")
        raise UserError("an error")
    terminal.say("after it")
    assert capsys.readouterr().out == "after it\n"


@pytest.mark.parametrize("word", terminal.QUIET_WORDS)
def test_word_for_quiet_is_taken_out_wherever_it_stands(word: str) -> None:
    assert terminal.without_quiet(["run", word, "rho=1"]) == (["run", "rho=1"], True)
    assert terminal.without_quiet(["run", "rho=1"]) == (["run", "rho=1"], False)


def test_work_that_is_told_of_stays_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for quiet in (True, False):
        with terminal.quietly(quiet), Progress("page", "figure") as shown:
            shown.update("drawing", 1, 2)
        assert bool(capsys.readouterr().err) != quiet


def test_quiet_report_prints_the_runs_and_no_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "leave_figures", lambda folder, record: [folder / "figures" / "loss.png"])
    monkeypatch.setattr(pages, "make_page", lambda *_, **__: "the page")
    folders = make_four(tmp_path)
    assert main(["report", f"run={tmp_path}", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "page" not in err
    assert str(tmp_path) not in out and "figures" not in out
    assert all(folder.name in out for folder in folders)
    assert (tmp_path / "report.html").read_text() == "the page"


def test_an_error_is_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run=runs/nothing-of-this-name", "--quiet"]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert main(["run", "rho=big", "-q"]) == 2
    assert "rho='big' is not a number" in capsys.readouterr().err


def test_quiet_doctor_and_patches_take_the_word(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["doctor", "--help"], ["patches", "--help"], ["compare", "--help"], ["measure", "--help"]):
        assert main([*words, "--quiet"]) == 0
    assert "--quiet" not in capsys.readouterr().err


def test_figures_are_told_as_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_figures([tmp_path / "a" / f"{k}.png" for k in range(12)] + [tmp_path / "b" / "x.pdf"])
    assert capsys.readouterr().out == f"figures  {tmp_path / 'a'}/ (12 files)\nfigures  {tmp_path / 'b'}/ (1 file)\n"

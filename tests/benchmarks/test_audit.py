"""The audit itself: a right implementation passes every check, and each fault fails those that it should, alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.audit import __main__ as command
from benchmarks.audit import page, ranks, variants
from benchmarks.audit.checks import CHECKS, Finding, Maker, run_check
from benchmarks.audit.implementations import ROWS
from benchmarks.audit.rows import MissingError, NotOfferedError, Source
from flatpatch.errors import UserError
from tests.benchmarks import audit_made_up
from tests.benchmarks.audit_made_up import FAULTS

ROOT = Path(__file__).parents[2]


def outcomes(row):
    module = row.source.load(Path("nowhere"))
    return {check.name: run_check(check, Maker(row, module)) for check in CHECKS}


def not_passed(row):
    return {name for name, finding in outcomes(row).items() if finding.verdict != "pass"}


def test_a_right_implementation_passes_every_check():
    assert not_passed(audit_made_up.row()) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_an_implementation_with_a_fault_fails_its_checks_and_no_other(fault):
    assert not_passed(audit_made_up.row(fault)) == FAULTS[fault]


def test_every_check_is_failed_by_some_fault():
    assert {name for names in FAULTS.values() for name in names} == {check.name for check in CHECKS}


def test_ours_passes_every_check():
    assert not_passed(next(row for row in ROWS if row.name == "flatpatch")) == set()


def test_a_documented_choice_is_by_design_and_an_error_is_not():
    chosen = replace(audit_made_up.row("adds 1e-12 to the norm"), by_design={"tiny": "an argument of theirs"})
    found = outcomes(chosen)["tiny"]
    assert (found.verdict, found.number) == ("by design", "0.5")
    assert found.text.endswith("an argument of theirs")
    raising = replace(audit_made_up.row("expects what has a second gradient"), by_design={"second pass": "no reason"})
    assert (outcomes(raising)["second pass"].verdict, outcomes(raising)["second pass"].number) == ("fail", "KeyError")


def test_what_an_implementation_does_not_offer_is_said():
    def make(_, order):
        raise NotOfferedError("no ASAM")

    found = outcomes(replace(audit_made_up.row(), make=make))["ASAM"]
    assert found == Finding("not offered", "", "no ASAM")


@pytest.mark.slow
def test_two_ranks_tell_apart_the_ways_to_perturb_and_ranks_that_part():
    rows = [audit_made_up.row(fault) for fault in ("", "restores by subtraction", "doubles the radius")]
    found = ranks.audit(rows, Path("nowhere"))
    assert found["right"] == Finding("pass", "per rank")
    parted = found["restores by subtraction"]
    assert parted.verdict == "fail"
    assert parted.number.startswith("per rank; ")
    assert found["doubles the radius"].verdict == "fail"
    assert "away from either way" in found["doubles the radius"].text


def test_two_ranks_perturbed_by_the_mean_are_told_from_it():
    problems = [ranks.Quadratic(seed=rank) for rank in range(2)]
    start = problems[0].flat().detach()
    mean = torch.stack([problem.gradient(start) for problem in problems]).mean(0)
    moved = start + 0.1 * mean / mean.norm()
    ended = start - 0.1 * torch.stack([problem.gradient(moved) for problem in problems]).mean(0)
    assert ranks._finding([(ended, ended), (ended, ended)]) == Finding("pass", "by the mean")


@pytest.mark.parametrize("method", ["GSAM", "C-Flat", "F-SAM", "LookSAM", "WSAM"])
def test_twins_of_relatives_descend_and_differ_from_sam(method):
    """A twin that fell back to SAM, or to the plain gradient, would find nothing."""
    twin = next(variant.twin for variant in variants.VARIANTS if variant.method == method)
    problem = ranks.Quadratic()
    sam = plain = weights = problem.flat().detach()
    for direction, _ in zip(twin(problem.gradient), range(variants.STEPS), strict=False):
        weights = weights - variants.RATE * direction(weights)
        slope = problem.gradient(sam)
        sam = sam - variants.RATE * problem.gradient(sam + variants.RHO * variants.unit(slope))
        plain = plain - variants.RATE * problem.gradient(plain)
    assert (weights - problem.minimum).norm() < (problem.flat() - problem.minimum).norm()
    assert min((weights - sam).norm(), (weights - plain).norm()) > 1e-4


def test_a_variant_that_is_sam_alone_fails_as_gsam():
    gsam = variants.VARIANTS[0]
    made_up = replace(gsam, make=audit_made_up.make, cause="it is SAM")
    found = variants.audit(made_up, torch)
    assert found.verdict == "fail"
    assert found.text == "of the way of six steps away; it is SAM"


def test_checkouts_with_modules_of_one_name_are_kept_apart(tmp_path):
    for owner in ("one", "other"):
        (tmp_path / f"{owner}-sam").mkdir()
        (tmp_path / f"{owner}-sam" / "sam.py").write_text(f"owner = {owner!r}\n")
    loaded = [Source("sam", repository=f"{owner}/sam").load(tmp_path) for owner in ("one", "other")]
    assert [module.owner for module in loaded] == ["one", "other"]


@pytest.mark.parametrize(
    ("source", "way"),
    [
        (Source("sam", repository="some/sam", pin="abc"), "git clone -q https://github.com/some/sam"),
        (Source("somesam", package="some-sam", pin="1.0"), "pip install --target"),
    ],
)
def test_a_missing_implementation_says_how_to_get_it(source, way, tmp_path):
    with pytest.raises(MissingError, match=way):
        source.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkouts", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--checkouts", "{here}", "--only", "temperan"], "Did you mean 'temperon'?"),
        (["--checkouts", "{here}", "--only", "flatpatch", "--page", "docs/audit.md"], "leave out --only"),
        (["--checkouts", "{here}", "--page", "docs/audit.md"], "was not written"),
        (["--checkouts", "{here}", "--only", "temperon"], "nothing to audit"),
    ],
)
def test_a_mistake_is_named_and_the_page_left_alone(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variants, "VARIANTS", ())
    monkeypatch.setattr(command, "ROWS", [row for row in ROWS if row.name in ("flatpatch", "temperon")])
    before = (ROOT / "docs" / "audit.md").read_text()
    assert command.main([word.replace("{here}", str(tmp_path)) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert (ROOT / "docs" / "audit.md").read_text() == before


def test_tables_show_verdicts_numbers_and_who_shares_a_meaning():
    found = {
        "tiny": {"a": Finding("pass"), "b": Finding("fail", "0.5", "of rho"), "c": Finding("fail", "0.5", "of rho")}
    }
    assert page.table(found, "abc").splitlines()[-1] == "| tiny | pass | **fail** 0.5 | **fail** 0.5 |"
    assert page.meanings(found, "abc") == "- tiny, fail: 0.5 of rho (b, c)"
    assert page.matrix(found, "abc").splitlines()[-1].split() == ["tiny", "pass", "fail", "fail"]


def test_the_page_is_written_between_its_marks_alone(tmp_path):
    target = tmp_path / "page.md"
    target.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(target, "new")
    assert target.read_text() == f"before\n{page.BEGIN}\n\nnew\n\n{page.END}\nafter\n"
    target.write_text("no marks")
    with pytest.raises(UserError, match="to write the tables between"):
        page.write(target, "new")


def test_the_page_has_every_implementation_and_every_check():
    text = (ROOT / "docs" / "audit.md").read_text()
    assert [row.name for row in ROWS if row.name not in text] == []
    assert [check.name for check in CHECKS if f"| {check.name} | {check.demand} |" not in text] == []

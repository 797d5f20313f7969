"""The verb compare: what it prints, its exit code, and mistakes in its words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.comparison.command import read_log, render
from flatpatch.comparison.compare import compare_logged
from flatpatch.report.baselines import load_baseline
from tests.comparison_cases import imagenet_r_record, inflora_record
from tests.report_records import make_quick_record
from tests.vision_log_text import log_text, run_lines

SHIPPED = "logs/cifar100/10_10_sip/InfLoRA/adam/10/0.95_1.0-0.0005/0.log"


def shipped_like_log(lower: dict[int, float] | None = None, copied: dict[int, int] | None = None) -> str:
    """Return a log in InfLoRA's form with the accuracies of its shipped CIFAR-100 runs, some lowered or another's."""
    baseline = load_baseline("inflora_cifar100")
    setting = baseline["setting"]
    runs = []
    for run in baseline["per_seed"]:
        less = (lower or {}).get(run["seed"], 0.0)
        shown = baseline["per_seed"][(copied or {}).get(run["seed"], run["seed"])]
        rows = [[round(x - less, 2) for x in row if x is not None] for row in shown["accuracy_matrix"]]
        lines = run_lines(
            rows,
            sizes=[1000] * 10,
            seed=run["seed"],
            order=range(100),
            rank=setting["rank"],
            epochs=setting["epochs"],
        )
        runs.append(lines)
    return log_text(*runs)


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., str]:
    def write(*records: dict[str, object]) -> str:
        folders = []
        for i, record in enumerate(records):
            folder = tmp_path / f"run-{i}"
            folder.mkdir(exist_ok=True)
            (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
            folders.append(str(folder))
        return ",".join(folders)

    return write


def test_log_like_the_shipped_one_is_reproduced(tmp_path, capsys):
    path = tmp_path / "0.log"
    path.write_text(shipped_like_log(), encoding="utf-8")
    assert main(["compare", f"log={path}", "baseline=inflora_cifar100", "--require", "reproduced"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^average_accuracy +86\.33 ± 0\.81 \(5\) +86\.33 ± 0\.81 \(5\) +\+0\.00 ", printed, re.M)
    assert printed.endswith("verdict   reproduced\n")


def test_log_with_three_points_off_one_seed_fails_the_requirement(tmp_path, capsys):
    path = tmp_path / "0.log"
    path.write_text(shipped_like_log({2: 3.0}), encoding="utf-8")
    assert main(["compare", f"log={path}", "--require=reproduced"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "seed 2 by -3.00, while the other 4 of the 5 equal their partners exactly" in printed
    assert "verdict undecided: these seeds can only show differences of 2.26" in printed
    # Without the requirement a comparison that was made is a success.
    assert main(["compare", f"log={path}"]) == 0


@pytest.mark.third_party
def test_infloras_own_log_is_reproduced_and_a_changed_copy_is_not(
    upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = upstream("InfLoRA") / SHIPPED
    result = compare_logged(read_log(path))
    assert [found["difference"] for found in result["metrics"]] == [0.0] * 4

    text = path.read_text(encoding="utf-8")
    start = [match.start() for match in re.finditer(r"\[trainer\.py\] => config:", text)][3]
    head, seed_3 = text[:start], text[start : text.index("=> config:", start + 40)]
    tail = text[start + len(seed_3) :]

    def lowered(match: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]) - 3:.2f}", match[0])

    changed = re.sub(r"CNN: \{.*\}|top1 curve: \[.*\]", lowered, seed_3)
    assert changed != seed_3
    copy = tmp_path / "0.log"
    copy.write_text(head + changed + tail, encoding="utf-8")
    capsys.readouterr()
    assert main(["compare", f"log={copy}", "--require", "reproduced"]) == 1
    assert "seed 3 by -3.00, while the other 4" in " ".join(capsys.readouterr().out.split())


@pytest.mark.third_party
@pytest.mark.parametrize("copied", [False, True])
def test_log_beside_the_numbers_that_were_read_from_it_is_called_the_same_file(
    copied: bool, upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal to itself it would be reproduced whatever it says."""
    path = upstream("InfLoRA") / SHIPPED
    if copied:
        path = Path(shutil.copy(path, tmp_path / "mine.log"))
    assert main(["compare", f"log={path}", "--require", "reproduced"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "verdict the same file: inflora_cifar100 was read from this very file" in printed
    assert "+0.00" in printed and "reproduced" not in printed
    assert main(["compare", f"log={path}", "baseline=paper_inflora"]) == 0
    assert "the same file" not in capsys.readouterr().out


def test_runs_with_copied_accuracies_are_named(runs, capsys):
    records = [inflora_record(seed) for seed in range(3)]
    assert main(["compare", f"run={runs(*records)}"]) == 0
    assert "was one copied?" not in capsys.readouterr().out
    for key in ("accuracy_matrix", "metrics"):
        records[2][key] = records[1][key]
    assert main(["compare", f"run={runs(*records)}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "run-1 and run-2 have the same 10 x 10 accuracy matrix, though they differ in seed 1 and 2" in printed
    assert "run-2 and inflora_cifar100, seed 1 have the same 10 x 10" in printed


def test_log_with_copied_accuracies_is_named(tmp_path, capsys):
    path = tmp_path / "0.log"
    path.write_text(shipped_like_log(copied={1: 0}), encoding="utf-8")
    assert main(["compare", f"log={path}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"seed 0 \(line \d+\) and seed 1 \(line \d+\) have the same 10 x 10 accuracy matrix", printed)


@pytest.mark.third_party
@pytest.mark.parametrize("name", ["inflora_imagenet_r_10", "inflora_imagenet_r_10_shuffled_seed1993"])
def test_split_of_a_log_of_imagenet_r_is_known_of_the_shipped_ones_alone(
    name: str, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    path = upstream("InfLoRA") / load_baseline(name)["source"]["path"]
    shipped = compare_logged(read_log(path))
    assert (shipped["baseline"]["name"], shipped["verdict"], shipped["notes"]) == (name, "reproduced", [])
    text = path.read_text(encoding="utf-8")
    copy = tmp_path / "0.log"
    lowered = re.sub(r"(?<='00-19': )[\d.]+", lambda value: f"{float(value[0]) - 1:.2f}", text, count=1)
    copy.write_text(lowered, encoding="utf-8")
    for baseline in (None, "paper_inflora"):
        result = compare_logged(read_log(copy), baseline)
        assert result["notes"] == ["the split of imagenet-r cannot be known: a log does not say which images a run had"]


def test_runs_are_named_by_their_folders_and_other_baselines_are_told(runs, capsys):
    assert main(["compare", f"run={runs(*(inflora_record(seed) for seed in range(5)))}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("runs      run-0, run-1, run-2, run-3, run-4\n")
    assert "baseline  inflora_cifar100, shipped run: github.com/liangyanshuo/InfLoRA at e08b00e:" in printed
    assert printed.endswith("also known of such runs: paper_inflora (baseline=NAME)\n")


def test_quick_run_is_not_compared_and_fails_the_requirement(runs, capsys):
    folder = runs(make_quick_record(method="olora"))
    assert main(["compare", f"run={folder}", "--require", "reproduced"]) == 1
    assert "verdict   not comparable because it is labelled quick, reference\n" in capsys.readouterr().out


def test_what_could_not_be_checked_is_printed(runs, capsys):
    assert main(["compare", f"run={runs(imagenet_r_record(0, None))}"]) == 0
    assert (
        "note      the split of imagenet-r could not be checked: a record has no hash of it\n"
        in capsys.readouterr().out
    )


def test_runs_are_found_by_name_in_the_runs_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(inflora_record(0)), encoding="utf-8")
    assert main(["compare", "run=mine", "metric=forgetting", "margin=20"]) == 0
    assert "reproduced" in capsys.readouterr().out


def test_text_fits_its_width_and_shows_every_verdict(tmp_path):
    path = tmp_path / "some.log"
    path.write_text(shipped_like_log({2: 3.0}), encoding="utf-8")
    result = compare_logged(read_log(path))
    text = render(result, width=100)
    assert max(map(len, text.splitlines())) <= 112  # the table is as wide as its columns
    for found in result["metrics"]:
        assert f"{found['metric']}: {found['verdict']}" in " ".join(text.split())


def test_log_of_a_run_of_ours_is_refused(runs, capsys):
    """It has no labels and says nothing of SAM, so it would pass for upstream's own."""
    folder = Path(runs(make_quick_record()))
    path = folder / "work" / "logs" / "0.log"
    path.parent.mkdir(parents=True)
    path.write_text(shipped_like_log(), encoding="utf-8")
    assert main(["compare", f"log={path}"]) == 2
    assert f"Compare the run itself: run={folder}." in capsys.readouterr().err


def test_help_names_every_baseline_and_verdict(capsys):
    assert main(["compare", "--help"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "inflora_cifar100",
        "paper_olora",
        "reproduced",
        "undecided",
        "margin=1 ",
        "--require reproduced",
        "log=",
    ):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=a", "log=b"], "compare takes either run="),
        (["baseline=olora_order1"], "compare takes either run="),
        (["run=a", "basline=x"], "unknown setting 'basline' of compare. Did you mean 'baseline'?"),
        (["run=a", "baseline=olora_order"], "unknown baseline 'olora_order'. Did you mean 'olora_order1'?"),
        (["run=a", "margin=wide"], "margin='wide' is not a number"),
        (["run=a", "run=b"], "run= is given twice"),
        (["run="], "run= is empty"),
        (["run=absent"], "there is no run"),
        (["log=absent"], "cannot read the log absent"),
        (["run=a", "--require", "sameness"], "--require takes the word reproduced (got 'sameness')"),
        (["run=a", "--require"], "--require takes the word reproduced (got '')"),
        (["run=a", "--strict"], "'--strict' is not a setting"),
    ],
)
def test_mistakes_are_users_errors(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_file_that_is_no_log_is_a_users_error(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("nothing of the kind\n", encoding="utf-8")
    assert main(["compare", f"log={path}"]) == 2
    assert "holds no run that can be read. Expected a log that upstream's own code left." in capsys.readouterr().err


@pytest.mark.third_party
def test_log_of_a_checkout_that_lies_elsewhere_is_hinted_at(
    upstream: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkout = upstream("InfLoRA").resolve()
    monkeypatch.chdir(tmp_path)  # where no third_party/ is filled
    log = Path("third_party/InfLoRA") / SHIPPED
    assert main(["compare", f"log={log}"]) == 2
    assert f"there is no log {log}. The checkouts are elsewhere here: log={checkout / SHIPPED}" in (
        capsys.readouterr().err
    )

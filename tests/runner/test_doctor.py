"""The doctor says of this machine what a run would, by the runner's own checks, and changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.text import quick
from flatpatch.files import ROOT
from flatpatch.upstreams import UPSTREAMS
from tests.report_records import make_quick_record

Said = Callable[..., tuple[int, str]]
REPOSITORIES = sorted({row.repository for row in UPSTREAMS.values() if row.repository})


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Return a function that asks the doctor, and gives its exit code and its words."""

    def ask(*words: str) -> tuple[int, str]:
        code = main(["doctor", *words])
        shown = capsys.readouterr()
        assert shown.err == ""
        return code, shown.out

    return ask


@pytest.fixture
def nowhere(no_submodules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Name an empty folder for the checkouts, and fail where one is fetched."""
    folder = tmp_path / "third"
    folder.mkdir()
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(folder))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "flatpatch.thirdParty")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(folder))

    def fetch(*_: object) -> str:
        raise AssertionError("the doctor fetches nothing")

    monkeypatch.setattr("flatpatch.patches.workspace._fill_submodule", fetch)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the doctor look at a copy of the lock file."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    monkeypatch.setattr("flatpatch.runner.doctor.ROOT", root)
    return root


def test_sound_lock_is_ok(project: Path, nowhere: Path, said: Said) -> None:
    code, text = said()
    assert "[ok] libraries as locked" in text
    assert code == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text[: text.index("xxhash==")], "it lacks xxhash (for datasets)"),
        (lambda text: text.replace("timm==0.6.13\n", ""), "it lacks timm (for pyproject.toml)"),
        (lambda text: text[: text.index("xxhash==") + 9], "ends in the middle of a line"),
        (lambda text: text.replace("torch==2.8.0", "torch==2.7.0"), "locked is 2.7.0"),
    ],
    ids=["cut between lines", "a line less", "cut in a line", "another version"],
)
def test_damaged_lock_is_not_ok(
    damage: Callable[[str], str], expected: str, project: Path, nowhere: Path, said: Said
) -> None:
    lock = project / "requirements.lock"
    before = lock.read_text()
    lock.write_text(damage(before))
    assert lock.read_text() != before
    code, text = said()
    assert code == 1
    assert "[ok] libraries" not in text
    assert "[NO] " in text and expected in text


def test_lock_that_is_not_the_committed_one_is_not_ok(project: Path, nowhere: Path, said: Said) -> None:
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    assert said()[0] == 0
    lock = project / "requirements.lock"
    lock.write_text(lock.read_text() + "# a word more\n")
    code, text = said()
    assert code == 1
    assert f"[NO] {lock} is not the committed one." in text


def test_environment_made_from_another_lock_is_not_ok(
    project: Path, nowhere: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = (project / "requirements.lock").read_text()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    stamp = tmp_path / "flatpatch-stamp"
    stamp.write_text(f"# {project}\n{lock}")
    assert said()[0] == 0
    stamp.write_text(f"# {project}\n{lock}extra==1.0\n")
    code, text = said()
    assert code == 1
    assert "was made from another requirements.lock" in text


def test_checkout_at_another_commit_is_not_ok(nowhere: Path, said: Said) -> None:
    checkout = nowhere / "N-LoRA"
    checkout.mkdir()
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    code, text = said()
    assert code == 1
    assert "[ok] N-LoRA" not in text
    assert f"[NO] N-LoRA: every run of its code is refused: {checkout} is at another commit" in text


def test_json_says_the_same_as_the_screen(project: Path, nowhere: Path, said: Said) -> None:
    code, text = said()
    code_of_json, as_json = said("--json")
    rows = json.loads(as_json)
    assert code == code_of_json == 0
    marks = {"ok": "ok", "missing": "--", "wrong": "NO"}
    for row in rows:
        shown = row["finding"].replace("\n", "\n     ")
        if "GiB of" not in shown:  # what is free changes
            assert f"[{marks[row['state']]}] {shown}" in text
    assert {row["section"] for row in rows} == {"environment", "machine", "the authors' code", "time"}


@pytest.mark.parametrize(("gib", "mark"), [(80, "ok"), (12, "--")])
def test_gpus_are_set_beside_what_methods_need(
    gib: int, mark: str, project: Path, nowhere: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.runner.doctor.cuda_devices", lambda: 1)
    monkeypatch.setattr("flatpatch.runner.doctor._driver", lambda: "560.35.05")
    about = SimpleNamespace(name="Some GPU", total_memory=gib * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: about)
    text = said()[1]
    assert f"[{mark}] GPU 0: Some GPU, {gib} GiB, driver 560.35.05" in text
    assert ("too little for nlora, inflora" in text or "too little for inflora, nlora" in text) == (gib == 12)


def test_driver_that_is_too_old_is_said(
    project: Path, nowhere: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    tool = programs / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 470.82.01\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr("flatpatch.runner.doctor.cuda_devices", lambda: 0)
    code, text = said()
    assert code == 0 and "[--] NVIDIA driver 470.82.01: the locked torch takes GPUs from driver 525 on" in text
    assert "torch sees none of the GPUs of driver 470.82.01" in text
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "[--] no CUDA device" in said()[1]


def test_times_are_of_runs_that_finished_undisturbed(
    project: Path, nowhere: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no run has finished here yet" in said()[1]
    for number, (seconds, restarts) in enumerate([(100.0, 0), (50.0, 0), (900.0, 1)]):
        record = make_quick_record(restarts=restarts)
        record["timing"]["total_seconds"] = seconds
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        (tmp_path / "runs" / str(number) / "record.json").write_text(json.dumps(record))
    assert "finished runs here took, on average: nlora (quick, reference) 75 s" in said()[1]


@pytest.mark.third_party
def test_what_the_authors_settings_lack_is_said_once_with_its_remedy(
    upstream: Callable[[str], Path], said: Said
) -> None:
    upstream("N-LoRA"), upstream("O-LoRA")
    text = said()[1]
    (line,) = [line for line in text.splitlines() if "the pretrained model is missing" in line]
    assert line.startswith("[--] nlora, olora, profile upstream:") and "huggingface-cli download" in line


@pytest.mark.third_party
@pytest.mark.parametrize("damage", ["deleted", "edited", "untracked"])
def test_changed_checkout_is_not_ok(
    damage: str, upstream: Callable[[str], Path], request: pytest.FixtureRequest, said: Said
) -> None:
    source = upstream("CL-LoRA").resolve()
    checkout = Path(request.getfixturevalue("nowhere")) / "CL-LoRA"
    shutil.copytree(source, checkout, symlinks=True)
    assert "[ok] CL-LoRA" in said()[1]
    file = checkout / "main.py"
    if damage == "deleted":
        file.unlink()
    elif damage == "edited":
        file.write_text(file.read_text() + "\n")
    else:
        (checkout / "mine.py").write_text("")
    code, text = said()
    assert code == 1
    assert f"[NO] CL-LoRA: every run of its code is refused: {checkout} has " in text
    assert damage in text


def test_missing_code_is_not_fetched_and_said_to_be_needed_by_those_who_need_it(nowhere: Path, said: Said) -> None:
    code, text = said()
    assert code == 0
    assert "[--] N-LoRA is not here; profile quick runs without it" in text
    assert "[--] CL-LoRA is not here; method=cllora needs it in every profile" in text
    code, text = said("method=cllora")
    assert code == 1
    assert "[NO] CL-LoRA has no reference implementation" in text
    code, text = said("method=nlora", "engine=upstream")
    assert code == 1
    assert "empty; a run tries to fill it" in text


def test_missing_git_is_told_in_the_runners_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    assert "[ok] git\n" in said()[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as refused:
        patches.verify("N-LoRA")
    code, text = said()
    assert code == 1
    assert f"[NO] {refused.value}\n" in text


def test_data_that_no_quick_run_needs_are_not_mentioned(said: Said) -> None:
    assert "imagenet" not in said()[1]


@pytest.mark.third_party
def test_what_a_run_lacks_is_told_by_the_runners_own_checks(
    upstream: Callable[[str], Path], tmp_path: Path, said: Said
) -> None:
    upstream("InfLoRA")
    words = ("method=inflora", "benchmark=imagenet_r_10", "profile=upstream", "device=0", f"data={tmp_path}")
    code, text = said(*words, f"model={tmp_path / 'none.npz'}")
    assert code == 1
    assert f"[NO] the images are missing: there is no folder {tmp_path / 'imagenet-r'}" in text
    assert "none.npz" in text
    assert "domainnet" not in text.lower()


def test_run_that_can_start_is_told_so_and_nothing_is_written(tmp_path: Path, said: Said) -> None:
    words = ("profile=quick", "engine=reference", "device=cpu", f"output={tmp_path / 'out'}")
    code, text = said(*words)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert f"This run can start: python -m flatpatch run {' '.join(words)}" in text

    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "notes.txt").write_text("")
    code, text = said(*words, "run=mine")
    assert code == 1
    assert f"[NO] the run folder {tmp_path / 'out' / 'mine'} is occupied" in text


def test_damaged_data_of_a_run_are_told(tmp_path: Path, said: Said) -> None:
    quick.write_benchmark(tmp_path / "data")
    (tmp_path / "data" / "TC" / "agnews" / "train.json").unlink()
    code, text = said("profile=quick", "engine=reference", f"data={tmp_path / 'data'}")
    assert code == 1
    assert "[NO] " in text and "TC/agnews/train.json" in text


@pytest.mark.third_party
def test_doctor_leaves_checkouts_as_they_are(upstream: Callable[[str], Path], said: Said) -> None:
    git_folder = upstream("InfLoRA") / ".git"
    files = [path for path in git_folder.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    said("method=inflora")
    said()
    assert {path: path.stat().st_mtime_ns for path in git_folder.rglob("*") if path.is_file()} == before


@pytest.mark.third_party
def test_places_that_were_passed_over_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: Callable[[str], Path], said: Said
) -> None:
    checkout = upstream("InfLoRA").resolve()
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "flatpatch.thirdParty")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(checkout.parent))
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(tmp_path))
    assert patches.skipped_checkouts("InfLoRA")
    lack = f"FLATPATCH_THIRD_PARTY={tmp_path} has no InfLoRA: {tmp_path / 'InfLoRA'} does not exist"
    assert f"[--] {lack}; the one above is used\n" in said()[1]

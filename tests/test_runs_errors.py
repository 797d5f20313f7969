"""A user's mistake gives exit code 2 and one message, starts nothing and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import third_party_folders

import flatpatch.continual.reference  # noqa: F401  # DeepSpeed, which it loads, announces itself on stdout once
from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.continual import quick
from flatpatch.errors import UserError
from flatpatch.runs import choices
from flatpatch.settings import parse

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a mistaken command and gives its message, having checked that nothing happened."""

    def run(*words: str, verb: str = "run") -> str:
        before = sorted(tmp_path.rglob("*"))
        given = [word for word in words if word.startswith("output=")]
        code = main([verb, "profile=quick", "engine=reference", f"output={tmp_path / 'out'}", *words])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("flatpatch: ")
        assert "Traceback" not in said.err
        assert said.out == ""
        assert given or sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


def benchmark(folder: Path) -> Path:
    quick.write_benchmark(folder)
    return folder


def test_unknown_verb_is_told_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert "unknown verb 'rnu'. Did you mean 'run'?" in capsys.readouterr().err


def test_unknown_setting_is_refused(refused: Refused) -> None:
    assert "unknown setting 'rh'. Did you mean 'rho'?" in refused("rh=1")


def test_value_in_another_case_is_told_the_right_one(refused: Refused) -> None:
    assert "unknown method 'infLoRA'. Did you mean 'inflora'?" in refused("method=infLoRA")


@pytest.mark.parametrize(
    "word", ["rho=-1", "rho=abc", "method=nope", "order=7", "profile=nope", "sam=yes", "device=tpu"]
)
def test_value_out_of_range_is_refused(word: str, refused: Refused) -> None:
    value = word.split("=")[1]
    text = refused(word)
    assert value in text
    assert "expected" in text.lower()


def test_run_folder_occupied_by_other_files_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "notes.txt").write_text("keep me")
    text = refused("run=mine", "method=nlora")
    assert f"the run folder {tmp_path / 'out' / 'mine'} is occupied" in text
    assert "run=NAME" in text
    assert (tmp_path / "out" / "mine" / "notes.txt").read_text() == "keep me"


def test_run_folder_occupied_by_another_run_is_told_what_differs(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out" / "mine").mkdir(parents=True)
    settings = {"rho": {"value": 0.5, "source": "command line"}}
    record = {"schema": 1, "status": "finished", "profile": "quick", "engine": "reference", "settings": settings}
    (tmp_path / "out" / "mine" / "record.json").write_text(json.dumps(record))
    assert "rho is 0.5 there and 0.1 here" in refused("run=mine", "sam=sam", "rho=0.1")


def test_run_folder_with_an_unreadable_record_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "record.json").write_text("{")
    assert "its record.json cannot be read" in refused("run=mine")


def test_unwritable_run_folder_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(f"output={tmp_path / 'file' / 'runs'}")
    assert "cannot be written: " in refused("output=/proc/flatpatch")


def test_run_folder_below_one_that_may_not_be_entered_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flatpatch.runs.plan.tempfile.mkstemp", denied)
    assert "cannot be written: Permission denied" in refused()


def test_name_too_long_for_a_folder_is_refused(refused: Refused) -> None:
    assert "is too long for a folder" in refused(f"run={'x' * 300}")


@pytest.mark.parametrize("word", ["adapter", "llama"])
def test_run_folder_that_upstream_would_misread_is_refused(word: str, refused: Refused, tmp_path: Path) -> None:
    assert f"has '{word}' in its path" in refused(f"run=my-{word}")
    assert f"has '{word}' in its path" in refused(f"output={tmp_path / word.upper()}")


def test_missing_model_is_told_what_to_fetch(refused: Refused, tmp_path: Path) -> None:
    text = refused(f"model={tmp_path / 't5-nowhere'}")
    assert f"the pretrained model is missing: {tmp_path / 't5-nowhere'} has no config.json" in text
    assert "huggingface-cli download" in text


@pytest.mark.parametrize(("name", "what"), [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")])
def test_model_folder_without_a_part_is_refused(name: str, what: str, refused: Refused, tmp_path: Path) -> None:
    shutil.copytree(quick.MODEL_FOLDER, tmp_path / "t5-partial")
    (tmp_path / "t5-partial" / name).unlink()
    assert f"has no {what}" in refused(f"model={tmp_path / 't5-partial'}")


def test_model_folder_that_upstream_would_misread_is_refused(refused: Refused, tmp_path: Path) -> None:
    shutil.copytree(quick.MODEL_FOLDER, tmp_path / "mymodel")
    assert "must hold 't5'" in refused(f"model={tmp_path / 'mymodel'}")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: file.write_text(""), "is empty"),
        (lambda file: file.write_text("[]"), "train.json"),
        (lambda file: file.write_text(file.read_text()[:1000]), "is not complete JSON"),
        (lambda file: file.write_text('[{"label": "nowhere", "sentence": "a"}]'), "nowhere"),
    ],
    ids=["missing", "empty", "no instances", "truncated", "unknown label"],
)
def test_damaged_data_is_refused(
    damage: Callable[[Path], object], expected: str, refused: Refused, tmp_path: Path
) -> None:
    data = benchmark(tmp_path / "data")
    damage(data / "TC" / "agnews" / "train.json")
    text = refused(f"data={data}")
    assert expected in text
    assert str(data / "TC" / "agnews") in text


def test_cuda_where_there_is_none_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "cuda_devices", lambda: 0)
    monkeypatch.setattr("flatpatch.runs.plan.cuda_devices", lambda: 0)
    text = refused("device=cuda")
    assert "device=cuda needs a CUDA device, and torch sees no CUDA device" in text
    assert "Leave device= out, or use device=cpu." in text and "profile=quick" not in text
    with pytest.raises(UserError, match="Add device=cpu to run on the CPU, or use profile=quick"):
        choices.choose_device(parse(["device=cuda"]), "upstream", 0, False, [])


def test_gpu_that_is_not_there_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runs.plan.cuda_devices", lambda: 2)
    assert "GPU 5 is not here (2 found)" in refused("device=0,5")


def test_full_disk_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=10**12, free=2**20))
    text = refused()
    assert "is full: 1 MiB free, 300 MiB needed" in text
    assert "output=FOLDER" in text


def test_reference_engine_outside_profile_quick_is_refused(refused: Refused) -> None:
    assert "engine=reference runs in profile quick alone" in refused("profile=upstream")
    assert "runs in profile quick alone" in refused("method=seqlora", "profile=paper")


def test_upstream_argument_that_is_a_setting_of_ours_is_refused(refused: Refused) -> None:
    assert "upstream.output_dir: use the setting output= and run= instead" in refused("upstream.output_dir=x")


def test_unknown_upstream_argument_is_told_the_nearest_one(refused: Refused) -> None:
    assert "Did you mean 'lamda_1'?" in refused("upstream.lambda_1=1")


def test_submodule_at_another_commit_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "third" / "N-LoRA"
    checkout.mkdir(parents=True)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(tmp_path / "third"))
    text = refused("engine=upstream", "method=nlora")
    assert "7301afe" in text
    assert str(checkout) in text


NEED_THE_CODE = [
    (["method=nlora", "engine=upstream"], "N-LoRA"),
    (["method=inflora", "profile=upstream", "engine=auto", "device=cpu"], "InfLoRA"),
    (["method=cllora", "engine=auto"], "CL-LoRA"),
]


@pytest.mark.parametrize(("words", "repo"), NEED_THE_CODE)
def test_code_that_must_run_and_is_nowhere_is_refused_with_every_place(
    words: list[str], repo: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = patches.PROJECT.root / "third_party" / repo
    if (own / ".git").exists():
        pytest.skip(f"third_party/{repo} is filled, so {repo} is always found")
    folder, shared = tmp_path / "nothing-here", tmp_path / "shared"
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(folder))
    configure(monkeypatch, shared)
    monkeypatch.setattr("flatpatch.patches.workspace._fill_submodule", lambda *_: "no network")
    text = refused(*words)
    assert f"FLATPATCH_THIRD_PARTY={folder}: {folder / repo} does not exist, nor does {folder}" in text
    assert f"git config flatpatch.thirdParty={shared}: {shared / repo} does not exist" in text
    assert f"{own}: empty, and it could not be filled: no network" in text
    assert f"{repo}.git {folder / repo} && git -C {folder / repo} checkout {patches.PROJECT.recorded_pin(repo)}" in text


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set ``git config flatpatch.thirdParty`` for this process alone."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "flatpatch.thirdParty")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(folder))


@pytest.mark.third_party
@pytest.mark.parametrize(("words", "repo"), NEED_THE_CODE)
def test_code_that_must_run_is_taken_from_a_later_place_and_it_is_told(
    words: list[str],
    repo: str,
    upstream: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkout = upstream(repo)
    configure(monkeypatch, checkout.parent)
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(tmp_path))
    assert upstream(repo) == checkout.resolve()
    assert main(["run", "profile=quick", *words, "--dry-run"]) == 0
    lack = f"FLATPATCH_THIRD_PARTY={tmp_path} has no {repo}: {tmp_path / repo} does not exist"
    assert f"note: {lack}; {checkout.resolve()} is used\n" in capsys.readouterr().out


def test_tests_look_for_checkouts_where_the_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(tmp_path / "own"))
    configure(monkeypatch, tmp_path / "shared")
    project = patches.PROJECT.root / "third_party"
    assert third_party_folders() == [tmp_path / "own", tmp_path / "shared", project]


def test_disk_that_fills_up_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    from flatpatch.errors import DiskFull
    from flatpatch.runs.record import write_atomically

    target = tmp_path / "record.json"
    write_atomically(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="the disk is full: .*record.json was not written"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]

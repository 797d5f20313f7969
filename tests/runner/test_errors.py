"""A user's mistake gives exit code 2 and one message, starts nothing and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import flatpatch.families.text.reference  # noqa: F401  # DeepSpeed, which it loads, announces itself on stdout once
from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families import choices
from flatpatch.families.text import quick
from flatpatch.runner.resolve import parse
from tests.conftest import third_party_folders
from tests.report_records import make_quick_record

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


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_verb_that_trains_says_how_it_is_used_where_nothing_is_said(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.runner.execute.execute", lambda plan: pytest.fail("it trains"))
    monkeypatch.setattr("flatpatch.runner.executors.local.execute", lambda plan: pytest.fail("it trains"))
    assert main([verb]) == 2
    shown = capsys.readouterr().out
    assert shown.startswith(f"{verb} needs at least one setting")
    assert f"\nusage: python -m flatpatch {verb}" in shown


@pytest.mark.parametrize("words", [["run", "run=a\nb"], ["report", "run=a\tb"], ["patches", "verify", "repo=\udcff"]])
def test_character_that_no_name_may_hold_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "holds the character '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", "run=a", "run=b"], "run= is given twice"),
        (["report", "run=a,,b"], "has an empty name"),
        (["report", "run=~nobody-of-that-name/x"], "there is no home folder of that user here"),
        (["compare", "run=a,"], "has an empty name"),
        (["compare", "log=~nobody-of-that-name/x"], "there is no home folder of that user here"),
        (["compare", "run=a", "metric=forgetting,forgetting"], "names forgetting twice"),
        (["measure", "run=a", "run=b"], "run= is given twice"),
        (["measure", "run=a,a"], "names a twice"),
        (["measure", "run=a", "task=x,x"], "names x twice"),
        (["measure", "run=a,b", "output="], "output= is empty"),
        (["measure", "run=a", "measure=loss,loss"], "names loss twice"),
        *(
            (["run", "profile=quick", f"{key}={'x' * 300}"], "File name too long")
            for key in ("model", "data", "output")
        ),
        (["compare", f"log={'x' * 300}"], "File name too long"),
        (["measure", f"run={'x' * 300}"], "File name too long"),
        (["patches", "verify", "repo=N-LoRA", "repo=O-LoRA"], "repo= is given twice"),
        (["patches", "drift", "repo=N-LoRA", "commit=main"], "commit=main is no commit"),
        (["sweep", "yes=true"], "nothing to sweep over"),
    ],
)
def test_verb_is_told_of_what_it_would_lose_or_cannot_find(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_report_names_each_run_once_and_replaces_pages_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(make_quick_record()))
    before = (folder / "record.json").read_bytes()
    assert main(["report", f"run={folder},{tmp_path / '.' / 'a' / '..' / 'a'}"]) == 2
    assert f"names {folder} twice" in capsys.readouterr().err
    assert main(["report", f"run={folder}", f"page={folder / 'record.json'}"]) == 2
    assert "a name that ends in .html" in capsys.readouterr().err
    assert (folder / "record.json").read_bytes() == before


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_setting_that_the_reference_engine_cannot_use_is_refused(verb: str, refused: Refused) -> None:
    """It made a folder's name of its own and changed nothing."""
    assert "adapters=fp32 is for the authors' DeepSpeed engine" in refused("adapters=fp32", verb=verb)
    assert "scope=head has nothing to perturb" in refused("sam=sam", "scope=head", verb=verb)


def test_sweep_of_many_runs_counts_them_first_and_shows_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["profile=quick", "engine=reference", f"output={tmp_path}", "seed=0..29", "--dry-run"]
    assert main(["sweep", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("30 combinations\n30 runs that differ\n")
    assert shown.count("N-LoRA, order 1") == 1 and shown.count("seed29") == 1


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


def test_run_folder_that_may_not_be_listed_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    listed = Path.iterdir

    def closed(path: Path) -> Iterator[Path]:
        if path == folder:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    assert f"the run folder {folder} cannot be read: Permission denied" in refused("run=mine")


def test_run_folder_occupied_by_another_run_is_told_what_differs(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out" / "mine").mkdir(parents=True)
    record = make_quick_record()
    record["settings"]["rho"] = {"value": 0.5, "source": "command line"}
    (tmp_path / "out" / "mine" / "record.json").write_text(json.dumps(record))
    assert "rho is 0.5 there and 0.1 here" in refused("run=mine", "sam=sam", "rho=0.1")


DAMAGED: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_text(json.dumps(make_quick_record())[:300]),
    "empty": lambda path: path.write_text(""),
    "of a newer version": lambda path: path.write_text(json.dumps(make_quick_record(schema=2))),
    "of wrong types": lambda path: path.write_text(json.dumps(make_quick_record(seeds=3))),
    "with a setting of a wrong type": lambda path: path.write_text(
        json.dumps(make_quick_record(settings={"rho": {"value": "x", "source": "default"}}))
    ),
    "with an edited average": lambda path: path.write_text(json.dumps(make_quick_record(metrics={"forgetting": 1}))),
    "lists in lists": lambda path: path.write_text("[" * 100_000),
    "a number without end": lambda path: path.write_text('{"schema": ' + "9" * 5000 + "}"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_record_has_one_answer_of_all_verbs(
    damage: Callable[[Path], object], refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once run called a record occupied that report told to run again, and printed one that report refused."""
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    damage(folder / "record.json")
    answer = refused("run=mine")
    assert "record.json" in answer
    for verb in ("report", "measure", "compare"):
        assert main([verb, f"run={folder}"]) == 2
        assert capsys.readouterr().err == answer, verb


def test_unwritable_run_folder_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(f"output={tmp_path / 'file' / 'runs'}")
    assert "cannot be written: " in refused("output=/proc/flatpatch")


def test_run_folder_below_one_that_may_not_be_entered_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flatpatch.files.tempfile.mkstemp", denied)
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
    assert "Leave model= out: profile quick has a small model of its own." in text
    assert "huggingface-cli" not in text


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
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    text = refused("device=cuda")
    assert "device=cuda needs a CUDA device, and torch sees no CUDA device" in text
    assert "Leave device= out, or use device=cpu." in text and "profile=quick" not in text
    with pytest.raises(UserError, match="Add device=cpu to run on the CPU, or use profile=quick"):
        choices.choose_device(parse(["device=cuda"]), "upstream", 0, False, [])


def test_gpu_that_is_not_there_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 2)
    assert "GPU 5 is not here (2 found)" in refused("device=0,5")


def test_full_disk_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=10**12, free=2**20))
    text = refused()
    assert "is full: 1 MiB free, 300 MiB needed" in text
    assert "output=FOLDER" in text


def test_reference_engine_outside_profile_quick_is_refused(refused: Refused) -> None:
    assert "engine=reference runs in profile quick or small alone" in refused("profile=upstream")
    assert "runs in profile quick or small alone" in refused("method=seqlora", "profile=paper")


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


@pytest.mark.parametrize(("words", "repo"), NEED_THE_CODE[:1])
def test_file_that_is_named_for_the_folder_of_checkouts_is_said_to_be_one(
    words: list[str],
    repo: str,
    refused: Refused,
    no_submodules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "README.md"
    file.write_text("")
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(file))
    configure(monkeypatch, tmp_path / "shared")
    monkeypatch.setattr("flatpatch.patches.workspace._fill_submodule", lambda *_: "no network")
    text = refused(*words)
    assert f"FLATPATCH_THIRD_PARTY={file}: {file} is a file; name the folder that holds the checkouts" in text
    assert f"{repo}.git {file}" not in text, "nothing can be cloned into a file"


def test_empty_name_of_a_run_is_refused(refused: Refused) -> None:
    assert "run= is empty. Give the folder a name, or leave run= out." in refused("run=")


@pytest.mark.parametrize(("words", "repo"), NEED_THE_CODE)
def test_code_that_must_run_and_is_nowhere_is_refused_with_every_place(
    words: list[str],
    repo: str,
    refused: Refused,
    no_submodules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = no_submodules / repo
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
    from flatpatch.files import write_atomically

    target = tmp_path / "record.json"
    write_atomically(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="the disk is full: .*record.json was not written"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("verb", ["run", "sweep", "compare", "report", "measure", "patches"])
def test_verb_without_words_says_what_it_needs_and_shows_its_usage(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    first, _, *rest = shown.out.splitlines()
    assert first.startswith(f"{verb} needs ")
    assert rest[0].startswith("usage: python -m flatpatch ")
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.splitlines() == rest

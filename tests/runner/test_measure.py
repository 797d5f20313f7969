"""The verb ``measure``: finished runs' models measured afterwards, lines and planes between them, and its refusals."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from flatpatch.__main__ import main
from flatpatch.errors import DiskFull, UserError
from flatpatch.families.text import reopening
from flatpatch.families.text.reference import adapters
from flatpatch.families.text.reference.adapters import Adapter, Pair
from flatpatch.report.flatness_figures import read_grid
from flatpatch.report.records import read_record
from flatpatch.runner import measure as verb
from flatpatch.runner.execute import prepare_work
from flatpatch.runner.measure_words import parse_words
from flatpatch.runner.record import new_record, write_record
from flatpatch.runner.resolve import make_plan, parse
from tests import reference_cases
from tests.report_page import Reader
from tests.report_records import make_quick_record
from tests.text_benchmark import small_benchmark

pytestmark = pytest.mark.timeout(300)
SMALL = ("measure_samples=6", "measure_batch=4")
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model of 20,000 weights and a small benchmark."""
    folder = tmp_path_factory.mktemp("shared")
    return reference_cases.make_model(folder / "t5-tiny"), small_benchmark(folder / "data", train=8, test=2)


@pytest.fixture
def make_run(shared: tuple[Path, Path], tmp_path: Path) -> MakeRun:
    """Return a function that writes a finished run of two tasks, with factors drawn instead of trained."""

    def make(name: str, seed: int, *, rank: int = 2, model: Path | None = None, scale: float = 0.2) -> Path:
        base, data = model or shared[0], shared[1]
        words = ["method=nlora", "profile=quick", "engine=reference", "device=cpu", "tasks=dbpedia,amazon"]
        words += [f"model={base}", f"data={data}", f"output={tmp_path}", f"run={name}", f"seed={seed}"]
        plan = make_plan(parse(words))
        prepare_work(plan, plan.folder / "work")
        layers = AutoModelForSeq2SeqLM.from_pretrained(base)
        adapters.attach(layers, r=rank, alpha=4, dropout=0.0)
        draw = torch.Generator().manual_seed(seed)
        pairs: dict[str, Pair] = {}
        for stage in plan.stages:
            for key, pair in adapters.joined(layers).items():
                A, B = (scale * torch.randn(value.shape, generator=draw) for value in pair)
                old = pairs.get(key)
                pairs[key] = Pair(torch.cat([old.A, A]), torch.cat([old.B, B], dim=1)) if old else Pair(A, B)
            made = {"method": "nlora", "lora_r": rank, "lora_alpha": 4}
            adapters.save(plan.folder / "work" / stage.output / "adapter", Adapter(pairs, made))
            (plan.folder / "tasks" / stage.folder).mkdir(parents=True)
            told = plan.folder / "tasks" / stage.folder / "hook.json"
            told.write_text(json.dumps({"command": stage.command}))
        write_record(plan.folder, {**new_record(plan), "status": "finished"})
        return plan.folder

    return make


@pytest.mark.parametrize("content", ["[1]", "3", '{"files": 3}', '{"files"', "{}"])
def test_note_of_a_task_that_is_damaged_is_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "1-x").mkdir(parents=True)
    (tmp_path / "tasks" / "1-x" / "done.json").write_text(content)
    run = reopening.TextRun(tmp_path, {}, ())
    assert run.noted_hash("1-x", tmp_path / "some") is None


def test_run_of_an_earlier_version_is_reported_but_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tasks' descriptions have no command; the record was written before the families were."""
    folder = tmp_path / "old"
    own = folder / "tasks" / "1-amazon"
    own.mkdir(parents=True)
    record = make_quick_record(method="seqlora", tasks=["amazon"], accuracy_matrix=[[26.67]], inputs={})
    (folder / "record.json").write_text(json.dumps(record))
    sam = {"kind": "off", "rho": 0.05, "eta": 0.01, "scope": "lora", "sync": "local", "ascent_loss": "total", "seed": 0}
    places = {name: str(own / name) for name in ("metrics", "progress", "summary")}
    old = {"schema": 1, "task_index": 0, "task": "amazon", **places, "sam": sam, "adapters": "upstream"}
    (own / "hook.json").write_text(json.dumps(old | {"measure": None}))
    assert main(["report", f"run={folder}"]) == 0
    assert "26.67" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert main(["measure", f"run={folder}", "measure=loss"]) == 2
    assert capsys.readouterr().err == (
        f"flatpatch: run=old: {own / 'hook.json'} does not say by which command its task was trained. A run of an "
        "earlier version is measured with that version.\n"
    )


def test_list_of_a_tasks_data_that_is_damaged_is_refused(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("damaged", 1)
    file = folder / "work" / "task_configs" / "amazon" / "train_tasks.json"
    assert file.is_file()
    for content in ("[1]", '{"SC": 3}', '{"SC": [{}]}', "{"):
        file.write_text(content)
        assert main(["measure", f"run={folder}", "measure=loss", *SMALL]) == 2
        assert f"{file}, which names the task's data, cannot be read" in capsys.readouterr().err


def test_sample_beyond_the_data_is_said_and_recorded(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("small", 1)
    words = ["measure", f"run={folder}", "measure=loss", "measure_scope=adapter", "measure_batch=4"]
    assert main([*words, "measure_samples=8"]) == 0
    assert "WARNING" not in capsys.readouterr().out
    for _ in range(2):
        assert main([*words, "measure_samples=100"]) == 0
        text = "measure_samples=100, and amazon has 8 training examples: measured on all of them"
        assert f"WARNING: {text}\n" in capsys.readouterr().out
    assert read_record(folder)["notes"].count(text) == 1


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that gives the message of a mistaken command, having checked that nothing was written."""

    def run(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        before = digest(tmp_path)
        code = main(["measure", *words])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.count("flatpatch: ") == 1 and "Traceback" not in said.err
        assert digest(tmp_path) == before
        assert not [path for path in tmp_path.rglob(".comparison*")]
        return said.err

    return run


def note_hashes(folder: Path, process: str, *paths: Path) -> None:
    """Write what a run leaves when one of its processes ended."""
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    own = folder / "tasks" / process
    own.mkdir(parents=True, exist_ok=True)
    (own / "done.json").write_text(json.dumps({"files": hashes, "seconds": 1.0}))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw nothing where a test is not about figures: they take most of its time."""
    monkeypatch.setattr(verb, "draw_flatness", lambda record, folder: [])
    yield


def finished_losses(folder: Path) -> dict[str, float]:
    return {entry["scope"]: entry["loss"] for entry in read_record(folder)["flatness"] if entry["when"] == "finished"}


@pytest.mark.slow
def test_one_run_is_measured_after_each_task_and_its_record_updated(make_run: MakeRun) -> None:
    folder = make_run("one", 1)
    words = [
        "measure",
        f"run={folder}",
        "measure=slice",
        "task=all",
        "measure_scope=adapter,merged,model",
        *SMALL,
    ]
    assert main(words) == 0
    record = read_record(folder)
    assert [(entry["task"], entry["when"], entry["scope"]) for entry in record["flatness"]] == [
        (task, "finished", scope) for task in ("dbpedia", "amazon") for scope in ("adapter", "merged", "model")
    ]
    for entry in record["flatness"]:
        assert set(entry["values"]) == {"slice_mean_rise"}
        assert (folder / entry["file"]).is_file() and (folder / entry["arrays"]).is_file()
    # One function in three spaces.
    by_task = [{e["loss"] for e in record["flatness"] if e["task_index"] == k} for k in range(2)]
    assert all(max(losses) == pytest.approx(min(losses), rel=1e-5) for losses in by_task)
    assert max(by_task[0]) != pytest.approx(max(by_task[1]), rel=1e-3)
    assert (folder / "figures" / "flatness_adapter_over_tasks.png").is_file()
    # Again, with other kinds: the entries take the place of the old ones.
    assert main(["measure", f"run={folder}", "measure=loss", "task=amazon", "measure_scope=adapter", *SMALL]) == 0
    again = read_record(folder)["flatness"]
    assert len(again) == 6
    assert [e["values"] for e in again if (e["task"], e["scope"]) == ("amazon", "adapter")] == [{}]


def test_rebuilt_model_is_the_one_its_factors_say(make_run: MakeRun, shared: tuple[Path, Path]) -> None:
    run = verb.find_run(str(make_run("one", 1)))
    saved = reopening.load_adapter(run, 1)
    assert (saved.rank, saved.total_rank) == (2, 4)
    plain = AutoModelForSeq2SeqLM.from_pretrained(shared[0]).state_dict()
    for joined in (False, True):
        model = reopening.rebuild(run, 1, joined=joined)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == sum(p.numel() for pair in saved.pairs.values() for p in pair) // (1 if joined else 2)
        for key, pair in saved.pairs.items():
            layer = model.get_submodule(key)
            x = torch.randn(3, pair.A.shape[1])
            # W x + (alpha / r) B A x, with all tasks' factors and the rank of one task.
            expected = x @ plain[f"{key}.weight"].T + (4 / 2) * x @ pair.A.T @ pair.B.T
            assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.usefixtures("figures")
@pytest.mark.slow
def test_line_between_two_runs_ends_at_their_own_losses(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run("first", 1), make_run("second", 2)]
    output = tmp_path / "compared"
    words = [f"run={','.join(map(str, folders))}", "measure=density,landscape", f"output={output}", *SMALL]
    assert main(["measure", *words]) == 0
    told = capsys.readouterr().out
    assert f"figures  {output}/ (10 files)\npage     {output / 'report.html'}\n" in told
    found = json.loads((output / verb.COMPARISON).read_text())
    assert [run["name"] for run in found["runs"]] == ["first", "second"] and found["task"] == "amazon"
    ends = [finished_losses(folder) for folder in folders]
    for scope, space in (("adapter", "factor space"), ("merged", "merged space")):
        line = found["scopes"][scope]
        assert line["space"].startswith(space)
        assert line["losses"][0] == pytest.approx(ends[0][scope], rel=1e-5)
        assert line["losses"][-1] == pytest.approx(read_grid(output / line["arrays"]).mark_losses[1], rel=1e-12)
        inner = line["losses"][1:-1]
        straight = [line["losses"][0] + a * (line["losses"][-1] - line["losses"][0]) for a in line["alphas"][1:-1]]
        assert line["barrier"] == pytest.approx(max(a - b for a, b in zip(inner, straight, strict=True)), abs=1e-9)
    # The two spaces are not one: the factors' line has cross terms.
    assert found["scopes"]["adapter"]["losses"][12] != pytest.approx(found["scopes"]["merged"]["losses"][12], rel=1e-4)
    drawn = {path.stem for path in output.glob("*.png")}
    kinds = [f"{kind}-{scope}" for kind in ("density", "landscapes") for scope in ("adapter", "merged")]
    assert drawn == {"connectivity", *kinds} == {path.stem for path in output.glob("*.pdf")}
    page = Reader((output / "report.html").read_text())
    assert page.problems == []
    assert page.headings[0][1] == "flatpatch measurefirst and second after task amazon"
    for scope, line in found["scopes"].items():
        assert page.row("Straight line", line["space"])[1] == f"{line['barrier']:.4g}"
        assert page.row(f"Scope {scope}", "loss")[1:] == [f"{own[scope]:.4g}" for own in ends]
    assert sum(tag == "img" for tag, _ in page.tags) == 5
    # A second time it takes the place of the first.
    words[1] = "measure=loss"
    assert main(["measure", *words, "measure_scope=merged"]) == 0
    assert {path.stem for path in output.glob("*.png")} == {"connectivity"}


@pytest.mark.usefixtures("figures")
def test_plane_through_three_runs_holds_their_own_losses(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    output = tmp_path / "compared"
    words = [f"run={','.join(map(str, folders))}", "measure=loss", "measure_scope=adapter", f"output={output}", *SMALL]
    page = folders[0] / "report.html"
    page.write_text("of the time before the measuring")
    assert main(["measure", *words]) == 0
    assert hashlib.sha256((folders[0] / "record.json").read_bytes()).hexdigest()[:16] in page.read_text()
    assert not (folders[1] / "report.html").exists(), "a page that nobody left is not made"
    losses = json.loads((output / verb.COMPARISON).read_text())["scopes"]["adapter"]["losses"]
    for folder in folders:
        # Measured on the first run's sample, which is that of all: they learned the same data.
        assert losses[folder.name] == pytest.approx(finished_losses(folder)["adapter"], rel=1e-5)
    assert {path.name for path in output.iterdir()} == {
        *("comparison.json", "report.html", "plane-adapter.npz"),
        *(f"{name}-adapter{suffix}" for name in ("plane", "surface") for suffix in (".png", ".pdf")),
    }


def test_run_that_is_not_there_or_not_finished_is_refused(make_run: MakeRun, refused: Callable[..., str]) -> None:
    for name in ("nothing", "runs/nothing"):
        text = refused(f"run={name}")
        assert "there is no run" in text and text.count("runs/nothing.") == 1 and "runs/runs" not in text
    folder = make_run("one", 1)
    record = read_record(folder)
    write_record(folder, {**record, "status": "interrupted"})
    assert "is not finished (interrupted)" in refused(f"run={folder}")
    write_record(folder, {**record, "method": "other"})
    assert "is of method other, which this version does not have" in refused(f"run={folder}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measure=trase"], "Did you mean 'trace'?"),
        (["measure_scope=mergd"], "Did you mean 'merged'?"),
        (["measure=ledger"], "measure=ledger follows a training, and a finished run has none left"),
        (["measure_sample=3"], "unknown setting 'measure_sample' of measure. Did you mean 'measure_samples'?"),
        (["measure_samples=0"], "measure_samples=0 is an empty sample"),
        (["measure_samples=many"], "measure_samples='many' is not a whole number"),
        (["measure="], "measure= is empty"),
        (["task=amazn"], "Did you mean 'amazon'?"),
        (["output=x"], "output= is for several runs together"),
        (["run="], "run= is empty"),
        (["run=a,b,c,d"], "names 4 runs"),
        (["run=a,b", "task=all"], "several runs are compared after one task"),
    ],
)
def test_mistaken_word_is_refused(
    words: list[str], message: str, make_run: MakeRun, refused: Callable[..., str]
) -> None:
    run = [] if words[0].startswith("run=") else [f"run={make_run('one', 1)}"]
    assert message in refused(*run, *words)


@pytest.mark.parametrize(
    ("words", "sample"),
    [([], [16, 8, "brief"]), (["measure_samples=5"], [5, 8, "brief"]), (["measure_effort=full"], [16, 8, "full"])],
)
def test_small_models_are_measured_as_in_their_runs(
    words: list[str], sample: list[Any], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(run: Any, index: int, request: Any) -> None:
        asked.append(request)
        raise UserError("enough")

    monkeypatch.setattr(verb, "_check_model", note)
    assert main(["measure", f"run={make_run('one', 1)}", *words]) == 2
    assert [getattr(asked[0], name) for name in ("samples", "batch", "effort")] == sample


def test_pairs_that_have_no_line_are_refused(
    make_run: MakeRun, refused: Callable[..., str], shared: tuple[Path, Path], tmp_path: Path
) -> None:
    first = make_run("first", 1)
    assert f"names {first} twice" in refused(f"run={first},{first}")
    assert "names a run twice" in refused(f"run={first},{first}/../first")
    other_rank = make_run("rank", 2, rank=3)
    assert "different rank" in refused(f"run={first},{other_rank}", *SMALL)
    same = make_run("same", 1)
    assert "the same point" in refused(f"run={first},{same}", *SMALL)
    assert "between runs lie the spaces" in refused(f"run={first},{same}", "measure_scope=trainable", *SMALL)
    changed = shutil.copytree(shared[0], tmp_path / "t5-changed")
    model = AutoModelForSeq2SeqLM.from_pretrained(changed)
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wi.weight.add_(0.1)
    model.save_pretrained(changed)
    other_base = make_run("base", 2, model=changed)
    assert "another base" in refused(f"run={first},{other_base}", *SMALL)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    second = make_run("second", 2)
    assert "is no comparison of this verb's" in refused(f"run={first},{second}", f"output={occupied}", *SMALL)


@pytest.mark.usefixtures("figures")
def test_runs_of_different_rank_meet_in_merged_space(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("first", 1), make_run("rank", 2, rank=3)]
    words = [f"run={','.join(map(str, folders))}", "measure=loss", "measure_scope=merged", f"output={tmp_path / 'x'}"]
    assert main(["measure", *words, *SMALL]) == 0
    assert list(json.loads((tmp_path / "x" / verb.COMPARISON).read_text())["scopes"]) == ["merged"]


def test_model_that_is_put_together_differently_is_refused(
    make_run: MakeRun, refused: Callable[..., str], shared: tuple[Path, Path], tmp_path: Path
) -> None:
    """With another activation the weights, their names and shapes are the same, and so is the base."""
    changed = shutil.copytree(shared[0], tmp_path / "t5-gelu")
    config = json.loads((changed / "config.json").read_text())
    assert config["feed_forward_proj"] == "relu"
    (changed / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "gelu", "dense_act_fn": "gelu"}))
    first, other, third = make_run("first", 1), make_run("other", 2, model=changed), make_run("third", 3)
    for runs in ((first, other), (third, first, other)):
        for scope in ("adapter", "merged"):
            text = refused(f"run={','.join(map(str, runs))}", f"measure_scope={scope}", *SMALL)
            assert f"other, scope {scope}: the model has loss" in text and "put together differently" in text


def test_three_models_on_one_line_are_refused(make_run: MakeRun, refused: Callable[..., str]) -> None:
    """Drawn from one seed, scaled by 0.1, 0.2 and 0.3: the factors lie on one line through zero."""
    folders = [make_run(name, 1, scale=scale) for name, scale in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    assert "lie on one line" in refused(f"run={','.join(map(str, folders))}", "measure_scope=adapter", *SMALL)


def test_checkpoint_that_does_not_match_is_refused(
    make_run: MakeRun, refused: Callable[..., str], shared: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = make_run("one", 1)
    saved = [path.parent for path in sorted((folder / "work").rglob("adapter.safetensors"))]
    first, second = (path / "adapter.safetensors" for path in saved)
    whole = second.read_bytes()
    shutil.copy(first, second)
    assert "has rank 2 in all, and 2 a task: it is not that task's" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole[:100])
    assert "no adapter of an earlier task" in refused(f"run={folder}", *SMALL)
    loaded = adapters.load(first.parent)
    grown = {key: Pair(torch.cat([p.A] * 2), torch.cat([p.B] * 2, dim=1)) for key, p in loaded.pairs.items()}
    bad = {key: Pair(p.A[:, :-1].contiguous(), p.B) for key, p in grown.items()}
    adapters.save(second.parent, Adapter(bad, loaded.made))
    assert "is of another model" in refused(f"run={folder}", *SMALL)
    adapters.save(second.parent, Adapter({k: Pair(p.A * float("nan"), p.B) for k, p in grown.items()}, loaded.made))
    assert "are not finite" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole)
    note_hashes(folder, "2-amazon", second)
    adapters.save(second.parent, Adapter({k: Pair(p.A * 1.5, p.B) for k, p in grown.items()}, loaded.made))
    assert "is not the file that the run left" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole)
    entry: dict[str, Any] = {"task": "amazon", "task_index": 1, "when": "after", "scope": "adapter", "samples": 6}
    entry |= {"loss": 99.0, "values": {}, "file": "flatness/2-amazon-after.json", "arrays": None, "seconds": 1.0}
    write_record(folder, {**read_record(folder), "flatness": [entry]})
    assert "in the run it had 99" in refused(f"run={folder}", "measure=loss", *SMALL)
    link = folder / "work" / "initial_model" / shared[0].name
    link.unlink()
    assert "is gone" in refused(f"run={folder}", *SMALL)


def test_scope_without_a_trainable_weight_is_refused(
    make_run: MakeRun, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = reopening.rebuild
    monkeypatch.setattr(reopening, "rebuild", lambda *words, **more: rebuild(*words, **more).requires_grad_(False))
    assert "scope=trainable chooses no weight" in refused(
        f"run={make_run('one', 1)}", "measure_scope=trainable", *SMALL
    )


@pytest.mark.parametrize("blocked", [".lock", "flatness"])
def test_run_folder_that_cannot_be_written_is_refused_before_the_work(
    blocked: str, make_run: MakeRun, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("one", 1)
    if blocked == ".lock":
        (folder / ".lock").mkdir()
    else:
        (folder / blocked).write_text("a file where a folder should be")
    monkeypatch.setattr(reopening, "rebuild", lambda *_, **__: pytest.fail("the work began"))
    text = refused(f"run={folder}", *SMALL)
    assert "cannot be written" in text and blocked in text


def test_output_that_cannot_be_written_is_refused_before_the_work(
    make_run: MakeRun, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = f"run={make_run('first', 1)},{make_run('second', 2)}"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reopening, "rebuild", lambda *_, **__: pytest.fail("the work began"))
    assert "the output folder" in (text := refused(runs, f"output={tmp_path / 'file' / 'x'}", *SMALL))
    assert "cannot be made" in text
    assert "cannot be written" in refused(runs, "output=/proc/compared", *SMALL)
    assert "File name too long" in refused(runs, f"output={'x' * 300}", *SMALL)


@pytest.mark.usefixtures("figures")
def test_each_task_is_in_the_record_as_soon_as_it_is_measured(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("one", 1)
    write_record = verb.write_record

    def denied_later(*words: Any) -> None:
        write_record(*words)
        monkeypatch.setattr(verb, "write_record", denied)

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "record.json")

    monkeypatch.setattr(verb, "write_record", denied_later)
    assert main(["measure", f"run={folder}", "measure=loss", "task=all", *SMALL]) == 1
    assert f"flatpatch: {folder} could not be written: [Errno 13] Permission denied" in capsys.readouterr().err
    assert {entry["task"] for entry in read_record(folder)["flatness"]} == {"dbpedia"}


def test_sample_of_no_examples_is_refused(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reopening, "load_examples", lambda *_: [])
    run = verb.find_run(str(make_run("one", 1)))
    request = parse_words(["run=x"]).request
    with pytest.raises(UserError, match="the sample is empty"):
        reopening.draw_task_sample(run, 1, request)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--help"]) == 0
    said = capsys.readouterr().out
    assert "examples:" in said and "python -m flatpatch measure run=" in said and "eigenvalues" in said
    assert "OMP_NUM_THREADS" in said


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["rnu=x"], 2)])
def test_help_and_mistakes_need_no_library_for_training(words: list[str], code: int) -> None:
    program = (
        "import sys\nfrom flatpatch.__main__ import main\ncode = main(['measure', *sys.argv[1:]])\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules), 'imported'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "accelerator" not in done.stdout + done.stderr


def test_libraries_say_nothing_of_themselves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flatpatch", "measure", f"run={tmp_path / 'none'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("flatpatch: ") and len(done.stderr.splitlines()) == 1


def test_quick_run_is_measured_with_one_thread_unless_told_otherwise(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    words = ["measure", f"run={make_run('one', 1)}", "measure=loss", "measure_scope=adapter", *SMALL]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert main(words) == 0
    assert told == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert main(words) == 0
    assert told == [1]


def test_disk_that_fills_up_while_measuring_is_no_mistake_in_what_was_asked(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="What the record names is whole") as caught, verb._writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 85


@pytest.mark.slow
def test_run_of_which_every_weight_was_trained_has_the_same_losses_inside_and_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "method=seqlora", "tuning=full", "tasks=dbpedia,amazon", "fraction=0.05", "sam=sam"]
    words += ["upstream.num_train_epochs=1", f"output={tmp_path}", "run=whole"]
    assert main([*words, "measure=loss", *SMALL]) == 0
    folder = tmp_path / "whole"
    assert main(["measure", f"run={folder}", "measure=loss", "task=all", *SMALL]) == 0
    entries = read_record(folder)["flatness"]
    losses = {(entry["when"], entry["task_index"]): entry["loss"] for entry in entries}
    for task in range(2):
        assert losses["finished", task] == pytest.approx(losses["after", task], rel=1e-6)
    capsys.readouterr()
    assert main(["measure", f"run={folder}", "measure=loss", "measure_scope=adapter", *SMALL]) == 2
    assert "scope=adapter chooses no weight" in capsys.readouterr().err
    file = folder / "work/logs_and_outputs/order_1/outputs/2-amazon/adapter/model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["measure", f"run={folder}", "measure=loss", "measure_scope=trainable", *SMALL]) == 2
    assert "is not the file that the run left" in capsys.readouterr().err

"""The verb ``measure`` on finished image runs of the reference engine: losses, lines, planes, and its refusals."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.text.reopening import TextRun
from flatpatch.families.vision import reopening as trained_images
from flatpatch.families.vision.reference.checkpoints import restore, save
from flatpatch.families.vision.reference.options import read_reference
from flatpatch.families.vision.reference.vit import build
from flatpatch.families.vision.results import CONFIG
from flatpatch.flatness import Problem, find_scope, model_point, supervised_loss
from flatpatch.measuring import Request
from flatpatch.report.flatness_figures import read_grid
from flatpatch.report.records import read_record
from flatpatch.runner import measure as verb
from flatpatch.runner.execute import _contract, execute, prepare_work
from flatpatch.runner.record import new_record, write_record
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.upstreams import UPSTREAMS
from tests.flatness_cases import LoRALinear
from tests.runner.test_measure import figures, finished_losses, note_hashes, refused
from tests.warm import IMAGES, runs_by

__all__ = ["figures", "refused"]  # fixtures of the text runs' tests
pytestmark = pytest.mark.timeout(300)
SMALL = ("measure_samples=6", "measure_batch=4")
TWO_TASKS = ("profile=quick", "device=cpu", "upstream.init_cls=10", "upstream.increment=10")
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a finished run of two tasks, with factors drawn instead of trained."""

    def make(name: str, seed: int, *more: str, method: str = "inflora", scale: float = 0.1) -> Path:
        words = [f"method={method}", "engine=reference", *TWO_TASKS, "upstream.rank=2"]
        plan = make_plan(parse([*words, f"output={tmp_path}", f"run={name}", f"seed={seed}", *more]))
        prepare_work(plan, plan.folder / "work")
        own = plan.folder / "tasks" / "all"
        own.mkdir(parents=True)
        (own / "hook.json").write_text(json.dumps(_contract(plan, plan.stages[0], own)))
        reference = reference_of(plan.folder)
        model = build(reference, [10, 10])
        draw = torch.Generator().manual_seed(seed)
        for task in range(2):
            if task:
                for layer in model.layers:
                    layer.fold()
            for parameters in model.train_only(("A", "B")).values():
                for parameter in parameters:
                    parameter.data = scale * torch.randn(parameter.shape, generator=draw)
            save(reference, model)
            model.task = 1
        write_record(plan.folder, {**new_record(plan), "status": "finished"})
        return plan.folder

    return make


def reference_of(folder: Path) -> Any:
    config = json.loads((folder / "work" / CONFIG).read_text())
    vision = json.loads((folder / "tasks/all/hook.json").read_text())["vision"]
    return dataclasses.replace(read_reference(config, vision), output_dir=folder / "work" / "logs")


def test_joined_factors_are_the_same_model_and_all_vary(make_run: MakeRun) -> None:
    folder = make_run("one", 1)
    as_trained, joined = (restore(reference_of(folder), 1, joined=joined) for joined in (False, True))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(joined(images), as_trained(images), rtol=1e-4, atol=1e-5)
    varied = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (as_trained, joined)]
    assert not any("lora_A" in name for name in varied[0])
    assert varied[1] == varied[0] | {name.replace("lora_B", "lora_A") for name in varied[0] if "lora_B" in name}
    # Two tasks of rank 2.
    assert {p.shape[0] for name, p in joined.named_parameters() if "lora_A" in name} == {4}


def test_one_run_is_measured_after_each_task_on_the_images_of_that_task(make_run: MakeRun) -> None:
    folder = make_run("one", 1)
    words = ["measure", f"run={folder}", "measure=slice", "task=all", "measure_scope=adapter,merged,model", *SMALL]
    assert main(words) == 0
    entries = read_record(folder)["flatness"]
    assert [(e["task"], e["when"], e["scope"]) for e in entries] == [
        (task, "finished", scope) for task in ("0-9", "10-19") for scope in ("adapter", "merged", "model")
    ]
    for entry in entries:
        assert set(entry["values"]) == {"slice_mean_rise"}
    # The loss, without the verb: 80 images of each of the task's classes, augmented with the fixed seed.
    reference = reference_of(folder)
    run = verb.find_run(str(folder))
    for task in range(2):
        content = json.loads((folder / entries[3 * task]["file"]).read_text())
        dataset = run._tasks[task].train  # type: ignore[attr-defined]
        torch.manual_seed(0)
        images, labels = zip(*(dataset[i] for i in content["indices"]), strict=True)
        logits = restore(reference, task)(torch.stack(images))
        expected = nn.functional.cross_entropy(logits, torch.tensor(labels) - 10 * task).item()
        assert expected == pytest.approx(entries[3 * task]["loss"], rel=1e-5)
        assert "task's own classes" in content["loss"]
    losses = [{e["loss"] for e in entries if e["task_index"] == task} for task in range(2)]
    assert all(max(each) == pytest.approx(min(each), rel=1e-4) for each in losses)
    assert max(losses[0]) != pytest.approx(max(losses[1]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("method", ["inflora", "seqlora_vit"])
def test_line_between_two_runs_ends_at_their_own_losses(method: str, make_run: MakeRun, tmp_path: Path) -> None:
    """The classifiers differ, and for InfLoRA what was learned in the first task: all of it moves along the line."""
    folders = [make_run("first", 1, method=method), make_run("second", 2, method=method)]
    words = [f"run={','.join(map(str, folders))}", "measure=density", f"output={tmp_path / 'x'}", *SMALL]
    assert main(["measure", *words]) == 0
    found = json.loads((tmp_path / "x" / verb.COMPARISON).read_text())
    assert [run["name"] for run in found["runs"]] == ["first", "second"] and found["task"] == "10-19"
    ends = [finished_losses(folder) for folder in folders]
    assert ends[0]["adapter"] != pytest.approx(ends[1]["adapter"], rel=1e-2)
    for scope, space in (("adapter", "factor space"), ("merged", "merged space")):
        line = found["scopes"][scope]
        assert line["space"].startswith(space) and line["space"].endswith("and what else was trained")
        assert line["losses"][0] == pytest.approx(ends[0][scope], rel=1e-4)
        assert line["losses"][-1] == pytest.approx(ends[1][scope], rel=1e-4)
        assert np.isfinite(read_grid(tmp_path / "x" / line["arrays"]).losses).all()
    assert found["scopes"]["adapter"]["losses"][12] != pytest.approx(found["scopes"]["merged"]["losses"][12], rel=1e-4)
    drawn = {path.stem for path in (tmp_path / "x").glob("*.png")}
    assert drawn == {"connectivity", "density-adapter", "density-merged"}


@pytest.mark.usefixtures("figures")
def test_plane_through_three_runs_holds_their_own_losses(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    words = [f"run={','.join(map(str, folders))}", "measure=loss", "measure_scope=merged", f"output={tmp_path / 'x'}"]
    assert main(["measure", *words, *SMALL]) == 0
    losses = json.loads((tmp_path / "x" / verb.COMPARISON).read_text())["scopes"]["merged"]["losses"]
    for folder in folders:
        assert losses[folder.name] == pytest.approx(finished_losses(folder)["merged"], rel=1e-4)


@pytest.mark.slow
def test_whole_run_has_the_same_losses_inside_and_afterwards(tmp_path: Path) -> None:
    words = ["run", "method=inflora", "engine=reference", *TWO_TASKS, "upstream.epochs=2", "upstream.batch_size=400"]
    words += [f"output={tmp_path}", "run=trained", "measure=loss", "measure_scope=adapter,merged", *SMALL]
    assert main(words) == 0
    check_same_losses(tmp_path / "trained", ("adapter", "merged"))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["head", "full"])
def test_whole_run_without_lora_has_the_same_losses_inside_and_afterwards(tuning: str, tmp_path: Path) -> None:
    words = ["run", "method=seqlora_vit", f"tuning={tuning}", *TWO_TASKS, "upstream.epochs=2", "fraction=0.2"]
    words += [
        f"output={tmp_path}",
        "run=trained",
        "measure=loss",
        "measure_scope=trainable,model",
        "sam=random",
        *SMALL,
    ]
    assert main(words) == 0
    record = read_record(tmp_path / "trained")
    trained = {task["perturbed_parameters"] == task["trainable_parameters"] for task in record["training"]}
    assert trained == {True}  # the scope follows what is trained
    moved = {
        entry["scope"]: entry["values"]["distance_moved"] for entry in record["flatness"] if entry["when"] == "after"
    }
    assert moved["trainable"] == pytest.approx(moved["model"], rel=1e-6) and moved["model"] > 0
    check_same_losses(tmp_path / "trained", ("trainable", "model"))


def check_batching(folder: Path) -> None:
    """The loss of upstream's own model does not depend on how the sample is batched."""
    run = verb.find_run(str(folder))
    with run.working():
        model = run.rebuild(1)
        requests = [Request(("loss",), samples=6, batch=batch) for batch in (6, 4, 1)]
        found = [Problem(model, run.draw_sample(1, request).batches, run.loss).loss() for request in requests]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)


def check_same_losses(folder: Path, scopes: tuple[str, ...]) -> None:
    words = [f"run={folder}", "measure=loss", f"measure_scope={','.join(scopes)}", "task=all", *SMALL]
    assert main(["measure", *words]) == 0
    entries = read_record(folder)["flatness"]
    losses = {(e["when"], e["task_index"], e["scope"]): e["loss"] for e in entries}
    for task in range(2):
        for scope in scopes:
            assert losses["finished", task, scope] == pytest.approx(losses["after", task, scope], rel=1e-6)


# --- what is refused


def test_runs_that_do_not_fit_together_are_refused(make_run: MakeRun, refused: Callable[..., str]) -> None:
    first, second = make_run("first", 1), make_run("second", 2)

    def with_second(*words: str) -> str:
        return refused(f"run={first},{second}", *words, *SMALL)

    sequential = make_run("sequential", 2, method="seqlora_vit")
    assert "are of different methods (inflora and seqlora_vit)" in refused(f"run={first},{sequential}", *SMALL)
    shuffled = [make_run(f"shuffled{seed}", seed, "upstream.shuffle=true") for seed in (1, 2)]
    text = refused(f"run={','.join(map(str, shuffled))}", *SMALL)
    assert "learned their classes in different orders" in text
    rank = make_run("rank", 2, "upstream.rank=3")
    assert "different rank" in refused(f"run={first},{rank}", "measure_scope=adapter", *SMALL)
    assert "the same point" in refused(f"run={first},{make_run('same', 1)}", *SMALL)
    record = read_record(second)
    write_record(second, {**record, "benchmark": "cifar100"})
    assert "are of different benchmarks (quick images and cifar100)" in with_second()
    write_record(second, {**record, "inputs": {"model.safetensors": "0" * 64}})
    assert "are of different pretrained weights" in with_second()
    write_record(second, {**record, "inputs": {**record["inputs"], "images": "0" * 64}})
    assert "are of different images" in with_second()
    write_record(second, {**record, "engine": "upstream"})
    assert "are of different engines (reference and upstream)" in with_second()
    write_record(second, record)
    hook = second / "tasks/all/hook.json"
    hook.write_text(hook.read_text().replace('"depth": 6', '"depth": 5'))
    assert "are of different sizes of the model" in with_second()
    hook.write_text(hook.read_text().replace('"depth": 5', '"depth": 6'))
    for folder, positions in ((first, [0, 1]), (second, [0, 2])):
        config = folder / "work" / CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), "general_pos": positions, "lamb": 0.9}))
    text = with_second()
    assert "may be put together differently" in text and "between them: general_pos is [0, 1] and [0, 2]. Name" in text


def test_a_run_on_images_and_one_on_texts_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = verb.find_run(str(make_run("images", 1)))
    text = TextRun(tmp_path, {"name": "texts"}, ())
    for first, second in ((run, text), (text, run)):
        with pytest.raises(UserError, match="learned different kinds of data"):
            first.check_companion(second)


@pytest.mark.slow
def test_what_is_missing_or_damaged_is_refused(make_run: MakeRun, refused: Callable[..., str]) -> None:
    folder = make_run("one", 1)
    record = read_record(folder)
    hook = folder / "tasks/all/hook.json"
    description = hook.read_text()
    write_record(folder, {**record, "inputs": {"model.safetensors": "0" * 64}})
    assert "it began with are other ones now" in refused(f"run={folder}", *SMALL)
    write_record(folder, record)
    hook.write_text(description.replace("/model.safetensors", "/nowhere/model.safetensors"))
    assert "it began with are gone" in refused(f"run={folder}", *SMALL)
    hook.unlink()
    assert "what it was told cannot be read" in refused(f"run={folder}", *SMALL)
    for damaged in ("[]", '{"schema": 1, "vision": 3}'):
        hook.write_text(damaged)
        assert "what it was told cannot be read" in refused(f"run={folder}", *SMALL)
    hook.write_text(description)
    config = folder / "work/flatpatch-config.json"
    told = config.read_text()
    for damaged in ("[]", "{}", told[:20]):
        config.write_text(damaged)
        assert "what it was told cannot be read" in refused(f"run={folder}", *SMALL)
    config.write_text(told)
    second = folder / "work/logs/tasks/1.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:100])
    assert "no checkpoint of task 1" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole)
    with_nan = {name: value * float("nan") for name, value in load_file(second).items()}
    save_file(
        with_nan, second, metadata={"made": json.dumps({"method": "inflora", "rank": 2, "model": model_of(hook)})}
    )
    assert "are not finite" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole)
    for checkpoint in (second, second.with_name("0.safetensors")):
        note_hashes(folder, "all", second, second.with_name("0.safetensors"))
        made = json.dumps({"method": "inflora", "rank": 2, "model": model_of(hook)})
        kept = checkpoint.read_bytes()
        save_file({name: 1.5 * value for name, value in load_file(checkpoint).items()}, checkpoint, {"made": made})
        text = refused(f"run={folder}", *SMALL)
        assert f"{checkpoint} is not the file that the run left" in text
        checkpoint.write_bytes(kept)
    entry: dict[str, Any] = {"task": "10-19", "task_index": 1, "when": "after", "scope": "adapter", "samples": 6}
    entry |= {"loss": 99.0, "values": {}, "file": "flatness/2-10-19-after.json", "arrays": None, "seconds": 1.0}
    write_record(folder, {**record, "flatness": [entry]})
    assert "in the run it had 99" in refused(f"run={folder}", "measure=loss", *SMALL)


def model_of(hook: Path) -> Any:
    return json.loads(hook.read_text())["vision"]["model"]


def test_only_what_the_authors_code_raises_is_told_as_theirs(tmp_path: Path) -> None:
    tree, folder = tmp_path / "tree", tmp_path / "run"
    (folder / "work").mkdir(parents=True)
    (tree / "their_utils").mkdir(parents=True)
    (tree / "their_utils" / "broken.py").write_text("raise ValueError('no images')")
    run = trained_images.ImageRun(folder, {"engine": "upstream"}, UPSTREAMS["inflora"], {}, {})
    run.__dict__["_tree"] = tree  # as if it were built
    for module, told in (("broken", "(ValueError: no images)"), ("missing", "(ModuleNotFoundError: ")):
        with pytest.raises(UserError, match="the authors' code stops") as stopped, trained_images._code_of(run):
            importlib.import_module(f"their_utils.{module}")
        assert told in str(stopped.value)
    with pytest.raises(KeyError, match="ours"), trained_images._code_of(run):
        raise KeyError("ours")


# --- upstream's code


SCOPES = ("adapter", "merged", "trainable")


@pytest.fixture(scope="module", params=["inflora", "cllora", "sdlora"])
def upstream_runs(
    request: pytest.FixtureRequest,
    warm: Callable[..., Path],
    upstream: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a folder with three runs in the authors' code, all measured inside: without SAM, with it, another seed."""
    upstream({"inflora": "InfLoRA", "cllora": "CL-LoRA", "sdlora": "SD-LoRA"}[request.param])
    output = tmp_path_factory.mktemp(request.param)
    epochs: dict[str, tuple[str, ...]] = {
        "inflora": ("upstream.epochs=2", "upstream.init_epoch=2"),  # its schedule wants two
        "cllora": ("upstream.init_epochs=1",),
        "sdlora": (
            "upstream.epochs=1",
            "upstream.init_epoch=1",
            "upstream.shuffle=false",
        ),  # or each seed has its order
    }
    for name, more in {"off": ("sam=off",), "sam": ("sam=sam", "rho=0.5"), "seed": ("sam=off", "seed=1")}.items():
        words = [f"method={request.param}", "engine=upstream", *TWO_TASKS, *epochs[request.param], *more]
        measure = ("measure=loss", f"measure_scope={','.join(SCOPES)}", "measure_when=after", *SMALL)
        with runs_by(warm(IMAGES)):
            execute(make_plan(parse([*words, f"output={output}", f"run={name}", *measure])), show=False)
    return output


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("figures")
def test_models_of_upstreams_code_are_rebuilt_as_they_were_measured(
    upstream_runs: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("off", "sam"):
        check_same_losses(upstream_runs / name, SCOPES)
        check_batching(upstream_runs / name)
    losses = {name: finished_losses(upstream_runs / name) for name in ("off", "sam")}
    assert losses["off"]["adapter"] != pytest.approx(losses["sam"]["adapter"], rel=1e-4)
    run = f"run={upstream_runs / 'off'},{upstream_runs / 'sam'}"
    assert main(["measure", run, "measure=loss", f"output={tmp_path / 'line'}", *SMALL]) == 0
    found = json.loads((tmp_path / "line" / verb.COMPARISON).read_text())["scopes"]
    for scope in ("adapter", "merged"):
        assert found[scope]["losses"][0] == pytest.approx(losses["off"][scope], rel=1e-4)
        assert found[scope]["losses"][-1] == pytest.approx(losses["sam"][scope], rel=1e-4)
    other = f"{run},{upstream_runs / 'seed'}"
    if upstream_runs.name.startswith("cllora"):
        moved = tmp_path / "moved"
        shutil.copytree(upstream_runs / "sam", moved, symlinks=True)
        config = json.loads((moved / "work" / CONFIG).read_text())
        config |= {"general_pos": config["specfic_pos"], "specfic_pos": config["general_pos"]}
        (moved / "work" / CONFIG).write_text(json.dumps(config))
        record = read_record(moved)
        write_record(moved, {**record, "flatness": []})  # the losses are those of the model before it was moved
        apart = f"run={upstream_runs / 'off'},{moved}"
        assert "may be put together differently" in refused(apart, *SMALL)
        monkeypatch.setattr(trained_images.ImageRun, "check_companion", lambda *_: None)
        assert "moved, scope adapter: the model has loss" in refused(apart, *SMALL)
        # Its configuration shuffles the classes by the seed.
        assert "learned their classes in different orders" in refused(other, *SMALL)
        return
    assert main(["measure", other, "measure=loss", "measure_scope=adapter", f"output={tmp_path / 'p'}", *SMALL]) == 0
    found = json.loads((tmp_path / "p" / verb.COMPARISON).read_text())["scopes"]["adapter"]["losses"]
    losses["seed"] = finished_losses(upstream_runs / "seed")
    assert found == pytest.approx({name: each["adapter"] for name, each in losses.items()}, rel=1e-4)


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_upstreams_models_need_is_told(upstream_runs: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "off"
    shutil.copytree(upstream_runs / "off", folder, symlinks=True)
    second = folder / "tasks/all/models/2.safetensors"
    whole = second.read_bytes()
    second.unlink()
    assert "the model that it kept of task 2" in (text := refused(f"run={folder}", *SMALL)) and "is gone" in text
    done = folder / "tasks/all/done.json"
    noted = json.loads(done.read_text())
    del noted["files"]["tasks/all/models/2.safetensors"]
    done.write_text(json.dumps(noted))
    assert "kept no model of task 2. Runs of earlier versions" in refused(f"run={folder}", *SMALL)
    tensors = load_file(shutil.copy(folder / "tasks/all/models/1.safetensors", second))
    name = next(name for name in tensors if "lora_A" in name or "linear_a" in name)
    save_file({name: tensors[name][:, :-1].contiguous()}, second, metadata={"trained": json.dumps([name])})
    models = sorted(second.parent.iterdir())
    note_hashes(folder, "all", *models)
    assert "of another model" in refused(f"run={folder}", *SMALL)
    second.write_bytes(whole)
    assert "2.safetensors is not the file that the run left" in refused(f"run={folder}", *SMALL)
    note_hashes(folder, "all", *models)
    record = read_record(folder)
    write_record(folder, {**record, "upstream": {**record["upstream"], "patched_tree": "0" * 40}})
    assert "ran the patched tree 000000000000 of" in refused(f"run={folder}", *SMALL)
    write_record(folder, record)
    config = folder / "work" / CONFIG
    told = config.read_text()
    config.write_text(told.replace("flatpatch_quick", "no_such_images"))
    assert "the authors' code stops (NotImplementedError" in refused(f"run={folder}", *SMALL)


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_whose_repository_is_gone_is_told(
    upstream_runs: Path,
    refused: Callable[..., str],
    no_submodules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("FLATPATCH_THIRD_PARTY", str(tmp_path))
    assert "is not here. Looked in" in refused(f"run={upstream_runs / 'off'}", *SMALL)


# --- the space between models with a classifier


def classified(seed: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.startswith("2."):
            parameter.data.normal_()
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("scope", ["adapter", "merged"])
def test_others_move_the_classifier_with_the_factors(scope: str) -> None:
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3)]
    loss = supervised_loss(nn.functional.cross_entropy)
    first, second = (
        Problem(model, batches, loss, scope=find_scope(model, scope, others=True))
        for model in (classified(1), classified(2))
    )
    assert first.scope.others == ("2.weight", "2.bias")
    assert first.scope.names[-2:] == first.scope.others
    point = model_point(first, second)
    with torch.no_grad():
        for variable, value in zip(first.variables, first.unflatten(point), strict=True):
            variable.copy_(value)
    assert first.loss() == pytest.approx(second.loss(), rel=1e-12)
    # Without it the classifier counts as a base, and another one is refused.
    alone = [Problem(model, batches, loss, scope=scope) for model in (classified(1), classified(2))]
    with pytest.raises(UserError, match="another base"):
        model_point(*alone)


def test_nothing_is_left_behind_by_a_refusal(make_run: MakeRun, refused: Callable[..., str]) -> None:
    """``refused`` looks at the folders of all runs, before and afterwards."""
    first, second = make_run("first", 1), make_run("second", 2)
    assert "Did you mean" in refused(f"run={first}", "task=10-1")
    same = make_run("same", 1)
    assert "the same point" in refused(f"run={first},{same}", *SMALL)
    # What was measured in a run does not fit: found after the models were rebuilt, in the second run or the last task.
    entry: dict[str, Any] = {"task": "10-19", "task_index": 1, "when": "after", "scope": "adapter", "samples": 6}
    entry |= {"loss": 99.0, "values": {}, "file": "flatness/2-10-19-after.json", "arrays": None, "seconds": 1.0}
    write_record(second, {**read_record(second), "flatness": [entry]})
    assert "in the run it had 99" in refused(f"run={first},{second}", "measure=loss", *SMALL)
    assert "in the run it had 99" in refused(f"run={second}", "measure=loss", "task=all", *SMALL)

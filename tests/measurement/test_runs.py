"""Runs that are measured: the same training bit for bit, entries in the record, kept when the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.reference import StepRecorder
from flatpatch.families.sample import images_sample_of, sample_of
from flatpatch.families.text import reference
from flatpatch.families.vision import reference as vision
from flatpatch.families.vision.reference.__main__ import loss_of
from flatpatch.flatness import supervised_loss
from flatpatch.measurement import files
from flatpatch.measurement.in_run import Measurer
from flatpatch.measuring import make_request
from flatpatch.report.records import read_record
from flatpatch.runner.resolve import make_plan, parse
from tests import reference_cases
from tests.reference_images import make_reference
from tests.text_benchmark import small_benchmark
from tests.upstream.test_neutrality_text import Runs, Warm, assert_same, ready

__all__ = ["ready"]  # the fixture
pytestmark = pytest.mark.timeout(600)

TINY = ("upstream.num_train_epochs=1", "upstream.per_device_train_batch_size=16", "measure_samples=4")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reference")
    data = reference_cases.make_data(folder / "data")
    return reference_cases.make_model(folder / "t5", dropout=0.2), data


def learn(places: tuple[Path, Path], output: Path, *requests: tuple[str, str]) -> dict[str, Any]:
    """Train tasks of the reference engine with dropout, each measured as asked, and return all that came of it."""
    found: dict[str, Any] = {"losses": [], "weights": [], "predictions": [], "entries": []}
    previous = None
    for index, (kinds, scopes) in enumerate(requests):
        task = reference_cases.make_task(*places, output / str(index), index, lora_dropout=0.3)
        task = replace(task, previous=previous)
        asked = make_request(kinds, scopes, samples=6, batch=4, rho=0.05, effort="quick", live_every=2)
        measure = None if asked is None else {"request": asked.as_dict(), "folder": str(output / files.FOLDER)}
        measurer = Measurer({"measure": measure})

        def at(
            when: str, model: Any, examples: Any, collate: Any, measurer: Measurer = measurer, k: int = index
        ) -> None:
            name = reference_cases.TASKS[k][1]
            measured = {"task_index": k, "task": name, "model": model, "sample": sample_of(examples, collate)}
            found["entries"] += measurer.at(when, **measured)
            if when == "before":
                measurer.begin(**measured)
            else:
                measurer.end()

        def on_step(state: dict[str, Any], measurer: Measurer = measurer) -> None:
            found["losses"].append(state["loss"])
            measurer.step(state["step"])

        reference.run_task(task, on_step=on_step, at=at)
        previous = task.output_dir / "adapter"
        found["weights"].append((previous / "adapter.safetensors").read_bytes())
        found["predictions"].append((task.output_dir / "predictions.jsonl").read_text())
    found["generator"] = torch.get_rng_state()
    return found


def test_measured_reference_run_is_bit_for_bit_the_same(places: tuple[Path, Path], tmp_path: Path) -> None:
    plain = learn(places, tmp_path / "plain", ("", ""), ("", ""))
    measured = learn(
        places, tmp_path / "measured", ("trace,ledger", "adapter,merged"), ("sam,slice,ledger,live", "adapter")
    )
    followed = json.loads((tmp_path / "measured" / files.FOLDER / "2-moods-live.json").read_text())
    assert followed["error"] is None and followed["live"]["scope"] == "adapter"
    taken = len(plain["losses"]) - len(plain["losses"]) // 2
    assert followed["live"]["measured"] == list(range(2, taken + 1, 2))
    ledger = json.loads((tmp_path / "measured" / files.FOLDER / "2-moods-ledger.json").read_text())
    (row,) = ledger["ledger"]["earlier"]
    # The earlier adapter is frozen and a new one begins at zero: the function is what it was after the first task.
    assert row["losses"][0] == pytest.approx(measured["entries"][2]["loss"], rel=1e-5)
    assert row["task"] == "topics" and row["steps"][-1] == len(plain["losses"]) - len(plain["losses"]) // 2
    assert plain["entries"] == [] and len(plain["losses"]) > 4
    assert measured["losses"] == plain["losses"]
    assert measured["weights"] == plain["weights"]
    assert measured["predictions"] == plain["predictions"]
    assert torch.equal(measured["generator"], plain["generator"])
    seen = [(entry["task_index"], entry["when"], entry["scope"]) for entry in measured["entries"]]
    first = [(0, when, scope) for when in ("before", "after") for scope in ("adapter", "merged")]
    assert seen == [*first, (1, "before", "adapter"), (1, "after", "adapter")]
    factors, merged = measured["entries"][:2]
    assert factors["loss"] == pytest.approx(merged["loss"], rel=1e-5)  # one function, in float32
    assert all(math.isfinite(entry["loss"]) for entry in measured["entries"])
    assert all("slice_mean_rise" in entry["values"] for entry in measured["entries"][4:])


def record_run(places: tuple[Path, Path], output: Path, at_loss: float) -> tuple[list[float], bytes]:
    """Train a task of the reference engine with dropout, SAM and its recorder, and return losses and weights."""
    output.mkdir()
    asked = make_request("loss", "adapter", "after", samples=6, batch=4, rho=0.05, effort="quick", at_loss=at_loss)
    assert asked is not None
    by = "flatpatch.measurement.in_run:Measurer"
    run = {
        **{"task": "topics", "task_index": 0, "metrics": output / "metrics.jsonl"},
        **{"progress": output / "progress.json", "summary": output / "summary.json"},
        "sam": {"kind": "sam", "rho": 0.05, "eta": 0.01, "scope": "lora", "ascent_loss": "total", "seed": 1},
        "measure": {"request": asked.as_dict(), "folder": output / files.FOLDER, "by": by},
    }
    task = reference_cases.make_task(*places, output / "task", lora_dropout=0.3, num_train_epochs=3)
    with StepRecorder(run) as recorder:
        reference.run_task(
            task,
            make_gradients=recorder.make_gradients,
            on_step=recorder.on_step,
            at=lambda when, model, examples, collate: recorder.measure(
                when, model, sample_of(examples, collate), 0, "topics"
            ),
        )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], (output / "task" / "adapter" / "adapter.safetensors").read_bytes()


def test_measuring_at_a_loss_is_done_at_its_step_and_leaves_the_training_bit_for_bit_as_it_was(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    losses, weights = record_run(places, tmp_path / "plain", 0.0)
    means = [sum(losses[k - 10 : k]) / 10 for k in range(10, len(losses) + 1)]
    wanted = means[3]
    step = 10 + next(k for k, mean in enumerate(means) if mean <= wanted)
    assert record_run(places, tmp_path / "measured", wanted) == (losses, weights)
    folder = tmp_path / "measured" / files.FOLDER
    assert json.loads((folder / "1-topics-at_loss.json").read_text())["step"] == step
    assert json.loads((folder / "1-topics-after.json").read_text())["step"] is None
    assert record_run(places, tmp_path / "never", 1e-3) == (losses, weights)
    assert [path.name for path in (tmp_path / "never" / files.FOLDER).iterdir()] == ["1-topics-after.json"]


def record_images(output: Path, at_loss: float) -> tuple[list[float], list[bytes]]:
    """Train two tasks of the reference engine for images, as its process does, and return losses and weights."""
    output.mkdir()
    kinds = "loss,ledger,live" if at_loss else "loss"
    how: dict[str, Any] = {"samples": 6, "batch": 4, "rho": 0.05, "effort": "quick", "live_every": 10}
    asked = make_request(kinds, "trainable", "after", **how, at_loss=at_loss)
    assert asked is not None
    by = "flatpatch.measurement.in_run:Measurer"
    run = {
        **{"task": None, "task_index": None, "metrics": output / "metrics.jsonl"},
        **{"progress": output / "progress.json", "summary": output / "summary.json"},
        "sam": {"kind": "off"},
        "measure": {"request": asked.as_dict(), "folder": output / files.FOLDER, "by": by},
    }
    images = make_reference(output / "logs", method="seqlora", init_cls=4, increment=4, epochs=4)
    with StepRecorder(run) as recorder:

        def measure(when: str, state: vision.TaskState) -> None:
            task = state.tasks[state.index]
            sample = images_sample_of(task.train, task.classes.start)
            loss = supervised_loss(torch.nn.functional.cross_entropy)
            recorder.measure(when, state.model, sample, state.index, f"task{state.index}", loss_of, loss=loss)

        vision.run(
            images,
            make_gradients=recorder.make_gradients,
            on_step=lambda state: recorder.on_step(state, f"task{state['task']}"),
            before_task=lambda state: measure("before", state),
            after_task=lambda state: measure("after", state),
        )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = sorted((output / "logs" / "tasks").glob("*.safetensors"))
    return [line["loss"] for line in lines], [path.read_bytes() for path in weights]


def test_image_run_is_measured_at_the_loss_in_each_task_and_trains_as_without(tmp_path: Path) -> None:
    plain = record_images(tmp_path / "plain", 0.0)
    assert len(plain[0]) == 48 and len(plain[1]) == 2
    assert record_images(tmp_path / "measured", 1e9) == plain
    points = {path.name: json.loads(path.read_text()) for path in (tmp_path / "measured" / files.FOLDER).glob("*.json")}
    (row,) = points.pop("2-task1-ledger.json")["ledger"]["earlier"]
    followed = [points.pop(name)["live"] for name in ("1-task0-live.json", "2-task1-live.json")]
    assert [task["measured"] for task in followed] == [[10, 20]] * 2 and followed[1]["losses"][1] > 0
    # By the first task's own head, which the second leaves as it is.
    assert row["losses"][0] == pytest.approx(points["1-task0-after.json"]["scopes"]["trainable"]["loss"], rel=1e-5)
    steps = {name: point["step"] for name, point in points.items()}
    assert steps == {
        **{"1-task0-at_loss.json": 10, "1-task0-after.json": None},
        **{"2-task1-at_loss.json": 10, "2-task1-after.json": None},
    }
    assert all(point["error"] is None for point in points.values())


@pytest.mark.slow
def test_measured_run_has_entries_a_table_and_figures_and_keeps_them_when_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_benchmark(tmp_path / "data", train=8, test=4)
    words = ["run", "profile=quick", "engine=reference", "device=cpu", "tasks=dbpedia,amazon", f"data={data}"]
    words += [f"output={tmp_path}", "run=measured", "measure=trace,ledger,update", "measure_scope=adapter", *TINY]
    words += ["measure_samples=12", "measure_at_loss=0.001", "measure_ledger_every=1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    short = [f"measure_samples=12, and {task} has 8 training examples" for task in ("dbpedia", "amazon")]
    assert all(shown.count(f"WARNING: {text}: measured on all of them") == 1 for text in short)
    noted = [note.split(":")[0] for note in read_record(tmp_path / "measured")["notes"]]
    assert [note for note in noted if "training examples" in note] == short
    never = [f"task {k} {task} never came down to it" for k, task in ((1, "dbpedia"), (2, "amazon"))]
    assert all(shown.count(text) == 1 for text in never)
    assert [sum(text in note for note in read_record(tmp_path / "measured")["notes"]) for text in never] == [1, 1]
    assert "flatness around" in shown and "measuring before task 1 dbpedia, adapter" in shown
    folder = tmp_path / "measured"
    record = read_record(folder)
    assert [(entry["task"], entry["when"]) for entry in record["flatness"]] == [
        *(("dbpedia", "before"), ("dbpedia", "after")),
        *(("amazon", "before"), ("amazon", "after")),
    ]
    assert all((folder / entry["file"]).is_file() for entry in record["flatness"])
    assert (folder / "figures" / "flatness_adapter_over_tasks.png").is_file()
    assert (folder / "figures" / "flatness_ledger.png").is_file()
    assert all(("update_curvature" in entry["values"]) == (entry["when"] == "after") for entry in record["flatness"])
    ledger = json.loads((folder / "flatness" / "2-amazon-ledger.json").read_text())
    assert ledger["error"] is None and ledger["ledger"]["earlier"][0]["samples"] == 8
    # As a run that was cut off in its second task.
    (folder / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    (folder / "tasks" / "2-amazon" / "done.json").unlink()
    kept = (folder / "flatness" / "1-dbpedia-after.json").read_bytes()
    assert main(words) == 0
    assert (folder / "flatness" / "1-dbpedia-after.json").read_bytes() == kept
    again = read_record(folder)
    assert again["restarts"] == 1
    values = [[{**entry, "seconds": 0} for entry in each["flatness"]] for each in (record, again)]
    assert values[0] == values[1]
    again_kept = json.loads((folder / "flatness" / "2-amazon-ledger.json").read_text())
    assert {**again_kept, "seconds": 0} == {**ledger, "seconds": 0}


def test_several_processes_are_refused_before_anything_starts(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    upstream("N-LoRA")
    words = ["method=nlora", "profile=quick", "engine=upstream", "device=cpu", "processes=2", f"output={tmp_path}"]
    with pytest.raises(UserError, match="measure=loss works in one process, and this run has 2"):
        make_plan(parse([*words, "measure=loss"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["seqlora_clip", "inflora"])
def test_ledger_is_refused_where_earlier_losses_cannot_be_had(
    method: str, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    if method == "inflora":
        upstream("InfLoRA")
    engine = {"seqlora_clip": "reference", "inflora": "upstream"}[method]
    words = [f"method={method}", "profile=quick", f"engine={engine}", "device=cpu", f"output={tmp_path}"]
    with pytest.raises(UserError, match=r"measure=ledger follows the losses of earlier tasks, which .* does not give"):
        make_plan(parse([*words, "measure=loss,ledger"]))
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_settings_are_told_with_the_others() -> None:
    with pytest.raises(UserError) as error:
        parse(["measure=trase", "rho=-1"])
    assert "Did you mean 'trace'" in str(error.value) and "rho=-1" in str(error.value)


@pytest.mark.third_party
@pytest.mark.slow
def test_measured_run_of_upstreams_code_is_bit_for_bit_the_same(
    ready: Callable[[str], None], warm: Warm, tmp_path: Path
) -> None:
    """With N-LoRA's own dropout; what is measured before the second task has the first one's factors frozen in it."""
    ready("nlora")
    runs = Runs(warm, tmp_path, "method=nlora", "sam=sam", "rho=0.05")
    plain = runs.patched("plain")
    asked = ("measure=eigenvalues,sam,slice,ledger", "measure_samples=2", "measure_batch=2", "measure_ledger_every=1")
    measured = runs.patched("measured", *asked)
    assert_same(measured, plain)
    entries = read_record(tmp_path / "measured")["flatness"]
    assert len(entries) == 8
    ledger = json.loads(next((tmp_path / "measured" / files.FOLDER).glob("2-*-ledger.json")).read_text())
    (row,) = ledger["ledger"]["earlier"]
    learned = next(entry["loss"] for entry in entries if (entry["task_index"], entry["when"]) == (0, "after"))
    assert ledger["error"] is None and row["losses"][0] == pytest.approx(learned, rel=1e-5)
    assert all(entry["values"]["top_eigenvalue"] > 0 for entry in entries)
    # Rebuilt from what upstream saved, in our layers, the model is the one that was measured in the run.
    assert main(["measure", f"run={tmp_path / 'measured'}", "measure=trace", *asked[1:3]]) == 0
    record = read_record(tmp_path / "measured")
    losses = {(e["when"], e["scope"]): e["loss"] for e in record["flatness"] if e["task_index"] == 1}
    for scope in ("adapter", "merged"):
        assert losses["finished", scope] == pytest.approx(losses["after", scope], rel=1e-5)

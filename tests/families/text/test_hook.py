"""What a patched upstream calls: neutral when off, exact records when on, loud when something is not as expected."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flatpatch import hooks
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families import recording
from flatpatch.kinds import KINDS
from flatpatch.measuring import Request
from flatpatch.sam import SAMTrainingStep, mixed_seed
from tests import sam_training

KEYS = {
    "task",
    "step",
    "loss",
    "perturbed_loss",
    "grad_norm",
    "perturbation_norm",
    "effective_perturbation_norm",
    "perturbation_cosine",
    "learning_rate",
    "seconds",
}


def description(folder, **sam):
    settings = {
        "kind": "sam",
        "rho": 0.5,
        "eta": 0.01,
        "scope": "lora",
        "sync": "local",
        "ascent_loss": "total",
        "seed": 0,
    }
    return {
        "schema": 1,
        "task_index": 1,
        "task": "amazon",
        "metrics": str(folder / "metrics.jsonl"),
        "progress": str(folder / "progress.json"),
        "summary": str(folder / "summary.json"),
        "sam": settings | sam,
        "adapters": "upstream",
    }


@pytest.fixture
def attached(tmp_path, monkeypatch):
    """Build a trainer, attach it to a run with these SAM settings, and return it."""

    def attach(sam=None, run=None, **settings):
        path = tmp_path / "hook.json"
        path.write_text(json.dumps(description(tmp_path, **(sam or {})) | (run or {})))
        monkeypatch.setenv("FLATPATCH_RUN", str(path))
        trainer = sam_training.make_trainer(tmp_path / "out", **settings)
        hooks.attach_trainer(trainer)
        return trainer

    return attach


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(weights(ours), weights(theirs), strict=True))


def test_without_a_run_the_hook_touches_nothing(monkeypatch):
    monkeypatch.delenv("FLATPATCH_RUN", raising=False)
    hooks.attach_trainer(object())


def test_importing_the_hooks_imports_neither_torch_nor_transformers():
    code = "import sys, flatpatch.hooks; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])


@pytest.mark.parametrize("gas", [1, 4])
def test_training_with_sam_off_is_bit_for_bit_the_same_and_recorded(tmp_path, attached, gas):
    plain = sam_training.make_trainer(tmp_path / "plain", gas=gas)
    plain.train()
    random_state = torch.get_rng_state()
    recorded = attached({"kind": "off"}, gas=gas)
    recorded.train()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(recorded, plain)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {key for key in KEYS if lines[0][key] is not None} == {"task", "step", "loss", "learning_rate", "seconds"}
    # Trainer's own mean over the steps of the losses it summed.
    mean = plain.state.log_history[-1]["train_loss"]
    assert sum(line["loss"] for line in lines) / 3 == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("kind", ["sam", "asam", "random"])
def test_rho_zero_is_bit_for_bit_the_same(tmp_path, attached, kind):
    plain = sam_training.make_trainer(tmp_path / "plain")
    plain.train()
    recorded = attached({"kind": kind, "rho": 0.0})
    recorded.train()
    assert same(recorded, plain)
    assert [line["loss"] for line in metrics(tmp_path)] == [line["perturbed_loss"] for line in metrics(tmp_path)]
    assert metrics(tmp_path)[0]["perturbation_cosine"] is None


@pytest.mark.parametrize(("kind", "settings"), [("sam", {}), ("asam", {"eta": 0.1}), ("sam", {"scope": "A"})])
def test_hook_trains_as_the_wrapped_step_does(tmp_path, attached, kind, settings):
    direct = sam_training.make_trainer(tmp_path / "direct")
    direct.training_step = SAMTrainingStep(direct, rho=0.5, adaptive=kind == "asam", **settings)
    direct.train()
    hooked = attached({"kind": kind} | settings)
    hooked.train()
    assert same(hooked, direct)


@pytest.mark.parametrize(
    ("asked", "kind", "options"),
    [
        ({"kind": "looksam", "options": {"looksam_k": 2, "looksam_alpha": 0.3}}, ("looksam", 2, 0.3), {}),
        ({"kind": "sam", "radius": "effective"}, ("sam",), {"radius": "effective"}),
        ({"kind": "sam", "ascent_batch": 0.5}, ("sam",), {"ascent_batch": 0.5}),
    ],
)
def test_settings_of_a_kind_reach_the_step(tmp_path, attached, asked, kind, options):
    name, *values = kind
    plain = sam_training.make_trainer(tmp_path / "plain")
    plain.training_step = SAMTrainingStep(plain, rho=0.5, kind=KINDS[name]())
    plain.train()
    direct = sam_training.make_trainer(tmp_path / "direct")
    direct.training_step = SAMTrainingStep(direct, rho=0.5, kind=KINDS[name](*values), **options)
    direct.train()
    hooked = attached(asked)
    hooked.train()
    assert same(hooked, direct) and not same(hooked, plain)


def test_random_directions_follow_from_the_runs_seed_and_the_task(tmp_path, attached):
    direct = sam_training.make_trainer(tmp_path / "direct")
    direct.training_step = SAMTrainingStep(direct, rho=0.5, random_seed=mixed_seed(4, 1))
    direct.train()
    hooked = attached({"kind": "random", "seed": 4})
    hooked.train()
    assert same(hooked, direct)
    assert json.loads((tmp_path / "summary.json").read_text())["sam"].startswith("random directions rho=0.5")
    assert [line["perturbation_norm"] for line in metrics(tmp_path)] == pytest.approx([0.5] * 3, rel=1e-6)
    other = attached({"kind": "random", "seed": 4}, {"task_index": 0})
    other.train()
    assert not same(other, direct)


def test_every_step_is_measured(tmp_path, attached):
    attached(steps=23, learning_rate=0.02).train()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 24))
    for line in lines:
        assert line.keys() == KEYS
        assert line["task"] == "amazon"
        assert line["perturbed_loss"] > line["loss"] > 0
        assert line["perturbation_norm"] == pytest.approx(0.5, rel=1e-6)
        assert line["effective_perturbation_norm"] == pytest.approx(0.5, rel=1e-5)
        assert line["perturbation_cosine"] == pytest.approx(1.0, abs=1e-9)
        assert line["learning_rate"] == 0.02
        assert 0 < line["seconds"] < 60


@pytest.mark.parametrize("gas", [1, 2])
def test_measuring_at_a_loss_the_ledger_and_live_change_nothing_of_the_training(tmp_path, attached, gas):
    """Any loss is at or below this one, so that it is reached after ten steps."""
    kinds = ("loss", "ledger", "live")
    how = {"samples": 4, "batch": 3, "at_loss": 1e9, "ledger_every": 5, "live_every": 4, "live_samples": 4}
    request = Request(kinds, ("adapter",), ("after",), **how)
    by = "flatpatch.measurement.in_run:Measurer"
    measure = {"request": request.as_dict(), "folder": str(tmp_path / "flatness"), "by": by}
    seen = []
    for run in ({}, {"measure": measure, "task_index": 0, "task": "dbpedia"}, {"measure": measure}):
        trainer = attached(run=run, gas=gas, steps=12)
        trainer.train()
        seen.append((trainer, [line["loss"] for line in metrics(tmp_path)], torch.get_rng_state()))
    (plain, losses, state), *others = seen
    for measured, same_losses, same_state in others:
        assert same(measured, plain) and losses == same_losses and torch.equal(state, same_state)
    ledger = json.loads((tmp_path / "flatness" / "2-amazon-ledger.json").read_text())
    (row,) = ledger["ledger"]["earlier"]
    assert (row["task"], row["steps"]) == ("dbpedia", [5, 10, 12])
    points = {path.name: json.loads(path.read_text()) for path in (tmp_path / "flatness").glob("2-*.json")}
    assert points.pop("2-amazon-ledger.json")["error"] is None
    followed = points.pop("2-amazon-live.json")["live"]
    assert followed["measured"] == [4, 8, 12] and followed["restarted"] == [4]
    assert {name: point["step"] for name, point in points.items()} == {
        "2-amazon-at_loss.json": 10,
        "2-amazon-after.json": None,
    }
    found = [point["scopes"]["adapter"]["loss"] for point in points.values()]
    assert None not in found and found[0] != found[1]
    same_examples = [points[f"2-amazon-{when}.json"]["scopes"]["adapter"]["loss"] for when in ("at_loss", "after")]
    assert row["losses"][2:] == pytest.approx(same_examples, rel=1e-5)
    assert followed["losses"][2] == pytest.approx(same_examples[1], rel=1e-5)


def test_measurements_of_micro_batches_are_those_of_the_whole_step(tmp_path, attached):
    attached(gas=4, steps=1, dropout=0.0).train()
    (line,) = metrics(tmp_path)
    assert line["perturbation_norm"] == pytest.approx(0.5, rel=1e-6)  # a mean, not a sum
    plain = sam_training.make_trainer(tmp_path / "plain", gas=4, steps=1, dropout=0.0)
    plain.train()
    assert line["loss"] == pytest.approx(plain.state.log_history[-1]["train_loss"], rel=1e-6)


def test_learning_rate_is_the_one_the_step_used(tmp_path, attached):
    attached(steps=4, learning_rate=0.02, lr_scheduler_type="linear").train()
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_summary_tells_what_was_perturbed(tmp_path, attached):
    trainer = attached({"scope": "B"})
    trainer.train()
    sizes = {
        letter: sum(p.numel() for n, p in trainer.model.named_parameters() if f"lora_{letter}" in n) for letter in "AB"
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 3,
        "ascent_fallbacks": 0,
        "trainable_parameters": sizes["A"] + sizes["B"],
        "perturbed_parameters": sizes["B"],
        "sam": "SAM rho=0.5 scope=B sync=local ascent_loss=total",
        "launcher": "plain",
        "dtype": "float32",
        "threads": 1,
    }


def test_ascents_that_were_not_finite_are_counted_and_recorded(tmp_path, attached):
    trainer = attached(dropout=0.0)
    plain, calls = trainer.compute_loss, []

    def compute_loss(model, inputs):
        calls.append(1)
        return plain(model, inputs) * (float("inf") if len(calls) == 3 else 1.0)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert json.loads((tmp_path / "summary.json").read_text())["ascent_fallbacks"] == 1
    second = metrics(tmp_path)[1]
    assert second["loss"] is None and second["grad_norm"] is None  # JSON has no infinity
    assert second["perturbation_norm"] == 0.0
    assert second["perturbed_loss"] > 0


def test_start_is_announced_in_one_line(attached, capsys):
    attached().train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flatpatch: ")]
    assert lines == [
        "flatpatch: SAM rho=0.5 scope=lora sync=local ascent_loss=total "
        "on 1,152 of 1,152 trainable parameters (float32), task 2 amazon"
    ]


def test_progress_follows_training_and_prediction(tmp_path, attached, monkeypatch):
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_PROGRESS", 0.0)
    written = []
    write = recording.write_atomically

    def writing(path, text, **options):
        if path.name == "progress.json":
            written.append(json.loads(text))
        write(path, text, **options)

    monkeypatch.setattr(recording, "write_atomically", writing)
    trainer = attached(per_device_eval_batch_size=16)
    trainer.train()
    trainer.predict(sam_training.examples())
    trainer.evaluate(sam_training.examples(16))
    steps = [(entry["phase"], entry["step"], entry["total"]) for entry in written]
    training = [("train", step, 3) for step in (0, 1, 2, 3, 3)]
    assert steps == [*training, ("predict", 1, 2), ("predict", 2, 2), ("predict", 1, 1)]
    assert written[0]["loss"] is None
    assert written[4]["loss"] == pytest.approx(metrics(tmp_path)[-1]["loss"])
    assert json.loads((tmp_path / "progress.json").read_text()) == written[-1]


def test_what_follows_the_training_is_told_as_prediction_before_its_first_batch(tmp_path, attached):
    """Saving and loading take long, and so does the first batch."""
    trainer = attached(do_predict=True)
    trainer.train()
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        **{"phase": "predict", "step": 0, "total": None, "loss": None}
    }


def test_a_new_run_replaces_the_record_of_an_interrupted_one(tmp_path, attached):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n{"st')
    attached().train()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert metrics(tmp_path)[0]["loss"] < 99


def test_a_resumed_training_continues_the_record_after_its_checkpoint(tmp_path, attached, monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **(kwargs | {"weights_only": False})))
    whole = attached(steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    expected = metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"task": "amaz')  # killed while writing
    resumed = attached(steps=6, model=sam_training.tiny_t5(seed=9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for ours, theirs in zip(metrics(tmp_path), expected, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_only_the_first_process_writes(tmp_path, attached, monkeypatch):
    monkeypatch.setattr(sam_training.PenaltyTrainer, "is_world_process_zero", lambda self: False)
    attached().train()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "summary.json").exists()


def test_fp32_adapters_survive_a_cast_of_the_model(attached):
    trainer = attached(run={"adapters": "fp32"})
    trainer.model.bfloat16()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("missing", ["training_step", "compute_loss", "add_callback"])
def test_trainer_without_what_the_hook_needs_is_refused(tmp_path, monkeypatch, missing):
    path = tmp_path / "hook.json"
    path.write_text(json.dumps(description(tmp_path)))
    monkeypatch.setenv("FLATPATCH_RUN", str(path))
    names = {"training_step", "compute_loss", "add_callback", "is_world_process_zero"} - {missing}
    trainer = SimpleNamespace(**{name: lambda *_: True for name in names})
    with pytest.raises(FlatpatchError, match=f"SimpleNamespace has no {missing}"):
        hooks.attach_trainer(trainer)


def test_empty_scope_stops_before_the_first_step(tmp_path, attached):
    trainer = attached({"scope": "head"})
    with pytest.raises(UserError, match="scope=head chooses no weight"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, expected 1"),
        ({"sam": 3}, "sam=3: Input should be a valid dictionary"),
        ({"sam": {"kind": "sgd"}}, r"sam.kind='sgd': Input should be 'off', 'sam', 'asam', 'random', .* or 'recorded'"),
        ({"sam": {"rho": -1}}, r"sam.rho=-1: Input should be greater than or equal to 0"),
        ({"sam": {"rho": True}}, r"sam.rho=True: Input should be a valid number"),
        ({"sam": {"rh": 1}}, r"unknown key 'rh'. Did you mean 'rho'\?"),
        ({"adapters": "fp16"}, r"adapters='fp16': Input should be 'upstream' or 'fp32'"),
        ({"metric": "x"}, r"unknown key 'metric'. Did you mean 'metrics'\?"),
    ],
)
def test_description_that_is_not_valid_is_refused(tmp_path, monkeypatch, change, message):
    run = description(tmp_path)
    for key, value in change.items():
        run[key] = run[key] | value if isinstance(value, dict) else value
    path = tmp_path / "hook.json"
    path.write_text(json.dumps(run))
    monkeypatch.setenv("FLATPATCH_RUN", str(path))
    with pytest.raises(UserError, match=message):
        hooks.attach_trainer(object())


def test_all_mistakes_of_a_description_are_reported_at_once(tmp_path, monkeypatch):
    run = description(tmp_path, kind="sgd", rho="big")
    del run["task"]
    path = tmp_path / "hook.json"
    path.write_text(json.dumps(run))
    monkeypatch.setenv("FLATPATCH_RUN", str(path))
    with pytest.raises(UserError, match=r"(?s)3 problems.*has no 'task'.*sam.kind.*sam.rho='big'"):
        hooks.attach_trainer(object())


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_description_that_cannot_be_read_is_refused(tmp_path, monkeypatch, text):
    path = tmp_path / "hook.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FLATPATCH_RUN", str(path))
    with pytest.raises(UserError, match="FLATPATCH_RUN=.*hook.json"):
        hooks.attach_trainer(object())

"""A Hugging Face Trainer that was cut off goes on from its checkpoint as if it had not been."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flatpatch import hooks
from flatpatch.families.text import resuming
from tests import resumed_ranks, sam_training
from tests.families.text.test_hook import description, metrics, weights
from tests.sam.test_launchers import zero


class Cut(Exception):
    """Ends a training in mid-step, as a kill would."""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains in a folder, cut off at a call of the loss, and returns the trainer."""

    def run(name, *, kind="sam", cut=0, every=2, kept=True, **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        part = {
            "folder": str(folder / "checkpoints"),
            "stop": str(folder / "stop"),
            "every_seconds": None,
            "every_steps": every,
            "made_by": {"kind": kind},
        }
        content = description(folder, kind=kind) | ({"checkpoints": part} if kept else {})
        (folder / "hook.json").write_text(json.dumps(content))
        monkeypatch.setenv("FLATPATCH_RUN", str(folder / "hook.json"))
        trainer = sam_training.make_trainer(folder / "out", **{"logging_steps": 3, **settings})
        plain, calls = trainer.compute_loss, []

        def compute_loss(*args, **kwargs):
            calls.append(1)
            if len(calls) == cut:
                raise Cut
            return plain(*args, **kwargs)

        trainer.compute_loss = compute_loss
        hooks.attach_trainer(trainer)
        trainer.train()
        return trainer

    return run


def told(trainer):
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{name: value for name, value in row.items() if name not in times} for row in trainer.state.log_history]


def lines(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in metrics(folder)]


CASES = [
    # 32 examples in batches of 4: 8 micro-batches an epoch
    ("off", {"steps": 12}, (6, 9, 12)),
    ("sam", {"steps": 10, "lr_scheduler_type": "linear"}, (5, 18)),
    ("random", {"steps": 9, "gas": 3}, (27, 40)),  # an epoch ends within a step
    ("fsam", {"steps": 5}, (9,)),
]


@pytest.mark.parametrize(("kind", "settings", "cuts"), CASES)
def test_trainer_cut_off_anywhere_goes_on_as_if_it_had_not_been(kind, settings, cuts, train, tmp_path):
    undisturbed = train("undisturbed", kind=kind, kept=False, **settings)
    after = torch.get_rng_state()
    for cut in cuts:
        name = f"cut at {cut}"
        with pytest.raises(Cut):
            train(name, kind=kind, cut=cut, **settings)
        assert (tmp_path / name / "checkpoints").is_dir()
        again = train(name, kind=kind, **settings)
        assert all(torch.equal(p, q) for p, q in zip(weights(again), weights(undisturbed), strict=True))
        assert lines(tmp_path / name) == lines(tmp_path / "undisturbed")
        assert told(again) == told(undisturbed)
        assert torch.equal(torch.get_rng_state(), after)
        ours, theirs = (each.optimizer.state_dict()["state"] for each in (again, undisturbed))
        assert all(torch.equal(ours[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs)
        assert (again.state.epoch, again.state.total_flos) == (undisturbed.state.epoch, undisturbed.state.total_flos)


def test_steps_that_are_passed_over_compute_nothing(train, tmp_path):
    with pytest.raises(Cut):
        train("cut", cut=13, steps=8)
    trainer = train("cut", steps=8)
    # Two passes of two steps: the checkpoint is of step 6.
    assert len(trainer.passes) == 4


def test_writing_checkpoints_changes_no_number(train, tmp_path):
    with_, without = train("with", every=1, steps=5), train("without", kept=False, steps=5)
    assert all(torch.equal(p, q) for p, q in zip(weights(with_), weights(without), strict=True))
    assert lines(tmp_path / "with") == lines(tmp_path / "without")
    assert told(with_) == told(without)


def test_trainer_that_is_asked_to_stop_exits_with_85_after_the_step(train, tmp_path):
    undisturbed = train("undisturbed", kept=False, steps=5)
    (tmp_path / "asked").mkdir()
    for step in (1, 2):
        (tmp_path / "asked" / "stop").touch()
        with pytest.raises(SystemExit) as stopped:
            train("asked", steps=5, every=100)
        assert stopped.value.code == 85
        assert max(path.name for path in (tmp_path / "asked" / "checkpoints").iterdir()) == f"{step:09d}"
        assert json.loads((tmp_path / "asked" / "progress.json").read_text())["heeds_stop"] is True
        (tmp_path / "asked" / "stop").unlink()
    again = train("asked", steps=5, every=100)
    assert all(torch.equal(p, q) for p, q in zip(weights(again), weights(undisturbed), strict=True))


def test_training_that_had_ended_is_not_repeated(train, tmp_path):
    first = train("ended", steps=4, every=4)
    again = train("ended", steps=4, every=4)
    assert not hasattr(again, "passes")
    assert told(again) == told(first)
    assert all(torch.equal(p, q) for p, q in zip(weights(again), weights(first), strict=True))
    assert lines(tmp_path / "ended")[-1]["step"] == 4


class Powers:
    """Keeps the powers of beta as DeepSpeed's Adam for the CPU does in C++ (cpu_adam.h, 0.15.4), in float32."""

    def __init__(self):
        self.step, self.power = 0, np.float32(1)

    def adam_update(self, opt_id, step, lr, beta1, *_):
        self.step += 1
        if self.step == step:
            self.power *= np.float32(beta1)
        else:
            self.step, self.power = step, np.float32(beta1) ** np.float32(step)


@pytest.mark.parametrize("count", [1, 3])
def test_adam_for_the_cpu_is_counted_up_as_it_would_have_counted(count):
    weights = [torch.zeros(2) for _ in range(count)]
    group = {"params": weights, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    groups = [group | {"bias_correction": True}]

    def optimizer(steps):
        taken = {weight: {"step": steps} for weight in weights}
        return SimpleNamespace(param_groups=groups, state=taken, ds_opt_adam=Powers(), opt_id=0)

    undisturbed, resumed = optimizer(31), optimizer(31)
    for step in range(1, 32):
        for _ in weights:
            undisturbed.ds_opt_adam.adam_update(0, step, 0.1, 0.9)
    resumed.ds_opt_adam.adam_update(0, 1, 0.1, 0.9)  # as DeepSpeed does when it makes the state
    for _ in weights[1:]:
        resumed.ds_opt_adam.adam_update(0, 1, 0.1, 0.9)
    resuming._count_up(resumed, [1] * count)
    assert vars(resumed.ds_opt_adam) == vars(undisturbed.ds_opt_adam)
    if count == 1:
        assert undisturbed.ds_opt_adam.power != np.float32(0.9) ** np.float32(31), "else there is nothing to test"


RANKS = {
    "ddp, accumulating": {"sam": "random", "gas": 2},
    "zero 2": {"sam": "sam", "deepspeed": zero(2)},
    "zero 2, bf16": {"sam": "sam", "deepspeed": zero(2, bf16={"enabled": True}), "bf16": True},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("ranks")
    return sam_training.run_ranks(folder, 2, RANKS, script=resumed_ranks.__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_processes_that_were_cut_off_go_on_as_if_they_had_not_been(name, ranks):
    for rank, found in enumerate(ranks[name]):
        assert found["passed"] == 5, "the checkpoint's step"
        for part in ("weights", "optimizer", "random", "told"):
            assert found["resumed"][part] == found["undisturbed"][part], (rank, part)
    assert ranks[name][0]["resumed"]["lines"] == ranks[name][0]["undisturbed"]["lines"]
    assert len(ranks[name][0]["resumed"]["lines"]) == 10

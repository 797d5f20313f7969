"""A training that was cut off and goes on from its checkpoint is the undisturbed one, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatpatch.errors import Interrupted
from flatpatch.families import resuming
from flatpatch.families.reference import StepRecorder
from flatpatch.families.resuming import Keeper, random_state, set_random_state
from flatpatch.families.training import TrainingResult, batches, descend
from flatpatch.families.vision.reference.vit import LoRALinear

STATE = resuming.state_file(0)
STEPS, EPOCHS, ACCUMULATED = 12, 3, 2


class Cut(Exception):
    """Ends a training in mid-step, as a kill would."""


class Model(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B, self.dropout = nn.Linear(5, 8), nn.Linear(8, 1), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.dropout(torch.tanh(self.A(x)))).square().mean()  # type: ignore[no-any-return]


class Factors(nn.Module):
    """The same with LoRA's names."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(5, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.dropout = nn.Dropout(0.3)

    @property
    def A(self) -> nn.Module:  # noqa: N802
        return self.lora_A

    @property
    def B(self) -> nn.Module:  # noqa: N802
        return self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.dropout(torch.tanh(self.A(x)))).square().mean()  # type: ignore[no-any-return]


class Adapted(nn.Module):
    """A frozen layer with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = LoRALinear(torch.randn(8, 5), None, rank=2), nn.Dropout(0.3)
        self.layer.weight.requires_grad_(False)
        self.A, self.B = self.layer.lora_A, self.layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.layer(x))).square().mean()  # type: ignore[no-any-return]


MODELS: dict[str, type[nn.Module]] = {"nbar": Factors, "bilora": Adapted}


def description(folder: Path, kind: str, **checkpoints: Any) -> dict[str, Any]:
    settings = {"kind": kind, "rho": 0.3, "eta": 0.01, "scope": "all", "ascent_loss": "total", "seed": 3}
    part = {
        "folder": str(folder / "checkpoints"),
        "stop": str(folder / "stop"),
        "every_seconds": None,
        "every_steps": 3,
        "made_by": {"seed": 3},
    }
    files = {name: str(folder / f"{name}.jsonl") for name in ("metrics", "progress", "summary")}
    run = {**files, "task": "a", "task_index": 0, "sam": settings, "measure": None}
    return run | ({} if checkpoints.get("none") else {"checkpoints": part | checkpoints})


def train(folder: Path, kind: str, *, cut: float = 0, **checkpoints: Any) -> tuple[TrainingResult, nn.Module]:
    """Train as a process would that has just started; ``cut`` is the step, and .5 between its ascent and descent."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    model: Any = MODELS.get(kind, Model)()
    examples = list(torch.randn(32, 5, generator=torch.Generator().manual_seed(1)))
    task: Any = SimpleNamespace(per_device_train_batch_size=4, num_train_epochs=EPOCHS)
    optimizer = torch.optim.AdamW(
        [{"params": model.A.parameters(), "name": "A"}, {"params": model.B.parameters(), "name": "B"}], lr=0.05
    )
    with StepRecorder(description(folder, kind, **checkpoints), resumes=True) as recorder:
        recorder.measure("before", model, lambda _: pytest.fail("nothing is measured"), 0, "a")
        step = recorder.keeper.step if recorder.keeper else 0
        calls = 0

        def objective(batch: dict[str, Tensor]) -> tuple[Tensor, None]:
            nonlocal calls
            calls += 1
            passes = ACCUMULATED * (1 if kind in ("off", "nbar", "bilora") else 2)
            if cut and calls > (cut - 1 - step) * passes:
                raise Cut
            # Python's and numpy's numbers decide too, as in augmentation.
            return model(batch["x"]) * (1 + random.random() + np.random.random()), None

        result = descend(
            model,
            optimizer,
            batches(examples, lambda few: {"x": torch.stack(few)}, task),
            objective,
            total=STEPS,
            accumulated=ACCUMULATED,
            max_grad_norm=1.0,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            make_gradients=recorder.make_gradients,
            on_step=recorder.on_step,
            keeper=recorder.keeper,
        )
    return result, model


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def assert_same(ours: tuple[TrainingResult, nn.Module], theirs: tuple[TrainingResult, nn.Module]) -> None:
    assert ours[0].mean_loss == theirs[0].mean_loss
    for p, q in zip(ours[1].parameters(), theirs[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["off", "sam", "random", "nbar", "fsam", "bilora"])
def test_training_cut_off_anywhere_goes_on_as_if_it_had_not_been(kind: str, tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "undisturbed", kind, none=True)
    after = random_state()["torch"]
    # Before the first checkpoint, right behind one, in mid-step, at the end of an epoch, in the last step; 4 steps are
    # an epoch, and a checkpoint comes after every third.
    for cut in (2, 4, 7.5, 9.5, 12.5):
        folder = tmp_path / str(cut)
        with pytest.raises(Cut):
            train(folder, kind, cut=cut)
        assert_same(train(folder, kind), undisturbed)
        assert lines(folder) == lines(tmp_path / "undisturbed")
        assert torch.equal(random_state()["torch"], after)


def test_training_that_is_cut_off_again_and_again_comes_to_the_same_end(tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "undisturbed", "sam", none=True)
    for cut in (3, 5.5, 8, 10.5):
        with pytest.raises(Cut):
            train(tmp_path / "cut", "sam", cut=cut, every_steps=1)
    assert_same(train(tmp_path / "cut", "sam", every_steps=1), undisturbed)
    assert lines(tmp_path / "cut") == lines(tmp_path / "undisturbed")


def test_writing_checkpoints_changes_no_number(tmp_path: Path) -> None:
    assert_same(train(tmp_path / "with", "sam", every_steps=1), train(tmp_path / "without", "sam", none=True))
    assert lines(tmp_path / "with") == lines(tmp_path / "without")


def test_process_that_is_asked_to_stop_writes_a_checkpoint_and_exits_with_85(tmp_path: Path) -> None:
    tmp_path.joinpath("stop").touch()
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "sam")
    assert stopped.value.code == Interrupted.exit_code == 85
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    assert not (tmp_path / "summary.jsonl").exists()
    tmp_path.joinpath("stop").unlink()
    undisturbed = train(tmp_path / "undisturbed", "sam", none=True)
    assert_same(train(tmp_path, "sam"), undisturbed)


def test_checkpoint_of_other_settings_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Cut):
        train(tmp_path, "sam", cut=5)
    undisturbed = train(tmp_path / "undisturbed", "sam", none=True)
    capsys.readouterr()
    assert_same(train(tmp_path, "sam", made_by={"seed": 4}), undisturbed)
    assert "it was made by another training (different: seed)" in capsys.readouterr().out


def test_torn_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Cut):
        train(tmp_path, "sam", cut=7.5)
    torn = tmp_path / "checkpoints" / "000000006"
    (torn / STATE).write_bytes((torn / STATE).read_bytes()[:100])
    capsys.readouterr()
    result = train(tmp_path, "sam")
    said = capsys.readouterr().out
    assert f"the checkpoint {torn} cannot be used: {STATE} was altered" in said
    assert "goes on after step 3" in said
    assert_same(result, train(tmp_path / "undisturbed", "sam", none=True))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_checkpoint_that_cannot_be_written_is_one_message_and_loses_nothing(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = resuming.write_checkpoint

    def fail(place: Path, step: int, *args: Any, **more: Any) -> Any:
        if step == 6:
            raise OSError(number, "it cannot be")
        return write(place, step, *args, **more)

    monkeypatch.setattr(resuming, "write_checkpoint", fail)
    result = train(tmp_path, "sam")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert "the checkpoint after step 6 was not written" in warning
    assert "it cannot be. The training goes on; a restart would go on from the one after step 3." in warning
    assert_same(result, train(tmp_path / "undisturbed", "sam", none=True))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000000009", "000000012"]


def test_place_that_takes_no_files_is_said_and_the_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    result = train(tmp_path, "off", every_steps=12)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert "the checkpoint after step 12 was not written: " in warning
    assert warning.endswith("The training goes on; a restart would go on from the start.")
    assert_same(result, train(tmp_path / "undisturbed", "off", none=True))


def test_disk_that_is_full_is_said_and_the_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "checkpoints"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(Cut):
            train(tmp_path, "sam", cut=5)
        with contextlib.suppress(OSError):  # as full as it gets
            (disk / "of others").write_bytes(bytes(128 * 1024))
        capsys.readouterr()
        result = train(tmp_path, "sam")
        said = capsys.readouterr().out
        assert "goes on after step 3" in said
        assert "WARNING: the checkpoint after step 6 was not written: [Errno 28] No space left on device" in said
        (disk / "of others").unlink()
        assert [path.name for path in disk.iterdir()] == ["000000003"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert_same(result, train(tmp_path / "undisturbed", "sam", none=True))


def test_random_state_that_was_put_back_gives_the_numbers_that_would_have_come() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.random(), np.random.randn(), torch.rand(3).tolist()

    draw()  # gauss and randn each keep a second number
    kept = random_state()
    expected = draw()
    set_random_state(kept)
    assert draw() == expected


def test_parts_that_were_added_are_put_back_in_their_order(tmp_path: Path) -> None:
    part = description(tmp_path, "off")["checkpoints"] | {"every_steps": 1}
    keeper = Keeper(part)
    keeper.add("one", lambda: [1, 2.5, "a", None], lambda kept: None)
    keeper.step_ended(4)
    seen: list[Any] = []
    again = Keeper(part)
    assert again.step == 4
    again.add("one", list, seen.append)
    again.go_on()
    assert seen == [[1, 2.5, "a", None]]

"""A step's seconds, in every recorder: the device's own time for the whole step, read when the records are written.

The device of these tests is a counter: work adds to it at once, as to a queue, and the clock reads it.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flatpatch import hooks, timing
from flatpatch.families import recording, training
from flatpatch.families.vision import hook as loop
from flatpatch.families.vision import places as images
from flatpatch.upstreams import cllora
from tests import sam_training
from tests.families.vision.test_hook import TwoSteps, batches, learner, train_two_steps

FETCH, FORWARD, UPDATE = 100.0, 3.0, 1.0


class Device:
    """Counts the seconds of work that it was given, and how often somebody waited for it."""

    def __init__(self) -> None:
        self.work, self.waits = 0.0, 0

    def moment(self, _: object) -> SimpleNamespace:
        at = self.work

        def seconds_until(later: SimpleNamespace) -> float:
            self.waits += 1
            return later.at - at

        return SimpleNamespace(at=at, seconds_until=seconds_until)

    def add(self, work: float) -> None:
        self.work += work

    def updates(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_pre_hook(lambda *_: self.add(UPDATE))
        return optimizer

    def forwards(self, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(lambda *_: self.add(FORWARD))
        return model

    def fetches(self, data: list) -> list:
        device = self

        class Fetching(list):
            def __iter__(self):
                for each in super().__iter__():
                    device.add(FETCH)
                    yield each

        return Fetching(data)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing, "Moment", device.moment)
    # Otherwise the records are also written when half a second has passed.
    monkeypatch.setattr(recording.Recorder, "progress_due", lambda self: False)
    return device


def started(folder, monkeypatch, sam, more=()):
    settings = {
        "kind": "sam",
        "rho": 0.1,
        "eta": 0.01,
        "scope": "lora",
        "sync": "local",
        "ascent_loss": "total",
        "seed": 0,
    }
    run = {
        "schema": 1,
        "task_index": 1,
        "task": "amazon",
        **{name: str(folder / name) for name in ("metrics", "progress", "summary")},
        "sam": settings | sam,
        "adapters": "upstream",
        **dict(more),
    }
    (folder / "hook.json").write_text(json.dumps(run))
    monkeypatch.setenv("FLATPATCH_RUN", str(folder / "hook.json"))


def seconds(folder):
    return [json.loads(line)["seconds"] for line in (folder / "metrics").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "passes"), [("off", 1), ("sam", 2)])
def test_trainers_step_is_timed_from_its_first_batch_to_its_update(tmp_path, monkeypatch, device, kind, passes):
    started(tmp_path, monkeypatch, {"kind": kind})
    trainer = sam_training.make_trainer(tmp_path / "out", steps=4, gas=2)
    device.forwards(trainer.model)
    collate, create = trainer.data_collator, trainer.create_optimizer_and_scheduler
    trainer.data_collator = lambda examples: device.add(FETCH) or collate(examples)

    def create_and_count(*args, **kwargs):
        create(*args, **kwargs)
        device.updates(trainer.optimizer)

    trainer.create_optimizer_and_scheduler = create_and_count
    hooks.attach_trainer(trainer)
    waits = []
    trainer.add_callback(Ending(lambda: waits.append(device.waits)))
    trainer.train()
    assert waits == [0, 0, 0, 0]
    # Of its two batches the first is there when it begins.
    assert seconds(tmp_path) == [FETCH + 2 * passes * FORWARD + UPDATE] * 4
    assert device.waits == 4


class Ending(sam_training.TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, *args, **kwargs):
        self.call()


@pytest.fixture
def image_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_trainings", [])
    monkeypatch.setattr(cllora, "_kept_versions", [])
    images.read_run.cache_clear()
    places = dict.fromkeys(("device", "data", "weights", "workers", "model", "dataset"))

    def start(**sam):
        more = {"task_index": None, "task": None, "tasks": ["0-3", "4-7"], "vision": places | {"sam_on": "both"}}
        started(tmp_path, monkeypatch, sam, more.items())

    yield start
    images.read_run.cache_clear()


def test_image_loops_steps_are_timed_whole_and_the_second_begins_where_the_first_ends(tmp_path, device, image_run):
    image_run()
    network = TwoSteps()
    original = network.student
    network.student = lambda inputs: device.add(FORWARD) or original(inputs)
    device.forwards(network)
    optimizer = device.updates(torch.optim.SGD(network.parameters(), lr=0.1))
    optimizer.register_step_post_hook(lambda *_: waits.append(device.waits))
    waits = []
    train_two_steps(network, device.fetches(batches(3, dtype=torch.float32)), optimizer)
    assert waits == [0] * 6
    # Distillation: its two passes and the task loss's first; task: the second pass of its own.
    assert seconds(tmp_path) == [3 * FORWARD + UPDATE, FORWARD + UPDATE] * 3
    assert device.waits == 6


def test_seconds_of_an_image_loop_are_of_the_device_of_its_weights(tmp_path, monkeypatch, image_run):
    image_run(kind="off")
    asked = []
    original = timing.Moment
    monkeypatch.setattr(timing, "Moment", lambda device: asked.append(device) or original(device))
    network = TwoSteps()
    data = batches(1, dtype=torch.float32)
    hooks.begin_task(learner(network), optimizer := torch.optim.SGD(network.parameters(), lr=0.1), data, 1)
    hooks.first_pass()
    loss = network(data[0][0])["logits"].sum()
    loss.backward()
    hooks.second_pass(optimizer, loss, lambda: None)
    optimizer.step()
    hooks.end_task()
    assert asked == [torch.device("cpu")] * 2


def test_reference_engines_step_is_timed_from_its_first_batch_to_its_update(device):
    model = device.forwards(nn.Linear(4, 1))
    optimizer = device.updates(torch.optim.SGD(model.parameters(), lr=0.1))
    stream = iter(device.fetches([torch.randn(2, 4) for _ in range(6)]))
    spans = []
    result = training.descend(
        model,
        optimizer,
        stream,
        lambda batch: (model(batch).square().mean(), None),
        total=3,
        accumulated=2,
        on_step=lambda state: spans.append(state["seconds"]),
    )
    assert device.waits == 1  # for the whole task's time, at its end
    step = FETCH + 2 * FORWARD + UPDATE
    assert [float(span) for span in spans] == [step] * 3
    assert result.seconds == 3 * (FETCH + step)


def test_cuda_moments_are_events_in_the_devices_stream_and_waited_for_only_when_read(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append(("record", stream))
            self.at = 250.0 * len(log)

        def synchronize(self):
            log.append(("wait", self.at))

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device.index}")
    device = SimpleNamespace(type="cuda", index=3)
    span = timing.Span(timing.Moment(device), timing.Moment(device))
    assert log == [("record", "stream of 3")] * 2
    assert float(span) == 0.25
    assert log[2:] == [("wait", 500.0)]


def test_seconds_on_a_cpu_are_those_of_the_clock():
    began = timing.Moment(torch.device("cpu"))
    time.sleep(0.02)
    span = timing.Span(began, timing.Moment(torch.device("cpu")))
    time.sleep(0.05)
    assert 0.02 <= float(span) < 0.05


@pytest.mark.gpu
def test_work_of_known_length_on_a_gpu_is_timed_without_waiting_for_it():
    device = torch.device("cuda")
    cycles = 200_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    known = time.perf_counter() - start
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = time.perf_counter()
        began = timing.Moment(device)
        torch.cuda._sleep(cycles)
        span = timing.Span(began, timing.Moment(device))
        queued = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert queued < known / 4
    assert float(span) == pytest.approx(known, rel=0.1)


@pytest.mark.gpu
def test_image_loops_step_on_a_gpu_takes_as_long_as_its_work(tmp_path, image_run):
    image_run(kind="off")
    cycles, network = 200_000_000, TwoSteps().cuda()
    data = [(inputs.cuda(), targets.cuda()) for inputs, targets in batches(3, dtype=torch.float32)]
    network.lora_A.register_forward_pre_hook(lambda *_: torch.cuda._sleep(cycles))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    hooks.begin_task(learner(network), optimizer, data, 1)
    for inputs, targets in data:
        hooks.first_pass()
        loss = nn.functional.cross_entropy(network(inputs)["logits"], targets)
        loss.backward()
        hooks.second_pass(optimizer, loss, lambda: None)
        optimizer.step()
    torch.cuda.synchronize()
    known = time.perf_counter() - start
    hooks.end_task()
    assert sum(seconds(tmp_path)) == pytest.approx(known, rel=0.2)
    assert min(seconds(tmp_path)) > known / 6

"""The hooks in a loop written out by hand, on small loops of our own: exact steps, exact restoring, honest records."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatpatch import hooks
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.vision import hook as loop
from flatpatch.families.vision import places as images
from flatpatch.measuring import Request
from flatpatch.sam import mixed_seed
from flatpatch.upstreams import cllora


class Network(nn.Module):
    """A frozen layer with a LoRA pair, dropout and a head; a further head that no loss depends on."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 4, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = self.base(inputs) + self.lora_B(self.lora_A(self.dropout(inputs)))
        return {"logits": self.head(torch.tanh(hidden))}


def description(folder, sam_on="both", **sam):
    settings = {
        "kind": "sam",
        "rho": 0.1,
        "eta": 0.01,
        "scope": "lora",
        "sync": "local",
        "ascent_loss": "total",
        "seed": 0,
    }
    vision = {"device": None, "data": None, "weights": None, "workers": None, "model": None, "dataset": None}
    return {
        "schema": 1,
        "task_index": None,
        "task": None,
        "tasks": ["0-2", "3-5"],
        **{name: str(folder / file) for name, file in (("metrics", "metrics.jsonl"), ("progress", "progress.json"))},
        "summary": str(folder / "summary.json"),
        "sam": settings | sam,
        "adapters": "upstream",
        "vision": vision | {"sam_on": sam_on},
    }


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a run with these settings; a process has only one, so each test begins without."""
    monkeypatch.setattr(loop, "_trainings", [])
    monkeypatch.setattr(cllora, "_kept_versions", [])

    def start(more=None, **settings):
        run = description(tmp_path, **settings) | (more or {})
        path = tmp_path / "hook.json"
        path.write_text(json.dumps(run))
        monkeypatch.setenv("FLATPATCH_RUN", str(path))
        images.read_run.cache_clear()

    yield start
    images.read_run.cache_clear()


def learner(network, task=0):
    return SimpleNamespace(_network=network, _cur_task=task, args={"seed": 7})


def batches(count=3, size=5, dtype=torch.float64):
    torch.manual_seed(1)
    return [(torch.randn(size, 4, dtype=dtype), torch.randint(0, 3, (size,))) for _ in range(count)]


def train(network, data, optimizer, task=0, again=None, who=None):
    """The shape of InfLoRA's loop."""
    hooks.begin_task(who or learner(network, task), optimizer, data, 1)
    for inputs, targets in data:
        hooks.first_pass()
        loss = cross_entropy(network(inputs)["logits"], targets)
        optimizer.zero_grad()
        loss.backward()
        recompute = again or (lambda: hooks.classification_loss(network, inputs, targets))  # noqa: B023
        hooks.second_pass(optimizer, loss, recompute)
        optimizer.step()
    hooks.end_task()


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def copies(network):
    return [parameter.detach().clone() for parameter in network.parameters()]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def dense_gradient(network, chosen, data, perturbation):
    """Gradient over all trained weights with the chosen ones moved; the old weights are put back."""
    before = [weight.detach().clone() for weight in chosen]
    with torch.no_grad():
        for weight, change in zip(chosen, perturbation, strict=True):
            weight += change
    inputs, targets = data
    loss = cross_entropy(network(inputs)["logits"], targets)
    gradients = torch.autograd.grad(loss, trained(network), allow_unused=True)
    with torch.no_grad():
        for weight, old in zip(chosen, before, strict=True):
            weight.copy_(old)
    return gradients


@pytest.mark.parametrize("scope", ["lora", "A", "B", "head", "all"])
@pytest.mark.parametrize("kind", ["sam", "asam"])
def test_a_step_descends_with_the_gradient_at_the_perturbed_weights(started, scope, kind):
    network = Network().double()
    data = batches(1)
    chosen = [p for name, p in network.named_parameters() if p.requires_grad and in_scope(name, scope)]
    zero = [torch.zeros_like(p) for p in chosen]
    at_w = dict(zip(trained(network), dense_gradient(network, chosen, data[0], zero), strict=True))
    gradients = [torch.zeros_like(p) if at_w[p] is None else at_w[p] for p in chosen]
    if kind == "sam":
        step = gradients
    else:
        step = [(p.detach().abs() + 0.01) * g for p, g in zip(chosen, gradients, strict=True)]
    norm = torch.cat([s.flatten() for s in step]).norm()
    if kind == "asam":
        step = [(p.detach().abs() + 0.01) * s for p, s in zip(chosen, step, strict=True)]
    moved = dense_gradient(network, chosen, data[0], [0.1 * s / norm for s in step])
    expected = [p.detach() if g is None else p.detach() - 0.5 * g for p, g in zip(trained(network), moved, strict=True)]
    started(kind=kind, scope=scope)
    train(network, data, torch.optim.SGD(network.parameters(), lr=0.5))
    for ours, theirs in zip(trained(network), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_a_step_along_a_random_direction_descends_with_the_gradient_found_there(started, scope):
    """The direction is the normal one of the run's seed, the task and the step; its norm is SAM's."""
    network = Network().double()
    data = batches(1)
    chosen = [p for name, p in network.named_parameters() if in_scope(name, scope) and p.requires_grad]
    chosen = [p for p in chosen if all(p is not unused for unused in network.unused.parameters())]
    generator = torch.Generator().manual_seed(mixed_seed(mixed_seed(8, 1, 0), 0))
    sizes = [p.numel() for p in chosen]
    z = torch.empty(sum(sizes), dtype=torch.float64).normal_(generator=generator)
    step = [part.view(p.shape) for part, p in zip((0.1 * z / z.norm()).split(sizes), chosen, strict=True)]
    moved = dense_gradient(network, chosen, data[0], step)
    expected = [p.detach() if g is None else p.detach() - 0.5 * g for p, g in zip(trained(network), moved, strict=True)]
    started(kind="random", scope=scope, seed=8)
    train(network, data, torch.optim.SGD(network.parameters(), lr=0.5), task=1)
    for ours, theirs in zip(trained(network), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def in_scope(name, scope):
    factor = name[5] if name.startswith("lora_") else "head"
    return {"lora": factor != "head", "all": True}.get(scope, factor == scope)


def test_groups_own_rho_scales_its_part_of_one_perturbation(started, tmp_path):
    network = Network().double()
    (data,) = batches(1)
    A, B = network.lora_A.weight, network.lora_B.weight
    gradients = torch.autograd.grad(cross_entropy(network(data[0])["logits"], data[1]), [A, B])
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    rest = [p for p in trained(network) if p is not A and p is not B]
    started()
    groups = [{"params": [A], "rho": 0.7}, {"params": [B, *rest]}]
    train(network, [data], torch.optim.SGD(groups, lr=0.5))
    expected = (0.49 * gradients[0].square().sum() + 0.01 * gradients[1].square().sum()).sqrt() / norm
    assert metrics(tmp_path)[0]["perturbation_norm"] == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    "settings", [{"kind": "off"}, *({"kind": kind, "rho": 0.0} for kind in ("sam", "asam", "random"))]
)
def test_training_without_a_perturbation_is_bit_for_bit_the_same_with_dropout_on(started, monkeypatch, settings):
    def run(hooked):
        torch.manual_seed(3)
        network = Network(dropout=0.4)
        if hooked:
            started(**settings)
        else:
            monkeypatch.delenv("FLATPATCH_RUN", raising=False)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1, weight_decay=0.01)
        train(network, batches(dtype=torch.float32), optimizer)
        return copies(network), torch.get_rng_state(), optimizer.state_dict()["state"]

    (plain, state, moments), (ours, our_state, our_moments) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))
    assert torch.equal(our_state, state)
    assert our_moments.keys() == moments.keys()  # no state for weights without a gradient
    assert all(torch.equal(our_moments[n]["exp_avg"], moments[n]["exp_avg"]) for n in moments)


def test_both_passes_have_the_same_dropout_masks(started, tmp_path):
    network = Network(dropout=0.5)
    started(rho=1e-12)
    train(network, batches(8, dtype=torch.float32), torch.optim.SGD(network.parameters(), lr=0.0))
    for line in metrics(tmp_path):
        assert line["perturbed_loss"] == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_weights_and_modes_are_as_before_when_the_second_pass_fails(started, where):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no memory")

    network = Network()
    before = copies(network)
    (data,) = batches(1, dtype=torch.float32)
    moved = []

    def again():
        moved.append(not torch.equal(network.lora_B.weight, before[3]))
        if where == "forward":
            raise RuntimeError("no memory")
        return Fails.apply(hooks.classification_loss(network, *data))

    started()
    with pytest.raises(RuntimeError, match="no memory"):
        train(network, [data], torch.optim.SGD(network.parameters(), lr=0.1), again=again)
    assert moved == [True]
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


class TwoSteps(nn.Module):
    """As CL-LoRA: a distillation step moves A and the head between the task loss's forward and backward pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(4, 4, bias=False)
        self.lora_B = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def student(self, inputs):
        return self.head(torch.tanh(self.lora_A(self.dropout(inputs))))

    def forward(self, inputs):
        return {"logits": self.head(torch.tanh(self.lora_B(torch.tanh(self.lora_A(self.dropout(inputs))))))}


def train_two_steps(network, data, optimizer, *, reweigh=3.0, task=1):
    """The shape of CL-LoRA's loop."""
    hooks.begin_task(learner(network, task), optimizer, data, 1, 2)
    for inputs, targets in data:
        cllora.keep_versions(optimizer)
        hooks.first_pass()
        loss = cross_entropy(network(inputs)["logits"], targets)

        def distillation(inputs=inputs):
            return network.student(inputs).square().mean()

        hooks.first_pass("distillation")
        other = distillation()
        optimizer.zero_grad()
        other.backward()
        hooks.second_pass(optimizer, other, distillation, "distillation")
        network.lora_A.weight.grad = reweigh * network.lora_A.weight.grad
        optimizer.step()
        cllora.forget_the_step()
        optimizer.zero_grad()
        loss.backward()
        hooks.second_pass(
            optimizer,
            loss,
            lambda inputs=inputs, targets=targets: hooks.classification_loss(network, inputs, targets),
        )
        optimizer.step()
    hooks.end_task()


def mixed_gradient(network, before, after, data):
    """The task loss's gradient with the forward pass at some weights and the backward pass at others."""
    put(network, before)
    loss = cross_entropy(network(data[0])["logits"], data[1])
    with torch.autograd._unsafe_preserve_version_counter(tuple(network.parameters())):
        put(network, after)
    return torch.autograd.grad(loss, list(network.parameters()))


def put(network, values):
    with torch.no_grad():
        for weight, value in zip(network.parameters(), values, strict=True):
            weight.copy_(value)


def along(gradients, chosen, rho=0.1):
    """The perturbation that the chosen gradients give; zero for the other weights."""
    norm = torch.cat([g.flatten() for g, c in zip(gradients, chosen, strict=True) if c]).norm()
    return [rho * g / norm if c else torch.zeros_like(g) for g, c in zip(gradients, chosen, strict=True)]


@pytest.mark.parametrize("sam_on", ["both", "task", "distillation"])
@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_the_two_steps_of_a_batch_are_those_of_the_formulas(started, sam_on, rho):
    network = TwoSteps().double()
    names = [name for name, _ in network.named_parameters()]
    lora = [name.startswith("lora") for name in names]
    rate, w0 = 0.3, copies(network)
    (data,) = batches(1)

    def distillation_gradient():
        loss = network.student(data[0]).square().mean()
        found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(w0, found, strict=True)]

    gradients = distillation_gradient()
    if sam_on != "task":
        put(network, [w + e for w, e in zip(w0, along(gradients, lora, rho), strict=True)])
        gradients = distillation_gradient()
    gradients[0] = 3.0 * gradients[0]
    w1 = [w - rate * g for w, g in zip(w0, gradients, strict=True)]
    gradients = mixed_gradient(network, w0, w1, data)
    if sam_on != "distillation":
        step = along(gradients, lora, rho)
        before, after = ([w + e for w, e in zip(at, step, strict=True)] for at in (w0, w1))
        gradients = mixed_gradient(network, before, after, data)
    expected = [w - rate * g for w, g in zip(w1, gradients, strict=True)]
    put(network, w0)
    started(sam_on=sam_on, rho=rho)
    train_two_steps(network, [data], torch.optim.SGD(network.parameters(), lr=rate))
    for ours, theirs in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_two_steps_without_a_perturbation_are_bit_for_bit_the_same_with_dropout_on(started):
    results = []
    for settings in ({"kind": "off"}, {"rho": 0.0}):
        loop._trainings.clear()
        started(**settings)
        torch.manual_seed(3)
        network = TwoSteps(dropout=0.4)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        train_two_steps(network, batches(dtype=torch.float32), optimizer)
        results.append((*copies(network), torch.get_rng_state()))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_torch_refuses_the_step_between_forward_and_backward_unless_it_is_forgotten(started, monkeypatch):
    network = TwoSteps()
    monkeypatch.delenv("FLATPATCH_RUN", raising=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train_two_steps(network, batches(1, dtype=torch.float32), torch.optim.SGD(network.parameters(), lr=0.1))


def test_a_failed_second_pass_of_the_task_loss_puts_all_weights_back(started):
    network = TwoSteps()
    started()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    (data,) = batches(1, dtype=torch.float32)
    hooks.begin_task(learner(network, 1), optimizer, [data], 1, 2)
    hooks.first_pass()
    cross_entropy(network(data[0])["logits"], data[1]).backward()
    put(network, [weight + 1.0 for weight in copies(network)])  # the other step, head included
    before = copies(network)

    def fails():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        hooks.second_pass(optimizer, torch.zeros(()), fails)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_every_step_is_recorded(started, tmp_path, capsys):
    network = TwoSteps()
    started(sam_on="distillation", scope="A")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.25)
    train_two_steps(network, batches(12, dtype=torch.float32), optimizer)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["loss_name"] for line in lines] == ["distillation", "task"] * 12
    assert {(line["task"], line["seed"], line["learning_rate"]) for line in lines} == {("3-5", 7, 0.25)}
    for line in lines:
        assert 0 < line["seconds"] < 60
        perturbed = line["loss_name"] == "distillation"
        assert (line["perturbation_norm"] is not None) == perturbed
        assert (line["perturbed_loss"] is not None) == perturbed
        assert not perturbed or line["perturbation_norm"] == pytest.approx(0.1, rel=1e-6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    about = {"steps": 24, "ascent_fallbacks": 0, "trainable_parameters": 47, "perturbed_parameters": 16}
    assert {name: summary[name] for name in about} == about
    of_process = ("tasks", "threads")
    of_task = {"task": "3-5", "seed": 7} | {k: v for k, v in summary.items() if k not in of_process}
    assert (summary["tasks"], summary["threads"]) == ([of_task], torch.get_num_threads())
    progress = json.loads((tmp_path / "progress.json").read_text())
    # What upstream does after the training, features and predictions, is no training.
    assert progress == {"phase": "predict", "step": 0, "total": None, "loss": None, "task": "3-5"}
    assert (
        "\nflatpatch: SAM rho=0.1 scope=A sam_on=distillation on 16 of 47 trainable parameters (float32), "
        "3-5, seed 7\n" in capsys.readouterr().out
    )


def test_steps_are_counted_in_each_task_and_a_new_run_replaces_an_old_record(started, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n{"st')
    network = Network()
    started(kind="off")
    for task in range(2):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        train(network, batches(2, dtype=torch.float32), optimizer, task)
    lines = metrics(tmp_path)
    assert [(line["task"], line["step"]) for line in lines] == [
        ("0-2", 1),
        ("0-2", 2),
        ("3-5", 1),
        ("3-5", 2),
    ]
    measured = {"loss", "task", "step", "learning_rate", "seconds", "seed", "loss_name"}
    assert {name for name, value in lines[0].items() if value is not None} == measured
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4


def test_a_gradient_that_is_not_finite_gives_a_plain_step_and_is_counted(started, tmp_path):
    network = Network()
    started()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    (data,) = batches(1, dtype=torch.float32)
    hooks.begin_task(learner(network), optimizer, [data], 1)
    hooks.first_pass()
    loss = cross_entropy(network(data[0])["logits"], data[1])
    loss.backward()
    network.lora_A.weight.grad[0, 0] = float("inf")
    hooks.second_pass(optimizer, loss, lambda: hooks.classification_loss(network, *data))
    optimizer.step()
    hooks.end_task()
    (line,) = metrics(tmp_path)
    assert line["perturbation_norm"] == 0
    assert line["perturbed_loss"] == line["loss"]
    assert json.loads((tmp_path / "summary.json").read_text())["ascent_fallbacks"] == 1


class Images:
    """Five examples as upstream's data sets give them, with noise drawn anew each time."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(4, generator=generator) + 0.1 * torch.randn(4), 10 + index % 3


class Batches(list):
    dataset = Images()


def test_measuring_around_a_task_takes_its_loss_on_one_fixed_sample_and_changes_nothing(started, tmp_path):
    # Any loss is at or below this one, so that it is reached after ten of the twelve steps.
    how = {"samples": 4, "batch": 3, "at_loss": 1e9, "live_every": 6, "live_samples": 4}
    request = Request(kinds=("loss", "live"), scopes=("trainable",), **how).as_dict()
    results = []
    for measure in (
        None,
        {"request": request, "folder": str(tmp_path / "flatness"), "by": "flatpatch.measurement.in_run:Measurer"},
    ):
        loop._trainings.clear()
        torch.manual_seed(4)
        network = Network(dropout=0.3)
        start = copy.deepcopy(network)
        started({"measure": measure})
        who = learner(network)
        who._known_classes, who._total_classes = 10, 13
        data = Batches(batches(12, dtype=torch.float32))
        torch.manual_seed(5)
        train(network, data, torch.optim.SGD(network.parameters(), lr=0.5), who=who)
        results.append((*copies(network), torch.get_rng_state()))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    torch.manual_seed(0)
    indices = sorted(torch.randperm(5, generator=torch.Generator().manual_seed(0))[:4].tolist())
    items = [Images()[index] for index in indices]
    inputs, targets = torch.stack([image for _, image, _ in items]), torch.tensor([c - 10 for _, _, c in items])
    for model, when in ((start, "before"), (network, "after")):
        point = json.loads((tmp_path / "flatness" / f"1-0-2-{when}.json").read_text())
        assert point["error"] is None
        assert (point["indices"], point["batches"]) == (indices, [3, 1])
        expected = cross_entropy(model.eval()(inputs)["logits"], targets).item()
        assert point["scopes"]["trainable"]["loss"] == pytest.approx(expected, rel=1e-6)
    followed = json.loads((tmp_path / "flatness" / "1-0-2-live.json").read_text())["live"]
    assert followed["measured"] == [6, 12] and followed["steps"] == 12
    assert followed["losses"][1] == pytest.approx(point["scopes"]["trainable"]["loss"], rel=1e-6)
    within = json.loads((tmp_path / "flatness" / "1-0-2-at_loss.json").read_text())
    assert within["step"] == 10 and within["indices"] == indices
    assert within["scopes"]["trainable"]["loss"] != point["scopes"]["trainable"]["loss"]


def test_data_parallel_trains_as_the_bare_network_does(started):
    results = []
    for wrap in (lambda network: network, nn.DataParallel):
        torch.manual_seed(2)
        network = Network()
        loop._trainings.clear()
        started()
        train(wrap(network), batches(dtype=torch.float32), torch.optim.SGD(network.parameters(), lr=0.1))
        results.append(copies(network))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_an_empty_scope_stops_before_the_first_step(started, tmp_path):
    network = Network()
    network.lora_A.requires_grad_(False)
    started(scope="A")
    before = copies(network)
    with pytest.raises(UserError, match="scope=A chooses no weight"):
        train(network, batches(1, dtype=torch.float32), torch.optim.SGD(network.parameters(), lr=0.1))
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_a_scope_that_a_loss_does_not_depend_on_is_refused(started):
    network = TwoSteps()
    started(scope="B")
    with pytest.raises(UserError, match="the distillation loss depends on none of the 1 tensors that scope=B chooses"):
        train_two_steps(network, batches(1, dtype=torch.float32), torch.optim.SGD(network.parameters(), lr=0.1))


def test_a_loop_that_leaves_out_a_hook_is_refused(started):
    network = Network()
    started()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(FlatpatchError, match="before begin_task"):
        hooks.first_pass()
    hooks.begin_task(learner(network), optimizer, [0], 1)
    hooks.first_pass()
    with pytest.raises(FlatpatchError, match="without flatpatch.hooks.second_pass"):
        optimizer.step()
    with pytest.raises(FlatpatchError, match="without keep_versions"):
        cllora.forget_the_step()


class Learner:
    """What a learner of upstream's may hold: a network that grows, lists, its data; args of the process's own."""

    def __init__(self, args):
        self.args = args
        self._network = Network(dropout=0.5)
        self._network.heads = nn.ModuleList()
        self._cur_task = -1
        self.memory = []

    def learn(self, manager):
        self._cur_task += 1
        self.manager, self.loader = manager, torch.utils.data.DataLoader([0])
        self._network.heads.append(nn.Linear(4, 3))
        self._network.latest = self._network.heads[-1]
        optimizer = torch.optim.SGD(self._network.parameters(), lr=0.5)
        train(self._network, manager, optimizer, who=self)
        self.memory.append(self._network.heads[-1].weight)


class CutOff(Exception):
    pass


def learn_tasks(folder, log, cut_off_in=None, seeds=(7,)):
    """The shape of upstream's trainer, with the log that it writes."""
    args = {"calls": 0}
    for args["seed"] in seeds:  # noqa: B020 - as upstream's do
        handler = logging.FileHandler(folder / f"{args['seed']}.log")
        log.addHandler(handler)
        try:
            hooks.redirect_paths(args)
            log.warning("settings")
            data = batches(2, dtype=torch.float32)
            torch.manual_seed(args["seed"])
            who, curve, matrix = Learner(args), {"top1": []}, []
            for task in range(3):
                if hooks.done_before(who, task, curve, matrix):
                    continue
                who.learn(data)
                log.warning("task %s", task)
                if (args["seed"], task) == cut_off_in:
                    raise CutOff
                curve["top1"].append(task)
                matrix.append([float(torch.rand(()))])
                hooks.task_done(who, data)
            log.warning("%s %s", curve, matrix)
        finally:
            log.removeHandler(handler)
            handler.close()
    return who


def weights(who):
    return [*who._network.parameters(), *who.memory]


@pytest.mark.parametrize("cut_off_in", [(7, 0), (7, 1), (7, 2), (8, 0), (8, 2)])
def test_training_goes_on_after_the_last_task_that_was_done(cut_off_in, started, tmp_path, monkeypatch):
    log = logging.getLogger()
    keep = {"folder": str(tmp_path / "models"), "names": ".*"}
    made = {"folder": str(tmp_path / "checkpoints"), "made_by": {}, "stop": str(tmp_path / "stop")}
    tasks = {"tasks": ["0-2", "3-5", "6-8"], "keep": keep}

    def begin_process(**more):
        monkeypatch.setattr(loop, "_trainings", [])
        started(tasks | more, kind="random")

    begin_process()
    theirs = learn_tasks(tmp_path, log, seeds=(7, 8))
    names = ("7.log", "8.log", "summary.json", "metrics.jsonl")
    expected = {name: (tmp_path / name).read_text() for name in names}
    for path in (*tmp_path.glob("*.log"), tmp_path / "metrics.jsonl"):
        path.unlink()

    begin_process(checkpoints=made)
    with pytest.raises(CutOff):
        learn_tasks(tmp_path, log, cut_off_in, seeds=(7, 8))
    begin_process(checkpoints=made)
    ours = learn_tasks(tmp_path, log, seeds=(7, 8))

    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))
    assert ours._network.latest is ours._network.heads[-1], "what is shared stays shared"
    for name in ("7.log", "8.log", "summary.json"):
        assert (tmp_path / name).read_text() == expected[name]
    found, then = (
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]
        for text in ((tmp_path / "metrics.jsonl").read_text(), expected["metrics.jsonl"])
    )
    assert found == then != []


def test_models_of_tasks_that_are_learned_again_go_away_first(started, tmp_path, monkeypatch):
    models = tmp_path / "models"
    made = {"folder": str(tmp_path / "checkpoints"), "made_by": {}, "stop": str(tmp_path / "stop")}
    more = {"tasks": ["0-2", "3-5", "6-8"], "keep": {"folder": str(models), "names": ".*"}, "checkpoints": made}
    started(more)
    with pytest.raises(CutOff):
        learn_tasks(tmp_path, logging.getLogger(), (7, 1))
    assert sorted(path.name for path in models.iterdir()) == ["1.safetensors", "2.safetensors"]

    def cut_off_at_once(*_):
        raise CutOff

    monkeypatch.setattr(Learner, "learn", cut_off_at_once)
    monkeypatch.setattr(loop, "_trainings", [])
    with pytest.raises(CutOff):
        learn_tasks(tmp_path, logging.getLogger())
    assert [path.name for path in models.iterdir()] == ["1.safetensors"]


def test_a_checkpoint_of_another_seed_is_refused(started, tmp_path, monkeypatch):
    made = {"folder": str(tmp_path / "checkpoints"), "made_by": {}, "stop": str(tmp_path / "stop")}
    started({"tasks": ["0-2", "3-5", "6-8"], "checkpoints": made})
    learn_tasks(tmp_path, logging.getLogger())
    monkeypatch.setattr(loop, "_trainings", [])
    with pytest.raises(FlatpatchError, match="the checkpoint is of seed 7, and this is seed 8"):
        hooks.done_before(Learner({"seed": 8}), 0, {}, [])


def test_without_a_run_no_hook_touches_anything(monkeypatch):
    monkeypatch.delenv("FLATPATCH_RUN", raising=False)
    untouched = object()
    hooks.new_log()
    for hook in (hooks.redirect_paths, hooks.load_weights, cllora.keep_versions):
        assert hook(untouched) is None
    hooks.resize(untouched, untouched)
    cllora.forget_the_step()
    hooks.begin_task(untouched, untouched, untouched, untouched)
    hooks.first_pass()
    hooks.second_pass(untouched, untouched, untouched)
    hooks.end_task()
    assert hooks.done_before(untouched, 0, untouched) is False
    hooks.task_done(untouched, untouched)
    for hook in (hooks.backbones, hooks.resized, hooks.workers, hooks.embed_dim, hooks.data_folder):
        assert hook(untouched) is untouched
    assert hooks.should_download(True) is True
    assert cllora.block_weight(None, untouched) is None
    assert hooks.provides_dataset("flatpatch_quick") is False


def test_a_run_of_a_text_repository_is_refused(tmp_path, monkeypatch):
    run = description(tmp_path) | {"task": "amazon", "task_index": 0}
    del run["vision"]
    path = tmp_path / "text.json"
    path.write_text(json.dumps(run))
    monkeypatch.setenv("FLATPATCH_RUN", str(path))
    with pytest.raises(UserError, match=r"text.json has no 'vision'"):
        hooks.first_pass()

"""What is measured in runs: against closed forms, without a trace in the training, and loud when it fails."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatpatch import flatness
from flatpatch.errors import UserError
from flatpatch.families.sample import Sample, choose_indices, sample_of
from flatpatch.flatness import supervised_loss
from flatpatch.flatness.guard import random_states_kept, working_copy
from flatpatch.measurement import files, suite
from flatpatch.measurement.in_run import Measurer
from flatpatch.measurement.suite import Costs, measure_model
from flatpatch.measuring import (
    CORRECT_KINDS,
    CURVATURE_KINDS,
    EFFORTS,
    KINDS,
    RECORDED_KINDS,
    SCOPES,
    Request,
    make_request,
    read_request,
    writing_mark,
)
from flatpatch.report import flatness_run
from flatpatch.report.flatness_figures import read_grid
from flatpatch.report.flatness_run import draw_flatness, flatness_table
from flatpatch.report.records import validate_record
from tests import flatness_lora
from tests.report_records import make_record

MSE = supervised_loss(nn.functional.mse_loss)


def ask(kinds: str = "all", scopes: str = "trainable", **changes: Any) -> Request:
    given = {"samples": 12, "batch": 4, "rho": 0.05, "effort": "quick"} | changes
    request = make_request(kinds, scopes, **given)
    assert request is not None
    return request


def linear_problem(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a linear model of six weights, whose Hessian for the mean squared error is 2 X'X / n, on 12 examples."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 6, generator=draw, dtype=torch.float64))
    x = torch.randn(12, 6, generator=draw, dtype=torch.float64)
    y = torch.randn(12, 1, generator=draw, dtype=torch.float64)
    return model, [(x[:5], y[:5]), (x[5:9], y[5:9]), (x[9:], y[9:])]


def hessian(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = torch.cat([x for x, _ in batches])
    return 2 * x.T @ x / len(x)


def test_scopes_are_those_that_flatness_knows() -> None:
    assert SCOPES == flatness.SCOPES


def test_all_means_every_kind_and_loss_is_always_there() -> None:
    assert ask("all").kinds == tuple(CORRECT_KINDS)
    assert ask("trace").kinds == ("loss", "trace")
    assert ask("all,curvature,invariance,recorded").kinds == tuple(KINDS)
    assert ask("all,recorded").kinds == (*CORRECT_KINDS, *RECORDED_KINDS)
    assert ask("curvature").kinds == ("loss", *CURVATURE_KINDS)
    assert ask("ledger,all").kinds == (*CORRECT_KINDS, "ledger")
    assert ask("live,all").kinds == (*CORRECT_KINDS, "live")
    assert ask("recorded").kinds == ("loss", *RECORDED_KINDS)
    assert ask("recorded_keskar,trace").kinds == ("loss", "trace", "recorded_keskar")
    assert make_request("", "adapter", samples=1, batch=1, rho=0.05, effort="quick") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": "eigenvalue"}, "measure=eigenvalue: unknown name 'eigenvalue'. Did you mean 'eigenvalues'?"),
        ({"scopes": "adaptor"}, "measure_scope=adaptor: unknown name 'adaptor'. Did you mean 'adapter'?"),
        ({"scopes": ""}, "measure_scope= is empty"),
        ({"when": "during"}, "measure_when=during: unknown name 'during'"),
        ({"samples": 0}, "measure_samples=0 is an empty sample"),
        ({"batch": -1}, "measure_batch=-1"),
        ({"rho": 0.0}, "measure_rho=0 is out of range"),
        ({"rho": math.nan}, "measure_rho=nan is out of range"),
        ({"at_loss": -0.5}, "measure_at_loss=-0.5 is out of range"),
        ({"at_loss": math.inf}, "measure_at_loss=inf is out of range"),
        ({"kinds": "record"}, "measure=record: unknown name 'record'. Did you mean 'recorded'?"),
        ({"ledger_every": 0}, "measure_ledger_every=0 is out of range"),
        ({"live_every": -1}, "measure_live_every=-1 is out of range (expected a number of steps >= 1, or 0"),
        ({"live_samples": 0}, "measure_live_samples=0 is an empty sample"),
        ({"kinds": "lives"}, "measure=lives: unknown name 'lives'. Did you mean 'live'?"),
        ({"kinds": "leger"}, "measure=leger: unknown name 'leger'. Did you mean 'ledger'?"),
        ({"kinds": "update", "when": "after"}, "it needs measure_when=before,after"),
        ({"kinds": "update", "scopes": "tangent"}, "measure=update measure_scope=tangent measures no update"),
        ({"effort": "ful"}, "unknown measure_effort 'ful'. Did you mean 'full'?"),
    ],
)
def test_each_mistake_has_its_message(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        ask(**{"kinds": "loss", **changes})
    assert words in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match="3 problems"):
        ask("wrong", "wrong", samples=0)


def test_givensurvives_its_file() -> None:
    more = {"at_loss": 0.5, "ledger_every": 3, "live_every": 4, "live_samples": 5}
    request = ask("trace,sam,ledger,live", "merged,adapter", when="after", rho=0.1, **more)
    assert read_request(json.loads(json.dumps(request.as_dict())), "here") == request


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "here is not an object"),
        ({}, "here has no 'kinds'"),
        ({**ask().as_dict(), "more": 1}, "here has an unknown key 'more'"),
    ],
)
def test_damaged_request_is_refused(given: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_request(given, "here")
    assert words in str(error.value)


def test_sample_is_the_same_for_every_run_and_has_no_example_twice() -> None:
    torch.manual_seed(1)
    first = choose_indices(1000, 64)
    torch.manual_seed(2)
    assert choose_indices(1000, 64) == first
    assert len(set(first)) == 64
    assert choose_indices(5, 64) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="no examples"):
        choose_indices(0, 64)


def test_random_numbers_are_put_back_even_after_an_error() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draws()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    with pytest.raises(KeyError), random_states_kept():
        draws()
        raise KeyError
    assert draws() == expected


def test_half_precision_is_measured_on_a_float32_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    model[1].weight = model[0].weight  # tied
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    copied, words = working_copy(model)
    assert words == "float32 copy of bfloat16 weights"
    assert copied[1].weight is copied[0].weight
    assert copied[0].weight.dtype == torch.float32
    assert all(torch.equal(copied.state_dict()[name].bfloat16(), value) for name, value in before.items())
    copied(torch.zeros(1, 3))
    assert calls == []  # hooks stay behind
    assert all(value.dtype == torch.bfloat16 for value in model.state_dict().values())


@pytest.mark.parametrize("seed", range(3))
def test_values_of_a_quadratic_are_the_closed_forms(seed: int) -> None:
    model, batches = linear_problem(seed)
    asked = ask("all,recorded", effort="full")
    found, terms = measure_model(model, batches, asked, loss=MSE, say=lambda text: None)
    result = found["trainable"]
    assert result.errors == {}
    assert terms == [5, 4, 3]
    H = hessian(batches)
    spectrum = torch.linalg.eigvalsh(H)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    gradient = 2 * x.T @ (x @ model.weight.detach().T - y) / len(x)
    values = result.values
    assert result.loss == pytest.approx(float(((x @ model.weight.detach().T - y) ** 2).mean()), rel=1e-12)
    assert values["top_eigenvalue"] == pytest.approx(float(spectrum[-1]), rel=1e-6)
    assert values["eigenvalue_ratio_1_5"] == pytest.approx(float(spectrum[-1] / spectrum[1]), rel=1e-6)
    assert values["trace"] is not None and values["trace_standard_error"] is not None
    # Four standard errors: missed by chance once in 10,000 times, and the probes are fixed.
    assert abs(values["trace"] - float(H.trace())) <= 4 * values["trace_standard_error"] + 1e-9
    assert values["density_largest"] == pytest.approx(float(spectrum[-1]), rel=1e-6)
    assert values["density_smallest"] == pytest.approx(float(spectrum[0]), rel=1e-6)
    assert values["negative_mass"] == 0
    assert values["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)
    # One step of length rho along the gradient of a quadratic.
    rho = 0.05
    rise = rho * gradient.norm() + rho**2 / 2 * (gradient.T @ H @ gradient) / gradient.norm() ** 2
    assert values["sam_sharpness"] == pytest.approx(float(rise), rel=1e-9)
    assert values["sam_sharpness_ascent"] >= values["sam_sharpness"]
    by_batch = sorted(float(torch.linalg.eigvalsh(hessian([batch]))[-1]) for batch in batches)
    assert values["batch_eigenvalue_median"] == pytest.approx(by_batch[1], rel=1e-3)
    assert values["batch_eigenvalue_mean"] == pytest.approx(np.mean(by_batch), rel=1e-3)
    assert values["batch_eigenvalue_max"] == pytest.approx(by_batch[2], rel=1e-3)
    # The maximum of a convex function over the box is at one of its 64 corners.
    w = model.weight.detach()
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(6, -1).T)
    corners = [(((x @ (w + 1e-3 * (w.abs() + 1) * s).T - y) ** 2).mean()) for s in signs]
    phi = 100 * (max(map(float, corners)) - result.loss) / (1 + result.loss)
    assert values["keskar_lower_bound"] == pytest.approx(phi, rel=1e-6)
    assert values["keskar_sharpness"] <= values["keskar_lower_bound"]
    # Each is documented, and each was measured, but for what takes two measuring times and an entry's own.
    given = {name for kind in asked.kinds for name in files.GIVEN_BY[kind]}
    assert set(values) == given - {"distance_moved", "loss", *files.GIVEN_BY["update"]}


@pytest.mark.parametrize(("kinds", "known"), [("trace", 0), ("eigenvalues,trace", 6)])
def test_the_trace_takes_the_part_of_known_eigenvalues_as_it_is(kinds: str, known: int) -> None:
    model, batches = linear_problem()
    found, _ = measure_model(model, batches, ask(kinds, effort="full"), loss=MSE, say=lambda text: None)
    result = found["trainable"]
    assert result.results["trace"]["known_eigenvalues"] == known
    error = result.values["trace_standard_error"]
    assert error is not None
    if known:
        assert result.values["trace"] == pytest.approx(float(hessian(batches).trace()), rel=1e-9)
        assert error < 1e-9
    else:
        assert error > 1e-3


def test_values_do_not_depend_on_global_random_numbers() -> None:
    model, batches = linear_problem()
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        seen.append(measure_model(model, batches, ask(), loss=MSE, say=lambda text: None)[0]["trainable"].values)
    assert seen[0] == seen[1]


def test_model_of_one_weight_is_measured() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    batches = [(torch.tensor([[2.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))]
    result = measure_model(model, batches, ask(), loss=MSE, say=lambda text: None)[0]["trainable"]
    assert result.errors == {}
    assert result.values["top_eigenvalue"] == pytest.approx(8)
    assert result.values["trace"] == pytest.approx(8)


def test_new_adapter_with_b_zero_has_a_landscape_that_is_not_flat_by_construction() -> None:
    model = flatness_lora.make_model(zero_b=True)
    batches = flatness_lora.make_problem(model).batches
    loss = supervised_loss(nn.functional.cross_entropy)
    found, _ = measure_model(model, batches, ask(scopes="adapter,merged,tangent"), loss=loss, say=lambda text: None)
    for result in found.values():
        assert result.errors == {}
        assert np.ptp(result.arrays["losses"]) > 1e-3
    assert json.loads(found["adapter"].arrays["about"])["axes"][0]["normalisation"] == "merged_rows"


def test_estimate_is_loud_above_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = linear_problem()
    said: list[str] = []
    measure_model(model, batches, ask("trace"), loss=MSE, say=said.append)
    assert len(said) == 1 and said[0].startswith("measuring trainable: 6 weights")
    monkeypatch.setattr("flatpatch.measurement.suite._time_once", lambda *_, **__: Costs(1.0, 2.0, 10.0))
    measure_model(model, batches, ask("trace"), loss=MSE, say=said.append)
    # 16 probes of 10 s each: as many as are planned, so that there is no "at most" beside it.
    assert said[1].startswith("NOTE: measuring trainable") and ", about 3 min (forward" in said[1]


def test_estimate_is_the_planned_work_and_at_most_that_of_searches_that_never_converge() -> None:
    costs, quick = Costs(loss=1.0, gradient=10.0, product=100.0), EFFORTS["quick"]
    expected = {
        "loss": (0, 0),
        "eigenvalues": (5 * 5 * 100, 40 * 100),
        "trace": (16 * 100, 16 * 100),
        "density": (2 * 16 * 100, 2 * 16 * 100),
        "batchwise": (10 * 100 * (2 + 1 / 4), 20 * 100 * (2 + 1 / 4)),
        # Two starts, each once and then in 4 steps, after the 11 evaluations of the protocol, or 25.
        "keskar": ((11 + 2 * 5) * 10, (25 + 2 * 9) * 10),
        # Two balls; four starts in each besides the weights.
        "sam": (2 * (1 + 4 * 5) * 10, 2 * (1 + 4 * 9) * 10),
        "landscape": (81, 81),
        "slice": (17, 17),
        # One eigenvalue in 8 products, 40 at most, and 16 probes; each half as long again as the Hessian's.
        "gauss_newton": (1.5 * 24 * 100, 1.5 * 56 * 100),
        "fisher": (3 * 24 * 100, 3 * 56 * 100),
        "layers": ((16 + 6) * 100, (16 + 20) * 100),
        "invariance": (7 * (24 * 100 + (12 + 5) * 10), 7 * (56 * 100 + (22 + 9) * 10)),
        # Two of the four batches.
        "recorded_eigenvalues": (40 * 100 / 2, 40 * 100 / 2),
        "recorded_landscape": (81 / 2, 81 / 2),
        "recorded_keskar": (25, 25),
    }
    assert set(expected) == set(KINDS)
    found = {kind: (costs.of(kind, quick, 4), costs.of(kind, quick, 4, at_most=True)) for kind in KINDS}
    assert found == {kind: pytest.approx(pair) for kind, pair in expected.items()}


class Clock:
    """A clock that stands still but for what is told to take time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, work: Callable[..., Any], *seconds: float) -> Callable[..., Any]:
        """Let the first calls of a function take so long each, and all later ones as long as the last of them."""
        left = list(seconds)

        def slowed(*arguments: Any, **named: Any) -> Any:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return work(*arguments, **named)

        return slowed


def test_estimate_multiplies_what_one_product_takes_once_the_first_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product builds the graphs; by that one the announcement was many times too long."""
    clock, said = Clock(), list[str]()
    monkeypatch.setattr(suite.time, "perf_counter", clock)
    monkeypatch.setattr(suite.HessianOperator, "matmat", clock.slow(suite.HessianOperator.matmat, 50.0, 2.0))
    gradient = clock.slow(suite.Problem.loss_and_gradient, 9.0, 0.5)
    monkeypatch.setattr(suite.Problem, "loss_and_gradient", gradient)
    model, batches = linear_problem()
    measure_model(model, batches, ask("trace"), loss=MSE, say=said.append)
    assert "about 32 s (forward and backward 0.5 s, Hessian product 2 s)" in said[0]  # 16 probes


def test_estimate_is_not_disturbed_by_another_program_that_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), list[str]()
    monkeypatch.setattr(suite.time, "perf_counter", clock)
    monkeypatch.setattr(suite.HessianOperator, "matmat", clock.slow(suite.HessianOperator.matmat, 0.9, 30.0, 0.2))
    model, batches = linear_problem()
    measure_model(model, batches, ask("trace"), loss=MSE, say=said.append)
    assert "about 3 s" in said[0]


def test_one_product_of_over_a_minute_is_not_made_twice_for_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(), list[str]()
    monkeypatch.setattr(suite.time, "perf_counter", clock)
    monkeypatch.setattr(suite.HessianOperator, "matmat", clock.slow(suite.HessianOperator.matmat, 90.0, 1.0))
    model, batches = linear_problem()
    measure_model(model, batches, ask("trace"), loss=MSE, say=said.append)
    assert "Hessian product 90 s" in said[0]


class Noisy(nn.Module):
    """Dropout and batch normalisation: a forward pass in training mode draws numbers and moves statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1)).double()
        self.layers[0].weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def measurer(folder: Path, request: Request) -> Measurer:
    return Measurer({"measure": {"request": request.as_dict(), "folder": str(folder / files.FOLDER)}})


def test_measuring_leaves_no_trace_in_the_model_or_the_random_numbers(tmp_path: Path) -> None:
    model = Noisy().train()
    model.layers[2].eval()  # a mode of its own
    x, y = torch.randn(12, 6).double(), torch.randn(12, 1).double()
    MSE(model, (x, y)).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    grad_values = {name: None if g is None else g.clone() for name, g in gradients.items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    def collate(items: list[int]) -> tuple[Tensor, Tensor]:
        torch.rand(3), random.random(), np.random.rand()  # a collator may draw
        return x[items], y[items]

    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    entries = measurer(tmp_path, ask(scopes="trainable,model")).at(
        "before", task_index=0, task="some", model=model, sample=sample_of(range(12), collate), loss=MSE
    )
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, grad_values[name])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [entry["scope"] for entry in entries] == ["trainable", "model"]
    assert all(entry["values"]["top_eigenvalue"] is not None for entry in entries)


def test_files_hold_what_the_entries_say_and_the_record_accepts_them(tmp_path: Path) -> None:
    model, batches = linear_problem()
    entries = measurer(tmp_path, ask()).at(
        "after", task_index=1, task="amazon", model=model, sample=Sample(batches, 12), loss=MSE
    )
    (entry,) = entries
    assert entry["file"] == "flatness/2-amazon-after.json"
    assert entry["arrays"] == "flatness/2-amazon-after-trainable.npz"
    assert entry["samples"] == 12
    validate_record(make_record(flatness=entries))
    content = json.loads((tmp_path / entry["file"]).read_text())
    assert content["schema"] == files.SCHEMA and content["error"] is None and content["weights"] == "float64"
    assert files.read_entries(tmp_path, ["1-dbpedia-after", "2-amazon-after"]) == entries
    grid = read_grid(tmp_path / entry["arrays"])
    assert grid.losses.shape == (EFFORTS["quick"].grid_points,) * 2
    assert grid.origin_loss == pytest.approx(entry["loss"])
    with np.load(tmp_path / entry["arrays"]) as arrays:
        assert arrays["eigenvalues"][0] == entry["values"]["top_eigenvalue"]
    assert not list((tmp_path / files.FOLDER).glob(".*"))  # nothing half-written


def test_record_refuses_an_entry_of_another_form() -> None:
    entry = {
        **{"task": "dbpedia", "task_index": 0, "when": "after", "scope": "adapter", "samples": 4, "loss": 1.0},
        **{"values": {"trace": None}, "file": "flatness/a.json", "arrays": None, "seconds": 1.0},
    }
    validate_record(make_record(flatness=[entry]))
    for change in ({"when": "later"}, {"loss": "1"}, {"values": {"trace": "x"}}, {"more": 1}, {"task": "amazon"}):
        with pytest.raises(ValueError, match="flatness"):
            validate_record(make_record(flatness=[{**entry, **change}]))
    with pytest.raises(ValueError, match="several entries for task 0"):
        validate_record(make_record(flatness=[entry, entry]))


def test_non_finite_loss_is_an_error_in_the_file_and_no_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batches = linear_problem()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    entries = measurer(tmp_path, ask()).at(
        "after", task_index=0, task="dbpedia", model=model, sample=Sample(batches, 12), loss=MSE
    )
    assert entries[0]["loss"] is None and entries[0]["values"] == {} and entries[0]["arrays"] is None
    content = json.loads((tmp_path / entries[0]["file"]).read_text())
    assert "the loss is nan" in content["scopes"]["trainable"]["errors"]["loss"]
    assert "FAILED" in capsys.readouterr().err
    record = make_record(flatness=entries)
    validate_record(record)
    assert len(flatness_table(record)) == 2
    assert draw_flatness(record, tmp_path) == []


def test_table_tells_the_protocols_value_from_the_highest_found() -> None:
    values = {"keskar_sharpness": 0.25, "keskar_lower_bound": 0.75, "sam_sharpness_ascent": 0.5}
    entry = {"task_index": 0, "task": "a", "when": "after", "scope": "adapter", "loss": 1.0, "values": values}
    upper, lower, row = flatness_table({"flatness": [entry]})
    for first, second, number in (
        ("Keskar (%),", "protocol", "0.25"),
        ("Keskar (%),", "highest found", "0.75"),
        ("SAM ball,", "ascent", "0.5"),
    ):
        end = lower.index(second) + len(second)
        assert upper[:end].endswith(first) and row[:end].endswith(f" {number}")


def test_one_kind_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("flatpatch.measurement.suite.hutchinson", broken)
    model, batches = linear_problem()
    (entry,) = measurer(tmp_path, ask("eigenvalues,trace")).at(
        "after", task_index=0, task="dbpedia", model=model, sample=Sample(batches, 12), loss=MSE
    )
    assert "top_eigenvalue" in entry["values"] and "trace" not in entry["values"]
    errors = json.loads((tmp_path / entry["file"]).read_text())["scopes"]["trainable"]["errors"]
    assert errors == {"trace": "RuntimeError: no memory"}


@pytest.mark.parametrize("fault", ["collate", "scope", "folder"])
def test_nothing_that_fails_reaches_the_training(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batches = linear_problem()

    def collate(items: list[int]) -> Any:
        raise OSError("the data is gone")

    sample = sample_of(range(12), collate) if fault == "collate" else Sample(batches, 12)
    if fault == "folder":
        (tmp_path / files.FOLDER).write_text("a file where the folder should be")
    scope = "adapter" if fault == "scope" else "trainable"
    entries = measurer(tmp_path, ask("loss", scope)).at(
        "before", task_index=0, task="dbpedia", model=model, sample=sample, loss=MSE
    )
    assert "FAILED before task 1 dbpedia" in capsys.readouterr().err
    assert [entry["loss"] for entry in entries] == ([] if fault == "folder" else [None])


def test_nothing_is_measured_that_was_not_asked_for(tmp_path: Path) -> None:
    model, batches = linear_problem()
    arguments: dict[str, Any] = {"task_index": 0, "task": "a", "model": model, "sample": Sample(batches, 12)}
    assert Measurer({"measure": None}).at("before", **arguments) == []
    assert measurer(tmp_path, ask(when="after")).at("before", **arguments) == []
    assert list(tmp_path.iterdir()) == []


def test_loss_is_reached_once_a_task_by_the_mean_of_ten_steps(tmp_path: Path) -> None:
    made = measurer(tmp_path, ask("loss", at_loss=1.0))
    assert made.wants("at_loss") and not measurer(tmp_path, ask("loss")).wants("at_loss")
    # Nine low losses are no mean of ten; a tenth of 10 makes the mean 1, and the step after that is too late.
    assert [made.reaches(0, loss) for loss in [0.0] * 9 + [10.0, 0.0]] == [False] * 9 + [True, False]
    # The next task begins anew; a mean of ten steps counts, not all steps'.
    assert [made.reaches(1, loss) for loss in [2.0] * 10 + [0.5] * 7].index(True) == 16
    assert not any(made.reaches(2, math.nan) for _ in range(30))
    assert not any(measurer(tmp_path, ask("loss")).reaches(0, 0.0) for _ in range(30))


def test_measurer_goes_on_from_the_state_of_another_process(tmp_path: Path) -> None:
    losses = [9.0] * 6 + [1.0] * 20
    model, batches = linear_problem()
    sample, loss = Sample(batches, 12), MSE
    for cut in (3, 11, 15):
        first, second = (measurer(tmp_path / str(cut), ask("loss", "trainable", at_loss=5.0)) for _ in range(2))
        first.at("before", task_index=0, task="a", model=model, sample=sample, loss=loss)
        reached = [first.reaches(0, value) for value in losses[:cut]]
        kept = io.BytesIO()
        torch.save(first.state(), kept)
        kept.seek(0)
        second.put_back(torch.load(kept, weights_only=True))
        reached += [second.reaches(0, value) for value in losses[cut:]]
        assert reached.index(True) == 10 and sum(reached) == 1
        with torch.no_grad():
            moved = copy.deepcopy(model)
            next(moved.parameters()).add_(1.0)
        (entry,) = second.at("after", task_index=0, task="a", model=moved, sample=sample, loss=loss)
        size = next(moved.parameters()).numel()
        assert entry["values"]["distance_moved"] == pytest.approx(size**0.5)


def test_point_at_a_loss_says_after_which_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = linear_problem()
    made = measurer(tmp_path, ask("loss", at_loss=5.0))
    arguments: dict[str, Any] = {"task": "dbpedia", "model": model, "sample": Sample(batches, 12), "loss": MSE}
    steps = next(step for step, loss in enumerate([9.0] * 6 + [1.0] * 20, start=1) if made.reaches(0, loss))
    assert steps == 11
    entries = [entry for when in ("before", "at_loss") for entry in made.at(when, task_index=0, **arguments)]
    contents = [json.loads((tmp_path / entry["file"]).read_text()) for entry in entries]
    assert [content["step"] for content in contents] == [None, steps]
    assert [entry["when"] for entry in entries] == ["before", "at_loss"]
    assert entries[1]["file"] == "flatness/1-dbpedia-at_loss.json"
    validate_record(make_record(flatness=entries))


def test_what_is_measured_as_recorded_is_labelled_in_table_and_figures_and_stays_out_of_the_correct_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = linear_problem()
    made = measurer(tmp_path, ask("batchwise,landscape,recorded"))
    entries = made.at("after", task_index=0, task="dbpedia", model=model, sample=Sample(batches, 12), loss=MSE)
    record = make_record(flatness=entries)
    for name in entries[0]["values"]:
        assert name.startswith("as_recorded_") == ("recorded" in name or "keskar" in name or "overlap" in name)
    upper, lower, _ = flatness_table(record)
    for words in ("median eigenv.", "top eigenv.", "Keskar (%)"):
        end = lower.index(words) + len(words)
        assert upper[:end].endswith("as recorded:")
    figures = {}
    monkeypatch.setattr(flatness_run, "save", lambda figure, path, dpi: figures.update({path.name: figure}) or [])
    draw_flatness(record, tmp_path)
    assert {name for name, figure in figures.items() if figure.get_suptitle().startswith("As recorded, faults")} == {
        "flatness_trainable_as_recorded_eigenvalues",
        "flatness_trainable_as_recorded_landscape_1",
    }
    axes = figures["flatness_trainable_as_recorded_eigenvalues"].axes[0]
    recorded, correct = (line.get_ydata() for line in axes.get_lines())
    with np.load(tmp_path / entries[0]["arrays"]) as arrays:
        np.testing.assert_array_equal(recorded, arrays["as_recorded_eigenvalues"].ravel())
        np.testing.assert_array_equal(correct, arrays["batch_eigenvalues"])
        assert arrays["as_recorded_losses"].shape == arrays["losses"].shape == (9, 9)
        assert not np.array_equal(arrays["as_recorded_losses"], arrays["losses"])
    grid = read_grid(tmp_path / entries[0]["arrays"], prefix="as_recorded_")
    assert grid.about["axes"][0]["normalisation"] == "as recorded"


@pytest.mark.slow
def test_figures_are_drawn_of_all_that_was_measured(tmp_path: Path) -> None:
    model, batches = linear_problem()
    made = measurer(tmp_path, ask("all,recorded"))
    arguments: dict[str, Any] = {"model": model, "sample": Sample(batches, 12), "loss": MSE}
    entries = made.at("before", task_index=0, task="dbpedia", **arguments)
    entries += made.at("after", task_index=0, task="dbpedia", **arguments)
    (tmp_path / "figures").mkdir()
    stale = tmp_path / "figures" / "flatness_old.png"
    stale.touch()
    drawn = draw_flatness(make_record(flatness=entries), tmp_path)
    assert {path.stem.removeprefix("flatness_trainable_") for path in drawn} == {
        *("over_tasks", "eigenvalues", "density", "slices"),
        *("landscape_1", "surface", "as_recorded_eigenvalues", "as_recorded_landscape_1"),
    }
    assert {path.suffix for path in drawn} == {".png", ".pdf"}
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert not stale.exists()


def test_landscapes_before_and_after_a_task_are_one_figure_of_one_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = linear_problem()
    made = measurer(tmp_path, ask("landscape"))
    arguments: dict[str, Any] = {"sample": Sample(batches, 12), "loss": MSE}
    entries = made.at("before", task_index=0, task="dbpedia", model=model, **arguments)
    with torch.no_grad():
        model.weight.mul_(3)
    entries += made.at("after", task_index=0, task="dbpedia", model=model, **arguments)
    figures = {}
    monkeypatch.setattr(flatness_run, "save", lambda figure, path, dpi: figures.update({path.name: figure}) or [])
    draw_flatness(make_record(flatness=entries), tmp_path)
    before, after, _ = figures["flatness_trainable_landscape_1"].axes
    assert before.get_title().startswith("before\n") and after.get_title().startswith("after\n")
    levels = [axes.collections[0].levels for axes in (before, after)]
    np.testing.assert_array_equal(*levels)
    low, high = (np.load(tmp_path / entry["arrays"])["losses"] for entry in entries)
    assert levels[0][[0, -1]] == pytest.approx([min(low.min(), high.min()), max(low.max(), high.max())])


@pytest.mark.parametrize("whens", [("after",), ("before", "after")])
def test_values_of_a_single_task_stand_side_by_side_or_in_the_table_alone(whens: tuple[str, ...]) -> None:
    entries = [
        {
            **{"task": "amazon", "task_index": 1, "when": when, "scope": "adapter", "samples": 64, "loss": 1.0 + k},
            "values": {"trace": 5.0 + k, "trace_standard_error": 0.5},
        }
        for k, when in enumerate(whens)
    ]
    figure = flatness_run.make_over_tasks_figure(entries, make_record())
    if len(whens) == 1:
        assert figure is None
        return
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["loss of the sample", "trace"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "after"]
    width, height = figure.get_size_inches()
    assert width < 6 and height < 3
    assert figure.get_suptitle() == "Flatness of LoRA factors A and B, task 2 amazon"


def test_distance_moved_is_the_change_of_the_scopes_weights_since_before_the_task(tmp_path: Path) -> None:
    """Of the factors the changes themselves; of W + s B A the change of s B A, with s of 0.5 and 2.

    Directions of before are not those of after, so in the scope tangent there is none.
    """
    model = flatness_lora.make_model()
    batches = flatness_lora.make_problem(model).batches
    measuring = measurer(tmp_path, ask("loss", "adapter,merged,tangent"))

    def values(when: str, task_index: int) -> list[float | None]:
        entries = measuring.at(
            when,
            task_index=task_index,
            task="some",
            model=model,
            sample=Sample(batches, 10),
            loss=supervised_loss(nn.functional.cross_entropy),
        )
        assert not files.failures(json.loads((tmp_path / entries[0]["file"]).read_text()))
        return [entry["values"].get("distance_moved") for entry in entries]

    def products() -> list[Tensor]:
        pairs = flatness_lora.factors(model)
        return [scale * (B @ A).detach() for scale, (A, B) in zip((0.5, 2.0), pairs, strict=True)]

    assert values("before", 0) == [None] * 3
    before, changes = products(), []
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for factor in (factor for pair in flatness_lora.factors(model) for factor in pair):
            change = torch.randn(factor.shape, generator=draw, dtype=torch.float64)
            factor.add_(change)
            changes.append(change.flatten())
    moved = [(now - then).flatten() for now, then in zip(products(), before, strict=True)]
    expected = [torch.cat(changes).norm().item(), torch.cat(moved).norm().item()]
    *moved_by, in_tangent = values("after", 0)
    assert moved_by == pytest.approx(expected, rel=1e-6)  # the weights before are kept in float32
    assert in_tangent is None
    # Of another task nothing was measured before it.
    assert values("after", 1) == [None] * 3
    assert values("before", 1) == [None] * 3
    assert values("after", 1) == [0.0, 0.0, None]


def test_more_operators_blocks_and_the_certificate_are_measured_over_lora(tmp_path: Path) -> None:
    """Small enough for exact traces: each value beside the dense matrix's, and the certificate as it must be."""
    model = flatness_lora.make_model()
    batches = flatness_lora.make_problem(model).batches
    before = copy.deepcopy(model.state_dict())
    asked = ask("curvature,invariance", "adapter,tangent", effort="full")
    loss = supervised_loss(nn.functional.cross_entropy)
    found, _ = measure_model(model, batches, asked, loss=loss, say=lambda text: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for scope, result in found.items():
        assert result.errors == {}
        assert set(result.values) == {name for kind in asked.kinds[1:] for name in files.GIVEN_BY[kind]}
        problem = flatness_lora.make_problem(model, scope)
        unit = torch.eye(problem.size, dtype=torch.float64)
        dense = flatness.GaussNewtonOperator(problem).matmat(unit)
        top = float(torch.linalg.eigvalsh(dense)[-1])
        for name in ("gauss_newton", "fisher"):
            assert result.values[f"{name}_top_eigenvalue"] == pytest.approx(top, rel=1e-5)
        hessian = flatness.HessianOperator(problem).matmat(unit)
        a = flatness.factor_blocks(problem)["A"]
        top = float(torch.linalg.eigvalsh(hessian[a][:, a])[-1])
        assert result.values["factor_a_top_eigenvalue"] == pytest.approx(top, rel=1e-3)
        assert set(result.results["layers"]["layers"]) == {"0", "3"}
        assert result.results["invariance"]["trace_by"] == "exact"
    assert found["tangent"].values["invariance_change"] < 1e-4 < 0.1 < found["adapter"].values["invariance_change"]


def test_the_hessians_graphs_are_gone_before_another_operator_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[flatness.HessianOperator] = []
    kept: list[int] = []

    class Noted(flatness.HessianOperator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(suite, "HessianOperator", Noted)
    for name in ("_layers", "_gauss_newton"):
        monkeypatch.setattr(suite, name, lambda work: kept.append(sum(each.kept_bytes for each in made)))
    model, batches = linear_problem()
    measure_model(model, batches, ask("layers,gauss_newton"), loss=MSE, say=lambda text: None)
    assert kept[0] > 0 == kept[1]


def test_a_certificate_that_is_refused_is_told_from_one_that_was_not_asked_for() -> None:
    """Of a loss that depends on A beside B A."""

    def penalised(model: nn.Module, batch: Any) -> Tensor:
        return MSE(model, batch) * model[0].lora_A["default"].weight.norm()

    model = flatness_lora.make_model()
    batches = [(torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))]
    marks = []
    for kinds in ("loss", "invariance"):
        found, _ = measure_model(model, batches, ask(kinds, "merged"), loss=penalised, say=lambda text: None)
        marks.append(writing_mark("merged", found["merged"].values))
    assert marks == ["invariant by construction", "not certified: refused"]
    assert "no function of the products B A" in found["merged"].errors["invariance"]


def test_the_certificate_of_a_model_without_lora_says_why_there_is_none() -> None:
    model, batches = linear_problem()
    found, _ = measure_model(model, batches, ask("invariance"), loss=MSE, say=lambda text: None)
    assert "there is no LoRA pair to write differently" in found["trainable"].errors["invariance"]

"""The HTML page: its numbers, what it says about missing runs, that it needs nothing else and cannot be injected."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from flatpatch import metrics
from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.report import page as page_module
from flatpatch.report import page_figures
from flatpatch.report.figures import make_matrix_figure
from flatpatch.report.groups import forgetting_per_task, gaps, group_runs, mean_accuracies, read_run, spread
from flatpatch.report.page import make_page, work
from flatpatch.runner.pages import leave_page
from flatpatch.runner.report import show
from flatpatch.runner.resolve import parse
from flatpatch.runner.sweep import expand
from tests.report_page import Reader, flatness_entry, make_four, seeded, small_print, with_average, write_run
from tests.report_records import LONG, ORDER_1, make_quick_record, make_record, make_steps

SUMMARY = "Mean ± standard deviation"
HOSTILE = """<img src=x onerror="alert(1)">'</title></style><script>alert(2)</script>&amp;"""


def read(folders, **options):
    """Return the page's text and what a reader finds in it."""
    text = make_page(group_runs([read_run(folder) for folder in folders]), **options)
    return text, Reader(text)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """SAM off and on, three seeds each, the last one interrupted."""
    return make_four(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def page(four):
    return read(four)


def test_what_sam_changes_is_said_with_its_verdict(page):
    """80 and 81 against 70 and 72: 10 and 9, mean 9.5, deviation sqrt(1/2); t(0.975, 1) = tan(0.475 pi) = 12.706."""
    _, reader = page
    text = " ".join(" ".join(reader.text).split())
    half = math.tan(0.475 * math.pi) * math.sqrt(0.5) / math.sqrt(2)
    assert f"average accuracy is higher: supported: +9.5 points (95 % interval +{9.5 - half:.4g} to" in text
    assert "seed 2 of SAM off has no partner and is left out" in text


def test_mean_and_standard_deviation_are_those_of_the_seeds(page):
    """70, 72, 77: mean 73, squared deviations 9 + 1 + 16 over n - 1 = 2, so sqrt(13) = 3.61."""
    _, reader = page
    row = reader.row(SUMMARY, "A SAM off")
    assert row[1:4] == ["3", "0, 1, 2", "73.00 ± 3.61"]
    assert reader.row(SUMMARY, "B SAM rho=0.05")[1:4] == ["2", "0, 1", "80.50 ± 0.71"]


def test_every_entry_of_the_matrix_is_the_mean_over_seeds(tmp_path):
    matrices = [[[80, None], [60 + 4 * k, 90 - k]] for k in range(3)]
    folders = [
        write_run(tmp_path / f"seed{k}", seeded(k, tasks=("one", "two"), accuracy_matrix=matrix))
        for k, matrix in enumerate(matrices)
    ]
    _, reader = read(folders)
    caption = "Accuracy in percent"
    assert reader.row(caption, "1 one") == ["1 one", "80.00 ± 0.00", "–", "80.00 ± 0.00"]
    # 60, 64, 68; 90, 89, 88; their means 75, 76.5, 78
    assert reader.row(caption, "2 two") == ["2 two", "64.00 ± 4.00", "89.00 ± 1.00", "76.50 ± 1.50"]
    # 80 minus 60, 64, 68
    assert reader.row(caption, "forgetting (best earlier − last)")[1:3] == ["16.00 ± 4.00", "–"]


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_and_means_agree_with_the_metrics(seed):
    size = 5
    numbers = np.random.default_rng(seed).uniform(0, 100, (size, size))
    numbers[np.triu_indices(size, 1)] = math.nan
    run = page_module.Run(Path("run"), make_record(tuple("abcde"), accuracy_matrix=metrics.to_lists(numbers)))
    np.testing.assert_allclose(forgetting_per_task(run), metrics.forgetting_per_task(numbers), rtol=1e-12)
    assert statistics.fmean(mean_accuracies(run)) == pytest.approx(metrics.average_over_steps(numbers), rel=1e-12)


def test_a_gap_in_the_matrix_gives_no_mean():
    run = page_module.Run(Path("run"), make_record(("a", "b"), accuracy_matrix=[[90.0, None], [None, 80.0]]))
    assert mean_accuracies(run) == [90.0, None]
    assert forgetting_per_task(run) == [None]


def test_spread_of_one_number_has_no_deviation():
    assert spread([3.0]).standard_deviation is None
    assert spread([None, None]) is None
    assert spread([1.0, None, 3.0]).n == 2


def test_unfinished_run_is_named_and_counts_nowhere(page):
    _, reader = page
    row = reader.row("Runs that one would expect", "B", "2")
    assert row[2] == "interrupted"
    assert "2 of 4 tasks have results" in row[3]
    assert "nlora-sam-seed2" in row[3]


def test_seed_that_one_setting_lacks_is_named(four):
    groups = group_runs([read_run(folder) for folder in four[:4]])
    assert [(row["letter"], row["seed"], row["state"]) for row in gaps(groups)] == [("B", "1, 2", "no run")]


def test_seeds_of_another_method_are_not_expected(tmp_path):
    folders = [write_run(tmp_path / "a", seeded(0)), write_run(tmp_path / "b", seeded(1, method="olora"))]
    assert gaps(group_runs([read_run(folder) for folder in folders])) == []


def test_settings_another_method_lacks_are_named_only_if_somebody_set_them(tmp_path):
    records = [seeded(0), seeded(0, method="cllora")]
    records[1]["settings"] |= {
        "sam_on": {"value": "both", "source": "default"},
        "variant": {"value": "full", "source": "command line"},
    }
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    titles = [group.title for group in group_runs([read_run(folder) for folder in folders])]
    assert titles == ["nlora, SAM rho=0.05", "cllora, SAM rho=0.05, variant=full"]


def test_failed_run_says_why(tmp_path):
    record = make_record(done=1, status="failed", error="task amazon failed with exit code 1")
    text, reader = read([write_run(tmp_path / "run", record)])
    assert "task amazon failed with exit code 1" in reader.words
    assert "NOT FINISHED" in reader.words
    assert reader.row("Accuracy in percent", "1 dbpedia")[1] != "–"


def test_a_seed_that_was_run_twice_counts_once(tmp_path):
    folders = [write_run(tmp_path / name, with_average(seeded(0), 70.0)) for name in ("first", "again")]
    folders.append(write_run(tmp_path / "other", with_average(seeded(1), 72.0)))
    _, reader = read(folders)
    assert reader.row(SUMMARY, "A SAM rho=0.05")[1:4] == ["2", "0, 1", "71.00 ± 1.41"]
    assert reader.row("Runs that one would expect", "A", "0")[2] == "not counted"


def test_images_are_headed_by_the_numbers_of_their_papers(tmp_path):
    record = seeded(0, tasks=("0-9", "10-19"), benchmark="cifar100")
    record["settings"]["benchmark"] = {"value": "", "source": "default"}
    record["metrics"] |= {"sample_weighted_accuracy": 86.51, "averaged_accuracy_inflora": 91.7}
    text, reader = read([write_run(tmp_path / "run", record)])
    assert reader.row(SUMMARY, "A SAM rho=0.05")[3:5] == ["86.51", "91.70"]
    assert reader.row("All metrics", "final accuracy (%)")[1:] == [
        "86.51",
        "over all test images after the last task; the papers' A_T; higher is better",
    ]
    assert "CL-LoRA: its average accuracy" in reader.row("All metrics", "averaged accuracy (%)")[2]
    assert "CL-LoRA" not in reader.row("All metrics", "average over steps (%)")[2]
    assert "predict_exact_match" not in text


def test_a_metric_that_some_seeds_lack_says_its_own_n(tmp_path):
    records = [with_average(seeded(k), value) for k, value in enumerate((70.0, 72.0, 74.0))]
    records[2]["metrics"]["average_accuracy"] = None
    _, reader = read([write_run(tmp_path / str(k), record) for k, record in enumerate(records)])
    assert reader.row(SUMMARY, "A SAM rho=0.05")[3] == "71.00 ± 1.41 (n = 2)"


def test_runs_of_other_settings_are_not_put_together(tmp_path):
    records = [seeded(0), seeded(1), seeded(2), seeded(3)]
    records[1]["settings"]["rho"] = {"value": 0.1, "source": "command line"}
    records[2]["upstream"]["patched_tree"] = "c" * 40
    records[3]["settings"]["upstream.lamda_1"] = {"value": "0.5", "source": "command line"}
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [1, 1, 1, 1]
    titles = [group.title for group in groups]
    assert titles[1] == "SAM rho=0.1"
    assert titles[3] == "SAM rho=0.05, upstream.lamda_1=0.5"
    assert len(set(titles)) == 4


def test_a_run_of_an_earlier_version_lacks_new_settings_and_is_of_the_group_that_has_their_defaults(tmp_path):
    records = [seeded(0), seeded(1), seeded(2)]
    for record, share in zip(records[1:], (1.0, 0.5), strict=True):
        new = {"sam_radius": "factors", "ascent_batch": share, "measure_at_loss": 0.0}
        record["settings"] |= {key: {"value": value, "source": "default"} for key, value in new.items()}
    for record in records[:2]:
        record["settings"]["measure"] = {"value": "loss", "source": "command line"}
    groups = group_runs([read_run(write_run(tmp_path / str(k), record)) for k, record in enumerate(records)])
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "1"], ["2"]]
    assert [group.title for group in groups] == ["SAM rho=0.05 ascent_batch=1", "SAM rho=0.05 ascent_batch=0.5"]


@pytest.mark.parametrize(
    ("key", "value"), [("rho", 0.1), ("sam_on", "task"), ("measure", "loss"), ("measure_rho", 0.1)]
)
def test_without_sam_its_settings_and_measuring_set_nothing_apart(tmp_path, key, value):
    records = [seeded(0, sam="off"), seeded(1, sam="off")]
    records[1]["settings"][key] = {"value": value, "source": "command line"}
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    assert len(group_runs([read_run(folder) for folder in folders])) == 1


def test_runs_measured_in_different_ways_are_not_averaged(tmp_path):
    records = [seeded(0), seeded(1), seeded(2)]
    for record, samples in zip(records, (16, 64, 16), strict=True):
        record["settings"] |= {
            "measure": {"value": "loss", "source": "command line"},
            "measure_samples": {"value": samples, "source": "command line"},
        }
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "2"], ["1"]]
    assert [group.title for group in groups] == [
        "SAM rho=0.05, measure_samples=16",
        "SAM rho=0.05, measure_samples=64",
    ]


def test_how_unmeasured_runs_would_have_been_measured_takes_nothing_apart(tmp_path):
    records = [seeded(seed) for seed in range(3)]
    for record, kinds, rho in zip(records, ("", "", "sam"), (0.05, 0.1, 0.05), strict=True):
        record["settings"] |= {
            "measure": {"value": kinds, "source": "command line"},
            "measure_rho": {"value": rho, "source": "command line"},
        }
    records.append(seeded(3))
    records[3]["settings"] |= {"measure": {"value": "loss", "source": "command line"}}
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "1"], ["2"], ["3"]]


@pytest.mark.parametrize(
    ("sam", "key", "value"),
    [("off", "scope", "B"), ("off", "measure_rho", 0.1), ("sam", "eta", 1.0), ("sam", "scope", "lora")],
)
def test_seeds_are_put_together_whatever_had_no_effect(tmp_path, capsys, sam, key, value):
    records = [seeded(0, sam=sam), seeded(1, sam=sam), seeded(2, sam=sam)]
    records[0]["settings"][key] = {"value": value, "source": "command line"}
    records[2]["settings"]["adapters"] = {"value": "fp32", "source": "command line"}
    folders = [write_run(tmp_path / str(k), record) for k, record in enumerate(records)]
    assert main(["report", f"run={','.join(map(str, folders))}"]) == 0
    table = capsys.readouterr().out.partition("mean and standard deviation")[2].splitlines()[1:3]
    assert [line.split()[-1] for line in table] == ["2", "1"]
    assert " ± " in table[0] and key not in table[0]
    assert "adapters=fp32" in table[1]


def test_other_conditions_of_some_runs_are_told(tmp_path):
    def record(seed, sam, threads):
        variables = {"PYTHONPATH": str(seed)}  # where the package lies changes no number
        return seeded(seed, sam=sam, environment={"threads": threads, "python": "3.11.7", "variables": variables})

    records = [record(0, "off", 1), record(1, "off", 1), record(0, "sam", 1), record(1, "sam", 2)]
    folders = [write_run(tmp_path / str(k), one) for k, one in enumerate(records)]
    _, reader = read(folders)
    assert "the same conditions: threads: 1 (A; B seed 0), 2 (B seed 1)" in reader.words
    assert "PYTHONPATH: " not in reader.words


@pytest.mark.parametrize(("record", "banner"), [(make_quick_record(), True), (make_record(), False)])
def test_quick_and_reference_runs_carry_a_banner(tmp_path, record, banner):
    _, reader = read([write_run(tmp_path / "run", record)])
    assert ("QUICK AND REFERENCE RUN" in reader.words) is banner
    shown = [attributes for _, attributes in reader.tags if "warn" in attributes.get("class", "")]
    assert bool(shown) is banner


def test_banner_of_some_settings_names_them(tmp_path):
    folders = [write_run(tmp_path / "a", make_record()), write_run(tmp_path / "b", make_quick_record())]
    _, reader = read(folders)
    assert "B: QUICK AND REFERENCE RUN" in reader.words


def test_deviations_say_what_where_and_why(tmp_path):
    record = make_record()
    record["deviations"] += [{"what": "fp16", "upstream": None, "here": "on", "why": "a reason", "tasks": ["amazon"]}]
    plain = make_record(seeds=[1], deviations=record["deviations"][:1])
    _, reader = read([write_run(tmp_path / "a", record), write_run(tmp_path / "b", plain)])
    caption = "Deviations from upstream's own run"
    assert reader.row(caption, "library torch") == ["library torch", "2.0.1", "2.8.0", "CUDA 12", "all"]
    assert reader.row(caption, "fp16 [amazon]") == ["fp16 [amazon]", "–", "on", "a reason", "A seed 42"]


def test_pins_trees_settings_and_records_can_be_traced(page, four):
    text, reader = page
    pins = "Upstream's code and the inputs, by hash"
    assert reader.row(pins, "upstream.pinned commit")[1] == "7" * 40
    assert reader.row(pins, "upstream.patched tree (git hash)")[1] == "b" * 40
    assert reader.row("Every setting", "order")[1] == "1 (default)"
    assert reader.row("Every setting", "sam")[1] == "A off (command line) B sam (command line)"
    for folder in four:
        run = read_run(folder)
        assert reader.row("Where each number comes from", folder.name)[-1] == run.digest[:16]


def test_flatness_is_tabled_per_time_and_setting(page):
    """Off: 10, 11, 12 on the first task, so 11 ± 1; with SAM half of 10 and 11, so 5.25 ± sqrt(0.125) = 0.35."""
    _, reader = page
    caption = "Measured in scope adapter, on 64 samples"
    assert reader.row(caption, "top eigenvalue", "before", "A")[3:] == ["11 ± 1", "12 ± 1", "13 ± 1", "14 ± 1"]
    assert reader.row(caption, "top eigenvalue", "after", "B")[3] == "5.25 ± 0.35"
    assert [row for row in reader.table(caption) if row[0] == "trace"] == []
    writing = "These numbers, the loss apart, depend on how LoRA's factors are written"
    assert any(writing in text for text in reader.tables)
    # 5 finished runs, 4 tasks, 2 times
    assert any("40 measured values have no number" in text for text in reader.tables)


def test_blocks_are_tabled_by_layer_and_factor(tmp_path):
    record = make_record()
    record["flatness"] = [flatness_entry(k, "after", "adapter", {"layer_trace_max": 3.0}) for k in range(2)]
    folder = write_run(tmp_path / "run", record)
    blocks = {"layers": {"block.0": {"size": 5, "top_eigenvalue": 2.0, "trace": 3.0}}}
    blocks["factors"] = {"A": {"size": 7, "top_eigenvalue": None, "trace": 1.5}}
    path = folder / record["flatness"][1]["file"]
    path.parent.mkdir()
    path.write_text(json.dumps({"scopes": {"adapter": {"results": {"layers": blocks}}}}), encoding="utf-8")
    _, reader = read([folder])
    caption = f"Curvature by layer and factor in scope adapter, after task 2 {record['tasks'][1]}"
    assert reader.row(caption, "block.0") == ["block.0", "A", "5", "2", "3"]
    assert reader.row(caption, "all factors A") == ["all factors A", "A", "7", "–", "1.5"]
    (whole,) = (text for text in reader.tables if text.startswith(caption))
    assert "These numbers, the loss apart, depend on how LoRA's factors are written" in whole
    path.write_text("damaged", encoding="utf-8")
    assert not any("Curvature by layer" in text for text in read([folder])[1].tables)


def test_entries_that_measured_nothing_are_no_number(tmp_path):
    record = make_record()
    record["flatness"] = [flatness_entry(0, "after", "merged", {}, loss=None, samples=3)]
    _, reader = read([write_run(tmp_path / "run", record)])
    assert reader.table("Measured in scope merged")[1:] == []


def test_flatness_figure_has_one_panel_per_scalar(four):
    groups = group_runs([read_run(folder) for folder in four])
    names = ["loss", "top_eigenvalue", "top_eigenvalue_residual"]
    figure = page_figures.make_flatness_figure(groups, ["A", "B"], "adapter", names)
    axes = [axes for axes in figure.axes if axes.axison]
    assert [one.get_title() for one in axes] == ["top eigenvalue"]
    lines = {line.get_label(): line.get_ydata() for line in axes[0].get_lines()}
    np.testing.assert_allclose(lines["A: SAM off (n = 3), after training the task"], [11, 12, 13, 14])
    assert "constant to a thousandth: loss = 0.5." in small_print(figure)


@pytest.mark.parametrize("when", [["after"], ["before", "after"]])
def test_flatness_of_a_single_task_stands_over_the_times_and_fills_its_panels(when, tmp_path):
    record = make_record()
    record["flatness"] = [
        flatness_entry(2, at, "adapter", {"top_eigenvalue": 4.0 + 3 * k, "trace": 9.0 - k}, loss=1.0 + k)
        for k, at in enumerate(["before", "after"])
        if at in when
    ]
    groups = group_runs([read_run(write_run(tmp_path / "run", record))])
    figure = page_figures.make_flatness_figure(groups, ["A"], "adapter", ["loss", "top_eigenvalue", "trace"])
    if when == ["after"]:
        assert figure is None  # a number each: the table has them
        return
    assert [axes.get_title() for axes in figure.axes] == ["loss", "top eigenvalue", "trace"]
    axes = figure.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == when
    points = np.concatenate([line.get_xydata() for line in axes.get_lines() if line.get_marker() == "o"])
    np.testing.assert_allclose(sorted(points.tolist()), [[0, 4], [1, 7]])
    assert "Measured on one task alone: 3 yahoo." in small_print(figure)


def test_curves_are_means_over_seeds(four):
    groups = group_runs([read_run(folder) for folder in four])
    figure = page_figures.make_mean_figure(groups, ["A", "B"])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    means = [mean_accuracies(read_run(folder)) for folder in four[:3]]
    np.testing.assert_allclose(lines["A: SAM off (n = 3)"], np.mean(means, axis=0))
    steps = page_figures.make_losses_figure(groups, ["A", "B"])
    assert [axes.get_ylabel() for axes in steps.axes] == ["training loss", "perturbed loss\n(at the ascent step)"]
    assert page_figures.make_ascent_figure(groups[:1], ["A"]) is None  # SAM off


@pytest.mark.parametrize(("size", "legends", "bands"), [(4, 1, 4), (40, 0, 0)])
def test_many_tasks_are_told_apart_by_shade_and_few_by_name(tmp_path, size, legends, bands):
    tasks = tuple(f"classes {k}" for k in range(size))
    for seed in (0, 1):
        matrix = [[50.0 + i - j + seed if j <= i else None for j in range(size)] for i in range(size)]
        write_run(tmp_path / str(seed), seeded(seed, tasks=tasks, accuracy_matrix=matrix))
    (group,) = group_runs([read_run(tmp_path / str(seed)) for seed in (0, 1)])
    figure = page_figures.make_tasks_figure(group)
    lines = figure.axes[0].get_lines()
    assert len(lines) == size
    np.testing.assert_allclose(lines[0].get_ydata(), 50.5 + np.arange(size))
    assert len({str(line.get_color()) for line in lines}) == size
    assert len(figure.legends) == legends
    assert len(figure.axes[0].collections) == bands


def test_steps_of_seeds_are_averaged_step_by_step(tmp_path):
    for seed, loss in ((0, 1.0), (1, 3.0)):
        rows = [{"task": "dbpedia", "step": k, "loss": loss * k} for k in range(1, 4)]
        write_run(tmp_path / str(seed), seeded(seed), rows)
    groups = group_runs([read_run(tmp_path / str(seed)) for seed in (0, 1)])
    line = page_figures.make_losses_figure(groups, ["A"]).axes[0].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), [2.0, 4.0, 6.0])
    # Losses k and 3k lie sqrt(2) k around their mean 2k, with n - 1.
    band = page_figures.make_losses_figure(groups, ["A"]).axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(6.0 + 3 * math.sqrt(2))
    assert page_figures.step_summary(groups[0].runs[1])["loss"] == pytest.approx(6.0)


def test_mean_loss_is_of_one_loss_where_batches_take_two_steps(tmp_path):
    rows = [
        {"task": "dbpedia", "step": k, "loss": value, "perturbed_loss": value + rise, "loss_name": name}
        for k, (name, value, rise) in enumerate([("distillation", 9.0, 3.0), ("task", 1.0, 0.5)] * 2, start=1)
    ]
    write_run(tmp_path / "0", seeded(0), rows)
    summary = page_figures.step_summary(read_run(tmp_path / "0"))
    assert (summary["loss"], summary["rise"]) == (1.0, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_training_that_diverged_is_shown_as_such(tmp_path, bad):
    for seed in (0, 1):
        rows = make_steps(steps=5)
        rows[-1] |= {"loss": bad, "perturbed_loss": bad}
        if seed:
            rows = [row | {"loss": bad} for row in rows]
        write_run(tmp_path / str(seed), seeded(seed), rows)
    _, reader = read([tmp_path / "0", tmp_path / "1"])
    assert reader.row("Means over all logged steps", "A SAM rho=0.05")[1] == f"{bad} ± nan"


def test_page_is_whole_and_needs_nothing_else(page):
    text, reader = page
    assert reader.problems == []
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes[name][:80])
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_page_can_be_read_without_seeing_it(page):
    _, reader = page
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"]
    assert set(links) <= set(ids)
    assert links
    levels = [level for level, _ in reader.headings]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("table") == tags.count("caption")
    assert all(attributes.get("scope") for tag, attributes in reader.tags if tag == "th")
    assert all(len(attributes["alt"]) > 10 for tag, attributes in reader.tags if tag == "img")
    assert tags.count("img") >= 6
    assert {"lang": "en-GB"} in [attributes for tag, attributes in reader.tags if tag == "html"]


def luminance(colour):
    """Relative luminance of a colour, WCAG 2.1."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_from_its_background(page):
    """WCAG 2.1 AA asks for 4.5 : 1."""
    text, _ = page
    themes = re.findall(r":root \{([^}]*)\}", text)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ink, paper in (("ink", "paper"), ("soft", "paper"), ("soft", "panel"), ("link", "paper")):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert contrast(colours["warn-ink"], colours["warn"]) >= 4.5
    for level in range(21):
        for ink in re.findall(r"\.heat td(?: small)? \{[^}]*?color: (#\w{6})", text):
            assert contrast(ink, page_module._heat(level)) >= 4.5
    assert all(contrast("#ffffff", colour) >= 4.5 for colour in page_figures.COLOURS)


def test_hostile_text_stays_text(tmp_path):
    tasks = ("<b>bold</b>", HOSTILE.replace("/", "∕"))
    record = seeded(0, tasks=tasks)
    record |= {"method": HOSTILE, "benchmark": HOSTILE, "notes": [HOSTILE], "profile_reason": HOSTILE}
    record["settings"][HOSTILE] = {"value": HOSTILE, "source": "command line"}
    record["deviations"] = [{"what": HOSTILE, "upstream": HOSTILE, "here": HOSTILE, "why": HOSTILE, "tasks": [HOSTILE]}]
    record["environment"] = {
        HOSTILE: HOSTILE,
        "flatpatch": {"commit": HOSTILE},
        "variables": {"OMP_NUM_THREADS": HOSTILE},
    }
    record["upstream"] = dict.fromkeys(("repo", "pin", "base_tree", "patched_tree"), HOSTILE)
    record["metrics"][HOSTILE] = 1.0
    record["inputs"] = {HOSTILE: HOSTILE}
    record["timing"]["started"] = HOSTILE
    record["flatness"] = [flatness_entry(0, "after", "adapter", {HOSTILE: 1.0, "<u>": 2.0}, task=tasks[0])]
    failed = seeded(1, tasks=tasks, done=1) | {"error": HOSTILE, "status": "failed"}
    comparison = dict.fromkeys(("verdict", "why"), HOSTILE) | {
        "baseline": dict.fromkeys(("name", "source", "kind", "verification"), HOSTILE),
        "metrics": [
            dict.fromkeys(("metric", "test", "verdict", "why"), HOSTILE) | {"here": {"mean": 1.0}, "there": None}
        ],
    }
    name = HOSTILE.replace("/", "∕")
    folders = [write_run(tmp_path / name, record), write_run(tmp_path / "b", failed)]
    text, reader = read(folders, comparisons={"A": comparison}, unreadable=[HOSTILE])
    assert reader.problems == []
    found = {tag for tag, _ in reader.tags}
    assert not found & {"script", "b", "i", "u"}
    assert not [attributes for _, attributes in reader.tags if "onerror" in attributes]
    assert [attributes["src"][:5] for tag, attributes in reader.tags if tag == "img"] == ["data:"] * [
        tag for tag, _ in reader.tags
    ].count("img")
    assert reader.words.count("alert(2)") >= 20
    assert name in [row[0] for row in reader.table("Where each number comes from")]


def test_words_break_behind_signs_and_long_ones_in_pieces():
    assert page_module.pieces("model_name_or_path") == ["model_", "name_", "or_", "path"]
    assert page_module.pieces("eigenvalues of 0.05 and 1e-5") == ["eigenvalues of 0.05 and 1e-5"]
    assert "".join(page_module.pieces("a" * 60)) == "a" * 60
    assert list(map(len, page_module.pieces("a" * 60))) == [24, 24, 12]
    assert page_module.pieces("") == []


def flat_steps():
    """Return steps whose perturbation is the same everywhere."""
    exact = {"perturbation_norm": 0.05, "effective_perturbation_norm": 0.05, "perturbation_cosine": 1.0}
    return [row | exact for row in make_steps()]


def test_captions_promise_nothing_that_is_not_drawn(tmp_path, page):
    record = seeded(0)
    record["flatness"] = [flatness_entry(k, "after", "adapter", {"top_eigenvalue": 10.0 + k}) for k in range(4)]
    _, reader = read([write_run(tmp_path / "run", record, flat_steps())])
    assert "bands" not in reader.words
    assert reader.words.count("standard deviation") == 1  # what ± would mean, above the summary
    assert "Gradient norm under SAM" in reader.words and "SAM's perturbation" not in reader.words
    assert page[1].words.count("bands: one standard deviation over seeds") >= 3


def test_values_without_a_panel_are_told_in_words(tmp_path):
    groups = group_runs([read_run(write_run(tmp_path / "run", seeded(0), flat_steps()))])
    words = small_print(page_figures.make_ascent_figure(groups, ["A"]))
    assert "norm of the perturbation, before and after rounding = 0.05; cosine, after to before rounding = 1." in words
    assert "thin" not in words


def test_norms_are_called_those_of_the_factors_where_the_radius_is_of_the_weights(tmp_path):
    record = seeded(0)
    record["settings"]["sam_radius"] = {"value": "effective", "source": "command line"}
    _, reader = read([write_run(tmp_path / "run", record, make_steps())])
    assert any("norms here are those of the factors' own step" in text for text in reader.tables)
    assert "intended" not in reader.words and "SAM rho=0.05 scope=lora sam_radius=effective" in reader.words


def test_run_that_was_perturbed_from_its_second_task_on_is_drawn_and_named(tmp_path):
    both = zip(make_steps(), make_steps(sam=False), strict=True)
    steps = [plain if plain["task"] == ORDER_1[0] else perturbed for perturbed, plain in both]
    groups = group_runs([read_run(write_run(tmp_path / "run", seeded(0), steps))])
    figure = page_figures.make_ascent_figure(groups, ["A"])
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 1
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 2]
    assert min(line.get_xdata()[0] for line in lines) > 60


def test_pictures_are_captioned_in_words(tmp_path):
    folder = write_run(tmp_path / "run", seeded(0))
    picture(folder / "figures" / "flatness_adapter_landscape_2.png", (40, 40))
    _, reader = read([folder])
    assert "Loss landscape, task 2 amazon: LoRA factors A and B" in reader.words


def told_settings(tmp_path, words, environment, **changes):
    record = make_record(settings=parse(words).as_record(), **changes)
    record["environment"] |= environment
    return read([write_run(tmp_path / "run", record)])


def test_settings_that_changed_nothing_are_not_listed(tmp_path):
    _, reader = told_settings(tmp_path, ["method=nlora", "sam=off"], {"launcher": "python"})
    names = [row[0] for row in reader.table("Every setting that had an effect")]
    assert "sam" in names and "order" in names
    assert not {"rho", "eta", "scope", "port", "measure_scope", "measure_samples", "output"} & {*names}


@pytest.mark.parametrize(("profile", "by"), [("upstream", "left to the machine"), ("quick", "by profile quick")])
def test_threads_are_those_that_ran_with_who_chose_them(tmp_path, profile, by):
    training = [{"steps": 1, "threads": 3}] * 4
    _, reader = told_settings(tmp_path, ["method=nlora"], {"threads": 8}, training=training, profile=profile)
    assert reader.row("Every setting", "threads")[1] == f"3, {by} (default)"
    assert "3 threads: another number can change results." in reader.words


@pytest.mark.parametrize("given", [[], ["device=auto"]])
def test_command_to_run_again_names_what_auto_came_to(given, tmp_path):
    text, _ = told_settings(tmp_path, ["method=nlora", *given], {"device": "cpu", "launcher": "python"})
    (command,) = re.findall(r"run\.sh run (.*)", text)
    assert {"device=cpu", "launcher=python"} <= {*command.split()}
    assert command.count("device=") == 1


def test_title_calls_the_method_as_the_terminal_does(tmp_path):
    folder = write_run(tmp_path / "run", seeded(0))
    leave_page([folder])
    reader = Reader((folder / "report.html").read_text(encoding="utf-8"))
    assert reader.headings[0][1].startswith("flatpatch reportN-LoRA on standard CL benchmark")


def test_the_matrix_has_the_colours_of_the_run_s_own_figure():
    (image,) = make_matrix_figure(seeded(0)).axes[0].get_images()
    colours = [to_hex(image.to_rgba(float(value))) for value in range(0, 101, 5)]
    assert page_module.heat() == colours


def test_dollars_in_a_name_are_no_formula(tmp_path):
    tasks = (r"$\frac{1}$", "$x$")
    text, reader = read([write_run(tmp_path / "run", seeded(0, tasks=tasks), make_steps(tasks, steps=3))])
    assert r"1 $\frac{1}$" in [row[0] for row in reader.table("Accuracy in percent")]


def test_logarithmic_axes_have_plain_numbers(tmp_path):
    rows = [{"task": "dbpedia", "step": k, "loss": 10.0 ** (3 - k)} for k in range(1, 6)]
    groups = group_runs([read_run(write_run(tmp_path / "run", seeded(0), rows))])
    with page_module.rc_context({"text.parse_math": False}):
        figure = page_figures.make_losses_figure(groups, ["A"])
        figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert {"0.01", "1", "100"} <= {label.get_text() for label in axes.get_yticklabels()}


@pytest.mark.parametrize("size", [1, 4, 15, 40])
def test_matrix_has_a_row_and_a_column_per_task(tmp_path, size):
    tasks = (ORDER_1 if size == 4 else LONG if size == 15 else tuple(f"classes {k}" for k in range(size)))[:size]
    matrix = [[50.0 + i - j if j <= i else None for j in range(size)] for i in range(size)]
    _, reader = read([write_run(tmp_path / "run", seeded(0, tasks=tasks, accuracy_matrix=matrix))])
    assert reader.problems == []
    rows = reader.table("Accuracy in percent")
    assert [len(row) for row in rows] == [size + 2] * (size + 2)
    assert rows[0][1:-1] == list(tasks)


def test_the_same_runs_give_the_same_page(page, four):
    assert read(four)[0] == page[0]


def test_progress_is_told_once_per_figure(four):
    groups = group_runs([read_run(folder) for folder in four])
    told = []
    make_page(groups, advance=lambda: told.append(1))
    assert len(told) == work(groups)


def test_reason_for_the_engine_stands_once_and_in_one_line(tmp_path):
    """Records of earlier versions hold the whole search for the repository, twice."""
    reason = "N-LoRA cannot be had: N-LoRA is not here. Looked in\n    third_party/N-LoRA: empty"
    record = make_quick_record(engine_reason=reason)
    record["deviations"] = [{"what": "engine", "upstream": "theirs", "here": "ours", "why": reason}]
    _, reader = read([write_run(tmp_path / "run", record)])
    assert reader.words.count("cannot be had") == 1
    assert "Looked in" not in reader.words
    assert reader.row("Deviations", "engine")[3] == "see engine, at the top"


def picture(path, size, mode="RGB"):
    Image.new(mode, size, "white").save(path)


def test_measured_pictures_are_embedded_and_made_smaller(tmp_path):
    folder = write_run(tmp_path / "run", make_record())
    picture(folder / "figures" / "flatness_adapter_landscape_1_after.png", (3000, 1500), "RGBA")
    picture(folder / "figures" / "loss.png", (10, 10))  # drawn anew by the page
    (folder / "figures" / "flatness_damaged.png").write_bytes(b"\x89PNG\r\n")
    _, reader = read([folder])
    shown = [attributes for tag, attributes in reader.tags if tag == "img" and "landscape" in attributes["alt"]]
    assert len(shown) == 1
    content = base64.b64decode(shown[0]["src"].partition("base64,")[2])
    assert Image.open(io.BytesIO(content)).size == (1400, 700)
    assert "flatness_damaged.png of run cannot be read" in reader.words
    assert "loss.png" not in reader.words


def test_pictures_beyond_the_limit_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "LARGEST_TOTAL", 100)
    folder = write_run(tmp_path / "run", make_record())
    picture(folder / "figures" / "flatness_density.png", (800, 600))
    other = write_run(tmp_path / "other", make_record(seeds=[1]))
    picture(other / "figures" / "flatness_density.png", (80, 60))
    _, reader = read([folder, other])
    assert "flatness_density.png of run: the page would grow too large" in reader.words
    assert "1 of other: one run of each setting is shown" in reader.words


COMPARISON = {
    "baseline": {"name": "paper_nlora", "source": "arXiv:2410.10179", "kind": "paper", "verification": "multi"},
    "verdict": "off by -1.50",
    "why": "the interval leaves out 0",
    "metrics": [
        {
            "metric": "average_accuracy",
            "here": {"mean": 77.7, "standard_deviation": 0.25, "n": 3, "values": [77.45, 77.7, 77.95]},
            "there": {"mean": 79.2, "standard_deviation": None, "n": None, "values": None},
            "difference": -1.5,
            "interval": [-2.12, -0.88],
            "detectable": 1.03,
            "test": "prediction interval",
            "verdict": "off by -1.50",
            "why": "because",
        }
    ],
}


def test_comparison_is_shown_as_it_was_made(tmp_path):
    folders = [write_run(tmp_path / sam, seeded(0, sam=sam)) for sam in ("off", "sam")]
    _, reader = read(folders, comparisons={"A": COMPARISON, "B": {"refused": "quick runs are not compared"}})
    assert reader.row("A beside paper_nlora", "average accuracy") == [
        *("average accuracy", "77.70 ± 0.25 (n = 3)", "79.20", "-1.50", "-2.12 to -0.88", "1.03"),
        *("prediction interval", "off by -1.50: because"),
    ]
    assert "paper_nlora (paper), from arXiv:2410.10179; verified: multi" in reader.words
    assert "Not compared: quick runs are not compared" in reader.words


def test_report_compares_each_setting_with_what_was_published(tmp_path, capsys):
    """The N-LoRA paper prints 79.2 for order 1; a quick run is put beside nothing."""
    for seed, average in ((0, 78.0), (1, 78.4)):
        write_run(tmp_path / f"full{seed}", with_average(seeded(seed, sam="off"), average))
    write_run(tmp_path / "quick", make_quick_record())
    write_run(tmp_path / "unfinished", seeded(0, done=1))
    assert show([f"run={tmp_path}"]) == 0
    capsys.readouterr()
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    row = reader.row("A beside paper_nlora", "average accuracy")
    assert row[1:4] == ["78.20 ± 0.28 (n = 2)", "79.20", "-1.00"]
    assert "not comparable because" in reader.words
    assert "Not compared: no run of this setting is finished." in reader.words


def test_command_to_run_again_asks_for_the_same_settings(tmp_path):
    words = ["method=nlora", "sam=sam", "rho=0.1", "tasks=amazon,agnews", "order=2", "upstream.lamda_1=0.4"]
    folders = []
    for seed in (0, 1):
        request = parse([*words, f"seed={seed}"])
        record = make_record(seeds=[seed], settings=request.as_record())
        record["environment"] = {
            "threads": 1,
            "variables": {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            "flatpatch": {"version": "0.1.0", "commit": "f" * 40 + "-dirty"},
        }
        folders.append(write_run(tmp_path / str(seed), record))
    text, reader = read(folders)
    (shown,) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", text, re.DOTALL)
    lines = shown.splitlines()
    assert lines[:2] == [f"git checkout {'f' * 40}", "git submodule update --init third_party/N-LoRA"]
    start = "OMP_NUM_THREADS=1 bash run_scripts/run.sh sweep "
    assert lines[2].startswith(start)
    requests = [parse(combination) for combination in expand(shlex.split(lines[2].removeprefix(start)))]
    for seed, again in enumerate(requests):
        asked = parse([*words, f"seed={seed}", "profile=upstream", "engine=upstream", "output=runs-again"])
        assert again.settings == asked.settings
        assert again.overrides == asked.overrides
    assert "edits that are in no commit" in reader.words


@pytest.mark.parametrize(
    ("profile", "words", "expected"),
    [("quick", [], ""), ("upstream", ["threads=2"], ""), ("upstream", [], "OMP_NUM_THREADS=2 ")],
)
def test_command_to_run_again_sets_the_threads_only_where_the_run_does_not(profile, words, expected, tmp_path):
    record = make_record(profile=profile, settings=parse(["method=nlora", *words]).as_record())
    record["environment"] = {"threads": 2, "variables": {"OMP_NUM_THREADS": "2"}}
    text, _ = read([write_run(tmp_path / "run", record)])
    (shown,) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", text, re.DOTALL)
    assert shown.splitlines()[-1].startswith(f"{expected}bash run_scripts/run.sh run ")


def test_report_writes_the_page_of_one_run_into_its_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run", make_record(), make_steps(steps=4))
    assert main(["report", f"run={folder}"]) == 0
    shown = capsys.readouterr().out
    assert f"page     {folder / 'report.html'}" in shown
    assert "accuracy in percent" in shown  # the table, as before
    assert (folder / "figures" / "loss.png").is_file()
    assert Reader((folder / "report.html").read_text(encoding="utf-8")).problems == []


def test_page_that_takes_the_place_of_another_says_so(tmp_path, capsys):
    """A sweep into ``runs/`` leaves its page where ``report run=runs`` left one about all runs."""
    folders = [write_run(tmp_path / str(seed), seeded(seed, sam="off")) for seed in (0, 1)]
    page = tmp_path / "report.html"
    leave_page(folders)
    assert capsys.readouterr().out.endswith(f"page     {page}\n")
    leave_page(folders)
    assert capsys.readouterr().out.endswith(f"page     {page} (in place of the one that was there)\n")


@pytest.mark.slow
def test_report_of_a_folder_of_runs_names_the_damaged(tmp_path, capsys):
    make_four(tmp_path)
    (tmp_path / "nlora-off-seed1" / "record.json").write_text("{", encoding="utf-8")
    assert main(["report", f"run={tmp_path}"]) == 0
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "nlora-off-seed1/record.json is cut short" in reader.words
    assert reader.row(SUMMARY, "A SAM off")[1:4] == ["2", "0, 2", "73.50 ± 4.95"]
    assert f"page     {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["none/report.html", "."])
def test_page_in_a_wrong_place_is_refused_before_anything_is_written(tmp_path, page, capsys):
    folder = write_run(tmp_path / "run", make_record())
    assert main(["report", f"run={folder}", f"page={tmp_path / page}"]) == 2
    assert "page=" in capsys.readouterr().err
    assert list((folder / "figures").iterdir()) == []


def test_page_in_a_read_only_place_is_refused_before_anything_is_written(tmp_path, capsys):
    folder = write_run(tmp_path / "run", make_record())
    assert main(["report", f"run={folder}", "page=/proc/x.html"]) == 2
    said = capsys.readouterr()
    assert "the page cannot be written into /proc: the place is read-only" in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert list((folder / "figures").iterdir()) == []


def test_report_without_a_run_says_what_it_takes(tmp_path):
    for words, said in (
        (["page=x"], "report needs either run=FOLDER"),
        (["run="], "run= is empty. See report --help"),
        (["run=x", "seed=1"], "unknown setting 'seed' of report"),
    ):
        with pytest.raises(UserError, match=said):
            show(words)
    with pytest.raises(UserError, match="no record"):
        show([f"run={tmp_path}"])


@pytest.mark.parametrize("verb", ["report", "compare"])
@pytest.mark.parametrize(("name", "place"), [("runs/none", "runs/none"), ("none", "runs/none"), ("a/b", "a/b")])
def test_run_that_is_not_there_is_named_as_it_was_given(verb, name, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([verb, f"run={name}"]) == 2
    assert f"run={name}: there is no run {tmp_path / place}." in capsys.readouterr().err

"""Reading upstream's result files: the runs O-LoRA ships must give the numbers worked out from them before.

The same comparison runs on files in upstream's format written here from the packaged numbers, so that it
does not depend on a checkout; the files a run can leave behind when it goes wrong are written here too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flatpatch import metrics
from flatpatch.errors import UserError
from flatpatch.families.text.results import read_results, read_task_results

BASELINES = Path(__file__).parents[3] / "flatpatch" / "baselines"
SHIPPED = {
    "olora_order1": "order1_olora",
    "olora_order1_icrlora": "order1_icrlora",
    "olora_order1_seqlora": "order1_seqlora",
    "olora_order1_seqft": "order1_seqft",
    "olora_long": "long_olora",
    "olora_long_icrlora": "long_icrlora",
    "olora_long_seqlora": "long_seqlora",
}
ORDER_1 = ("dbpedia", "amazon", "yahoo", "agnews")


def baseline(name):
    return json.loads((BASELINES / f"{name}.json").read_text(encoding="utf-8"))


def file_of_step(step, tasks, row, *, weighted=70.0, samples=100):
    """Return one step's results as upstream writes them, with some of the keys that are not read."""
    results = {"epoch": 1.0, "train_loss": 0.25, "train_runtime": 12.5, "train_samples": 1000}
    if row is not None:
        results |= {f"predict_exact_match_for_{task}": value for task, value in zip(tasks, row, strict=False)}
        results |= {
            "predict_exact_match": weighted,
            "predict_exact_match_for_TC": 1.0,
            "predict_rouge1_for_dbpedia": 2.0,
            "predict_runtime": 3.5,
            "predict_samples": samples * (step + 1),
        }
    return results


def write_step(outputs, step, task, content):
    folder = outputs / f"{step + 1}-{task}"
    folder.mkdir(parents=True)
    path = folder / "all_results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4), encoding="utf-8")
    return path


@pytest.fixture
def outputs(tmp_path):
    """Four steps of order 1, each accuracy its own number: 10 * step + task."""
    for step, task in enumerate(ORDER_1):
        row = [10 * step + j for j in range(step + 1)]
        write_step(tmp_path / "outputs", step, task, file_of_step(step, ORDER_1, row))
    return tmp_path / "outputs"


def rewrite(outputs, step, content):
    path = outputs / f"{step + 1}-{ORDER_1[step]}" / "all_results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def edit(outputs, step, **changes):
    """Change keys of one step's file; None removes one."""
    path = outputs / f"{step + 1}-{ORDER_1[step]}" / "all_results.json"
    results = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in results.items() if v is not None}), encoding="utf-8")
    return path


def assert_equals_baseline(results, expected):
    """Compare with the packaged numbers, which have four decimals like upstream's files."""
    numbers = expected["metrics"]
    size = len(results.tasks)
    matrix = [row or [None] * size for row in numbers["accuracy_matrix"]]
    assert metrics.to_lists(results.accuracy) == matrix
    assert list(results.samples) == expected["setting"]["test_samples_cumulative"]
    assert list(results.train_samples) == expected["setting"]["train_samples_per_task"]
    assert list(results.train_seconds) == numbers["train_runtime_per_task_s"]
    assert list(results.predict_seconds) == numbers["predict_runtime_per_step_s"]
    rounded = {
        "final_accuracy": metrics.average_accuracy(results.accuracy),
        "micro_final": results.sample_weighted[-1],
        "average_accuracy": metrics.average_over_steps(results.accuracy),
        "forgetting": metrics.forgetting(results.accuracy),
        "bwt": metrics.backward_transfer(results.accuracy),
        "learning_accuracy": metrics.learning_accuracy(results.accuracy),
    }
    for name, value in rounded.items():
        mean = numbers[name]["mean"]
        assert (value is None) == (mean is None), name
        assert value is None or round(value, 4) == mean, name
    steps = [None if mean is None else round(mean, 4) for mean in results.task_mean]
    assert steps == numbers["average_accuracy_per_step"]


@pytest.mark.third_party
@pytest.mark.parametrize(("name", "folder"), SHIPPED.items())
def test_shipped_results_give_the_packaged_numbers(upstream, name, folder):
    expected = baseline(name)
    outputs = upstream("O-LoRA") / "logs_and_outputs" / folder / "outputs"
    results = read_results(outputs, expected["setting"]["task_order"], partial=name == "olora_order1_seqlora")
    assert_equals_baseline(results, expected)


@pytest.mark.parametrize("name", SHIPPED)
def test_files_in_upstreams_format_give_the_packaged_numbers(tmp_path, name):
    expected = baseline(name)
    setting, numbers = expected["setting"], expected["metrics"]
    tasks = setting["task_order"]
    for step, task in enumerate(tasks):
        row = numbers["accuracy_matrix"][step]
        content = file_of_step(step, tasks, row and row[: step + 1], weighted=numbers["micro_final"]["mean"])
        content |= {
            "train_samples": setting["train_samples_per_task"][step],
            "train_runtime": numbers["train_runtime_per_task_s"][step],
        }
        if row is not None:
            content |= {
                "predict_samples": setting["test_samples_cumulative"][step],
                "predict_runtime": numbers["predict_runtime_per_step_s"][step],
            }
        write_step(tmp_path, step, task, content)
    assert_equals_baseline(read_results(tmp_path, tasks, partial=name == "olora_order1_seqlora"), expected)


@pytest.mark.third_party
def test_forgetting_of_the_tasks_with_an_earlier_evaluation_matches_the_packaged_partial_value(upstream):
    outputs = upstream("O-LoRA") / "logs_and_outputs" / "order1_seqlora" / "outputs"
    results = read_results(outputs, ORDER_1, partial=True)
    per_task = metrics.forgetting_per_task(results.accuracy)
    assert math.isnan(per_task[2])
    assert [round(x, 4) for x in per_task[:2]] == baseline("olora_order1_seqlora")["metrics"]["forgetting_partial"][
        "per_task"
    ]


@pytest.mark.third_party
def test_shipped_results_with_a_missing_prediction_are_refused_unless_partial(upstream):
    outputs = upstream("O-LoRA") / "logs_and_outputs" / "order1_seqlora" / "outputs"
    with pytest.raises(UserError, match=r"3-yahoo/all_results.json has no predictions"):
        read_results(outputs, ORDER_1)


def test_row_is_the_step_and_column_the_task(outputs):
    results = read_results(outputs, ORDER_1)
    nan = math.nan
    expected = [[0, nan, nan, nan], [10, 11, nan, nan], [20, 21, 22, nan], [30, 31, 32, 33]]
    assert np.array_equal(results.accuracy, expected, equal_nan=True)
    assert results.tasks == ORDER_1
    assert results.task_mean == (0, 10.5, 21, 31.5)
    assert results.sample_weighted == (70.0,) * 4
    assert results.samples == (100, 200, 300, 400)


def test_matrix_cannot_be_edited(outputs):
    with pytest.raises(ValueError, match="read-only"):
        read_results(outputs, ORDER_1).accuracy[0, 0] = 1


def test_steps_above_nine_are_read_by_number(tmp_path):
    tasks = [f"task{n}" for n in range(12)]
    for step, task in enumerate(tasks):
        write_step(tmp_path, step, task, file_of_step(step, tasks, [step] * (step + 1)))
    assert [row[0] for row in read_results(tmp_path, tasks).accuracy] == list(range(12))


def test_evaluations_of_tasks_to_come_are_kept(outputs):
    edit(outputs, 0, predict_exact_match_for_amazon=42.0)
    assert read_results(outputs, ORDER_1).accuracy[0, 1] == 42


def test_group_results_are_not_taken_for_a_task(outputs):
    with pytest.raises(UserError, match="1-TC"):
        read_results(outputs, ("TC",))


def test_files_beside_the_steps_are_left_alone(outputs):
    (outputs / "null.txt").touch()
    (outputs / "logs").mkdir()
    assert read_results(outputs, ORDER_1).tasks == ORDER_1


def test_missing_folder_is_a_users_error_that_names_the_first_file_expected(tmp_path):
    with pytest.raises(UserError, match=r"no results folder .*gone\. Expected it to hold 1-dbpedia/all_results\.json"):
        read_results(tmp_path / "gone", ORDER_1)


def test_missing_step_is_named(outputs):
    (outputs / "3-yahoo" / "all_results.json").unlink()
    with pytest.raises(UserError, match=r"no result file .*3-yahoo/all_results\.json"):
        read_results(outputs, ORDER_1)


def test_partial_leaves_missing_steps_unknown(outputs):
    for folder in ("3-yahoo", "4-agnews"):
        (outputs / folder / "all_results.json").unlink()
    results = read_results(outputs, ORDER_1, partial=True)
    assert np.isnan(results.accuracy[2:]).all()
    assert results.accuracy[1, 1] == 11
    assert results.sample_weighted == (70.0, 70.0, None, None)
    assert results.task_mean == (0, 10.5, None, None)
    assert results.samples == (100, 200, None, None)
    assert results.train_seconds == (12.5, 12.5, None, None)


def test_partial_of_a_run_that_has_not_begun_is_all_unknown(tmp_path):
    results = read_results(tmp_path / "gone", ORDER_1, partial=True)
    assert np.isnan(results.accuracy).all()
    assert results.samples == (None,) * 4


def test_partial_keeps_the_training_time_of_a_step_without_predictions(outputs):
    rewrite(outputs, 3, file_of_step(3, ORDER_1, None))
    results = read_results(outputs, ORDER_1, partial=True)
    assert results.train_seconds[3] == 12.5
    assert results.predict_seconds[3] is None
    assert np.isnan(results.accuracy[3]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: the task was stopped while writing it"),
        (" \n", "is empty"),
        ('{"predict_exact_match": 78.1, "predict_ex', "is cut short or not JSON .*column"),
        ("[1, 2]", "holds a list, expected an object"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_damaged_file_is_a_users_error(outputs, content, message, partial):
    path = rewrite(outputs, 1, content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(outputs, ORDER_1, partial=partial)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 100.1, "78.1", True, [78.1]])
def test_accuracy_that_is_no_percentage_is_refused(outputs, bad):
    edit(outputs, 1, predict_exact_match_for_amazon=bad)
    with pytest.raises(UserError, match="predict_exact_match_for_amazon is .*expected a percentage from 0 to 100"):
        read_results(outputs, ORDER_1)


def test_sample_weighted_average_that_is_nan_is_refused(outputs):
    edit(outputs, 3, predict_exact_match=math.nan)
    with pytest.raises(UserError, match="predict_exact_match is nan"):
        read_results(outputs, ORDER_1)


@pytest.mark.parametrize(("key", "bad"), [("predict_samples", 10.5), ("train_runtime", math.nan)])
def test_count_or_time_that_cannot_be_is_refused(outputs, key, bad):
    edit(outputs, 3, **{key: bad})
    with pytest.raises(UserError, match=f"{key} is {bad}, expected"):
        read_results(outputs, ORDER_1)


def test_missing_dataset_is_named_with_what_there_is(outputs):
    edit(outputs, 1, predict_exact_match_for_amazon=None, predict_exact_match_for_Amazon=50.0)
    with pytest.raises(
        UserError, match=r"no predict_exact_match_for_amazon\. Did you mean 'Amazon'\? It has: dbpedia, "
    ):
        read_results(outputs, ORDER_1, partial=True)


def test_missing_sample_weighted_average_is_named(outputs):
    edit(outputs, 1, predict_exact_match=None)
    with pytest.raises(UserError, match="has no predict_exact_match, the sample-weighted average"):
        read_results(outputs, ORDER_1)


@pytest.mark.parametrize("partial", [False, True])
def test_tasks_in_another_order_are_refused(outputs, partial):
    order_2 = ("dbpedia", "amazon", "agnews", "yahoo")
    with pytest.raises(UserError, match=r"another order: 3-yahoo, 4-agnews\. Expected .*3-agnews, 4-yahoo"):
        read_results(outputs, order_2, partial=partial)


def test_more_steps_than_tasks_are_refused(outputs):
    with pytest.raises(UserError, match="other tasks or another order: 4-agnews"):
        read_results(outputs, ORDER_1[:3])


def test_all_damaged_steps_are_named_at_once(outputs):
    rewrite(outputs, 0, "")
    rewrite(outputs, 2, "{")
    with pytest.raises(UserError, match=r"(?s)1-dbpedia.*is empty.*3-yahoo.*is cut short"):
        read_results(outputs, ORDER_1)


@pytest.mark.parametrize("tasks", [(), ("amazon", "amazon")])
def test_tasks_that_are_no_order_are_refused(tmp_path, tasks):
    with pytest.raises(ValueError, match="tasks must be distinct names"):
        read_results(tmp_path, tasks)


def test_one_file_is_returned_as_it_is(outputs):
    path = outputs / "1-dbpedia" / "all_results.json"
    assert read_task_results(path) == json.loads(path.read_text(encoding="utf-8"))

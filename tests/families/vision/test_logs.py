"""Upstream's vision logs: every run found, every number as printed, damage named with file and line."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flatpatch.comparison.sides import is_source, other_settings
from flatpatch.errors import UserError
from flatpatch.families.base import Family
from flatpatch.families.vision.logs import LoggedRun, read_log
from flatpatch.report.baselines import load_baseline
from flatpatch.upstreams import sdlora
from tests.vision_log_text import ROWS, log_text, run_lines, totals

INFLORA_LOGS = {
    "inflora_cifar100": "cifar100/10_10_sip/InfLoRA/adam/10/0.95_1.0-0.0005/0.log",
    "inflora_cifar100_shuffled_seed1993": "cifar100/10_10_sip/InfLoRA/adam/10/0.95_1.0-0.0005/1993.log",
    "inflora_imagenet_r_10": "ImageNet_R/20_20_sip/InfLoRA/adam/10/0.98_1.0-0.0005/0.log",
    "inflora_imagenet_r_10_shuffled_seed1993": "ImageNet_R/20_20_sip/InfLoRA/adam/10/0.98_1.0-0.0005/1993.log",
}
SDLORA_LOGS = {
    "sdlora_cifar100": "C100.log",
    "sdlora_imagenet_a_10": "InA.log",
    "sdlora_imagenet_r_5": "InR-T5.log",
    # The two are named the other way round.
    "sdlora_imagenet_r_10": "InR-T20.log",
    "sdlora_imagenet_r_20": "InR-T10.log",
}
# CL-LoRA's only log was deleted later; a shallow checkout does not have it.
CLLORA_COMMIT = "60c6acb769a9f80dc4c5989b616bf7c12bf9e0f2"
CLLORA_LOG = "logs/cllora/vtab/0/10/ _1993_vit_base_patch16_224_in21k_cllora.log"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "some.log"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def assert_equals_baseline(runs: list[LoggedRun], name: str) -> None:
    expected = load_baseline(name)["per_seed"]
    assert len(runs) == len(expected)
    for run, numbers in zip(runs, expected, strict=True):
        assert run.complete
        assert run.seed == numbers["seed"]
        assert run.first_line == numbers["log_line_start"]
        assert list(run.top1_curve) == numbers["top1_curve"]
        assert run.accuracy_matrix() == numbers["accuracy_matrix"]
        assert list(run.with_task_curve) == numbers.get("with_task_curve", [])
        assert list(run.task_id_curve) == numbers.get("task_id_accuracy_curve", [])
        order = list(run.class_order or ())
        assert order == (sorted(order) if numbers["class_order"] == "identity" else numbers["class_order"])


@pytest.mark.third_party
@pytest.mark.parametrize("name", INFLORA_LOGS)
def test_infloras_shipped_log_gives_the_baseline(name: str, upstream: Callable[[str], Path]) -> None:
    assert_equals_baseline(read_log(upstream("InfLoRA") / "logs" / INFLORA_LOGS[name]), name)


@pytest.mark.third_party
def test_logs_of_infloras_later_seeds_hold_no_run(upstream: Callable[[str], Path]) -> None:
    folder = (upstream("InfLoRA") / "logs" / INFLORA_LOGS["inflora_cifar100"]).parent
    assert [read_log(folder / f"{seed}.log") for seed in (1, 2, 3, 4)] == [[], [], [], []]


@pytest.mark.third_party
def test_clloras_deleted_log_gives_the_baseline(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    shown = subprocess.run(
        ["git", "-C", str(upstream("CL-LoRA")), "show", f"{CLLORA_COMMIT}:{CLLORA_LOG}"],
        capture_output=True,
        check=False,
    )
    if shown.returncode:
        pytest.skip(f"this checkout of CL-LoRA lacks commit {CLLORA_COMMIT}")
    path = tmp_path / "vtab.log"
    path.write_bytes(shown.stdout)
    runs = read_log(path)
    assert [len(run.top1_curve) for run in runs] == [0, 5, 0, 4]
    assert_equals_baseline([run for run in runs if run.complete], "cllora_vtab_5")
    # The author's second start was killed after four tasks that equal the first's.
    assert runs[3].top1_curve == runs[1].top1_curve[:4]


@pytest.mark.third_party
@pytest.mark.parametrize("name", SDLORA_LOGS)
def test_sdloras_shipped_log_gives_the_baseline(name: str, upstream: Callable[[str], Path]) -> None:
    path = upstream("SD-LoRA") / "logs" / SDLORA_LOGS[name]
    assert_equals_baseline(read_log(path), name)
    assert is_source(path, name)
    (run,) = Family("vision").read_log(path, [sdlora.UPSTREAM])
    assert run.subject == load_baseline(name)["applies_to"]
    assert other_settings(run, load_baseline(name)) == []


@pytest.mark.third_party
@pytest.mark.parametrize("name", SDLORA_LOGS)
def test_sdloras_printed_forgetting_is_of_groups_sorted_as_text(name: str, upstream: Callable[[str], Path]) -> None:
    (run,) = read_log(upstream("SD-LoRA") / "logs" / SDLORA_LOGS[name])
    (numbers,) = load_baseline(name)["per_seed"]
    columns = [f"{first:02}-{last:02}" for first, last in run.groups]
    size = len(columns)
    printed = np.zeros((size, size))
    for task, row in enumerate(run.accuracy):
        by_name = dict(zip(columns, row, strict=False))
        printed[task, : task + 1] = [by_name[column] for column in sorted(by_name)]
    forgetting = np.mean((printed.max(axis=0) - printed[-1])[:-1])
    assert forgetting == pytest.approx(numbers["forgetting_as_printed"], abs=1e-9)


@pytest.mark.third_party
def test_clloras_placeholder_holds_no_run(upstream: Callable[[str], Path]) -> None:
    assert read_log(upstream("CL-LoRA") / "logs" / "log.txt") == []


def test_inflora_run_is_read_as_printed(write: Callable[[str], Path]) -> None:
    (run,) = read_log(write(log_text(run_lines(seed=3))))
    assert (run.seed, run.complete, run.first_line) == (3, True, 1)
    assert run.settings["EPSILON"] == "1e-08"
    assert run.settings["prefix"] == ""
    assert run.class_order == tuple(range(30))
    assert run.accuracy == tuple(map(tuple, ROWS))
    # Hand-worked: (93 * 100 + 88.5 * 100 + 91 * 200) / 400 = 90.875, which rounds to 90.88.
    assert run.top1_curve == (98.0, 92.88, 90.88)
    assert run.with_task_curve == (99.5, 98.5, 97.5)
    assert run.task_id_curve == (1.0, 0.99, 0.98)
    assert run.nme_top1_curve == ()
    assert run.task_ranges == ((0, 9), (10, 19), (20, 29))
    assert run.accuracy_matrix() == [[98.0, None, None], [95.5, 90.25, None], [93.0, 88.5, 91.0]]


@pytest.mark.parametrize(("nme", "curve"), [(False, ()), (True, (50.0, 51.0, 52.0))])
def test_cllora_run_is_read_with_and_without_its_second_classifier(
    write: Callable[[str], Path], nme: bool, curve: tuple[float, ...]
) -> None:
    (run,) = read_log(write(log_text(run_lines(cllora=True, nme=nme))))
    assert run.accuracy == tuple(map(tuple, ROWS))
    assert run.top1_curve == tuple(totals(ROWS))
    assert run.nme_top1_curve == curve
    assert run.with_task_curve == (99.5, 98.5, 97.5)
    assert run.task_id_curve == (1.0, 0.99, 0.98)
    assert run.complete


def test_appended_seeds_and_killed_runs_are_told_apart(write: Callable[[str], Path]) -> None:
    whole = [run_lines(seed=seed) for seed in range(3)]
    only_settings = run_lines(seed=3)[:5]  # stopped before the seed's own line
    text = log_text(whole[0], whole[1][:-12], run_lines(seed=3)[:9], whole[2])
    runs = read_log(write(text))
    assert [(run.seed, run.complete, len(run.accuracy)) for run in runs] == [
        (0, True, 3),
        (1, False, 2),
        (3, False, 0),
        (2, True, 3),
    ]
    with pytest.raises(UserError, match=r"line 1: .* lacks a sound setting"):
        read_log(write(log_text(only_settings)))


def test_killed_run_has_a_matrix_with_gaps(write: Callable[[str], Path]) -> None:
    (run,) = read_log(write(log_text(run_lines()[:-12])))
    assert run.accuracy_matrix() == [[98.0, None, None], [95.5, 90.25, None], [None, None, None]]


def test_class_order_is_read(write: Callable[[str], Path]) -> None:
    order = [*range(29, -1, -1)]
    (run,) = read_log(write(log_text(run_lines(order=order))))
    assert run.class_order == tuple(order)


@pytest.mark.parametrize(
    ("classes", "first", "increment", "groups", "are_tasks"),
    [
        (30, 10, 10, ["00-09", "10-19", "20-29"], True),
        # The last task has five classes; its label is as wide as the others'.
        (25, 10, 10, ["00-09", "10-19", "20-29"], True),
        # Tasks of 10, 15 and 15 classes, groups of ten: toolkit.accuracy takes one width for all.
        (40, 10, 15, ["00-09", "10-19", "20-29"], False),
        # Tasks 0-9 and 10-20, but groups 0-9 and 10-19: class 20 is in none.
        (21, 10, 15, ["00-09", "10-19"], False),
        # A last task of one class is left out: its range stops before the largest class.
        (21, 10, 10, ["00-09", "10-19"], False),
        # As CL-LoRA prints a larger first task.
        (40, 20, 10, ["00-19", "20-29", "30-39"], True),
    ],
)
def test_groups_of_classes_are_taken_for_tasks_only_where_they_are(
    write: Callable[[str], Path], classes: int, first: int, increment: int, groups: list[str], are_tasks: bool
) -> None:
    tasks = 1 + math.ceil((classes - first) / increment)
    rows = [row[: len(groups)] for row in ROWS[:tasks]]
    lines = run_lines(rows, order=range(classes), first=first, increment=increment, groups=groups)
    (run,) = read_log(write(log_text(lines)))
    assert run.complete
    assert run.groups_are_tasks is are_tasks
    assert run.top1_curve == tuple(totals(rows))
    if not are_tasks:
        with pytest.raises(ValueError, match="groups of classes are not its tasks"):
            run.accuracy_matrix()


def test_terminal_output_with_progress_bars_and_prints_is_read(write: Callable[[str], Path]) -> None:
    lines = run_lines()
    bar = "Task 0, Epoch 1/1: 100%|##########| 1/1 [00:01<00:00]\r"
    noisy = "1000 1000\n" + log_text([bar + line if "Epoch" in line else line for line in lines])
    assert read_log(write(noisy))[0].accuracy == tuple(map(tuple, ROWS))


def test_numbers_of_numpy_2_are_read(write: Callable[[str], Path]) -> None:
    text = log_text(run_lines()).replace("93.0", "np.float64(93.0)")
    assert "np.float64" in text
    assert read_log(write(text))[0].accuracy[2] == (93.0, 88.5, 91.0)


def test_group_without_images_is_no_number(write: Callable[[str], Path]) -> None:
    text = log_text(run_lines()).replace("'10-19': 88.5", "'10-19': nan")
    assert read_log(write(text))[0].accuracy[2] == (93.0, None, 91.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'10-19': 88.5", "'10-19': 88.5.1", "cannot be read"),
        ("'10-19': 88.5", "'10-19': 188.5", r"188\.5 is not a percentage"),
        ("{'total': 90.88", "{'totale': 90.88", "not a dictionary of accuracies with a total"),
        ("{'total': 90.88", "{'total': 90.98", "is not that of the accuracies printed before it"),
        ("{'total': 90.88", "{'total': nan", "None is not a percentage"),
        ("[0, 1, 2,", "[0, 1, 1,", "does not hold every class once"),
        ("top1 curve: [98.0, 92.88, 90.88]", "top1 curve: [98.0, 92.88", "cannot be read"),
    ],
)
def test_damaged_line_is_named(write: Callable[[str], Path], old: str, new: str, message: str) -> None:
    text = log_text(run_lines(), run_lines(seed=1))
    damaged = text.replace(old, new, 1)
    assert damaged != text
    with pytest.raises(UserError, match=rf"some\.log, line \d+: .*({message})"):
        read_log(write(damaged))


def test_number_of_the_damaged_line_is_right(write: Callable[[str], Path]) -> None:
    lines = run_lines()
    number = next(i for i, line in enumerate(lines, start=1) if "CNN: " in line)
    lines[number - 1] = lines[number - 1].replace("'total'", "total")
    with pytest.raises(UserError, match=rf"line {number}: "):
        read_log(write(log_text(lines)))


def test_damaged_last_line_is_no_cut_when_it_has_its_end(write: Callable[[str], Path]) -> None:
    lines = run_lines()[:-3]
    assert "CNN: {" in lines[-1]
    lines[-1] = lines[-1].replace("}", "")
    assert len(read_log(write(log_text(lines)[:-1]))[0].accuracy) == 2
    with pytest.raises(UserError, match=f"line {len(lines)}: "):
        read_log(write(log_text(lines)))


def test_lost_line_of_results_is_noticed(write: Callable[[str], Path]) -> None:
    lines = [line for line in run_lines() if "'10-19': 90.25, 'old'" not in line]
    assert len(lines) == len(run_lines()) - 1
    with pytest.raises(UserError, match="is not that of the accuracies printed before it"):
        read_log(write(log_text(lines)))


def test_every_cut_of_a_log_gives_a_killed_run_or_none(write: Callable[[str], Path]) -> None:
    """A killed process leaves any prefix; none of them may pass for a whole run, or stop the reading."""
    text = log_text(run_lines())
    results_of_last = text.index("'20-29': 91.0, 'old'")
    for end in range(text.index("[data_manager.py]"), len(text), 7):
        (run,) = read_log(write(text[:end]))
        assert len(run.accuracy) < 3 if end <= results_of_last else len(run.accuracy) <= 3
        assert run.complete == (len(run.accuracy) == 3)


def test_file_that_is_not_text_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "some.log"
    path.write_bytes(log_text(run_lines()[:2]).encode() + b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"some\.log, line 3: not text"):
        read_log(path)


def test_missing_file_and_wrong_upstream_are_users_errors(write: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the log"):
        read_log(tmp_path / "absent.log")
    path = write(log_text(run_lines(cllora=True)))
    with pytest.raises(UserError, match="line 1: a run of model 'cllora', expected 'InfLoRA'"):
        read_log(path, "InfLoRA")
    with pytest.raises(UserError, match="line 1: a run of model 'InfLoRA', expected 'cllora'"):
        read_log(write(log_text(run_lines())), "cllora")


def test_more_results_than_tasks_are_refused(write: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"results of 3 tasks, but its settings make 2"):
        read_log(write(log_text(run_lines(order=range(20)))))

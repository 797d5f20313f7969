"""From a study to plans: every combination, equal runs once, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatpatch import patches
from flatpatch.errors import UserError
from flatpatch.studies.checks import check_hypotheses, hypotheses_of
from flatpatch.studies.planning import Asked, Cell, folders_of, plan_study, typed, varying
from flatpatch.studies.schema import FormName, find_study, library, read_study
from tests.study_cases import HYPOTHESIS, planned, write_study


def refused(path: Path, output: Path) -> str:
    with pytest.raises(UserError) as caught:
        study, asked, cells = planned(path, output)
        check_hypotheses(study, asked, cells)
    assert caught.value.exit_code == 2
    assert not output.exists(), "nothing is written"
    return str(caught.value)


def settings_of(cells: list[Cell], *keys: str) -> list[tuple[object, ...]]:
    return [tuple(cell.value(key) for key in keys) for cell in cells]


def test_every_combination_and_every_seed_is_a_run(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid="{sam: [off, sam], order: [1, 2]}")
    _, _, cells = planned(path, tmp_path / "runs", seeds=("0", "1"))
    expected = [(sam, order, seed) for sam in ("off", "sam") for order in ("1", "2") for seed in (0, 1)]
    assert settings_of(cells, "sam", "order", "seed") == expected
    assert varying(cells) == ("order", "sam")


def test_runs_that_differ_by_a_setting_without_effect_are_one(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid="{sam: [off, sam], rho: [0.05, 0.1, 0.2]}")
    _, _, cells = planned(path, tmp_path / "runs", seeds=("0",))
    assert settings_of(cells, "sam", "rho") == [("off", 0.05), ("sam", 0.05), ("sam", 0.1), ("sam", 0.2)]


def test_a_run_of_two_names_is_made_once(tmp_path: Path) -> None:
    path = write_study(tmp_path, more_runs="  - {name: again, settings: {sam: sam}}")
    _, _, cells = planned(path, tmp_path / "runs", seeds=("0",))
    assert [cell.name for cell in cells] == ["main", "main", "again"]
    assert [cell.name for cell in folders_of(cells)] == ["main", "main"]


def test_the_nearer_part_of_the_file_wins(tmp_path: Path) -> None:
    path = write_study(tmp_path, more_runs="  - {name: own, settings: {rho: 0.3, sam: sam}, measure: {samples: 7}}")
    text = path.read_text().replace(
        "settings: {profile: quick}",
        "settings: {profile: quick, rho: 0.2, order: 2}\n    measure: {samples: 5}\n"
        "    runs: {own: {settings: {order: 3}, measure: {batch: 3}}}",
    )
    path.write_text(text)
    _, _, cells = planned(path, tmp_path / "runs", seeds=("0",))
    keys = ("rho", "order", "measure_samples", "measure_batch")
    assert settings_of(cells, *keys)[1:] == [(0.2, "2", 5, 8), (0.3, "3", 7, 3)]


def test_another_way_of_measuring_is_another_folder(tmp_path: Path) -> None:
    path = write_study(tmp_path, more_runs="  - {name: finer, grid: {sam: [off]}, measure: {samples: 7}}")
    _, _, cells = planned(path, tmp_path / "runs", seeds=("0",))
    assert len({cell.plan.folder for cell in cells}) == 3
    again = planned(path, tmp_path / "runs", seeds=("0",))[2]
    assert [cell.plan.folder for cell in again] == [cell.plan.folder for cell in cells]


def test_the_short_grid_is_the_forms_and_the_whole_one_the_studys(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid="{sam: [sam], rho: [0.05, 0.1, 0.2]}", more_runs="  - name: later")
    path.write_text(
        path.read_text().replace("    seeds: 0..2", "    seeds: 0..2\n    grid: {rho: [0.1]}\n    full_alone: [later]")
    )
    study = read_study(path)
    short = plan_study(study, Asked("quick", ("0",), passed=(f"output={tmp_path}",)))
    full = plan_study(study, Asked("quick", ("0",), full=True, passed=(f"output={tmp_path}",)))
    assert settings_of(short, "sam", "rho") == [("sam", 0.1)]
    assert settings_of(full, "sam", "rho") == [("sam", 0.05), ("sam", 0.1), ("sam", 0.2), ("off", 0.05)]


def test_a_control_of_runs_that_a_form_leaves_out_is_left_out_and_a_mistaken_one_is_not(tmp_path: Path) -> None:
    controls = "    controls: {longer: {settings: {sam: off, budget: BUDGET}}}\n    direction"
    path = write_study(
        tmp_path,
        hypotheses=HYPOTHESIS.replace("    direction", controls),
        more_runs="  - {name: later, settings: {sam: off, budget: 2}}",
    )
    text = path.read_text().replace("    seeds: 0..2", "    seeds: 0..2\n    full_alone: [later]")
    path.write_text(text.replace("BUDGET", "2"))
    study, asked, cells = planned(path, tmp_path / "runs")
    check_hypotheses(study, asked, cells)
    assert hypotheses_of(study, asked, cells)[0].controls == {}
    path.write_text(text.replace("BUDGET", "3"))
    assert "its runs are not in the grid: none fits sam=off budget=3" in refused(path, tmp_path / "runs")


def test_unknown_settings_are_told_with_their_places(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        grid="{sam: [off, sam], rhoo: [1]}",
        hypotheses=HYPOTHESIS.replace("side: {settings: {sam: sam}}", "side: {settings: {seed: 1}}"),
    )
    said = refused(path, tmp_path / "runs")
    assert "runs 'main': grid has the unknown setting 'rhoo'. Did you mean 'rho'?" in said
    assert "hypothesis 'accuracy': side.settings has 'seed', which a study says elsewhere: in a form's seeds." in said


def test_a_mistake_in_every_run_is_told_once(tmp_path: Path) -> None:
    said = refused(write_study(tmp_path, grid="{sam: [off, sam], order: [9]}"), tmp_path / "runs")
    assert said.count("unknown order '9'") == 1 and "runs 'main'" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("metric: average_accuracy", "metric: averge_accuracy", "unknown metric 'averge_accuracy'. Did you mean"),
        (
            "metric: average_accuracy",
            "value: top_eigenvalu, scope: adapter, when: after",
            "unknown measured value 'top_eigenvalu'. Did you mean 'top_eigenvalue'?",
        ),
        (
            "metric: average_accuracy",
            "value: trace, scope: adapter, when: after",
            "runs 'main' do not measure trace, which gives trace: they measure loss, eigenvalues",
        ),
        (
            "metric: average_accuracy",
            "value: top_eigenvalue, scope: merged, when: after",
            "do not measure over scope 'merged': expected adapter",
        ),
        (
            "metric: average_accuracy",
            "value: distance_moved, scope: tangent, when: after",
            "scope 'tangent' has no distance_moved",
        ),
        (
            "metric: average_accuracy",
            "value: top_eigenvalue, scope: adapter, when: later",
            "do not measure at the time 'later': expected before, after",
        ),
        (
            "metric: average_accuracy",
            "value: top_eigenvalue, scope: adapter, when: after, task: yaho",
            "has no task 'yaho'. Did you mean 'yahoo'? It has: amazon, yahoo",
        ),
        ("{sam: sam}", "{sam: asam}", "its runs are not in the grid: none fits sam=asam. Add them to runs."),
        (
            "    unit:",
            "    slope: {over_quantity: {value: trace, scope: model, when: after}}\n    unit:",
            "do not measure trace",
        ),
        (
            "    unit:",
            "    slope: {over_quantity: {value: top_eigenvalue, scope: adapter, when: after}}\n    unit:",
            "its over_quantity has no number where its quantity has one",
        ),
        ("    unit:", "    slope: {over: rho}\n    unit:", "its slope over 'rho' has no two values of it in the grid."),
        ("    unit:", "    for_each: [upstream.lora_r]\n    unit:", "no run has a value of 'upstream.lora_r'"),
    ],
)
def test_a_hypothesis_that_the_runs_cannot_answer_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in HYPOTHESIS
    path = write_study(tmp_path, hypotheses=HYPOTHESIS.replace(old, new))
    assert said in refused(path, tmp_path / "runs")


@pytest.mark.parametrize(
    ("quantity", "said"),
    [
        ("metric: forgetting", "runs 'main' have too few tasks, 1, for forgetting"),
        ("metric: transfer", "too few tasks, 1, for transfer"),
        ("accuracy: others", "runs 'main' have one task, and no accuracy on others"),
        ("metric: learning_accuracy", ""),
    ],
)
def test_what_runs_of_one_task_never_have_is_refused(quantity: str, said: str, tmp_path: Path) -> None:
    path = write_study(tmp_path, hypotheses=HYPOTHESIS.replace("metric: average_accuracy", quantity))
    path.write_text(path.read_text().replace("amazon,yahoo", "amazon"))
    if said:
        assert said in refused(path, tmp_path / "runs")
    else:
        check_hypotheses(*planned(path, tmp_path / "runs"))


@pytest.mark.parametrize(
    ("quantity", "said"),
    [
        ("update_entropy_rank, scope: adapter, when: after", "scope 'adapter' has no update_entropy_rank"),
        ("update_row_overlap, scope: adapter, when: after", "scope 'adapter' has no update_row_overlap"),
        ("factor_a_trace, scope: merged, when: after", "scope 'merged' has no factor_a_trace"),
        ("update_curvature, scope: adapter, when: before", "update_curvature is of a task's whole training"),
        ("distance_moved, scope: adapter, when: before", "nothing has moved before a task's training"),
        (
            "update_column_overlap, scope: merged, when: after, task: first",
            "the first task has no update_column_overlap",
        ),
        (
            "update_column_overlap, scope: merged, when: after, task: amazon",
            "the first task has no update_column_overlap",
        ),
        ("update_column_overlap, scope: merged, when: after", ""),
        ("update_column_overlap, scope: merged, when: after, task: last", ""),
        ("update_curvature, scope: adapter, when: after, task: first", ""),
        ("factor_b_trace, scope: adapter, when: before", ""),
    ],
)
def test_a_value_that_no_run_has_in_a_scope_at_a_time_or_of_a_task_is_refused(
    quantity: str, said: str, tmp_path: Path
) -> None:
    path = write_study(tmp_path, hypotheses=HYPOTHESIS.replace("metric: average_accuracy", f"value: {quantity}"))
    text = path.read_text()
    path.write_text(text.replace("[eigenvalues], scope: [adapter]", "[layers, update], scope: [adapter, merged]"))
    if said:
        assert said in refused(path, tmp_path / "runs")
    else:
        study, asked, cells = planned(path, tmp_path / "runs")
        check_hypotheses(study, asked, cells)


def test_sides_that_differ_in_more_than_they_say_have_no_partners(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid="{sam: [off]}", more_runs="  - {name: other, settings: {sam: sam, order: 2}}")
    assert "no run of sam=sam has a partner in sam=off that is equal in everything else" in refused(
        path, tmp_path / "r"
    )
    path.write_text(path.read_text().replace("    unit: points", "    unit: points\n    ignore: [order]"))
    study, asked, cells = planned(path, tmp_path / "runs")
    check_hypotheses(study, asked, cells)


def test_values_are_those_of_the_settings() -> None:
    assert [typed("seed", "3"), typed("order", "1"), typed("rho", "x"), typed("upstream.optim", "sgd")] == [
        *(3, "1", "x", "sgd"),
    ]


def forms_of_ours() -> list[tuple[str, FormName, bool]]:
    """Return every form of our studies, and of the quick one the whole grid too."""
    forms = [(name, form, False) for name, path in library().items() for form in read_study(path).forms]
    return [*forms, *((name, form, True) for name, form, _ in forms if form == "quick")]


@pytest.mark.third_party
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "form", "full"), forms_of_ours())
def test_a_study_of_ours_plans_and_its_hypotheses_have_runs(
    name: str, form: FormName, full: bool, tmp_path: Path
) -> None:
    study = read_study(find_study(name))
    with patches.verified_once():
        asked = Asked(form, ("0",), full=full, passed=(f"output={tmp_path / 'runs'}",))
        cells = plan_study(study, asked, dry_run=True)
        check_hypotheses(study, asked, cells)
        assert cells

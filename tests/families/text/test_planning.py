"""Promise P2: every argument comes from upstream's script, and every deviation is recorded."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.base import Plan, Stage
from flatpatch.families.choices import visible_devices
from flatpatch.families.text import quick
from flatpatch.families.text.data import read_split
from flatpatch.families.text.launching import settle
from flatpatch.runner.execute import prepare_work
from flatpatch.runner.record import compared_settings, environment
from flatpatch.runner.resolve import headline, make_plan, parse, render
from flatpatch.settings import Settings, measured_briefly
from flatpatch.upstreams import UPSTREAMS

ORDERS = [(name, order) for name, row in UPSTREAMS.items() if row.repository for order in getattr(row, "scripts", ())]


def script_arguments(path: Path) -> list[dict[str, str | None]]:
    """Read a script's commands a second way: shlex over the joined lines, values by position."""
    commands = []
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if "deepspeed --master_port" not in line or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line)
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
        commands.append(arguments(words))
    return commands


def arguments(words: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for position, word in enumerate(words):
        if word.startswith("--"):
            following = words[position + 1] if position + 1 < len(words) else "--"
            found[word] = None if following.startswith("--") else following
    return found


def printed_commands(text: str) -> list[dict[str, str | None]]:
    found = []
    for line in text.splitlines():
        if ".py --" in line:
            words = shlex.split(line)
            found.append(arguments(words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]))
    return found


def given(stage: Stage) -> dict[str, str | None]:
    """Return what a stage gives the entry script or the reference engine."""
    named = ("flatpatch.families.text.reference",)
    start = next(i for i, word in enumerate(stage.command) if word.endswith(".py") or word in named)
    return arguments(list(stage.command[start + 1 :]))


def assert_differences_are_recorded(plan: Plan, script: Path) -> None:
    """The difference between upstream's command and ours is exactly what the deviations say, task by task."""
    for stage, theirs in zip(plan.stages, script_arguments(script), strict=True):
        ours = given(stage)
        recorded = {d.what: (d.upstream, d.here) for d in plan.deviations if not d.tasks or stage.name in d.tasks}
        recorded = {name: change for name, change in recorded.items() if name.startswith("--")}

        def shown(given: dict[str, str | None], name: str) -> str | None:
            return (given[name] or "(given)") if name in given else None

        different = {
            name: (shown(theirs, name), shown(ours, name))
            for name in {*theirs, *ours}
            if shown(theirs, name) != shown(ours, name)
        }
        assert different == recorded


@pytest.mark.third_party
@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_dry_run_prints_upstreams_arguments_where_its_gpus_are(
    method: str,
    order: str,
    upstream: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkout = upstream(str(UPSTREAMS[method].repository))
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 8)
    assert main(["run", f"method={method}", f"order={order}", "profile=upstream", "--dry-run"]) == 0
    text = capsys.readouterr().out
    printed = printed_commands(text)
    # As many GPUs as upstream names, no more: the launcher starts one process on each that it sees.
    script = (checkout / UPSTREAMS[method].scripts[order]).read_text()
    named = next(line for line in script.splitlines() if line.startswith("CUDA_VISIBLE_DEVICES=")).split(" ")[0]
    count = named.count(",") + 1
    visible = {line.split(" ")[0] for line in text.splitlines() if line.startswith("CUDA_VISIBLE_DEVICES=")}
    assert visible == {"CUDA_VISIBLE_DEVICES=" + ",".join(str(number) for number in range(count))}
    theirs = script_arguments(checkout / UPSTREAMS[method].scripts[order])
    assert len(theirs) in (4, 15)
    # `--master_port` belongs to the launcher; all that follows the entry script is upstream's, to the letter.
    assert printed == theirs


@pytest.mark.third_party
@pytest.mark.parametrize(("method", "order"), ORDERS)
@pytest.mark.parametrize(
    "words",
    [
        ["device=cpu"],
        ["device=0"],
        ["device=0", "seed=1", "upstream.num_train_epochs=1"],
        ["profile=paper", "device=0"],
        ["device=cpu", "launcher=deepspeed", "processes=2"],
    ],
    ids=lambda words: " ".join(words),
)
def test_every_deviation_from_the_script_is_recorded(
    method: str, order: str, words: list[str], upstream: Callable[[str], Path]
) -> None:
    checkout = upstream(str(UPSTREAMS[method].repository))
    asked = [f"method={method}", f"order={order}", "profile=upstream", "sam=sam", *words]
    plan = make_plan(parse(asked), dry_run=True)
    assert_differences_are_recorded(plan, checkout / UPSTREAMS[method].scripts[order])


@pytest.mark.third_party
def test_quick_profile_differs_from_the_script_by_what_it_records(upstream: Callable[[str], Path]) -> None:
    checkout = upstream("N-LoRA")
    plan = make_plan(parse(["method=nlora", "profile=quick", "engine=upstream", "device=cpu"]))
    assert_differences_are_recorded(plan, checkout / "scripts/order_1.sh")
    assert plan.labels == ("quick",)


@pytest.mark.third_party
def test_dry_run_from_the_readme_prints_four_commands_and_starts_nothing(
    upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream("N-LoRA")
    words = ["method=nlora", "sam=sam", "order=1", "profile=upstream", f"output={tmp_path}", "--dry-run"]
    assert main(["run", *words]) == 0
    text = capsys.readouterr().out
    assert len(printed_commands(text)) == 4
    assert "Differences from upstream's own settings and requirements:" in text
    assert "library torch: 2.0.1+cu118 -> " in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.third_party
def test_global_batch_is_kept_on_fewer_gpus_and_the_run_is_off_protocol(upstream: Callable[[str], Path]) -> None:
    checkout = upstream("O-LoRA")
    plan = make_plan(parse(["method=olora", "profile=upstream", "device=0,1"]), dry_run=True)
    for stage, theirs in zip(plan.stages, script_arguments(checkout / "scripts/order_1.sh"), strict=True):
        sizes = [
            int(words["--per_device_train_batch_size"] or 0) * int(words["--gradient_accumulation_steps"] or 0)
            for words in (theirs, given(stage))
        ]
        assert sizes[0] * 8 == sizes[1] * 2 == 64
    assert plan.labels == ("off-protocol",)


def test_gpus_are_chosen_among_those_the_caller_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc,7")
    assert visible_devices(("0", "2")) == "4,7"
    assert visible_devices(("1",)) == "GPU-abc"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices(("0", "2")) == "0,2"


@pytest.mark.third_party
@pytest.mark.parametrize("words", [["device=cpu"], ["device=0", "launcher=python"], ["device=0", "data=somewhere"]])
def test_run_that_left_upstreams_setup_is_off_protocol(words: list[str], upstream: Callable[[str], Path]) -> None:
    upstream("N-LoRA")
    plan = make_plan(parse(["method=nlora", "profile=upstream", *words]), dry_run=True)
    assert plan.labels == ("off-protocol",)


@pytest.mark.third_party
def test_selected_tasks_start_from_the_base_model(upstream: Callable[[str], Path]) -> None:
    upstream("N-LoRA")
    plan = make_plan(parse(["profile=upstream", "tasks=amazon,agnews", "device=0"]), dry_run=True)
    assert [stage.folder for stage in plan.stages] == ["1-amazon", "2-agnews"]
    models = [given(stage)["--model_name_or_path"] for stage in plan.stages]
    assert models == ["initial_model/t5-large", "logs_and_outputs/order_1/outputs/1-amazon/adapter"]
    assert {name: list(json.loads(text)) for name, text in plan.files.items()} == {
        **{f"task_configs/amazon/{split}_tasks.json": ["SC"] for split in ("train", "dev", "test")},
        "task_configs/agnews/train_tasks.json": ["TC"],
        **{f"task_configs/agnews/{split}_tasks.json": ["SC", "TC"] for split in ("dev", "test")},
    }


@pytest.mark.third_party
def test_penalty_counted_per_batch_without_deepspeed_is_recorded(upstream: Callable[[str], Path]) -> None:
    upstream("N-LoRA")
    words = ["order=llama1", "profile=upstream", "device=0", "launcher=python"]
    plan = make_plan(parse(words), dry_run=True)
    assert ("weight of the penalty in a step", "1", "8") in [(d.what, d.upstream, d.here) for d in plan.deviations]


@pytest.mark.third_party
def test_file_that_a_partial_checkout_lacks_is_refused(
    upstream: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatpatch import patches
    from flatpatch.errors import UserError
    from flatpatch.families.text import quick

    upstream("N-LoRA")
    verified = replace(patches.verify("N-LoRA"), absent=("CL_Benchmark/TC/agnews/test.json",))
    monkeypatch.setattr(patches, "verify", lambda _: verified)
    words = ["profile=upstream", "tasks=agnews", "device=cpu", f"model={quick.MODEL_FOLDER}"]
    with pytest.raises(UserError, match="is partial and lacks TC/agnews/test.json.* data=FOLDER"):
        make_plan(parse(words))


@pytest.mark.third_party
def test_edited_patch_is_refused_with_exit_code_2(
    upstream: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flatpatch import patches
    from flatpatch.errors import UserError

    upstream("N-LoRA")

    def edited(repo: str) -> None:
        raise UserError(f"patches/{repo} was edited")

    monkeypatch.setattr(patches, "verify", edited)
    assert main(["run", "method=nlora", "profile=quick", "engine=upstream"]) == 2
    assert "was edited" in capsys.readouterr().err


def test_auto_says_which_profile_and_engine_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatpatch import patches

    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    monkeypatch.setattr(patches, "is_available", lambda _: (False, "nothing under third_party/N-LoRA"))
    plan = make_plan(parse(["method=nlora"]))
    assert (plan.profile, plan.profile_reason) == ("quick", "no CUDA device here")
    assert plan.engine == "reference"
    assert plan.engine_reason == "N-LoRA cannot be had: nothing under third_party/N-LoRA"
    assert plan.labels == ("quick", "reference")


def test_reason_of_several_lines_is_told_in_one_and_doctor_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatpatch import patches

    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    block = "N-LoRA is not here. Looked in\n    FLATPATCH_THIRD_PARTY: not set\n    third_party/N-LoRA: empty"
    monkeypatch.setattr(patches, "is_available", lambda repo: (False, block))
    reason = "N-LoRA cannot be had: N-LoRA is not here (details: python -m flatpatch doctor)"
    plan = make_plan(parse(["method=nlora", "profile=quick"]))
    assert plan.engine_reason == reason
    assert render(plan).count("N-LoRA is not here") == 1
    assert "Looked in" not in render(plan)


def name_of(*words: str) -> str:
    return make_plan(parse(["profile=quick", "engine=reference", *words])).folder.name


def test_a_kind_of_sam_that_needs_momenta_is_refused_under_deepspeed() -> None:
    request = parse(["method=nlora", "sam=msam"])
    with pytest.raises(UserError, match="^sam=msam needs the momentum of each weight.* Use launcher=python"):
        settle(request, "upstream", "as asked", "deepspeed", 1, [])
    assert settle(request, "upstream", "as asked", "python", 1, []) is request


def test_a_kind_of_sam_that_needs_momenta_is_refused_with_an_optimizer_that_has_none() -> None:
    request = parse(["method=seqlora", "sam=msam", "upstream.optim=sgd"])
    with pytest.raises(UserError, match="^sam=msam moves along the optimizer's momentum, and upstream.optim=sgd has"):
        settle(request, "reference", "as asked", "python", 1, [])


def test_balancing_is_refused_under_deepspeed() -> None:
    request = parse(["method=nlora", "sam=nbar"])
    with pytest.raises(UserError, match="^sam=nbar rescales LoRA's factors before an update.* Use launcher=python"):
        settle(request, "upstream", "as asked", "deepspeed", 1, [])
    assert settle(request, "upstream", "as asked", "python", 1, []) is request


def test_names_of_default_runs_stay_as_they_are() -> None:
    assert name_of() == "nlora-order1-quick-reference-off-seed42"
    assert name_of("sam=sam", "scope=A") == "nlora-order1-quick-reference-sam-rho0.05-scopeA-seed42"
    assert name_of("method=inflora", "sam=asam") == "inflora-quick-reference-asam-rho0.05-seed0"


@pytest.mark.parametrize("method", ["nlora", "inflora"])
@pytest.mark.parametrize("sam", ["off", "sam", "asam"])
def test_setting_given_its_default_makes_no_other_run(method: str, sam: str) -> None:
    plain = make_plan(parse([f"method={method}", "profile=quick", "engine=reference", f"sam={sam}"]))
    seed = plain.request.settings.seed
    known = {item.name: item.default for item in dataclasses.fields(Settings)} | {"seed": seed}
    named = known | {"method": method, "profile": "quick", "engine": "reference", "sam": sam}
    words = [f"{key}={value}" for key, value in named.items() if key != "run"]  # its default is no name at all
    plan = make_plan(parse(words))
    assert plan.folder == plain.folder
    assert plan.request.settings == plain.request.settings
    assert plan.labels == plain.labels


def test_setting_without_effect_makes_no_other_run() -> None:
    idle = ["eta=1", "scope=A", "sync=global", "ascent_loss=task"]
    assert name_of("rho=0.1", *idle) == name_of()
    assert name_of("sam=sam", "eta=1") == name_of("sam=sam")
    names = [name_of("sam=asam"), *(name_of("sam=asam", word) for word in idle)]
    assert len(set(names)) == 4, "the run has one process, and so nothing to sync"


def notes_of(*words: str) -> tuple[str, ...]:
    return make_plan(parse(["profile=quick", "engine=reference", *words])).notes


def test_setting_without_effect_is_said_with_what_would_give_it_one() -> None:
    assert notes_of() == notes_of("sam=sam", "rho=0.1") == ()
    assert notes_of("rho=0.1", "sync=global") == (
        "rho=0.1 has no effect: sam=off. Add sam=sam.",
        "sync=global has no effect: sam=off. Add sam=sam.",
    )
    assert notes_of("sam=sam", "eta=0.2") == (
        "eta=0.2 has no effect: sam=sam does not use it, sam=asam does. Leave it out.",
    )
    assert notes_of("sam=sam", "sync=global") == ("sync=global has no effect: the run has one process",)
    assert notes_of("port=29501") == ("port=29501 has no effect: the run has one process and no launcher",)
    assert notes_of("measure_samples=8") == ("measure_samples=8 has no effect: nothing is measured. Add measure=all.",)
    assert notes_of("method=inflora", "rho=0.1") == ("rho=0.1 has no effect: sam=off. Add sam=sam.",)


def test_dry_run_says_which_setting_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "profile=quick", "engine=reference", "rho=0.1", "--dry-run"]) == 0
    assert "note: rho=0.1 has no effect: sam=off. Add sam=sam." in capsys.readouterr().out.splitlines()


def test_key_given_twice_is_said_unless_a_script_gave_it_first() -> None:
    assert notes_of("sam=sam", "rho=0.05", "rho=0.1") == ("rho= is given more than once (0.05, 0.1): rho=0.1 holds",)
    assert notes_of("seed=1", "seed=1") == ()
    forwarded = make_plan(parse(["method=nlora", "sam=sam", "profile=quick", "engine=reference", "sam=off"]))
    assert forwarded.notes == ()


def test_selected_tasks_make_one_run_in_whatever_order_they_are_named() -> None:
    assert name_of("tasks=agnews,amazon") == name_of("tasks=amazon,agnews") == name_of("tasks=amazon, agnews")
    assert notes_of("tasks=amazon, agnews") == ()
    said = "tasks=agnews,amazon are trained in the order's own sequence: amazon > agnews"
    assert notes_of("tasks=agnews,amazon") == (said,)


def test_how_to_measure_makes_no_other_run_where_nothing_is_measured() -> None:
    how = {"rho": 0.1, "samples": 8, "batch": 2, "effort": "full", "scope": "model", "when": "after"}
    plain = ["profile=quick", "engine=reference"]
    words = [*plain, *(f"measure_{key}={value}" for key, value in how.items())]
    for measured in ([], ["measure=loss"]):
        one, other = (make_plan(parse([*asked, *measured])) for asked in (plain, words))
        assert one.folder == other.folder
        assert (compared_settings(one) == compared_settings(other)) == (not measured)


def test_override_that_names_the_value_there_is_makes_no_other_run() -> None:
    words = ["profile=quick", "engine=reference"]
    for method, override in (("nlora", "num_train_epochs=10"), ("inflora", "shuffle=false")):
        plain = make_plan(parse([f"method={method}", *words]))
        plan = make_plan(parse([f"method={method}", *words, f"upstream.{override}"]))
        assert (plan.folder, plan.labels, plan.deviations) == (plain.folder, plain.labels, plain.deviations)
        assert plan.request.as_record() == plain.request.as_record()
        assert plan.notes == (f"upstream.{override} changes nothing: the run has that value anyway",)


def test_sequential_lora_runs_by_the_reference_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    plan = make_plan(parse(["method=seqlora", "order=3"]))
    assert plan.tasks == ("yahoo", "amazon", "agnews", "dbpedia")
    tested = json.loads(plan.files["task_configs/agnews/test_tasks.json"])
    assert {kind: [row["dataset name"] for row in rows] for kind, rows in tested.items()} == {
        "TC": ["yahoo", "agnews"],
        "SC": ["amazon"],
    }
    assert str(given(plan.stages[2])["--model_name_or_path"]).endswith("2-amazon/adapter")


@pytest.mark.third_party
def test_quick_run_of_upstreams_code_has_the_quick_benchmark_in_its_work_folder(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    """Upstream's own benchmark folder stands beside it and must not be taken for data= being set."""
    upstream("N-LoRA")
    plan = make_plan(parse(["method=nlora", "profile=quick", "engine=upstream", "device=cpu", f"output={tmp_path}"]))
    prepare_work(plan, tmp_path / "work")
    assert (tmp_path / "work" / "CL_Benchmark").is_dir()
    assert (tmp_path / "work" / str(given(plan.stages[0])["--data_dir"]) / "TC" / "dbpedia" / "train.json").is_file()


@pytest.mark.parametrize("method", ["nlora", "seqlora", "inflora", "seqlora_vit"])
def test_quick_run_takes_one_thread_whatever_the_caller_has_and_threads_sets_another(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"method={method}", "engine=reference", "profile=quick", "device=cpu"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plain = make_plan(parse(words), dry_run=True)
    assert plain.environment["OMP_NUM_THREADS"] == plain.environment["MKL_NUM_THREADS"] == "1"
    assert any(note.startswith("OMP_NUM_THREADS=3 has no effect") for note in plain.notes)
    named = make_plan(parse([*words, "threads=1"]), dry_run=True)
    assert (named.folder, named.environment) == (plain.folder, plain.environment)
    two = make_plan(parse([*words, "threads=2"]), dry_run=True)
    assert two.environment["OMP_NUM_THREADS"] == two.environment["OPENBLAS_NUM_THREADS"] == "2"
    assert two.folder.name == plain.folder.name.replace("-seed", "-threads2-seed")


@pytest.mark.third_party
@pytest.mark.parametrize("method", ["nlora", "inflora"])
def test_real_run_keeps_the_machines_threads_unless_told_otherwise(
    method: str, upstream: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream(str(UPSTREAMS[method].repository))
    words = [f"method={method}", "profile=upstream", "device=0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plain = make_plan(parse(words), dry_run=True)
    assert "OMP_NUM_THREADS" not in plain.environment
    assert environment(plain)["threads"] == 3
    eight = make_plan(parse([*words, "threads=8"]), dry_run=True)
    assert eight.environment["MKL_NUM_THREADS"] == "8"
    assert environment(eight)["threads"] == 8
    assert "threads8" in eight.folder.name


@pytest.mark.third_party
def test_record_holds_the_one_thread_that_torchrun_gives_each_of_several_processes(
    upstream: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream("N-LoRA")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    words = ["method=nlora", "profile=upstream", "device=cpu", "launcher=python"]
    assert environment(make_plan(parse([*words, "processes=2"]), dry_run=True))["threads"] == 1
    assert environment(make_plan(parse(words), dry_run=True))["threads"] == 7


@pytest.mark.third_party
def test_dry_run_says_which_data_are_missing(
    upstream: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream("N-LoRA")
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    words = ["method=nlora", "profile=upstream", "device=0", "tasks=amazon", f"data={tmp_path}", "--dry-run"]
    assert main(["run", *words]) == 0
    said = capsys.readouterr().out
    lines = said.partition("\nThis run cannot start here:\n")[2].splitlines()
    assert any(line.startswith("  - torch sees no CUDA device, which this run needs.") for line in lines)
    assert any(line.startswith("  - the pretrained model is missing: ") for line in lines)
    assert "huggingface-cli download" in said
    assert str(tmp_path / "SC" / "amazon") in said


@pytest.mark.third_party
@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_budget_multiplies_the_epochs_of_every_task_and_nothing_else(
    method: str, order: str, upstream: Callable[[str], Path]
) -> None:
    row = UPSTREAMS[method]
    script = upstream(str(row.repository)) / row.scripts[order]  # type: ignore[attr-defined]
    words = [f"method={method}", f"order={order}", "profile=upstream", "device=0"]
    plain, plan = (make_plan(parse([*words, *more]), dry_run=True) for more in ([], ["budget=2"]))
    for stage, longer, theirs in zip(plain.stages, plan.stages, script_arguments(script), strict=True):
        ours = given(longer)
        assert float(ours.pop("--num_train_epochs") or 0) == 2 * float(theirs["--num_train_epochs"] or 0)
        assert ours.items() <= given(stage).items()
    assert_differences_are_recorded(plan, script)
    assert "off-protocol" in plan.labels
    assert [d.here for d in plan.deviations if d.what == "budget"] == ["2"]


def test_budget_multiplies_an_overridden_length_and_steps_where_these_are_counted() -> None:
    def lengths(*words: str) -> set[tuple[str | None, str | None]]:
        plan = make_plan(parse(["method=nlora", "profile=quick", "engine=upstream", *words]), dry_run=True)
        return {(given(stage).get("--num_train_epochs"), given(stage).get("--max_steps")) for stage in plan.stages}

    assert lengths() == {("10", None)}
    assert lengths("budget=3") == {("30", None)}
    assert lengths("budget=2", "upstream.num_train_epochs=0.25") == {("0.5", None)}
    assert lengths("budget=2", "upstream.max_steps=7") == {("10", "14")}


def test_budget_of_the_reference_engine_is_recorded_and_in_the_runs_name() -> None:
    plan = make_plan(parse(["method=seqlora", "budget=2"]), dry_run=True)
    assert {given(stage)["--num_train_epochs"] for stage in plan.stages} == {"20"}
    assert [(d.what, d.upstream, d.here) for d in plan.deviations] == [("budget", "1", "2")]
    assert "-budget2-" in plan.folder.name
    assert "off-protocol" in plan.labels
    plain = make_plan(parse(["method=seqlora"]), dry_run=True)
    assert "budget" not in plain.folder.name and "off-protocol" not in plain.labels


def test_full_tuning_reaches_the_reference_engine_and_is_in_the_runs_name() -> None:
    plan = make_plan(parse(["method=seqlora", "tuning=full"]), dry_run=True)
    assert {given(stage)["--tuning"] for stage in plan.stages} == {"full"}
    assert "-tuningfull-" in plan.folder.name
    model = next(iter(plan.links.values()))
    weights = next(model.glob("*.safetensors")).stat().st_size
    plain = make_plan(parse(["method=seqlora"]), dry_run=True)
    assert plan.bytes_needed >= plain.bytes_needed + 4 * weights
    assert all("--tuning" not in given(stage) for stage in plain.stages)


@pytest.mark.parametrize("method", ["seqlora", "nlora"])
@pytest.mark.parametrize("own", [False, True])
def test_share_of_the_training_examples_is_made_for_the_run(method: str, own: bool, tmp_path: Path) -> None:
    """Both engines read the same benchmark, in which the training files alone are shorter."""
    whole = tmp_path / "whole"
    quick.write_benchmark(whole)
    words = [f"method={method}", "profile=quick", "fraction=0.1", "seed=7", f"output={tmp_path}"]
    plan = make_plan(parse([*words, *([f"data={whole}"] if own else [])]), dry_run=True)
    assert {given(stage)["--data_dir"] for stage in plan.stages} == {"thinned_benchmark"}
    assert "off-protocol" in plan.labels and "-fraction0.1-" in plan.folder.name
    (told,) = (d for d in plan.deviations if d.what == "training examples of each task")
    assert (told.here, told.why) == (
        "a share of 0.1",
        "setting fraction=: drawn by seed 7, the labels in their proportions",
    )
    folder = tmp_path / "made"
    folder.mkdir()
    plan.made["thinned_benchmark"](folder)
    for kind, name in (("TC", "dbpedia"), ("SC", "amazon"), ("TC", "yahoo"), ("TC", "agnews")):
        for split in ("dev", "test", "labels"):
            file = Path(kind) / name / f"{split}.json"
            assert (folder / file).read_bytes() == (whole / file).read_bytes()
        every, kept = (read_split(place, kind, name, "train") for place in (whole, folder))
        assert len(kept) == round(0.1 * len(every))
        assert [row for row in every if row in kept] == kept  # in the file's order
        counts = Counter(row["label"] for row in kept)
        assert max(counts.values()) - min(counts.values()) <= 1  # the benchmark's labels are balanced


@pytest.mark.parametrize(
    ("engine", "name"), [("reference", "lora_r"), pytest.param("upstream", "lora_dim", marks=pytest.mark.third_party)]
)
def test_rank_beyond_the_width_is_one_message(engine: str, name: str, upstream: Callable[[str], Path]) -> None:
    if engine == "upstream":
        upstream("N-LoRA")
    words = ["method=nlora", "profile=quick", f"engine={engine}"]
    config = json.loads((quick.MODEL_FOLDER / "config.json").read_text())
    width = min(config["d_model"], config["num_heads"] * config["d_kv"])
    for rank in (1, 2, 4, 8, 16, 32, width):
        make_plan(parse([*words, f"upstream.{name}={rank}"]), dry_run=True)
    told = rf"^upstream.{name}={width + 1} is more than the width .* \(expected at most {width}\)"
    with pytest.raises(UserError, match=told):
        make_plan(parse([*words, f"upstream.{name}={width + 1}"]), dry_run=True)
    for rank in (0, -1):
        with pytest.raises(UserError, match=rf"upstream.{name}='{rank}' is out of range \(expected at least 1"):
            make_plan(parse([*words, f"upstream.{name}={rank}"]), dry_run=True)


def test_optimizer_of_the_reference_engine_is_one_of_two() -> None:
    words = ["method=seqlora"]
    plan = make_plan(parse([*words, "upstream.optim=sgd"]), dry_run=True)
    assert {given(stage)["--optim"] for stage in plan.stages} == {"sgd"}
    with pytest.raises(UserError, match="upstream.optim='adamw' is unknown. Did you mean 'adamw_hf'"):
        make_plan(parse([*words, "upstream.optim=adamw"]), dry_run=True)


def test_recorded_step_splits_the_batches_in_four_and_says_that_it_is_not_sam() -> None:
    words = ["method=nlora", "engine=reference", "profile=quick", "device=cpu"]
    plain, plan = (make_plan(parse([*words, *more]), dry_run=True) for more in ([], ["sam=recorded", "eta=0.1"]))
    sizes = {"--per_device_train_batch_size", "--gradient_accumulation_steps"}
    for before, after in zip(plain.stages, plan.stages, strict=True):
        ours, theirs = given(after), given(before)
        assert {name: ours[name] for name in sizes} == {
            "--per_device_train_batch_size": "12",
            "--gradient_accumulation_steps": "4",
        }
        assert {name: value for name, value in ours.items() if name not in sizes} == {
            name: value for name, value in theirs.items() if name not in sizes
        }
        assert theirs["--per_device_train_batch_size"] == "48"
    assert any(note.startswith("sam=recorded is NOT SAM") for note in plan.notes)
    assert any(note.startswith("eta=0.1 has no effect") for note in plan.notes)
    assert "the second pass of SAM's step" in [d.what for d in plan.deviations]
    assert "-recorded-rho0.05" in plan.folder.name
    assert "with as recorded (not SAM) rho=0.05" in headline(plan)
    own = make_plan(parse([*words, "sam=recorded", "upstream.gradient_accumulation_steps=2"]), dry_run=True)
    assert {given(stage)["--gradient_accumulation_steps"] for stage in own.stages} == {"2"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method=nlora", "engine=upstream", "profile=quick"], r"N-LoRA \(text\), profile quick, engine upstream"),
        (["method=nlora", "profile=upstream"], r"N-LoRA \(text\), profile upstream, engine upstream"),
        (["method=inflora", "engine=reference", "profile=quick"], r"\(vision\), profile quick, engine reference"),
        (["method=seqlora_vit"], r"\(vision\), profile quick, engine reference"),
    ],
)
def test_recorded_step_is_refused_wherever_it_is_not_ours(words: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=rf"^sam=recorded repeats the fault of one training loop.*{reason}"):
        make_plan(parse([*words, "sam=recorded", "device=cpu"]), dry_run=True)


@pytest.mark.parametrize("one", ["1", "01"])
def test_recorded_step_of_one_micro_batch_is_refused(one: str) -> None:
    with pytest.raises(UserError, match="sam=recorded is of several micro-batches a step"):
        make_plan(
            parse(["method=seqlora", "sam=recorded", f"upstream.gradient_accumulation_steps={one}"]),
            dry_run=True,
        )


def measured_with(*words: str) -> tuple[int, int, str]:
    asked = make_plan(parse(["profile=quick", "engine=reference", *words])).request.settings
    return asked.measure_samples, asked.measure_batch, asked.measure_effort


def test_small_models_are_measured_on_less_where_nobody_says_on_how_much() -> None:
    assert measured_with("measure=all") == (16, 8, "brief")
    assert measured_with("measure=all", "measure_samples=64") == (64, 8, "brief")
    assert measured_with("measure=all", "measure_batch=16", "measure_effort=quick") == (16, 16, "quick")
    assert measured_with("method=inflora", "measure=all") == (16, 8, "brief")
    # Nothing else changes: what is not measured has no sample, and other profiles have real models.
    assert measured_with() == (64, 16, "quick")
    asked = parse(["measure=all"])
    assert measured_briefly(asked, "upstream") is asked
    assert measured_briefly(asked, "small").settings.measure_samples == 16

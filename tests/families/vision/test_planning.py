"""Plans of the image methods: upstream's own JSON runs, and every deviation from it is recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch import patches
from flatpatch.__main__ import main
from flatpatch.errors import FlatpatchError, UserError
from flatpatch.families.base import Plan
from flatpatch.families.vision import quick as quick_vision
from flatpatch.families.vision.configuration import REFERENCE_DEFAULTS
from flatpatch.families.vision.logs import LoggedRun
from flatpatch.families.vision.reference.options import read_reference
from flatpatch.families.vision.results import CONFIG, _check_curve
from flatpatch.families.vision.upstream import VisionUpstream
from flatpatch.runner.record import environment
from flatpatch.runner.resolve import command_of, make_plan, parse
from flatpatch.upstreams import UPSTREAMS, sdlora

ROWS: dict[str, VisionUpstream] = {name: row for name, row in UPSTREAMS.items() if isinstance(row, VisionUpstream)}
SHIPPED = [
    (name, variant, benchmark, file)
    for name, row in ROWS.items()
    for variant, files in row.configs.items()
    for benchmark, file in files.items()
]


def plan_of(*words: str) -> Plan:
    return make_plan(parse(words), dry_run=True)


def written_config(plan: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(plan.files[CONFIG])
    return config


def assert_differences_are_recorded(plan: Plan, shipped: Path) -> None:
    """The difference between upstream's JSON and the one that runs is exactly what the deviations say."""
    theirs, ours = json.loads(shipped.read_text()), written_config(plan)

    def shown(config: dict[str, object], key: str) -> str | None:
        return json.dumps(config[key]) if key in config else None

    different = {
        key: (shown(theirs, key), shown(ours, key))
        for key in {*theirs, *ours}
        if shown(theirs, key) != shown(ours, key)
    }
    recorded = {d.what: (d.upstream, d.here) for d in plan.deviations if d.what in {*theirs, *ours}}
    # Where the run takes place is no key of InfLoRA's, but CL-LoRA has one of that name.
    recorded = {key: change for key, change in recorded.items() if change != ("cuda:0", "cpu")}
    assert different == recorded


@pytest.mark.third_party
@pytest.mark.parametrize(("method", "variant", "benchmark", "file"), SHIPPED)
def test_upstreams_configuration_runs_as_it_is_but_for_one_seed(
    method: str, variant: str, benchmark: str, file: str, upstream: Callable[[str], Path]
) -> None:
    shipped = upstream(str(ROWS[method].repository)) / file
    plan = plan_of(f"method={method}", f"variant={variant}", f"benchmark={benchmark}", "profile=upstream", "device=0")
    theirs, ours = json.loads(shipped.read_text()), written_config(plan)
    assert ours["seed"] == theirs["seed"][:1]
    # SD-LoRA's configurations do not agree; the row has the first one's.
    assert method == "sdlora" and benchmark != "cifar100" or ours["seed"] == [ROWS[method].seed]
    assert plan.request.as_record()["seed"]["source"] == f"{file}: the first of {theirs['seed']}"
    assert {**theirs, "seed": None} == {**ours, "seed": None}
    assert_differences_are_recorded(plan, shipped)
    assert plan.labels == ()
    assert len(plan.tasks) == theirs.get("total_sessions", len(plan.tasks))


@pytest.mark.third_party
def test_every_configuration_upstream_ships_has_a_benchmark(upstream: Callable[[str], Path]) -> None:
    for method, files in (("inflora", "configs/*.json"), ("cllora", "exps/*.json"), ("sdlora", "exps/sdlora_*.json")):
        checkout = upstream(str(ROWS[method].repository))
        shipped = {path.relative_to(checkout).as_posix() for path in checkout.glob(files)}
        assert {file for name, _, _, file in SHIPPED if name == method} == shipped - set(sdlora.NOT_RUN)


@pytest.mark.third_party
def test_configuration_that_is_not_offered_names_a_data_set_that_upstream_lacks(
    upstream: Callable[[str], Path],
) -> None:
    checkout = upstream("SD-LoRA")
    (file,) = sdlora.NOT_RUN
    dataset = json.loads((checkout / file).read_text())["dataset"]
    assert f'"{dataset}"' not in (checkout / "utils/data_manager.py").read_text()


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("words", "tasks"),
    [
        (("method=inflora", "benchmark=cifar100"), 10),
        (("method=inflora", "benchmark=imagenet_r_20"), 20),
        (("method=inflora", "benchmark=domainnet"), 5),
        (("method=cllora", "benchmark=cifar100"), 20),
        (("method=cllora", "benchmark=imagenet_r"), 40),
        (("method=cllora", "benchmark=imagenet_a"), 10),
        (("method=cllora", "benchmark=vtab"), 5),
        (("method=sdlora", "benchmark=cifar100"), 10),
        (("method=sdlora", "benchmark=imagenet_r"), 10),
        (("method=sdlora", "benchmark=imagenet_r", "upstream.init_cls=10", "upstream.increment=10"), 20),
        (("method=sdlora", "benchmark=imagenet_a"), 10),
    ],
)
def test_benchmark_has_the_papers_number_of_tasks(
    words: tuple[str, ...], tasks: int, upstream: Callable[[str], Path]
) -> None:
    upstream(str(ROWS[words[0].removeprefix("method=")].repository))
    plan = plan_of(*words, "profile=upstream")
    assert len(plan.tasks) == tasks
    classes = [[int(end) for end in task.split("-")] for task in plan.tasks]
    ends = [last for _, last in classes]
    assert [first for first, _ in classes] == [0, *(end + 1 for end in ends[:-1])]


@pytest.mark.third_party
@pytest.mark.parametrize(
    "words",
    [
        ("method=inflora", "profile=upstream", "device=cpu", "seed=3", "upstream.rank=5"),
        ("method=inflora", "profile=upstream", "upstream.increment=20", "upstream.init_cls=20"),
        ("method=inflora", "profile=paper", "benchmark=domainnet"),
        ("method=inflora", "profile=quick", "engine=upstream"),
        ("method=cllora", "profile=paper", "benchmark=imagenet_r", "device=0,1"),
        ("method=cllora", "profile=quick", "upstream.specfic_pos=[4,5]"),
        ("method=sdlora", "profile=quick", "upstream.milestones=[3]"),
        ("method=sdlora", "profile=upstream", "benchmark=imagenet_a", "device=0,1", "upstream.lrate_decay=0.1"),
    ],
    ids=" ".join,
)
def test_every_deviation_from_the_configuration_is_recorded(
    words: tuple[str, ...], upstream: Callable[[str], Path]
) -> None:
    row = ROWS[words[0].removeprefix("method=")]
    checkout = upstream(str(row.repository))
    plan = plan_of(*words)
    settings = plan.request.settings
    assert_differences_are_recorded(plan, checkout / str(row.config(settings.variant, settings.benchmark)))
    assert written_config(plan) != json.loads((checkout / str(row.config("", ""))).read_text())


@pytest.mark.third_party
def test_paper_profile_follows_every_conflict_that_names_an_argument(upstream: Callable[[str], Path]) -> None:
    files = {file: (name, variant, benchmark) for name, variant, benchmark, file in SHIPPED}
    for row in (ROWS["inflora"], ROWS["cllora"]):
        checkout = upstream(str(row.repository))
        for conflict in row.conflicts:
            for argument in conflict.arguments:
                for file in argument.where:
                    name, variant, benchmark = files[file]
                    words = [f"method={name}", f"variant={variant}", f"benchmark={benchmark}", "profile=paper"]
                    plan = plan_of(*words)
                    assert json.loads((checkout / file).read_text())[argument.argument] != argument.value
                    assert written_config(plan)[argument.argument] == argument.value
                    assert conflict.source in next(d.why for d in plan.deviations if d.what == argument.argument)


@pytest.mark.third_party
def test_dry_run_prints_the_command_and_the_differences_and_writes_nothing(
    upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream("InfLoRA")
    words = ["method=inflora", "profile=upstream", "seed=2", f"output={tmp_path}", "--dry-run"]
    assert main(["run", *words]) == 0
    text = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES=0 python main.py --device 0 --config flatpatch-config.json" in text
    assert "seed: [0, 1, 2, 3, 4] -> [2]  (one run trains one seed)" in text
    assert "library timm: 0.6.7 -> 0.6.13" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.third_party
def test_dry_run_prints_the_recipe_and_what_differs_from_upstreams(
    upstream: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = json.loads((upstream("InfLoRA") / "configs/cifar100_inflora.json").read_text())
    words = ["method=inflora", "profile=upstream", "device=0", "upstream.lrate=0.002"]
    assert main(["run", *words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in ("epochs", "batch_size", "optim", "rank", "increment", "total_sessions", "weight_decay", "lamb"):
        assert f"  {key} = {json.dumps(shipped[key])}" in lines
    assert f"  lrate = 0.002  (there: {shipped['lrate']})" in lines
    assert not any(line.startswith("  num_heads =") for line in lines), "it never reaches the run"
    assert main(["run", "method=inflora", "engine=reference", "profile=quick", "--dry-run"]) == 0
    assert "  epochs = 10  (there: 20)\n" in capsys.readouterr().out


@pytest.mark.third_party
def test_sdlora_is_told_its_configuration_alone_and_asks_for_the_weights_of_its_logs(
    upstream: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream("SD-LoRA")
    words = ["method=sdlora", "profile=upstream", "device=0,1", f"output={tmp_path}", f"data={tmp_path}", "--dry-run"]
    assert main(["run", *words]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "CUDA_VISIBLE_DEVICES=0,1 python main.py --config flatpatch-config.json" in text
    assert 'device: ["0"] -> ["0", "1"]' in text
    assert "library timm: 1.0.9 -> 0.6.13" in text and "library numpy: 2.1.1" in text
    name = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert f"Fetch https://huggingface.co/timm/{name}/resolve/main/model.safetensors and put it there" in text
    assert f"{name}.safetensors https://" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.third_party
def test_cpu_outside_profile_quick_is_warned_of(upstream: Callable[[str], Path]) -> None:
    upstream("InfLoRA")
    plan = plan_of("method=inflora", "profile=upstream", "device=cpu")
    assert any(note.startswith("WARNING: a ViT-B/16 on the CPU.") for note in plan.notes)
    assert plan.labels == ("off-protocol",)


@pytest.mark.third_party
def test_reference_defaults_are_those_of_the_shipped_configuration(upstream: Callable[[str], Path]) -> None:
    shipped = json.loads((upstream("InfLoRA") / "configs/cifar100_inflora.json").read_text())
    assert {key: shipped[key] for key in REFERENCE_DEFAULTS} == dict(REFERENCE_DEFAULTS)


def test_reference_engine_serves_inflora_where_its_code_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    monkeypatch.setattr(patches, "is_available", lambda _: (False, "nothing under third_party/InfLoRA"))
    plan = plan_of("method=inflora")
    assert plan.labels == ("quick", "reference")
    assert len(plan.tasks) == quick_vision.TASKS
    assert [d.what for d in plan.deviations] == ["engine"]


def test_cllora_without_its_code_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    monkeypatch.setattr(patches, "is_available", lambda _: (False, "nothing under third_party/CL-LoRA"))
    with pytest.raises(UserError) as caught:
        make_plan(parse(["method=cllora"]))
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "CL-LoRA has no reference implementation" in text
    assert "nothing under third_party/CL-LoRA" in text
    assert "git submodule update --init third_party/CL-LoRA" in text
    with pytest.raises(UserError, match="Leave out engine=reference"):
        make_plan(parse(["method=cllora", "engine=reference"]))


def test_sequential_lora_on_a_vit_runs_by_the_reference_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)
    plan = plan_of("method=seqlora_vit", "seed=5")
    assert (plan.engine, written_config(plan)["seed"]) == ("reference", [5])
    assert command_of(plan.stages[0], "python", 0)[1:3] == ["-m", "flatpatch.families.vision.reference"]


def test_record_holds_the_threads_that_the_training_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    request = parse(["method=inflora", "engine=reference", "profile=quick", "device=cpu"])
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS")
    made = environment(make_plan(request, dry_run=True))
    assert (made["threads"], made["variables"]["OMP_NUM_THREADS"]) == (1, "1")
    made = environment(dataclasses.replace(make_plan(request, dry_run=True), threads=None, environment={}))
    assert made["threads"] == 7 and "OMP_NUM_THREADS" not in made["variables"]


def test_first_benchmark_and_variant_are_those_of_a_run_that_names_none(upstream: Callable[[str], Path]) -> None:
    upstream("InfLoRA"), upstream("CL-LoRA")

    def named(*words: str) -> tuple[str, dict[str, dict[str, Any]]]:
        plan = make_plan(parse(["profile=upstream", "device=cpu", *words]), dry_run=True)
        return plan.folder.name, plan.request.as_record()

    plain = named("method=inflora")
    assert plain[0] == "inflora-upstream-upstream-off-devicecpu-seed0"
    assert named("method=inflora", "benchmark=cifar100", "variant=inflora") == plain
    assert named("method=inflora", "benchmark=imagenet_r_10")[0] == plain[0].replace("-", "-imagenet_r_10-", 1)
    variant = named("method=inflora", "variant=inflorab5")
    assert named("method=inflora", "variant=inflorab5", "benchmark=cifar100") == variant != plain
    assert named("method=cllora", "benchmark=cifar100", "variant=cllora") == named("method=cllora")
    both = [named("method=cllora", "sam=sam", f"sam_on={step}")[0] for step in ("both", "task")]
    assert both == [named("method=cllora", "sam=sam")[0], both[0].replace("-device", "-sam_ontask-device")]


def test_a_measured_run_has_a_folder_of_its_own() -> None:
    words = ("method=seqlora_vit", "profile=quick")
    plain, measured = plan_of(*words), plan_of(*words, "measure=loss")
    assert measured.folder.name == plain.folder.name.replace("-seed", "-measured-seed")


@pytest.mark.third_party
def test_second_stage_without_sam_is_said(upstream: Callable[[str], Path]) -> None:
    upstream("InfLoRA")
    words = ["method=inflora", "variant=infloraca", "benchmark=imagenet_r_10", "profile=upstream", "device=cpu"]
    plan = make_plan(parse([*words, "sam=sam"]), dry_run=True)
    assert any("second stage" in note for note in plan.notes)
    assert [deviation.here for deviation in plan.deviations if deviation.what == "SAM"] == [
        "in the first stage of a task alone"
    ]
    assert not any("second stage" in note for note in make_plan(parse(words), dry_run=True).notes)


@pytest.mark.parametrize(
    ("totals", "equal_tests", "is_sound"),
    [
        ((90.0, 80.01), True, True),
        ((90.0, 80.02), True, False),
        ((90.0, 88.0), False, True),
        ((90.0, 90.5), False, False),
    ],
)
def test_totals_must_come_from_their_tasks(totals: tuple[float, ...], equal_tests: bool, is_sound: bool) -> None:
    run = LoggedRun(**dict.fromkeys(field.name for field in dataclasses.fields(LoggedRun)))
    run = dataclasses.replace(run, accuracy=((90.0,), (70.0, 90.0)), top1_curve=totals)
    with contextlib.nullcontext() if is_sound else pytest.raises(FlatpatchError, match="the total"):
        _check_curve(Path("log"), run, equal_tests)


def test_shuffled_classes_are_said_beside_the_tasks() -> None:
    words = ["method=inflora", "profile=quick", "engine=reference"]
    assert make_plan(parse(words), dry_run=True).sequence.endswith(" ...")
    assert make_plan(parse([*words, "upstream.shuffle=true"]), dry_run=True).sequence.endswith("... in shuffled order")


@pytest.mark.third_party
@pytest.mark.parametrize(("method", "variant", "benchmark", "file"), SHIPPED)
def test_budget_multiplies_what_counts_in_epochs_and_nothing_else(
    method: str, variant: str, benchmark: str, file: str, upstream: Callable[[str], Path]
) -> None:
    shipped = upstream(str(ROWS[method].repository)) / file
    words = (f"method={method}", f"variant={variant}", f"benchmark={benchmark}", "profile=upstream", "device=0")
    plan = plan_of(*words, "budget=3")
    theirs, ours = json.loads(shipped.read_text()), written_config(plan)
    changed = {key for key in theirs if theirs[key] != ours[key]} - {"seed"}
    assert changed <= {"epochs", "init_epoch", "init_epochs", "later_epochs", "milestones", "init_milestones"}
    assert changed & {"epochs", "init_epochs"}
    for key in changed:
        longer = [3 * epoch for epoch in theirs[key]] if isinstance(theirs[key], list) else 3 * theirs[key]
        assert ours[key] == longer
    assert_differences_are_recorded(plan, shipped)
    assert "off-protocol" in plan.labels
    assert [d.here for d in plan.deviations if d.what == "budget"] == ["3"]


@pytest.mark.third_party
def test_milestone_that_upstreams_code_has_written_in_it_stays_and_is_told(upstream: Callable[[str], Path]) -> None:
    upstream("InfLoRA")
    words = ("method=inflora", "variant=infloraca", "profile=upstream", "device=0,1", "budget=2")
    told = "the learning rate falls after epoch 18 however many there are: the code has it written in it"
    assert told in plan_of(*words).notes
    assert told not in plan_of(*words, "upstream.optim=adam").notes


def test_budget_of_the_reference_engine_is_recorded_and_in_the_runs_name() -> None:
    plan = plan_of("method=seqlora_vit", "budget=2", "upstream.epochs=3")
    assert written_config(plan)["epochs"] == 6
    assert [(d.what, d.upstream, d.here) for d in plan.deviations] == [("budget", "1", "2")]
    assert "-budget2-" in plan.folder.name
    assert "off-protocol" in plan.labels


def test_what_is_trained_of_which_images_reaches_the_reference_engine() -> None:
    plan = plan_of("method=seqlora_vit", "tuning=full", "fraction=0.5", "tasks=1")
    config = written_config(plan)
    assert (config["tuning"], config["fraction"], config["tasks"]) == ("full", 0.5, 1)
    assert plan.tasks == ("0-3",)
    assert "-tuningfull-fraction0.5-tasks1-" in plan.folder.name
    assert {d.what for d in plan.deviations} == {"tasks", "training examples of each task"}
    assert "off-protocol" in plan.labels
    reference = read_reference(config, dict(plan.stages[0].contract["vision"]))
    assert (reference.tuning, reference.fraction, reference.tasks) == ("full", 0.5, 1)


def test_all_tasks_by_their_number_are_no_other_run() -> None:
    plain, numbered = plan_of("method=seqlora_vit"), plan_of("method=seqlora_vit", "tasks=05")
    assert plain.folder == numbered.folder and plain.tasks == numbered.tasks and plain.files == numbered.files
    assert plain.labels == numbered.labels


@pytest.mark.parametrize("tasks", ["0", "6", "0-3", "1,2", "-1", "1.5"])
def test_number_of_tasks_that_cannot_be_is_refused(tasks: str) -> None:
    with pytest.raises(UserError, match=rf"^tasks={tasks}: expected how many of the first to learn, from 1 to 5"):
        plan_of("method=seqlora_vit", f"tasks={tasks}")


@pytest.mark.parametrize("rank", ["0", "-1", "65"])
def test_rank_that_cannot_be_is_one_message(rank: str) -> None:
    with pytest.raises(UserError, match=rf"^upstream.rank={rank} is ") as caught:
        plan_of("method=seqlora_vit", f"upstream.rank={rank}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.third_party
@pytest.mark.parametrize("method", ["inflora", "cllora", "sdlora"])
def test_authors_code_learns_every_task_from_all_its_images(method: str, upstream: Callable[[str], Path]) -> None:
    upstream(str(ROWS[method].repository))
    with pytest.raises(UserError, match="^tasks=1, fraction=0.5: the authors' code learns every task"):
        plan_of(f"method={method}", "profile=quick", "engine=upstream", "tasks=1", "fraction=0.5")


@pytest.mark.third_party
def test_authors_loop_cannot_climb_on_a_part_of_the_batch(upstream: Callable[[str], Path]) -> None:
    upstream("InfLoRA")
    words = ("method=inflora", "profile=quick", "engine=upstream", "ascent_batch=0.25")
    with pytest.raises(UserError, match="^ascent_batch=0.25: the authors' loop has passed the whole batch"):
        plan_of(*words, "sam=fsam")
    assert plan_of(*words, "sam=gsam").request.notes[0].startswith("ascent_batch=0.25 has no effect")

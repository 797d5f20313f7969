"""Plans of CLIP runs: profiles, arguments, model and images; and mistakes, told in one message with nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.base import Plan
from flatpatch.families.clip import quick
from flatpatch.families.clip.data import Checked
from flatpatch.families.clip.datasets import DATASETS
from flatpatch.families.clip.planning import model_problem
from flatpatch.families.clip.results import CONFIG, compare_zero_shot
from flatpatch.files import ROOT
from flatpatch.runner.resolve import make_plan, parse, render
from flatpatch.upstreams import UPSTREAMS
from tests.clip_cases import SMALL, make_clip

METHODS = ("inflora_clip", "lora_per_task_clip", "seqlora_clip")
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a mistaken command and gives its message, having checked that nothing happened."""

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["run", "method=seqlora_clip", f"output={tmp_path / 'out'}", *words])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("flatpatch: ") and "Traceback" not in said.err
        assert said.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


@pytest.fixture
def whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every data set be there, with one image of DTD's that cannot be decoded."""

    def check(name: str, root: Path) -> Checked:
        broken = (root / "dtd/dtd/images/grid/grid_1.jpg",) if name == "dtd" else ()
        return Checked({f"{DATASETS[name].folder}/train": f"hash of {name}"}, broken)

    monkeypatch.setattr("flatpatch.families.clip.planning.check_pictures", check)


def plan_of(*words: str) -> Plan:
    return make_plan(parse(words))


def config_of(plan: Plan) -> dict[str, object]:
    content: dict[str, object] = json.loads(plan.files[CONFIG])
    return content


@pytest.mark.parametrize("method", METHODS)
def test_default_is_the_quick_form_of_the_reference_engine(method: str) -> None:
    plan = plan_of(f"method={method}")
    assert (plan.profile, plan.engine, plan.labels) == ("quick", "reference", ("quick", "reference"))
    assert plan.tasks == tuple(quick.DOMAINS)
    assert plan.threads == 1
    assert not plan.resumes, "one process learns all tasks, and needs checkpoints to go on"
    assert plan.links == {"model": quick.MODEL_FOLDER}
    assert config_of(plan)["data"] is None
    assert plan.folder.name == f"{method}-quick-off-seed42"


def test_own_model_may_learn_the_drawn_images_and_is_labelled(tmp_path: Path) -> None:
    plan = plan_of("method=seqlora_clip", f"model={make_clip(tmp_path / 'mine', image_size=48)}")
    assert plan.labels == ("quick", "reference", "off-protocol")
    assert plan.links == {"model": tmp_path / "mine"}


def test_override_that_changes_nothing_is_no_other_run() -> None:
    plan = plan_of("method=seqlora_clip", "upstream.targets=q,k,v,out", "upstream.iterations=40")
    assert plan.folder.name == "seqlora_clip-quick-off-iterations40-seed42"
    assert "upstream.targets=q,k,v,out changes nothing: the run has that value anyway" in plan.notes
    assert f"  iterations = 40  (the profile's: {quick.PRESET['iterations']})" in plan.recipe
    assert "off-protocol" in plan.labels


def test_budget_multiplies_the_iterations_and_nothing_else() -> None:
    plain, longer = plan_of("method=seqlora_clip"), plan_of("method=seqlora_clip", "budget=3")
    before, after = config_of(plain)["arguments"], config_of(longer)["arguments"]
    assert isinstance(before, dict) and isinstance(after, dict)
    assert after == before | {"iterations": 3 * before["iterations"]}
    assert [(d.what, d.upstream, d.here) for d in longer.deviations] == [("budget", "1", "3")]
    assert "-budget3-" in longer.folder.name and "off-protocol" in longer.labels


def test_one_adapter_per_task_says_how_its_matrix_is_read() -> None:
    (note,) = plan_of("method=lora_per_task_clip").notes
    assert "row i of the accuracy matrix is the adapter of task i alone" in note
    assert plan_of("method=seqlora_clip").notes == ()


def test_record_profile_holds_the_records_settings_and_names_ours(tmp_path: Path, whole_images: None) -> None:
    words = ("method=seqlora_clip", "profile=record", "device=cpu", f"model={make_clip(tmp_path / 'm')}")
    plan = plan_of(*words, "upstream.on_bad_image=skip", "upstream.rank=4")
    assert (plan.profile, plan.labels) == ("record", ("reference", "off-protocol"))
    assert plan.tasks == ("aircraft", "caltech101", "cifar100", "dtd")
    assert "  learning_rate = 0.55,0.03,0.03,0.12" in plan.recipe
    (note,) = plan.notes
    assert note.startswith("ours, as the record does not state them: alpha 16, targets q,v, tower both, momentum 0,")
    assert "rank" not in note, "it was asked for"
    assert note.endswith(
        "of the MTIL protocol, for the same reason: iterations 1000, batch_size 64, warmup 100, label_smoothing 0.2, "
        "weight_decay 0"
    )
    assert plan.inputs["dtd/dtd/train"] == "hash of dtd"
    (deviation,) = plan.deviations
    assert deviation.what == "images that cannot be decoded"
    assert deviation.here == "1 left out: dtd/dtd/images/grid/grid_1.jpg"
    assert config_of(plan)["skipped"] == ["dtd/dtd/images/grid/grid_1.jpg"]


def test_image_that_cannot_be_decoded_stops_a_run(tmp_path: Path, whole_images: None, refused: Refused) -> None:
    model = make_clip(tmp_path / "m")
    text = refused("profile=record", "device=cpu", f"model={model}", f"data={tmp_path}")
    assert f"DTD has 1 image(s) that cannot be decoded: {tmp_path / 'dtd/dtd/images/grid/grid_1.jpg'}" in text
    assert "upstream.on_bad_image=skip" in text


def test_missing_model_is_told_what_to_put_where(tmp_path: Path, refused: Refused) -> None:
    text = refused("profile=record", "device=cpu", f"model={tmp_path / 'none'}")
    assert f"the pre-trained CLIP is missing: there is no folder {tmp_path / 'none'}. Put config.json" in text
    assert "huggingface-cli download openai/clip-vit-base-patch16 --local-dir" in text


def test_model_of_the_hub_is_looked_for_in_models_and_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    assert f"there is no folder {ROOT / 'models' / 'clip-none'}" in refused(
        "profile=record", "device=cpu", "model=a/clip-none"
    )
    found = make_clip(tmp_path / "cache")
    asked: list[tuple[str, bool]] = []

    def download(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append((name, local_files_only))
        return str(found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert plan_of("method=seqlora_clip", "model=openai/clip-tiny").links == {"model": found}
    assert asked == [("openai/clip-tiny", True)], "what is here is not fetched again"


def test_missing_images_of_all_data_sets_are_told_at_once(tmp_path: Path, refused: Refused) -> None:
    text = refused("profile=record", "device=cpu", f"model={make_clip(tmp_path / 'm')}", f"data={tmp_path}")
    assert text.startswith("flatpatch: 4 problems, nothing was started:")
    assert all(
        f"{each.title} is missing: there is no folder {tmp_path / each.folder}" in text for each in DATASETS.values()
    )


def test_dry_run_says_what_is_missing_and_plans_all_the_same(tmp_path: Path) -> None:
    request = parse(["method=seqlora_clip", "profile=record", f"model={tmp_path / 'none'}", f"data={tmp_path}"])
    text = render(make_plan(request, dry_run=True))
    assert "This run cannot start here:" in text
    assert (
        "torch sees no CUDA device" in text and "the pre-trained CLIP is missing" in text and "DTD is missing" in text
    )
    assert "flatpatch/families/reference.py" in text, "where SAM would enter"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("upstream.rank=0",), "upstream.rank=0 is out of range"),
        (("upstream.rank=65",), "upstream.rank=65 is more than the model's width. Expected at most 64."),
        (("upstream.learning_rate=1,2,3",), "has 3 values for 4 tasks (shapes, textures, colours, strokes)"),
        (("upstream.datasets=aircraft",), "unknown 'aircraft'. Expected: shapes, textures, colours, strokes."),
        (("data=x",), "data= has no meaning in profile quick"),
        (("benchmark=cifar100",), "benchmark=cifar100 has no meaning for sequential LoRA on CLIP, a clip method"),
        (("tasks=shapes",), "tasks=shapes has no meaning for sequential LoRA on CLIP"),
        (("engine=upstream",), "method seqlora_clip has no repository of its own: use engine=reference"),
        (("profile=paper",), "runs in profile quick or record alone, not paper"),
        (("profile=record",), "needs a CUDA device, and torch sees no CUDA device. Add device=cpu"),
        (
            ("sam=sam", "scope=head"),
            "scope=head has nothing to perturb: sequential LoRA on CLIP trains LoRA factors alone",
        ),
        (("method=inflora_clip", "sam=sam", "scope=A"), "InfLoRA's design on CLIP trains B alone. Use scope=lora."),
        (("method=nlora", "profile=record"), "profile=record has no settings for N-LoRA"),
    ],
)
def test_mistake_is_told_in_one_message(words: tuple[str, ...], said: str, refused: Refused) -> None:
    assert said in refused(*words)


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("config.json", "cannot be read"),
        ("model.safetensors", "has no model.safetensors and no pytorch_model.bin"),
        ("tokenizer.json", "has no tokenizer.json and no vocab.json"),
    ],
)
def test_model_that_is_not_whole_is_told(lacking: str, said: str, tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "m")
    assert model_problem(folder, SMALL) == ""
    (folder / lacking).unlink()
    assert said in model_problem(folder, SMALL)


def test_model_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "holds a model of type 't5', expected 'clip'" in model_problem(tmp_path, SMALL)


def test_zero_shot_accuracies_are_told_beside_the_published_ones() -> None:
    text = compare_zero_shot({"aircraft": 24.0, "dtd": 45.12})
    assert text.startswith(
        "zero-shot accuracy in percent: aircraft 24.0 (published 24.3, -0.3), dtd 45.1 (published 44.6, +0.5)"
    )


def test_rows_are_found_and_name_their_design() -> None:
    rows = {name: row for name, row in UPSTREAMS.items() if row.family == "clip"}
    assert tuple(sorted(rows)) == METHODS
    assert all(row.repository is None and row.profiles == ("quick", "record") for row in rows.values())
    with pytest.raises(UserError, match="unknown method 'seqlora_clp'. Did you mean 'seqlora_clip'"):
        parse(["method=seqlora_clp"])

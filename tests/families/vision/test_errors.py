"""Mistakes in asking for a run of an image method: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.errors import UserError
from flatpatch.families.vision.configuration import known_keys, task_classes
from flatpatch.families.vision.data import (
    CIFAR100,
    PILOT,
    Dataset,
    check_images,
    check_weights,
    find_weights,
    list_hash,
    weights_url,
)
from flatpatch.families.vision.results import CONFIG
from flatpatch.files import file_hash
from flatpatch.runner.resolve import make_plan, parse
from flatpatch.upstreams.cllora import UPSTREAM as CLLORA
from flatpatch.upstreams.inflora import UPSTREAM as INFLORA

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return a function that runs a mistaken command and gives its message, having checked that nothing happened."""
    monkeypatch.setattr("flatpatch.runner.resolve.cuda_devices", lambda: 0)

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["run", f"output={tmp_path / 'out'}", *words])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("flatpatch: ")
        assert "Traceback" not in said.err
        assert said.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


@pytest.mark.parametrize(
    "word",
    [
        "order=2",
        "sync=global",
        "ascent_loss=task",
        "adapters=fp32",
        "launcher=python",
        "processes=1",
        "port=29500",
    ],
)
def test_setting_of_the_text_methods_is_refused(word: str, refused: Refused) -> None:
    text = refused("method=inflora", "engine=reference", "profile=quick", word)
    assert f"{word} has no meaning for InfLoRA, a vision method. Leave it out." in text


@pytest.mark.parametrize("word", ["benchmark=cifar100", "variant=inflora", "sam_on=task"])
def test_setting_of_the_image_methods_is_refused(word: str, refused: Refused) -> None:
    assert f"{word} has no meaning for N-LoRA, a text method" in refused("method=nlora", word)


def test_benchmark_without_a_configuration_is_told_what_ships(refused: Refused) -> None:
    text = refused("method=inflora", "benchmark=imagenet_r_11")
    assert (
        "ships no configuration of benchmark 'imagenet_r_11' for variant inflora. Did you mean 'imagenet_r_10'?" in text
    )
    assert "domainnet (configs/domainnet_inflora.json)" in text
    text = refused("method=inflora", "variant=infloraca", "benchmark=domainnet")
    assert (
        "It ships: cifar100 (configs/cifar100_infloraca.json), imagenet_r_10 (configs/mimg10_infloraca.json)." in text
    )


def test_unknown_variant_is_told_the_nearest_one(refused: Refused) -> None:
    assert "unknown variant 'infloraB5' of InfLoRA. Did you mean 'inflorab5'?" in refused(
        "method=inflora", "variant=infloraB5"
    )


@pytest.mark.parametrize("variant", ["infloraca", "inflorab5"])
def test_variant_is_refused_where_the_reference_engine_would_run(
    variant: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatpatch.patches.is_available", lambda _: (False, "nothing there"))
    asked = refused("method=inflora", f"variant={variant}", "engine=reference", "profile=quick", "device=cpu")
    lacking = refused("method=inflora", f"variant={variant}", "profile=quick", "device=cpu")
    for text in (asked, lacking):
        assert f"variant={variant} needs the authors' code: the reference engine has InfLoRA alone" in text
        assert "git submodule update --init third_party/InfLoRA" in text
    assert "or leave out engine=reference" in asked
    assert "or fetch the code (InfLoRA cannot be had: nothing there)" in lacking


def test_variant_that_is_the_default_runs_by_the_reference_engine() -> None:
    plan = make_plan(parse(["method=inflora", "variant=inflora", "engine=reference", "profile=quick", "device=cpu"]))
    assert (plan.engine, plan.request.settings.variant) == ("reference", "")


def test_step_of_cllora_is_refused_for_another_method(refused: Refused) -> None:
    assert "sam_on=task is for methods that take two steps a batch; InfLoRA takes one" in refused(
        "method=inflora", "sam_on=task"
    )


def test_benchmark_in_profile_quick_is_refused(refused: Refused) -> None:
    text = refused("method=inflora", "engine=reference", "profile=quick", "benchmark=cifar100")
    assert "benchmark= has no meaning in profile quick (as asked)" in text
    assert "profile=upstream" in text


def test_cuda_where_there_is_none_is_refused(refused: Refused) -> None:
    text = refused("method=inflora", "engine=reference", "profile=quick", "device=cuda")
    assert "device=cuda needs a CUDA device, and torch sees no CUDA device" in text


@pytest.mark.third_party
def test_model_that_upstream_trains_on_several_gpus_alone_is_refused(
    refused: Refused, upstream: Callable[[str], Path]
) -> None:
    upstream("InfLoRA")
    text = refused("method=inflora", "variant=infloraca", "profile=quick", "device=cpu")
    assert "InfLoRA's code of InfLoRA_CA1 (configs/cifar100_infloraca.json) stops on a single device" in text
    assert "device=0,1" in text


@pytest.mark.third_party
def test_missing_images_and_weights_are_told_what_to_fetch(
    refused: Refused, upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("InfLoRA")
    (tmp_path / "data").mkdir()
    (tmp_path / "weights").mkdir()
    words = ["profile=upstream", "device=cpu", f"data={tmp_path / 'data'}", f"model={tmp_path / 'weights'}"]
    text = refused("method=inflora", *words)
    assert text.startswith("flatpatch: 2 problems, nothing was started:")
    assert f"there is no folder {tmp_path / 'data' / 'cifar-100-python'}" in text
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85)" in text
    assert f"no {tmp_path / 'weights'}/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz" in text
    assert "https://storage.googleapis.com/vit_models/augreg/B_16-i21k" in text


@pytest.mark.third_party
def test_other_benchmarks_name_source_folder_and_count(refused: Refused, upstream: Callable[[str], Path]) -> None:
    upstream("CL-LoRA")
    for benchmark, folder, said in (
        ("imagenet_r", "imagenet-r", "(30000 images)"),
        ("imagenet_a", "imagenet-a", "(7500 images; training and test images expected 5981 and 1519, as the paper"),
        ("vtab", "vtab", "expected 1796 and 8619, as the paper arXiv:2303.07338 states; not checked by us)"),
    ):
        text = refused("method=cllora", "profile=upstream", "device=cpu", f"benchmark={benchmark}")
        assert f"data/{folder}" in text
        assert said in text


def test_damaged_cifar_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(b"cut short")
    with pytest.raises(UserError) as caught:
        check_images(CIFAR100, tmp_path, tmp_path)
    text = str(caught.value)
    assert f"{folder / 'train'} is damaged (expected md5 16019d7e3df5f24257cddd939b257f8d)" in text
    assert f"{folder / 'meta'} is missing" in text


SMALL = Dataset(2, "small", "https://example.org/small.tar", (6, 2), 8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A benchmark of two classes, three training images and one test image each."""
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "small" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "small" / split / name / f"{number}.jpg").write_bytes(b"")
    return tmp_path


def test_whole_images_give_the_hash_of_their_list(images: Path) -> None:
    hashes, notes = check_images(SMALL, images, images)
    assert hashes["small/test: list of files"] == list_hash(["dog/0.jpg", "cat/0.jpg"])
    assert "no hash of small's split is published" in notes[0]
    (images / "small/test/cat/0.jpg").rename(images / "small/test/cat/9.jpg")
    assert check_images(SMALL, images, images)[0] != hashes


def test_counts_that_only_a_paper_states_are_noted_and_never_refused(images: Path) -> None:
    def notes(stated: tuple[int, int]) -> list[str]:
        small = Dataset(2, "small", "https://example.org/small.tar", stated=stated)
        return [note for note in check_images(small, images, images)[1] if note.startswith("NOTE")]

    assert notes((6, 2)) == []
    assert notes((5, 3)) == [
        f"NOTE: {images / 'small'} has 6 training and 2 test images, expected 5 and 3, as the paper arXiv:2303.07338 "
        "states; not checked by us"
    ]


def test_stated_counts_of_imagenet_a_agree_with_the_sum_that_its_authors_publish() -> None:
    dataset = PILOT["imageneta"]
    assert dataset.stated is not None
    assert sum(dataset.stated) == dataset.total


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda place: shutil.rmtree(place), "there is no folder"),
        (lambda place: shutil.rmtree(place / "test"), "has no folder test"),
        (lambda place: (place / "train/cat/0.jpg").unlink(), "5 training and 2 test images (expected 6 and 2)"),
        (lambda place: shutil.rmtree(place / "train/cat"), "has images of 1 classes (expected 2)"),
        (lambda place: (place / "test/dog/0.jpg").unlink(), "(expected 2, without images: dog)"),
    ],
    ids=["no folder", "no test", "an image", "a class", "an empty class"],
)
def test_partial_images_are_refused(damage: Callable[[Path], object], expected: str, images: Path) -> None:
    damage(images / "small")
    with pytest.raises(UserError) as caught:
        check_images(SMALL, images, images)
    assert expected in str(caught.value)
    assert "https://example.org/small.tar" in str(caught.value)


def test_weights_cut_short_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("kernel.npy", bytes(1000))
    check_weights(whole)
    for name, content in (("short.npz", whole.read_bytes()[:-30]), ("w.pth", b"no"), ("w.safetensors", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"the weights {tmp_path / name} are damaged: .* model=FILE"):
            check_weights(tmp_path / name)
    damaged = bytearray(whole.read_bytes())
    damaged[100] ^= 1
    whole.write_bytes(damaged)
    with pytest.raises(UserError, match="kernel.npy fails its checksum|Bad CRC"):
        check_weights(whole)


def test_weights_are_held_against_the_hash_in_their_name(tmp_path: Path) -> None:
    path = tmp_path / "vit-0123abcd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kernel.npy", bytes(10))
    with pytest.raises(UserError, match="their SHA-256 does not begin with 0123abcd"):
        check_weights(path)
    right = path.with_name(f"vit-{file_hash(path)[:8]}.npz")
    path.rename(right)
    check_weights(right)


def test_weights_are_found_by_timms_name_in_a_folder(tmp_path: Path) -> None:
    name = weights_url("vit_base_patch16_224_in21k").rsplit("/", 1)[1]
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("kernel.npy", bytes(10))
    assert find_weights("vit_base_patch16_224_in21k", "", [tmp_path / "none", tmp_path]) == tmp_path / name
    assert find_weights("vit_base_patch16_224_in21k", str(tmp_path), []) == tmp_path / name


@pytest.mark.parametrize(
    ("config", "classes", "expected"),
    [
        ({"init_cls": 10, "increment": 7}, 100, "100 classes do not divide into a first task of 10"),
        ({"init_cls": 5, "increment": 4}, 20, r"so that it divides 20 - 5 = 15, the classes after the first task"),
        ({"init_cls": 120, "increment": 10}, 100, "do not divide.*at most 100"),
        ({"init_cls": 0, "increment": 10}, 100, "upstream.init_cls=0 is out of range"),
        ({"init_cls": 10, "increment": True}, 100, "increment=true is out of range"),
        ({"init_cls": 9, "increment": 1}, 10, "a task of one class"),
        (
            {"init_cls": 4, "increment": 4, "backbone_type": "vit_base_patch16_224_cllora"},
            20,
            "the 5 likeliest classes after the first task",
        ),
        (
            {"init_cls": 20, "increment": 10, "total_sessions": 9},
            100,
            "upstream.init_cls=20 and upstream.increment=10 differ",
        ),
        ({"init_cls": 10, "increment": 10, "total_sessions": 9}, 100, "Add upstream.total_sessions=10"),
        (
            {"init_cls": 10, "increment": 10, "total_sessions": 10, "optim": "adam", "epochs": 1},
            100,
            "divides by the epochs less one",
        ),
    ],
)
def test_classes_that_do_not_make_tasks_are_refused(config: dict[str, object], classes: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        task_classes(config, classes, CLLORA if "backbone_type" in config else INFLORA)


def test_classes_of_the_tasks_follow_upstreams_increments() -> None:
    assert task_classes({"init_cls": 10, "increment": 5}, 20, CLLORA) == ((0, 9), (10, 14), (15, 19))
    # Neither number divides the classes; the second one divides what is left of them.
    threes = [(first, first + 2) for first in range(5, 20, 3)]
    assert task_classes({"init_cls": 5, "increment": 3}, 20, CLLORA) == ((0, 4), *threes)


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("method=inflora", "upstream.lrat=1"), "upstream knows no key 'lrat'. Did you mean 'lrate'?"),
        (("method=inflora", "upstream.seed=[1]"), "upstream.seed: use the setting seed= instead"),
        (("method=inflora", "upstream.epochs=many"), "upstream.epochs='many' is not a number (expected e.g."),
        (("method=inflora", "upstream.shuffle=1"), "upstream.shuffle='1' is not true or false"),
        (("method=inflora", "upstream.rank=true"), "upstream.rank='true' is not a number"),
        (("method=cllora", "upstream.specific_pos=[6,7]"), "Did you mean 'specfic_pos'?"),
        (("method=cllora", "upstream.msa=1"), "upstream.msa='1' is not a list (expected e.g. upstream.msa=[1,0,1])"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_key_that_upstream_does_not_know_is_told_the_nearest_one(
    words: tuple[str, ...], expected: str, refused: Refused, upstream: Callable[[str], Path]
) -> None:
    upstream("InfLoRA"), upstream("CL-LoRA")
    assert expected in refused(*words, "profile=upstream", "device=cpu")


@pytest.mark.third_party
def test_key_in_upstreams_own_spelling_is_taken(upstream: Callable[[str], Path]) -> None:
    shipped = json.loads((upstream("CL-LoRA") / "exps/cifar.json").read_text())
    words = ["method=cllora", "profile=upstream", "upstream.specfic_pos=[8,9]", "upstream.print_forget=true"]
    config = json.loads(make_plan(parse(words), dry_run=True).files[CONFIG])
    assert {key: config[key] for key in config if config[key] != shipped.get(key)} == {
        "specfic_pos": [8, 9],
        "print_forget": True,
    }


@pytest.mark.third_party
@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("later_epochs=1", "never reads it where init_cls equals increment"),
        ("init_epochs=0", "init_epochs=0 is out of range"),
        ("optimizer=lbfgs", 'optimizer="lbfgs" is unknown here. Expected: sgd, adam, adamw.'),
        ("scheduler=foo", 'scheduler="foo" is unknown here. Expected: cosine, constant.'),
    ],
)
def test_override_that_cllora_would_not_follow_is_refused(
    word: str, text: str, refused: Refused, upstream: Callable[[str], Path]
) -> None:
    upstream("CL-LoRA")
    assert text in refused("method=cllora", "profile=quick", "device=cpu", f"upstream.{word}")


@pytest.mark.third_party
def test_override_that_this_model_of_infloras_never_reads_is_refused(
    refused: Refused, upstream: Callable[[str], Path]
) -> None:
    checkout = upstream("InfLoRA")
    known = known_keys(checkout, checkout / "configs/domainnet_inflora.json")
    assert {"lrate", "fc_lrate", "epochs"} <= known
    assert "init_lr" not in known
    text = refused("method=inflora", "profile=quick", "upstream.fc_lrate=0.5")
    assert "upstream knows no key 'fc_lrate'" in text
    assert 'optim="lion" is unknown here' in refused("method=inflora", "profile=quick", "upstream.optim=lion")

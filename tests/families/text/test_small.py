"""Profile small: which texts it draws, what its plan says, and whole runs on a tiny BERT made here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from flatpatch.__main__ import main
from flatpatch.comparison import compare_runs
from flatpatch.errors import UserError
from flatpatch.families.text import quick, small
from flatpatch.families.text.models import is_encoder, model_type
from flatpatch.families.text.upstream import STANDARD_ORDERS
from flatpatch.files import folder_hash
from flatpatch.report.records import read_record
from flatpatch.runner.record import new_record
from flatpatch.runner.resolve import headline, make_plan, parse
from tests.reference_cases import make_encoder

LABELS = {
    "dbpedia": ["Plant", "Album", "Film"],
    "amazon": ["very negative", "negative", "neutral", "positive", "very positive"],
    "yahoo": ["Health", "Sports"],
    "agnews": ["World", "Sports", "Business"],
    "SST-2": ["Good", "Bad"],
}
# As in a partial copy of upstream's: of dbpedia the test file alone, of yahoo nothing but its labels.
SPLITS = {"dbpedia": ("dev", "test"), "yahoo": ()}
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(small.PACKAGE) is None, reason=f"not installed: {small.DISTRIBUTION}"
)


def write_benchmark(folder: Path, splits: dict[str, tuple[str, ...]], *, instances: int = 40) -> Path:
    for name, labels in LABELS.items():
        place = folder / small.TYPES[name] / name
        place.mkdir(parents=True)
        (place / "labels.json").write_text(json.dumps(labels))
        for split in splits.get(name, ("train", "dev", "test")):
            rows = [
                {"sentence": f"{split} text {i} of {labels[i % len(labels)]}", "label": labels[i % len(labels)]}
                for i in range(instances)
            ]
            (place / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmark"), SPLITS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = " ".join(word for labels in LABELS.values() for label in labels for word in label.split())
    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-bert", extra_text=f"text {words}")


@pytest.fixture
def words(model: Path, benchmark: Path, tmp_path: Path) -> list[str]:
    places = [f"model={model}", f"data={benchmark}", f"output={tmp_path / 'runs'}"]
    return ["method=seqlora", "profile=small", "device=cpu", *places]


# The texts


def test_the_task_without_texts_is_replaced_and_the_one_with_a_single_split_divided(benchmark: Path) -> None:
    tasks = small.choose_tasks(benchmark, STANDARD_ORDERS["3"])
    assert [task.dataset for task in tasks] == ["SST-2", "amazon", "agnews", "dbpedia"]
    assert [task.asked for task in tasks] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert [(task.train, task.test) for task in tasks] == [("train", "test")] * 3 + [("test", "test")]


def test_a_whole_copy_needs_no_replacement(tmp_path: Path) -> None:
    tasks = small.choose_tasks(write_benchmark(tmp_path, {}), STANDARD_ORDERS["1"])
    assert tuple(task.dataset for task in tasks) == STANDARD_ORDERS["1"]
    assert {(task.train, task.test) for task in tasks} == {("train", "test")}


def test_two_tasks_without_texts_or_no_replacement_are_one_message(tmp_path: Path) -> None:
    two = write_benchmark(tmp_path / "two", {"yahoo": (), "amazon": ()})
    with pytest.raises(UserError, match=r"has no texts of amazon, yahoo: .*SST-2 can replace one of them\. Complete"):
        small.choose_tasks(two, STANDARD_ORDERS["1"])
    none = write_benchmark(tmp_path / "none", {"yahoo": (), "SST-2": ()})
    with pytest.raises(UserError, match="no texts of yahoo: .*SST-2 .*is not there either"):
        small.choose_tasks(none, STANDARD_ORDERS["1"])


def texts(files: dict[str, str], name: str, split: str) -> list[str]:
    return [row["sentence"] for row in json.loads(files[f"{small.TYPES[name]}/{name}/{split}.json"])]


def test_texts_are_drawn_once_each_and_fewer_are_the_first_of_more(benchmark: Path) -> None:
    tasks = small.choose_tasks(benchmark, STANDARD_ORDERS["1"])
    many = small.draw_texts(benchmark, tasks, train=20, test=10)
    few = small.draw_texts(benchmark, tasks, train=5, test=10)
    for task in tasks:
        for split, count in (("train", 20), ("test", 10)):
            drawn = texts(many, task.dataset, split)
            assert len(drawn) == len(set(drawn)) == count
            source = task.train if split == "train" else task.test
            assert {text.split()[0] for text in drawn} == {source}
        assert texts(few, task.dataset, "train") == texts(many, task.dataset, "train")[:5]
    assert not {*texts(many, "dbpedia", "train")} & {*texts(many, "dbpedia", "test")}
    assert texts(many, "amazon", "train") != [f"train text {i} of {LABELS['amazon'][i % 5]}" for i in range(20)]


def test_a_split_takes_no_more_than_it_has_and_the_divided_one_gives_half_to_the_test(benchmark: Path) -> None:
    tasks = small.choose_tasks(benchmark, STANDARD_ORDERS["1"])
    files = small.draw_texts(benchmark, tasks, train=1000, test=400)
    for name, counts in {"amazon": (40, 40), "dbpedia": (20, 20)}.items():
        assert tuple(len(texts(files, name, split)) for split in ("train", "test")) == counts
    assert not {*texts(files, "dbpedia", "train")} & {*texts(files, "dbpedia", "test")}


def test_a_single_text_cannot_be_divided(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path, SPLITS, instances=1)
    with pytest.raises(UserError, match="dbpedia/test.json has one instance, and is to be both trained and tested on"):
        small.draw_texts(folder, small.choose_tasks(folder, STANDARD_ORDERS["1"]), train=5, test=5)


def test_a_label_that_is_not_listed_is_named_also_where_the_split_is_divided(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path, SPLITS)
    (folder / "TC" / "dbpedia" / "labels.json").write_text('["Plant", "Album"]')
    with pytest.raises(UserError, match="dbpedia: 'Film' is not one of its labels.json"):
        small.draw_texts(folder, small.choose_tasks(folder, STANDARD_ORDERS["1"]), train=20, test=10)


def test_hash_of_the_texts_is_that_of_the_folder_they_are_written_to(benchmark: Path, tmp_path: Path) -> None:
    files = small.draw_texts(benchmark, small.choose_tasks(benchmark, STANDARD_ORDERS["1"]), train=7, test=3)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert small.hash_of(files) == folder_hash(tmp_path)


# The plan


def test_plan_is_labelled_small_and_says_what_replaced_what(words: list[str], benchmark: Path) -> None:
    plan = make_plan(parse(words))
    assert plan.labels[:2] == ("small", "reference")
    assert plan.tasks == ("dbpedia", "amazon", "SST-2", "agnews")
    assert f"{benchmark} has no texts of yahoo: SST-2 is learned in its place" in plan.notes
    said = {deviation.what: (deviation.upstream, deviation.here) for deviation in plan.deviations}
    assert said["task yahoo"] == ("yahoo", "SST-2")
    assert "texts of dbpedia" in said and "texts of amazon" not in said
    assert "learning_rate=" in str(said["arguments"][1]) and "max_train_samples=" in str(said["arguments"][1])
    assert "small and reference" in headline(plan)
    assert plan.environment["OMP_NUM_THREADS"] == "1"
    assert "small" in plan.folder.name
    record = new_record(plan)
    assert record["benchmark"] == "small, order 1"
    assert record["labels"][:2] == ["small", "reference"]
    assert record["inputs"][small.DATA] == small.hash_of(
        {name.removeprefix(f"{small.DATA}/"): text for name, text in plan.files.items() if small.DATA in name}
    )


def test_selected_tasks_are_drawn_alone_and_other_samples_are_an_override(words: list[str]) -> None:
    plan = make_plan(
        parse([*words, "tasks=amazon,SST-2", "upstream.max_train_samples=6", "upstream.max_test_samples=4"])
    )
    assert plan.tasks == ("amazon", "SST-2")
    drawn = {name: len(json.loads(text)) for name, text in plan.files.items() if name.startswith(small.DATA)}
    assert {name.rpartition("/")[2]: count for name, count in drawn.items() if "SST-2" in name} == {
        "train.json": 6,
        "test.json": 4,
        "labels.json": 2,
    }
    assert not any("dbpedia" in name for name in drawn)
    assert not any("dbpedia" in deviation.what for deviation in plan.deviations)


def test_a_t5_is_trained_as_a_t5(words: list[str]) -> None:
    plan = make_plan(parse([*words, f"model={quick.MODEL_FOLDER}"]))
    command = plan.stages[0].command
    assert command[command.index("--learning_rate") + 1] == "0.001"
    assert "--max_source_length" not in command
    assert not any(deviation.what == "answers" for deviation in plan.deviations)
    assert not is_encoder(quick.MODEL_FOLDER)


def test_a_share_of_the_texts_keeps_the_labels_proportions_and_full_training_has_its_own_rate(
    words: list[str],
) -> None:
    plan = make_plan(parse([*words, "fraction=0.5", "tuning=full", "budget=2"]))
    rows = json.loads(plan.files[f"{small.DATA}/SC/amazon/train.json"])
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS["amazon"], 4)  # of 8 each
    assert len(json.loads(plan.files[f"{small.DATA}/SC/amazon/test.json"])) == 40
    command = plan.stages[0].command
    assert command[command.index("--learning_rate") + 1] == str(small.FULL["learning_rate"])
    assert command[command.index("--num_train_epochs") + 1] == "4"
    assert command[command.index("--data_dir") + 1] == small.DATA
    assert "off-protocol" in plan.labels
    other = make_plan(parse([*words, "fraction=0.5", "seed=7"]))
    assert other.inputs[small.DATA] != plan.inputs[small.DATA]


@pytest.mark.parametrize("method", ["nlora", "olora", "inclora"])
def test_other_methods_run_by_the_reference_engine_too(method: str, words: list[str]) -> None:
    plan = make_plan(parse([*words[1:], f"method={method}"]))
    assert (plan.engine, plan.verified) == ("reference", None)
    assert plan.stages[0].command[plan.stages[0].command.index("--method") + 1] == method


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["order=4"], "profile small has the four tasks of orders 1, 2, 3 (got order=4)"),
        (["engine=upstream"], "runs our reference implementation alone (got engine=upstream)"),
        (["tasks=yahoo"], "unknown task 'yahoo'. This order has: dbpedia, amazon, SST-2, agnews"),
        (["sam=sam", "scope=head", f"model={quick.MODEL_FOLDER}"], "is a T5, which has no head to perturb"),
        (["upstream.lora_r=33"], "is more than the width of the matrices that LoRA changes"),
        (["upstream.max_test_samples=0"], "upstream.max_test_samples='0' is out of range"),
    ],
)
def test_what_cannot_be_is_one_message(more: list[str], said: str, words: list[str]) -> None:
    method = ["method=nlora"] if more[0] in ("engine=upstream", "order=4") else []
    with pytest.raises(UserError) as caught:
        make_plan(parse([*words, *method, *more]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_head_may_be_perturbed(words: list[str]) -> None:
    for tuning in ("lora", "full"):
        asked = parse([*words, "sam=sam", "scope=head", f"tuning={tuning}"])
        assert make_plan(asked).request.settings.scope == "head"
    for more, scope in ((), "lora"), (("tuning=full",), "all"):
        with pytest.raises(UserError, match=f"scope=head has nothing to perturb: .* Use scope={scope}."):
            parse(["method=seqlora", "profile=quick", "sam=sam", "scope=head", *more])


def test_image_methods_have_no_such_profile() -> None:
    with pytest.raises(UserError, match="profile=small has no settings for InfLoRA, a vision method"):
        parse(["method=inflora", "profile=small"])


def test_missing_model_says_what_to_put_where(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(small, "ROOT", Path("nowhere"))
    without = [word for word in words if not word.startswith("model=")]
    assert main(["run", *without]) == 2
    said = capsys.readouterr().err
    assert small.DISTRIBUTION in said and "nowhere/models/all-MiniLM-L6-v2" in said and "model=FOLDER" in said
    assert said.count("flatpatch:") == 1
    assert main(["run", *without, "--dry-run"]) == 0
    assert f"  - profile small needs the pretrained encoder {small.MODEL_NAME}" in capsys.readouterr().out


def test_missing_texts_say_where_they_were_looked_for(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def find(repo: str) -> Path:
        raise UserError(f"{repo} is not here.")

    monkeypatch.setattr("flatpatch.patches.find_checkout", find)
    without = [word for word in words if not word.startswith("data=")]
    with pytest.raises(UserError, match="texts of N-LoRA's CL_Benchmark, or .*data=FOLDER. N-LoRA is not here"):
        make_plan(parse(without))
    plan = make_plan(parse(without), dry_run=True)
    assert len(plan.lacks) == 1 and plan.tasks == STANDARD_ORDERS["1"]


def test_model_of_another_type_or_a_part_of_one_is_refused(words: list[str], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="other has no config.json"):
        make_plan(parse([*words, f"model={other}"]))
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"names the model type 'gpt2'\. Profile small trains a t5"):
        make_plan(parse([*words, f"model={other}"]))
    (other / "config.json").write_text("[]")
    assert model_type(other) == ""


def test_damaged_texts_are_named(words: list[str], tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path / "damaged", SPLITS)
    (folder / "SC" / "amazon" / "train.json").write_text('[{"sentence": "a"')
    with pytest.raises(UserError, match="amazon/train.json is not complete JSON"):
        make_plan(parse([*words, f"data={folder}"]))


# Whole runs


@pytest.mark.slow  # each process loads transformers
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_run_is_resumed_and_measured_again_and_never_compared_with_a_paper(
    tuning: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scopes = "adapter,merged,trainable,model" if tuning == "lora" else "trainable,model"
    more = [f"tuning={tuning}", "tasks=amazon,SST-2", "sam=sam", "upstream.num_train_epochs=1", "run=one"]
    more += ["measure=loss", f"measure_scope={scopes}", "measure_samples=8", "measure_batch=3", "measure_when=after"]
    assert main(["run", *words, *more]) == 0
    folder = tmp_path / "runs" / "one"
    record = read_record(folder)
    assert record["status"] == "finished" and record["labels"][0] == "small"
    assert "SMALL AND REFERENCE" in capsys.readouterr().out
    second = [entry["loss"] for entry in record["flatness"] if entry["task_index"] == 1]
    assert second == pytest.approx([second[0]] * len(scopes.split(",")), rel=1e-5)
    assert "small, reference" in compare_runs([record])["verdict"]

    # As after a kill during the second task: its files are there, its end is not.
    (folder / "tasks" / "2-SST-2" / "done.json").unlink()
    (folder / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    assert main(["run", *words, *more]) == 0
    again = read_record(folder)
    assert again["restarts"] == 1
    assert again["accuracy_matrix"] == record["accuracy_matrix"]
    assert [entry["loss"] for entry in again["flatness"]] == [entry["loss"] for entry in record["flatness"]]

    # The rebuilt model has the loss that was measured in the run, or this is refused.
    how = [f"measure_scope={scopes.split(',')[0]}", "measure_samples=8", "task=all"]
    assert main(["measure", f"run={folder}", "measure=loss", *how]) == 0
    finished = [entry for entry in read_record(folder)["flatness"] if entry["when"] == "finished"]
    assert {entry["task"] for entry in finished} == {"amazon", "SST-2"}


# The real model


@needs_package
def test_the_package_holds_the_published_weights() -> None:
    folder, name = small.find_model("")
    assert (name, model_type(folder)) == ("all-MiniLM-L6-v2", "bert")
    # SHA-256 of model.safetensors in sentence-transformers/all-MiniLM-L6-v2.
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8").splitlines()


@needs_package
@pytest.mark.slow
@pytest.mark.third_party
def test_real_model_learns_real_texts(upstream: Callable[[str], Path], tmp_path: Path) -> None:
    upstream("N-LoRA")
    more = ["tasks=agnews", "upstream.max_train_samples=320", "upstream.max_test_samples=100", f"output={tmp_path}"]
    assert main(["run", "method=seqlora", "profile=small", "device=cpu", "run=real", *more]) == 0
    assert read_record(tmp_path / "real")["accuracy_matrix"][0][0] > 60  # chance 25; 85 of 200 seen after 20 steps

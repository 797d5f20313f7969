"""The quick benchmark's text: the same bytes everywhere, upstream's format, nothing in common with pre-training."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from flatpatch.families.text import quick
from flatpatch.families.text.quick import generator, pretraining, words
from flatpatch.families.text.quick.build import SEED
from flatpatch.families.text.quick.build import documents as documents_of_build
from flatpatch.families.text.quick.pretraining import Document
from flatpatch.families.text.reference.data import load_examples

LISTS = [
    *words.TASK_TOPICS.values(),
    *words.PRETRAINING_TOPICS.values(),
    *words.TASK_MOODS.values(),
    *words.PRETRAINING_MOODS.values(),
    words.PRETRAINING_LABELS,
    words.NEUTRAL_ADJECTIVES,
    words.VERBS,
    words.PREPOSITIONS,
]
TASK_WORDS = {word for lists in (words.TASK_TOPICS, words.TASK_MOODS) for own in lists.values() for word in own}
TASK_LABELS = {label for task in generator.BENCHMARK.values() for label in task.labels}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    quick.write_benchmark(folder)
    return folder


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = random.Random(0)
    return [pretraining.document(rng) for _ in range(6000)]


def read(folder: Path, name: str, split: str) -> list[dict[str, str]]:
    instances: list[dict[str, str]] = json.loads((folder / quick.TASKS[name] / name / f"{split}.json").read_text())
    return instances


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_benchmark_bytes_are_the_pinned_ones(benchmark: Path) -> None:
    """The shipped model and all recorded quick numbers belong to these bytes."""
    assert digest(benchmark) == "4cc0156a36f28c5a0735758bea0d32670c12306a326bde02c4cd2d7bf9446f34"


def test_seed_changes_sentences_but_not_labels(benchmark: Path, tmp_path: Path) -> None:
    quick.write_benchmark(tmp_path, seed=1)
    assert digest(tmp_path) != digest(benchmark)
    for name, kind in quick.TASKS.items():
        labels = f"{kind}/{name}/labels.json"
        assert (tmp_path / labels).read_bytes() == (benchmark / labels).read_bytes()
        assert read(tmp_path, name, "test") != read(benchmark, name, "test")


def test_writing_again_leaves_the_same_bytes(tmp_path: Path) -> None:
    quick.write_benchmark(tmp_path)
    first = digest(tmp_path)
    quick.write_benchmark(tmp_path)
    assert digest(tmp_path) == first


def test_tasks_are_those_of_the_first_three_orders() -> None:
    assert dict(quick.TASKS) == {"dbpedia": "TC", "amazon": "SC", "yahoo": "TC", "agnews": "TC"}


@pytest.mark.parametrize("name", quick.TASKS)
@pytest.mark.parametrize("split", generator.SPLIT_SIZES)
def test_split_has_its_size_and_balanced_labels(benchmark: Path, name: str, split: str) -> None:
    instances = read(benchmark, name, split)
    labels = json.loads((benchmark / quick.TASKS[name] / name / "labels.json").read_text())
    counts = Counter(instance["label"] for instance in instances)
    assert sorted(counts) == sorted(labels)
    assert set(counts.values()) == {generator.SPLIT_SIZES[split] // len(labels)}


@pytest.mark.parametrize("name", quick.TASKS)
def test_sentences_have_upstreams_form(benchmark: Path, name: str) -> None:
    for instance in read(benchmark, name, "train"):
        assert sorted(instance) == ["label", "sentence"]
        assert re.fullmatch(r"Title: [a-z ]+\nText: [a-z ]+\.\n", instance["sentence"])


@pytest.mark.parametrize("name", quick.TASKS)
def test_no_sentence_stands_twice_in_a_task(benchmark: Path, name: str) -> None:
    sentences = [i["sentence"] for split in generator.SPLIT_SIZES for i in read(benchmark, name, split)]
    assert len(set(sentences)) == len(sentences) == sum(generator.SPLIT_SIZES.values())


def test_a_sentence_drawn_twice_is_drawn_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chance alone makes this so rare that no seed tried shows it."""
    numbers = itertools.count()
    monkeypatch.setattr(generator, "_sentence", lambda *_: f"sentence {next(numbers) // 2}")
    generator.write_benchmark(tmp_path)
    sentences = [i["sentence"] for split in generator.SPLIT_SIZES for i in read(tmp_path, "yahoo", split)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("name", quick.TASKS)
def test_training_order_is_shuffled(benchmark: Path, name: str) -> None:
    labels = [instance["label"] for instance in read(benchmark, name, "train")]
    cycle = len(set(labels))
    assert labels[:cycle] != labels[cycle : 2 * cycle]


def test_topics_carry_different_labels_in_different_tasks() -> None:
    """This is what one task has to unlearn from another."""
    labels: dict[str, set[str]] = {}
    for task in generator.BENCHMARK.values():
        for label, groups in task.groups.items():
            for group in groups:
                labels.setdefault(group, set()).add(label)
    shared = [group for group, names in labels.items() if len(names) > 1]
    assert len(shared) >= 6


def test_no_word_stands_in_two_lists() -> None:
    counts = Counter(word for own in [*LISTS, tuple(TASK_LABELS)] for word in own)
    assert [word for word, count in counts.items() if count > 1] == []


def test_pick_distinct_returns_each_item_once() -> None:
    assert sorted(generator.pick_distinct(random.Random(0), range(10), 10)) == list(range(10))


def words_of(document: Document) -> set[str]:
    return set(re.findall(r"[a-z]+", f"{document.source} {document.target}"))


def test_pretraining_has_all_kinds_of_documents(documents: list[Document]) -> None:
    assert {item.kind for item in documents} == {"fill-in", "classification", "named", "guess"}


def test_pretraining_documents_are_those_the_shipped_model_was_made_from() -> None:
    """A changed word list or sentence pattern needs a new model: rebuild it, then pin the new value."""
    stream = documents_of_build(f"{SEED}/model")
    text = "\n".join(f"{item.kind}|{item.source}|{item.target}" for item in itertools.islice(stream, 2000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "6c6fe2f21029d3bc6570fdd273e48e21ba5576278b9a471a1f50775ced7afe64"
    )


def test_no_pretraining_document_holds_a_task_label_and_a_task_word(documents: list[Document]) -> None:
    for item in documents:
        found = words_of(item)
        assert not (found & TASK_LABELS and found & TASK_WORDS), item


def test_task_words_stand_in_fill_in_documents_alone(documents: list[Document]) -> None:
    kinds = {item.kind for item in documents if words_of(item) & TASK_WORDS}
    assert kinds == {"fill-in"}


def test_task_labels_are_answers_only_where_named_or_guessed(documents: list[Document]) -> None:
    kinds = {item.kind for item in documents if item.target in TASK_LABELS}
    assert kinds == {"named", "guess"}


def test_task_label_to_be_guessed_is_no_word_of_its_text(documents: list[Document]) -> None:
    guesses = [item for item in documents if item.kind == "guess" and item.target in TASK_LABELS]
    assert len(guesses) > 100
    for item in guesses:
        assert not TASK_LABELS & set(re.findall(r"[a-z]+", item.source.partition("Title:")[2]))


def test_guessed_answers_are_any_of_the_options(documents: list[Document]) -> None:
    """No position is preferred, or the untrained model would favour one label of each task."""
    places: Counter[int] = Counter()
    for item in documents:
        if item.kind == "guess":
            options = item.source.partition("Option: ")[2].partition(" \n")[0].split(", ")
            if len(options) == 4:
                places[options.index(item.target)] += 1
    assert sorted(places) == [0, 1, 2, 3]
    assert min(places.values()) > 0.5 * max(places.values())


def test_classification_answers_are_the_names_of_pretraining_topics_and_moods(documents: list[Document]) -> None:
    answers = {item.target for item in documents if item.kind == "classification"}
    assert answers == {name for names in pretraining.label_names().values() for name in names}


def test_no_pretraining_document_is_about_a_benchmark_dataset(documents: list[Document]) -> None:
    assert not any(f"Dataset:{name}\n" in item.source for item in documents for name in quick.TASKS)


def test_no_benchmark_sentence_is_a_pretraining_text(benchmark: Path, documents: list[Document]) -> None:
    sentences = {i["sentence"] for name in quick.TASKS for i in read(benchmark, name, "test")}
    assert not any(sentence in item.source for item in documents for sentence in sentences)


def test_pretraining_prompt_is_the_one_tasks_are_asked_with(benchmark: Path) -> None:
    """The reference engine's prompts are checked against upstream's own collator; these, against them."""
    example = load_examples(benchmark, [("TC", "yahoo")], "test", {"TC": "Pick one.\n"})[0]
    labels = json.loads((benchmark / "TC/yahoo/labels.json").read_text())
    sentence = read(benchmark, "yahoo", "test")[0]["sentence"]
    assert pretraining.prompt("TC", "yahoo", "Pick one.", labels, sentence) == example.prompt

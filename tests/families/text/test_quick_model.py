"""The shipped tokenizer and model: whole, small, loadable as upstream loads them, and a fair start for the tasks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from flatpatch.errors import UserError
from flatpatch.families.text import quick
from flatpatch.families.text.quick import build, generator, words
from flatpatch.families.text.reference import ReferenceTask, run_task
from flatpatch.families.text.reference.data import load_examples
from flatpatch.families.text.reference.evaluate import exact_match

UPSTREAM_WORDS_IN_PATHS = ("codegen", "bloomz", "gpt-neox", "llama", "adapter")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(quick.MODEL_FOLDER)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    quick.write_benchmark(folder)
    return folder


def provenance() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((quick.MODEL_FOLDER / "provenance.json").read_text(encoding="utf-8"))
    return content


def test_shipped_files_are_those_of_the_provenance() -> None:
    files = {path.name for path in quick.MODEL_FOLDER.iterdir()} - {"provenance.json"}
    assert files == set(build.FILES) == set(provenance()["sha256"])
    for name, expected in provenance()["sha256"].items():
        assert hashlib.sha256((quick.MODEL_FOLDER / name).read_bytes()).hexdigest() == expected, name


def test_shipped_files_were_built_with_the_scripts_settings() -> None:
    assert provenance()["settings"] == build.SETTINGS
    assert provenance()["seed"] == build.SEED


def test_shipped_files_take_less_than_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in quick.MODEL_FOLDER.iterdir()) < 5_000_000


def test_folder_name_makes_upstream_take_it_for_a_t5() -> None:
    name = quick.MODEL_FOLDER.name
    assert "t5" in name
    assert not any(word in name for word in UPSTREAM_WORDS_IN_PATHS)


def test_weights_file_says_it_is_pytorchs() -> None:
    """transformers 4.28.1 refuses a safetensors file without it."""
    with safe_open(quick.MODEL_FOLDER / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_model_loads_with_tied_embeddings_and_nothing_missing() -> None:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(quick.MODEL_FOLDER, output_loading_info=True)
    assert info["mismatched_keys"] == []
    assert info["unexpected_keys"] == []
    # The tied copies are not stored; they have to be the one matrix all the same.
    assert set(info["missing_keys"]) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert model.lm_head.weight is model.shared.weight
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_model_fits_nloras_penalty_and_the_tokenizer(tokenizer: Any) -> None:
    """N-LoRA multiplies A (r x in) by B (out x r), and resizes the embeddings to the tokenizer's length."""
    config = AutoConfig.from_pretrained(quick.MODEL_FOLDER)
    assert config.d_model == config.num_heads * config.d_kv
    assert config.vocab_size == len(tokenizer)
    assert config.dropout_rate == build.SETTINGS["dropout"]


def test_tokenizer_emits_what_t5_takes(tokenizer: Any) -> None:
    assert sorted(tokenizer("the old anchor")) == ["attention_mask", "input_ids"]
    assert tokenizer("anchor")["input_ids"][-1] == 1
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", quick.TASKS)
def test_labels_survive_the_tokenizer(tokenizer: Any, name: str) -> None:
    for label in generator.BENCHMARK[name].labels:
        ids = tokenizer(label)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == label
        assert 2 <= len(ids) <= 4


@pytest.mark.parametrize("name", quick.TASKS)
def test_prompts_survive_the_tokenizer_with_line_breaks_as_spaces(tokenizer: Any, benchmark: Path, name: str) -> None:
    for example in load_examples(benchmark, [(quick.TASKS[name], name)], "test")[:20]:
        ids = tokenizer(example.prompt)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 96
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == " ".join(example.prompt.split())


def test_words_of_the_tasks_are_single_pieces(tokenizer: Any) -> None:
    """Otherwise tasks would differ in difficulty by their spelling."""
    for lists in (words.TASK_TOPICS, words.TASK_MOODS):
        for own in lists.values():
            assert [word for word in own if len(tokenizer.tokenize(word)) > 1] == []


@pytest.mark.parametrize("name", quick.TASKS)
def test_untrained_model_answers_no_better_than_chance(tokenizer: Any, benchmark: Path, name: str) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(quick.MODEL_FOLDER).eval()
    examples = load_examples(benchmark, [(quick.TASKS[name], name)], "test")
    inputs = tokenizer([example.prompt for example in examples], padding=True, return_tensors="pt")
    answers = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=8), skip_special_tokens=True)
    accuracy = exact_match(examples, answers)["exact_match"]
    # Ten points above chance is 2.5 to 3 standard deviations of 120 draws.
    assert accuracy <= 100 / len(generator.BENCHMARK[name].labels) + 10


@pytest.mark.parametrize("arguments", [[], ["steps=1"], ["out=x", "depth=3"], ["out"]])
def test_build_says_what_it_takes_when_given_something_else(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"build takes out=<folder> and any of .*Example: python -m"):
        build.main(arguments)


def test_tokenizer_is_rebuilt_to_the_byte(tmp_path: Path) -> None:
    settings = build.SETTINGS
    build.build_tokenizer(tmp_path, vocabulary=settings["vocabulary"], num_documents=settings["tokenizer_documents"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (quick.MODEL_FOLDER / name).read_bytes(), name


def learn(
    benchmark: Path, output: Path, learned: str, tested: list[str], previous: Path | None = None
) -> dict[str, float]:
    """Train plain LoRA on one task with the preset, and return the accuracy on each tested task, in percent."""
    preset = quick.PRESET
    task = ReferenceTask(
        method="seqlora",
        model=quick.MODEL_FOLDER,
        data_dir=benchmark,
        task=(quick.TASKS[learned], learned),
        eval_tasks=tuple((quick.TASKS[name], name) for name in tested),
        output_dir=output,
        previous=previous,
        num_train_epochs=int(preset["num_train_epochs"]),
        per_device_train_batch_size=int(preset["per_device_train_batch_size"]),
        per_device_eval_batch_size=int(preset["per_device_eval_batch_size"]),
        learning_rate=preset["learning_rate"],
    )
    run_task(task)
    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    return {name: results[f"predict_exact_match_for_{name}"] for name in tested}


@pytest.fixture(scope="module")
def learned_alone(benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float]]:
    """Return a function that trains on one task, once, and gives its folder and its accuracy."""

    @functools.cache
    def learned(name: str) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp(name)
        return folder, learn(benchmark, folder, name, [name])[name]

    return learned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yahoo", "agnews", "dbpedia"])  # amazon is learned in the test below
def test_each_task_alone_is_learnable(learned_alone: Callable[[str], tuple[Path, float]], name: str) -> None:
    assert learned_alone(name)[1] >= 90


@pytest.mark.slow
def test_training_on_the_second_task_makes_the_first_forgotten(
    learned_alone: Callable[[str], tuple[Path, float]], benchmark: Path, tmp_path: Path
) -> None:
    first, before = learned_alone("dbpedia")
    after = learn(benchmark, tmp_path, "amazon", ["dbpedia", "amazon"], previous=first / "adapter")
    assert after["amazon"] >= 85
    assert before - after["dbpedia"] > 20

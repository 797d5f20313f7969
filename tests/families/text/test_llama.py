"""The small random LLaMA that ships, and which models the authors' LLaMA code is not started with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatpatch.errors import UserError
from flatpatch.families.text import llama, quick
from flatpatch.families.text.models import lacks
from flatpatch.families.text.quick import build_llama
from flatpatch.runner.resolve import make_plan, parse


def provenance() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((quick.LLAMA_FOLDER / "provenance.json").read_text(encoding="utf-8"))
    return content


def test_shipped_files_are_those_of_the_provenance_and_small() -> None:
    files = {path.name for path in quick.LLAMA_FOLDER.iterdir()} - {"provenance.json"}
    assert files == set(build_llama.FILES) == set(provenance()["sha256"])
    for name, expected in provenance()["sha256"].items():
        assert hashlib.sha256((quick.LLAMA_FOLDER / name).read_bytes()).hexdigest() == expected, name
    assert provenance()["settings"] == build_llama.SETTINGS
    assert sum(path.stat().st_size for path in quick.LLAMA_FOLDER.iterdir()) < 1_000_000


def test_tokenizer_can_be_built_again(tmp_path: Path) -> None:
    settings = build_llama.SETTINGS
    build_llama.build_tokenizer(
        tmp_path, vocabulary=settings["vocabulary"], num_documents=settings["tokenizer_documents"]
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (quick.LLAMA_FOLDER / path.name).read_bytes()


def test_tokenizer_loses_nothing_of_a_prompt_and_its_answer() -> None:
    """The authors' code finds an answer behind "Answer:" in the decoded text, having said itself what 1 and 2 are."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(quick.LLAMA_FOLDER)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    text = "Task:TC\nDataset:dbpedia\nOption: vessel, fowl \nTitle: the 17 {0} und ö\nAnswer:"
    ids = tokenizer(tokenizer.bos_token + text + "fowl" + tokenizer.eos_token)["input_ids"]
    assert ids[:2] == [1, 1]
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text + "fowl"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(quick.LLAMA_FOLDER, tmp_path / "own-llama"))


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_shipped_model_has_no_problem(model: Path) -> None:
    assert lacks(model, llama=True) == ""
    assert llama.model_problems(model, 512) == []


def test_model_that_upstreams_code_would_misread_is_refused_with_the_reason(model: Path) -> None:
    assert "800 positions" not in llama.model_problems(model, 1025)[0]
    assert "has 1024 positions, and an example may take 1025" in llama.model_problems(model, 1025)[0]
    (model / "added_tokens.json").write_text('{"<pad>": 800}')
    (problem,) = llama.model_problems(model, 512)
    assert "has 800 embeddings and its tokenizer 801 pieces, added ones counted" in problem
    changed(model, vocab_size=801)
    assert llama.model_problems(model, 512) == []
    (model / "added_tokens.json").unlink()
    assert "tokenizer 800 pieces" in llama.model_problems(model, 512)[0]
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (model / name).write_text('{"bos_token": "<s>", "pad_token": {"content": "[PAD]"}}')
        assert llama.model_problems(model, 512) == []
        (model / name).write_text("{}")
    (model / "tokenizer.model").write_bytes(b"no tokenizer")
    (problem,) = llama.model_problems(model, 512)
    assert "the first pieces of its tokenizer.model are unreadable" in problem
    changed(model, model_type="t5")
    (problem,) = llama.model_problems(model, 512)
    assert "is of type 't5', and upstream's LLaMA scripts train a 'llama'" in problem
    (model / "config.json").write_text("{")
    assert "config.json cannot be read" in llama.model_problems(model, 512)[0]
    (model / "tokenizer.model").unlink()
    assert "tokenizer.model" in lacks(model, llama=True)


def test_tokenizer_whose_first_pieces_are_others_is_refused(model: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of no meaning"] * 9),
        model_prefix=str(model / "tokenizer"),
        vocab_size=30,
        unk_id=2,
        bos_id=-1,
        eos_id=1,
        pad_id=0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (problem,) = llama.model_problems(model, 512)
    assert "are <pad> </s> <unk>, and upstream's code takes them for <unk> <s> </s>" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [("small-model", "must hold 'llama'"), ("llama-adapter", "must hold 'llama' and not 'adapter'")],
)
def test_folder_whose_name_upstream_misreads_is_refused(name: str, message: str) -> None:
    assert llama.name_problem(name) == message
    assert llama.name_problem("Llama-7B") == ""


@pytest.mark.third_party
def test_plan_refuses_what_the_checks_find(upstream: Callable[[str], Path], model: Path) -> None:
    upstream("N-LoRA")
    words = ["order=llama1", "profile=quick", "device=cpu", f"model={model}"]
    plan = make_plan(parse(words))
    assert plan.links == {"initial_model/own-llama": model}
    assert plan.labels == ("quick", "off-protocol")
    with pytest.raises(UserError, match=r"has 1024 positions.* upstream\.max_source_length=1024"):
        make_plan(parse([*words, "upstream.max_source_length=2000"]))
    renamed = model.rename(model.parent / "small")
    with pytest.raises(UserError, match=r"must hold 'llama' \(got 'small'\)"):
        make_plan(parse([*words[:-1], f"model={renamed}"]))
    (renamed / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.model, which upstream's LLaMA code reads"):
        make_plan(parse([*words[:-1], f"model={renamed}"]))


def test_quick_llama_needs_the_authors_code() -> None:
    with pytest.raises(UserError, match=r"the reference engine has no LLaMA.*engine=upstream"):
        make_plan(parse(["order=llama1", "profile=quick", "engine=reference"]))

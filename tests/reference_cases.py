"""A T5 of 20,000 weights, a BERT of as many, their word tokenizer and two small tasks, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from flatpatch.families.text.reference import ReferenceTask
from flatpatch.families.text.reference.data import INSTRUCTIONS

TOPICS = {"Sports": ["ball", "goal", "team"], "Science": ["atom", "star", "cell"], "Trade": ["price", "bank", "shop"]}
MOODS = {"good": ["fine", "happy", "great"], "bad": ["poor", "sad", "awful"]}
FILLERS = ["the", "a", "one", "day", "we", "saw", "of", "and"]
TASKS = (("TC", "topics"), ("SC", "moods"))


def make_data(folder: Path, instances: int = 22) -> Path:
    """Write both datasets, each split with so many instances."""
    for (task_type, dataset), vocabulary in zip(TASKS, (TOPICS, MOODS), strict=True):
        place = folder / task_type / dataset
        place.mkdir(parents=True)
        (place / "labels.json").write_text(json.dumps(list(vocabulary)))
        for split in ("train", "dev", "test"):
            draw = random.Random(f"{dataset} {split}")
            rows = []
            for _ in range(instances):
                label = draw.choice(list(vocabulary))
                words = draw.choices(FILLERS, k=draw.randint(2, 7)) + draw.choices(vocabulary[label], k=2)
                draw.shuffle(words)
                rows.append({"label": label, "sentence": " ".join(words)})
            (place / f"{split}.json").write_text(json.dumps(rows))
    return folder


def make_model(folder: Path, *, extra_text: str = "", dropout: float = 0.1, d_kv: int = 8) -> Path:
    """Write a random T5 and a tokenizer that knows the tasks' words and those of ``extra_text``."""
    words = _write_tokenizer(folder, extra_text)
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=words + 5,  # a T5 has more words than its tokenizer
        d_model=32,
        d_kv=d_kv,
        num_heads=4,
        d_ff=48,
        num_layers=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        initializer_factor=0.5,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_encoder(folder: Path, *, extra_text: str = "", dropout: float = 0.1) -> Path:
    """Write a random BERT, with the pooler that is not used, and the same tokenizer."""
    words = _write_tokenizer(folder, extra_text)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, extra_text: str) -> int:
    """Write the tokenizer; return how many words it knows."""
    text = [*INSTRUCTIONS.values(), extra_text, "Task:TC Dataset:topics Task:SC Dataset:moods Option: , Answer:"]
    text += [*TOPICS, *MOODS, *FILLERS, *sum(TOPICS.values(), []), *sum(MOODS.values(), [])]
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for piece in text for word, _ in splitter.pre_tokenize_str(piece))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return len(vocabulary)


def make_task(model: Path, data: Path, output: Path, index: int = 0, **changes: object) -> ReferenceTask:
    """Return the arguments of the first or second task."""
    arguments: dict[str, object] = {
        "method": "nlora",
        "model": model,
        "data_dir": data,
        "task": TASKS[index],
        "eval_tasks": TASKS[: index + 1],
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "lamda_1": 0.4,
        "lora_r": 3,
        "max_target_length": 5,
    }
    return ReferenceTask(**{**arguments, **changes})  # type: ignore[arg-type]

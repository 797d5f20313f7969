"""Rebuild the tokenizer and the small T5 that ship with the package.

    python -m flatpatch.families.text.quick.build out=<folder>
    python -m flatpatch.families.text.quick.build out=<folder> steps=200     # a quick try

Everything is drawn from seed 0. With the library versions and the number of threads named in ``provenance.json``
the files come out the same, bit for bit, on the same machine; on another one the weights may differ, because
float sums do. The shipped files took 17 minutes on one thread of a busy machine (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatpatch.families import pretraining
from flatpatch.families.pretraining import read_build, run_build
from flatpatch.families.text.quick.pretraining import SENTINELS, Document, document
from flatpatch.files import digest

SEED = 0
SETTINGS: dict[str, Any] = {
    "vocabulary": 2000,
    "tokenizer_documents": 30_000,
    "steps": 3000,
    "batch": 32,
    "learning_rate": 0.02,
    "warmup": 200,
    "d_model": 128,
    "heads": 4,
    "d_ff": 256,
    "layers": 2,
    "dropout": 0.1,
    "pretraining_dropout": 0.0,
}
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def documents(seed: str) -> Iterator[Document]:
    """Yield pre-training documents without end."""
    rng = random.Random(seed)
    while True:
        yield document(rng)


def build_tokenizer(folder: Path, *, vocabulary: int, num_documents: int) -> Any:
    """Train a byte-pair tokenizer on pre-training documents and save it.

    Args:
        folder: Where the tokenizer's files go.
        vocabulary: Largest number of pieces, special ones included.
        num_documents: How many documents to train on.

    Returns:
        The ``PreTrainedTokenizerFast``, with ``<pad>``=0, ``</s>``=1, ``<unk>``=2.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # As in T5, a line break counts as a space.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    source = documents(f"{SEED}/tokenizer")
    texts = (f"{item.source} {item.target}" for item, _ in zip(source, range(num_documents), strict=False))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SENTINELS),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return fast


def build_model(folder: Path, tokenizer: Any, settings: dict[str, Any]) -> list[float]:
    """Pre-train the T5 from random weights and save it.

    Args:
        folder: Where ``config.json``, ``generation_config.json`` and ``model.safetensors`` go.
        tokenizer: What :func:`build_tokenizer` returned.
        settings: As ``SETTINGS``.

    Returns:
        The mean loss of each hundred steps, in nats per piece.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=settings["d_model"],
        d_kv=settings["d_model"] // settings["heads"],
        num_heads=settings["heads"],
        d_ff=settings["d_ff"],
        num_layers=settings["layers"],
        num_decoder_layers=settings["layers"],
        dropout_rate=settings["pretraining_dropout"],
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        n_positions=512,
    )
    model = T5ForConditionalGeneration(config)
    # The rate counts in units of each matrix's own size, as Adafactor does for T5: T5 starts its query matrices 64
    # times smaller than its embeddings, and no single AdamW rate trains both.
    groups = [
        {"params": [weight], "lr": settings["learning_rate"] * weight.detach().square().mean().sqrt().item()}
        for weight in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    source = documents(f"{SEED}/model")

    def loss() -> torch.Tensor:
        batch = [next(source) for _ in range(settings["batch"])]
        inputs = tokenizer([item.source for item in batch], padding=True, return_tensors="pt")
        labels = tokenizer([item.target for item in batch], padding=True, return_tensors="pt")["input_ids"]
        found: torch.Tensor = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        return found

    model.train()
    losses = pretraining.pretrain(model, optimizer, loss, settings, floor=0.02)
    # Pre-training is short enough to do without dropout; fine-tuning has T5's usual share, as T5 1.1 does it.
    model.config.dropout_rate = settings["dropout"]
    model.eval()
    model.save_pretrained(folder, safe_serialization=True)
    return losses


def main(arguments: list[str]) -> None:
    """Build into the folder named by ``out=``; other ``key=value`` change ``SETTINGS``."""
    example = "python -m flatpatch.families.text.quick.build out=build/t5-quick"
    folder, settings = read_build(arguments, SETTINGS, example)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import safetensors
    import tokenizers
    import torch
    import transformers

    started = time.monotonic()
    tokenizer = build_tokenizer(
        folder, vocabulary=settings["vocabulary"], num_documents=settings["tokenizer_documents"]
    )
    losses = build_model(folder, tokenizer, settings)
    provenance = {
        "made_by": "python -m flatpatch.families.text.quick.build",
        "text": "generated by flatpatch.families.text.quick.pretraining; no outside data",
        "seed": SEED,
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started),
        "loss_per_100_steps": losses,
        "sha256": {name: digest(folder / name) for name in FILES},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_build(main)

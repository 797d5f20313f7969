"""Rebuild the small CLIP that ships with the package.

    python -m flatpatch.families.clip.quick.build out=<folder>
    python -m flatpatch.families.clip.quick.build out=<folder> steps=100     # a quick try

The model learns to tell which caption belongs to which image, as CLIP did. A batch has one image of each class of all
four domains, so that no caption fits two of its images; half of the captions of shapes and strokes also name the
colour, and some name another class of the domain than is drawn, as captions of found images do. Everything is drawn
from seed 0. With the library versions and the number of threads named in ``provenance.json`` the files come out the
same, bit for bit, on the same machine; on another one the weights may differ, because float sums do.
"""

from __future__ import annotations

import json
import platform
import time
from typing import Any

import numpy as np

from flatpatch.families import pretraining
from flatpatch.families.clip.quick.generator import CAPTIONED, HUES, SIZE, draw
from flatpatch.families.clip.quick.preset import DOMAINS
from flatpatch.families.pretraining import read_build, run_build
from flatpatch.files import digest

SEED = 0
SETTINGS: dict[str, Any] = {
    "steps": 5000,
    "learning_rate": 1e-3,
    "warmup": 100,
    "weight_decay": 0.05,
    "wrong_captions": 0.1,
}
CAPTIONS = (
    "a picture of {}",
    "an image that shows {}",
    "this is {}",
    "{}",
    "one drawing of {}",
    "here we see {}",
)
LONGEST = 12
PAD, UNKNOWN, START, END = "<pad>", "<unknown>", "<start>", "<end>"
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}


def vocabulary() -> dict[str, int]:
    """Return every word's number; the closing one has the largest, by which transformers' CLIP finds it."""
    names = [name for domain in DOMAINS.values() for name in domain]
    words = sorted({word for text in CAPTIONS for word in text.replace("{}", "").split()} | {*names, *HUES})
    return {word: number for number, word in enumerate((PAD, UNKNOWN, START, *words, END))}


def new_tokenizer() -> Any:
    """Return a tokenizer that splits at spaces and knows the words of the captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(word, numbers[word]) for word in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model() -> Any:
    """Return the CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel

    numbers = vocabulary()
    special = {"pad_token_id": numbers[PAD], "bos_token_id": numbers[START], "eos_token_id": numbers[END]}
    text = {"vocab_size": len(numbers), "max_position_embeddings": LONGEST, "num_hidden_layers": 3, **SIZES, **special}
    vision = {"image_size": SIZE, "patch_size": 8, "num_hidden_layers": 4, **SIZES}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def caption_batch(rng: np.random.Generator, wrong: float) -> tuple[Any, list[str]]:
    """Draw one image of each class, with a caption each.

    Args:
        rng: Draws all that varies.
        wrong: Share of the captions that name another class of the domain.

    Returns:
        Images ``(32, 3, 32, 32)`` from -1 to 1, and their captions.
    """
    import torch

    images, captions = [], []
    for domain, (kind, names) in enumerate(DOMAINS.items()):
        labels = np.arange(len(names))
        hues = (rng.random(len(names)) * len(HUES)).astype(np.int64)
        images.append(draw(domain, labels, CAPTIONED, rng, hues))
        for label, hue in zip(labels.tolist(), hues.tolist(), strict=True):
            caption = CAPTIONS[int(rng.random() * len(CAPTIONS))]
            named = label
            if rng.random() < wrong:
                named = (label + 1 + int(rng.random() * (len(names) - 1))) % len(names)
            coloured = kind in ("shapes", "strokes") and rng.random() < 0.5
            captions.append(caption.format(f"{tuple(HUES)[hue]} {names[named]}" if coloured else names[named]))
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    return (pixels / 255 - 0.5) / 0.5, captions


def generator(stream: int) -> np.random.Generator:
    """Return the random numbers of one purpose: 0 training, 1 the accuracy reported."""
    return np.random.Generator(np.random.PCG64([SEED, 1000 + stream]))


def matched(model: Any, tokenizer: Any, *, batches: int) -> float:
    """Return how often the right one of 32 captions is the nearest to a new image, in percent; no caption is wrong."""
    import torch

    rng, hits = generator(1), 0
    model.eval()
    with torch.no_grad():
        for _ in range(batches):
            images, captions = caption_batch(rng, 0.0)
            found = model(pixel_values=images, **tokenizer(captions, padding=True, return_tensors="pt"))
            hits += int((found.logits_per_image.argmax(1) == torch.arange(len(captions))).sum())
    return 100 * hits / (batches * len(captions))


def pretrain(settings: dict[str, Any]) -> tuple[Any, Any, list[float]]:
    """Train the CLIP from random weights.

    Args:
        settings: As ``SETTINGS``.

    Returns:
        The model, its tokenizer, and the mean loss of each hundred steps, in nats.
    """
    import torch

    torch.manual_seed(SEED)
    model, tokenizer = new_model().train(), new_tokenizer()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    rng = generator(0)

    def loss() -> torch.Tensor:
        images, captions = caption_batch(rng, settings["wrong_captions"])
        words = tokenizer(captions, padding=True, return_tensors="pt")
        found: torch.Tensor = model(pixel_values=images, **words, return_loss=True).loss
        return found

    def bound_scale() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # a hundred, CLIP's own bound

    losses = pretraining.pretrain(model, optimizer, loss, settings, floor=0.01, after_step=bound_scale)
    return model, tokenizer, losses


def main(arguments: list[str]) -> None:
    """Build into the folder named by ``out=``; other ``key=value`` change ``SETTINGS``."""
    example = "python -m flatpatch.families.clip.quick.build out=build/clip-quick"
    folder, settings = read_build(arguments, SETTINGS, example)
    import safetensors
    import tokenizers
    import torch
    import transformers

    started = time.monotonic()
    model, tokenizer, losses = pretrain(settings)
    seconds = round(time.monotonic() - started)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)  # its own writer makes a file that nobody else may read
    channels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(channels) + "\n", encoding="utf-8")
    reached = matched(model, tokenizer, batches=100)
    made = sorted(path for path in folder.iterdir() if path.name != "provenance.json")
    provenance = {
        "made_by": "python -m flatpatch.families.clip.quick.build",
        "images": "drawn by flatpatch.families.clip.quick.generator; no outside data",
        "seed": SEED,
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "matched": reached,
        "loss_per_100_steps": losses,
        "sha256": {path.name: digest(path) for path in made},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    print(f"{reached:.1f} % of 3200 new images matched to their captions, of 32 each; {folder}")


if __name__ == "__main__":
    run_build(main)

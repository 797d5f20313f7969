"""The embedded benchmark of profile ``quick`` for CLIP: four domains of drawn images and a small CLIP, made for this.

It trains in about a minute on one CPU core. Its numbers say nothing about any paper's. The model was trained by us on
captioned images of the same classes, drawn in another style than the benchmark's: so its zero-shot accuracy is well
above chance on every domain, and well below what a LoRA reaches. Settings were chosen with images drawn from seed 1;
the package's runs and tests use those of seed 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flatpatch.families.clip.quick.preset import DOMAINS, PRESET

MODEL_FOLDER: Final[Path] = Path(__file__).resolve().parent / "clip-quick"
"""The shipped model and its tokenizer, as transformers' ``CLIPModel`` and ``AutoTokenizer`` load them."""

TEMPLATES: Final = ("a picture of {}", "an image that shows {}", "this is {}")
"""The prompts of every domain; training uses the first."""

__all__ = ["DOMAINS", "MODEL_FOLDER", "PRESET", "TEMPLATES"]

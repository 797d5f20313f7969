"""Sequential LoRA: one pair of factors, trained on each task in turn; a baseline of both text papers."""

from __future__ import annotations

from flatpatch.families.text.upstream import TextUpstream

UPSTREAM = TextUpstream(
    name="seqlora",
    title="sequential LoRA",
    tunings=("lora", "full"),
    penalty=False,
    unused=("lamda_1", "lamda_2"),
)

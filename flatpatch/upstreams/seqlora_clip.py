"""Sequential LoRA on CLIP: one pair of factors for each projection, trained on each data set in turn."""

from __future__ import annotations

from flatpatch.families.clip.upstream import ClipUpstream

UPSTREAM = ClipUpstream(name="seqlora_clip", title="sequential LoRA on CLIP", design="sequential")

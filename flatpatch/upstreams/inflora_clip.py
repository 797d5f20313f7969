"""InfLoRA's design on CLIP: a LoRA for each data set that is kept out of the inputs of earlier ones."""

from __future__ import annotations

from flatpatch.families.clip.upstream import ClipUpstream

UPSTREAM = ClipUpstream(name="inflora_clip", title="InfLoRA's design on CLIP", design="inflora")

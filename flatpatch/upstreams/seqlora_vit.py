"""Sequential LoRA on a ViT: one pair of factors, trained on each task in turn."""

from __future__ import annotations

from flatpatch.families.vision.upstream import VisionUpstream

UPSTREAM = VisionUpstream(
    name="seqlora_vit", title="sequential LoRA on a ViT", seed=0, quick={"epochs": 10, "lrate": 5e-3}
)

"""A LoRA for each data set on CLIP, each on the pre-trained model and tested on every data set."""

from __future__ import annotations

from flatpatch.families.clip.upstream import ClipUpstream

UPSTREAM = ClipUpstream(name="lora_per_task_clip", title="one LoRA per task on CLIP", design="per_task")

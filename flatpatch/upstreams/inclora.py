"""Incremental LoRA: a new pair of factors for each task, without a penalty; a baseline of both text papers."""

from __future__ import annotations

from flatpatch.families.text.upstream import TextUpstream

UPSTREAM = TextUpstream(name="inclora", title="incremental LoRA", penalty=False, unused=("lamda_1", "lamda_2"))

#!/usr/bin/env bash
# Train a LoRA method on CLIP over several data sets with SAM, in flatpatch's own small implementation.
#   bash run_scripts/clip_sam.sh                            # one LoRA through all tasks, every setting at its default
#   bash run_scripts/clip_sam.sh method=lora_per_task_clip  # one LoRA per task, each tested on all tasks
#   bash run_scripts/clip_sam.sh method=inflora_clip        # InfLoRA's design
#   bash run_scripts/clip_sam.sh sam=off                    # the baseline to compare with
#   bash run_scripts/clip_sam.sh --help                     # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch run method=seqlora_clip sam=sam "$@"

#!/usr/bin/env bash
# Train sequential LoRA (one adapter for all tasks) with SAM, in flatpatch's own small implementation.
#   bash run_scripts/seqlora_sam.sh          # every setting at its default
#   bash run_scripts/seqlora_sam.sh sam=off  # the baseline to compare with
#   bash run_scripts/seqlora_sam.sh --help   # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch run method=seqlora sam=sam "$@"

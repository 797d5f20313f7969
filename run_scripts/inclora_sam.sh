#!/usr/bin/env bash
# Train incremental LoRA (a new adapter for each task) with SAM, in flatpatch's own small implementation.
#   bash run_scripts/inclora_sam.sh          # every setting at its default
#   bash run_scripts/inclora_sam.sh sam=off  # the baseline to compare with
#   bash run_scripts/inclora_sam.sh --help   # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch run method=inclora sam=sam "$@"

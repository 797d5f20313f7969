#!/usr/bin/env bash
# Train DualLoRA with SAM, as we reconstruct it: its paper's text was not read (docs/duallora.md).
#   bash run_scripts/duallora_sam.sh                   # every setting at its default
#   bash run_scripts/duallora_sam.sh rho=0.05 seed=1   # key=value; of a key given twice the last counts
#   bash run_scripts/duallora_sam.sh --dry-run         # the commands it would run, and nothing else
#   bash run_scripts/duallora_sam.sh --help            # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch run method=duallora sam=sam "$@"

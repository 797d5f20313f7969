#!/usr/bin/env bash
# Train N-LoRA as its authors do, without SAM: the baseline to compare with.
#   bash run_scripts/nlora.sh                 # every setting at its default
#   bash run_scripts/nlora.sh order=2 seed=1  # key=value; of a key given twice the last counts
#   bash run_scripts/nlora.sh --dry-run       # the commands it would run, and nothing else
#   bash run_scripts/nlora.sh --help          # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch run method=nlora sam=off "$@"

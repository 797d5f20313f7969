#!/usr/bin/env bash
# The study exp3_2: One LoRA on CLIP for each domain, tried on the others.
#   bash run_scripts/exp3_2.sh                         # the quick form: a miniature, minutes on two CPU cores
#   bash run_scripts/exp3_2.sh seeds=0..4 output=runs/five-seeds
#   bash run_scripts/exp3_2.sh grid=full --dry-run     # plans every run that the study names, and starts none
#   bash run_scripts/exp3_2.sh --help                  # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch study name=exp3_2 "$@"

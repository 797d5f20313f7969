#!/usr/bin/env bash
# The study exp1_2: One text task with LoRA of rank 8 and 4, and with full fine-tuning.
#   bash run_scripts/exp1_2.sh                         # the quick form: a miniature, minutes on two CPU cores
#   bash run_scripts/exp1_2.sh seeds=0..4 output=runs/five-seeds
#   bash run_scripts/exp1_2.sh grid=full --dry-run     # plans every run that the study names, and starts none
#   bash run_scripts/exp1_2.sh --help                  # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch study name=exp1_2 "$@"

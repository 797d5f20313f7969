#!/usr/bin/env bash
# The study sam_family: SAM's family beside SAM, a random direction and no SAM.
#   bash run_scripts/sam_family.sh                   # the quick form: a miniature, minutes on two CPU cores
#   bash run_scripts/sam_family.sh seeds=0..4 output=runs/five-seeds
#   bash run_scripts/sam_family.sh --dry-run         # plans every run, and starts none
#   bash run_scripts/sam_family.sh --help            # all settings
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch study name=sam_family "$@"

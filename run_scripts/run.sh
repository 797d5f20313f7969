#!/usr/bin/env bash
# Any of flatpatch's verbs, in its own environment.
#   bash run_scripts/run.sh run method=nlora sam=sam rho=0.05
#   bash run_scripts/run.sh report run=runs/NAME
#   bash run_scripts/run.sh patches verify
#   bash run_scripts/run.sh --help
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m flatpatch "$@"

#!/usr/bin/env bash
# Run the tests. Those that need an upstream checkout or a GPU skip themselves, with the reason, where there is none.
#   bash run_scripts/test.sh                    # all of them, a few minutes on two cores
#   bash run_scripts/test.sh -k sam             # what pytest takes: here, tests with sam in their name
#   bash run_scripts/test.sh -m "not slow"      # without those over 20 s
#   bash run_scripts/test.sh -n 0 -x --pdb      # in one process, e.g. for a debugger; otherwise one per core, up to four
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
exec python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"

#!/usr/bin/env bash
# Run the tests. Those that need an upstream checkout or a GPU skip themselves, with the reason, where there is none.
#   bash run_scripts/test.sh                    # the fast ones: none over 10 s, none that needs a checkout
#   bash run_scripts/test.sh all                # all of them
#   bash run_scripts/test.sh -k sam             # what pytest takes: here, fast tests with sam in their name
#   bash run_scripts/test.sh all -n 0 -x --pdb  # in one process, e.g. for a debugger; otherwise one per core, up to four
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_environment.sh"
if [[ ${1-} == all ]]; then shift; else set -- -m "not slow and not third_party" "$@"; fi
exec python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"

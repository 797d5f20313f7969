"""One run of a study in a process of its own: ``python -m flatpatch.studies.one_run key=value ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flatpatch.errors import FlatpatchError
from flatpatch.runner.execute import execute
from flatpatch.runner.resolve import make_plan, parse


def main(words: Sequence[str]) -> int:
    """Carry out the run that the words ask for; a FlatpatchError becomes its message and its exit code."""
    try:
        execute(make_plan(parse(words)), show=False)
    except FlatpatchError as error:
        print(f"flatpatch: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

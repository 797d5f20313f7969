"""Start a module without a library that it never uses: ``python -m flatpatch.families.lean MODULE WORDS...``.

transformers and peft import accelerate, and that imports DeepSpeed wherever it is installed: half of the time in which
a process of a reference engine starts, which uses DeepSpeed for nothing.
"""

from __future__ import annotations

import runpy
import sys

UNUSED = "deepspeed"


def main(words: list[str]) -> None:
    """Run a module as ``python -m`` does, with the rest as its words."""
    sys.modules[UNUSED] = None  # type: ignore[assignment]  # as if it were not installed
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

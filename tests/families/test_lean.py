"""A module that is started without DeepSpeed is otherwise started as by ``python -m``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flatpatch.families import lean
from flatpatch.files import ROOT

MODULE = """
import importlib.util, sys
assert __name__ == "__main__" and __file__ == sys.argv[0]
print(sys.argv[1:], importlib.util.find_spec("{unused}"))
sys.exit(7)
"""


def test_module_gets_its_words_and_finds_no_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text(MODULE.format(unused=lean.UNUSED))
    (tmp_path / lean.UNUSED).mkdir()
    (tmp_path / lean.UNUSED / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "flatpatch.families.lean", "asked", "--words", "x y"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, "['--words', 'x y'] None\n"), done.stderr

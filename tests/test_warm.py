"""What tests/warm.py runs sees what it would see if Python had just been started for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import warm_python

OF_THE_SHELL = ("_", "OLDPWD", "PWD", "PYTHON_EXEC", "SHLVL")  # and where torch.distributed.run finds the executable
SCRIPT = f"""
import hashlib, os, sys
variables = sorted(item for item in os.environ.items() if item[0] not in {OF_THE_SHELL})
print(__name__, sys.argv, sys.path, os.getcwd(), os.environ["ASKED"], hashlib.md5(repr(variables).encode()).hexdigest())
print("imported:", "wave" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["asked.py", "--words", "x y"], ["-u", "asked.py"], ["-m", "asked", "1"]])
def test_warm_python_runs_what_python_does(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "server").mkdir()
    (tmp_path / "asked.py").write_text(SCRIPT)
    with warm_python(tmp_path / "server", ("wave",)) as warm:
        ours, theirs = (
            subprocess.run(
                [python, *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(tmp_path / "more"), "ASKED": "1"},
                capture_output=True,
                text=True,
            )
            for python in (warm, sys.executable)
        )
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stdout.startswith("__main__ [")
    assert (ours.stderr, theirs.stderr) == ("imported: True\n", "imported: False\n")


def test_exit_codes_errors_and_signals_come_through(tmp_path: Path) -> None:
    with warm_python(tmp_path, ("wave",)) as warm:
        for code, expected, said in (
            ("import sys; sys.exit(7)", 7, ""),
            ("import sys; sys.exit('no')", 1, "no\n"),
            ("raise KeyError('gone')", 1, "KeyError: 'gone'\n"),
            ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL, ""),
        ):
            (tmp_path / "asked.py").write_text(code)
            done = subprocess.run([warm, "asked.py"], cwd=tmp_path, capture_output=True, text=True)
            assert (done.returncode, done.stderr[-len(said) :] if said else "") == (expected, said), done

"""A Python that starts warm: what it runs is forked from a process that has imported the large libraries already.

A short run of upstream's code spends most of its time importing torch, transformers and DeepSpeed, again in each of its
processes. Where a test is about what the code computes, and not about how its process starts or ends, it may be run by
this Python: an executable that takes a script or ``-m module`` with its arguments, environment, folder and outputs.
It does not import flatpatch before, nor anything of upstream's.

    python warm.py FOLDER MODULE...     serve until standard input ends; FOLDER/python is then the executable
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEXT = ("deepspeed", "transformers", "transformers.trainer_seq2seq", "transformers.models.t5", "datasets", "nltk")
TEXT += ("sklearn.metrics", "torch.distributed.run")
IMAGES = ("torch._dynamo", "torchvision", "timm", "scipy.spatial.distance", "sklearn.cluster")


@contextmanager
def warm_python(folder: Path, modules: tuple[str, ...]) -> Iterator[Path]:
    """Serve from a process of its own, and return the executable."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # read by imports
    words = [sys.executable, __file__, str(folder), *modules]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=folder
        )
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n", (folder / "log.txt").read_text()
        yield folder / "python"
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(60)


@contextmanager
def runs_by(python: Path) -> Iterator[None]:
    """Let the processes of all runs be started by an executable in Python's place."""
    import pytest

    from flatpatch.runner.resolve import command_of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flatpatch.runner.execute.command_of", lambda stage, _, port: command_of(stage, str(python), port)
        )
        yield


def serve(folder: Path, modules: list[str]) -> None:
    """Import, then fork twice for each caller: one child runs what was asked for, the other tells its exit code."""
    import importlib
    import select

    said = os.dup(1)
    os.dup2(2, 1)  # libraries print when they are imported
    del sys.path[0]  # this file's own folder
    for name in modules:
        importlib.import_module(name)
    executable = folder / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" --call "{folder}" "$@"\n')
    executable.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(16)
        os.write(said, b"ready\n")
        os.close(said)
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            if 0 in ready:
                os._exit(0)
            caller = listening.accept()[0]
            if os.fork() == 0:
                listening.close()
                child = os.fork()
                if child == 0:
                    words = become(caller, str(executable))
                    caller.close()
                    break
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                caller.sendall(str(code).encode())
                os._exit(0)
            caller.close()
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    run(words)


def become(caller: socket.socket, executable: str) -> list[str]:
    """Take the caller's outputs, folder and environment, and return its words."""
    message, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    asked = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"], PYTHON_EXEC=executable)  # by which torch.distributed.run starts its workers
    words: list[str] = asked["words"]
    return words


def run(words: list[str]) -> None:
    """Do what ``python WORDS`` does, in this process."""
    import runpy

    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    while words[0] == "-u":
        words = words[1:]
    if words[0] == "-m":
        sys.path[:0] = [os.getcwd(), *paths]
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [os.path.dirname(os.path.abspath(words[0])), *paths]
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def call(folder: str, words: list[str]) -> int:
    """Have the server run the words as if by this process, and return the exit code."""
    asked = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(folder, "socket"))
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
        code = int(server.recv(16))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "--call":
        sys.exit(call(sys.argv[2], sys.argv[3:]))
    serve(Path(sys.argv[1]), sys.argv[2:])

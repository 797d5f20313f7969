"""Start a launcher on each node of a SLURM job.

Run as ``python -m flatpatch.families.text.across_nodes NODES PORT MODULE WORDS...``. Becomes ``srun``, so that whoever
ends this process ends the launchers on all nodes. They meet at this node's port.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence


def command(words: Sequence[str], host: str, cores: str) -> list[str]:
    """Return what starts a launcher on each node.

    Args:
        words: The number of nodes, a free port, the launcher's module and its own words.
        host: This node's name.
        cores: Cores of a node's launcher, empty where SLURM was told no number.
    """
    nodes, port, module, *own = words
    meet = [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={host}:{port}", f"--rdzv_id={port}"]
    step = ["srun", f"--ntasks={nodes}", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cores}"] if cores else [])]
    return [*step, sys.executable, "-m", module, *meet, *own]


def main() -> None:
    """Become ``srun``."""
    words = command(sys.argv[1:], socket.gethostname(), os.environ.get("SLURM_CPUS_PER_TASK", ""))
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()

"""A SLURM of one node, with its own settings and its own key, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
DAEMONS_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# No control groups, no accounting, no services of the system: a container has none of them.
SETTINGS = """\
ClusterName=flatpatch
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def ask(*words: str) -> str:
    """Ask SLURM, and return its answer."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a SLURM inside the block; the programs that ask it find it."""
    if absent := [name for name in PROGRAMS if shutil.which(name, path=DAEMONS_PATH) is None]:
        pytest.skip(f"no SLURM here ({', '.join(absent)} missing); to install it: {INSTALL}")
    if os.getuid() != 0:
        pytest.skip("SLURM's own daemons need root")
    with tempfile.TemporaryDirectory(prefix="flatpatch-slurm-", dir="/tmp") as name:  # a socket's path must be short
        folder = Path(name)
        with _started(folder):
            monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            _wait_until_idle(folder)
            try:
                yield
            finally:
                ask("scancel", "--user=root")
                _wait_until_empty()


@contextmanager
def _started(folder: Path) -> Iterator[None]:
    for part in ("state", "spool", "cgroup"):
        (folder / part).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    settings = SETTINGS.format(
        host=socket.gethostname().partition(".")[0], folder=folder, controller=_free_port(), daemon=_free_port()
    )
    (folder / "slurm.conf").write_text(settings)
    # Named and never used: this slurmd wants one of its kinds, mounted or not.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "sock"))]
    munge += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    commands = (
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf")],
    )
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            program = str(shutil.which(command[0], path=DAEMONS_PATH))
            log = (folder / f"{command[0]}.out").open("wb")
            running.append(subprocess.Popen([program, *command[1:]], stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            log.close()
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.sock").exists(), folder)
        yield
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_idle(folder: Path) -> None:
    def idle() -> bool:
        asked = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, check=False)
        return asked.stdout.strip() == "idle"

    _wait(idle, folder)


def _wait_until_empty() -> None:
    deadline = time.monotonic() + 40
    while ask("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.2)


def _wait(condition, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
            pytest.fail(f"SLURM did not come up:\n{logs}")
        time.sleep(0.1)

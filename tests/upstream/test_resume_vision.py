"""A run of an image repository that is killed again and again ends as one that was not, bit for bit.

The authors' own main.py trains on a tiny model (vision_upstream.py); the process is killed with SIGKILL at random
moments of its training and started again by the same command. The undisturbed run keeps no checkpoints, so that
checkpoints are also seen to change nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flatpatch.measuring import Request
from flatpatch.patches import build
from flatpatch.upstreams import UPSTREAMS
from tests import vision_upstream
from tests.kills import KILLS
from tests.upstream.test_neutrality_vision import METHODS, TASKS, description, differences

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(900)]
TESTS = Path(__file__).resolve().parents[1]
MEASURED = Request(kinds=("loss",), scopes=("adapter",), samples=6, batch=4)


def prepare(
    folder: Path,
    repo: str,
    changes: Sequence[dict[str, Any]] = ({},),
    *,
    seeds: Sequence[int] = (0,),
    depth: int = vision_upstream.SIZES["depth"],
    checkpoints: bool = True,
    **sam: Any,
) -> Path:
    """Write what main.py and the hooks are told into a new folder."""
    folder.mkdir()
    for number, change in enumerate(changes):
        config = vision_upstream.CONFIGS[repo] | {"seed": list(seeds)} | change
        (folder / f"config{number}.json").write_text(json.dumps(config))
    hook = description(repo, **sam)
    hook["vision"]["model"] = vision_upstream.SIZES | {"depth": depth}
    by = "flatpatch.measurement.in_run:Measurer"
    hook["measure"] = {"request": MEASURED.as_dict(), "folder": "flatness", "by": by}
    hook["keep"] = {"folder": "models", "names": UPSTREAMS[METHODS[repo]].kept}
    if checkpoints:
        hook["checkpoints"] = {"folder": "checkpoints", "made_by": {"run": repo}, "stop": "stop"}
    (folder / "hook.json").write_text(json.dumps(hook))
    return folder


def start(folder: Path, repo: str) -> subprocess.Popen[bytes]:
    tree = build(repo, into=folder.parent).path
    configs = ",".join(sorted(path.name for path in folder.glob("config*.json")))
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "FLATPATCH_RUN": "hook.json"}
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, TESTS / "vision_upstream.py", tree, configs, "results.pt"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(folder: Path, repo: str) -> dict[str, Any]:
    """Let the process run to its end, and return what the one that ended has learned."""
    code = start(folder, repo).wait()
    said = (folder / "output.txt").read_text()
    assert code == 0, said[-4000:]
    return {"folder": folder, "said": said, **torch.load(folder / "results.pt", weights_only=False)}


def done(folder: Path) -> int:
    """The number of tasks of which the newest checkpoint is."""
    return max((int(path.name) for path in folder.glob("checkpoints/0*")), default=0)


def kill(folder: Path, repo: str, *, after: int, later: float) -> None:
    """Kill the process so many seconds after it has begun a task and so many are done."""
    progress = folder / "progress.json"
    progress.unlink(missing_ok=True)
    process = start(folder, repo)
    try:
        while process.poll() is None and not (done(folder) >= after and progress.exists()):
            time.sleep(0.01)
        time.sleep(later)
    finally:
        process.kill()
    assert process.wait() in (0, -signal.SIGKILL), (folder / "output.txt").read_text()[-4000:]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The steps as recorded, but for the time they took."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def measured(folder: Path) -> dict[str, Any]:
    """What was measured, but for the time it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(inner) for key, inner in value.items() if key != "seconds"}
        return [timeless(inner) for inner in value] if isinstance(value, list) else value

    return {path.name: timeless(json.loads(path.read_text())) for path in sorted(folder.glob("flatness/*.json"))}


def logged(folder: Path) -> dict[str, list[str]]:
    """All that upstream has logged, but for its times."""
    logs = {str(path.relative_to(folder)): path.read_text().splitlines() for path in folder.rglob("*.log")}
    said = {name: [line.split(" => ", 1)[-1] for line in text] for name, text in logs.items()}
    return {name: [line for line in text if not line.startswith("Time:")] for name, text in said.items()}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine, other = ours["folder"], theirs["folder"]
    # What was learned is asked of the process that ends: of the trainings in which it has learned a task. The numbers
    # taken from tensors are those of its own tasks alone.
    theirs = theirs | {"seeds": theirs["seeds"][len(theirs["seeds"]) - len(ours["seeds"]) :]}
    assert differences(*[[{**s, "numbers": []} for s in run["seeds"]] for run in (ours, theirs)]) == []
    assert lines(mine) == lines(other)
    assert measured(mine) == measured(other) != {}
    assert json.loads((mine / "summary.json").read_text()) == json.loads((other / "summary.json").read_text())
    assert logged(mine) == logged(other) != {}
    names = sorted(path.name for path in (other / "models").iterdir())
    assert sorted(path.name for path in (mine / "models").iterdir()) == names != []
    for name in names:
        assert differences(load_file(mine / "models" / name), load_file(other / "models" / name)) == []


@pytest.fixture(scope="module", params=["InfLoRA", "CL-LoRA", "SD-LoRA"])
def repo(request: pytest.FixtureRequest, upstream: Callable[[str], Path]) -> str:
    upstream(request.param)
    return str(request.param)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(repo: str, tmp_path: Path) -> None:
    sam = {"kind": "sam", "rho": 0.1}
    theirs = finish(prepare(tmp_path / "undisturbed", repo, checkpoints=False, **sam), repo)
    folder = prepare(tmp_path / "killed", repo, **sam)
    drawn = random.Random(repo)
    for _ in range(KILLS):
        kill(folder, repo, after=min(done(folder) + 1, TASKS[repo] - 1), later=drawn.uniform(0, 0.5))
    ours = finish(folder, repo)
    assert_equal(ours, theirs)
    assert "tasks were done before; going on after them" in ours["said"]


def test_every_variant_of_inflora_goes_on_also_past_a_torn_checkpoint_and_when_asked_to_stop(
    upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("InfLoRA")
    few = {"init_cls": 5, "increment": 5, "total_sessions": 2, "fc_lrate": 0.01}
    # One process trains all in turn. CA1 stops with an AttributeError in its second task, as upstream does.
    one = {"model_name": "InfLoRA_CA1", "init_cls": 10, "increment": 10, "total_sessions": 1}
    names = ("InfLoRAb5", "InfLoRA_CA", "InfLoRA_domain", "InfLoRAb5_domain")
    variants = [*(few | {"model_name": name} for name in names), few | one]
    more = {"changes": variants, "depth": 6, "kind": "off"}
    theirs = finish(prepare(tmp_path / "undisturbed", "InfLoRA", checkpoints=False, **more), "InfLoRA")
    folder = prepare(tmp_path / "stopped", "InfLoRA", **more)

    kill(folder, "InfLoRA", after=3, later=0.0)
    state = folder / "checkpoints" / f"{done(folder):09d}" / "state.pt"
    torn = done(folder)
    state.write_bytes(state.read_bytes()[:-1])
    (folder / "stop").touch()
    process = start(folder, "InfLoRA")
    assert process.wait() == 85
    said = (folder / "output.txt").read_text()
    assert f"{torn:09d} cannot be used: state.pt was altered" in said
    assert f"{torn - 1} tasks were done before; going on after them" in said
    assert done(folder) == torn, "it learned one task more, and stopped"

    (folder / "stop").unlink()
    ours = finish(folder, "InfLoRA")
    assert len(ours["seeds"]) >= len(variants) - 2
    assert_equal(ours, theirs)

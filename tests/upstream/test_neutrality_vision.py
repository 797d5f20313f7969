"""Promise P1 for the image repositories: with SAM off, and with rho=0, a patched run equals the authors' bit for bit.

Upstream's own main.py runs five tasks of InfLoRA, three of CL-LoRA and three of SD-LoRA on a tiny model. The unpatched
tree is really unpatched: what a machine without GPU needs is put in place from outside (vision_upstream.py). All
processes start warm (warm.py), the authors' and ours.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flatpatch.measuring import Request
from flatpatch.patches import build
from flatpatch.upstreams import UPSTREAMS
from tests import vision_upstream
from tests.warm import IMAGES

pytestmark = [pytest.mark.third_party, pytest.mark.slow, pytest.mark.timeout(900)]
TESTS = Path(__file__).resolve().parents[1]
METHODS = {"InfLoRA": "inflora", "CL-LoRA": "cllora", "SD-LoRA": "sdlora"}
TASKS = {"InfLoRA": 5, "CL-LoRA": 3, "SD-LoRA": 3}
# Two batches, or four, in each of two epochs; CL-LoRA takes two steps a batch from its second task on.
STEPS = {"InfLoRA": [4] * 5, "CL-LoRA": [8] + [16] * 2, "SD-LoRA": [8] * 3}

MEASURED = Request(kinds=("loss", "eigenvalues", "slice"), scopes=("adapter",), samples=6, batch=4)


def run(
    warm: Callable[..., Path],
    folder: Path,
    repo: str,
    seeds: list[int],
    *,
    patched: bool = True,
    measured: bool = False,
    changes: tuple[dict[str, Any], ...] = ({},),
    depth: int = vision_upstream.SIZES["depth"],
    **sam: Any,
) -> dict[str, Any]:
    """Run main.py in a folder; with SAM settings the hooks are on, without them everything is emulated from outside."""
    folder.mkdir()
    tree = build(repo, patched=patched, into=folder.parent).path
    configs = [f"config{number}.json" for number in range(len(changes))]
    for config, change in zip(configs, changes, strict=True):
        (folder / config).write_text(json.dumps(vision_upstream.CONFIGS[repo] | {"seed": seeds} | change))
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    if sam:
        hook = description(repo, **sam)
        if measured:
            by = "flatpatch.measurement.in_run:Measurer"
            hook["measure"] = {"request": MEASURED.as_dict(), "folder": str(folder / "flatness"), "by": by}
            names = UPSTREAMS[METHODS[repo]].kept
            hook["keep"] = {"folder": str(folder / "models"), "names": names}
        hook["vision"]["model"] = vision_upstream.SIZES | {"depth": depth}
        (folder / "hook.json").write_text(json.dumps(hook))
        environment["FLATPATCH_RUN"] = str(folder / "hook.json")
    command = [warm(IMAGES), TESTS / "vision_upstream.py", tree, ",".join(configs), "results.pt"]
    done = subprocess.run(
        [*map(str, command), *([] if sam else [str(depth)])],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return {"folder": folder, **torch.load(folder / "results.pt", weights_only=False)}


def names_of_tasks(repo: str) -> list[str]:
    classes = vision_upstream.CONFIGS[repo]["increment"]
    return [f"{classes * task}-{classes * (task + 1) - 1}" for task in range(TASKS[repo])]


def description(repo: str, **sam: Any) -> dict[str, Any]:
    settings = {
        "kind": "sam",
        "rho": 0.0,
        "eta": 0.01,
        "scope": "lora",
        "sync": "local",
        "ascent_loss": "total",
        "seed": 0,
    }
    return {
        "schema": 1,
        "task_index": None,
        "task": None,
        "tasks": names_of_tasks(repo),
        "metrics": "metrics.jsonl",
        "progress": "progress.json",
        "summary": "summary.json",
        "sam": settings | sam,
        "adapters": "upstream",
        "vision": {
            "device": "cpu",
            "data": None,
            "weights": None,
            "workers": 0,
            "model": vision_upstream.SIZES,
            "dataset": {"class": f"vision_upstream:{vision_upstream.DATA[repo].__name__}", "seed": 0},
            "sam_on": "both",
        },
    }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def differences(ours: Any, theirs: Any) -> list[str]:
    """Name what is not equal bit for bit."""
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    equal = {
        path: torch.equal(a[path], b[path]) if isinstance(a[path], torch.Tensor) else a[path] == b[path]
        for path in a.keys() & b.keys()
    }
    return sorted((a.keys() ^ b.keys()) | {path for path, same in equal.items() if not same})


def logged(folder: Path, seed: int) -> list[str]:
    """The losses and accuracies in a seed's own log file, without its times of day."""
    (log,) = [path for path in folder.rglob("*.log") if re.search(rf"(^|_| ){seed}(_|\.)", path.name)]
    lines = [line.split(" => ", 1)[-1] for line in log.read_text().splitlines()]
    assert f"seed: {seed}" in lines
    return [line for line in lines if re.search("Loss|CNN|Accuracy|Forgetting|correct", line)]


@pytest.fixture(scope="module", params=["InfLoRA", "CL-LoRA", "SD-LoRA"])
def repo(request: pytest.FixtureRequest, upstream: Callable[[str], Path]) -> str:
    upstream(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def folder(repo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(repo)


@pytest.fixture(scope="module")
def authors(warm: Callable[..., Path], repo: str, folder: Path) -> dict[str, Any]:
    return run(warm, folder / "authors", repo, [0, 1], patched=False)


def test_the_authors_run_learns_something_in_every_task(repo: str, authors: dict[str, Any]) -> None:
    weights = [seed["weights"] for seed in authors["seeds"]]
    assert len(authors["seeds"]) == 2
    changed = [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])]
    learned = {
        "InfLoRA": [f"classifier_pool.{task}.weight" for task in range(5)],
        "CL-LoRA": [f"fc_list.{task}.weight" for task in range(3)],
        "SD-LoRA": ["fc.weight", *(f"backbone.wrapped_param{name}.param" for name in (".0", "_prev.0", "_prev.1"))],
    }[repo]
    assert set(learned) <= set(changed)
    assert sum("Loss" in line for line in logged(authors["folder"], 0)) == TASKS[repo]


def test_rho_zero_equals_the_authors_run_bit_for_bit(
    warm: Callable[..., Path], repo: str, folder: Path, authors: dict[str, Any]
) -> None:
    ours = run(warm, folder / "zero", repo, [0, 1], kind="sam", rho=0.0)
    assert differences(ours["seeds"], authors["seeds"]) == []
    for seed in (0, 1):
        assert logged(ours["folder"], seed) == logged(authors["folder"], seed)
    lines = [json.loads(line) for line in (ours["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * sum(STEPS[repo])
    # The second pass was taken, and found the loss that the loop found.
    assert all(line["perturbed_loss"] == line["loss"] > 0 for line in lines)
    assert all(line["grad_norm"] > 0 and line["perturbation_norm"] == 0 for line in lines)


def test_sam_off_with_measuring_on_and_a_seed_of_its_own_equal_the_authors_second_seed(
    warm: Callable[..., Path], repo: str, folder: Path, authors: dict[str, Any]
) -> None:
    ours = run(warm, folder / "off", repo, [1], measured=True, kind="off")
    assert differences(ours["seeds"][0], authors["seeds"][1]) == []
    assert logged(ours["folder"], 1) == logged(authors["folder"], 1)
    points = [json.loads(path.read_text()) for path in (ours["folder"] / "flatness").glob("*.json")]
    whens = [(task, when) for task in range(TASKS[repo]) for when in ("after", "before")]
    assert sorted((point["task_index"], point["when"]) for point in points) == whens
    for point in points:
        assert (point["error"], point["scopes"]["adapter"]["errors"]) == (None, {})
        assert point["samples"] == 6
        assert point["scopes"]["adapter"]["values"]["top_eigenvalue"] is not None
        # Before a task too, when the factor next to the output is zero, the loss changes along the slice.
        along = point["scopes"]["adapter"]["results"]["slice"]
        assert along["axes"][0]["normalisation"] == "merged_rows"
        assert along["axes"][0]["zero_units"] == {}
        assert max(along["losses"]) - min(along["losses"]) > 1e-4
    losses = {(p["task_index"], p["when"]): p["scopes"]["adapter"]["loss"] for p in points}
    assert all(losses[task, "after"] != losses[task, "before"] for task in range(TASKS[repo]))
    kept = [load_file(ours["folder"] / "models" / f"{task + 1}.safetensors") for task in range(TASKS[repo])]
    final = ours["seeds"][0]["weights"]
    if repo == "InfLoRA":  # what a task trained stays as it was then
        assert all(torch.equal(tensor, final[name]) for file in kept for name, tensor in file.items())
        assert {len(file) for file in kept} == {2 * 2 * 2 + 2}  # two blocks' A and B of keys and values, a classifier
    elif repo == "SD-LoRA":
        assert {len(file) for file in kept} == {2 * 4 + 21 + 2}  # two blocks' factors, all magnitudes, the classifier
        assert all(torch.equal(tensor, final[name]) for name, tensor in kept[-1].items())
        for task in range(2):
            *_, last = ours["seeds"][0]["earlier"][f"saved_B_{task}"]
            assert torch.equal(kept[task]["backbone.lora_vit.blocks.1.attn.qkv.linear_b_v.weight"], last)
    else:
        assert all(torch.equal(kept[task]["proxy_fc.weight"], final[f"fc_list.{task}.weight"]) for task in range(3))
        adapters = {name: tensor for name, tensor in kept[-1].items() if "cur_adapter.0." in name}
        assert len(adapters) == 4
        assert all(torch.equal(tensor, final[name]) for name, tensor in adapters.items())  # shared ones
    assert {point["task"] for point in points} == set(names_of_tasks(repo))


def test_patched_code_without_a_run_equals_the_authors(
    warm: Callable[..., Path], repo: str, folder: Path, authors: dict[str, Any]
) -> None:
    ours = run(warm, folder / "none", repo, [0])
    assert differences(ours["seeds"][0], authors["seeds"][0]) == []


def test_sam_perturbs_every_step_and_nothing_else(
    warm: Callable[..., Path], repo: str, folder: Path, authors: dict[str, Any]
) -> None:
    ours = run(warm, folder / "sam", repo, [0], kind="sam", rho=0.2)
    assert any(".weights." in path for path in differences(ours["seeds"], authors["seeds"][:1]))
    lines = [json.loads(line) for line in (ours["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert [sum(line["task"] == name for line in lines) for name in names_of_tasks(repo)] == STEPS[repo]
    for line in lines:
        assert line["perturbation_norm"] == pytest.approx(0.2, rel=1e-6)
        assert line["effective_perturbation_norm"] == pytest.approx(0.2, rel=1e-4)
        assert line["perturbation_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert sum(line["perturbed_loss"] > line["loss"] for line in lines) > 0.9 * len(lines)
    # Before and after each task InfLoRA passes over its two batches of features.
    assert ours["features_unperturbed"] == ([True] * 20 if repo == "InfLoRA" else [])
    summary = json.loads((ours["folder"] / "summary.json").read_text())
    assert [task["steps"] for task in summary["tasks"]] == STEPS[repo]
    assert summary["steps"] == sum(STEPS[repo])


def test_every_variant_of_inflora_is_neutral_at_rho_zero(
    warm: Callable[..., Path], upstream: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream("InfLoRA")
    names = ("InfLoRAb5", "InfLoRA_CA", "InfLoRA_CA1", "InfLoRA_domain", "InfLoRAb5_domain")
    # The b5 variants adapt the first five blocks.
    few = {"init_cls": 5, "increment": 5, "total_sessions": 2, "fc_lrate": 0.01}
    # CA1 stops with an AttributeError in its second task, on one device as on several.
    one = {"init_cls": 10, "increment": 10, "total_sessions": 1}
    variants = tuple(few | {"model_name": name} | (one if name == "InfLoRA_CA1" else {}) for name in names)
    theirs = run(warm, tmp_path / "authors", "InfLoRA", [0], patched=False, changes=variants, depth=6)
    ours = run(warm, tmp_path / "zero", "InfLoRA", [0], changes=variants, depth=6, kind="sam", rho=0.0)
    assert len(theirs["seeds"]) == len(names)
    assert differences(ours["seeds"], theirs["seeds"]) == []
    lines = [json.loads(line) for line in (ours["folder"] / "metrics.jsonl").read_text().splitlines()]
    # Five batches of up to nine images, two epochs, two tasks; or nine in one.
    assert len(lines) == (len(names) - 1) * 2 * 2 * 5 + 2 * 9
    assert all(line["perturbed_loss"] == line["loss"] for line in lines)
